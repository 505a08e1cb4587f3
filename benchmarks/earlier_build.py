"""An earlier build of this project, for benchmarks that compare with it."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def extract(commit: str, folder: Path) -> Path:
    """Packages and benchmarks as of a commit of this repository's history, in a folder."""
    files = subprocess.run(
        ["git", "archive", commit, "rlhf_core", "benchmarks"],
        cwd=ROOT, check=True, capture_output=True,
    ).stdout  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(files)) as archive:
        archive.extractall(folder, filter="data")
    return folder
