"""The repository's shape."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["flows", "tasks", "rlhf_core", "deployments", "tests", "docker", "docs", "requirements"]
FILES = [
    "pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE",
    "Makefile",
    ".ci/run", ".dockerignore", ".pre-commit-config.yaml", "deployments/presets/smoke.yaml",
    "deployments/presets/demo.yaml", "requirements/torch.txt", "requirements/all.txt",
]  # fmt: skip
NOT_TEXT = {".png", ".pyc", ".gz", ".arrow", ".safetensors"}


def own_files() -> Iterator[Path]:
    """Every text file of the project; nothing that tools or runs have left."""
    yield from (path for path in ROOT.iterdir() if path.is_file())
    for name in [*FOLDERS, ".ci"]:
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and path.suffix not in NOT_TEXT and "__pycache__" not in path.parts:
                yield path


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_exists(name: str) -> None:
    assert (ROOT / name).is_dir()


@pytest.mark.parametrize("name", FILES)
def test_file_exists(name: str) -> None:
    assert (ROOT / name).is_file()


def test_docker_folder_does_not_shadow_the_docker_package() -> None:
    assert not (ROOT / "docker" / "__init__.py").exists()


def test_every_folder_of_tests_is_a_package() -> None:
    # Without it two test files of one name in different folders cannot be collected together.
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert [str(f) for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def test_no_file_points_outside_the_repository() -> None:
    outside = ["../" + "shared", "/work/" + "shared"]
    hits = []
    for path in own_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        hits += [str(path.relative_to(ROOT)) for word in outside if word in text]
    assert not hits
