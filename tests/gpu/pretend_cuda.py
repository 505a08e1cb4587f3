"""A device that says cuda:0 and computes on the CPU: real numbers, real control flow.

`install()` makes torch believe in a GPU. A tensor on it is a wrapper of device cuda:0 around a CPU
tensor; operators compute on what is wrapped. What fails on a GPU fails here:

* an operator that gets a CPU tensor of one dimension or more beside one on the GPU,
* a generator of the other device,
* `numpy()` of a tensor on the GPU, and pickling one,
* a CPU tensor in a collective operation, after `init_process_group("nccl")` (gloo does the work).

What makes the host wait is counted by line (`tests.gpu.syncs`). Not seen: kernels and their
rounding, streams, NCCL itself, determinism and memory.

Load the C++ stub (`tests.gpu.stub`) before torch is imported.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

from tests.gpu.syncs import OPERATORS, UPLOAD, record

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
# self and values share a device; index tensors may lie on the CPU, at the price of a copy
TAKES_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPIES = {"copy_", "_to_copy", "_copy_from", "_copy_from_and_resize"}
NO_NUMPY = (
    "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
    "memory first."
)


class DeviceMismatch(RuntimeError):
    """Tensors of both devices met in one operator."""


class GpuTensor(Tensor):
    """A tensor of device cuda:0 around a CPU tensor, `elem`."""

    elem: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, elem: Tensor) -> GpuTensor:
        assert not isinstance(elem, GpuTensor), "wrapped twice"
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, elem.shape, strides=elem.stride(), storage_offset=elem.storage_offset(),
            dtype=elem.dtype, layout=elem.layout, device=GPU,
        )  # fmt: skip

    def __init__(self, elem: Tensor) -> None:
        self.elem = elem

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return compute(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["elem"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):  # type: ignore[no-untyped-def]
        return GpuTensor(inner["elem"])

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"GpuTensor({self.elem.detach()!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch.no_grad():
            copied: Tensor = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        else:
            copied.requires_grad_(self.requires_grad)
        memo[id(self)] = copied
        return copied

    def tolist(self) -> Any:
        record("tolist")
        return self.elem.detach().tolist()

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a tensor on the GPU is pickled: move it to the CPU before it is sent")

    def numpy(self, **_: Any) -> Any:
        raise TypeError(NO_NUMPY)

    def __array__(self, *_: Any) -> Any:
        raise TypeError(NO_NUMPY)


class PretendMode(TorchDispatchMode):
    """Also sees operators without a tensor of the GPU: `torch.zeros(..., device="cuda")`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return compute(func, args, kwargs or {})


# ------------------------------------------------------------------------------ one operator


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on what its tensors wrap, after the checks that a GPU makes."""
    space, _, name = func._schema.name.partition("::")
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    gpu = [x for x in tensors if isinstance(x, GpuTensor)]
    if space == "c10d":
        return _collective(func, name, tensors, args, kwargs)
    target = kwargs.get("device")
    to_gpu = bool(gpu) if target is None else is_gpu(target)
    if not gpu and not to_gpu:
        return func(*args, **kwargs)
    if name == "is_pinned":
        return False
    if name == "_pin_memory":
        return args[0]
    if gpu and name not in COPIES:
        _check_devices(name, tensors, args)
    _check_generator(kwargs.get("generator"), to_gpu)
    if gpu:
        _count(name, args, kwargs, to_gpu)
    elif name in COPIES and not kwargs.get("non_blocking"):
        record(UPLOAD)
    result = func(*unwrapped(args), **unwrapped(_on_cpu(kwargs)))
    if name == "_to_copy" and any(result is x for x in tree_flatten(unwrapped(args))[0]):
        result = result.clone()  # a copy between devices is never the same tensor
    if not to_gpu:
        return args[0] if name == "copy_" else result
    return return_and_correct_aliasing(func, args, kwargs, wrapped(result))


def is_gpu(device: Any) -> bool:
    return torch.device(device).type == "cuda"


def unwrapped(tree: Any) -> Any:
    return tree_map_only(GpuTensor, lambda x: x.elem, tree)


def wrapped(tree: Any) -> Any:
    """CPU tensors of a result as tensors of the GPU; the same one twice stays the same."""
    seen: dict[int, GpuTensor] = {}

    def wrap(x: Tensor) -> Tensor:
        if isinstance(x, GpuTensor):
            return x
        if id(x) not in seen:
            seen[id(x)] = GpuTensor(x)
        return seen[id(x)]

    return tree_map_only(Tensor, wrap, tree)


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    kwargs = dict(kwargs)
    if kwargs.get("device") is not None:
        kwargs["device"] = CPU
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    return kwargs


def _check_devices(name: str, tensors: list[Tensor], args: Any) -> None:
    indices = []
    if name in TAKES_INDICES and isinstance(args[0], GpuTensor):
        indices = [i for i in args[1] if i is not None]
    for x in tensors:
        if isinstance(x, GpuTensor) or x.device.type != "cpu":
            continue
        if any(x is i for i in indices):
            record("CPU index")
        elif x.dim() > 0:  # a number may lie on the CPU
            raise DeviceMismatch(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! (aten.{name}, a CPU tensor of shape {tuple(x.shape)})"
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
    func: Any, name: str, tensors: list[Tensor], args: Any, kwargs: dict[str, Any]
) -> Any:
    """A collective operation, by gloo on what the tensors wrap."""
    if _as_nccl and any(x.device.type == "cpu" for x in tensors):
        raise RuntimeError(f"No backend type associated with device type cpu (c10d.{name})")
    result = func(*unwrapped(args), **unwrapped(kwargs))
    back = {id(x.elem): x for x in tensors if isinstance(x, GpuTensor)}
    return tree_map_only(Tensor, lambda x: back.get(id(x), x), result)


# ------------------------------------------------------------------------------ installation

_as_nccl = False
_mode: PretendMode | None = None


class Idle:
    """A stream or an event that does nothing: there is one queue, and it is empty."""

    device, stream_id, cuda_stream = GPU, 0, 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self if name == "record_event" else None

    def __enter__(self) -> Idle:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def install() -> None:
    """Pretend from now on, in this process. Needs the C++ stub.

    RLHF_PRETEND_GPUS has the number of devices; each process uses one, and calls it cuda:0.
    """
    global _mode
    assert torch._C._get_accelerator().type == "cuda", "load tests.gpu.stub before torch"
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(data, device=...) then is a copy
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]
    torch.__future__.set_swap_module_params_on_conversion(True)
    _patch_cuda(int(os.environ.get("RLHF_PRETEND_GPUS", "1")))
    _patch_distributed()
    _mode = PretendMode()
    _mode.__enter__()


@contextlib.contextmanager
def plain_cpu() -> Iterator[None]:
    """Inside the block operators on the CPU run as without `install`, and as fast."""
    assert _mode is not None
    _mode.__exit__(None, None, None)
    try:
        yield
    finally:
        _mode.__enter__()


def _patch_cuda(devices: int) -> None:
    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": devices, "current_device": 0,
        "is_bf16_supported": True, "get_device_capability": (9, 0),
        "get_device_name": "pretended H100", "is_current_stream_capturing": False,
        "mem_get_info": (70 << 30, 80 << 30), "max_memory_reserved": 1 << 30,
        "max_memory_allocated": 1 << 30, "memory_allocated": 1 << 29, "memory_reserved": 1 << 29,
    }  # fmt: skip
    does_nothing = (
        "_lazy_init", "set_device", "synchronize", "empty_cache", "reset_peak_memory_stats",
        "set_rng_state", "manual_seed", "manual_seed_all",
    )  # fmt: skip
    for name, answer in answers.items() | {(name, None) for name in does_nothing}:
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    for name in ("Stream", "Event", "stream"):
        setattr(torch.cuda, name, Idle)
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *_: Idle()  # type: ignore
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False


def _patch_distributed() -> None:
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    whole = dist.init_process_group

    def init_process_group(backend: str | None = None, **options: Any) -> None:
        global _as_nccl
        if backend == "nccl":
            backend, _as_nccl = "cpu:gloo,cuda:gloo", True
            # as for a group of NCCL alone: objects are sent as bytes on the GPU
            distributed_c10d._get_object_coll_device = lambda group=None: "cuda:0"
            distributed_c10d._get_pg_default_device = lambda group=None: GPU
        options.pop("device_id", None)
        whole(backend, **options)

    dist.init_process_group = init_process_group
