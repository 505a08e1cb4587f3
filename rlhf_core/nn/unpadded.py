"""Right-padded rows through a transformers model without their padding.

Norms, projections and MLPs look at single tokens: they get the real tokens of all rows, one after
another, as one row. Attention needs the rows: there queries, keys and values are put back into
padded rows and go through causal attention, in which no real token sees the padding behind it.

B rows, S positions, N real tokens, H heads, e size of a head, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_core.nn.fast_paths import FastPath, Pairs, patched, switched_on
from rlhf_core.nn.padding import flat_indices, put, take
from rlhf_core.nn.probe_model import trial_rows

ATTENTION = "rlhf_unpadded"  # name of `_attention` in transformers' registry
CAUSAL = "rlhf_causal"  # the same of transformers' own sdpa
MIN_PADDING = 0.03  # share of padding below which rows stay as they are
# A padding token takes part in attention only: its cost, as a share of a real token's.
ATTENTION_SHARE = 0.25


class Layout(NamedTuple):
    """Where the real tokens are: flat indices (N,) into B rows of S positions."""

    indices: Tensor
    rows: int
    length: int

    def put(self, tokens: Tensor) -> Tensor:
        """(N,...) -> (B,S,...), zeros at padding."""
        return put(tokens, self.indices, self.rows, self.length)

    def take(self, rows: Tensor) -> Tensor:
        """(B,S,...) -> (N,...)."""
        return take(rows, self.indices)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row: query, key, value (1,H,N,e) -> (1,N,H,e)."""
    layout: Layout = module.config.unpadded_layout  # type: ignore[assignment, union-attr]
    assert attention_mask is None, "tokens without their padding came with a mask"
    rows = [layout.put(x.squeeze(0).transpose(0, 1)).transpose(1, 2) for x in (query, key, value)]
    output, _ = sdpa_attention_forward(module, *rows, None, **options)  # type: ignore[arg-type]
    return layout.take(output).unsqueeze(0), None


AttentionInterface.register(ATTENTION, _attention)
AttentionInterface.register(CAUSAL, sdpa_attention_forward)  # type: ignore[arg-type]


def without_mask(base: Any, attention: str = "") -> AbstractContextManager[None]:
    """A forward pass of a backbone with `attention_mask=None`, in which transformers reads nothing
    back from the device.

    For sdpa it would look for packed documents in the position ids; it makes no masks for an
    attention of a name that is not its own. gpt2 would look for padding in the token ids, to warn
    of it.

    Args:
        attention: name of the attention to use; empty: causal where that is all the model's own
            does, else its own.
    """
    patches = [(base.config, "pad_token_id", None)]
    attention = attention or ("" if _own_attention(base) else CAUSAL)
    if attention:
        patches.append((base.config, "_attn_implementation", attention))
    return patched(*patches)


def hidden_states(base: Any, input_ids: Tensor, real: Tensor) -> Tensor:
    """The backbone's output (B,S,d), zeros at padding.

    Args:
        base: a backbone for which `is_used`.
        input_ids: (B,S). real: (N,) flat indices of the real tokens, which come first in each row.
    """
    layout = Layout(real, *input_ids.shape)
    with without_mask(base, ATTENTION), patched((base.config, "unpadded_layout", layout)):
        output = base(
            input_ids=input_ids.flatten()[layout.indices].unsqueeze(0),
            position_ids=layout.indices.remainder(layout.length).unsqueeze(0),  # (1,N)
            attention_mask=None,
            use_cache=False,
        )
    return layout.put(output[0].squeeze(0))


def worthwhile(real: Tensor, input_ids: Tensor) -> bool:
    """Whether rows (B,S) with real tokens (N,) have enough padding to leave it out."""
    return real.numel() <= (1 - MIN_PADDING) * input_ids.numel()


def suits(base: Any) -> bool:
    """Whether a backbone as it is set up now can go without padding; says so where not."""
    reason = _obstacle(base)
    if reason:
        PATH.log_off(base, reason)
    return not reason


def is_used(base: Any) -> bool:
    """Whether right-padded rows go through this backbone without their padding."""
    return switched_on() and suits(base) and PATH.works(base)


def use_alike(bases: Sequence[Any]) -> None:
    """All of these backbones leave padding out, or none: they share hidden states."""
    used = [base for base in bases if is_used(base)]
    if len(used) < len(bases):
        for base in used:
            PATH.turn_off(base, "it shares layers with a model that keeps its padding")


def _own_attention(base: Any) -> str:
    """How a backbone's attention is not sdpa over all tokens before; empty where it is."""
    config = getattr(base, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    if attention != "sdpa":
        return f"its attention is {attention}, not sdpa"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if kinds != {"full_attention"} or any(windows):
        return "its attention has a window of positions"
    return ""


def _obstacle(base: Any) -> str:
    """Why a backbone must keep its padding; empty where nothing is known."""
    if reason := _own_attention(base):
        return reason
    if getattr(base, "is_gradient_checkpointing", False):
        return "gradient checkpointing runs layers again in the backward pass, without the layout"
    return ""


def _trial(base: Any) -> Pairs:
    ids, mask = trial_rows(base)
    plain = base(input_ids=ids, attention_mask=mask.long(), use_cache=False)[0]
    return [(hidden_states(base, ids, flat_indices(mask))[mask], plain[mask])]


PATH = FastPath("rows without padding", "padding tokens go through every layer", _trial)
