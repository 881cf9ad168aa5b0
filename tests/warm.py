"""Processes that run the command without importing torch anew, which takes 2 s of a core each.

A server, one per process that runs tests, has imported the package and has started no thread.  For
every command it forks; the child runs ``main`` as ``python -m hvd_lars`` does, and leaves as usual.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# Read when libraries are loaded: with other values, a process of its own has to start.
_FIXED = ("OMP_", "MKL_", "KMP_", "GOMP_", "LD_", "PYTHON", "TORCH", "PYTORCH", "TRITON", "CUDA")


def _fixed(environment):
    return {key: value for key, value in environment.items() if key.startswith(_FIXED)}


class Server:
    """Runs commands one after the other."""

    def __init__(self, environment):
        self._environment = environment
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def fits(self, environment):
        """Whether a process with this environment can be forked."""
        return _fixed(environment) == _fixed(self._environment) and self._process.poll() is None

    def run(self, arguments, environment, folder, timeout):
        """Return the command's exit code and output."""
        with tempfile.TemporaryDirectory() as name:
            output = Path(name, "output")
            request = [arguments, environment, str(folder), str(output)]
            self._process.stdin.write(f"{json.dumps(request)}\n")
            if not select.select([self._process.stdout], [], [], timeout)[0]:
                self._process.kill()
                raise subprocess.TimeoutExpired(arguments, timeout)
            code = int(self._process.stdout.readline())
            return code, output.read_text()


def _serve():
    import hvd_lars.assemble
    import hvd_lars.health.watchdog
    import hvd_lars.train.recorder  # noqa: F401
    from hvd_lars.cli.main import main

    replies = os.dup(1)
    for line in sys.stdin:
        arguments, environment, folder, output = json.loads(line)
        child = os.fork()
        if child == 0:
            os.close(replies)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            file = os.open(output, os.O_WRONLY | os.O_CREAT)
            nothing = os.open(os.devnull, os.O_RDONLY)
            for number, stream in enumerate((nothing, file, file)):
                os.dup2(stream, number)
            sys.path[0] = folder  # as of python -m
            sys.argv = ["hvd-lars", *arguments]
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.exit(main(arguments))
        _, status = os.waitpid(child, 0)
        os.write(replies, f"{os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    _serve()
