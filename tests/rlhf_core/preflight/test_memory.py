"""The counts are exact and compared with real models; the bytes are compared with hand values.

Measured peaks of one CPU rank (VmHWM of step and checkpoint, torch 2.13, SmolLM2-135M) are kept
below with what was measured; the estimate must stay within 40 % of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from rlhf_core.jobs import (
    GRPOSettings,
    LoRA,
    PPOSettings,
    Resources,
    RewardSettings,
    SFTSettings,
)
from rlhf_core.jobs.distillation import DistillSettings
from rlhf_core.jobs.rewards import SentimentReward
from rlhf_core.model_files.shape import read_shape
from rlhf_core.model_files.source_check import BUILTIN_CONFIGS, model_config
from rlhf_core.preflight.fitting import ways_to_fit
from rlhf_core.preflight.memory import GIB, estimate
from tests.rlhf_core.tiny_models import copy_of

SMOL = BUILTIN_CONFIGS["smollm2-135m-instruct"]
LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 2048,
}  # fmt: skip
BLOOM_560M = {
    "model_type": "bloom", "hidden_size": 1024, "n_layer": 24, "num_attention_heads": 16,
    "vocab_size": 250880,
}  # fmt: skip
OPT_125M = {
    "model_type": "opt", "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "vocab_size": 50272, "max_position_embeddings": 2048,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257,
        "n_positions": 1024}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (SMOL, 134_515_008),
        (LLAMA_7B, 6_738_415_616),
        (BLOOM_560M, 559_214_592),
        (OPT_125M, 125_239_296),
        (GPT2, 124_439_808),
    ],
)
def test_parameters_of_known_models_are_exact(config: dict[str, object], parameters: int) -> None:
    assert read_shape(config).parameters == parameters


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "opt", "bloom"])
def test_parameters_of_tiny_models_are_exact(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = copy_of(architecture, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    shape = read_shape(json.loads((folder / "config.json").read_text()))
    assert shape.parameters == model.num_parameters()
    assert shape.backbone_parameters == model.base_model.num_parameters() + 64 + 1
    from rlhf_core.jobs import ModelSettings

    known = model_config(ModelSettings(source=f"random:{architecture}"))
    assert known is not None
    assert read_shape(known) == shape


def test_config_without_sizes_is_named() -> None:
    with pytest.raises(KeyError, match="hidden_size"):
        read_shape({"model_type": "llama"})


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "optimizer"),
    [
        ("ddp", 4 + 2, 4, 8),
        ("zero1", 2, 2, 12 / 4),
        ("zero2", 2, 2 / 4, 12 / 4),
        ("zero2_cpu", 2, 2 / 4, 0),
        ("fsdp2", 4 / 4, 4 / 4, 8 / 4),
    ],
)
def test_states_follow_the_table(
    strategy: str, weights: float, gradients: float, optimizer: float
) -> None:
    """Bytes per parameter on 2 nodes of 2 ranks in bf16; buckets and gathered layers come on top.

    LLaMA 7B's embedding and head are 4 % of it, and are not cast by autocast.
    """
    place = Resources(nodes=2, ranks=2, strategy=strategy)  # type: ignore[arg-type]
    parts = estimate(LLAMA_7B, SFTSettings(), place, "sft").parts
    count = read_shape(LLAMA_7B).parameters
    assert parts["weights"] / count == pytest.approx(weights, abs=0.08)
    assert parts["gradients"] / count == pytest.approx(gradients, abs=0.01)
    assert parts["optimizer"] / count == pytest.approx(optimizer, abs=0.001)


def test_activations_by_hand() -> None:
    config = {"model_type": "llama", "hidden_size": 10, "intermediate_size": 30,
              "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 50}  # fmt: skip
    place = Resources(micro_batch_size=2)
    parts = estimate(config, SFTSettings(), place, "sft", max_length=7).parts
    # Bytes per token. A norm is one kernel and keeps its input in fp32, 2 x 40; the five
    # projections behind norms keep bf16 copies, 5 x 20; q, k, v, the attention's output and four
    # tensors of the MLP are bf16.
    layer = 80 + 100 + 2 * 4 * 10 + 2 * 4 * 30
    last = 16 * 10  # the last norm, and what the head reads
    assert parts["activations"] == 2 * 7 * (3 * layer + last)
    two = estimate(config, SFTSettings(trainable_layers=2), place, "sft", max_length=7).parts
    assert two["activations"] == 2 * 7 * (2 * layer + last)
    pairs = estimate(config, RewardSettings(), place, "reward", max_length=7).parts
    assert pairs["activations"] == 2 * parts["activations"]
    saving = Resources(micro_batch_size=2, gradient_checkpointing=True)
    kept = estimate(config, SFTSettings(), saving, "sft", max_length=7).parts
    assert kept["activations"] == 2 * 7 * (3 * 4 * 10 + last)


@pytest.mark.parametrize(
    ("strategy", "settings", "gpu", "cpu", "copies", "attention", "mlp"),
    [
        # A norm keeps its input, and on a CPU an fp32 copy and the normalised value instead; q, k
        # and v read one output, as do both of the MLP.
        ("zero2", SFTSettings(), 2 * 20, 2 * (40 + 20), 2 * 20, 80, 240),
        ("fsdp2", SFTSettings(precision="fp32"), 2 * 40, 2 * (40 + 40), 2 * 40, 160, 480),
        # Adapters: the norms' weights get no gradient.
        ("zero2", SFTSettings(lora=LoRA(rank=1)), 2 * 20, 2 * 40, 2 * 20, 80, 240),
        # Under autocast each adapter keeps a cast copy of its input; the attention's is 20 more.
        ("ddp", SFTSettings(lora=LoRA(rank=1)), 2 * 20, 2 * 40, 5 * 20, 80 + 20, 240),
    ],
)
def test_activations_of_a_layer_by_hand(
    strategy: str, settings: SFTSettings, gpu: int, cpu: int, copies: int, attention: int, mlp: int
) -> None:
    def layer(device: Literal["cpu", "cuda"], *, fast_paths: bool = True) -> int:
        sizes = []
        for count in (2, 3):
            config = {
                "model_type": "llama", "hidden_size": 10, "intermediate_size": 30,
                "vocab_size": 50, "num_hidden_layers": count, "num_attention_heads": 2,
            }  # fmt: skip
            place = Resources(
                strategy=strategy,  # type: ignore[arg-type]
                micro_batch_size=1, fast_paths=fast_paths,
            )  # fmt: skip
            found = estimate(config, settings, place, "sft", max_length=7, device=device)
            sizes.append(found.parts["activations"])
        return sizes[1] - sizes[0]

    adapters = 7 * 2 if settings.lora is not None else 0  # their output, seven of rank 1
    rest = copies + attention + mlp + adapters
    assert layer("cuda") == 7 * (gpu + rest)
    assert layer("cpu") == 7 * (cpu + rest)
    assert layer("cuda", fast_paths=False) == 7 * (cpu + rest)


def test_autograd_keeps_a_copy_of_every_frozen_weight_in_fp32() -> None:
    settings = SFTSettings(lora=LoRA(rank=1))
    shape = read_shape(LLAMA_7B)
    layers = 32 * shape.layer_parameters

    def weights(device: Literal["cpu", "cuda"], *, saving: bool = False) -> int:
        place = Resources(gradient_checkpointing=saving)
        return estimate(LLAMA_7B, settings, place, "sft", device=device).parts["weights"]

    assert weights("cpu") - weights("cpu", saving=True) == 2 * layers * 31 // 32
    # on a GPU they are loaded in bf16
    assert weights("cpu") - weights("cuda") == 2 * shape.parameters + 2 * layers


def test_nf4_takes_4_127_bits_of_a_layers_weight_and_leaves_the_rest_in_bf16() -> None:
    settings = SFTSettings(lora=LoRA(rank=16))
    place = Resources()
    half = estimate(LLAMA_7B, settings, place, "sft").parts["weights"]
    nf4 = estimate(LLAMA_7B, settings, place, "sft", quantization="nf4").parts["weights"]
    layers = 32 * read_shape(LLAMA_7B).layer_parameters
    assert half - nf4 == pytest.approx(layers * (2 - 4.127 / 8), rel=1e-6)


def test_freezing_and_adapters_save_gradients_and_optimizer() -> None:
    place = Resources()
    full = estimate(SMOL, SFTSettings(), place, "sft")
    top = estimate(SMOL, SFTSettings(trainable_layers=10), place, "sft")
    lora = estimate(SMOL, SFTSettings(lora=LoRA()), place, "sft")
    assert full.total > top.total > lora.total - lora.parts["activations"]
    # 10 layers of 3,540,096 parameters each; rank 8 adapters on seven matrices of 30 layers
    assert top.parts["optimizer"] == 8 * 10 * 3_540_096
    widths = 2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)
    assert lora.parts["optimizer"] == 8 * 8 * 30 * widths


def test_ppo_holds_four_models() -> None:
    place = Resources()
    sft = estimate(SMOL, SFTSettings(precision="fp32"), place, "sft").parts
    ppo = estimate(SMOL, PPOSettings(precision="fp32"), place, "ppo").parts
    assert ppo["optimizer"] == pytest.approx(2 * sft["optimizer"], rel=1e-4)
    assert ppo["reference and reward model"] == pytest.approx(2 * sft["weights"], rel=1e-4)


def test_rules_need_no_reward_model_and_shared_layers_are_held_once() -> None:
    rules = GRPOSettings(rewards=(SentimentReward(),), precision="fp32")
    model, shape = GRPOSettings(precision="fp32"), read_shape(SMOL)

    def frozen(settings: GRPOSettings) -> int:
        return estimate(SMOL, settings, Resources(), "grpo").parts["reference and reward model"]

    assert frozen(rules) == 4 * shape.parameters
    assert frozen(model) == 4 * (shape.parameters + shape.backbone_parameters)
    # reference and reward model have ten layers each of their own, and heads and norms
    top = 10 * shape.layer_parameters
    assert frozen(model.model_copy(update={"trainable_layers": 10})) == pytest.approx(
        4 * 2 * top, rel=0.001
    )


def test_reference_is_counted_where_a_kl_is_measured() -> None:
    shape = read_shape(SMOL)

    def frozen(**settings: object) -> int:
        grpo = GRPOSettings(precision="fp32", kl_coef=0.0, **settings)
        return estimate(SMOL, grpo, Resources(), "grpo").parts["reference and reward model"]

    assert frozen() == 4 * (shape.parameters + shape.backbone_parameters)
    assert frozen(max_kl=None) == 4 * shape.backbone_parameters
    top = 10 * shape.layer_parameters  # of the reward model alone
    assert frozen(max_kl=None, trainable_layers=10) == pytest.approx(4 * top, rel=0.001)


def test_each_member_of_an_ensemble_is_counted() -> None:
    def frozen(members: int, **settings: object) -> int:
        return estimate(
            SMOL, PPOSettings(precision="fp32", **settings), Resources(), "ppo",
            reward_models=members,
        ).parts["reference and reward model"]  # fmt: skip

    shape = read_shape(SMOL)
    assert frozen(3) - frozen(1) == 2 * 4 * shape.backbone_parameters
    rules = {"rewards": (SentimentReward(),)}
    assert frozen(3, **rules) == frozen(1, **rules), "of no use to rules"
    top = {"trainable_layers": 10}
    assert frozen(3, **top) - frozen(1, **top) < frozen(3) - frozen(1), "lower layers are shared"


def test_main_memory_of_all_ranks_together() -> None:
    def needs(strategy: str) -> tuple[float, float]:
        place = Resources(ranks=8, strategy=strategy)  # type: ignore[arg-type]
        found = estimate(LLAMA_7B, SFTSettings(), place, "sft")
        count = read_shape(LLAMA_7B).parameters
        return (found.host - 0.8 * GIB) / count, found.host_once / count

    # bytes per parameter: a model in fp32 on each rank, or its part of a checkpoint of 12
    assert needs("ddp") == pytest.approx((4, 0), abs=0.01)
    assert needs("zero2") == pytest.approx((4, 0), abs=0.01)
    assert needs("zero2_cpu") == pytest.approx((4 + 16 / 8, 0), abs=0.01)
    # The first alone loads, and gathers the result.
    assert needs("fsdp2") == pytest.approx((12 / 8, 4 - 12 / 8), abs=0.01)


def test_ppo_of_llama_7b_fits_eight_gpus_of_80_gib_where_gradients_are_sharded() -> None:
    def need(strategy: str) -> int:
        place = Resources(
            ranks=8, micro_batch_size=2, gradient_checkpointing=True,
            strategy=strategy,  # type: ignore[arg-type]
        )  # fmt: skip
        return estimate(LLAMA_7B, PPOSettings(), place, "ppo", max_length=1280).total

    names = ("ddp", "zero1", "zero2", "zero2_cpu", "fsdp2")
    assert [n for n in names if need(n) < 80 * GIB] == ["zero2", "zero2_cpu", "fsdp2"]


def test_ways_to_fit_fit() -> None:
    place = Resources(micro_batch_size=32)
    need = estimate(SMOL, SFTSettings(), place, "sft", device="cpu").total
    ways = ways_to_fit(SMOL, SFTSettings(), place, "sft", need - 2 * GIB, device="cpu")
    assert "micro_batch_size 16" in ways
    assert "gradient_checkpointing true" in ways
    assert ways_to_fit(LLAMA_7B, SFTSettings(), Resources(), "sft", GIB, device="cpu") == []


def test_ways_to_fit_name_shards_adapters_and_four_bits() -> None:
    eight = Resources(ranks=8, strategy="zero1", micro_batch_size=1)
    assert ways_to_fit(LLAMA_7B, SFTSettings(), eight, "sft", 30 * GIB) == [
        "strategy zero2 with gradient_checkpointing true",
        "trainable_layers 8 with gradient_checkpointing true",
        "lora {rank: 16} with gradient_checkpointing true",
    ]
    assert "strategy fsdp2 with gradient_checkpointing true" in ways_to_fit(
        LLAMA_7B, SFTSettings(), eight, "sft", 20 * GIB
    )
    assert ways_to_fit(LLAMA_7B, SFTSettings(), Resources(micro_batch_size=1), "sft", 8 * GIB) == [
        "lora {rank: 16}, model.quantization nf4 with gradient_checkpointing true"
    ]
    # adapters that do not fit under fsdp2 either: nf4 needs ddp
    adapters = SFTSettings(lora=LoRA(rank=16))
    zero = Resources(ranks=2, strategy="zero2", micro_batch_size=1)
    assert ways_to_fit(LLAMA_7B, adapters, zero, "sft", 8 * GIB)[-1] == (
        "model.quantization nf4 with strategy ddp and gradient_checkpointing true"
    )


@pytest.mark.parametrize(
    ("strategy", "stage", "layers", "rows", "length", "precision", "saving", "measured"),
    [
        ("ddp", "sft", None, 8, 128, "bf16", False, 4.47),
        ("ddp", "sft", 10, 8, 128, "bf16", False, 2.11),
        ("zero1", "sft", None, 8, 128, "bf16", False, 5.23),
        ("zero2", "reward", None, 4, 256, "bf16", False, 5.73),
        ("ddp", "sft", None, 8, 256, "fp32", False, 6.60),
        ("ddp", "sft", None, 8, 256, "bf16", True, 4.04),
    ],
)
def test_estimate_is_near_the_measured_peak(
    strategy: str, stage: str, layers: int | None, rows: int, length: int, precision: str,
    saving: bool, measured: float,
) -> None:  # fmt: skip
    place = Resources(
        strategy=strategy,  # type: ignore[arg-type]
        micro_batch_size=rows,
        gradient_checkpointing=saving,
    )
    kind = SFTSettings if stage == "sft" else RewardSettings
    settings = kind(trainable_layers=layers, precision=precision)  # type: ignore[arg-type]
    found = estimate(SMOL, settings, place, stage, max_length=length, device="cpu")  # type: ignore[arg-type]
    assert found.total / GIB == pytest.approx(measured, rel=0.4)


@pytest.mark.parametrize(
    ("strategy", "layers", "micro", "length", "measured"),
    [("ddp", 10, 8, 88, 4.26), ("ddp", None, 4, 128, 9.17), ("zero2", None, 4, 128, 10.22)],
)
def test_estimate_of_ppo_is_near_the_measured_peak(
    strategy: str, layers: int | None, micro: int, length: int, measured: float
) -> None:
    place = Resources(strategy=strategy, micro_batch_size=micro)  # type: ignore[arg-type]
    settings = PPOSettings(trainable_layers=layers, batch_size=16)
    found = estimate(SMOL, settings, place, "ppo", max_length=length, device="cpu")
    assert found.total / GIB == pytest.approx(measured, rel=0.4)


def test_teacher_of_a_distillation_counts_with_its_own_size() -> None:
    """In the training's precision; under ddp on a CPU in fp32. Under fsdp2 its embedding and head
    are whole while the student is compared with it."""
    small = LLAMA_7B | {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1024}
    settings = DistillSettings(precision="bf16")

    def teacher(strategy: Any, ranks: int, **more: Any) -> int:
        place = Resources(ranks=ranks, strategy=strategy)
        return estimate(small, settings, place, "distill", **more).parts["teacher"]

    assert teacher("ddp", 2, teacher=LLAMA_7B) == pytest.approx(2 * 6.74e9, rel=0.01)
    cpu = teacher("ddp", 2, teacher=LLAMA_7B, device="cpu")
    assert cpu == pytest.approx(4 * 6.74e9, rel=0.01)
    assert teacher("zero2", 2, teacher=LLAMA_7B) == pytest.approx(2 * 6.74e9, rel=0.01)
    whole = 2 * 2 * 32000 * 4096
    sharded = teacher("fsdp2", 8, teacher=LLAMA_7B)
    assert sharded == pytest.approx(2 * 6.74e9 / 8 + whole, rel=0.01)
    assert teacher("ddp", 2) == 2 * read_shape(small).parameters, "unknown: as large as the model"
    parts = estimate(small, settings, Resources(), "distill").parts
    assert "reference and reward model" not in parts and parts["divergence"] > 0
