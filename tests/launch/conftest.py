"""Jobs that a failed test leaves would slow all others down."""

import commands
import pytest


@pytest.fixture(autouse=True)
def _ended():
    yield
    while commands.started:
        process = commands.started.pop()
        if process.poll() is None:
            commands.kill_everything(process)
