"""Log-probabilities of tokens under a causal language model, without the (N,V) logits.

The vocabulary head is a fifth to a quarter of a training step and most of its memory. So logits
are computed only at the positions that predict a token which a loss reads, a chunk of positions
at a time. Where there are many, they are computed again in the backward pass instead of being kept;
where the head is frozen, what the backward pass needs of them is computed at once.

N positions, d hidden size, V vocabulary, B sequences, S positions of a sequence, T of them at its
end the response. Log-probabilities are in nats, of logits divided by the temperature.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_core import unpadded
from rlhf_core.few_rows import linear
from rlhf_core.gradients import gathered, hand_over, is_linear
from rlhf_core.losses import upcast
from rlhf_core.trial import once, same_numbers

# Most logits held at once, and most rows: on a CPU 256 rows already keep the units busy and more
# only leave the cache; on a GPU a weight read from memory must serve many rows.
_CHUNK_LOGITS = {"cpu": 2**24, "other": 2**27}
_CHUNK_ROWS = {"cpu": (64, 256), "other": (64, 8192)}
# Logits up to this many are kept for the backward pass (256 MiB in fp32) instead of being computed
# again, which costs a third of the head's time.
_KEPT_LOGITS = {"cpu": 2**26, "other": 2**26}


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


# ------------------------------------------------------------------------- chunked log-softmax
class _TokenLogprobs(torch.autograd.Function):
    """Log-softmax at the targets.

    For the backward pass it keeps the logits if they are few; else, where only the hidden states
    have gradients, d logprob / d hidden (N,d); else no more than a log-sum-exp per row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        # Made before the loop: a small tensor that outlives its chunk would sit in the hole that
        # the chunk's logits leave in the heap, and each next chunk would grow the process.
        count = hidden.shape[0]
        exact = torch.promote_types(options.dtype, torch.float32)
        norms = torch.empty(count, dtype=exact, device=hidden.device)  # (N,)
        logprobs = torch.empty_like(norms)  # (N,)
        entropies = torch.empty_like(norms) if options.entropy else norms.new_zeros(0)
        need_h, *need_head = ctx.needs_input_grad[:3]
        slope = None
        if need_h and not any(need_head) and not options.entropy and options.softcap is None:
            slope = torch.empty_like(hidden)  # (N,d)
        keep = any(ctx.needs_input_grad[:3]) and slope is None
        keep = keep and count * weight.shape[0] <= _KEPT_LOGITS[_kind(hidden)]
        ctx.kept = []
        start = 0
        with torch.autocast(hidden.device.type, enabled=False):
            w, b = _cast(weight, bias, options.dtype)
            for h, y in _chunks(hidden, targets, chunk=options.chunk):
                rows = slice(start, start + h.shape[0])
                start = rows.stop
                logits = options.logits(h, w, b)  # (n,V)
                norm = norms[rows]
                torch.logsumexp(logits, dim=1, out=norm)
                logprobs[rows] = logits.gather(1, y.unsqueeze(1)).squeeze(1) - norm
                if options.entropy:
                    p = torch.exp(logits - norm.unsqueeze(1))
                    entropies[rows] = norm - p.mul_(logits).sum(dim=1)
                if slope is not None:
                    grad = logits.sub_(norm.unsqueeze(1)).exp_().neg_()  # (n,V)
                    grad.scatter_add_(1, y.unsqueeze(1), torch.ones_like(norm).unsqueeze(1))
                    slope[rows] = (grad.to(options.dtype) @ w) * options.factor
                elif keep:
                    ctx.kept.append(logits)
        ctx.options = options
        ctx.save_for_backward(hidden, weight, bias, targets, norms, entropies, slope)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, targets, norms, entropies, slope = ctx.saved_tensors
        options: _Options = ctx.options
        if slope is not None:
            return slope * grad_logprobs.unsqueeze(1).to(slope.dtype), None, None, None, None
        kept = iter(ctx.kept)
        ctx.kept = []  # they are changed in place below: a second backward pass computes them anew
        need_h, need_w, need_b = ctx.needs_input_grad[:3]
        grad_h = torch.empty_like(hidden) if need_h else None
        place = gathered(weight, norms.dtype) if need_w else None
        grad_w = place
        if need_w and grad_w is None:
            grad_w = torch.empty_like(weight, dtype=norms.dtype)
        grad_b = torch.zeros_like(bias, dtype=norms.dtype) if need_b else None
        start = 0
        with torch.autocast(hidden.device.type, enabled=False):
            w, b = _cast(weight, bias, options.dtype)
            for h, y in _chunks(hidden, targets, chunk=options.chunk):
                rows = slice(start, start + h.shape[0])
                start = rows.stop
                logits = next(kept, None)  # (n,V)
                if logits is None:
                    logits = options.logits(h, w, b)
                g = grad_logprobs[rows].unsqueeze(1)  # (n,1)
                tanh = None
                if options.softcap is not None:
                    tanh = logits * (options.temperature / options.softcap)
                logp = logits.sub_(norms[rows].unsqueeze(1))
                # (n,V), p until the next lines make it d loss / d logits
                if options.entropy:
                    grad = logp.exp()
                    # dH/dz = -p (log p + H)
                    g_ent = grad_entropy[rows].unsqueeze(1)
                    grad.mul_((logp + entropies[rows].unsqueeze(1)).mul_(g_ent).add_(g).neg_())
                else:
                    grad = logp.exp_().mul_(-g)
                grad.scatter_add_(1, y.unsqueeze(1), g.to(grad.dtype))
                if tanh is not None:
                    grad.mul_(1 - tanh.square_())
                if options.factor != 1.0:
                    grad.mul_(options.factor)
                if grad_b is not None:
                    grad_b += grad.sum(dim=0)
                grad = grad.to(options.dtype)
                if grad_h is not None:
                    grad_h[rows] = grad @ w
                if grad_w is not None:
                    h = h.to(options.dtype)
                    added = place is not None or rows.start > 0
                    if grad_w.dtype == options.dtype:
                        grad_w.addmm_(grad.t(), h, beta=float(added))
                    elif added:  # the product in half precision, its sum in fp32
                        grad_w += grad.t() @ h
                    else:
                        grad_w.copy_(grad.t() @ h)
        return (
            grad_h,
            hand_over(weight, grad_w) if grad_w is not None and place is None else None,
            grad_b.to(bias.dtype) if grad_b is not None else None,
            None,
            None,
        )


class _Options(NamedTuple):
    dtype: torch.dtype  # of the matrix products
    chunk: int
    temperature: float
    scale: float
    softcap: float | None
    entropy: bool

    @property
    def factor(self) -> float:
        """d logits / d (weight h), but for a soft cap."""
        return self.scale / self.temperature

    def logits(self, h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        logits = upcast(F.linear(h.to(self.dtype), w, b))
        return _finish(logits, self.scale, self.softcap, self.temperature)


def _kind(tensor: Tensor) -> str:
    return "cpu" if tensor.device.type == "cpu" else "other"


def _cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), bias.to(dtype) if bias is not None else None


def _chunks(hidden: Tensor, targets: Tensor, *, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(hidden.split(chunk), targets.split(chunk), strict=True)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    scale: float = ...,
    softcap: float | None = ...,
    chunk: int | None = ...,
    entropy: Literal[False] = ...,
) -> Tensor: ...


@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    scale: float = ...,
    softcap: float | None = ...,
    chunk: int | None = ...,
    entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target, with no more than ``chunk`` rows of logits at a time.

    Under autocast the matrix products are in its dtype; the log-softmax is fp32 (fp64 for fp64
    inputs). Gradients reach hidden, weight and bias, each only where it requires one.

    Args:
        hidden: (N,d). weight: (V,d). bias: (V,) or None. targets: (N,) token ids.
        temperature: the logits are divided by it.
        scale, softcap: what the model does to its logits, see ``Head``.
        chunk: rows at a time; None fits them to the vocabulary and device.
        entropy: also return the entropy of each row's distribution.

    Returns:
        logprobs (N,) in nats, and with ``entropy`` the entropies (N,) in nats.

    Raises:
        ValueError: shapes that do not fit each other, or a temperature that is not positive.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"needed hidden (N,d) and weight (V,d), found {tuple(hidden.shape)} "
            f"and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"needed targets ({hidden.shape[0]},), found {tuple(targets.shape)}")
    _check_temperature(temperature)
    if hidden.shape[0] == 0:  # an empty micro-batch still takes part in the backward pass
        nothing = upcast((hidden.sum() + 0 * weight[:1].sum()).expand(0))
        return (nothing, nothing) if entropy else nothing
    if chunk is None:
        device = _kind(hidden)
        least, most = _CHUNK_ROWS[device]
        chunk = min(max(_CHUNK_LOGITS[device] // weight.shape[0], least), most)
    dtype = _product_dtype(hidden, weight)
    options = _Options(dtype, chunk, temperature, scale, softcap, entropy)
    logprobs, entropies = cast(
        tuple[Tensor, Tensor], _TokenLogprobs.apply(hidden, weight, bias, targets, options)
    )
    return (logprobs, entropies) if entropy else logprobs


def chunked_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy summed over N positions (nats), by ``token_logprobs`` at temperature 1.

    Select the trained positions first: there is no ignore index.

    Args:
        hidden: (N,d). weight: (V,d). targets: (N,). bias, scale, softcap: see ``Head``.

    Returns:
        A scalar; divide by the global batch's token count.
    """
    return -token_logprobs(
        hidden, weight, targets, bias=bias, scale=scale, softcap=softcap, chunk=chunk
    ).sum()


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(
            f"found temperature {temperature}, it must be above 0; greedy decoding is its own "
            "option and has no log-probabilities of its own"
        )


# ----------------------------------------------------------------------------- model internals
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
    does; `rlhf_core.packing.separates_documents` finds out.

    Args:
        model: a transformers causal LM, unwrapped (call this *inside* the forward of a DDP or
            Gemini wrapper, or gradients are not synchronised).
        input_ids, attention_mask, position_ids: (B,S). attention_mask: None where rows are packed;
            (B,1,S,S) bool says itself which position sees which, see `rlhf_core.pairs`.

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
    if not is_linear(layer):
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


# --------------------------------------------------------------------------- whole sequences
@overload
def response_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    response_mask: Tensor,
    temperature: float = ...,
    *,
    chunk: int | None = ...,
    entropy: Literal[False] = ...,
) -> Tensor: ...


@overload
def response_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    response_mask: Tensor,
    temperature: float = ...,
    *,
    chunk: int | None = ...,
    entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def response_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    response_mask: Tensor,
    temperature: float = 1.0,
    *,
    chunk: int | None = None,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of every real response token; logits only where one is predicted.

    Args:
        model: a transformers causal LM, unwrapped (see ``backbone_hidden``).
        input_ids, attention_mask: (B,S). position_ids: (B,S), or None to follow the mask.
            Without a mask rows are packed, see ``backbone_hidden``.
        response_mask: (B,T) bool over the last T columns of ``input_ids``, True where a token's
            log-probability is wanted. T = S is allowed; the very first column has no predictor.
        temperature: of the distribution sampled from; the logits are divided by it.
        entropy: also return the entropy of the distribution at each of those positions.

    Returns:
        logprobs (B,T) in nats, 0 where the mask is False (and entropies (B,T)).

    Raises:
        ValueError: the mask is wider than the sequence, not bool, or asks for the first column.
    """
    (rows, length), width = input_ids.shape, response_mask.shape[1]
    if response_mask.dtype != torch.bool or response_mask.shape[0] != rows or width > length:
        raise ValueError(
            f"needed a bool response_mask ({rows},T) with T <= {length}, "
            f"found {response_mask.dtype} {tuple(response_mask.shape)}"
        )
    _check_temperature(temperature)
    if width == length and bool(response_mask[:, 0].any()):
        raise ValueError("response_mask asks for column 0, which no token comes before")
    # (B,S) bool, moved one to the left: where the *predicting* positions are
    wanted = F.pad(response_mask, (length - width, 0))
    predicting = F.pad(wanted[:, 1:], (0, 1))
    targets = input_ids[wanted]  # (N,)
    head = lm_head(model)
    if head is None:
        picked = _full_logits(model, input_ids, attention_mask, position_ids)[predicting]
        logp = torch.log_softmax(picked / temperature, dim=-1)  # (N,V)
        flat = logp.gather(1, targets.unsqueeze(1)).squeeze(1)  # (N,)
        flat_entropy = -(logp.exp() * logp).sum(dim=1)  # (N,)
    else:
        hidden = backbone_hidden(model, input_ids, attention_mask, position_ids)  # (B,S,d)
        flat, flat_entropy = _apply_head(
            head, hidden[predicting], targets, temperature, chunk, entropy
        )
    zeros = torch.zeros(rows, width, dtype=flat.dtype, device=flat.device)
    logprobs = zeros.masked_scatter(response_mask, flat)  # (B,T)
    if not entropy:
        return logprobs
    return logprobs, zeros.masked_scatter(response_mask, flat_entropy)


def _apply_head(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    chunk: int | None,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {
        "bias": head.bias,
        "temperature": temperature,
        "scale": head.scale,
        "softcap": head.softcap,
        "chunk": chunk,
    }
    if entropy:
        return token_logprobs(hidden, head.weight, targets, entropy=True, **options)
    flat = token_logprobs(hidden, head.weight, targets, **options)
    return flat, flat


def _full_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """Logits (B,S,V) from the model's own forward, for heads that ``Head`` cannot describe."""
    lm = causal_lm(model)
    mask, position_ids = _mask_and_positions(attention_mask, position_ids)
    output = lm(
        input_ids=input_ids,
        attention_mask=mask,
        use_cache=False,
        **accepted(lm.forward, position_ids=position_ids),
    )
    return upcast(output.logits)
