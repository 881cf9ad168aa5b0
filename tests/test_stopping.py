"""Requests to stop, as one process hears them."""

import os
import signal
import time
from unittest import mock

import pytest

from hvd_lars.comm.local import LocalCommunicator
from hvd_lars.health.agreement import Agreement
from hvd_lars.health.stop_requests import StopRequests


def agreed(stops):
    return Agreement(LocalCommunicator(), stops).decide().stop


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_is_a_request_and_handlers_are_given_back(name):
    number = getattr(signal, name)
    before, stops = signal.getsignal(number), StopRequests()
    with stops.listening():
        assert agreed(stops) is None
        os.kill(os.getpid(), number)
        assert agreed(stops) == name
    assert signal.getsignal(number) is before


def test_under_nohup_the_end_of_a_terminal_is_nothing():
    before, stops = signal.signal(signal.SIGHUP, signal.SIG_IGN), StopRequests()
    try:
        with stops.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert agreed(stops) is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_interrupts():
    stops = StopRequests()
    with stops.listening(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert agreed(stops) == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)


def test_time_and_a_file_are_requests(tmp_path):
    assert agreed(StopRequests(max_seconds=0.0)) == "run.max_hours"
    file = tmp_path / "begun"
    file.touch()  # as echo requeue > STOP begins
    with mock.patch.object(time, "sleep", lambda _: file.write_text("requeue\n")):
        assert agreed(StopRequests(file)) == "STOP file that says requeue"
    stops = StopRequests(tmp_path / "STOP")
    assert agreed(stops) is None
    (tmp_path / "STOP").symlink_to("/no/such")  # any entry of that name
    assert agreed(StopRequests(tmp_path / "STOP")) == "STOP file"
