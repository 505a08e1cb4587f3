"""The Python half of an image, built where there is no Docker engine.

By hand: python -m tests.docker.image docker/trainer.Dockerfile FOLDER

COPY takes what .dockerignore lets through, and nothing else, into FOLDER; RUN is a shell in there
whose `python` and `pip` are those of a fresh venv, FOLDER/venv. What changes the system (apt-get,
useradd) is named and left out, as are FROM, USER and the like: a base image, users and services
are what this cannot check.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from docker.utils.build import exclude_paths  # Docker's own reading of .dockerignore

ROOT = Path(__file__).resolve().parent.parent.parent
SYSTEM = ("apt-get", "useradd")


@dataclass
class Built:
    """What came of it.

    Attributes:
        folder: stands for the image's root.
        venv: stands for the image's Python.
        environment: of ENV.
        skipped: RUN steps that were left out, by their first words.
    """

    folder: Path
    venv: Path
    environment: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def variables(self) -> dict[str, str]:
        """Environment of a command in the image; its folders are mapped into `folder`."""
        own = {
            name: f"{self.folder}{value}" if value.startswith("/") else value
            for name, value in self.environment.items()
        }
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "PREFECT_", "RLHF_", "AWS_", "VIRTUAL_ENV"))
        }
        return kept | own | {"PATH": f"{self.venv / 'bin'}:{os.environ['PATH']}"}


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, rest) of each, without comments, continued lines joined."""
    lines = [
        line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")
    ]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = (line.strip().partition(" ") for line in joined.splitlines() if line.strip())
    return [(name.upper(), rest.strip()) for name, _, rest in found]


def build(dockerfile: Path, folder: Path) -> Built:
    """Do what the Dockerfile says, as far as it goes without an image.

    Args:
        folder: must not exist.

    Raises:
        subprocess.CalledProcessError: a step failed; its output is on stderr.
        FileNotFoundError: COPY names what .dockerignore holds back, or what is not there.
    """
    folder.mkdir(parents=True)
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    built = Built(folder, venv)
    here = PurePosixPath("/")
    for name, rest in instructions(dockerfile):
        if name == "WORKDIR":
            here = PurePosixPath(rest)
            _inside(folder, here).mkdir(parents=True, exist_ok=True)
        elif name == "ENV":
            built.environment |= dict(part.split("=", 1) for part in shlex.split(rest))
        elif name == "COPY":
            *sources, target = shlex.split(rest)
            _copy(sources, _inside(folder, here / target), into=target.endswith("/"))
        elif name == "RUN" and rest.startswith(SYSTEM):
            built.skipped.append(rest.split("&&")[0].strip())
        elif name == "RUN":
            _run(rest, built, _inside(folder, here))
    return built


def _inside(folder: Path, path: PurePosixPath) -> Path:
    return folder / path.relative_to("/")


def _run(script: str, built: Built, here: Path) -> None:
    started = time.monotonic()
    subprocess.run(["sh", "-ec", script], cwd=here, env=built.variables(), check=True)
    print(f"{time.monotonic() - started:6.0f} s  {' '.join(script.split())[:90]}", flush=True)


def context() -> set[str]:
    """Files that reach the builder, relative to the repository's root."""
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line.strip() for line in patterns if line.strip() and not line.startswith("#")]
    return {path for path in exclude_paths(str(ROOT), patterns) if (ROOT / path).is_file()}


def _copy(sources: list[str], target: Path, into: bool) -> None:
    """COPY: a file to a file or into a folder, or a folder's content into a folder."""
    files = context()
    for source in (source.rstrip("/") for source in sources):
        below = [path for path in files if path.startswith(f"{source}/")]
        if source in files:
            _copy_file(ROOT / source, target / Path(source).name if into else target)
        elif below:
            for path in below:
                _copy_file(ROOT / path, target / Path(path).relative_to(source))
        else:
            raise FileNotFoundError(
                f"COPY {source}: no such file in the build context; it is missing, or "
                ".dockerignore holds it back"
            )


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    done = build(Path(sys.argv[1]), Path(sys.argv[2]))
    print("left out:", "; ".join(done.skipped) or "nothing")
