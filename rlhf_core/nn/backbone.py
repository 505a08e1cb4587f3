"""The decoder of a causal language model without its vocabulary head, and its inputs."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf_core.nn import fast_paths, unpadded
from rlhf_core.nn.fast_paths import FastPath, Pairs, patched
from rlhf_core.nn.padding import TokenIndex
from rlhf_core.nn.probe_model import trial_rows


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


def backbone(lm: Any) -> Any:
    """The module between the token ids and the vocabulary head (opt's is one level deeper)."""
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
    index: TokenIndex | None = None,
) -> Tensor:
    """Hidden states after the final norm, before the vocabulary head.

    Position ids are passed to models that accept them and follow the attention mask where None;
    bloom and older opt derive their own from the mask.

    Right-padded rows take a fast path where the model allows it: without their padding
    (`unpadded`), or at least without their mask.

    Rows that hold several documents have no attention mask: a position id that does not continue
    the one before it begins a document, and transformers keeps attention within it. Not every
    architecture does; `rlhf_core.training.packing.separates_documents` finds out.

    Args:
        model: a transformers causal LM, unwrapped (call this *inside* the forward of a DDP,
            ZeRO or FSDP2 wrapper, or gradients are not exchanged).
        input_ids, attention_mask, position_ids: (B,S). attention_mask: None where rows are packed;
            (B,1,S,S) bool says which position sees which, see `rlhf_core.nn.shared_prompt`.
        index: of right-padded rows. Without it the mask is read, for which the host waits where it
            lies on a GPU.

    Returns:
        (B,S,d).
    """
    base = backbone(causal_lm(model))
    mask = attention_mask
    if mask is not None and mask.dim() == 2 and position_ids is None and fast_paths.switched_on():
        if index is None and _right_padded(mask):
            index = TokenIndex.of(mask)
        if index is not None:
            return _right_padded_hidden(base, input_ids, mask, index.real)
    return _hidden_of(base, input_ids, mask, position_ids)


def _right_padded_hidden(base: Any, input_ids: Tensor, mask: Tensor, real: Tensor) -> Tensor:
    def keep_padding() -> Tensor:
        return WITHOUT_MASK.run(
            base,
            lambda: _without_mask(base, input_ids),
            lambda: _hidden_of(base, input_ids, mask, None),
        )

    if not unpadded.suits(base) or not unpadded.worthwhile(real, input_ids):
        return keep_padding()
    return unpadded.PATH.run(
        base, lambda: unpadded.hidden_states(base, input_ids, real), keep_padding
    )


def _hidden_of(
    base: Any, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    mask, position_ids = mask_and_positions(mask, position_ids)
    # Without a mask gpt2 would look for padding in the token ids, to warn of it.
    with patched(*([(base.config, "pad_token_id", None)] if mask is None else [])):
        output = base(
            input_ids=input_ids,
            attention_mask=mask,
            use_cache=False,
            **accepted(base.forward, position_ids=position_ids),
        )
    return cast(Tensor, output[0])


def _right_padded(mask: Tensor) -> bool:
    return not bool((mask[:, 1:] > mask[:, :-1]).any())


def _without_mask(base: Any, input_ids: Tensor) -> Tensor:
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    with unpadded.without_mask(base):
        return _hidden_of(base, input_ids, None, positions)


def _try_without_mask(base: Any) -> Pairs:
    ids, mask = trial_rows(base)
    return [(_without_mask(base, ids)[mask], _hidden_of(base, ids, mask, None)[mask])]


# Causal attention hides what follows a token, so that padding on the right needs no mask.
WITHOUT_MASK = FastPath(
    "right-padded rows without a mask",
    "6 to 8 % of a training step on a CPU, and the GPU's kernels for causal attention",
    _try_without_mask,
)


def try_out(model: nn.Module | BareBackbone) -> None:
    """Run every trial now that `backbone_hidden` may ask for.

    For models that will be patched or sharded: a trial says nothing about those.
    """
    base = backbone(causal_lm(model))
    unpadded.is_used(base)
    WITHOUT_MASK.works(base)


def mask_and_positions(
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
