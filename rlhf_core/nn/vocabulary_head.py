"""The vocabulary head of a causal language model: what turns hidden states into logits.

V vocabulary, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.losses.reductions import upcast
from rlhf_core.nn.backbone import backbone, causal_lm
from rlhf_core.nn.fast_paths import FastPath, Pairs, Unsuited

TRIAL_ROWS, TRIAL_LENGTH = 2, 32


@dataclass(frozen=True)
class Head:
    """What turns a hidden state h (d,) into logits: cap(scale * (weight h + bias)).

    ``cap(x) = softcap * tanh(x / softcap)``, or x where ``softcap`` is None.
    """

    layer: nn.Linear
    scale: float
    softcap: float | None

    @property
    def weight(self) -> Tensor:
        """(V,d)."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """(V,) or None."""
        return self.layer.bias

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (...,V), fp32 or fp64, of hidden (...,d); the product obeys autocast."""
        logits = self.layer(hidden.to(self.weight.dtype))
        return finish_logits(upcast(logits), self.scale, self.softcap, 1.0)


def finish_logits(
    logits: Tensor, scale: float, softcap: float | None, temperature: float
) -> Tensor:
    """Scale, soft cap and temperature of logits, changed in place: nobody else may hold them."""
    if scale != 1.0:
        logits = logits.mul_(scale)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits.div_(temperature) if temperature != 1.0 else logits


def lm_head(model: nn.Module) -> Head | None:
    """The model's vocabulary head, or None where its logits must come from its own forward.

    That is so where fast paths are off, and where the head is not of the form of ``Head``. Logit
    scales (cohere, granite) and soft caps (gemma 2) are read from the config. The first call per
    model runs the model's forward with made-up final hidden states, large enough that any other
    treatment of the logits shows.

    Raises:
        ValueError: the model has no vocabulary head at all.
    """
    lm = causal_lm(model)
    head = _read_head(lm)
    return head if PATH.works(lm) else None


def _read_head(lm: Any) -> Head | None:
    layer = lm.get_output_embeddings()
    if layer is None:
        raise ValueError(f"{type(lm).__name__} has no vocabulary head; a causal LM is needed")
    # an adapter on the head starts as no change at all, so no trial could see it
    if type(layer) is not nn.Linear:
        return None
    config = lm.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer, scale, softcap)


def _trial(lm: Any) -> Pairs:
    head = _read_head(lm)
    if head is None:
        raise Unsuited(f"its head is a {type(lm.get_output_embeddings()).__name__}")
    weight = head.weight
    generator = torch.Generator().manual_seed(0)
    shape = (TRIAL_ROWS, TRIAL_LENGTH, weight.shape[1])
    hidden = torch.randn(shape, generator=generator).to(weight.device, weight.dtype)
    raw = hidden.float() @ weight.float().t()
    # at 50, a soft cap or a scale that the config does not name is far outside the tolerance
    hidden = hidden * (50.0 / raw.abs().max().clamp(min=1e-6)).to(weight.dtype)
    replaced = False

    def replace(_module: nn.Module, _args: Any, output: Any) -> Any:
        nonlocal replaced
        if "last_hidden_state" in output and output[0].shape == hidden.shape:
            output["last_hidden_state"] = hidden
            replaced = True
        return output

    hook = backbone(lm).register_forward_hook(replace)
    try:
        ids = torch.arange(TRIAL_ROWS * TRIAL_LENGTH, device=weight.device)
        ids = ids.remainder(weight.shape[0]).view(TRIAL_ROWS, TRIAL_LENGTH)
        plain = upcast(lm(input_ids=ids, use_cache=False).logits)
    finally:
        hook.remove()
    if not replaced:
        raise Unsuited("its backbone does not return last_hidden_state")
    return [(head.logits(hidden).to(weight.dtype), plain.to(weight.dtype))]


PATH = FastPath(
    "vocabulary head on its own",
    "memory for the logits of all positions, and computing those that no loss reads",
    _trial,
)
