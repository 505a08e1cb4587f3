"""`rlhf --version` and the shell's completion, with the installed command."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import get_args

import pytest

import rlhf_core
from flows.cli.completion import STAGES
from rlhf_core.jobs import TrainingStage

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent


@pytest.fixture()
def bash(tmp_path):
    """Runs a line in bash, in a home of its own, with `rlhf` on the path."""

    def run(line: str) -> str:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RLHF", "PREFECT"))}
        done = subprocess.run(
            ["bash", "--norc", "-c", f"{line}\ntrue"],  # else bash is replaced by its last command
            cwd=tmp_path, capture_output=True, text=True, timeout=120,
            env={**kept, "HOME": str(tmp_path), "RLHF_HOME": str(tmp_path / ".rlhf"),
                 "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout

    return run


def test_version_names_the_main_packages(bash):
    first, second = bash("rlhf --version").splitlines()
    assert first == f"rlhf {rlhf_core.__version__}"
    found = dict(part.split(" ", 1) for part in second.split(", "))
    assert list(found) == ["python", "torch", "transformers", "colossalai", "prefect"]
    assert found["python"] == sys.version.split()[0]
    for name in ("torch", "prefect"):
        assert found[name] == metadata.version(name)


def test_version_says_what_is_not_installed():
    code = """
import sys
sys.argv = ["rlhf", "--version"]
from importlib import metadata
real = metadata.version
def version(name):
    if name == "colossalai":
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
from flows.cli.main import app
try:
    app()
finally:
    assert not {"torch", "transformers", "prefect", "pydantic"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "colossalai not installed" in done.stdout


@pytest.mark.parametrize(
    ("words", "replies"),
    [
        ("run --preset sm", ["smoke"]),
        ("submit -p grpo", ["grpo", "grpo-rules"]),
        ("stage re", ["reward", "reinforce_pp", "rejection_sampling"]),
        ("retry 2025", ["20250102-030405-bbbb", "20250101-030405-aaaa"]),
        ("cancel ", ["last", "20250102-030405-bbbb", "20250101-030405-aaaa"]),
        ("artifacts ver", ["verify"]),
    ],
)
def test_bash_completes_words(bash, tmp_path, words, replies):
    for name in ("20250101-030405-aaaa", "20250102-030405-bbbb"):
        (tmp_path / ".rlhf" / "runs" / name).mkdir(parents=True)
    given = ["rlhf", *words.split(" ")]
    array = " ".join(f"'{word}'" for word in given)
    found = bash(
        'eval "$(rlhf --show-completion)"\n'
        f"COMP_WORDS=({array}); COMP_CWORD={len(given) - 1}\n"
        '_rlhf_completion rlhf; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    assert found.split() == replies


def test_completion_can_be_installed(bash, tmp_path):
    bash("rlhf --install-completion")
    installed = tmp_path / ".bash_completions" / "rlhf.sh"
    assert "complete -o" in installed.read_text()
    assert str(installed) in (tmp_path / ".bashrc").read_text()


def test_completed_stages_are_those_of_the_pipeline():
    others = {"model", "data", "label", "best_of_n", "evaluate", "lm_eval", "publish"}
    assert sorted(STAGES) == sorted({*get_args(TrainingStage), *others})


def test_completion_imports_nothing_slow():
    heavy = {"pydantic", "prefect", "yaml", "httpx", "torch", "psutil", "botocore"}
    code = (
        "import sys, flows.cli.main\n"
        "from flows.cli.completion import *\n"
        "complete_preset(''), complete_stage(''), complete_run('')\n"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
