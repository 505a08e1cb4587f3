"""Which stages run on the pretended GPU: not all combinations, but every pair of choices."""

from __future__ import annotations

from tests.gpu.cases import ALGORITHMS, ARCHITECTURES, Case

PRECISIONS = ("bf16", "fp16", "fp32")
VARIANTS = ("", "lora", "top", "checkpointing", "slow_paths")
# Every other algorithm calls the same code as one of these.
MAIN = ("sft", "reward", "dpo", "ppo", "grpo")


def _cases() -> list[Case]:
    # 1. Every algorithm in fp32, beside the CPU.
    cases = [Case(name) for name in ALGORITHMS]
    # 2. Main algorithms: a Latin square, so that each meets every architecture, variant and
    #    precision, and each of these the others.
    for row, algorithm in enumerate(MAIN):
        for column, architecture in enumerate(ARCHITECTURES):
            variant = VARIANTS[(row + column) % len(VARIANTS)]
            precision = PRECISIONS[(row + 2 * column) % len(PRECISIONS)]
            cases.append(Case(algorithm, architecture, precision, variant))
    # 3. What has code of its own: models that keep documents apart by positions, one that does not,
    #    two stages that sample in bf16, and settings of single algorithms.
    cases += [
        Case("pretrain", "gpt2", "bf16"), Case("pretrain", "opt", "fp16"),
        Case("label", "gpt2", "bf16"), Case("evaluate", "qwen2", "bf16"),
        Case("reward", "llama", "bf16", "mean"), Case("ppo", "llama", "bf16", "epochs"),
        Case("ppo", "llama", "bf16", "ptx"), Case("grpo", "llama", "bf16", "kl"),
    ]  # fmt: skip
    return list(dict.fromkeys(cases))


CASES = _cases()
