"""Seeds, and the states of the global random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed

from cpd.errors import of_the_user


def random_states() -> dict[str, Any]:
    """The states of the global generators of Python, NumPy and PyTorch."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` gave."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the global random states of Python, NumPy and PyTorch back at the end."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


@contextmanager
def seeded(data: Any, seed: int) -> Iterator[None]:
    """Random numbers that depend on `seed` alone for the length of a block, those of a loader too.

    The global generators are seeded (put them back with `random_states_kept`), and for that time those of the loader
    and its samplers; whatever has a `set_epoch` is told the seed in place of an epoch.
    """
    set_seed(seed)
    holders = [data]
    for name in ("data", "dataset", "sampler", "batch_sampler"):
        holders += [inner for holder in holders if (inner := getattr(holder, name, None)) is not None]
    found = [getattr(holder, "generator", None) for holder in holders]
    generators = {id(item): item for item in found if isinstance(item, torch.Generator)}.values()
    states = [(generator, generator.get_state()) for generator in generators]
    for generator, _ in states:
        generator.manual_seed(seed)
    for holder in holders:
        if callable(set_epoch := getattr(holder, "set_epoch", None)):
            with of_the_user("set_epoch of the data"):
                set_epoch(seed)
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
