"""The processes that share one calibration, what they tell each other, and how they fail together.

All of them make the same calls in the same order. Every call begins with a meeting, at which each says whether it is
well: so an error in one process, wherever it is raised, ends the others at their next call, and none waits for an
answer that never comes. Where a process dies without a word, its connections close, and the others' calls fail.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from morphoquant_vllm.errors import MorphoQuantError

# How long a process waits for the others in one call: while the first writes the checkpoint, all others do.
TIMEOUT = timedelta(minutes=30)
_FAILED = "failed"

T = TypeVar("T")


class Processes:
    """One process alone: what is its own is everybody's."""

    rank = 0
    size = 1
    # Among the processes on this machine.
    local_rank = 0
    local_size = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is common to all."""
        return self.rank == 0

    def reduce(self, value: Tensor, operation: str) -> Tensor:
        """The SUM, MIN or MAX (a name of torch.distributed.ReduceOp) of all processes' values, of equal shapes."""
        return value

    def merge(self, value: Tensor, owner: Tensor) -> Tensor:
        """Rows of all processes: `owner` int64 [n], on the CPU, is the process of each; value [own n, ...] this one's.

        The dtype and all sizes but the first are the same in all of them.
        """
        return value

    def gather(self, value: T, classes: Sequence[type] = ()) -> list[T]:
        """An object of each process, by rank; tensors in it lie on the CPU.

        It is made of tensors, Python's plain values and containers, and the `classes` named. Raises MorphoQuantError
        where another process has sent anything else.
        """
        return [value]

    def decide(self, make: Callable[[], T], classes: Sequence[type] = ()) -> T:
        """What `make` returns in the first process, which alone calls it.

        For what must be the same bits in all of them, and for what only one may do. It is made as `gather` has it.
        """
        return make()

    def share(self, count: int) -> slice:
        """This process's part of `count` things that are dealt out in runs; `owners` tells all processes' parts."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def owners(self, count: int) -> Tensor:
        """The process of each of `count` things as `share` deals them out, int64 on the CPU."""
        ends = torch.tensor([(rank + 1) * count // self.size for rank in range(self.size)])
        return torch.searchsorted(ends, torch.arange(count), right=True)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Leaves the block when all processes do; where one fails, each raises a MorphoQuantError with its reason."""
        yield

    @property
    def told(self) -> bool:
        """Whether a failure is known to all processes, so that one word of it is enough."""
        return False

    def part(self) -> None:
        """After a failure that was told: wait until every process has come so far."""


ONE = Processes()


class Group(Processes):
    """A process of torch.distributed's default group, whose backend takes tensors on the CPU."""

    def __init__(self, local_rank: int, local_size: int) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank, self.local_size = local_rank, local_size
        # Between two meetings: a process that fails there cannot be heard.
        self._busy = False
        self._told = False

    @property
    def told(self) -> bool:
        return self._told

    def reduce(self, value: Tensor, operation: str) -> Tensor:
        value = value.clone(memory_format=torch.contiguous_format)
        with self._meeting(f"{operation} {value.dtype} {list(value.shape)}"):
            dist.all_reduce(value, getattr(dist.ReduceOp, operation))
        return value

    def merge(self, value: Tensor, owner: Tensor) -> Tensor:
        merged = value.new_empty(owner.numel(), *value.shape[1:])
        with self._meeting(f"merge {value.dtype} {list(merged.shape)}"):
            for rank in range(self.size):
                theirs = (owner == rank).nonzero().flatten().to(value.device)
                if theirs.numel():
                    shape = (theirs.numel(), *value.shape[1:])
                    part = value.contiguous() if rank == self.rank else value.new_empty(shape)
                    # As bytes: backends do not know all dtypes.
                    dist.broadcast(part.view(-1).view(torch.uint8), rank)
                    merged[theirs] = part
        return merged

    def gather(self, value: T, classes: Sequence[type] = ()) -> list[T]:
        packed = _packed(value)
        with self._meeting("gather"):
            parts = [self._bytes(rank, packed) for rank in range(self.size)]
        return [self._unpacked(rank, part, classes) for rank, part in enumerate(parts)]

    def decide(self, make: Callable[[], T], classes: Sequence[type] = ()) -> T:
        if self.first:
            value = make()
            packed = _packed(value)
            with self._meeting("decide"):
                self._bytes(0, packed)
            return value
        with self._meeting("decide"):
            packed = self._bytes(0, b"")
        found: T = self._unpacked(0, packed, classes)
        return found

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        try:
            yield
            with self._meeting("end"):
                pass
        except Exception as error:
            if not self._told and not self._busy:
                with suppress(MorphoQuantError), self._meeting(_FAILED, str(error) or type(error).__name__):
                    pass
            raise

    def part(self) -> None:
        # No barrier: where there are GPUs, that would be NCCL's.
        with suppress(RuntimeError):
            dist.all_reduce(torch.zeros(1))

    @contextmanager
    def _meeting(self, call: str, failure: str = "") -> Iterator[None]:
        """A call of all processes; MorphoQuantError where one of them has failed, or is no longer there."""
        self._busy = True
        try:
            own = torch.tensor([bool(failure), zlib.crc32(call.encode())])
            all_say = [torch.empty_like(own) for _ in range(self.size)]
            dist.all_gather(all_say, own)
            failed = [rank for rank, said in enumerate(all_say) if said[0]]
            if failed:
                reason = self._bytes(failed[0], failure.encode()).decode()
                self._busy, self._told = False, True
                raise MorphoQuantError(f"process {failed[0]}: {reason}")
            if any(said[1] != own[1] for said in all_say):
                # No user can mend it: they do not make the same calls.
                raise AssertionError(f"process {self.rank} is at '{call}', another one is not")
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise MorphoQuantError(
                f"process {self.rank}: another process of this calibration has died or does not answer "
                f"({_reason(error)}); the same command goes on after the last finished block"
            ) from error
        self._busy = False

    def _bytes(self, source: int, data: bytes) -> bytes:
        """`data` of the process `source`."""
        size = torch.tensor(len(data))
        dist.broadcast(size, source)
        content = torch.empty(int(size), dtype=torch.uint8)
        if source == self.rank:
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else content
        if int(size):
            dist.broadcast(content, source)
        return content.numpy().tobytes()

    def _unpacked(self, source: int, data: bytes, classes: Sequence[type]) -> Any:
        """What `_packed` packed in the process `source`: tensors of its GPU come onto this one's.

        Nothing is called but what makes tensors, plain values and the `classes`: bytes off the network run no code.
        """
        try:
            # bytes: torch takes them for plain unless they are empty.
            with torch.serialization.safe_globals([bytes, *classes]):
                return torch.load(io.BytesIO(data), map_location=self._local, weights_only=True)
        except pickle.UnpicklingError as error:
            raise MorphoQuantError(
                f"process {source} has sent what is no part of a calibration; use a network that nobody else reaches"
            ) from error

    def _local(self, storage: Any, place: str) -> Any:
        return storage if place == "cpu" else storage.cuda(self.local_rank)


def _reason(error: Exception) -> str:
    """The first sentence of what a backend says, without the place in its source."""
    first, *_ = re.sub(r"^\[[^\]]*\] *", "", str(error)).split(". ")
    return " ".join(first.split())


def _packed(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@contextmanager
def open_processes(timeout: timedelta = TIMEOUT) -> Iterator[Processes]:
    """The processes that `torchrun` started, or this one alone; they leave the block together.

    gloo joins them for what is on the CPU, NCCL for what is on GPUs.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield ONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise MorphoQuantError(f"the processes that torchrun started cannot be joined ({_reason(error)})") from error
    processes = Group(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    try:
        with processes.failing_together():
            yield processes
    finally:
        dist.destroy_process_group()
