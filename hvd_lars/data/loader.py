"""Batches in a given order, made by worker processes ahead of time."""

from __future__ import annotations

import itertools
import multiprocessing
import re
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, final

import torch
from torch.utils.data import DataLoader, Dataset

from hvd_lars.data.source import Batch, Request, Source, Unreadable
from hvd_lars.data.worker_processes import leave_with_owner
from hvd_lars.errors import UserError
from hvd_lars.runtime.rank_stderr import speak_as, voice


class WorkerLostError(RuntimeError):
    """A process that loads images was killed: the run may go on from its last checkpoint."""


_AHEAD = 2  # batches that a worker makes before they are asked for
_Made = tuple[Batch, list[Unreadable]] | UserError


@final
class _Answers(Dataset[_Made]):
    """A source as a map from requests to batches, which is what a DataLoader's workers run.

    A DataLoader would wrap a worker's exception in two tracebacks: it is passed on as a value.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, request: Any) -> _Made:
        try:
            batch = answer(self._source, request)
        except UserError as error:
            return error
        unreadable = list(self._source.unreadable)
        self._source.unreadable.clear()
        return batch, unreadable


def _begin(rank: int | None, worker: int) -> None:
    """In a new worker, whose number DataLoader gives."""
    leave_with_owner()
    if rank is not None:
        speak_as(rank, hold=False)


def answer(source: Source, request: Request) -> Batch:
    """The batch of one request; of no samples, two empty tensors."""
    if not len(request.indices):
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    if request.epoch is None:
        return source.eval_batch(request.indices)
    return source.train_batch(request.epoch, request.indices)


def stream(
    source: Source, requests: Iterable[Request], workers: int = 0, device: str = "cpu"
) -> Iterator[tuple[Request, Batch]]:
    """The ``requests`` with their batches on a type of device, in order, whoever makes them.

    To a GPU they are copied from page-locked memory in a stream of their own, beside the work that
    is still in its queue.

    Args:
        source: the data set; sent to the workers once.
        requests: read lazily, two batches a worker ahead.
        workers: processes; 0 makes each batch when it is asked for.  They come from a fork
            server, as a fork of a process that runs MPI is not safe.
        device: where the batches are wanted, such as ``"cuda"`` for the current GPU.

    Raises:
        UserError: a training image and all that could replace it are unreadable, here or in a
            worker; or a worker has no room in shared memory.
        WorkerLostError: a worker was killed.
    """
    batches = _made(source, requests, workers, device == "cuda")
    yield from _copied_aside(batches) if device == "cuda" else batches


def _copied_aside(batches: Iterator[tuple[Request, Batch]]) -> Iterator[tuple[Request, Batch]]:
    copies = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for request, batch in batches:
        with torch.cuda.stream(copies):
            images, labels = (tensor.pin_memory().to("cuda", non_blocking=True) for tensor in batch)
        work = torch.cuda.current_stream()
        work.wait_stream(copies)
        for tensor in (images, labels):  # or their memory might be used again too early
            tensor.record_stream(work)
        yield request, (images, labels)


def _made(
    source: Source, requests: Iterable[Request], workers: int, pin_memory: bool
) -> Iterator[tuple[Request, Batch]]:
    if workers == 0:
        for request in requests:
            yield request, answer(source, request)
        return
    context = multiprocessing.get_context("forkserver")
    # What a worker would import anew whenever workers start, at every evaluation.
    context.set_forkserver_preload(["hvd_lars.data", "torchvision.transforms.v2"])
    asked, requests = itertools.tee(requests)
    own = voice()
    loader = DataLoader(
        _Answers(source),
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        prefetch_factor=_AHEAD,
        worker_init_fn=partial(_begin, None if own is None else own.rank),
        multiprocessing_context=context,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its seed for workers would come from dropout's generator
    )
    for request, made in zip(asked, _guarded(iter(loader), workers), strict=True):
        if isinstance(made, UserError):
            raise made
        batch, unreadable = made
        source.unreadable += unreadable
        yield request, batch


def _guarded(made: Iterator[_Made], workers: int) -> Iterator[_Made]:
    """The same; what a worker dies of is one line, where DataLoader shows 70."""
    while True:
        try:
            yield next(made)
        except StopIteration:
            return
        except RuntimeError as error:
            text = " ".join(str(error).split())
            if "shared memory" in text or "Bus error" in text:
                raise UserError(
                    f"data.workers: a process that loads images has no room in shared memory: "
                    f"{shared_memory()}; found {workers} workers a rank: use fewer, or a smaller "
                    f"train.micro_batch, or give the container more (docker run --shm-size=8g, or "
                    f"--ipc=host)"
                ) from None
            if "DataLoader worker" not in text:
                raise
            signal = re.search(r"killed by signal: (\w+)", text)
            raise WorkerLostError(
                f"a process that loads images (one of data.workers={workers}) "
                f"{f'got signal {signal.group(1)}' if signal else 'has ended'}: out of memory? "
                f"use fewer data.workers, or ask for more memory"
            ) from None


def shared_bytes(batch_bytes: int, workers: int) -> int:
    """Most bytes of shared memory that a rank's batches take on their way from the workers."""
    return batch_bytes * (_AHEAD * workers + 1) if workers else 0


def shared_memory() -> str:
    """How much of it is left, which is where batches travel."""
    try:
        room = shutil.disk_usage("/dev/shm")
    except OSError:
        return "/dev/shm is not there"
    return f"/dev/shm has {room.free / 1e6:,.0f} MB free of {room.total / 1e6:,.0f} MB"
