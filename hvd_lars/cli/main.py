"""The entry point of ``hvd-lars``, and train, eval and bench over the ranks."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from hvd_lars.cli.parser import ON_RANKS, TOOLS, parse
from hvd_lars.errors import UserError
from hvd_lars.runtime.process import flush_output, prepare
from hvd_lars.runtime.rank_stderr import label_stderr, own_stderr
from hvd_lars.runtime.terminal import warn

if TYPE_CHECKING:
    from hvd_lars.comm import Communicator, Launch

_USER_ERROR = 2
_READER_GONE = 141  # as a shell reports SIGPIPE
_GRACE_SECONDS = 3.0


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exit with 0, 1 (failure), 2 (mistake of the user) or 75.

    75 is EX_TEMPFAIL of sysexits.h: the run was stopped and can be resumed; requeue it.
    """
    prepare()
    try:
        options = parse(arguments)
        code = _run(options)
    except SystemExit:  # from argparse
        flush_output()
        raise
    except BrokenPipeError:
        flush_output()
        sys.exit(_READER_GONE)
    problem = flush_output()
    if problem is not None and options.command != "train":  # train keeps its results elsewhere
        _fail_together(f"standard output cannot be written: {problem}")
    sys.exit(code)


def _run(options: argparse.Namespace) -> int:
    """Return the exit code of a command; mistakes and Ctrl-C end the process here."""
    try:
        if options.command in ON_RANKS:
            from hvd_lars.comm import detect_launch

            launch = detect_launch(os.environ)
            label_stderr(launch.rank)
            return _run_on_ranks(options, launch)
        return TOOLS[options.command].run(options)
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = error.filename or "standard output cannot be written"
        message = f"{where}: {error.strerror or error}"
    except KeyboardInterrupt:
        _interrupted()
    # Outside the handlers, no exception's frames keep parts of the run alive.
    return _fail_together(message)


def _interrupted() -> NoReturn:
    if _rank() == 0:
        print("hvd-lars: interrupted", file=sys.stderr, flush=True)
    elif (own := own_stderr()) is not None:
        own.release()
    os._exit(130)


def _run_on_ranks(options: argparse.Namespace, launch: Launch) -> int:
    """Join the ranks and train, evaluate or measure; return the exit code."""
    command, training = ON_RANKS[options.command], options.command == "train"
    config = command.read_config(options)
    from hvd_lars.cli.elastic import is_elastic, train_elastic
    from hvd_lars.comm import connect

    if training and config.train.profile is not None:
        from hvd_lars.train.profiling import prepare_timeline

        prepare_timeline()
    if training and is_elastic(os.environ):
        return train_elastic(options, config, _guarded)
    groups = config.model.bn_sync_ranks > 1
    parts = options.command != "eval" and config.optimizer.placement != "replicated"
    comm = connect(config.comm.backend, config.run.expect_world_size, groups, parts)
    return _guarded(comm, lambda: command.run(options, config, comm, launch))


def _guarded(
    comm: Communicator, work: Callable[[], int], passed: tuple[type[BaseException], ...] = ()
) -> int:
    """Run ``work`` on this rank; a failure ends all ranks, except for exceptions in ``passed``."""
    from hvd_lars.data.loader import WorkerLostError
    from hvd_lars.state.replicas import ReplicasDifferError
    from hvd_lars.train.recorder import settle_warnings

    label_stderr(comm.rank)  # an elastic job's ranks change
    why = None
    try:
        code = work()
        settle_warnings(comm)
    except passed:
        raise
    except (UserError, KeyboardInterrupt):
        raise
    except BrokenPipeError as error:  # the reader of the output is gone
        if error.filename is not None:
            raise
        code = _READER_GONE
    except (ReplicasDifferError, WorkerLostError) as error:
        why = str(error)
    except OSError as error:  # mostly on rank 0 only: its run folder is gone
        why = f"{error.filename or 'file system'}: {error.strerror or error}"
    except BaseException:
        why = traceback.format_exc()
    if why is not None:  # end all ranks: others may be waiting for this one
        _let_rank_0_speak(comm.rank, 1)
        gc.collect()  # end image loaders and free their semaphores
        comm.abort(why)
    comm.close()
    return code


def _fail_together(message: str) -> NoReturn:
    """Print the message once and exit with 2 on every rank.

    Usually all ranks find the same mistake.  Rank 0 prints it at once; the launcher then signals
    the others, which exit with the same code.  A rank that gets no signal in time is the only one
    with the mistake, or has no launcher that ends it, and prints too.
    """
    rank = _rank()
    label_stderr(rank)
    _let_rank_0_speak(rank, _USER_ERROR)
    for line in message.splitlines():
        warn(line)
    gc.collect()  # end image loaders and free their semaphores
    os._exit(_USER_ERROR)  # an orderly exit would wait for the other ranks in MPI's finalize


def _rank() -> int:
    from hvd_lars.comm import detect_launch

    if (own := own_stderr()) is not None:
        return own.rank
    try:
        return detect_launch(os.environ).rank
    except UserError:  # the mistake to report
        return 0


def _let_rank_0_speak(rank: int, code: int) -> None:
    """Wait on other ranks: rank 0 prints shared mistakes, and SIGTERM then exits with ``code``."""
    if rank != 0:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        time.sleep(_GRACE_SECONDS)
