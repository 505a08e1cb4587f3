"""Lets ColossalAI's ZeRO run on CPU ranks. Used only where no GPU is present.

ColossalAI 0.5 has a CPU accelerator, but its ZeRO optimizer asserts an accelerator named "cuda" or
"npu" and asks it for streams, which `CpuAccelerator` refuses. This subclass answers: streams do
nothing, because gloo's collectives are synchronous. So tests of sharded training on CPU run the
code that a GPU runs.
"""

from __future__ import annotations

import contextlib
from typing import Any

from colossalai.accelerator.api import set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator


class _NullStream:
    """Stands in for a device stream."""

    def wait_stream(self, other: Any) -> None:
        """Nothing runs concurrently, so there is nothing to wait for."""

    def synchronize(self) -> None:
        """See `wait_stream`."""


class StreamlessCpuAccelerator(CpuAccelerator):
    """`CpuAccelerator` whose stream and device calls are no-ops instead of errors."""

    def __init__(self) -> None:
        super().__init__()
        self._name = "npu"  # passes ZeRO's assertion without taking any CUDA-only branch

    @property
    def name(self) -> str:
        return self._name

    def synchronize(self, device: Any = None) -> None:
        return None

    def set_device(self, device: Any = None) -> None:
        return None

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def Stream(self, device: Any = None, priority: int = 0, **kwargs: Any) -> _NullStream:
        return _NullStream()

    def current_stream(self, device: Any = None) -> _NullStream:
        return _NullStream()

    def default_stream(self, device: Any = None) -> _NullStream:
        return _NullStream()

    def stream(self, stream_: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def install() -> None:
    """Make it ColossalAI's accelerator; call before `launch_from_torch`."""
    set_accelerator(StreamlessCpuAccelerator())
