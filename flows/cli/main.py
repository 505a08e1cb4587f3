"""The command `rlhf`. Prefect and everything heavy is imported inside the commands that need it."""

from __future__ import annotations

import difflib
import os
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from flows.cli.gc import gc
from flows.cli.listing import StoreUrl, artifacts, open_now, runs
from flows.cli.models import models
from flows.cli.playground import playground
from flows.cli.serve import serve
from rlhf_core.errors import ConfigError, PreflightError, RLHFError
from rlhf_core.system.secrets import hide

if TYPE_CHECKING:
    from rlhf_core.jobs import PipelineConfig

app = typer.Typer(
    name="rlhf",
    help="RLHF as a pipeline: data, SFT, reward model, PPO, evaluation, publishing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
artifacts.command("gc")(gc)
app.add_typer(artifacts, name="artifacts")
app.add_typer(models, name="models")


@app.callback()
def _join_system(context: typer.Context) -> None:
    if context.invoked_subcommand not in ("up", "down"):
        from flows.cli import system

        system.join()


Preset = Annotated[
    str | None, typer.Option("--preset", "-p", help="A preset's name; see `rlhf presets`.")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="A YAML file with settings, like a preset.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="One setting: ppo.kl_coef=0.1"),
]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="Id of a run, or its start; see `rlhf runs`.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="All output of the ranks.")]


@app.command()
def run(
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    store: StoreUrl = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show the settings; start nothing.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Run the whole pipeline; stages whose result is in the store are reused."""
    settings = _settings(preset, config, overrides, store)
    if dry_run:
        _dry_run(settings)
    else:
        _run(settings, "publish", verbose)


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="model, data, sft, label, reward, ppo, evaluate ...")],
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    store: StoreUrl = None,
    verbose: Verbose = False,
) -> None:
    """Run one stage, and those before it that the store has no result of yet."""
    from rlhf_core.pipeline.recipe import stage_names, steps

    settings = _settings(preset, config, overrides, store)
    names = stage_names(settings)
    if name not in {*names, *(step.algorithm for step in steps(settings))}:
        close = difflib.get_close_matches(name, names, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"There is no stage {name!r}.{hint} Stages: {', '.join(names)}.")
    _run(settings, name, verbose)


@app.command()
def submit(preset: Preset = None, config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Start a pipeline on the workers of a running system (`rlhf up`), and return."""
    from flows.cli.remote import submit as send
    from rlhf_core.jobs import WorkPoolLauncher

    settings = _settings(preset, config, overrides, None)
    typer.echo(send(settings.model_copy(update={"launcher": WorkPoolLauncher()})))


@app.command()
def retry(run: RunName = "last", store: StoreUrl = None, verbose: Verbose = False) -> None:
    """Run a failed run again: what is done is reused, what is not goes on."""
    from flows.cli.remote import retry as again
    from rlhf_core.store import open_store

    where, settings = again(open_store(store), run)
    if settings is None:
        typer.echo(f"scheduled: {where}")
    else:
        _run(settings, "publish", verbose)


@app.command()
def cancel(run: RunName = "last", store: StoreUrl = None) -> None:
    """Cancel a run; its processes end, its last checkpoint stays."""
    from flows.cli.remote import cancel as stop
    from rlhf_core.store import open_store

    typer.echo(stop(open_store(store), run))


@app.command()
def up(
    port: Annotated[int, typer.Option(help="Port of the Prefect server.")] = 4200,
    s3_port: Annotated[int, typer.Option(help="Port of the S3 server; 0 takes a free one.")] = 8333,
    no_s3: Annotated[bool, typer.Option("--no-s3", help="Keep artifacts in files.")] = False,
    slots: Annotated[int, typer.Option(min=1, help="Jobs that the gpu pool runs at once.")] = 1,
    host: Annotated[str, typer.Option(help="Address the Prefect server listens on.")] = "127.0.0.1",
) -> None:
    """Start a whole system here: Prefect server, S3 server, two workers, the deployments."""
    from flows.cli import system

    typer.echo("starting (about half a minute)")
    running = system.up(system.Options(port, None if no_s3 else s3_port, slots, host))
    typer.echo(f"  pages     {running.ui}")
    typer.echo(f"  store     {running.store}")
    typer.echo(f"  run       {running.ui}/deployments  or  rlhf submit --preset smoke")
    typer.echo(f"  logs      {system.folder()}")
    typer.echo("  end       make down  or  rlhf down")


@app.command()
def down() -> None:
    """End what `rlhf up` started; artifacts and the record of runs stay."""
    from flows.cli import system

    typer.echo("ended" if system.down() else f"Nothing runs for {system.folder().parent}.")


@app.command()
def presets() -> None:
    """List the presets."""
    from importlib.resources import files

    from rlhf_core.pipeline.presets import preset_names

    for name in preset_names():
        text = (files("deployments") / "presets" / f"{name}.yaml").read_text("utf-8")
        typer.echo(f"{name:<14}{text.splitlines()[0].lstrip('# ')}")


app.command("runs")(runs)
app.command("playground")(playground)
app.command("serve")(serve)


@app.command()
def notify(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="webhook, slack or email.")],
    sender: Annotated[str | None, typer.Option(help="E-mail address of the sender.")] = None,
    to: Annotated[list[str] | None, typer.Option(help="E-mail address; can be repeated.")] = None,
) -> None:
    """Have failed runs and published models told to a webhook, Slack, or by e-mail (SendGrid).

    The URL or key is asked for, or read from RLHF_NOTIFY_SECRET.
    """
    from typing import get_args

    from flows import notify as telling
    from flows.cli import remote

    if kind not in get_args(telling.Kind):
        raise typer.BadParameter(f"{kind}: choose one of {', '.join(get_args(telling.Kind))}")
    remote.ui()  # refuses where no server runs
    chosen = cast(telling.Kind, kind)
    name = telling.save(chosen, telling.read_secret(chosen), sender, to)
    from flows import automations

    automations.apply()
    typer.echo(f"Saved as block {name}; it is told of failed runs and of published models.")


@app.command()
def chat(
    model: Annotated[
        str | None, typer.Argument(help="Published name, stage (sft, ppo, dpo) or digest.")
    ] = None,
    once: Annotated[
        str | None, typer.Option("--once", help="Answer this one message and end.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Same seed, same replies.")] = 0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that came with the model.")
    ] = False,
    store: StoreUrl = None,
) -> None:
    """Talk to a model: the one published last, a name's champion, or any stage's."""
    from flows.cli.lookup import find_model

    opened = open_now(store)
    artifact = find_model(opened, model)
    folder = opened.fetch(artifact.digest)
    import rlhf_core.chat.terminal as talking

    talking.main(
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
) -> None:
    """What this machine has, what is missing, and the memory that a model needs per strategy."""
    import rlhf_core.preflight.doctor as checking

    raise typer.Exit(checking.main(model))


@app.command()
def job(
    file: Annotated[Path, typer.Argument(help="A job file; see `rlhf artifacts show`.")],
    store: StoreUrl = None,
) -> None:
    """Run one job file by hand, without Prefect."""
    from rlhf_core.runtime.job_file import read_job
    from rlhf_core.store import open_store, rlhf_home
    from tasks.events import headline
    from tasks.launchers import Launch, LocalTorchrun

    parsed = read_job(file)
    opened = open_store(store)
    folder = rlhf_home() / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{parsed.algorithm}"
    launch = Launch(parsed.algorithm, {folder: parsed}, opened.url, folder / "log.txt")
    outcome = LocalTorchrun().run(launch, typer.echo, lambda line: None)[0]
    artifact = opened.get(outcome.artifact)
    typer.echo(f"{artifact.ref}  {headline(artifact.metadata.get('metrics') or {})}".rstrip())


# --------------------------------------------------------------------------- running


def _settings(
    preset: str | None, config: Path | None, overrides: list[str] | None, store: str | None
) -> PipelineConfig:
    from rlhf_core.pipeline.presets import build_config

    if preset is not None and config is not None:
        raise typer.BadParameter("give --preset or --config, not both")
    given = [*(overrides or [])]
    source: Any = preset if preset is not None else config if config is not None else {}
    settings = build_config(source if not isinstance(source, Path) else _existing(source), given)
    return settings if store is None else settings.model_copy(update={"store": store})


def _existing(path: Path) -> Path:
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; needed is a YAML file with settings.")
        if not path.exists():
            raise ConfigError(f"There is no file {path}.")
    except OSError as error:
        raise ConfigError(f"Cannot read {str(path)[:300]}: {error.strerror}.") from error
    return path.absolute()


def _dry_run(settings: PipelineConfig) -> None:
    import yaml

    from rlhf_core.preflight.check import check

    problems = check(settings)
    shown = settings.model_dump(mode="json", exclude_unset=True)
    typer.echo(hide(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).rstrip()))
    if problems:
        raise PreflightError(problems)
    typer.echo("\nPreflight passed; nothing was started.")


def _run(settings: PipelineConfig, until: str, verbose: bool) -> None:
    from flows.server import TemporaryServer, choose_server
    from rlhf_core.store import open_store
    from tasks.launchers import launcher_for

    began = time.monotonic()
    store = open_store(settings.store)
    server = choose_server()
    typer.echo(f"rlhf: {settings.name}")
    typer.echo(f"  store     {store.url}")
    waiting = "" if server.url else "; it takes some seconds to start"
    typer.echo(f"  prefect   {server.text}{waiting}")
    temporary = TemporaryServer() if server.url is None else None
    launcher_for(settings.launcher).prepare()  # stages' imports run beside Prefect's
    from prefect.exceptions import Abort

    from flows.cli.console import Console, take_over
    from flows.rlhf import rlhf_pipeline

    signal.signal(signal.SIGTERM, _terminated)
    take_over(Console(verbose=verbose, link=server.url is not None))
    if temporary is not None:
        temporary.wait()
    try:
        summary = rlhf_pipeline(settings, until=until)  # type: ignore[call-overload]
    except Abort:  # cancelled on the server's page
        raise SystemExit(128 + signal.SIGTERM) from None
    _closing(settings, summary, time.monotonic() - began)


def _closing(settings: PipelineConfig, summary: dict[str, Any], took: float) -> None:
    from tasks.events import seconds

    results = summary["stages"].values()
    reused = sum(result["reused"] for result in results)
    note = f", {reused} of {len(results)} stages reused" if reused else ""
    typer.echo(f"\nDone in {seconds(took)}{note}.")
    if summary["model"]:
        typer.echo(f"  model     {summary['model']}")
    report = Path(summary["report"])
    typer.echo(f"  report    {report.with_suffix('.html')}")
    if (curves := report.with_name("curves.png")).exists():
        typer.echo(f"  curves    {curves}")
    if summary["model"]:
        where = f" --store {shlex.quote(settings.store)}" if settings.store else ""
        typer.echo(f"  chat      rlhf chat {settings.publish.name}{where}")


def _terminated(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


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
            typer.echo(
                "\nStopped; all processes of the run have ended. The same command goes on from "
                "the last checkpoint.",
                err=True,
            )
        raise SystemExit(code) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        from rlhf_core.store import rlhf_home

        crash = rlhf_home() / "crash.log"
        crash.parent.mkdir(parents=True, exist_ok=True)
        crash.write_text(hide(traceback.format_exc()))
        _fail(f"{type(error).__name__}: {error}\nThis was not expected; the details: {crash}")


def _fail(text: str) -> NoReturn:
    sys.stdout.flush()
    text = hide(text)
    typer.echo(f"\nError: {text}" if "\n" in text else f"Error: {text}", err=True)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
