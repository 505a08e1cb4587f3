"""Whole stages on the pretended GPU, many in one process.

python -m tests.gpu.stages                        every case of the tests
python -m tests.gpu.stages --only sft,dpo         cases whose name begins so
python -m tests.gpu.stages --only sft --syncs     and where each waits for the GPU
python -m tests.gpu.stages --out results.json     for the tests
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.gpu import stub


class Runner:
    """Runs jobs in this process, on the pretended GPU or on the CPU."""

    def __init__(self, folder: Path) -> None:
        from rlhf_core.store import open_store

        self.folder = folder
        self.store = open_store(f"file://{folder / 'store'}")
        self.count = 0

    def __call__(self, job: Any) -> tuple[Any, list[dict[str, Any]], str]:
        """Run a job; its artifact, its metrics by step without times, and what it printed."""
        from rlhf_core.runtime.context import StageContext
        from rlhf_core.runtime.rank import fast_paths_as_set

        self.count += 1
        folder = self.folder / "jobs" / str(self.count)
        folder.mkdir(parents=True, exist_ok=True)  # ranks share it
        context = StageContext(
            store=self.store, key=f"{self.count:064d}", folder=folder,
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
        )  # fmt: skip
        module, said = importlib.import_module(job.module), io.StringIO()
        with contextlib.redirect_stdout(said), fast_paths_as_set(job), context.closing:
            artifact = module.run(job, context)
        metrics = context.read_metrics()
        return artifact, [without_times(line) for line in metrics], said.getvalue()


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    """What two runs must agree on; accuracies count what may differ by rounding alone."""
    from rlhf_core.runtime.work import without_measurements

    return {k: v for k, v in without_measurements(line).items() if k != "accuracy"}


def start(folder: Path, architectures: Sequence[str] = ()) -> tuple[Runner, Any]:
    """Make the inputs, then pretend; a runner and the inputs.

    Args:
        architectures: of the models; empty: all.
    """
    stub.load(stub.build())
    os.environ.setdefault("RLHF_HOME", str(folder / "home"))
    import torch

    from rlhf_core.runtime.rank import silence_libraries
    from tests.gpu import cases, install

    torch.set_num_threads(1)
    silence_libraries()
    runner = Runner(folder)
    inputs = cases.make_inputs(
        lambda job: runner(job)[0].digest, runner.store, folder,
        architectures or cases.ARCHITECTURES,
    )  # fmt: skip
    install.install()
    return runner, inputs


def attempt(runner: Runner, inputs: Any, case: Any) -> dict[str, Any]:
    """Run a case on the pretended GPU, and in fp32 on the CPU as well.

    Returns:
        gpu, and cpu in fp32: metrics by step and of the result; off: fast paths that did not run;
        syncs; or error and its traceback; and the CPU seconds that all took.
    """
    import torch

    from rlhf_core.nn import fast_paths
    from rlhf_core.rollout import replies
    from tests.gpu import cases, install, syncs

    began, result = time.process_time(), {}
    same = case.precision == "fp32"
    try:
        job = cases.job(case, inputs, "cuda")
        importlib.import_module(job.module)
        # A GPU samples, labels and evaluates in bf16, also in fp32 stages.
        in_fp32 = [
            (replies, "computes_in_bf16", lambda device: False),
            *(
                (module, "inference_dtype", lambda device: torch.float32)
                for name, module in sys.modules.items()
                if name.startswith("rlhf_core.") and hasattr(module, "inference_dtype")
            ),
        ]
        with fast_paths.patched(*(in_fp32 if same else [])):
            result["gpu"], result["off"], found = _on(runner, job)
            result["syncs"] = syncs.table(found)
            if same:
                with install.plain_cpu():
                    result["cpu"], *_ = _on(runner, cases.job(case, inputs, "cpu"))
    except Exception as error:
        own = [f for f in traceback.extract_tb(error.__traceback__) if "rlhf_core" in f.filename]
        lines = [f"{f.filename.rpartition('rlhf_core/')[2]}:{f.lineno}" for f in own[-4:]]
        result["error"] = f"{type(error).__name__}: {error}"
        result["at"] = " < ".join(reversed(lines))
        result["traceback"] = traceback.format_exc()
    result["cpu_seconds"] = round(time.process_time() - began, 2)
    return result


def _on(runner: Runner, job: Any) -> tuple[list[dict[str, Any]], list[str], Any]:
    """Run a job: metrics by step and of the result, fast paths that were off, synchronisations."""
    from rlhf_core.nn import fast_paths
    from tests.gpu import syncs

    fast_paths._logged.clear()
    with syncs.counted() as found:
        artifact, metrics, _ = runner(job)
    off = sorted(f"{path}: {text}" for path, _, text in fast_paths._logged)
    return [*metrics, numbers(artifact.metadata.get("metrics", {}))], off, found


def numbers(tree: Any, prefix: str = "") -> dict[str, float]:
    """The numbers of nested dicts by their path."""
    found: dict[str, float] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and "second" not in name:
            found[f"{prefix}{name}"] = float(value)
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="beginnings of cases' names, with commas")
    parser.add_argument("--syncs", action="store_true", help="print where stages wait")
    parser.add_argument("--limits", action="store_true", help="also measure tests.gpu.limits")
    parser.add_argument("--trace", action="store_true", help="print tracebacks")
    parser.add_argument("--out", type=Path, help="write all results as JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="rlhf-gpu-") as folder:
        runner, inputs = start(Path(folder))
        from tests.gpu.matrix import CASES

        only = tuple(filter(None, options.only.split(",")))
        cases = [c for c in CASES if not only or c.name.startswith(only)]
        if options.out is None:
            if options.limits:
                measure_limits(runner, inputs, options)
            results = run_cases(runner, inputs, cases, options)
            return int(any("error" in found for found in results.values()))
        # For the tests by two processes: the limits take as long as a third of the cases.
        second = Path(folder) / "second.json"
        child = os.fork()
        if child == 0:
            runner.count += 10_000  # names of its own in the store
            others = [case for i, case in enumerate(cases) if i % 3]
            second.write_text(json.dumps(run_cases(runner, inputs, others, options)))
            os._exit(0)
        results = measure_limits(runner, inputs, options) if options.limits else {}
        results |= run_cases(runner, inputs, cases[::3], options)
        os.waitpid(child, 0)
        results |= json.loads(second.read_text())
    options.out.write_text(json.dumps(results))
    return 0


def measure_limits(runner: Runner, inputs: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The results of `tests.gpu.limits`, under one name; printed as well."""
    from tests.gpu import limits

    measured = limits.measure(runner, inputs)
    for name, found in measured.items():
        print(f"{found['waits']:6.2f}  {name}", flush=True)
        if options.syncs:
            print("\n".join(f"        {line}" for line in found["lines"]), flush=True)
    return {"limits": measured}


def run_cases(
    runner: Runner, inputs: Any, cases: list[Any], options: argparse.Namespace
) -> dict[str, Any]:
    """The results of cases by name; a line is printed for each."""
    results = {}
    for case in cases:
        results[case.name] = found = attempt(runner, inputs, case)
        state = f"FAILED {found['error']} at {found['at']}" if "error" in found else "ok"
        print(f"{case.name:32} {found['cpu_seconds']:5.1f} s  {state}", flush=True)
        if options.syncs:
            print("\n".join(found.get("syncs", [])), flush=True)
        if options.trace and "error" in found:
            print(found["traceback"], flush=True)
    return results


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
