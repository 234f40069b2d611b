"""Several processes that train one model together (`accelerate launch`): sums, and agreement, over all of them.

Every function does the plain thing where there is only one process.

Tensors are exchanged, and by `from_first` what the first process has made of its own: torch pickles that, and the
others read it. So it is made in memory, of numbers, texts, tensors and records of `cpd`; nothing that was read from a
file as bytes is ever unpickled, here or elsewhere. What a file says each process reads by itself, as safetensors and
JSON.
"""

from __future__ import annotations

import atexit
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from torch import Tensor

from cpd.errors import CPDError, TrainingError

T = TypeVar("T")


def start() -> None:
    """Join the other processes, where a launcher (`accelerate launch`, `torchrun`) has started several."""
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() and os.environ["WORLD_SIZE"] != "1"
    if launched and not dist.is_initialized():
        PartialState(cpu=not torch.accelerator.is_available())
        atexit.register(_leave)


def _leave() -> None:
    """Join gloo's threads while Python lives: one that lets go of a tensor later aborts the process (exit code 134)."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 is the one that measures and writes."""
    return dist.get_rank() if count() > 1 else 0


def total(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors."""
    if count() == 1:
        return tensor
    there = tensor.to(_device(), copy=True)
    dist.all_reduce(there)
    return there.to(tensor.device)


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them; what it raises is raised in all of them."""
    if count() == 1:
        return make()
    made: list[Any] = [None, None]
    failure: Exception | None = None
    if rank() == 0:
        try:
            made = [make(), None]
        except Exception as error:  # whatever it is, the others wait
            failure = error
            known = isinstance(error, CPDError)
            made = [None, error if known else TrainingError(f"Rank 0 failed: {type(error).__name__}: {error}.")]
    dist.broadcast_object_list(made)
    if failure is not None or made[1] is not None:
        raise failure or made[1]
    return made[0]  # type: ignore[no-any-return]


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values, in place."""
    for tensor in tensors:
        if count() > 1:
            there = tensor.to(_device())
            dist.broadcast(there, 0)
            tensor.copy_(there)


def check_same(value: str, what: str) -> None:
    """Raise unless all processes hold the same text.

    Raises:
        TrainingError: naming those that differ from the first.
    """
    if count() == 1:
        return
    own = torch.frombuffer(bytearray(hashlib.sha256(value.encode()).digest()), dtype=torch.uint8).to(_device())
    found = [torch.empty_like(own) for _ in range(count())]
    dist.all_gather(found, own)
    others = [index for index, item in enumerate(found) if not torch.equal(item, found[0])]
    if others:
        raise TrainingError(
            f"The processes of rank {others} differ from rank 0 in the {what}. Give all of them the same model, "
            "weights, teacher, loss, seed and example inputs, and data whose order depends on nothing else."
        )


def share(data: Iterable[T]) -> Iterator[T]:
    """This process's part of the items: every n-th from its own on; a last round that not all can take is left out."""
    rounds = zip(*[iter(data)] * count(), strict=False)
    return (items[rank()] for items in rounds)


class Share:
    """`share(data)` as an iterable that starts afresh, of a number of rounds at most."""

    def __init__(self, data: Iterable[Any], limit: int | None = None) -> None:
        self.data, self.limit = data, limit

    def __iter__(self) -> Iterator[Any]:
        return islice(share(self.data), self.limit)


def _device() -> torch.device:
    """Where the backend in use wants its tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
