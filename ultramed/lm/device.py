"""Where a run happens and in which dtype, memory that is given back, and libraries that keep quiet meanwhile."""

import contextlib
import ctypes
import functools
import gc
import os
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Placement:
    """Device and dtypes of a run, and why."""

    device: str
    dtype: torch.dtype  # of the weights at inference, and of autocast while training
    reason: str

    def __str__(self):
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')} ({self.reason})"


@functools.cache
def placement(dtype: str = "auto") -> Placement:
    """Decide where to run: bf16 where the hardware multiplies it, else fp32 (fp16 on older GPUs)."""
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        device, best, why = "cuda", torch.bfloat16 if bf16 else torch.float16, torch.cuda.get_device_name(0)
    elif torch.backends.mps.is_available():
        device, best, why = "mps", torch.float32, "Apple GPU"
    else:
        bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        why = "CPU multiplies bf16 in hardware" if bf16 else "CPU without bf16 instructions"
        device, best = "cpu", torch.bfloat16 if bf16 else torch.float32
        keep_freed_memory()
    if dtype != "auto":
        best, why = getattr(torch, dtype), f"asked for; {why}"
    return Placement(device, best, why)


def device_memory() -> list[int]:
    """Bytes of each GPU at hand, in use or not: asking a device for what is free would take a part of it."""
    return [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def at_most_on_cpu(tokens: int, most: int) -> int:
    """Tokens of a batch, for a CPU no more than `most`: GPU profiles ask for what its memory does not hold."""
    return min(tokens, most) if placement().device == "cpu" else tokens


def has_gpu() -> bool:
    """Whether models run on a GPU here; asking opens none."""
    return torch.cuda.is_available() or torch.backends.mps.is_available()


@functools.cache
def matrix_gflops(side: int = 2048) -> float:
    """GFLOP/s of this machine's matrix products in the dtype that it runs models in: the best of a dozen,
    which other work on the machine disturbs least."""
    place = placement()
    a = torch.randn(side, side).to(place.device, place.dtype)
    times = []
    for _ in range(12):
        clock = time.perf_counter()
        a @ a
        if place.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - clock)
    return 2 * side**3 / min(times) / 1e9


def memory_gbytes(megabytes: int = 256) -> float:
    """GB/s at which this machine's memory is read and written, by copying: the best of five."""
    a, times = torch.ones(megabytes << 18, dtype=torch.float32), []
    b = torch.empty_like(a)
    for _ in range(6):
        clock = time.perf_counter()
        b.copy_(a)
        times.append(time.perf_counter() - clock)
    return 2 * a.nbytes / min(times[1:]) / 1e9


def disk_mbytes(folder: Path, megabytes: int = 128) -> float:
    """MB/s at which a file that is written to `folder` reaches the disk."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as fh:
        clock = time.perf_counter()
        for _ in range(megabytes):
            fh.write(block)
        fh.flush()
        os.fsync(fh.fileno())
        return megabytes / (time.perf_counter() - clock)


@functools.cache
def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks instead of handing each back to the kernel.

    Training on a CPU frees and asks for the same hundreds of megabytes at every step; with the default settings the
    kernel zeroes those pages every time, which costs a quarter of the speed (docs/PERFORMANCE.md).
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # not glibc: nothing to tune


def free_memory() -> None:
    """Return what deleted models held, before the next one is loaded."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else a long run keeps its largest moment (see keep_freed_memory)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def quietly():
    """Loading bars and advice of libraries out of the way; errors stay."""
    from transformers.utils import logging as hf

    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity_error()
    hf.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()
