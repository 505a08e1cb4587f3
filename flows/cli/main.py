"""The command `rlhf`. Each command imports what it needs itself, so that `rlhf` starts fast."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
import traceback
from pathlib import Path
from typing import Annotated, NoReturn, cast

import typer

from flows.cli import run as running
from flows.cli.compare import compare
from flows.cli.gc import gc
from flows.cli.listing import artifacts, open_now
from flows.cli.models import models
from flows.cli.options import AsJson, StoreUrl, TrustRemoteCode
from flows.cli.output import echo, print_json
from flows.cli.playground import playground
from flows.cli.release import export, push
from flows.cli.repair import delete, repair
from flows.cli.rewards import rewards
from flows.cli.runs import runs
from flows.cli.schedule import schedule
from flows.cli.serve import serve
from rlhf_core import __version__
from rlhf_core.errors import RLHFError
from rlhf_core.system.cpus import limit_threads
from rlhf_core.system.home import rlhf_home
from rlhf_core.system.private import private_folder, write_private
from rlhf_core.system.secrets import redact

app = typer.Typer(
    name="rlhf",
    help="RLHF as a pipeline: data, SFT, reward model, PPO, evaluation, publishing.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
artifacts.command("gc")(gc)
artifacts.command("repair")(repair)
artifacts.command("delete")(delete)
models.command("push")(push)
models.command("export")(export)
app.add_typer(artifacts, name="artifacts")
app.add_typer(models, name="models")
app.add_typer(rewards, name="rewards")

PACKAGES = ("torch", "transformers", "colossalai", "prefect")


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib import metadata

    found = [f"python {sys.version.split()[0]}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    echo(f"rlhf {__version__}\n{', '.join(found)}")
    raise typer.Exit


@app.callback()
def _join_system(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the version, and those of the main packages.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    limit_threads()  # for the commands that load a model themselves
    started = (rlhf_home() / "system" / "system.json").exists()
    if started and context.invoked_subcommand not in ("up", "down"):
        from flows.cli import system

        system.join()


for command in (running.run, running.stage, running.submit, running.retry, running.cancel):
    app.command()(command)


@app.command()
def up(
    context: typer.Context,
    port: Annotated[int, typer.Option(help="Port of the Prefect server.")] = 4200,
    s3_port: Annotated[int, typer.Option(help="Port of the S3 server; 0 takes a free one.")] = 8333,
    no_s3: Annotated[bool, typer.Option("--no-s3", help="Keep artifacts in files.")] = False,
    slots: Annotated[int, typer.Option(min=1, help="Jobs that the gpu pool runs at once.")] = 1,
    host: Annotated[str, typer.Option(help="Address the Prefect server listens on.")] = "127.0.0.1",
) -> None:
    """Start a whole system here: Prefect server, S3 server, two workers, the deployments."""
    from flows.cli import system

    typed = {name for name in context.params if _typed(context, name)}
    given = {"s3_port" if name == "no_s3" else name for name in typed}
    running = system.read() is not None
    echo("already running" if running else "starting (about half a minute)")
    started = system.up(system.Options(port, None if no_s3 else s3_port, slots, host), given)
    echo(f"  pages     {started.ui}")
    echo(f"  login     paste the line of {system.login_file()} (once per browser)")
    echo(f"  store     {started.store}")
    echo(f"  run       {started.ui}/deployments  or  rlhf submit --preset smoke")
    echo(f"  logs      {system.folder()}")
    echo("  stop      make down  or  rlhf down")


def _typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@app.command()
def down(
    now: Annotated[
        bool, typer.Option("--now", help="Do not wait until stages have written a checkpoint.")
    ] = False,
) -> None:
    """Stop what `rlhf up` started. Artifacts and the records of runs are kept. Runs in progress
    stop at a checkpoint."""
    from flows.cli import drain, system

    if (started := system.read()) is not None and started.phase == "ready":
        system.join()
        drain.before_down(wait=not now)
    echo("stopped" if system.down() else f"No system runs for {system.folder().parent}.")


@app.command()
def presets(as_json: AsJson = False) -> None:
    """List the presets."""
    from flows.cli.completion import complete_preset

    found = complete_preset("")
    if as_json:
        print_json({"name": name, "description": description} for name, description in found)
        return
    width = max(len(name) for name, _ in found) + 2
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    for name, description in found:
        echo(textwrap.fill(f"{name:<{width}}{description}", columns, subsequent_indent=" " * width))


app.command("schedule")(schedule)
app.command("runs")(runs)
app.command("compare")(compare)
app.command("playground")(playground)
app.command("serve")(serve)


@app.command()
def notify(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="webhook, slack or email.")],
    sender: Annotated[str | None, typer.Option(help="E-mail address of the sender.")] = None,
    to: Annotated[list[str] | None, typer.Option(help="E-mail address; can be repeated.")] = None,
) -> None:
    """Send a notification when a run fails or a model is published.

    It goes to a webhook, to Slack, or by e-mail (SendGrid). The command prompts for the URL or key,
    or reads it from RLHF_NOTIFY_SECRET.
    """
    from typing import get_args

    from flows import notify as notifications
    from flows.cli import remote

    if kind not in get_args(notifications.Kind):
        kinds = ", ".join(get_args(notifications.Kind))
        raise typer.BadParameter(f"{kind}: choose one of {kinds}")
    remote.ui()  # fails where no server runs
    chosen = cast(notifications.Kind, kind)
    name = notifications.save(chosen, notifications.read_secret(chosen), sender, to)
    from flows import automations

    automations.apply()
    echo(f"Saved as block {name}. It is notified of failed runs and of published models.")


@app.command()
def chat(
    model: Annotated[
        str | None, typer.Argument(help="Published name, stage (sft, ppo, dpo) or digest.")
    ] = None,
    once: Annotated[
        str | None, typer.Option("--once", help="Answer this one message and end.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Same seed, same replies.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    store: StoreUrl = None,
) -> None:
    """Chat with a model: the newest published one, a name's champion, or a stage's."""
    from flows.cli.lookup import find_model

    opened = open_now(store)
    artifact = find_model(opened, model)
    folder = opened.fetch(artifact.digest)
    import rlhf_core.chat.terminal as terminal

    terminal.main(
        folder,
        once=once,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Model to estimate the memory of, as model.source.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs to estimate for. Default: this machine's.")
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, help="GiB of each of them. Default: this machine's.")
    ] = None,
    length: Annotated[
        int, typer.Option(min=1, help="Tokens of the longest sequence, with its reply.")
    ] = 512,
    parameters: Annotated[
        str | None, typer.Option(help="Instead of a model: a llama of this size, such as 7B.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what this machine has, what is missing, and which ways to train a model fit into memory.

    `rlhf doctor ./my-model --gpus 8 --gpu-memory 80 --length 2048` answers for other GPUs.
    """
    import rlhf_core.preflight.doctor as checks

    question = checks.Question(model, parameters, gpus, gpu_memory, length)
    raise typer.Exit(checks.main(question, as_json))


@app.command()
def job(
    file: Annotated[Path, typer.Argument(help="A job file; see `rlhf artifacts show`.")],
    store: StoreUrl = None,
) -> None:
    """Run one job file, without Prefect."""
    from rlhf_core.runtime.job_file import read_job
    from rlhf_core.store import open_store
    from tasks.events import headline
    from tasks.launchers import Launch, LocalTorchrun

    parsed = read_job(file)
    opened = open_store(store)
    folder = private_folder("jobs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{parsed.algorithm}"
    launch = Launch(parsed.algorithm, {folder: parsed}, opened.url, folder / "log.txt")
    outcome = LocalTorchrun().run(launch, echo, lambda line: None)[0]
    artifact = opened.get(outcome.artifact)
    echo(f"{artifact.ref}  {headline(artifact.metadata.get('metrics') or {})}".rstrip())


# --------------------------------------------------------------------------- errors


def main() -> None:
    """Entry point: every expected error is one message on stderr, without a traceback."""
    try:
        app()
    except RLHFError as error:
        _fail(str(error))
    except (KeyboardInterrupt, SystemExit) as stop:
        code = stop.code if isinstance(stop, SystemExit) else 130
        if code in (130, 143):
            echo(
                "\nStopped; all processes of the run have ended. Run the same command again to "
                "resume from the last checkpoint.",
                err=True,
            )
        raise SystemExit(code) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        crash = rlhf_home() / "crash.log"
        crash.parent.mkdir(parents=True, exist_ok=True)
        write_private(crash, redact(traceback.format_exc()))
        _fail(f"{type(error).__name__}: {error}\nThis was not expected. Details: {crash}")


def _fail(text: str) -> NoReturn:
    sys.stdout.flush()
    text = redact(text)
    echo(f"\nError: {text}" if "\n" in text else f"Error: {text}", err=True)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
