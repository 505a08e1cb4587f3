"""Keys of the local S3 server: those of its clients, and the certificate of its own parts."""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rlhf_core.errors import ConfigError
from rlhf_core.system.private import write_private

NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def access_keys(path: Path) -> dict[str, str]:
    """The S3 keys in a file, created on first use, readable by this user only.

    Raises:
        ConfigError: the file holds no keys.
    """
    if not path.exists():
        made = dict(zip(NAMES, (secrets.token_hex(10), secrets.token_hex(20)), strict=True))
        write_private(path, json.dumps(made))
    try:
        keys = json.loads(path.read_text())
        return {name: str(keys[name]) for name in NAMES}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path} is damaged: expected JSON with {' and '.join(NAMES)}. Delete it to get new "
            "keys; the data stays readable."
        ) from None


def grpc_certificate(path: Path) -> Path:
    """A file with a private key and a certificate that signs itself, created on first use.

    The server's parts trust this certificate and no other. So they need it to talk to each other,
    and nobody else can talk to them.
    """
    if not path.exists():
        write_private(path, _certificate())
    return path


def _certificate() -> str:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "rlhf")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks differ
        .not_valid_after(now + timedelta(days=36500))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return (secret + certificate.public_bytes(pem)).decode()
