"""The documentation says what is there: commands, settings, files and links."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml

from flows.cli.main import app
from rlhf_core.jobs import PipelineConfig
from rlhf_core.pipeline.presets import build_config
from rlhf_core.pipeline.recipe import stage_names

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def fences(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text()) if language in languages]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def commands(page: Path, program: str) -> list[list[str]]:
    """Arguments of every command of a program, in shell blocks and between backquotes."""
    lines = [line for body in fences(page, "bash", "sh") for line in body.splitlines()]
    lines += [" ".join(text.split()) for text in INLINE.findall(prose(page))]
    found = []
    for line in lines:
        if re.match(rf"(\S*/)?{program}( |$)", line):
            found.append(shlex.split(line, comments=True)[1:])
    return found


def headings(page: Path) -> set[str]:
    """Anchors that GitHub gives to the headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def parse(arguments: list[str]) -> Any:
    """The command's context; raises what the command line would refuse."""
    command: Any = typer.main.get_command(app)
    while arguments and hasattr(command, "commands"):
        assert arguments[0] in command.commands, f"there is no command {arguments[0]}"
        command = command.commands[arguments[0]]
        arguments = arguments[1:]
    if hasattr(command, "commands"):
        return None  # a group by itself
    return command.make_context(command.name, list(arguments), resilient_parsing=not arguments)


def generator() -> ModuleType:
    path = ROOT / "docs" / "generate_settings.py"
    spec = importlib.util.spec_from_file_location("generate_settings", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_settings_page_is_up_to_date() -> None:
    same = (ROOT / "docs" / "settings.md").read_text() == generator().render()
    assert same, "run: .venv/bin/python docs/generate_settings.py"


@pytest.mark.parametrize("arguments", [["walk"], ["run", "--colour"], ["artifacts", "burn"]])
def test_a_command_that_does_not_exist_is_noticed(arguments: list[str]) -> None:
    with pytest.raises(Exception, match=r"no command|[Nn]o such option"):
        parse(arguments)


@pages
def test_every_command_exists(page: Path) -> None:
    for arguments in commands(page, "rlhf"):
        context = parse(arguments)
        if context is None or context.command.name not in ("run", "stage"):
            continue
        given = context.params
        assert given.get("name") in (None, *stage_names(PipelineConfig()))
        if given["config"] is None:  # the preset exists, and so do the settings
            build_config(given["preset"] or {}, given["overrides"] or [])


def test_readme_shows_every_command() -> None:
    shown = {arguments[0] for arguments in commands(ROOT / "README.md", "rlhf") if arguments}
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert known - shown - {"job"} == set()


@pages
def test_every_make_target_exists(page: Path) -> None:
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {arguments[0] for arguments in commands(page, "make") if arguments}
    assert named <= set(targets)


@pages
def test_every_relative_link_resolves(page: Path) -> None:
    broken = []
    for target in LINK.findall(prose(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or path == "docs/demo.png":  # that one: see below
            continue
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in headings(file)):
            broken.append(target)
    assert not broken


@pages
def test_python_examples_compile(page: Path) -> None:
    for body in fences(page, "python"):
        compile(body, page.name, "exec")


@pages
def test_yaml_examples_are_configurations(page: Path) -> None:
    for body in fences(page, "yaml"):
        build_config(yaml.safe_load(body))


def test_readme_shows_a_measured_run() -> None:
    text = (ROOT / "README.md").read_text()
    table = text.split("<!-- demo-table -->")[1].split("<!-- /demo-table -->")[0]
    assert table.count("|") > 8, "the README's table of the demo's results is empty"
    assert (ROOT / "docs" / "demo.png").is_file()
