"""Python processes that need not import torch anew, which takes 2 s of a core each.

A server, one per process that runs tests, has imported the package and has started no thread.  A
small client (:func:`python`) in place of Python asks it for a fork that takes over the client's
arguments, environment, folder and open streams.  The client ends as the fork does, and the fork is
killed if the client is.  Under a launcher the ranks are as real as any: only their parent is
another.  :func:`fork_of` leads from a client, which is a launcher's descendant, to its fork.
"""

import array
import atexit
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import types
import typing
from contextlib import suppress
from pathlib import Path

# Read when libraries are loaded: with other values, a process of its own has to start.
_FIXED = ("OMP_", "MKL_", "KMP_", "GOMP_", "LD_PRELOAD", "PYTHON", "TORCH", "PYTORCH", "TRITON")
_PASSED = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]


class Server:
    """A process to be forked; ``path`` is its socket."""

    all: typing.ClassVar = []

    def __init__(self, environment):
        self.all.append(self)
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        self.path = str(Path(self._folder.name, "socket"))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen(64)
        self._process = subprocess.Popen(
            [sys.executable, __file__, "serve", str(listener.fileno())],
            env=environment, pass_fds=[listener.fileno()], stdin=subprocess.PIPE,
        )  # fmt: skip
        listener.close()
        self.pid = self._process.pid


def python(server, *arguments):
    """Return a command that does as ``python arguments``."""
    return [sys.executable, "-S", "-E", __file__, server.path, *map(str, arguments)]


def fork_of(client):
    """Return the process of a client's fork; ``client``, a process, itself if it is no client."""
    import psutil  # which a client does not find

    for server in Server.all:
        with suppress(OSError, ValueError, psutil.NoSuchProcess):
            fork = psutil.Process(int(Path(f"{server.path}.{client.pid}").read_text()))
            if fork.ppid() == server.pid:  # or the number was another client's
                return fork
    return client


def _fixed(environment):
    return {key: value for key, value in environment.items() if key.startswith(_FIXED)}


def _ask():
    """The client's whole life."""
    path, *arguments = sys.argv[1:]
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    ignored = [number for number in _PASSED if signal.getsignal(number) == signal.SIG_IGN]
    request = json.dumps([arguments, dict(os.environ), os.getcwd(), ignored]).encode()
    streams = array.array("i", [0, 1, 2])
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
    connection.sendmsg([len(request).to_bytes(8, "little")], rights)
    connection.sendall(request)
    answer = connection.makefile()
    child = int(answer.readline() or 0)
    if not child:  # another environment is needed
        os.execv(sys.executable, [sys.executable, *arguments])
    for number in _PASSED:  # also those that the fork ignores: it may change its mind
        signal.signal(number, lambda number, _: _pass_on(child, number))
    note = Path(f"{path}.{os.getpid()}")
    note.write_text(str(child))
    status = int(answer.readline() or 1)  # nothing, if the server is gone
    note.unlink(missing_ok=True)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _pass_on(child, number):
    with suppress(ProcessLookupError):
        os.kill(child, number)


def _load():

    import hvd_lars.assemble.run
    import hvd_lars.cli.main
    import hvd_lars.config.file
    import hvd_lars.data.hold_out
    import hvd_lars.data.warps
    import hvd_lars.optim.kernels.agreed  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
    gc.freeze()  # or a collection in a fork would copy the pages of all that was imported


def _receive(connection):
    head, rights, _, _ = connection.recvmsg(8, socket.CMSG_LEN(3 * array.array("i").itemsize))
    streams = array.array("i")
    streams.frombytes(rights[0][2])
    request, size = b"", int.from_bytes(head, "little")
    while len(request) < size and (more := connection.recv(size - len(request))):
        request += more
    return json.loads(request), list(streams)


class _Children:
    """The forks that have not ended yet, by the descriptor of the process."""

    def __init__(self, listener):
        self.listener, self.waiting = listener, selectors.DefaultSelector()
        self._clients = {}
        self.waiting.register(0, selectors.EVENT_READ, None)
        self.waiting.register(listener, selectors.EVENT_READ, None)

    def add(self, connection, child):
        process = os.pidfd_open(child)
        self._clients[process] = connection, child
        self.waiting.register(process, selectors.EVENT_READ, process)
        self.waiting.register(connection, selectors.EVENT_READ, process)

    def __contains__(self, process):
        return process in self._clients

    def handle(self, key):
        """Tell a client how its fork ended, or end the fork of a client that was killed."""
        connection, child = self._clients[key.data]
        if key.fileobj is connection:
            os.kill(child, signal.SIGKILL)
            self.waiting.unregister(connection)
            return
        _, status = os.waitpid(child, 0)
        with suppress(OSError):
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        with suppress(KeyError):
            self.waiting.unregister(connection)
        self.waiting.unregister(key.data)
        os.close(key.data)
        connection.close()
        del self._clients[key.data]

    def forget(self):
        """In a fork: let go of what belongs to the others."""
        self.listener.close()
        for connection, _ in self._clients.values():
            connection.close()


def _serve(listener):
    """Fork for every client, until the tests end; returns in the fork with its arguments."""
    _load()
    ours = _fixed(os.environ)
    children = _Children(listener)
    while True:
        for key, _ in children.waiting.select():
            if key.fileobj == 0:
                sys.exit()  # standard input is closed: the tests are gone
            if key.fileobj is not listener:
                if key.data in children:
                    children.handle(key)
                continue
            connection, _ = listener.accept()
            try:
                (arguments, environment, folder, ignored), streams = _receive(connection)
            except (OSError, ValueError, IndexError):
                connection.close()  # the client was killed
                continue
            fits = _fixed(environment) == ours
            child = os.fork() if fits else 0
            if fits and child == 0:
                connection.close()
                children.forget()
                _become(environment, folder, ignored, streams)
                return arguments
            for stream in streams:
                os.close(stream)
            with suppress(OSError):
                connection.sendall(f"{child}\n".encode())
            if fits:
                children.add(connection, child)
            else:
                connection.close()


def _become(environment, folder, ignored, streams):
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    # As at the start of Python: a text stream remembers whether its file could seek.
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    lines = 1 if os.isatty(1) else -1
    sys.stdout = sys.__stdout__ = open(1, "w", lines, closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", 1, closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def _run(arguments):
    """Run what is asked for as Python does."""
    kind, *rest = arguments
    if kind == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), module.__dict__)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(kind).resolve().parent)
        sys.modules["__main__"] = types.ModuleType("__main__")
        runpy.run_path(kind, run_name="__main__")


class _Exit:
    """Ends a fork as Python does, but for taking every module apart.

    That takes 0.3 s of a core: to free an object is to write to a page shared with the server,
    which is copied first.
    """

    def __init__(self):
        self.status = 0
        atexit.register(self)  # before all others, so that it comes last

    def __call__(self):
        mpi = sys.modules.get("mpi4py.MPI")
        if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
            mpi.Finalize()  # which mpi4py does later than this
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(self.status)

    def after(self, run, arguments):
        """Run, and note the exit code."""
        try:
            run(arguments)
        except SystemExit as end:
            self.status = end.code if isinstance(end.code, int) else int(end.code is not None)
            raise
        except KeyboardInterrupt:
            atexit.unregister(self)  # Python ends itself by the signal
            raise
        except BaseException:
            self.status = 1
            raise


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        leaving = _Exit()
        leaving.after(_run, _serve(socket.socket(fileno=int(sys.argv[2]))))
    else:
        _ask()
