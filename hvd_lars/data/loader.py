"""Batches in a given order, made ahead of time by worker processes."""

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

from hvd_lars.data.encoded import Encoded
from hvd_lars.data.images import Images
from hvd_lars.data.source import Batch, Made, Request, Source, Unreadable
from hvd_lars.data.worker_processes import leave_with_owner
from hvd_lars.errors import UserError
from hvd_lars.runtime.rank_stderr import label_stderr, own_stderr


class WorkerLostError(RuntimeError):
    """A process that loads images was killed; the run may resume from its last checkpoint."""


_AHEAD = 2  # batches that each worker makes ahead
# What sources of images use beside this module.
_PRELOADED = [
    "hvd_lars.data.image_folder",
    "hvd_lars.data.located",
    "simplejpeg",
    "torchvision.transforms.v2",
]
_Answer = tuple[Made, list[Unreadable]] | UserError


@final
class _Answers(Dataset[_Answer]):
    """A source as a map from requests to batches, for a DataLoader's workers.

    UserError is returned as a value: DataLoader would wrap it in two tracebacks.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, request: Any) -> _Answer:
        try:
            batch = answer(self._source, request)
        except UserError as error:
            return error
        unreadable = list(self._source.unreadable)
        self._source.unreadable.clear()
        return batch, unreadable


def _begin(rank: int | None, worker: int) -> None:
    """Set up a new worker; DataLoader passes its number."""
    leave_with_owner()
    if rank is not None:
        label_stderr(rank, hold=False)


def answer(source: Source, request: Request) -> Made:
    """Return the batch of a request; two empty tensors if it has no samples."""
    if not len(request.indices):
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    if request.epoch is None:
        return source.eval_batch(request.indices)
    return source.train_batch(request.epoch, request.indices)


def stream(
    source: Source, requests: Iterable[Request], workers: int = 0, device: str = "cpu"
) -> Iterator[tuple[Request, Batch]]:
    """Yield the ``requests`` in order, with their batches on ``device``.

    Batches for a GPU are copied from page-locked memory, or decoded there, in a separate stream,
    overlapping the GPU's queued work.

    Args:
        source: the data set; sent to the workers once.
        requests: read lazily, two batches per worker ahead.
        workers: number of processes; 0 makes each batch when it is requested.  They come from a
            fork server, since forking a process that runs MPI is not safe.
        device: type of the batches' device, such as ``"cuda"`` for the current GPU.

    Raises:
        UserError: an image and all its replacements are unreadable, here or in a worker; or a
            worker has no room in shared memory.
        WorkerLostError: a worker was killed.
    """
    made = _made(source, requests, workers, device == "cuda")
    if device == "cuda":
        yield from _moved_aside(source, made)
        return
    for request, batch in made:
        yield request, _moved(source, request, batch, device)


def _moved_aside(
    source: Source, made: Iterator[tuple[Request, Made]]
) -> Iterator[tuple[Request, Batch]]:
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for request, batch in made:
        if isinstance(batch[0], Encoded):
            # The decoder takes memory from this stream but writes on one of its own, which does
            # not wait for the last batch's crops to have read what they were cut from.
            aside.synchronize()
        with torch.cuda.stream(aside):
            images, labels = _moved(source, request, batch, "cuda")
        work = torch.cuda.current_stream()
        work.wait_stream(aside)
        for tensor in (images, labels):  # so that their memory is not reused too early
            tensor.record_stream(work)
        yield request, (images, labels)


def _moved(source: Source, request: Request, batch: Made, device: str) -> Batch:
    """Move a batch to the device; decode it there if its images are files."""
    images, labels = batch
    if isinstance(images, Encoded):
        assert isinstance(source, Images)
        images, labels = source.decoded(images, labels, request, torch.device(device))
    if device == "cuda":
        images, labels = (
            tensor if tensor.is_cuda else tensor.pin_memory().to("cuda", non_blocking=True)
            for tensor in (images, labels)
        )
    return images, labels


def _made(
    source: Source, requests: Iterable[Request], workers: int, pin_memory: bool
) -> Iterator[tuple[Request, Made]]:
    if workers == 0:
        for request in requests:
            yield request, answer(source, request)
        return
    context = multiprocessing.get_context("forkserver")
    # Or all workers would import these again at every start, such as for an evaluation.
    context.set_forkserver_preload([__name__, *_PRELOADED])
    asked, requests = itertools.tee(requests)
    own = own_stderr()
    loader = DataLoader(
        _Answers(source),
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        prefetch_factor=_AHEAD,
        worker_init_fn=partial(_begin, None if own is None else own.rank),
        multiprocessing_context=context,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # or workers' seeds would be drawn from dropout's generator
    )
    for request, made in zip(asked, _guarded(iter(loader), workers), strict=True):
        if isinstance(made, UserError):
            raise made
        batch, unreadable = made
        source.unreadable += unreadable
        yield request, batch


def _guarded(made: Iterator[_Answer], workers: int) -> Iterator[_Answer]:
    """Pass batches on; reports a worker's death in one line, where DataLoader prints 70."""
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
            if "DataLoader worker" not in text or text.startswith("Caught "):
                raise  # an error in the user's own data set, with its traceback
            signal = re.search(r"killed by signal: (\w+)", text)
            ended = f"got signal {signal.group(1)}" if signal else "has ended"
            raise WorkerLostError(_lost(workers, ended)) from None
        except (ConnectionError, EOFError) as error:  # it died while it handed a batch over
            if str(error).startswith("Caught "):
                raise  # of the user's own data set
            raise WorkerLostError(_lost(workers, "has ended")) from None


def _lost(workers: int, ended: str) -> str:
    return (
        f"a process that loads images (one of data.workers={workers}) {ended}: out of memory? use "
        f"fewer data.workers, or ask for more memory"
    )


def shared_bytes(batch_bytes: int, workers: int) -> int:
    """Return the most bytes of shared memory that a rank's batches in transit take."""
    return batch_bytes * (_AHEAD * workers + 1) if workers else 0


def shared_memory() -> str:
    """Describe the free shared memory, through which workers pass batches."""
    try:
        room = shutil.disk_usage("/dev/shm")
    except OSError:
        return "/dev/shm does not exist"
    return f"/dev/shm has {room.free / 1e6:,.0f} MB free of {room.total / 1e6:,.0f} MB"
