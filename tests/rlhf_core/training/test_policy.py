"""How the weights under adapters are held."""

from types import SimpleNamespace

import pytest
import torch

from rlhf_core.jobs import LoRA, SFTJob
from rlhf_core.training.policy import frozen_storage

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("device", "strategy", "precision", "lora", "dtype"),
    [
        ("cuda", "ddp", "bf16", True, BF16),
        ("cuda", "ddp", "bf16", False, FP32),  # trained weights are masters
        ("cuda", "ddp", "fp32", True, FP32),
        ("cuda", "ddp", "fp16", True, FP32),  # fp16 could not hold every weight
        ("cuda", "zero2", "bf16", True, FP32),  # ZeRO casts them itself
        ("cpu", "ddp", "bf16", True, FP32),
    ],
)
def test_frozen_weights_are_in_bf16_under_adapters_on_a_gpu(
    device, strategy, precision, lora, dtype
):
    job = SFTJob(model="a" * 64, data="b" * 64, lora=LoRA() if lora else None)
    place = SimpleNamespace(
        device=torch.device(device), kind=strategy, precision=precision, loads=True
    )
    assert frozen_storage(job, place) == (dtype, None, False)


def test_products_with_quantised_weights_are_in_the_stage_s_precision():
    job = SFTJob(model="a" * 64, data="b" * 64, lora=LoRA(), quantization="nf4")
    for precision, dtype, compute in [
        ("bf16", BF16, BF16), ("fp32", FP32, FP32), ("fp16", FP32, torch.float16)
    ]:  # fmt: skip
        place = SimpleNamespace(
            device=torch.device("cuda"), kind="ddp", precision=precision, loads=True
        )
        found, nf4, _ = frozen_storage(job, place)
        assert (found, nf4.compute) == (dtype, compute)
