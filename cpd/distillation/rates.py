"""The learning rate over a training."""

from __future__ import annotations

from typing import Any

import torch

from cpd.distillation.config import DistillConfig


def lr_schedule(optimizer: torch.optim.Optimizer, config: DistillConfig) -> Any:
    """A scheduler of timm whose time is in epochs, parts of them too."""
    from timm.scheduler import create_scheduler_v2  # some seconds to import, hence not at the top

    warmup = config.warmup * config.epochs
    length: Any = config.epochs - warmup
    schedule, _ = create_scheduler_v2(
        optimizer, config.scheduler, num_epochs=length, decay_epochs=length / 3, min_lr=0.0, warmup_lr=0.0,
        decay_rate=1.0 if config.scheduler == "poly" else 0.1, warmup_epochs=warmup, warmup_prefix=True,
    )  # fmt: skip
    return schedule
