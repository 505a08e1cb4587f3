"""The optimizer of all stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rlhf_core.jobs import TrainSettings


def adamw(module: nn.Module, settings: TrainSettings, rates: Mapping[str, float]) -> Any:
    """AdamW (betas 0.9/0.95, eps 1e-5) over what trains; no weight decay on biases and norms.

    Args:
        rates: name prefix of the parameters -> peak learning rate; the first match counts.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, param in module.named_parameters():
        if param.requires_grad:
            rate = next(r for prefix, r in rates.items() if name.startswith(prefix))
            decay = settings.weight_decay if param.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(param)
    # torch refuses fused for parameters without memory; `sharding.fsdp2` switches it on later.
    fused = not any(p.is_meta for params in groups.values() for p in params)
    return torch.optim.AdamW(
        [
            {"params": p, "lr": rate, "peak_lr": rate, "weight_decay": decay}
            for (rate, decay), p in groups.items()
        ],
        betas=(0.9, 0.95),
        eps=1e-5,
        fused=fused,
    )
