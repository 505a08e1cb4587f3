"""The documentation says what is there: commands, settings, files and links."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
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
from tests.test_import_rule import FLOOR, TORCH_FREE

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
            arguments = shlex.split(line, comments=True)[1:]
            ends = (i for i, word in enumerate(arguments) if word in ("||", "&&", "|", ">", "&"))
            found.append(arguments[: next(ends, None)])
    return found


def headings(page: Path) -> set[str]:
    """Anchors that GitHub gives to the headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def parse(arguments: list[str]) -> Any:
    """The command's context; raises what the command line would refuse."""
    command: Any = typer.main.get_command(app)
    if arguments and arguments[0] in {o for param in command.params for o in param.opts}:
        return None  # such as `rlhf --version`
    while arguments and hasattr(command, "commands"):
        assert arguments[0] in command.commands, f"there is no command {arguments[0]}"
        command = command.commands[arguments[0]]
        arguments = arguments[1:]
    if hasattr(command, "commands"):
        return None  # a group by itself
    return command.make_context(command.name, list(arguments), resilient_parsing=not arguments)


def generator(name: str) -> ModuleType:
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["settings", "cli"])
def test_generated_page_is_up_to_date(name: str) -> None:
    same = (ROOT / "docs" / f"{name}.md").read_text() == generator(f"generate_{name}").render()
    assert same, "run: make docs"


def test_command_line_page_has_every_command_with_its_options() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    root: Any = typer.main.get_command(app)
    for name, command in root.commands.items():
        assert f"\n## rlhf {name}" in text
        for parameter in command.params:
            assert all(f"`{o}`" in text for o in parameter.opts if o.startswith("-"))


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


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_architecture_lists_the_rooms_as_the_import_rule_has_them() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| .* \| (yes|no) \|$", text, re.MULTILINE)
    assert {room: int(floor) - 1 for floor, room, _ in rows} == FLOOR
    assert [int(floor) for floor, _, _ in rows] == sorted(int(floor) for floor, _, _ in rows)
    assert {room for _, room, torch in rows if torch == "no"} == TORCH_FREE


PATHS = re.compile(
    r"`((?:flows|tasks|rlhf_core|deployments|docker|docs|tests|requirements)/[^`\s]+)`"
)


@pages
def test_every_path_of_the_project_exists(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # it names what was
        return
    named = {path.rstrip("/") for path in PATHS.findall(prose(page))}
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_example_commits_exist() -> None:
    hashes = re.findall(r"`([0-9a-f]{7})`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(hashes) == 5
    git = ["git", "-C", str(ROOT)]
    shallow = subprocess.run([*git, "rev-parse", "--is-shallow-repository"], capture_output=True)
    if shallow.stdout.strip() != b"false":
        pytest.skip("no git repository with its history")
    for name in hashes:
        assert subprocess.run([*git, "cat-file", "-e", f"{name}^{{commit}}"]).returncode == 0, name


def site_pages() -> set[str]:
    def walk(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for part in entry.values() if isinstance(entry, dict) else entry:
            if not isinstance(entry, str):
                yield from walk(part)

    return set(walk(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))


def test_the_site_has_every_page() -> None:
    hooks = generator("site_hooks")
    there = {page.name for page in (ROOT / "docs").glob("*.md")} | set(hooks.ROOT_PAGES.values())
    assert site_pages() == there


def test_the_site_has_an_api_page_for_every_room() -> None:
    folders = {path.parent.name for path in (ROOT / "rlhf_core").glob("*/__init__.py")}
    assert set(generator("site_hooks").rooms()) == folders | {"errors"}


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = re.compile(
        r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\"?(https?:[^\"> ]+)"
    )
    outside = {u for f in tmp_path.rglob("*.html") for u in loaded.findall(f.read_text("utf-8"))}
    assert outside == set()
    styles = "".join(f.read_text("utf-8") for f in tmp_path.rglob("*.css"))
    assert re.findall(r"url\([\"']?https?:[^)]*\)|@import[^;]*https?:", styles) == []
    assert "gae" in (tmp_path / "api" / "losses.html").read_text("utf-8")


def test_readme_shows_a_measured_run() -> None:
    text = (ROOT / "README.md").read_text()
    table = text.split("<!-- demo-table -->")[1].split("<!-- /demo-table -->")[0]
    assert table.count("|") > 8, "the README's table of the demo's results is empty"
    assert (ROOT / "docs" / "demo.png").is_file()
