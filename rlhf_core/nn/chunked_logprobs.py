"""Log-probabilities from hidden states in chunks of positions, without all (N,V) logits at once.

N positions, d hidden size, V vocabulary. Log-probabilities are in nats, of logits divided by the
temperature.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_core.losses.reductions import upcast
from rlhf_core.nn.vocabulary_head import finish_logits

# Maximum logits of a chunk, and its minimum and maximum rows. On a CPU, 256 rows keep the units
# busy, and more do not fit the cache; on a GPU many rows must share each read of the weight.
_CHUNK_LOGITS = {"cpu": 2**24, "other": 2**27}
_CHUNK_ROWS = {"cpu": (64, 256), "other": (64, 8192)}
# Up to this many logits are kept for the backward pass (256 MiB in fp32). Recomputing them costs a
# third of the head's time.
_KEPT_LOGITS = {"cpu": 2**26, "other": 2**26}


class _TokenLogprobs(torch.autograd.Function):
    """Log-softmax at the targets.

    What it keeps for the backward pass: d logprob / d hidden (N,d) if only the hidden states need
    gradients; else the logits if they are few; else one log-sum-exp per row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor]:
        # Allocated before the loop. Small tensors allocated in it would fragment the heap between
        # the chunks' logits, and each chunk would grow the process.
        count = hidden.shape[0]
        exact = torch.promote_types(options.dtype, torch.float32)
        norms = torch.empty(count, dtype=exact, device=hidden.device)  # (N,)
        logprobs = torch.empty_like(norms)  # (N,)
        entropies = torch.empty_like(norms) if options.entropy else norms.new_zeros(0)
        need_h, *need_head = ctx.needs_input_grad[:3]
        grad_hidden_cache = None
        if need_h and not any(need_head) and not options.entropy and options.softcap is None:
            grad_hidden_cache = torch.empty_like(hidden)  # (N,d)
        keep = any(ctx.needs_input_grad[:3]) and grad_hidden_cache is None
        keep = keep and count * weight.shape[0] <= _KEPT_LOGITS[_kind(hidden)]
        ctx.kept = []
        start = 0
        with torch.autocast(hidden.device.type, enabled=False):
            w, b = cast_head(weight, bias, options.dtype)
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
                if grad_hidden_cache is not None:
                    grad = logits.sub_(norm.unsqueeze(1)).exp_().neg_()  # (n,V)
                    grad.scatter_add_(1, y.unsqueeze(1), torch.ones_like(norm).unsqueeze(1))
                    grad_hidden_cache[rows] = (grad.to(options.dtype) @ w) * options.factor
                elif keep:
                    ctx.kept.append(logits)
        ctx.options = options
        ctx.save_for_backward(hidden, weight, bias, targets, norms, entropies, grad_hidden_cache)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, targets, norms, entropies, grad_hidden_cache = ctx.saved_tensors
        options: HeadOptions = ctx.options
        if grad_hidden_cache is not None:
            return (
                grad_hidden_cache * grad_logprobs.unsqueeze(1).to(grad_hidden_cache.dtype),
                None,
                None,
                None,
                None,
            )
        kept = iter(ctx.kept)
        ctx.kept = []  # changed in place below; a second backward pass recomputes them
        need_h, need_w, need_b = ctx.needs_input_grad[:3]
        grad_h = torch.empty_like(hidden) if need_h else None
        grad_w = torch.empty_like(weight, dtype=norms.dtype) if need_w else None
        grad_b = torch.zeros_like(bias, dtype=norms.dtype) if need_b else None
        start = 0
        with torch.autocast(hidden.device.type, enabled=False):
            w, b = cast_head(weight, bias, options.dtype)
            for h, y in _chunks(hidden, targets, chunk=options.chunk):
                rows = slice(start, start + h.shape[0])
                start = rows.stop
                logits = next(kept, None)  # (n,V)
                if logits is None:
                    logits = options.logits(h, w, b)
                g = grad_logprobs[rows].unsqueeze(1)  # (n,1)
                g_ent = grad_entropy[rows].unsqueeze(1) if options.entropy else None
                ent = entropies[rows].unsqueeze(1) if options.entropy else None
                grad = _grad_of_logits(logits, norms[rows].unsqueeze(1), ent, y, g, g_ent, options)
                if grad_b is not None:
                    grad_b += grad.sum(dim=0)
                grad = grad.to(options.dtype)
                if grad_h is not None:
                    grad_h[rows] = grad @ w
                if grad_w is not None:
                    h = h.to(options.dtype)
                    added = rows.start > 0
                    if grad_w.dtype == options.dtype:
                        grad_w.addmm_(grad.t(), h, beta=float(added))
                    elif added:  # the product in half precision, its sum in fp32
                        grad_w += grad.t() @ h
                    else:
                        grad_w.copy_(grad.t() @ h)
        return (
            grad_h,
            grad_w.to(weight.dtype) if grad_w is not None else None,
            grad_b.to(bias.dtype) if grad_b is not None else None,
            None,
            None,
        )


def _grad_of_logits(
    logits: Tensor,
    norms: Tensor,
    entropies: Tensor | None,
    targets: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    options: HeadOptions,
) -> Tensor:
    """d loss / d (weight h) of n rows, (n,V).

    Args:
        logits: (n,V), changed in place. targets: (n,).
        norms, entropies, grad_logprobs, grad_entropy: (n,1); the entropies' may be None together.
    """
    tanh = None
    if options.softcap is not None:
        tanh = logits * (options.temperature / options.softcap)
    logp = logits.sub_(norms)
    # p, until the next lines make it d loss / d logits
    if grad_entropy is not None and entropies is not None:
        grad = logp.exp()
        # dH/dz = -p (log p + H)
        grad.mul_((logp + entropies).mul_(grad_entropy).add_(grad_logprobs).neg_())
    else:
        grad = logp.exp_().mul_(-grad_logprobs)
    grad.scatter_add_(1, targets.unsqueeze(1), grad_logprobs.to(grad.dtype))
    if tanh is not None:
        grad.mul_(1 - tanh.square_())
    if options.factor != 1.0:
        grad.mul_(options.factor)
    return grad


class HeadOptions(NamedTuple):
    """How logits are computed from hidden states."""

    dtype: torch.dtype  # of the matrix products
    chunk: int
    temperature: float
    scale: float
    softcap: float | None
    entropy: bool

    @property
    def factor(self) -> float:
        """d logits / d (weight h), without a soft cap."""
        return self.scale / self.temperature

    def logits(self, h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        logits = upcast(F.linear(h.to(self.dtype), w, b))
        return finish_logits(logits, self.scale, self.softcap, self.temperature)


def _kind(tensor: Tensor) -> str:
    return "cpu" if tensor.device.type == "cpu" else "other"


def rows_at_once(hidden: Tensor, vocabulary: int) -> int:
    """Rows of a chunk of logits."""
    device = _kind(hidden)
    least, most = _CHUNK_ROWS[device]
    return min(max(_CHUNK_LOGITS[device] // vocabulary, least), most)


def cast_head(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """A head's weight and bias in the dtype of the products."""
    return weight.to(dtype), bias.to(dtype) if bias is not None else None


def _chunks(hidden: Tensor, targets: Tensor, *, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(hidden.split(chunk), targets.split(chunk), strict=True)


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the matrix products are computed in: autocast's dtype, or the wider of the two."""
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
    check_temperature(temperature)
    if hidden.shape[0] == 0:  # an empty micro-batch still takes part in the backward pass
        nothing = upcast((hidden.sum() + 0 * weight[:1].sum()).expand(0))
        return (nothing, nothing) if entropy else nothing
    if chunk is None:
        chunk = rows_at_once(hidden, weight.shape[0])
    dtype = product_dtype(hidden, weight)
    options = HeadOptions(dtype, chunk, temperature, scale, softcap, entropy)
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

    There is no ignore index: select the trained positions first.

    Args:
        hidden: (N,d). weight: (V,d). targets: (N,). bias, scale, softcap: see ``Head``.

    Returns:
        A scalar; divide by the global batch's token count.
    """
    return -token_logprobs(
        hidden, weight, targets, bias=bias, scale=scale, softcap=softcap, chunk=chunk
    ).sum()


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(
            f"found temperature {temperature}, it must be above 0; greedy decoding is a separate "
            "option and has no log-probabilities"
        )
