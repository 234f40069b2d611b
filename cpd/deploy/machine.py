"""The machine that times are taken on: what a latency depends on beside the model."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import onnxruntime
import torch


def environment() -> dict[str, str]:
    """What a latency depends on beside the model: `cpu`, `cores`, `platform`, `onnxruntime` and `torch`."""
    return dict(_environment())


@lru_cache(maxsize=1)
def _environment() -> tuple[tuple[str, str], ...]:
    return (
        ("cpu", _cpu_model()),
        ("cores", str(cores())),
        ("platform", platform.platform()),
        ("onnxruntime", str(onnxruntime.__version__)),
        ("torch", str(torch.__version__)),
    )


#: Packages that a run depends on; the later ones are optional.
PACKAGES = (
    "cpd", "torch", "torchvision", "timm", "numpy", "networkx", "onnx", "onnxscript", "onnxruntime", "accelerate",
    "safetensors", "onnxruntime-gpu", "openvino", "ncnn", "mnn", "executorch", "opencv-python-headless",
    "transformers", "ultralytics", "lightning", "torchmetrics",
)  # fmt: skip


def installation() -> dict[str, str]:
    """What a run depends on beside what it is given: Python, packages that are installed, processor, GPUs."""
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    gpus = {f"gpu {index}": torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    machine = {"cpu": _cpu_model(), "cores": str(cores()), "platform": platform.platform(), **gpus}
    return {"python": platform.python_version(), **versions, **machine}


def _cpu_model() -> str:
    """The name of the processor, from /proc/cpuinfo where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or "unknown"


def cores() -> int:
    """The number of logical cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
