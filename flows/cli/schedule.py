"""`rlhf schedule`: retraining on a schedule, with one's own settings."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zoneinfo import ZoneInfo

import typer

from flows.cli.options import AsJson, ConfigFile, Overrides, Preset
from flows.cli.output import echo, print_json
from rlhf_core.errors import ConfigError, PreflightError, RLHFError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import DeploymentSchedule

RETRAIN = "rlhf-retrain/retrain"
FIELDS = "minute hour day-of-month month day-of-week"
NEXT = 3  # start times to show


def schedule(
    cron: Annotated[
        str | None,
        typer.Option(metavar="CRON", help='Five fields in quotes: "0 3 * * *" is daily at three.'),
    ] = None,
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the schedule. Default: publish.name.")
    ] = None,
    timezone: Annotated[
        str, typer.Option(help="Time zone of the cron line, such as Europe/Berlin.")
    ] = "UTC",
    jitter: Annotated[
        int, typer.Option(min=0, max=86_400, help="Start at a random moment within these seconds.")
    ] = 0,
    remove: Annotated[
        str | None, typer.Option("--remove", metavar="NAME", help="Remove a schedule.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Retrain on a schedule (--cron), remove a schedule (--remove), or list the schedules.

    A retraining ends within a second when data, model and settings are unchanged. Otherwise it
    trains, compares the model with the published one, and publishes it only past the gates. To
    change a schedule, make it again under its name.
    """
    made_from = preset or config or overrides or name or timezone != "UTC" or jitter
    if remove is not None and (cron or made_from):
        raise typer.BadParameter("--remove takes no settings, no --cron and no other option")
    if made_from and cron is None:
        raise typer.BadParameter(f'give --cron "{FIELDS}" too')
    if remove is not None:
        echo(_remove(remove))
        return
    if cron is not None:
        check_cron(cron)
        _check_zone(timezone)
        parameters = _parameters(preset, config, overrides, jitter)
        echo(_create(cron, timezone, name, parameters), err=as_json)
    _list(as_json, only=None if cron is None else name or _trained(parameters)[0])


def check_cron(cron: str) -> None:
    """Refuse what is not a cron line of five fields.

    Raises:
        ConfigError: it has other fields, or values out of range.
    """
    fields = cron.split()
    if len(fields) != 5:
        advice = (
            " Prefect would take the last one for seconds, and start a run each time that it "
            "matches; a Quartz line begins with the seconds: leave them out."
        )
        raise ConfigError(
            f"--cron {cron!r} has {len(fields)} fields, expected five: {FIELDS}."
            + (advice if len(fields) > 5 else "")
        )
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    try:
        CronSchedule(cron=cron)
    except ValidationError:
        raise ConfigError(
            f"--cron {cron!r} is not a cron line; expected {FIELDS}, such as '0 3 * * 1-5'."
        ) from None


def _check_zone(name: str) -> None:
    try:
        ZoneInfo(name)
    except (ValueError, OSError, KeyError):
        raise ConfigError(
            f"--timezone {name!r} is not known; expected a name such as UTC or Europe/Berlin."
        ) from None


def next_starts(cron: str, timezone: str) -> list[datetime]:
    """The next start times, as the server computes them, in the schedule's zone."""
    import asyncio

    from prefect.server.schemas.schedules import CronSchedule

    dates = asyncio.run(CronSchedule(cron=cron, timezone=timezone).get_dates(NEXT))
    return [date.astimezone(ZoneInfo(timezone)) for date in dates]


def _parameters(
    preset: str | None, config: Path | None, overrides: list[str] | None, jitter: int
) -> dict[str, Any]:
    """Parameters of the retraining's flow, with checked settings.

    Raises:
        ConfigError: the settings are wrong, or contradict each other.
    """
    import yaml

    from flows.cli.run import settings_mapping, whole_paths
    from rlhf_core.pipeline.presets import build_config
    from rlhf_core.preflight.check import check

    written = settings_mapping(None, config, overrides)
    if preset is not None and written.get("preset", preset) != preset:
        raise ConfigError(f"--preset is {preset}, and {config} starts from {written['preset']!r}.")
    if preset is not None:
        written = {"preset": preset, **written}
    if problems := check(build_config(written), contact=False):
        raise PreflightError(problems)
    written = whole_paths(written)
    text = yaml.safe_dump(written, sort_keys=False, allow_unicode=True) if written else ""
    return {"preset": "none", "settings": text, "jitter": jitter}


def _trained(parameters: dict[str, Any]) -> tuple[str, Any]:
    """Published name and settings of a retraining with these parameters."""
    from flows.form import form_config

    config = form_config(
        parameters.get("preset") or "none", parameters.get("settings") or "", "retrain"
    )
    return config.publish.name, config


# --------------------------------------------------------------------------- the server


def _create(cron: str, timezone: str, name: str | None, parameters: dict[str, Any]) -> str:
    from flows.cli import remote

    name = name or _trained(parameters)[0]
    client, deployment = remote.deployment(RETRAIN)
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule

    when = CronSchedule(cron=cron, timezone=timezone)
    old = [found for found in deployment.schedules if found.slug == name]
    if old:
        client.update_deployment_schedule(
            deployment.id, old[0].id, active=True, schedule=when, parameters=parameters
        )
    else:
        new = DeploymentScheduleCreate(schedule=when, active=True, parameters=parameters, slug=name)
        client.create_deployment_schedules(deployment.id, [new])
    return f"Schedule {name} is {'replaced' if old else 'made'}.\n"


def _remove(name: str) -> str:
    from flows.cli import remote

    client, deployment = remote.deployment(RETRAIN)
    found = [each for each in deployment.schedules if name in (each.slug, str(each.id))]
    if not found:
        there = ", ".join(str(each.slug or each.id) for each in deployment.schedules)
        raise ConfigError(f"There is no schedule {name!r}; there are: {there or 'none'}.")
    client.delete_deployment_schedule(deployment.id, found[0].id)
    return f"Schedule {name} is removed."


def _list(as_json: bool, only: str | None) -> None:
    from flows.cli import remote

    _, deployment = remote.deployment(RETRAIN)
    shown = [
        _described(each, deployment.parameters)
        for each in deployment.schedules
        if only is None or each.slug == only
    ]
    if as_json:
        print_json(shown)
        return
    if not shown:
        echo("No schedules; `rlhf schedule --cron ... --config FILE` makes one.")
    for line in shown:
        echo(f"{line['name']}{'' if line['active'] else '  (off)'}")
        echo(f"  when      {line['when']}")
        for number, start in enumerate(line["next"]):
            echo(f"  {'' if number else 'next':<10}{start}")
        echo(f"  what      {line['what']}\n")


def _described(each: DeploymentSchedule, parameters: dict[str, Any]) -> dict[str, Any]:
    from prefect.client.schemas.schedules import CronSchedule

    from flows.schedule import trains

    when, starts = each.schedule, []
    text = " ".join(f"{k} {v}" for k, v in when.model_dump(exclude_none=True).items())
    if isinstance(when, CronSchedule):
        cron, zone = when.cron, when.timezone or "UTC"
        text = f"{cron}  ({zone})"
        if len(cron.split()) != 5:
            text += "  WARNING: Prefect takes the sixth field for seconds; make it again"
        if each.active:
            starts = [f"{date:%a %Y-%m-%d %H:%M:%S %Z (%z)}" for date in next_starts(cron, zone)]
    try:
        what = trains(_trained({**parameters, **each.parameters})[1])
    except RLHFError as error:
        what = f"fails at its start: {error}"
    return {
        "name": each.slug or str(each.id), "active": each.active, "when": text, "next": starts,
        "what": what, "parameters": each.parameters,
    }  # fmt: skip
