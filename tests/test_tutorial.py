"""The tutorial's commands, run as they stand, and what they print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
BLOCK = re.compile(r"^```(bash|text)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MARK = "=== block"


def blocks() -> list[tuple[str, str | None]]:
    """Each bash block, with the text block that shows what it prints, if one follows."""
    found: list[tuple[str, str | None]] = []
    for language, body in BLOCK.findall(TEXT):
        if language == "bash":
            found.append((body, None))
        else:
            found[-1] = (found[-1][0], body)
    return found


def shows(expected: str, output: str) -> str | None:
    """The first expected line that the output lacks, in this order; `...` stands for any text."""
    rest = [line.rstrip() for line in output.splitlines()]
    for line in expected.splitlines():
        if line.strip() in ("", "..."):
            continue
        pattern = ".*".join(re.escape(part.rstrip()) for part in line.rstrip().split("..."))
        for number, printed in enumerate(rest):
            if re.fullmatch(pattern, printed):
                rest = rest[number + 1 :]
                break
        else:
            return line
    return None


@pytest.mark.parametrize(
    ("expected", "output", "missing"),
    [
        ("one\n...\nthree", "one\ntwo\nthree", None),
        ("a ... c", "a b c", None),
        ("Yes, ...", "Yes, we have tea.", None),
        ("three\none", "one\ntwo\nthree", "one"),
        ("one", "one more", "one"),
    ],
)
def test_output_is_compared_line_by_line(expected: str, output: str, missing: str | None) -> None:
    assert shows(expected, output) == missing


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_command_of_the_tutorial_does_what_the_page_shows(
    tmp_path: Path, prefect_server: str
) -> None:
    """With a Prefect server at hand: to start one of its own takes a run ten seconds."""
    home, folder = tmp_path / "home", tmp_path / "empty"
    home.mkdir()
    folder.mkdir()
    steps = blocks()
    script = "set -euo pipefail\n"
    script += "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n"
    script += "\n".join(f"printf '\\n{MARK} {i}\\n'\n{body}" for i, (body, _) in enumerate(steps))
    kept = {name: value for name, value in os.environ.items() if name in ("LANG", "PYTHONPATH")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=560,
        env=kept | {"HOME": str(home), "PATH": path, "PREFECT_API_URL": prefect_server},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    printed = re.split(rf"^{MARK} \d+\n", done.stdout, flags=re.MULTILINE)[1:]
    assert len(printed) == len(steps)
    for (body, expected), output in zip(steps, printed, strict=True):
        if expected is not None:
            assert shows(expected, output) is None, f"{body}\n{output}"
