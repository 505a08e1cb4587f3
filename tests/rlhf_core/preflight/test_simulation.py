"""The estimate beside what `make memory-table` simulated, and the simulation itself."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.memory.cases import MODELS, Case, grid
from benchmarks.memory.compare import (
    END,
    NOT_SIMULATED,
    PAGE,
    estimated,
    rows,
    summary,
    table,
)
from rlhf_core.pipeline.placements import trained_stages
from rlhf_core.pipeline.presets import build_config
from rlhf_core.preflight.check import dry_run
from rlhf_core.preflight.memory import GIB, estimate
from rlhf_core.system.machine import Machine
from tests import forked
from tests.rlhf_core.preflight.test_memory import BLOOM_560M, LLAMA_7B

SIMULATED = dict(rows())


@pytest.mark.parametrize("model", MODELS)
def test_estimate_is_within_0_9_and_1_25_of_every_simulated_case(model: str) -> None:
    shares = {
        case: estimated(case) / max(peaks.values())
        for case, peaks in SIMULATED.items()
        if case.model == model
    }
    assert len(shares) >= 18
    assert {case: share for case, share in shares.items() if not 0.9 <= share <= 1.25} == {}


def test_every_case_was_simulated() -> None:
    assert list(SIMULATED) == list(grid())


@pytest.mark.parametrize(
    ("preset", "model", "config", "machine"),
    [
        ("bloom-560m", "bloom-560m", BLOOM_560M, Machine(gpus=4, gpu_memory=80 * GIB, cores=32)),
        ("llama-7b", "7B", LLAMA_7B, Machine(gpus=8, gpu_memory=80 * GIB, cores=96)),
    ],
)
def test_presets_for_gpus_can_start_and_their_stages_were_simulated(
    preset: str, model: str, config: dict[str, Any], machine: Machine
) -> None:
    pipeline = build_config(preset)
    assert dry_run(pipeline, machine, config) == []
    for stage, settings, place, length in trained_stages(pipeline):
        case = Case(
            model, stage, place.strategy, place.ranks, place.micro_batch_size, length,
            place.gradient_checkpointing,
        )  # fmt: skip
        found = estimate(config, settings, place, stage, max_length=length)
        simulated = max(SIMULATED[case].values())
        parts = {name: size for name, size in found.parts.items() if name not in NOT_SIMULATED}
        assert 0.9 <= sum(parts.values()) / simulated <= 1.25
        assert found.total < 80 * GIB


def test_page_shows_the_simulated_numbers_beside_todays_estimate() -> None:
    found = list(SIMULATED.items())
    page = PAGE.read_text()
    assert table(found) in page, "run: python -m benchmarks.memory --tables"
    assert f"{summary(found)}\n\n{END}" in page


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_simulation_gives_the_committed_numbers(strategy: str) -> None:
    ranks = 1 if strategy == "ddp" else 8
    case = Case("0.1B", strategy=strategy, ranks=ranks)
    # in a process of its own: it makes a process group
    code = (
        "import json; from benchmarks.memory.cases import Case;"
        "from benchmarks.memory.simulate import peak;"
        f"print(json.dumps(peak(Case('0.1B', strategy={strategy!r}, ranks={ranks}))))"
    )
    done = forked.run("-c", code, cwd=forked.ROOT, env=os.environ, needs=forked.MODELS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(SIMULATED[case], rel=1e-3)  # small tensors


def test_live_bytes_count_storages_once_and_forget_those_that_are_gone() -> None:
    import torch

    from benchmarks.memory.fake import LiveBytes

    live = LiveBytes()
    with live.counting():
        one = torch.empty(1000, 1000)
        view = one[:500].t()
        assert live.now == 4_000_256  # 4,000,000 in blocks of 512
        two = one.to(torch.bfloat16)
        assert live.now == 4_000_256 + 2_000_384
        del one
        assert live.now == 4_000_256 + 2_000_384  # the view holds it
        del view
        assert live.now == 2_000_384
        mask = torch.tensor([True, False, True])
        assert two[:3][mask].shape == (2, 1000)  # integers and masks are real
    assert max(live.peaks.values()) >= 4_000_256 + 2_000_384


def test_layers_are_alike() -> None:
    from benchmarks.memory.simulate import phases

    case = Case("0.1B", strategy="zero2", ranks=8, checkpointing=True)
    three, four, six = (phases(case, layers) for layers in (3, 4, 6))
    for phase, size in six.items():
        assert size == pytest.approx(three[phase] + 3 * (four[phase] - three[phase]), rel=1e-4)


def test_more_rows_need_more() -> None:
    case = Case("7B", strategy="fsdp2", ranks=8, checkpointing=True)
    assert estimated(replace(case, rows=2)) > estimated(case)
