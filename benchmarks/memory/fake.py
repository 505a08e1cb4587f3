"""Tensors without data: a training step of any size on a small machine, and its bytes.

`FakeTensorMode` runs every operator on shapes alone. Integers and booleans stay real here, because
this project's masks decide what is computed: padding, and positions in the loss.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REAL = (torch.int64, torch.int32, torch.bool)
ROUNDING = 512  # bytes, as torch's allocator on a GPU rounds
aten = torch.ops.aten
_INDEXED = (
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default,
)  # fmt: skip
_MADE_OF_INTEGERS = (aten.arange.default, aten.arange.start, aten.arange.start_step)


class LiveBytes(TorchDispatchMode):
    """Runs operators on fake tensors, and counts the bytes of all storages that are alive.

    torch's MemTracker counts a DTensor as large as it is over all ranks; this counts one rank's.

    Attributes:
        now: bytes alive. peaks: phase -> the most of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.now = 0
        self.peaks: dict[str, int] = {}
        self._phase = "preparation"
        self._sizes: dict[int, int] = {}  # storage -> bytes
        self._propagating = 0

    def phase(self, name: str) -> None:
        """Begin a phase, or go on with one of that name."""
        self._phase = name
        self._grown()

    def _count(self, tensor: Any) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        if self._propagating or not isinstance(tensor, Tensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = size = _rounded(storage.nbytes())
            self.now += size
            weakref.finalize(storage, self._gone, key)
            self._grown()

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def _grown(self) -> None:
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self.now)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Everything inside runs on fake tensors."""
        resize, propagate = torch.UntypedStorage.resize_, _PROPAGATE

        def resized(storage: torch.UntypedStorage, size: int) -> None:
            # FSDP2 frees what it gathered by resizing storages, which no operator shows.
            resize(storage, size)
            if storage._cdata in self._sizes:
                self.now += _rounded(size) - self._sizes[storage._cdata]
                self._sizes[storage._cdata] = _rounded(size)
                self._grown()

        def propagated(*args: Any, **kwargs: Any) -> Any:
            # DTensor runs operators on tensors of the global size to find out shapes.
            self._propagating += 1
            try:
                return propagate(*args, **kwargs)
            finally:
                self._propagating -= 1

        convert = nn.Module._apply
        nn.Module._apply = _converted  # type: ignore[method-assign, assignment]
        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        ShardingPropagator._propagate_tensor_meta_non_cached = propagated  # type: ignore[method-assign]
        try:
            with self.fake, self:
                yield
        finally:
            nn.Module._apply = convert  # type: ignore[method-assign]
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
            ShardingPropagator._propagate_tensor_meta_non_cached = propagate  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented
        result = self._run(func, args, kwargs or {})
        for leaf in tree_leaves(result):
            self._count(leaf)
        return result

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if tensors:
            real = all(not isinstance(x, FakeTensor) and x.dtype in REAL for x in tensors)
        else:
            integers = all(isinstance(x, int) for x in args) and kwargs.get("dtype") is None
            real = kwargs.get("dtype") in REAL or (func in _MADE_OF_INTEGERS and integers)
        if real and kwargs.get("dtype", torch.bool) in (*REAL, None):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return _known(args[0])
        if func is aten.equal.default:
            return True
        if func in _INDEXED:
            args = (args[0], _whole_numbers(args[1]), *args[2:])
        return func(*args, **kwargs)


_PROPAGATE = ShardingPropagator._propagate_tensor_meta_non_cached


def _converted(module: nn.Module, change: Any, recurse: bool = True) -> nn.Module:
    """`Module.to` and its kin; torch's own cannot exchange fake parameters."""
    new: dict[int, nn.Parameter] = {}
    for part in module.modules() if recurse else [module]:
        for name, param in part._parameters.items():
            if param is not None and id(param) not in new:
                changed = change(param.detach())
                same = changed.dtype == param.dtype
                kept = param if same else nn.Parameter(changed, param.requires_grad)
                new[id(param)] = new[id(kept)] = kept
            if param is not None:
                part._parameters[name] = new[id(param)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = change(buffer)
    return module


def _rounded(size: int) -> int:
    return -(-size // ROUNDING) * ROUNDING


def _known(tensor: Tensor) -> bool | int | float:
    """What a fake number is taken for: finite, not different, nothing to clip."""
    return True if tensor.dtype == torch.bool else tensor.dtype.is_floating_point * 0.0 or 0


def _whole_numbers(indices: Any) -> Any:
    """Masks as the indices of their True elements, whose number is known."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            with unset_fake_temporarily():
                found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found
