"""A run folder is one run's alone, and nothing is made before all is checked."""

import errno
import multiprocessing
import os
import time
from pathlib import Path
from unittest import mock

import pytest

from hvd_lars.errors import UserError
from hvd_lars.runtime.files import replace_text
from hvd_lars.state.run_folder import create_run_folder, leave


def _claim(place, wanted, gate, found):
    os.chdir(place)
    gate.wait()
    try:
        found.put(str(create_run_folder(wanted, "digits")))
    except UserError as error:
        found.put(f"refused: {error}")


def claim_at_once(place, wanted, count=16):
    """What so many processes get that ask at the same moment."""
    context = multiprocessing.get_context("fork")
    gate, found = context.Barrier(count), context.Queue()
    processes = [
        context.Process(target=_claim, args=(place, wanted, gate, found)) for _ in range(count)
    ]
    for process in processes:
        process.start()
    answers = [found.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    return answers


def test_runs_that_start_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20261125-120000")
    answers = claim_at_once(tmp_path, None)
    assert len(set(answers)) == 16
    first = "runs/digits-20261125-120000"
    assert set(answers) == {first, *(f"{first}-{i}" for i in range(2, 17))}
    assert all((tmp_path / name / "checkpoints").is_dir() for name in answers)


def test_of_runs_that_name_one_folder_one_has_it(tmp_path):
    answers = claim_at_once(tmp_path, "mine")
    assert answers.count("mine") == 1
    assert answers.count(
        "refused: run.dir: mine holds a run already; name another folder, or --resume it"
    ) == 15  # fmt: skip


def test_a_folder_that_the_user_made_is_taken(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    assert create_run_folder(str(tmp_path / "mine"), "digits") == tmp_path / "mine"
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="run.dir: .*file cannot be written: Not a directory"):
        create_run_folder(str(tmp_path / "file"), "digits")
    (tmp_path / "half").mkdir()
    (tmp_path / "half/checkpoints").touch()
    with pytest.raises(UserError, match="run.dir: .*half cannot be written: File exists"):
        create_run_folder(str(tmp_path / "half"), "digits")
    (tmp_path / "half/checkpoints").unlink()
    assert create_run_folder(str(tmp_path / "half"), "digits") == tmp_path / "half"
    (tmp_path / "runs").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(UserError, match="run.dir: runs/digits-.* cannot be written: File exi"):
            create_run_folder(None, "digits")


def test_a_path_with_a_null_character_is_named():
    with pytest.raises(UserError, match="run.dir: found 'a.x00b'; a path has no null character"):
        create_run_folder("a\0b", "digits")


def test_what_a_full_disk_stopped_leaves_no_file(tmp_path, monkeypatch):
    path = tmp_path / "page"
    path.write_text("before")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "replace", mock.Mock(side_effect=full))
    with pytest.raises(OSError, match="No space left") as caught:
        replace_text(path, "after")
    assert caught.value.filename == str(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path):
    folder = create_run_folder(str(tmp_path / "mine"), "digits")
    leave(folder)
    assert not folder.exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").touch()
    leave(create_run_folder(str(tmp_path / "notes"), "digits"))
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["mine.txt"]
