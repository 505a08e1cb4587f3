"""The vocabulary head of a causal language model: what turns hidden states into logits.

V vocabulary, d hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_core.losses.reductions import upcast
from rlhf_core.nn.backbone import backbone, causal_lm, eval_mode
from rlhf_core.nn.probe_model import once
from rlhf_core.nn.small_batch_linear import linear


class Head(NamedTuple):
    """What turns a hidden state h (d,) into logits: cap(scale * (weight h + bias)).

    ``cap(x) = softcap * tanh(x / softcap)``, or x where ``softcap`` is None.
    """

    weight: Tensor  # (V,d)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (...,V), fp32 or fp64, of hidden (...,d); the product obeys autocast."""
        logits = linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return _finish(upcast(logits), self.scale, self.softcap, 1.0)


def _finish(logits: Tensor, scale: float, softcap: float | None, temperature: float) -> Tensor:
    """Scale, soft cap and temperature of logits that nobody else holds (changed in place)."""
    if scale != 1.0:
        logits = logits.mul_(scale)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits.div_(temperature) if temperature != 1.0 else logits


def lm_head(model: nn.Module) -> Head | None:
    """The model's vocabulary head, or None where it is not of the form of ``Head``.

    Logit scales (cohere, granite) and soft caps (gemma 2) are read from the config. The first
    call per model checks the result: its forward is run once on four tokens with made-up final
    hidden states, large enough that any other treatment of the logits shows.

    Raises:
        ValueError: the model has no vocabulary head at all.
    """
    lm = causal_lm(model)
    head = _read_head(lm)
    return head if head is not None and _head_is_exact(lm) else None


def _read_head(lm: Any) -> Head | None:
    layer = lm.get_output_embeddings()
    if layer is None:
        raise ValueError(f"{type(lm).__name__} has no vocabulary head; a causal LM is needed")
    # an adapter on the head starts as no change at all, so no check could see it
    if type(layer) is not nn.Linear:
        return None
    config = lm.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, layer.bias, scale, softcap)


@once
def _head_is_exact(lm: Any) -> bool:
    head = _read_head(lm)
    return head is not None and _check_head(lm, head)


@torch.no_grad()
def _check_head(lm: Any, head: Head) -> bool:
    device, dtype = head.weight.device, head.weight.dtype
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, head.weight.shape[1], generator=generator).to(device, dtype)
    with torch.autocast(device.type, enabled=False), eval_mode(lm):
        raw = hidden.float() @ head.weight.float().t()
        # at 50, a soft cap or a scale that the config does not name is far outside the tolerance
        hidden = hidden * (50.0 / raw.abs().max().clamp(min=1e-6)).to(dtype)
        swapped = False

        def swap(_module: nn.Module, _args: Any, output: Any) -> Any:
            nonlocal swapped
            if "last_hidden_state" in output and output[0].shape == hidden.shape:
                output["last_hidden_state"] = hidden
                swapped = True
            return output

        hook = backbone(lm).register_forward_hook(swap)
        try:
            ids = torch.arange(4, device=device).remainder(head.weight.shape[0]).unsqueeze(0)
            found = upcast(lm(input_ids=ids, use_cache=False).logits)
        finally:
            hook.remove()
        want = head.logits(hidden)
    if not swapped or found.shape != want.shape:
        return False
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2
    return bool((found - want).abs().max() <= tolerance * want.abs().max())
