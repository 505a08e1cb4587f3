"""Regenerate the locked requirements, a .txt file for each .in file.

Usage: python requirements/lock.py [--upgrade]

Runs `uv pip compile`, from the environment of this Python or from PATH; `make lock` sees to it.

1. All .in files are resolved together, once for each Python version and architecture of TARGETS.
   A pin stays as it is while the .in files allow it; --upgrade takes the newest of everything.
2. A use's file holds what its .in file needs and no earlier use in USES has: `pip install -r`
   takes as many of them as it likes, from the first one on.
3. Each pin carries the sha256 of every wheel that fits a target, or of the source package where a
   target has no wheel. pip then refuses any other file.

4. The files of BESIDE are complete as they are written, and only get their hashes.

uv.toml has the dependency lists that are not taken as declared. torch is in torch.txt, not here.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

USES = ("build", "run", "kubernetes", "train", "pages", "demo", "dev")
TOOLS = "tools"  # resolved by itself: it shares no environment with the others
BESIDE = (
    "extras",
    "vllm",
    "bench",
    "bench-ppo",
)  # what goes on top of all.txt, without dependencies
# Python, platform: glibc 2.36 is that of the images; wheels for older ones fit it, too.
TARGETS = tuple(product(("3.11", "3.12"), ("x86_64-manylinux_2_36", "aarch64-manylinux_2_36")))
NOT_LOCKED = re.compile(r"torch|triton|nvidia-.*|cuda-.*|pip")

Pins = dict[str, tuple[str, frozenset[str]]]  # name -> version, sha256 of each file


def uv() -> str:
    """The program uv of this environment, or else of PATH."""
    found = shutil.which("uv", path=Path(sys.executable).parent) or shutil.which("uv")
    if found is None:
        sys.exit("uv was not found; run `make lock`, which installs it into .venv-tools")
    return found


def compile_pins(
    names: tuple[str, ...], constraints: list[Path], target: tuple[str, str], *options: str
) -> Pins:
    """What the .in files of `names` need on one target.

    Raises:
        subprocess.CalledProcessError: there is no solution; uv says why on stderr.
    """
    python, platform = target
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "pylock.toml")
        subprocess.run(
            [uv(), "pip", "compile", "--quiet", "--config-file", str(HERE / "uv.toml"),
             "--python-version", python, "--python-platform", platform,
             "--format", "pylock.toml", "--output-file", str(output), *options,
             *(str(HERE / f"{name}.in") for name in names),
             *(part for path in constraints for part in ("--constraint", str(path)))],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        packages = tomllib.loads(output.read_text())["packages"]
    return {
        package["name"]: (package["version"], hashes(package))
        for package in packages
        if not NOT_LOCKED.fullmatch(package["name"])
    }


def hashes(package: dict[str, Any]) -> frozenset[str]:
    """sha256 of the wheels that fit; of the source package where there is none."""
    files = package.get("wheels") or [package["sdist"]]
    return frozenset(file["hashes"]["sha256"] for file in files)


def resolve(names: tuple[str, ...], constraints: list[Path], *options: str) -> Pins:
    """Versions that all targets share, with the files of all of them.

    Raises:
        SystemExit: a package has one version on one target and another on another.
    """
    merged: Pins = {}
    for target in TARGETS:
        for name, (version, found) in compile_pins(names, constraints, target, *options).items():
            other, known = merged.get(name, (version, frozenset()))
            if other != version:
                sys.exit(
                    f"{name} is {version} on {target}, but {other} elsewhere: pin it in an .in"
                )
            merged[name] = (version, known | found)
    return merged


def write(name: str, pins: Pins) -> None:
    """One requirement file, sorted, a line for each hash."""
    lines = [f"# Made by requirements/lock.py from {name}.in. Do not edit; run `make lock`."]
    for package, (version, found) in sorted(pins.items()):
        lines.append(
            " \\\n    ".join(
                [f"{package}=={version}", *(f"--hash=sha256:{h}" for h in sorted(found))]
            )
        )
    (HERE / f"{name}.txt").write_text("\n".join(lines) + "\n")
    print(f"{name}.txt: {len(pins)} packages")


def pinned(names: tuple[str, ...], folder: Path) -> list[Path]:
    """Constraints that keep the pins of these files, without their hashes."""
    files = []
    for name in names:
        text = (HERE / f"{name}.txt").read_text() if (HERE / f"{name}.txt").exists() else ""
        files.append(folder / f"{name}.txt")
        files[-1].write_text("\n".join(re.findall(r"^[\w.-]+==[^\s;\\]+", text, re.MULTILINE)))
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="newest versions, not today's pins")
    upgrade = parser.parse_args().upgrade
    with tempfile.TemporaryDirectory() as folder:
        kept, kept_tools = (
            [] if upgrade else pinned(names, Path(folder)) for names in (USES, (TOOLS,))
        )
        torch = HERE / "torch.txt"
        everything = resolve(USES, [torch, *kept])
        exact = Path(folder, "exact.txt")
        exact.write_text("\n".join(f"{name}=={pin[0]}" for name, pin in everything.items()))
        done: set[str] = set()
        for count, name in enumerate(USES, 1):
            needed = resolve(USES[:count], [torch, exact], "--offline")  # all of it is cached now
            write(name, {package: pin for package, pin in needed.items() if package not in done})
            done |= set(needed)
        write(TOOLS, resolve((TOOLS,), kept_tools))
        for name in BESIDE:
            write(name, resolve((name,), [], "--no-deps"))


if __name__ == "__main__":
    main()
