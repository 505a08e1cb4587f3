"""What a forward and backward pass needs beside weights, gradients and optimizer states, in bytes.

d hidden size, q and k the widths of all query and of all key heads, f width of the MLP, V
vocabulary, S tokens of a row, N tokens of a micro-batch, c bytes of a number in the products: 2
for bf16 and fp16, 4 for fp32.

One layer of a gated model (llama) on a GPU keeps for each token until its backward pass:

    all weights trained, autocast over fp32      18 d + 2 c (q + k) + 4 c f
    all weights trained, in half precision        8 d + 2 c (q + k) + 4 c f
    adapters trained, autocast over bf16         14 d + 2 c (q + k) + c q + 4 c f
    adapters trained, in half precision           8 d + 2 c (q + k) + 4 c f

These are the inputs of both norms, copies of their outputs for the projections (under autocast
each of the five casts its own), queries, keys, values and the output of attention, and four
tensors of the MLP. Where RMSNorm is not one kernel (on a CPU) it keeps fp32 copies too. Without a
fused kernel, attention keeps its scores (bloom). Gradient checkpointing keeps the input of each
layer only.

The vocabulary head computes logits in chunks, see `rlhf_core.nn.chunked_logprobs`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_core.model_files.shape import ModelShape

# As rlhf_core.nn.chunked_logprobs has them: logits at once, rows of a chunk, logits that are kept.
_CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**27}
_CHUNK_ROWS = {"cpu": (64, 256), "cuda": (64, 8192)}
_KEPT_LOGITS = 2**26


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes of one model on one device.

    Attributes:
        width: bytes of a number in the products, c.
        stream: bytes of a number between the layers.
        autocast: weights are cast for each product, else they are in that precision already.
        adapters: rank of the adapters that are trained alone; 0: weights are trained.
        checkpointing: layers are computed again in the backward pass.
        layers: layers that a gradient goes through.
        fused_norms: RMSNorm is one kernel, see rlhf_core.nn.fused_norms.
    """

    shape: ModelShape
    device: str
    width: int
    stream: int
    autocast: bool
    adapters: int
    checkpointing: bool
    layers: int
    fused_norms: bool

    def kept(self, tokens: int, length: int) -> int:
        """Activations from the forward to the backward pass. length: tokens of a row."""
        each = self.stream * self.shape.hidden if self.checkpointing else self.layer(length)
        # Beside the layers the last norm and the hidden states that the head reads.
        return tokens * (each * self.layers + (4 + 3 * self.stream) * self.shape.hidden)

    def layer(self, length: int) -> int:
        """Activations of one layer, for each token."""
        s, c = self.shape, self.width
        d, q, f = s.hidden, s.query, s.intermediate
        if not s.gated:  # LayerNorm, in fp32 under autocast
            norms = 2 * (4 if self.autocast else c) * d
        elif self.fused_norms:
            norms = 2 * self.stream * d
        else:  # the input in fp32; for the gradient of the weight what it is multiplied with
            norms = 2 * (4 + (0 if self.adapters else self.stream)) * d
        reading = (5 if s.gated else 2) if self.autocast else 2  # projections that read a norm
        attention = 2 * c * (q + s.key_value) + (c * q if self.adapters and self.autocast else 0)
        mlp = s.mlp_tensors * c * f
        adapters = (7 if s.gated else 6) * c * self.adapters
        scores = s.heads * length * (4 + (c if c < 4 else 0)) if s.keeps_scores else 0
        return norms + reading * c * d + attention + mlp + adapters + scores

    def one_layer(self, tokens: int, length: int) -> int:
        """The backward pass of a layer: gradients of its activations, and these where they are
        computed again."""
        s, c = self.shape, self.width
        again = self.layer(length) if self.checkpointing else 0
        scores = s.heads * length * (2 * 4 + c) if s.keeps_scores else 0
        return tokens * (3 * c * s.intermediate + 2 * 4 * s.hidden + scores + again)

    def head(self, tokens: int, *, trained: bool) -> int:
        """What the vocabulary head needs at once. trained: its weight gets a gradient."""
        s, c = self.shape, self.width
        least, most = _CHUNK_ROWS[self.device]
        chunk = min(max(_CHUNK_LOGITS[self.device] // s.vocabulary, least), most)
        logits = min(tokens, chunk) * s.vocabulary
        following = min(max(0, tokens - chunk), chunk) * s.vocabulary
        half = c if c < 4 else 0  # of a product, before it is cast to fp32
        weight = s.vocabulary * s.hidden
        cast = c * weight if self.autocast and self.stream == 4 else 0
        # In fp32 the logits and their exponentials; and of the chunk before its logits.
        if not trained:
            return cast + max(8 * logits, 4 * logits + 8 * following)
        forward = max(8 * logits, 4 * logits + (4 + half) * following)
        # The weight's gradient is summed in fp32. Beside it are a chunk's share of it, or the
        # logits of the next chunk.
        share = (4 + half) * logits + (c * weight if half else 0)
        backward = 4 * weight + max(share, half * logits + (4 + half) * following)
        whole = tokens * s.vocabulary
        kept = 4 * (whole - logits) if whole <= _KEPT_LOGITS else 0
        return cast + kept + max(forward, backward)
