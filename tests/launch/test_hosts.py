"""Two "machines": network namespaces with names, addresses and sshd of their own.

Needs root and Debian's iproute2 and openssh-server; several real machines were not there.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from commands import HANG_GUARD, records_of, wait_for_step

from hvd_lars.launchers.local import launcher_environment

LAUNCH = Path(__file__).parents[2] / "launch"

pytestmark = pytest.mark.part("two hosts by sshd")


def run(*command, **options):
    return subprocess.run(command, check=True, capture_output=True, **options)


@pytest.fixture(scope="module")
def hosts():
    """An environment for commands on the first of them, and how to enter its namespace."""
    folder = Path(tempfile.mkdtemp(prefix="hvd_lars-hosts-"))
    tag, net = f"hl{os.getpid() % 10000}", f"10.77.{os.getpid() % 250}"
    environment = launcher_environment() | {"OMP_NUM_THREADS": "1"}
    for key in ("key", "host"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key)
    # Ranks are started by name: what sshd gives them must find the programs.
    path = environment["PATH"]
    (folder / "ssh").write_text(
        f"#!/bin/sh\nexec {shutil.which('ssh')} -i {folder}/key -o StrictHostKeyChecking=no "
        f'-o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"\n'
    )
    (folder / "ssh").chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    servers = []
    run("ip", "link", "add", f"{tag}b", "type", "bridge")
    try:
        run("ip", "link", "set", f"{tag}b", "up")
        for i in (1, 2):
            space = f"{tag}n{i}"
            run("ip", "netns", "add", space)
            run("ip", "link", "add", f"{tag}v{i}", "type", "veth", "peer", "name", "eth0", "netns",
                space)  # fmt: skip
            run("ip", "link", "set", f"{tag}v{i}", "master", f"{tag}b", "up")
            run("ip", "-n", space, "addr", "add", f"{net}.{i}/24", "dev", "eth0")
            for link in ("eth0", "lo"):
                run("ip", "-n", space, "link", "set", link, "up")
            options = ["-D", "-p", "22", "-h", folder / "host", "-o", f"SetEnv=PATH={path}"]
            options += ["-o", f"AuthorizedKeysFile={folder}/key.pub", "-o", "StrictModes=no"]
            options += ["-o", "UsePAM=no", "-o", "PermitRootLogin=yes", "-o", "PidFile=none"]
            servers.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c",
                     f'hostname node{i}; exec "$0" "$@"', shutil.which("sshd"), *options]
                )
            )  # fmt: skip
        enter = ["ip", "netns", "exec", f"{tag}n1", "unshare", "--uts", "sh", "-c",
                 'hostname node1; exec "$0" "$@"']  # fmt: skip
        environment |= {"HOSTS": f"{net}.1:1,{net}.2:1", "NIC": "eth0"}
        environment |= {"PATH": f"{folder}{os.pathsep}{path}"}
        reachable = [*enter, "ssh", f"{net}.2", "hostname"]
        for _ in range(50):
            found = subprocess.run(reachable, env=environment, capture_output=True, text=True)
            if found.stdout == "node2\n":
                break
            time.sleep(0.1)
        else:
            raise AssertionError(found.stderr)
        yield environment, enter
    finally:
        for server in servers:
            server.kill()
            server.wait()
        for i in (1, 2):
            subprocess.run(["ip", "netns", "del", f"{tag}n{i}"], check=False)
        run("ip", "link", "del", f"{tag}b")
        shutil.rmtree(folder)


def start(hosts, script, run_folder, *options):
    environment, enter = hosts
    return subprocess.Popen(
        [*enter, "bash", LAUNCH / script, "digits", f"run.dir={run_folder}", *options],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


SHORT = ["train.duration=40 steps", "schedule.warmup_duration=5 steps"]


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh"])
def test_ranks_of_two_hosts_train_together(hosts, tmp_path, script):
    folder = tmp_path / "run"
    process = start(hosts, script, folder, *SHORT)
    output, _ = process.communicate(timeout=HANG_GUARD)
    assert process.returncode == 0, output
    assert records_of(folder, "event")[0]["hosts"] == ["node1", "node2"]
    assert records_of(folder, "eval")[-1]["step"] == 40
    assert "no heartbeats" not in output


def test_a_stopped_rank_on_another_host_is_named(hosts, tmp_path):
    folder = tmp_path / "run"
    options = ["run.rank_timeout=5", "train.duration=100000 steps", "train.log_every=1 steps"]
    process = start(hosts, "mpirun.sh", folder, *options)
    wait_for_step(process, folder, 3)
    ranks = []
    for found in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # others' processes end meanwhile
            is_training = {"train", f"run.dir={folder}"} <= set(found.cmdline())
            if is_training and found.environ().get("OMPI_COMM_WORLD_RANK") == "1":
                ranks.append(found)
    assert len(ranks) == 1
    ranks[0].send_signal(signal.SIGSTOP)
    output, _ = process.communicate(timeout=HANG_GUARD)
    assert process.returncode != 0
    assert "no heartbeat for 5 s (run.rank_timeout) from:" in output
    assert f"rank 1 (host node2, pid {ranks[0].pid})" in output
    assert psutil.wait_procs(ranks, timeout=60)[1] == []
