"""Notifications of failed runs and published models: notification blocks on the Prefect server.

An address is a secret: anyone who has a Slack webhook's URL can post there. It is stored encrypted
in the server's database, and comes from the environment or a prompt, never from an argument.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from rlhf_core.errors import ConfigError

Kind = Literal["webhook", "slack", "email"]
PREFIX = "rlhf-notify"
"""All blocks whose name starts like this are used, including those made in the UI."""

SECRET = "RLHF_NOTIFY_SECRET"
SECRET_PROMPTS = {
    "webhook": "URL to post to",
    "slack": "URL of the Slack incoming webhook",
    "email": "SendGrid API key",
}


def save(kind: Kind, secret: str, sender: str | None = None, to: list[str] | None = None) -> str:
    """Store an address on the server; it replaces an earlier one of the same kind.

    Args:
        secret: the URL or key that `SECRET_PROMPTS` describes.
        sender, to: e-mail addresses, for email.

    Returns:
        The block's name.

    Raises:
        ConfigError: the address is not valid.
    """
    name = f"{PREFIX}-{kind}"
    if kind != "email" and not secret.startswith(("http://", "https://")):
        raise ConfigError(
            f"{SECRET_PROMPTS[kind]} was expected, beginning with https://; nothing was saved."
        )
    if kind == "email" and not (secret and sender and to):
        raise ConfigError(
            "email needs a SendGrid API key, --sender and at least one --to; to use your own mail "
            "server, post to a webhook that sends mail."
        )
    try:
        _block(kind, secret, sender, to).save(name=name, overwrite=True)
    except ValueError as error:
        reason = str(error).replace(secret, "...").splitlines()[0]
        raise ConfigError(f"The {kind} address is not usable: {reason}") from None
    return name


def _block(kind: Kind, secret: str, sender: str | None, to: list[str] | None) -> Any:
    from prefect.blocks.notifications import (
        CustomWebhookNotificationBlock,
        SendgridEmail,
        SlackWebhook,
    )

    if kind == "slack":
        return SlackWebhook(url=secret)
    if kind == "email":
        return SendgridEmail(api_key=secret, sender_email=sender, to_emails=to)
    return CustomWebhookNotificationBlock(
        name="rlhf",
        url="{{url}}",
        secrets={"url": secret},
        json_data={"subject": "{{subject}}", "text": "{{body}}"},
    )


def read_secret(kind: Kind) -> str:
    """The secret from the environment, or else from a prompt without echo."""
    import typer

    return os.environ.get(SECRET) or str(typer.prompt(SECRET_PROMPTS[kind], hide_input=True))
