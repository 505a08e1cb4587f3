"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.completion import complete_preset, complete_run

Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        "-p",
        help="Name of a preset; see `rlhf presets`.",
        autocompletion=complete_preset,
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file with settings, like a preset.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="One setting: ppo.kl_coef=0.1"),
]
StoreUrl = Annotated[
    str | None,
    typer.Option("--store", help="Artifact store: folder, s3://, gs:// or az:// (or $RLHF_STORE)."),
]
RunId = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="Name or id of a run, or the id's first characters, or `last`; see `rlhf runs`.",
        autocompletion=complete_run,
    ),
]
Page = Annotated[
    Path | None,
    typer.Option("--page", metavar="FILE", help="Also write a self-contained HTML page."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show all output of the ranks.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that came with the model.")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON, one object per line, instead of a table.")
]
