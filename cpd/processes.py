"""Several processes that train one model together (`accelerate launch`): sums, and agreement, over all of them.

Every function does the plain thing where there is only one process.

Tensors are exchanged, and by `Council` what the first process has made of its own: torch pickles that, and the others
read it. So it is made in memory, of numbers, texts, tensors and records of `cpd`; nothing that was read from a file as
bytes is ever unpickled, here or elsewhere. What a file says each process reads by itself, as safetensors and JSON.

Data is shared out in two ways. For what is summed batch by batch (`Share`) a process takes whole batches, as in a
training. For what is summed over samples (`Dealt`) the samples of all batches are dealt out a few at a time, so that n
processes hold, in the same order, what one process would. Of a DataLoader over a data set with an index each process
loads its own part alone; anything else it iterates as a whole, and keeps its part.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from cpd.errors import CPDError, InputError, TrainingError

T = TypeVar("T")
log = logging.getLogger("cpd")

#: How long a process waits for another: as long as the first one may measure, which is longer than libraries wait.
PATIENCE = timedelta(days=1)
SAME = (
    "Give all of them the same model, weights, teacher, loss, seed and example inputs, and data whose order depends on "
    "nothing else."
)


def start() -> None:
    """Join the other processes, where a launcher (`accelerate launch`, `torchrun`) has started several."""
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() and os.environ["WORLD_SIZE"] != "1"
    if launched and not dist.is_initialized():
        threads = torch.get_num_threads()
        PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
        # it sets as many as there are cores where the launcher says nothing, whatever the user has set
        torch.set_num_threads(min(threads, torch.get_num_threads()))
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


def most(number: int) -> int:
    """The largest of the processes' numbers."""
    if count() == 1:
        return number
    found = torch.tensor([number], device=_device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


class Council:
    """What the first process decides, while all of them do what it asks for.

    Args:
        jobs: what it may ask for, by name; all processes do it, with the arguments that the first one gives.
    """

    def __init__(self, **jobs: Callable[..., Any]) -> None:
        self.jobs, self.led = jobs, False

    def do(self, name: str, *given: Any) -> Any:
        """Do a job in all processes: called by all of them, or by the first one while it decides."""
        if self.led:
            _broadcast([name, given])
        return self.jobs[name](*given)

    def decide(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; what it raises is raised in all of them."""
        if count() == 1:
            return make()
        return self._lead(make) if rank() == 0 else self._follow()

    def _lead(self, make: Callable[[], T]) -> T:
        self.led = True
        try:
            found = make()
        except Exception as error:  # whatever it is, the others wait
            known = isinstance(error, CPDError)
            told = error if known else TrainingError(f"Rank 0 failed: {type(error).__name__}: {error}.")
            _broadcast([None, (None, told)])
            raise
        finally:
            self.led = False
        _broadcast([None, (found, None)])
        return found

    def _follow(self) -> Any:
        while True:
            name, given = _broadcast([None, None])
            if name is None:
                break
            try:
                self.jobs[name](*given)
            except Exception as error:  # the first one has met the same, or was told of it, and says how it ends
                if not getattr(error, "elsewhere", False):
                    log.warning("Rank %d: %s: %s", rank(), type(error).__name__, error)
        found, failure = given
        if failure is not None:
            raise failure
        return found


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them; what it raises is raised in all of them."""
    return Council().decide(make)


def _broadcast(items: list[Any]) -> list[Any]:
    """The first process's items."""
    dist.broadcast_object_list(items)
    return items


# ---------------------------------------------------------------------------------- in step


class InStep:
    """Sums over processes that do the same steps, each on a part of the data that the others do not see.

    Before each sum they make sure that none has failed and that all are at the same step: one that goes another way
    would wait for ever, or add what does not belong together.

    Args:
        alone: whether this process works by itself, whatever others there are.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self.count, self.rank = (1, 0) if alone else (count(), rank())

    def totals(self, step: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of the processes' tensors, in float64.

        Args:
            step: what is summed; the same in all of them.
            tensors: of the same shapes in all of them.

        Raises:
            InputError: if another process is at another step, or has raised that.
            TrainingError: if another process has failed otherwise.
        """
        tensors = [tensor.double() for tensor in tensors]
        if self.count == 1:
            return tensors
        _meet(f"{step} {[list(tensor.shape) for tensor in tensors]}")
        there = torch.cat([tensor.flatten().to(_device()) for tensor in tensors])
        dist.all_reduce(there)
        parts = there.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor).to(tensor.device) for part, tensor in zip(parts, tensors, strict=True)]

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.count == 1:
            return number
        _meet("most")
        return most(number)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that ends in all processes as it ends in one."""
        try:
            yield
        except Exception as error:
            if self.count > 1 and not getattr(error, "told_to_all", False):
                _say_failed(error)
            raise
        if self.count > 1:
            _meet("end")

    def own(self, samples: int, block: int) -> int:
        """How many of the first samples of all are this process's, as `dealt` deals them out."""
        rounds, left = divmod(samples, block * self.count)
        return rounds * block + min(max(left - self.rank * block, 0), block)


def _meet(step: str, failed: int = 0) -> None:
    """Make sure that all processes are here and well.

    Args:
        step: where this one is.
        failed: 1 if it has raised an `InputError`, 2 if anything else.
    """
    place = int.from_bytes(hashlib.sha256(step.encode()).digest()[:7], "big")
    found = torch.tensor([failed, place, -place], device=_device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    worst, highest, lowest = found.tolist()
    error: CPDError | None = None
    if worst:
        error = (InputError if worst == 1 else TrainingError)("It failed in another process, which says why.")
    elif highest != -lowest:
        error = InputError(
            "The processes do not do the same at the same time: the forward pass depends on the data in a way that "
            f"differs between them, seen at {step!r}."
        )
    if error is not None and not failed:
        error.told_to_all = error.elsewhere = True  # type: ignore[attr-defined]
        raise error


def _say_failed(error: Exception) -> None:
    _meet("failure", 1 if isinstance(error, InputError) else 2)
    error.told_to_all = True  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------- values


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values, in place."""
    for tensor in tensors:
        if count() > 1:
            there = tensor.to(_device())
            dist.broadcast(there, 0)
            tensor.copy_(there)


def check_same(value: str, what: str, remedy: str = SAME) -> None:
    """Raise unless all processes hold the same text.

    Args:
        value: the text.
        what: it is of, in words.
        remedy: a sentence for where they differ.

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
        raise TrainingError(f"The processes of rank {others} differ from rank 0 in the {what}. {remedy}")


def share(data: Iterable[T]) -> Iterator[T]:
    """This process's part of the items: every n-th from its own on; a last round that not all can take is left out."""
    if (found := _loader_of(data, _Rounds)) is not None:
        return iter(found)
    rounds = zip(*[iter(data)] * count(), strict=False)
    return (items[rank()] for items in rounds)


class Share:
    """`share(data)` as an iterable that starts afresh, of a number of rounds at most."""

    def __init__(self, data: Iterable[Any], limit: int | None = None) -> None:
        self.data, self.limit = data, limit

    def __iter__(self) -> Iterator[Any]:
        return islice(share(self.data), self.limit)


class Dealt:
    """The batches of data, of each of which this process keeps its own samples.

    The samples of all batches are dealt out to the processes in turn, `block` at a time.

    Attributes:
        cut: whether the batches hold this process's samples alone by now; else `own` says which they are.

    Args:
        data: batches.
        limit: at most so many are read, of each process; all if None.
        block: samples dealt out at a time.
    """

    def __init__(self, data: Iterable[Any], limit: int | None, block: int) -> None:
        limit = None if limit is None else limit * count()
        loader = _loader_of(data, lambda sampler: _Deal(sampler, block, limit))
        self.data, self.limit, self.block = data if loader is None else loader, limit, block
        self.cut, self.start = loader is not None, 0

    def __iter__(self) -> Iterator[Any]:
        self.start = 0
        return iter(self.data) if self.cut else islice(self.data, self.limit)

    def own(self, samples: int) -> Tensor:
        """Which samples of the next batch of so many are this process's, [samples]."""
        if self.cut:
            return torch.ones(samples, dtype=torch.bool)
        places = torch.arange(self.start, self.start + samples)
        self.start += samples
        return places // self.block % count() == rank()


class _Rounds:
    """Every n-th batch of indices from this process's own on, of whole rounds."""

    def __init__(self, sampler: Iterable[Any]) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        rounds = zip(*[iter(self.sampler)] * count(), strict=False)
        return (items[rank()] for items in rounds)


class _Deal:
    """Of each batch of indices those that are dealt out to this process; batches without any are left out."""

    def __init__(self, sampler: Iterable[Any], block: int, limit: int | None) -> None:
        self.sampler, self.block, self.limit = sampler, block, limit

    def __iter__(self) -> Iterator[Any]:
        start = 0
        for indices in islice(self.sampler, self.limit):
            found = [item for place, item in enumerate(indices, start) if place // self.block % count() == rank()]
            start += len(indices)
            if found:
                yield found


def _loader_of(data: Any, part: Callable[[Iterable[Any]], Any]) -> Iterable[Any] | None:
    """A loader of a part of the batches of indices that a loader goes through; None of anything else.

    What goes over a loader of its own, `data`, and can go over another one, by `over(another)`, goes over that.
    """
    if callable(over := getattr(data, "over", None)):
        inner = _loader_of(data.data, part)
        return None if inner is None else over(inner)
    if count() == 1 or type(data) is not DataLoader or data.batch_sampler is None:
        return None
    if isinstance(data.dataset, IterableDataset):
        return None
    return DataLoader(
        data.dataset, batch_sampler=part(data.batch_sampler), num_workers=data.num_workers, collate_fn=data.collate_fn,
        pin_memory=data.pin_memory, timeout=data.timeout, worker_init_fn=data.worker_init_fn, generator=data.generator,
        multiprocessing_context=data.multiprocessing_context, prefetch_factor=data.prefetch_factor,
    )  # fmt: skip


def _device() -> torch.device:
    """Where the backend in use wants its tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
