"""Write docs/licenses.md: the licence of each package that the images hold.

Usage: python docs/generate_licenses.py

Licences are what the packages say of themselves, as pip-licenses reads it from those installed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("licenses.md")
REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"

# requirement file -> the images that hold its packages
IMAGES = {
    "build": "both",
    "run": "both",
    "kubernetes": "orchestrator, with KUBERNETES=1",
    "train": "trainer",
    "demo": "trainer",
    "pages": "trainer, with PAGES=1",
}

# One name for one licence: classifiers and free text -> SPDX, as far as they say which it is.
SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "Artistic License": "Artistic",
    "BSD License": "BSD",
    "GNU General Public License (GPL)": "GPL",
    "GNU General Public License v2 or later (GPLv2+)": "GPL-2.0-or-later",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}

INTRODUCTION = """\
<!-- Made by docs/generate_licenses.py (`make licenses`). Do not edit. -->

# Licences

The packages that the images install beside this project (Apache-2.0), with the licence that each
names in its metadata. A test compares the list with the locked requirements, and refuses a licence
that is not among those seen so far; `BSD` is a package that does not say which BSD licence.

- No package is under the GPL, LGPL or AGPL alone. text-unidecode offers the Artistic licence or the
  GPL; the Artistic licence is taken.
- certifi, orjson, pathspec and tqdm are (in part) under the MPL-2.0. It allows shipping them
  unchanged; a changed file of theirs has to be published.
- Not in the list: torch (BSD-3-Clause) and, with its CUDA build, NVIDIA's libraries, which stand
  under NVIDIA's own licences; libraries inside wheels, whose terms are in each wheel; Debian's
  packages of the base image. Read NVIDIA's terms before you hand on a trainer image with CUDA.

| package | version | licence | image |
| --- | --- | --- | --- |
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(use: str) -> dict[str, str]:
    """Package -> version, of one requirement file."""
    text = (REQUIREMENTS / f"{use}.txt").read_text()
    return dict(re.findall(r"^([\w.-]+)==([^\s\\]+)", text, re.MULTILINE))


def installed_licences() -> dict[str, str]:
    """Package -> its licence, of this environment."""
    done = subprocess.run(
        [sys.executable, "-m", "piplicenses", "--from=mixed", "--with-system", "--format=json"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return {
        canonical(item["Name"]): " OR ".join(
            SPDX.get(part, part) for part in item["License"].split("; ")
        )
        for item in json.loads(done.stdout)
    }


def render() -> str:
    """The page.

    Raises:
        KeyError: a locked package is not installed here.
    """
    found = installed_licences()
    lines = [
        f"| {name} | {version} | {found[name]} | {image} |"
        for use, image in IMAGES.items()
        for name, version in pins(use).items()
    ]
    return INTRODUCTION + "\n".join(sorted(lines)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())
    print(PAGE)
