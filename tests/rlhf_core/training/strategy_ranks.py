"""Run by ranks from test_strategy: trains a small net under every strategy, writes JSON."""

import json
from pathlib import Path

import torch
from torch import nn

from rlhf_core.errors import NonFinite
from rlhf_core.jobs import Resources
from rlhf_core.training.batching import split_batch
from rlhf_core.training.strategy import Strategy
from tests.rlhf_core.training.saving import save

ROWS, WIDTH = 12, 7


def data() -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    y = torch.randn(ROWS, generator=generator)
    return x, y, [1 + i % 5 for i in range(ROWS)]  # a weight ("tokens") per row


def net() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, 1))
    model[0].bias.requires_grad_(False)  # something frozen, as with trainable_layers
    return model


def train(kind: str, precision: str, micro: int, steps: int, checkpoint=None, clip=1.0):
    strategy = Strategy(
        Resources(strategy=kind, micro_batch_size=micro, device="cpu"), precision, clip
    )
    model = net()
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and p.dim() > 1],
         "lr": 0.1, "peak_lr": 0.1},
        {"params": [p for p in model.parameters() if p.requires_grad and p.dim() == 1],
         "lr": 0.05, "peak_lr": 0.05},
    ]  # fmt: skip
    strategy.prepare(model, torch.optim.AdamW(groups, fused=True))
    if checkpoint is not None:
        strategy.load_state(checkpoint)
    x, y, weights = data()
    losses, norms = [], []
    for step in range(steps):
        strategy.set_learning_rate(1.0 / (step + 1) if checkpoint is None else 0.5)
        total = 0.0
        parts = split_batch(weights, strategy.group, micro)
        for i, part in enumerate(parts):
            with strategy.micro_batch(last=i == len(parts) - 1):
                error = (strategy.module(x[part]).squeeze(1).float() - y[part]).square()
                loss = (error * torch.tensor([weights[p] for p in part])).sum() / sum(weights)
                strategy.backward(loss)
            total += loss.item()
        losses.append(float(strategy.group.sum([total])[0]))
        norms.append(strategy.step())
    return strategy, losses, norms


def overflow(kind: str, folder: Path) -> dict:
    """fp16 steps, the first of which overflows; then a loss whose gradient is infinite anyway."""
    checked, Strategy._check = Strategy._check, lambda self, precision: precision  # on a CPU
    try:
        strategy, _, _ = train(kind, "fp16", micro=12, steps=0)
    finally:
        Strategy._check = checked
    found = {"losses": [], "skipped": [], "scale": [], "moved": []}
    x, _, _ = data()
    for factor in (1e3, 1.0, 1.0):  # 1e3 times the scale is beyond fp16
        before = strategy.weights()
        with strategy.micro_batch(last=True):
            output = strategy.module(x).squeeze(1).float()
            strategy.backward(output.mean() * factor / strategy.world_size)
        strategy.step()
        metrics, after = strategy.step_metrics(), strategy.weights()
        found["skipped"].append(metrics["skipped_updates"])
        found["scale"].append(metrics["loss_scale"])
        found["moved"].append(any(not torch.equal(before[n], after[n]) for n in before))
    saved = save(strategy, folder / f"{kind}-fp16")
    found["saved"] = float(saved.whole("loss_scale|scale"))
    return found


def not_finite(kind: str) -> dict:
    """A gradient that is infinite where the loss is not: the square root's at 0."""
    strategy, _, _ = train(kind, "fp32", micro=12, steps=1)
    before = strategy.weights()
    with strategy.micro_batch(last=True):
        strategy.backward((strategy.module(data()[0]) * 0).square().sum().sqrt())
    try:
        strategy.step()
        text = ""
    except NonFinite as error:
        text = str(error)
    after = strategy.weights()
    return {"error": text, "moved": any(not torch.equal(before[n], after[n]) for n in before)}


def main(files: list[str]) -> None:
    results, folder = {}, Path(f"{files[0]}-saved")
    for kind in ("ddp", "zero1", "zero2", "fsdp2"):
        for precision in ("fp32", "bf16"):
            strategy, losses, norms = train(kind, precision, micro=2, steps=4)
            state = save(strategy, folder / f"{kind}-{precision}")
            again, resumed, _ = train(kind, precision, micro=2, steps=1, checkpoint=state)
            other, _, _ = train("ddp", precision, micro=2, steps=1, checkpoint=state)
            results[f"{kind}-{precision}"] = {
                "losses": losses, "norms": norms, "resumed": resumed,
                "weights": {k: v.tolist() for k, v in strategy.weights().items()},
                "after": {k: v.tolist() for k, v in again.weights().items()},
                "after_ddp": {k: v.tolist() for k, v in other.weights().items()},
            }  # fmt: skip
    for micro in (1, 3, 6):
        strategy, losses, _ = train("ddp", "fp32", micro=micro, steps=4)
        results[f"micro-{micro}"] = {"losses": losses}
    for kind in ("ddp", "zero1", "zero2"):
        results[f"{kind}-overflow"] = overflow(kind, folder)
    for kind in ("ddp", "zero1", "zero2", "fsdp2"):
        results[f"{kind}-not-finite"] = not_finite(kind)
    if strategy.rank == 0:
        Path(files[0]).write_text(json.dumps(results))
    torch.distributed.barrier()
