"""Batches in a given order, made by worker processes ahead of time.

Imports source, worker_processes, errors and rank_errors.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, final

import torch
from torch.utils.data import DataLoader, Dataset

from hvd_lars.data.source import Batch, Request, Source
from hvd_lars.data.worker_processes import leave_with_owner
from hvd_lars.errors import UserError
from hvd_lars.rank_errors import speak_as, voice


@final
class _Answers(Dataset[tuple[Batch, list[str]] | UserError]):
    """A source as a map from requests to batches, which is what a DataLoader's workers run.

    A DataLoader would wrap a worker's exception in two tracebacks: it is passed on as a value.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, request: Any) -> tuple[Batch, list[str]] | UserError:
        try:
            batch = answer(self._source, request)
        except UserError as error:
            return error
        replaced = list(self._source.replaced)
        self._source.replaced.clear()
        return batch, replaced


def _begin(rank: int | None, worker: int) -> None:
    """In a new worker, whose number DataLoader gives."""
    leave_with_owner()
    if rank is not None:
        speak_as(rank, hold=False)


def answer(source: Source, request: Request) -> Batch:
    """The batch of one request."""
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
        UserError: from a worker too, an image cannot be read, nor those that could replace it.
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
        prefetch_factor=2,
        worker_init_fn=partial(_begin, None if own is None else own.rank),
        multiprocessing_context=context,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its seed for workers would come from dropout's generator
    )
    for request, made in zip(asked, loader, strict=True):
        if isinstance(made, UserError):
            raise made
        batch, replaced = made
        source.replaced += replaced
        yield request, batch
