"""Data sets and networks of one's own: the example of docs/data.md, and what goes wrong."""

import re
from pathlib import Path

import pytest
from commands import HANG_GUARD, hvd_lars, records_of, warm_python

from hvd_lars.launchers.local import run_here

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text()
FILES = dict(re.findall(r'```\w+ title="(stripes\.\w+)"\n(.*?)```', PAGE, re.DOTALL))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_of_the_page_trains_alike_on_one_rank_and_two(folder):
    """With workers or without, and when it is resumed half-way at another world size."""
    every = "train.eval_every=2 epochs"
    code, output = hvd_lars("train", "stripes.yaml", "run.dir=one", "data.workers=0", every)
    assert code == 0, output
    rest = ["schedule.policy=constant", "data.workers=0"]
    half = ["train.duration=4 epochs", *rest]
    code, output = hvd_lars("train", "stripes.yaml", "run.dir=whole", *rest)
    assert code == 0, output
    for arguments in (
        ["run.dir=two", "data.workers=2", every],
        ["run.dir=parts", *half],
        ["run.dir=parts", "--resume", *rest, "train.duration=8 epochs"],
    ):
        program = warm_python("-m", "hvd_lars", "train", "stripes.yaml", *arguments)
        result = run_here("mpirun", 2, program, HANG_GUARD, {"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stdout
    losses = {
        name: [r["loss"] for r in records_of(folder / name, "eval")]
        for name in ("one", "two", "whole", "parts")
    }
    for found, wanted in (("two", "one"), ("parts", "whole")):
        assert losses[found][:2] == pytest.approx(losses[wanted][:2], rel=1e-4)
        assert losses[found] == pytest.approx(losses[wanted], rel=0.05)  # rounding grows
    assert min(losses["one"]) < 0.9 * losses["one"][0]
    code, output = hvd_lars("eval", "two")
    assert code == 0, output
    assert '"num_samples": 100' in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.factory=nowhere:build"], "data.factory: nowhere:build: no module nowhere in the"),
        (["data.factory=stripes:absent"], "data.factory: stripes:absent: stripes has no absent"),
        (["data.factory=stripes"], "data.factory: found 'stripes'"),
        (["data.factory=stripes:Stripes.classes"], "found list; a callable is needed"),
        (["data.factory=stripes:network", "data.options={num_classes: 2}"], "returned Sequential"),
        (["data.image_shape=[1, 8, 8]", "model.name=digits_alexnet", "model.options={}"],
         "data.image_shape: found [1, 8, 8]; training sample"),
        (["data.num_classes=2", "data.options.number=0"], "the first data set it returned is"),
        (["model.name=stripes:absent"], "model.name: stripes:absent: stripes has no absent"),
        (["model.name=stripes:build", "model.options={number: 3}"], "unexpected keyword argument"),
        (["model.name=resnet18", "model.options={depth: 3}"], "model.options: resnet18 does not"),
        (["model.name=resnet18", "model.options={weights: IMAGENET1K_V1}"],
         "but got 2 instead.; model.init_from loads weights from a file"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(folder, overrides, message):
    code, output = hvd_lars("train", "stripes.yaml", "run.dir=run", "data.workers=0", *overrides)
    assert message in output
    if "unexpected keyword" not in message:  # that is the user's own function
        assert code == 2, output
        assert len(output.splitlines()) == 1 + ("sample" in message), output
    assert not (folder / "run").exists() or "sample" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("Stripes(number,", "Stripes(number - 2 * LATER,"),
         "510 images to train and 100 to evaluate on, rank 0 has 512 and 100; all ranks"),
        (("Stripes(100,", "Stripes(100 - 2 * LATER,"),
         "512 images to train and 98 to evaluate on, rank 0 has 512 and 100; all ranks"),
    ],
)  # fmt: skip
def test_ranks_with_other_images_are_named(folder, change, message):
    text = (folder / "stripes.py").read_text()
    later = "import os\n\nLATER = os.environ['OMPI_COMM_WORLD_RANK'] != '0'\n"
    (folder / "stripes.py").write_text(later + text.replace(*change))
    program = warm_python("-m", "hvd_lars", "train", "stripes.yaml", "run.dir=run")
    result = run_here("mpirun", 2, program, HANG_GUARD)
    assert result.returncode == 2, result.stdout
    assert f"data: rank 1 has {message}" in result.stdout
    assert not (folder / "run").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_in_the_users_code_keeps_its_traceback(folder, workers):
    text = (folder / "stripes.py").read_text()
    broken = "        label = index % 2\n        assert index != 77, 'number 77'\n"
    (folder / "stripes.py").write_text(text.replace("        label = index % 2\n", broken))
    code, output = hvd_lars("train", "stripes.yaml", "run.dir=run", f"data.workers={workers}")
    assert code == 1, output
    assert 'stripes.py", line' in output
    assert "AssertionError: number 77" in output


def test_a_label_that_is_no_class_is_named(folder):
    text = (folder / "stripes.py").read_text()
    (folder / "stripes.py").write_text(text.replace("return image, label", "return image, 2"))
    code, output = hvd_lars("train", "stripes.yaml", "run.dir=run")
    assert code == 2, output
    assert "has label 2; allowed with 2 classes: 0 to 1" in output
