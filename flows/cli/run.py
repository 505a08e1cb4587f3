"""The commands that run a pipeline: `rlhf run`, `stage`, `submit`, `retry` and `cancel`."""

from __future__ import annotations

import difflib
import glob
import os
import shlex
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from flows.cli.completion import complete_stage
from flows.cli.options import ConfigFile, Overrides, Preset, RunId, StoreUrl, Verbose
from flows.cli.output import echo
from rlhf_core.errors import ConfigError, PreflightError
from rlhf_core.system.secrets import redact

if TYPE_CHECKING:
    from rlhf_core.jobs import PipelineConfig

PATHS = ("source", "reward_model", "questions", "include_path")
"""Settings that may be a path, or a pattern of paths."""


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
    """Run the whole pipeline. Stages whose result is in the store are reused."""
    settings = _settings(preset, config, overrides, store)
    if dry_run:
        _dry_run(settings)
    else:
        _run(settings, "publish", verbose)


def stage(
    name: Annotated[
        str,
        typer.Argument(
            help="model, data, sft, label, reward, ppo, evaluate ...",
            autocompletion=complete_stage,
        ),
    ],
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    store: StoreUrl = None,
    verbose: Verbose = False,
) -> None:
    """Run the pipeline up to one stage. Stages whose result is in the store are reused."""
    settings = _settings(preset, config, overrides, store)
    _check_stage(settings, name)
    _run(settings, name, verbose)


def _check_stage(settings: PipelineConfig, name: str) -> None:
    from rlhf_core.pipeline.recipe import stage_names, steps

    names = stage_names(settings)
    if name not in {*names, *(step.algorithm for step in steps(settings))}:
        close = difflib.get_close_matches(name, names, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"There is no stage {name!r}.{hint} Stages: {', '.join(names)}.")


def submit(
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    until: Annotated[
        str, typer.Option(help="Last stage to run.", autocompletion=complete_stage)
    ] = "publish",
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the end; exit code 1 unless it completes.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="The same, and print the run's log.")
    ] = False,
) -> None:
    """Start a pipeline on the workers of a running system (`rlhf up`), and return."""
    from flows.cli import remote
    from rlhf_core.jobs import WorkPoolLauncher
    from tasks.run import author

    settings = _settings(preset, config, overrides, None, workers=True)
    _check_stage(settings, until)
    here = {"launcher": WorkPoolLauncher(), "author": settings.author or author()}
    run, url = remote.submit(settings.model_copy(update=here), until)
    echo(url)
    if wait or follow:
        try:
            remote.follow(run, echo if follow else None)
        except KeyboardInterrupt:
            echo(f"\nThe run goes on; to stop it: rlhf cancel {str(run)[:8]}", err=True)
            raise typer.Exit(1) from None


def retry(run: RunId = "last", store: StoreUrl = None, verbose: Verbose = False) -> None:
    """Run a failed run again: finished stages are reused, the failed one resumes."""
    from flows.cli import remote
    from rlhf_core.store import open_store

    url, settings = remote.retry(open_store(store), run)
    if settings is None:
        echo(f"scheduled: {url}")
    else:
        _run(settings, "publish", verbose)


def cancel(run: RunId = "last", store: StoreUrl = None) -> None:
    """Cancel a run. Its processes end; its last checkpoint is kept."""
    from flows.cli import remote
    from rlhf_core.store import open_store

    echo(remote.cancel(open_store(store), run))


# --------------------------------------------------------------------------- settings


def _settings(
    preset: str | None,
    config: Path | None,
    overrides: list[str] | None,
    store: str | None,
    workers: bool = False,
) -> PipelineConfig:
    """
    Args:
        workers: run it, in folders of their own, so that relative paths have to be whole ones.
    """
    from rlhf_core.pipeline.presets import build_config, build_noting

    written = settings_mapping(preset, config, overrides)
    settings, notes = build_noting(written)
    if workers:
        settings = build_config(whole_paths(written))
    for text in notes:
        echo(f"Warning: {text}", err=True)
    return settings if store is None else settings.model_copy(update={"store": store})


def settings_mapping(
    preset: str | None, config: Path | None, overrides: list[str] | None
) -> dict[str, Any]:
    """What the options say, as in a settings file: not checked, and its preset not applied.

    Raises:
        ConfigError: a preset, file or override cannot be read.
    """
    from rlhf_core.pipeline.presets import apply_overrides, load_preset

    if preset is not None and config is not None:
        raise typer.BadParameter("give --preset or --config, not both")
    source = preset if config is None else _existing(config)
    return apply_overrides({} if source is None else load_preset(source), overrides or [])


def whole_paths(settings: Any) -> Any:
    """Checked settings, with the paths in them that exist from here as absolute ones."""
    if isinstance(settings, list):
        return [whole_paths(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    result = {}
    for key, value in settings.items():
        if key in PATHS and isinstance(value, str) and glob.glob(os.path.expanduser(value)):
            value = os.path.abspath(os.path.expanduser(value))
        result[key] = whole_paths(value)
    return result


def _existing(path: Path) -> Path:
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; expected a YAML file with settings.")
        if not path.exists():
            raise ConfigError(f"There is no file {path}.")
    except OSError as error:
        raise ConfigError(f"Cannot read {str(path)[:300]}: {error.strerror}.") from error
    return path.absolute()


def _dry_run(settings: PipelineConfig) -> None:
    from flows.cli.effective import effective
    from rlhf_core.preflight.check import check
    from tasks.launchers import check_launcher

    problems = check(settings) + check_launcher(settings, [])
    for line in effective(settings):
        echo(redact(line))
    if problems:
        raise PreflightError(problems)
    echo("\nPreflight passed; nothing was started.")


# --------------------------------------------------------------------------- running


def _run(settings: PipelineConfig, until: str, verbose: bool) -> None:
    from flows.server import TemporaryServer, choose_server
    from rlhf_core.store import open_store
    from tasks.launchers import launcher_for

    began = time.monotonic()
    store = open_store(settings.store)
    server = choose_server()
    echo(f"rlhf: {settings.name}")
    echo(f"  store     {store.url}")
    waiting = "" if server.url else "; it takes some seconds to start"
    echo(f"  prefect   {server.text}{waiting}")
    temporary = TemporaryServer() if server.url is None else None
    # The stages' imports run in another process while this one imports Prefect.
    launcher_for(settings.launcher).prepare()
    from prefect.exceptions import Abort

    from flows.cli.console import Console, install_console
    from flows.rlhf import rlhf_pipeline

    signal.signal(signal.SIGTERM, _terminated)
    install_console(Console(verbose=verbose, link=server.url is not None))
    if temporary is not None:
        temporary.wait()
    try:
        summary = rlhf_pipeline(settings, until=until)  # type: ignore[call-overload]
    except Abort:  # cancelled on the server's page
        raise SystemExit(128 + signal.SIGTERM) from None
    _print_summary(settings, summary, time.monotonic() - began)


def _print_summary(settings: PipelineConfig, summary: dict[str, Any], took: float) -> None:
    from tasks.events import seconds

    results = summary["stages"].values()
    reused = sum(result["reused"] for result in results)
    option = f" --store {shlex.quote(settings.store)}" if settings.store else ""
    note = f", {reused} of {len(results)} stages reused" if reused else ""
    echo(f"\nDone in {seconds(took)}{note}.")
    if summary["model"]:
        echo(f"  model     {summary['model']}")
    verdict, version = summary["verdict"], summary["version"]
    if verdict:
        echo(f"  verdict   {verdict['state']}: {verdict['text']}")
    kept = version if version and version["state"] != "champion" else None
    if kept:
        name, number = kept["name"], kept["number"]
        echo(f"  version   {number} of {name}, a candidate, {kept['reason']}")
        echo(f"  promote   rlhf models promote {name} {number}{option}  (by hand)")
    report = Path(summary["report"])
    echo(f"  report    {report.with_suffix('.html')}")
    if (curves := report.with_name("curves.png")).exists():
        echo(f"  curves    {curves}")
    if summary["model"] or kept:
        what = kept["digest"][:12] if kept else settings.publish.name
        echo(f"  chat      rlhf chat {what}{option}")


def _terminated(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
