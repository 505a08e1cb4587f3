"""Another S3 server is only settings: endpoint, keys, region, addresses, TLS."""

import re
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from rlhf_core.errors import StoreUnavailable
from rlhf_core.store import open_store
from tests.rlhf_core.store.proxy import Proxy
from tests.rlhf_core.store.seaweed import ACCESS_KEY, SECRET_KEY, SeaweedServer


@pytest.mark.parametrize("name", ["RLHF_STORE_PROFILE", "AWS_PROFILE"])
def test_keys_and_endpoint_come_from_a_profile(
    s3_url: str, seaweed: SeaweedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RLHF_STORE_ENDPOINT"):
        monkeypatch.delenv(variable)
    (tmp_path / "keys").write_text(
        "[default]\naws_access_key_id = wrong\naws_secret_access_key = wrong\n"
        f"[mine]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    )
    (tmp_path / "config").write_text(
        f"[profile mine]\nregion = eu-west-9\nendpoint_url = {seaweed.endpoint}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv(name, "mine")
    open_store(s3_url).check()


def test_endpoint_comes_from_the_aws_variable(
    s3_url: str, seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RLHF_STORE_ENDPOINT")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", seaweed.endpoint)
    open_store(s3_url).check()


@pytest.fixture
def request_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is asked of a host that exists nowhere: botocore sends it through a proxy of ours."""
    seen: list[str] = []
    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            with client:
                seen.append(client.recv(65536).decode())
                client.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    threading.Thread(target=answer, daemon=True).start()
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setenv("RLHF_STORE_ENDPOINT", "http://store.test:9000")
    yield seen
    server.close()


@pytest.mark.parametrize(
    ("path_style", "url"),
    [
        ("true", "http://store.test:9000/artifacts?"),
        ("false", "http://artifacts.store.test:9000/?"),
    ],
)
def test_bucket_is_in_the_path_or_in_the_host(
    request_seen: list[str], monkeypatch: pytest.MonkeyPatch, path_style: str, url: str
) -> None:
    monkeypatch.setenv("RLHF_STORE_PATH_STYLE", path_style)
    with pytest.raises(StoreUnavailable, match=r"http://store\.test:9000 refused"):
        open_store("s3://artifacts/x").ping()
    assert request_seen[0].split()[1].startswith(url)


@pytest.mark.parametrize(("region", "signed"), [("eu-west-9", "eu-west-9"), (None, "us-east-1")])
def test_region_is_signed(
    request_seen: list[str], monkeypatch: pytest.MonkeyPatch, region: str | None, signed: str
) -> None:
    if region:
        monkeypatch.setenv("RLHF_STORE_REGION", region)
    with pytest.raises(StoreUnavailable):
        open_store("s3://artifacts/x").ping()
    scope = re.search(rf"Credential={ACCESS_KEY}/\d+/([^/]+)/s3/aws4_request", request_seen[0])
    assert scope is not None and scope[1] == signed
    assert SECRET_KEY not in request_seen[0]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate of 127.0.0.1, with its key."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a store")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "certificate.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


def test_certificate_is_checked_against_an_authority_of_ones_own_or_not_at_all(
    s3_url: str, seaweed: SeaweedServer, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    proxy = Proxy(int(seaweed.endpoint.rpartition(":")[2]), context)
    monkeypatch.setenv("RLHF_STORE_ENDPOINT", proxy.endpoint)
    try:
        with pytest.raises(StoreUnavailable, match="AWS_CA_BUNDLE") as caught:
            open_store(s3_url).check()
        assert proxy.endpoint in str(caught.value)
        with monkeypatch.context() as patch:
            patch.setenv("AWS_CA_BUNDLE", str(certificate))
            open_store(s3_url).check()
        monkeypatch.setenv("RLHF_STORE_TLS_VERIFY", "false")
        open_store(s3_url).check()
    finally:
        proxy.close()
