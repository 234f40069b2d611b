"""What a call of the library must leave as it was: the process around it, models, and files."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

#: Where the threads come from that draw bars: they end a moment after these do, or never.
BARS = ("tqdm._monitor", "rich.live", "rich.progress")
SIGNALS = sorted(signal.valid_signals())


def _precision() -> str:
    """Torch 2.9 warns that this setting will have another name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.get_float32_matmul_precision()


def world() -> dict[str, Any]:
    """Everything of the process that code can change for all other code, in values that can be compared."""
    loggers = {name: item for name, item in logging.root.manager.loggerDict.items() if isinstance(item, logging.Logger)}
    loggers.pop("torch.__trace", None)  # has its handlers once torch.compile is loaded
    return {
        "random of python": random.getstate(),
        "random of numpy": (np.random.get_state()[1].tobytes(), np.random.get_state()[2:]),
        "random of torch": torch.get_rng_state().numpy().tobytes(),
        "threads of torch": torch.get_num_threads(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "defaults of torch": (torch.get_default_dtype(), str(torch.get_default_device())),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "precision of products": _precision(),
        "fast path of attention": torch.backends.mha.get_fastpath_enabled(),
        "attention kernels": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "hooks of all modules": (len(modules._global_forward_hooks), len(modules._global_forward_pre_hooks)),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "levels of loggers": {name: (item.level, item.disabled, len(item.handlers)) for name, item in loggers.items()},
        "root logger": (logging.root.level, len(logging.root.handlers), logging.root.manager.disable),
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "path of python": list(sys.path),
        "streams": (sys.stdout, sys.stderr, sys.excepthook, sys.settrace, sys.getrecursionlimit()),
        "signals": {number: signal.getsignal(number) for number in SIGNALS},
        "garbage collection": (gc.isenabled(), gc.get_threshold()),
        "running threads": {item.name for item in threading.enumerate() if type(item).__module__ not in BARS},
        "numpy's errors": np.geterr(),
    }  # fmt: skip


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is another than before, by name; loggers that are new are none."""
    found = []
    for name, value in before.items():
        now = after[name]
        if isinstance(value, dict):
            if name == "levels of loggers":
                now = {key: item for key, item in now.items() if key in value}
            changed = sorted(str(key) for key in {*value, *now} if value.get(key) != now.get(key))
            found += [f"{name}: {changed}"] * bool(changed)
        elif value != now:
            found.append(f"{name}: {value!r:.80} is {now!r:.80}")
    return found


def whole(model: nn.Module) -> dict[str, Any]:
    """Everything of a model: tensors with their values, flags and identities, attributes, modes and hooks."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                found[f"{path}.{name}"] = repr(value)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if tensor.grad is None else tensor.grad.clone()
        found[name] = (id(tensor), tensor.requires_grad, tuple(tensor.shape), tensor.detach().clone(), grad)
    return found


def same(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what is another than before in a model."""
    return [name for name in {**before, **after} if not _equal(before.get(name), after.get(name))]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one.nan_to_num(1e30), other.nan_to_num(1e30))
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below a folder, hidden ones too, with its size and when it was written."""
    found = {}
    for place, folders, names in os.walk(folder):
        found.update({os.path.join(place, name): (0, 0) for name in folders})
        for name in names:
            path = os.path.join(place, name)
            found[path] = os.stat(path).st_size, os.stat(path).st_mtime_ns
    return found
