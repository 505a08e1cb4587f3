"""The decoder of a causal language model without its vocabulary head, and its inputs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf_core.nn import unpadded
from rlhf_core.nn.probe_model import once, same_numbers


def causal_lm(model: nn.Module) -> Any:
    """The transformers model itself, also where peft is wrapped around it (LoRA stays active).

    Raises:
        ValueError: a peft method that works on the inputs (prompt, prefix or p-tuning).
    """
    inner = getattr(model, "get_base_model", None)
    if not callable(inner):
        return model
    if model.active_peft_config.is_prompt_learning:  # type: ignore[union-attr]
        raise ValueError(
            "found a peft model with learned prompts, which would be left out here; "
            "needed one that changes layers, such as LoRA"
        )
    return inner()


def position_ids_from_mask(attention_mask: Tensor) -> Tensor:
    """Position ids (B,S) of left- or right-padded rows: the first real token has position 0."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off inside the block; every submodule's own mode is restored after it."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def backbone(lm: Any) -> Any:
    """The module between the token ids and the vocabulary head (opt's sits one level deeper)."""
    return getattr(lm.base_model, "decoder", lm.base_model)


def accepted(function: Any, **kwargs: Any) -> dict[str, Any]:
    """Those keyword arguments that a forward function names in its signature."""
    names = inspect.signature(function).parameters
    return {k: v for k, v in kwargs.items() if k in names}


class BareBackbone:
    """Makes a backbone without a vocabulary head look like a causal LM to `backbone_hidden`."""

    def __init__(self, backbone: nn.Module) -> None:
        inner = getattr(backbone, "get_base_model", None)
        self.base_model = inner() if callable(inner) else backbone


def backbone_hidden(
    model: nn.Module | BareBackbone,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Hidden states after the final norm, before the vocabulary head.

    Position ids are passed to models that accept them and follow the attention mask where None;
    bloom and older opt derive their own from the mask.

    Right-padded rows go without their padding through models that allow it (`unpadded`), else
    without their mask through models that do not need it.

    Rows that hold several documents have no attention mask: position ids that do not count on
    begin a document, and transformers keeps its attention within it. Not every architecture
    does; `rlhf_core.training.packing.separates_documents` finds out.

    Args:
        model: a transformers causal LM, unwrapped (call this *inside* the forward of a DDP or
            Gemini wrapper, or gradients are not synchronised).
        input_ids, attention_mask, position_ids: (B,S). attention_mask: None where rows are packed;
            (B,1,S,S) bool says itself which position sees which, see `rlhf_core.nn.shared_prompt`.

    Returns:
        (B,S,d).
    """
    base = backbone(causal_lm(model))
    mask = attention_mask
    if mask is not None and mask.dim() == 2 and position_ids is None and _right_padded(mask):
        if (hidden := unpadded.hidden_states(base, input_ids, mask)) is not None:
            return hidden
        if _needs_no_mask(base):
            position_ids = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
            mask = None
    return _hidden_of(base, input_ids, mask, position_ids)


def _hidden_of(
    base: Any, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    mask, position_ids = _mask_and_positions(mask, position_ids)
    output = base(
        input_ids=input_ids,
        attention_mask=mask,
        use_cache=False,
        **accepted(base.forward, position_ids=position_ids),
    )
    return cast(Tensor, output[0])


def _right_padded(mask: Tensor) -> bool:
    return not bool((mask[:, 1:] > mask[:, :-1]).any())


@once
def _needs_no_mask(base: Any) -> bool:
    """Whether right-padded rows need no mask: what follows a token does not change it, so that
    the mask only costs time (a fifteenth of a training step on a CPU). Tried out on two rows."""
    size = base.get_input_embeddings().weight.shape[0]
    ids = torch.arange(10, device=next(base.parameters()).device).view(2, 5).remainder(size)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    positions = torch.arange(5, device=ids.device).expand(2, 5)
    want = _hidden_of(base, ids, mask, None)[mask.bool()]
    return same_numbers(_hidden_of(base, ids, None, positions)[mask.bool()], want)


def _mask_and_positions(
    mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """What a model's forward gets; without a mask there must be position ids."""
    if mask is None:
        assert position_ids is not None, "packed rows need position ids"
        return None, position_ids
    if mask.dim() == 4:
        assert position_ids is not None, "a mask of pairs of positions needs position ids"
        return mask, position_ids
    mask = mask.long()
    return mask, position_ids_from_mask(mask) if position_ids is None else position_ids
