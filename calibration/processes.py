"""The processes that share one calibration: their collectives, and how they fail together.

All ranks make the same collectives in the same order. Every collective starts with a status exchange. If any rank has
failed, all ranks raise at their next collective instead of hanging. If a process dies, its connections close, and the
collectives of the others fail.
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

# Longest wait in one collective: all other ranks wait while rank 0 writes the checkpoint.
TIMEOUT = timedelta(minutes=30)
_FAILED = "failed"

T = TypeVar("T")


class Processes:
    """Single-process case: every collective is the identity."""

    rank = 0
    size = 1
    # Rank and number of the processes on this machine.
    local_rank = 0
    local_size = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes the common files."""
        return self.rank == 0

    def all_reduce(self, value: Tensor, operation: str) -> Tensor:
        """The SUM, MIN or MAX (a name of torch.distributed.ReduceOp) of all ranks' `value`, of equal shapes."""
        return value

    def all_gather_rows(self, value: Tensor, owner: Tensor) -> Tensor:
        """All ranks' rows [n, ...], from this rank's rows `value` [local n, ...].

        `owner` int64 [n], on the CPU, is the rank of each row. The dtype and all sizes but the first are the same on
        all ranks.
        """
        return value

    def all_gather(self, value: T, classes: Sequence[type] = ()) -> list[T]:
        """The `value` of every rank, by rank; its tensors are on the CPU.

        A value consists of tensors, Python's plain values and containers, and the `classes`. Raises MorphoQuantError
        if another rank has sent anything else.
        """
        return [value]

    def broadcast(self, make: Callable[[], T], classes: Sequence[type] = ()) -> T:
        """The result of `make` on rank 0, which alone calls it, for all ranks.

        For values that must have the same bits on all ranks, and for actions that only one may take. The result may
        consist of the types that `all_gather` takes.
        """
        return make()

    def share(self, count: int) -> slice:
        """This rank's contiguous slice of `count` items; `owners` gives the slices of all ranks."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def owners(self, count: int) -> Tensor:
        """The rank of each of `count` items divided by `share`, int64 on the CPU."""
        ends = torch.tensor([(rank + 1) * count // self.size for rank in range(self.size)])
        return torch.searchsorted(ends, torch.arange(count), right=True)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Leave the block when all ranks do; if one fails, every rank raises a MorphoQuantError with its reason."""
        yield

    @property
    def failure_announced(self) -> bool:
        """True once every rank knows about the failure, so only rank 0 prints it."""
        return False

    def wait_for_peers(self) -> None:
        """Barrier after an announced failure."""


ONE = Processes()


class Group(Processes):
    """A rank of torch.distributed's default group, whose backend takes tensors on the CPU."""

    def __init__(self, local_rank: int, local_size: int) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank, self.local_size = local_rank, local_size
        # True inside a collective, after its status exchange: a rank that fails there cannot announce it.
        self._busy = False
        self._failure_announced = False

    @property
    def failure_announced(self) -> bool:
        return self._failure_announced

    def all_reduce(self, value: Tensor, operation: str) -> Tensor:
        value = value.clone(memory_format=torch.contiguous_format)
        with self._collective(f"{operation} {value.dtype} {list(value.shape)}"):
            dist.all_reduce(value, getattr(dist.ReduceOp, operation))
        return value

    def all_gather_rows(self, value: Tensor, owner: Tensor) -> Tensor:
        gathered = value.new_empty(owner.numel(), *value.shape[1:])
        with self._collective(f"all_gather_rows {value.dtype} {list(gathered.shape)}"):
            for rank in range(self.size):
                places = (owner == rank).nonzero().flatten().to(value.device)
                if places.numel():
                    shape = (places.numel(), *value.shape[1:])
                    rows = value.contiguous() if rank == self.rank else value.new_empty(shape)
                    # As bytes: backends do not support all dtypes.
                    dist.broadcast(rows.view(-1).view(torch.uint8), rank)
                    gathered[places] = rows
        return gathered

    def all_gather(self, value: T, classes: Sequence[type] = ()) -> list[T]:
        packed = _packed(value)
        with self._collective("all_gather"):
            received = [self._broadcast_bytes(rank, packed) for rank in range(self.size)]
        return [self._unpacked(rank, data, classes) for rank, data in enumerate(received)]

    def broadcast(self, make: Callable[[], T], classes: Sequence[type] = ()) -> T:
        if self.first:
            value = make()
            packed = _packed(value)
            with self._collective("broadcast"):
                self._broadcast_bytes(0, packed)
            return value
        with self._collective("broadcast"):
            packed = self._broadcast_bytes(0, b"")
        received: T = self._unpacked(0, packed, classes)
        return received

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        try:
            yield
            with self._collective("end"):
                pass
        except Exception as error:
            if not self._failure_announced and not self._busy:
                with suppress(MorphoQuantError), self._collective(_FAILED, str(error) or type(error).__name__):
                    pass
            raise

    def wait_for_peers(self) -> None:
        # dist.barrier would use NCCL if GPUs are present.
        with suppress(RuntimeError):
            dist.all_reduce(torch.zeros(1))

    @contextmanager
    def _collective(self, call: str, failure: str = "") -> Iterator[None]:
        """Exchange the status of all ranks before a collective; MorphoQuantError if one has failed or died."""
        self._busy = True
        try:
            status = torch.tensor([bool(failure), zlib.crc32(call.encode())])
            statuses = [torch.empty_like(status) for _ in range(self.size)]
            dist.all_gather(statuses, status)
            failed = [rank for rank, (has_failed, _) in enumerate(statuses) if has_failed]
            if failed:
                reason = self._broadcast_bytes(failed[0], failure.encode()).decode()
                self._busy, self._failure_announced = False, True
                raise MorphoQuantError(f"process {failed[0]}: {reason}")
            if any(other[1] != status[1] for other in statuses):
                # A bug, not a user's mistake: the ranks do not make the same calls.
                raise AssertionError(f"rank {self.rank} calls '{call}', but another rank does not")
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise MorphoQuantError(
                f"process {self.rank}: another process of this calibration has died or does not answer "
                f"({_reason(error)}); the same command resumes after the last finished block"
            ) from error
        self._busy = False

    def _broadcast_bytes(self, source: int, data: bytes) -> bytes:
        """The `data` of rank `source`."""
        size = torch.tensor(len(data))
        dist.broadcast(size, source)
        content = torch.empty(int(size), dtype=torch.uint8)
        if source == self.rank:
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else content
        if int(size):
            dist.broadcast(content, source)
        return content.numpy().tobytes()

    def _unpacked(self, source: int, data: bytes, classes: Sequence[type]) -> Any:
        """The value that `_packed` packed on rank `source`; tensors on its GPU move to this rank's GPU.

        Only tensors, plain values and the `classes` are constructed: bytes from the network run no code.
        """
        try:
            # torch treats bytes as plain values, except empty ones.
            with torch.serialization.safe_globals([bytes, *classes]):
                return torch.load(io.BytesIO(data), map_location=self._local, weights_only=True)
        except pickle.UnpicklingError as error:
            raise MorphoQuantError(
                f"process {source} has sent data that do not belong to a calibration; use a network that nobody else "
                "can reach"
            ) from error

    def _local(self, storage: Any, place: str) -> Any:
        return storage if place == "cpu" else storage.cuda(self.local_rank)


def _reason(error: Exception) -> str:
    """The first sentence of a backend's message, without the source location."""
    first, *_ = re.sub(r"^\[[^\]]*\] *", "", str(error)).split(". ")
    return " ".join(first.split())


def _packed(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@contextmanager
def open_processes(timeout: timedelta = TIMEOUT) -> Iterator[Processes]:
    """The processes that `torchrun` started, or this one alone; they leave the block together.

    gloo connects them for tensors on the CPU, NCCL for tensors on GPUs.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield ONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise MorphoQuantError(
            f"the processes that torchrun started cannot connect ({_reason(error)}); let all of them reach MASTER_ADDR"
        ) from error
    processes = Group(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    try:
        with processes.failing_together():
            yield processes
    finally:
        dist.destroy_process_group()
