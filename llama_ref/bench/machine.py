"""Describe a benchmark's machine, and measure a process's peak memory on it."""

import contextlib
import platform
import resource
import sys
from importlib import metadata
from pathlib import Path

import torch

from llama_ref.bench.results import Machine
from llama_ref.machine.cores import cpu_count

PACKAGES = {"transformers": ("transformers",), "llama.cpp": ("llama_cpp_python",), "meta": ("llama_models", "fairscale")}


def describe_machine(device: torch.device, peers: list[str]) -> Machine:
    """The processor, the cores available to this process, the device, and versions of packages."""
    names = ["torch", "llama-ref", *(package for peer in peers for package in PACKAGES[peer])]
    versions = {"Python": platform.python_version()} | {name: _version(name) for name in names}
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Machine(f"{platform.system()} {platform.machine()}", _cpu(), cpu_count(), card, versions)


def forget_peak(device: torch.device) -> None:
    """Reset the measurement of peak memory, if the system supports that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak to the current size


def peak_bytes(device: torch.device) -> int:
    """Peak GPU or resident memory since `forget_peak`, including pages of mapped files."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or "unknown processor"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
