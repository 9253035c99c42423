"""What a benchmark ran on."""

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from llama_ref.bench.results import Machine

PACKAGES = {"transformers": ("transformers",), "llama.cpp": ("llama_cpp_python",), "meta": ("llama_models", "fairscale")}


def describe_machine(device: torch.device, peers: list[str]) -> Machine:
    """The processor, how many cores this process may use, the device, and the versions of what takes part."""
    names = ["torch", "llama-ref", *(package for peer in peers for package in PACKAGES[peer])]
    versions = {"Python": platform.python_version()} | {name: _version(name) for name in names}
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Machine(f"{platform.system()} {platform.machine()}", _cpu(), _cores(), card, versions)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or "unknown processor"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
