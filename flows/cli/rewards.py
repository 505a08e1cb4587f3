"""`rlhf rewards ...`: a reward model as a service. The server is in rlhf_core/serving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.listing import open_now
from flows.cli.options import StoreUrl, TrustRemoteCode
from flows.cli.output import echo
from flows.cli.serve import KEY

if TYPE_CHECKING:
    from rlhf_core.store import Artifact, Store

rewards = typer.Typer(help="Reward models as services.", no_args_is_help=True)


@rewards.callback()
def _group() -> None:
    """Keeps `serve` a command of its own."""


@rewards.command("serve")
def serve(
    model: Annotated[
        str, typer.Argument(metavar="REWARD_MODEL", help="Stage of the newest run that has it "
                            "(reward, reward-2), or digest of a reward model.")
    ] = "reward",
    host: Annotated[
        str, typer.Option(help="Address to listen on. If other machines can reach it, the "
                               f"command needs a key (${KEY}, or from a prompt).")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the service.")] = 8100,
    trust_remote_code: TrustRemoteCode = False,
    store: StoreUrl = None,
) -> None:  # fmt: skip
    """Serve a reward model to rewards of type http: POST /score, see docs/rewards.md."""
    from flows.cli.access import password_for
    from rlhf_core.serving.reward_server import main

    key = password_for(host, KEY, "the service (clients send it as their key)")
    opened = open_now(store)
    artifact = find_reward_model(opened, model)
    folder = opened.fetch(artifact.digest)
    echo(f"loading {artifact.ref}")
    main(
        folder,
        name=artifact.digest[:12],
        host=host,
        port=port,
        key=key,
        trust_remote_code=trust_remote_code,
        on_ready=lambda url: echo(f"{url}/score  {artifact.ref}  (Ctrl-C ends it)"),
    )


def find_reward_model(store: Store, reference: str) -> Artifact:
    """A reward model by stage of the newest run that has it, or by digest.

    Raises:
        ArtifactNotFound: there is no such reward model.
    """
    from flows.cli.lookup import DIGEST, elsewhere, read_runs
    from rlhf_core.errors import ArtifactNotFound

    names = set()
    for run in read_runs(store):
        stages = run.get("stages") or {}
        made = {name for name, of in stages.items() if of.get("kind") == "reward_model"}
        if reference in made:
            return store.get(stages[reference]["digest"])
        names |= made
    if DIGEST.fullmatch(reference):
        artifact = store.get(reference)
        if artifact.kind != "reward_model":
            raise ArtifactNotFound(f"{artifact.ref} is a {artifact.kind}, not a reward model.")
        return artifact
    raise ArtifactNotFound(
        f"There is no reward model {reference!r} in {store.url}; stages of runs: "
        f"{', '.join(sorted(names)) or 'none'}; or a digest from `rlhf artifacts list --kind "
        f"reward_model`.{elsewhere(store)}"
    )
