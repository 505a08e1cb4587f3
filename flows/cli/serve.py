"""`rlhf serve`: an OpenAI-compatible API for a model. The server is in rlhf_core/serving."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from flows.cli.listing import open_now
from flows.cli.options import StoreUrl, TrustRemoteCode
from flows.cli.output import echo

KEY = "RLHF_API_KEY"


def serve(
    model: Annotated[
        str | None, typer.Argument(help="Published name, stage (sft, ppo) or digest.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. If other machines can reach it, the "
                               f"command needs an API key (${KEY}, or from a prompt).")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the API.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Model name for clients; default: the published name.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="transformers, vllm, or auto: vllm if it is installed.")
    ] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    store: StoreUrl = None,
) -> None:  # fmt: skip
    """Serve a model to any OpenAI client: the newest published one, or any stage's."""
    from typing import cast, get_args

    from flows.cli.access import password_for
    from flows.cli.lookup import find_model
    from rlhf_core.serving import Engine, main

    if engine not in get_args(Engine):
        raise typer.BadParameter(f"{engine}: choose one of {', '.join(get_args(Engine))}")
    key = password_for(host, KEY, "the API (clients send it as their API key)")
    opened = open_now(store)
    artifact = find_model(opened, model)
    shown = name or artifact.metadata.get("name") or model or artifact.digest[:12]
    folder = opened.fetch(artifact.digest)
    echo(f"loading {artifact.ref}")
    main(
        folder,
        name=shown,
        host=host,
        port=port,
        key=key,
        engine=cast("Literal['auto', 'transformers', 'vllm']", engine),
        trust_remote_code=trust_remote_code,
        on_ready=lambda url: echo(f"{url}/v1  model {shown}  (Ctrl-C ends it)"),
    )
