"""Write docs/cli.md from the commands of `rlhf`.

Usage: python docs/generate_cli.py

The source is the Typer app, so page and `--help` say the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from flows.cli.main import app

PAGE = Path(__file__).with_name("cli.md")

INTRODUCTION = """\
<!-- Made by docs/generate_cli.py from the commands' help. Do not edit. -->

# Command line

Every command and its options. `--help` after any of them shows the same.

An error that you can act on is one message on stderr, with exit code 1. Ctrl-C ends a run and all
its processes with exit code 130, SIGTERM with 143.

`rlhf --version` shows the versions of the main packages. After `rlhf --install-completion` the
shell completes commands, options, presets, stages and run ids; `rlhf --show-completion` prints the
script, to install it by hand.
"""


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE}")


def render() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    root: Any = typer.main.get_command(app)
    for path, command in _commands(root, "rlhf"):
        parts.append(f"## {path}\n\n{_prose(command.help)}\n")
        parts.append(f"```text\n{_usage(path, command)}\n```\n")
        if rows := [_row(parameter) for parameter in command.params if not parameter.hidden]:
            heading = "| argument or option | default | meaning |\n| --- | --- | --- |\n"
            parts.append(heading + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _usage(path: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    names = [_argument(p) + ("..." if p.nargs == -1 else "") for p in arguments]
    shown = [n if p.required else f"[{n}]" for p, n in zip(arguments, names, strict=True)]
    options = ["[OPTIONS]"] if len(command.params) > len(arguments) else []
    return " ".join([path, *shown, *options])


def _row(parameter: Any) -> str:
    named = parameter.param_type_name == "option"
    name = ", ".join(f"`{o}`" for o in parameter.opts) if named else f"`{_argument(parameter)}`"
    if parameter.multiple:
        name += ", repeatable"
    given = parameter.default
    default = "" if given is None or given is False or given == "" else f"`{given}`"
    return f"| {name} | {default} | {_cell(parameter.help or '')} |"


def _argument(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _prose(text: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
