"""An orchestrator process stays small: nothing in it imports the training stack."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "colossalai", "datasets", "peft", "matplotlib", "pyarrow")
CODE = """
import sys
import {modules}
found = sorted({{name.split(".")[0] for name in sys.modules}} & set({names!r}))
assert not found, found
"""


@pytest.mark.parametrize(
    ("modules", "also"),
    [
        ("flows.rlhf, flows.retrain", ()),
        ("tasks.launchers", ("prefect",)),  # a run's stages import while Prefect does
        ("flows.cli.main", ("prefect", "pandas", "httpx")),
        ("rlhf_core.pipeline.presets, rlhf_core.jobs", ("prefect",)),
    ],
)
def test_import_leaves_the_training_stack_out(modules, also):
    code = CODE.format(modules=modules, names=(*HEAVY, *also))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
