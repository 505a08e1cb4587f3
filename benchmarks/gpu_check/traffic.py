"""Where the time of a training step would go on a GPU, counted without one.

    python -m benchmarks.gpu_check.traffic [--rows 8] [--length 2048] [--layers 4]

Runs a llama of the check's size with tensors that have shapes and no numbers, and counts what each
operator reads and writes, and the arithmetic of matrix products. An operator takes the longer of
bytes / BANDWIDTH and FLOPs / PEAK. Kernels are slower than that, and the host is not counted:
what is compared is one way of computing with another.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from benchmarks.gpu_check.sizes import GPU

BANDWIDTH = 3.0e12  # bytes per second, of an H100
PEAK = 7.0e14  # FLOP per second in bf16
FLASH = 3.5e14  # the same of its attention kernels
NO_KERNEL = ("view", "expand", "slice", "unsqueeze", "squeeze", "detach", "alias", "permute", "t",
             "transpose", "as_strided", "select", "split", "empty", "reshape", "_unsafe_view",
             "unbind", "empty_like", "lift_fresh", "split_with_sizes")  # fmt: skip


class Traffic(TorchDispatchMode):
    """Seconds by kind of operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        space, _, name = function._schema.name.partition("::")
        if space == "prim" or name in NO_KERNEL:
            return out
        if "attention" in name:
            self.add("attention", attention_flops(args, backward="backward" in name) / FLASH)
        elif function._overloadpacket in flop_registry:
            flops = flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=out)
            self.add("matrix products", max(flops / PEAK, moved((args, kwargs), out)))
        else:
            kind = "casts" if name == "_to_copy" else "elementwise"
            self.add(kind, moved((args, kwargs), out))
        return out

    def add(self, kind: str, seconds: float) -> None:
        self.seconds[kind] += seconds  # type: ignore[assignment]


def moved(*trees: Any) -> float:
    """Seconds for reading and writing the tensors; what is broadcast counts once."""
    tensors = [x for tree in trees for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]
    size = 0
    for x in tensors:
        dims = zip(x.shape, x.stride(), strict=True)
        count = 1
        for length, stride in dims:
            count *= length if stride else 1
        size += count * x.element_size()
    return size / BANDWIDTH


def attention_flops(args: Any, *, backward: bool) -> float:
    """Of causal attention: half of all pairs; the backward pass has five products for two."""
    query = args[1 if backward else 0]
    rows, heads, length, width = query.shape
    return float(2 * rows * heads * length**2 * width * (2.5 if backward else 1.0))


class OneKernel(torch.autograd.Function):
    """A norm that reads its input and writes its output once, and as often in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, traffic: Traffic) -> torch.Tensor:
        ctx.traffic = traffic
        traffic.add("norms in one kernel", moved(x, x))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.traffic.add("norms in one kernel", moved(grad, grad, grad))
        return torch.empty_like(grad), None


def count(options: argparse.Namespace, *, half: bool, one_kernel: bool) -> Counter[str]:
    """Seconds by kind of a forward and backward pass through the layers.

    Args:
        half: weights and hidden states in bf16 (fsdp2); else fp32 weights under autocast (ddp).
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama import modeling_llama

    config = LlamaConfig(**GPU.large | {"num_hidden_layers": options.layers})
    traffic, shape = Traffic(), (options.rows, options.length)
    with FakeTensorMode(), contextlib.ExitStack() as stack:
        # A mask's making depends on numbers; attention without one is causal.
        stack.enter_context(
            mock.patch.object(modeling_llama, "create_causal_mask", lambda **_: None)
        )
        if one_kernel:
            forward = lambda norm, x: OneKernel.apply(x, traffic)  # noqa: E731
            stack.enter_context(mock.patch.object(modeling_llama.LlamaRMSNorm, "forward", forward))
        with default_dtype(torch.bfloat16 if half else torch.float32):
            model = LlamaForCausalLM(config).model
        ids = torch.zeros(shape, dtype=torch.long)
        positions = torch.arange(options.length).expand(shape)
        with traffic, torch.autocast("cpu", dtype=torch.bfloat16, enabled=not half):
            hidden = model(input_ids=ids, position_ids=positions, use_cache=False)[0]
        with traffic:
            hidden.backward(torch.empty_like(hidden))
    return traffic.seconds


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    for half in (False, True):
        for one_kernel in (False, True):
            found = count(options, half=half, one_kernel=one_kernel)
            total = sum(found.values())
            useful = (
                found["matrix products"] + found["attention"] * (1 + 2) / (1 + 2.5) * FLASH / PEAK
            )
            parts = ", ".join(f"{k} {1000 * v:.1f}" for k, v in found.most_common())
            name = "bf16" if half else "autocast over fp32 weights"
            name += ", norms in one kernel" if one_kernel else ""
            print(
                f"{name}: {1000 * total:.1f} ms ({parts}); at most {useful / total:.0%} of the peak"
            )


if __name__ == "__main__":
    main()
