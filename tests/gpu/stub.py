"""Builds the C++ stub of a CUDA device once per torch version, and loads it.

path = build()   # with g++; a second or two, and 15 with a cold disk
load(path)       # in a process in which torch has not yet asked for its CUDA hooks
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("cuda_stub.cpp")
FLAGS = ("-O0", "-std=c++20", "-shared", "-fPIC")


class NoCompiler(RuntimeError):
    """This machine has no g++."""


def torch_folder() -> Path:
    """Where torch is installed; found without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def cache() -> Path:
    """Folder of the built files, outside the repository."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rlhf-tests"


def build() -> Path:
    """The compiled stub for this torch; built if there is none yet, by one process at a time.

    Raises:
        NoCompiler: there is no g++.
        RuntimeError: g++ failed; has what it said.
    """
    version = importlib.metadata.version("torch")
    mark = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:12]
    folder = cache()
    built = folder / f"cuda-stub-{version}-{mark}.so"
    if built.exists():
        return built
    compiler = shutil.which("g++")
    if compiler is None:
        raise NoCompiler("g++ was not found: the pretended GPU needs it once, for a C++ stub")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            torch, partial = torch_folder(), built.with_suffix(".part")
            command = [
                compiler, *FLAGS, f"-I{torch}/include",
                f"-I{torch}/include/torch/csrc/api/include", str(SOURCE), "-o", str(partial),
                f"-L{torch}/lib", "-lc10", "-ltorch_cpu",
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"g++ failed on {SOURCE.name}:\n{done.stderr[-4000:]}")
            partial.replace(built)
    return built


def load(path: Path) -> None:
    """Load the stub. torch then finds hooks and a device guard for CUDA, in this process.

    torch makes its hooks at the first question for them and keeps them, so this comes first.
    """
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
