"""``hvd-lars launch``: the line for every launcher, and real runs where it is here."""

import os
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml
from commands import hvd_lars, records_of
from reference.mpijob import validate

from hvd_lars.errors import UserError
from hvd_lars.launchers.kinds import KINDS, start_of
from hvd_lars.launchers.local import local_command
from hvd_lars.launchers.start import Request

LAUNCH = Path(__file__).parents[2] / "launch"
ROOT = ["--allow-run-as-root"] if os.geteuid() == 0 else []
TRAINING = ["digits", "train.duration=2 epochs", "schedule.warmup_duration=1 epochs"]


def line(kind, *options, training=TRAINING):
    code, output = hvd_lars("launch", "--on", kind, "--print-only", *options, *training)
    assert code == 0, output
    return shlex.split(output)


def test_local():
    assert line("local", "-np", "3") == local_command("mpirun", 3, ["hvd-lars", "train", *TRAINING])


def test_horovodrun():
    found = line(
        "horovodrun", "--hosts", "a:4,b:4", "--nic", "ib0", training=["digits", "run.dir=r"]
    )
    assert found == [
        str(LAUNCH / "supervise"), "--hosts", "a:4,b:4", "--",
        "horovodrun", "-np", "{np}", "-H", "{hosts}", "--network-interfaces", "ib0",
        "hvd-lars", "train", "digits", "run.dir=r", "--resume",
    ]  # fmt: skip


def test_openmpi(monkeypatch):
    for name in ("LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "0.1")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    found = line("openmpi", "--hosts", "a:4,b:4")
    passed = [name for flag, name in zip(found, found[1:], strict=False) if flag == "-x"]
    assert {"PATH", "HOROVOD_CYCLE_TIME"} <= set(passed)
    assert not any("secret" in word or "WANDB" in word for word in found)
    assert found[:9] == [
        "mpirun", "-np", "8", "-H", "a:4,b:4", "--bind-to", "none", "--map-by", "slot",
    ]  # fmt: skip
    assert found[-2 - len(TRAINING) :] == ["hvd-lars", "train", *TRAINING]


def test_slurm_outside_and_inside_an_allocation(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    script = str(LAUNCH / "slurm.sbatch")
    sized = ["sbatch", "--nodes=2", "--ntasks=8"]  # 4 on a node, as the script has it
    assert line("slurm", "-np", "8") == [*sized, script, *TRAINING]
    assert line("slurm", "-np", "9")[1:3] == ["--nodes=3", "--ntasks=9"]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert line("slurm") == [
        "srun", "--mpi=pmix", "--cpu-bind=none", "--kill-on-bad-exit=1",
        "hvd-lars", "train", *TRAINING,
    ]  # fmt: skip


@pytest.mark.parametrize("on", ["horovodrun", "kubernetes"])
def test_the_configs_run_folder_is_kept(on, tmp_path):
    base = Path(__file__).parents[2] / "configs/digits.yaml"
    (tmp_path / "my.yaml").write_text(f"extends: {base}\nrun: {{dir: runs/mine}}\n")
    for given in ([], ["run.dir=runs/other"]):
        training = [str(tmp_path / "my.yaml"), *given]
        code, output = hvd_lars("launch", "--on", on, "--print-only", *training)
        assert code == 0, output
        wanted = "runs/other" if given else "runs/mine"
        assert output.count("run.dir=") == 1
        assert f"run.dir={wanted}" in output


def test_pbs_and_lsf():
    training = ["digits", "train.duration=2epochs", "run.seed=3"]
    options = "train.duration=2epochs run.seed=3"
    assert line("pbs", "-np", "4", training=training) == [
        "qsub", "-l", "select=4:ncpus=8:mpiprocs=1:ngpus=1",
        "-v",
        f"CONFIG=digits,OPTIONS={options},SCRIPTS={LAUNCH},"
        "QSUB=-l select=4:ncpus=8:mpiprocs=1:ngpus=1",
        str(LAUNCH / "pbs.sh"),
    ]  # fmt: skip
    assert line("lsf", training=training) == [
        "CONFIG=digits", f"OPTIONS={options}", "bsub", "<", str(LAUNCH / "lsf.sh"),
    ]  # fmt: skip


@pytest.mark.parametrize(("ranks", "workers", "slots"), [(None, 2, 4), ("2", 1, 2), ("16", 4, 4)])
def test_kubernetes(ranks, workers, slots):
    options = [] if ranks is None else ["-np", ranks]
    code, output = hvd_lars("launch", "--on", "kubernetes", "--print-only", *options, *TRAINING)
    assert code == 0, output
    assert output.startswith("kubectl apply -f - <<'EOF'\n")
    job = yaml.safe_load(output.partition("\n")[2].rpartition("EOF")[0])
    validate(job)
    replicas = job["spec"]["mpiReplicaSpecs"]
    assert (replicas["Worker"]["replicas"], job["spec"]["slotsPerWorker"]) == (workers, slots)
    [launcher] = replicas["Launcher"]["template"]["spec"]["containers"]
    assert launcher["args"][: len(TRAINING)] == TRAINING
    assert launcher["args"][-2].startswith("run.dir=/runs/digits-")
    assert launcher["args"][-1] == "--resume"
    assert launcher["env"] == [{"name": "NP", "value": str(workers * slots)}]


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        (["spec"], "slotPerWorker", 4),
        (["spec"], "launcherCreationPolicy", "AfterWorkers"),
        (["spec", "runPolicy"], "backoffLimit", "20"),
        (["spec", "mpiReplicaSpecs", "Worker"], "restartPolicy", "Sometimes"),
        (["spec", "mpiReplicaSpecs", "Launcher"], "replicas", 2),
        (["spec", "mpiReplicaSpecs", "Worker", "template", "spec"], "volume", []),
        (["spec", "mpiReplicaSpecs", "Launcher", "template", "spec"], "containers", {}),
    ],
)
def test_a_wrong_mpijob_would_be_refused(place, key, value):
    job = yaml.safe_load((LAUNCH / "mpijob.yaml").read_text())
    validate(job)
    part = job
    for name in place:
        part = part[name]
    part[key] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(job)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on", "local", "--hosts", "a:2"], "--hosts: not allowed with --on local"),
        (["--on", "slurm", "--nic", "eth0"], "--on slurm, as the scheduler chooses it"),
        (["--on", "horovodrun", "-np", "2"], "-np: not allowed with --on horovodrun"),
        (["--on", "kubernetes", "-np", "6"], "-np: found 6; allowed: up to 4, or a multiple of 4"),
        (["--on", "pbs"], "cannot pass an argument with a blank or a comma"),
        (["--on", "local", "-np", "0"], "-np: found 0; must be 1 or more"),
        (["--on", "openmpi", "train.nothing=1"], "unknown key"),
        (["--on", "openmpi", "--hosts", "a:np[$(touch pwned)]"], "--hosts: found 'a:np[$(touch"),
        (["--on", "horovodrun", "--hosts", "a:4 b:4"], "write a:4,b:4: hosts with their slots"),
    ],
)
def test_mistakes(options, message):
    code, output = hvd_lars("launch", "--print-only", *TRAINING, *options)
    assert code == 2, output
    assert message in output
    assert "Traceback" not in output


def test_a_program_that_is_not_here(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, output = hvd_lars("launch", "--on", "kubernetes", *TRAINING)
    assert code == 2, output
    assert "kubectl: no such program on this machine" in output


def test_every_kind_is_covered():
    for kind in KINDS:
        try:
            assert start_of(Request(kind, ["digits"], None, None, None, {})).command
        except UserError as error:
            raise AssertionError(kind) from error


@pytest.mark.parametrize("kind", ["local", "openmpi", "horovodrun"])
def test_real_runs(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
    run = tmp_path / "run"
    size = ["--hosts", "localhost:2"] if kind == "horovodrun" else ["-np", "2"]
    code, output = hvd_lars("launch", "--on", kind, *size, *TRAINING, f"run.dir={run}")
    assert code == 0, output
    assert records_of(run, "event")[0]["world_size"] == 2
    assert records_of(run, "eval")[-1]["step"] == 20
