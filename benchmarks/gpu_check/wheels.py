"""Downloads what a rank needs beside torch, transformers and peft, for a machine without network.

    python -m benchmarks.gpu_check.wheels FOLDER

The versions are those of requirements/run.txt, and pip checks their hashes. The wheels are for
Python 3.12 on Linux, x86_64; all together have at most 60 MB.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LOCKED = Path(__file__).parents[2] / "requirements" / "run.txt"
PACKAGES = (
    "annotated-types",
    "pyarrow",
    "pydantic",
    "pydantic-core",
    "pydantic-settings",
    "python-dotenv",
    "typing-inspection",
)
TARGET = (
    "--python-version", "3.12", "--implementation", "cp", "--abi", "cp312", "--abi", "none",
    "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_17_x86_64",
    "--platform", "manylinux2014_x86_64",
)  # fmt: skip
LIMIT = 60_000_000  # bytes


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(pins(LOCKED.read_text()))
        file.flush()
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
             "--require-hashes", *TARGET, "-d", str(folder), "-r", file.name], check=True,
        )  # fmt: skip
    size = sum(path.stat().st_size for path in folder.glob("*.whl"))
    print(f"{folder}: {size / 1e6:.1f} MB")
    if size > LIMIT:
        sys.exit(f"the wheels have {size:,} bytes; at most {LIMIT:,} can travel")


def pins(text: str) -> str:
    """The lines of a requirements file that lock PACKAGES, with their hashes."""
    blocks = re.split(r"\n(?=[A-Za-z0-9])", text)
    found = {block.partition("==")[0]: block.rstrip() for block in blocks}
    missing = [name for name in PACKAGES if name not in found]
    if missing:
        sys.exit(f"{LOCKED} does not lock {', '.join(missing)}")
    return "\n".join(found[name] for name in PACKAGES) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
