"""A device that says cuda and computes on the CPU: real numbers, real control flow.

A tensor on it is a wrapper of device cuda:N around a CPU tensor; operators compute on what is
wrapped. `tests.gpu.install` makes torch believe in the device. What fails on a GPU fails here:

* an operator that gets a CPU tensor of one dimension or more beside one on the GPU, or tensors of
  two GPUs,
* a generator of the other device,
* `numpy()` of a tensor on the GPU, and pickling one,
* a CPU tensor in a collective operation of a group that poses as NCCL (`only_gpu_collectives`).

What makes the host wait is counted by line (`tests.gpu.syncs`). Not seen: kernels and their
rounding, streams, NCCL itself, determinism and memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from tests.gpu.syncs import OPERATORS, UPLOAD, record

current = 0
"""The index of "cuda" without one; `torch.cuda.set_device` sets it."""
CPU = torch.device("cpu")
# self and values share a device; index tensors may lie on the CPU, at the price of a copy
TAKES_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
only_gpu_collectives = False
"""Whether the process group refuses CPU tensors, as NCCL does."""
COPIES = {"copy_", "_to_copy", "_copy_from", "_copy_from_and_resize"}
WATCHED = {*OPERATORS, *TAKES_INDICES, "_to_copy", "copy_"}  # for what makes the host wait
NO_NUMPY = (
    "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
    "memory first."
)


class DeviceMismatch(RuntimeError):
    """Tensors of both devices met in one operator."""


class GpuTensor(Tensor):
    """A tensor of a GPU around a CPU tensor, `elem`."""

    elem: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, elem: Tensor, index: int) -> GpuTensor:
        assert not isinstance(elem, GpuTensor), "wrapped twice"
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, elem.shape, strides=elem.stride(), storage_offset=elem.storage_offset(),
            dtype=elem.dtype, layout=elem.layout, device=torch.device("cuda", index),
        )  # fmt: skip

    def __init__(self, elem: Tensor, index: int) -> None:
        self.elem, self.index = elem, index

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return compute(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["elem"], self.index

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):  # type: ignore[no-untyped-def]
        return GpuTensor(inner["elem"], meta)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"GpuTensor({self.elem.detach()!r}, cuda:{self.index})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch.no_grad():
            copied: Tensor = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        else:
            copied.requires_grad_(self.requires_grad)
        memo[id(self)] = copied
        return copied

    @property
    def data(self) -> Tensor:
        return torch._C.TensorBase.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, new: Tensor) -> None:
        assert isinstance(new, GpuTensor), "the data of a GPU tensor becomes a CPU tensor"
        torch._C.TensorBase.data.__set__(self, new)  # type: ignore[attr-defined]
        self.elem, self.index = new.elem, new.index

    def tolist(self) -> Any:
        record("tolist")
        return self.elem.detach().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.elem.untyped_storage()

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a tensor on the GPU is pickled: move it to the CPU before it is sent")

    def numpy(self, **_: Any) -> Any:
        raise TypeError(NO_NUMPY)

    def __array__(self, *_: Any) -> Any:
        raise TypeError(NO_NUMPY)


KINDS = {GpuTensor, Tensor, torch.nn.Parameter, torch.nn.Buffer}


class PretendMode(TorchDispatchMode):
    """Also sees operators without a tensor of the GPU: `torch.zeros(..., device="cuda")`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return compute(func, args, kwargs or {})


# ------------------------------------------------------------------------------ one operator


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on what its tensors wrap, after the checks that a GPU makes."""
    space, name, aliases = _about(func)
    tensors: list[Tensor] = []
    inner = [opened(x, tensors) for x in args]
    kwargs = {key: x for key, x in kwargs.items() if key != "pin_memory"}  # of CPU tensors
    options = {key: opened(x, tensors) for key, x in kwargs.items()}
    if any(type(x) not in KINDS for x in tensors):
        return NotImplemented  # a DTensor has operators on its local part
    if space == "c10d":
        return _collective(func, name, tensors, inner, options)
    if name in ("is_pinned", "_pin_memory"):  # of CPU tensors: copies from them need not wait
        return False if name == "is_pinned" else args[0].clone()
    gpu = next((x.index for x in tensors if type(x) is GpuTensor), None)
    to = gpu
    if kwargs:
        to = _read_options(options, gpu)
    if gpu is None and to is None:
        return func(*args, **kwargs)
    if gpu is not None:
        if name not in COPIES:
            _check_devices(name, tensors, args, gpu)
        if name in WATCHED:
            _count(name, args, kwargs, to is not None)
    elif name in COPIES and not kwargs.get("non_blocking"):
        record(UPLOAD)
    result = func(*inner, **options)
    if name == "resize_":
        args[0].data = GpuTensor(result, args[0].index)
        return args[0]
    if name == "_to_copy" and result is inner[0]:
        result = result.clone()  # a copy between devices is never the same tensor
    if to is None:
        return args[0] if name == "copy_" else result
    found = wrapped(result, to, {})
    return return_and_correct_aliasing(func, args, kwargs, found) if aliases else found


_known: dict[int, tuple[str, str, bool]] = {}


def _about(func: Any) -> tuple[str, str, bool]:
    """Namespace and name of an operator, and whether a result may share memory with an argument."""
    if id(func) not in _known:  # operators are never freed
        schema = func._schema
        space, _, name = schema.name.partition("::")
        aliases = any(a.alias_info is not None for a in schema.arguments)
        _known[id(func)] = space, name, aliases
    return _known[id(func)]


def opened(tree: Any, found: list[Tensor]) -> Any:
    """The same with what tensors of the GPU wrap in their place; all tensors are added to `found`.

    (torch's pytree takes four times as long.)
    """
    kind = type(tree)
    if kind is GpuTensor:
        found.append(tree)
        return tree.elem
    if kind is list or kind is tuple:
        return kind([opened(x, found) for x in tree])
    if isinstance(tree, Tensor):
        found.append(tree)
    return tree


def _read_options(options: dict[str, Any], gpu: int | None) -> int | None:
    """The GPU of the result, or None; the options become those of the CPU."""
    target, to = options.get("device"), gpu
    if target is not None:
        to = gpu_index(target)
        if to is not None or gpu is not None:
            options["device"] = CPU
    if options.get("pin_memory"):
        options["pin_memory"] = False
    _check_generator(options.get("generator"), to is not None)
    return to


def gpu_index(device: Any) -> int | None:
    """The index of a GPU; None of another device."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    return current if device.index is None else device.index


def wrapped(tree: Any, index: int, seen: dict[int, GpuTensor]) -> Any:
    """CPU tensors of a result as tensors of a GPU; the same one twice stays the same."""
    if isinstance(tree, AsyncCollectiveTensor):
        tree = tree.wait()
    if isinstance(tree, GpuTensor):
        return tree
    if isinstance(tree, Tensor):
        if id(tree) not in seen:
            seen[id(tree)] = GpuTensor(tree, index)
        return seen[id(tree)]
    if isinstance(tree, list | tuple):
        return type(tree)([wrapped(x, index, seen) for x in tree])
    return tree


def _check_devices(name: str, tensors: list[Tensor], args: Any, gpu: int) -> None:
    if all(type(x) is GpuTensor and x.index == gpu for x in tensors):
        return
    indices = []
    if name in TAKES_INDICES and isinstance(args[0], GpuTensor):
        indices = [i for i in args[1] if i is not None]
    for x in tensors:
        if x.device.type == "meta" or (isinstance(x, GpuTensor) and x.index == gpu):
            continue
        if any(x is i for i in indices) and not isinstance(x, GpuTensor):
            record("CPU index")
        elif x.dim() > 0 or isinstance(x, GpuTensor):  # a number may lie on the CPU
            raise DeviceMismatch(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:{gpu} and {x.device}! (aten.{name}, the latter of shape {tuple(x.shape)})"
            )


def _check_generator(generator: torch.Generator | None, to_gpu: bool) -> None:
    needed = "cuda" if to_gpu else "cpu"
    if generator is not None and generator.device.type != needed:
        raise RuntimeError(
            f"Expected a '{needed}' device type for generator but found '{generator.device.type}'"
        )


def _count(name: str, args: Any, kwargs: dict[str, Any], to_gpu: bool) -> None:
    """Record what makes the host wait in an operator on tensors of the GPU."""
    if name in OPERATORS:
        if name != "repeat_interleave" or kwargs.get("output_size") is None:
            record(OPERATORS[name])
    elif name in TAKES_INDICES:
        if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            # `x[mask] = number` is a masked fill
            fills = name != "index" and args[2].numel() == 1 and not isinstance(args[2], GpuTensor)
            if not fills:
                record("bool index")
    elif name == "_to_copy":
        if not to_gpu:
            record("to CPU")
    elif name == "copy_":
        here, there = (isinstance(x, GpuTensor) for x in args[:2])
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        if there and not here:
            record("to CPU")
        elif here and not there and blocking:
            record(UPLOAD)


def _collective(
    func: Any, name: str, tensors: list[Tensor], inner: list[Any], options: dict[str, Any]
) -> Any:
    """A collective operation, by gloo on what the tensors wrap."""
    if only_gpu_collectives and any(x.device.type == "cpu" for x in tensors):
        raise RuntimeError(f"No backend type associated with device type cpu (c10d.{name})")
    result = func(*inner, **options)
    back = {id(x.elem): x for x in tensors if isinstance(x, GpuTensor)}
    return tree_map_only(Tensor, lambda x: back.get(id(x), x), result)
