"""The GPU check keeps working without a GPU, and a rank needs no more packages than it brings."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check import __main__ as script
from benchmarks.gpu_check import wheels, worker
from benchmarks.gpu_check.check import part_file, write_part

ROOT = Path(__file__).parents[2]
# What a GPU machine may lack: orchestration, object storage, data preparation, reports.
MISSING = (
    "aiobotocore", "bitsandbytes", "boto3", "botocore", "chatterbot_corpus", "colossalai",
    "datasets", "dill", "fastapi", "gguf", "gradio", "matplotlib", "pandas", "prefect", "s3fs",
    "sentencepiece", "tensorboard", "vaderSentiment",
)  # fmt: skip
WITHOUT = f"""
import runpy, sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):  # those packages are not found, as if they were not installed
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {MISSING}
        return None if hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
sys.argv = ["gpu_check", "--worker", *sys.argv[1:]]
runpy.run_module("benchmarks.gpu_check", run_name="__main__")
"""


@pytest.mark.slow
def test_a_rank_runs_stages_with_a_file_store_without_the_orchestrators_packages(tmp_path):
    arguments = ["--device", "cpu", "--work", str(tmp_path), "--parts", "device,stages,syncs"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments, "--stages", "sft,ppo"],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    parts = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "parts").iterdir()}
    assert {name: part["status"] for name, part in parts.items()} == {
        "device": "passed", "stages": "passed", "syncs": "skipped",
    }, parts  # fmt: skip
    stages = parts["stages"]["found"]
    assert stages["sft"]["last"]["loss"] > 0
    assert "policy_loss" in stages["ppo"]["last"]


FAKE = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu_check.worker import begin, now_file
from benchmarks.gpu_check.check import write_part
work, parts = Path(sys.argv[1]), sys.argv[2].split(",")
for part in parts:
    begin(work, part)
    write_part(work, part, "running", 0.0, {"so far": 1}, [])
    if part == "peak":
        os._exit(11)  # as a process does that the driver ends
    if part == "stages":
        time.sleep(0.5)
        now_file(work).write_text("{")  # as a reader finds a file that is being written
        time.sleep(0.5)
        begin(work, part)
        time.sleep(60)
    write_part(work, part, "passed", 0.1, {}, [])
"""


def test_parts_behind_one_that_dies_or_hangs_run_in_another_process(tmp_path, monkeypatch):
    real = subprocess.Popen

    def fake(command, **more):
        parts = command[command.index("--parts") + 1]
        return real([sys.executable, "-c", FAKE, str(tmp_path), parts], cwd=ROOT, **more)

    monkeypatch.setattr(subprocess, "Popen", fake)
    limits = {
        name: (where, 2.0 if name == "stages" else 60.0) for name, (where, _) in PARTS.items()
    }
    monkeypatch.setattr(script, "PARTS", limits)
    options = argparse.Namespace(
        device="cuda", parts=("device", "peak", "stages", "sft"), stages=(), limit=60.0,
        out=tmp_path / "out.json",
    )  # fmt: skip
    began = time.monotonic()
    script.supervise(options, tmp_path, began)
    parts = script.write_report(options, tmp_path, began)["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "device": "passed", "peak": "failed", "stages": "failed", "sft": "passed",
    }  # fmt: skip
    assert parts["peak"]["problems"] == ["the process ended with exit code 11"]
    assert parts["stages"]["problems"] == ["took longer than 2 s"]
    assert parts["stages"]["found"] == {"so far": 1}
    assert json.loads(options.out.read_text())["parts"] == parts


PARTS = worker.PARTS


def test_parts_that_the_time_did_not_reach_are_failures(tmp_path):
    options = argparse.Namespace(
        device="cpu", parts=("device", "peak"), stages=(), limit=0.0, out=tmp_path / "out.json"
    )
    script.supervise(options, tmp_path, time.monotonic())
    parts = script.write_report(options, tmp_path, time.monotonic())["parts"]
    assert [p["problems"] for p in parts.values()] == [["not run: the 0 s were over"]] * 2


def test_the_report_holds_what_a_part_found_before_it_failed(tmp_path, monkeypatch):
    def part(check, found):
        found["first"] = 1
        raise RuntimeError("no more")

    monkeypatch.setattr(worker, "load", lambda name: part)
    worker.run_part(worker.Check("cpu", tmp_path), "sft", [])
    written = json.loads(part_file(tmp_path, "sft").read_text())
    assert written["status"] == "failed" and written["problems"] == ["RuntimeError: no more"]
    assert written["found"]["first"] == 1 and "in part" in written["found"]["traceback"]


def test_every_part_can_be_loaded():
    assert all(callable(worker.load(name)) for name in PARTS)


def test_waits_are_counted_by_the_projects_line(monkeypatch):
    """With the warning that torch gives where a call waits for the GPU."""
    import warnings
    from collections import Counter

    import torch

    from benchmarks.gpu_check import traces

    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    lines: Counter[str] = Counter()
    with traces.counted(lines):
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", "default"]
    ((line, count),) = lines.items()
    assert line.startswith("tests/benchmarks/test_gpu_check.py:") and count == 3


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>",
         "copies and casts"),
        ("at::native::vectorized_elementwise_kernel<4, silu_kernel>", "elementwise"),
    ],
)  # fmt: skip
def test_kernels_are_told_apart_by_their_names(kernel, kind):
    from benchmarks.gpu_check.traces import kind_of

    assert kind_of(kernel) == kind


def test_the_share_of_the_peak_by_hand(tmp_path):
    """Two rows of 3 tokens a step, two steps of 0.5 s, peak of 1e-9 TFLOP/s."""
    import dataclasses

    from benchmarks.gpu_check import sizes, speed
    from benchmarks.gpu_check.running import Ran

    class Small(worker.Check):
        @property
        def sizes(self):
            return dataclasses.replace(sizes.CPU, length=3, batch=2, warm_up=1, steps=2)

    check = Small("cpu", tmp_path)
    write_part(tmp_path, "peak", "passed", 0.0, {"peak_tflops": 1e-9}, [])
    digest = "0" * 64
    made = {
        "digests": {"model": digest, "sft": digest}, "mixed_lengths": [],
        "shape": {"body": 100, "head": 10, "width": 4, "layers": 1},
    }  # fmt: skip
    (tmp_path / "large.json").write_text(json.dumps(made))
    ran = Ran(metrics=[{"loss": 1.0}] * 3, marks=[0.0, 0.5, 1.0])
    entry = speed.measured(check, sizes.Run(1), ran, made)
    assert entry["tokens_per_second"] == 12.0
    # a step forward: 6 tokens of 2 x 100, 4 predictions of 2 x 10, attention 2 rows of 2 x 9 x 4
    by_hand = 3 * 2 * (6 * 200 + 4 * 20 + 2 * 72)
    assert entry["share_of_peak"] == pytest.approx(by_hand / 1.0 / 1e3, rel=1e-3)


def test_wheels_are_those_that_the_lock_names():
    text = "a==1 \\\n    --hash=sha256:00\n" + "".join(
        f"{name}==2 \\\n    --hash=sha256:{i:02d}\n" for i, name in enumerate(wheels.PACKAGES)
    )
    lines = wheels.pins(text).splitlines()
    assert len(lines) == 2 * len(wheels.PACKAGES)
    assert not any(line.startswith("a==") for line in lines)
    with pytest.raises(SystemExit, match="does not lock pyarrow"):
        wheels.pins(text.replace("pyarrow==", "other=="))
    assert wheels.pins(wheels.LOCKED.read_text())


def test_the_traffic_of_a_step_by_hand():
    """A norm in one kernel reads and writes 5 times its numbers in both passes, in fp32."""
    from benchmarks.gpu_check import sizes, traffic

    options = argparse.Namespace(rows=2, length=16, layers=1)
    plain = traffic.count(options, half=False, one_kernel=False)
    one = traffic.count(options, half=False, one_kernel=True)
    width, words = sizes.GPU.large["hidden_size"], 2 * 16
    by_hand = 3 * 5 * 4 * words * width / traffic.BANDWIDTH  # two norms of the layer, and the last
    assert one["norms in one kernel"] == pytest.approx(by_hand)
    assert one["matrix products"] == plain["matrix products"] > 0
    assert one["elementwise"] < plain["elementwise"]
    # causal attention: 2 S^2 d forward, 2.5 times that backward, two rows
    assert one["attention"] == pytest.approx(3.5 * 2 * 2 * 16**2 * width / traffic.FLASH)
