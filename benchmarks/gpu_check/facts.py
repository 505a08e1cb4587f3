"""The device, and what it reaches on plain matrix products and copies."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from benchmarks.gpu_check.check import Check

PACKAGES = ("torch", "transformers", "peft", "triton", "numpy", "pyarrow", "pydantic", "tokenizers")
DRIVER = ("nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv")


def device(check: Check, found: dict[str, Any]) -> list[str]:
    """Chip, driver, memory and versions."""
    found["python"] = platform.python_version()
    found["versions"] = {name: _version(name) for name in PACKAGES}
    found["cpu"] = {"machine": platform.machine(), "cores": os.cpu_count()}
    if not check.on_gpu:
        return []
    chip = torch.cuda.get_device_properties(0)
    found["chip"] = chip.name
    found["capability"] = f"{chip.major}.{chip.minor}"
    found["multiprocessors"] = chip.multi_processor_count
    found["memory_gib"] = round(chip.total_memory / 2**30, 1)
    found["cuda"] = torch.version.cuda
    found["cudnn"] = torch.backends.cudnn.version()
    found["attention"] = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "memory_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
    }
    try:
        found["nvidia_smi"] = subprocess.run(
            DRIVER, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        found["nvidia_smi"] = f"not available: {error}"
    return []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def peak(check: Check, found: dict[str, Any]) -> list[str]:
    """Products of bf16 matrices of random numbers, TFLOP/s, and copies, GB/s read and written."""
    dtype = torch.bfloat16 if check.on_gpu else torch.float32
    found["dtype"] = str(dtype).removeprefix("torch.")
    found["tflops"] = {}
    for n in check.sizes.products:
        a, b = (torch.randn(n, n, device=check.device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = median_time(check, lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
        found["tflops"][str(n)] = round(2 * n**3 / seconds / 1e12, 4)
        check.saves()
    found["peak_tflops"] = max(found["tflops"].values())
    source = torch.empty(check.sizes.copied, dtype=torch.uint8, device=check.device)
    target = torch.empty_like(source)
    seconds = median_time(check, lambda: target.copy_(source))
    found["copy_gb_per_second"] = round(2 * source.numel() / seconds / 1e9, 1)
    return []


def median_time(check: Check, call: Callable[[], Any], repeats: int = 20) -> float:
    """Seconds of a call, median; the first three do not count."""
    times = []
    for i in range(repeats + 3):
        synchronize(check)
        began = time.perf_counter()
        call()
        synchronize(check)
        if i >= 3:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def synchronize(check: Check) -> None:
    """Wait for the device, so that a clock's reading counts."""
    if check.on_gpu:
        torch.cuda.synchronize()
