"""metrics.jsonl when the file system refuses."""

import json
import resource
from contextlib import contextmanager

from hvd_lars.metrics import JsonLines


@contextmanager
def room(size):
    """Files of this process cannot grow beyond ``size`` bytes inside: a full disk, nearly."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_bytes().splitlines()]


def test_records_wait_for_room_and_are_whole(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n')
    sink = JsonLines(path, ["event"])
    sink.write({"kind": "event", "step": 1})
    with room(path.stat().st_size + 20):  # the next line fits in part
        for step in (2, 3, 4):
            sink.write({"kind": "event", "step": step})
            assert steps_in(path) == [0, 1]
    assert capsys.readouterr().err.count("its records wait for room") == 1
    sink.write({"kind": "event", "step": 5})
    sink.close()
    assert steps_in(path) == [0, 1, 2, 3, 4, 5]
    assert capsys.readouterr().err == ""


def test_numbers_that_json_has_not_become_null_at_any_depth(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, ["layers"])
    nan, infinity = float("nan"), float("inf")
    sink.write(
        {"kind": "layers", "step": 1, "a": nan, "norm": {"w": nan, "b": 1.0}, "l": [infinity]}
    )
    sink.close()
    record = json.loads(path.read_text())
    assert (record["a"], record["norm"], record["l"]) == (None, {"w": None, "b": 1.0}, [None])


def test_what_never_found_room_is_counted(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, ["event"])
    with room(10):
        sink.write({"kind": "event", "step": 1})
        sink.write({"kind": "event", "step": 2})
        sink.close()
    assert path.read_bytes() == b""
    assert "2 records are lost" in capsys.readouterr().err
