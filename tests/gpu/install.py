"""Makes torch believe in the pretended GPU, in this process.

stub.load(stub.build())   # before torch is imported
install()
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from tests.gpu import pretend_cuda
from tests.gpu.pretend_cuda import PretendMode

_mode: PretendMode | None = None


class Idle:
    """A stream or an event that does nothing: there is one queue, and it is empty."""

    device, stream_id, cuda_stream = torch.device("cuda", 0), 0, 0

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

    RLHF_PRETEND_GPUS has the number of devices.
    """
    global _mode
    assert torch._C._get_accelerator().type == "cuda", "load tests.gpu.stub before torch"
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(data, device=...) then is a copy
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]
    torch.__future__.set_swap_module_params_on_conversion(True)
    _patch_cuda(int(os.environ.get("RLHF_PRETEND_GPUS", "1")))
    _patch_distributed()
    torch.Tensor.data = property(_plain_data.__get__, _set_data)  # type: ignore
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


_plain_data: Any = torch.Tensor.data


def _set_data(tensor: torch.Tensor, new: torch.Tensor) -> None:
    """`tensor.data = new` of a CPU tensor, which may become one of the GPU."""
    if not isinstance(new, pretend_cuda.GpuTensor):
        _plain_data.__set__(tensor, new)
        return
    other = new.detach()
    if isinstance(tensor, torch.nn.Parameter):
        other = torch.nn.Parameter(other, tensor.requires_grad)
    torch.utils.swap_tensors(tensor, other)


def _current() -> torch.device:
    return torch.device("cuda", pretend_cuda.current)


def _set_device(device: Any) -> None:
    if not isinstance(device, int):
        device = torch.device(device).index
    if device is not None:
        pretend_cuda.current = device


def _patch_cuda(devices: int) -> None:
    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": devices,
        "is_bf16_supported": True, "get_device_capability": (9, 0),
        "get_device_name": "pretended H100", "is_current_stream_capturing": False,
        "mem_get_info": (70 << 30, 80 << 30), "max_memory_reserved": 1 << 30,
        "max_memory_allocated": 1 << 30, "memory_allocated": 1 << 29, "memory_reserved": 1 << 29,
    }  # fmt: skip
    does_nothing = (
        "_lazy_init", "synchronize", "empty_cache", "reset_peak_memory_stats",
        "set_rng_state", "manual_seed", "manual_seed_all",
    )  # fmt: skip
    for name, answer in answers.items() | {(name, None) for name in does_nothing}:
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.current_device = lambda: pretend_cuda.current
    torch.cuda.set_device = _set_device
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
        if backend == "nccl":
            backend = "cpu:gloo,cuda:gloo"
            pretend_cuda.only_gpu_collectives = True
            # as for a group of NCCL alone: objects are sent as bytes on the GPU
            distributed_c10d._get_object_coll_device = lambda group=None: _current()
            distributed_c10d._get_pg_default_device = lambda group=None: _current()
        options.pop("device_id", None)
        whole(backend, **options)

    dist.init_process_group = init_process_group
