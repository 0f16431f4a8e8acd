"""Slurm on the two hosts: its controller on the first, a node on each, one (counted, not real) GPU a node."""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hosts import ADDRESSES, NAMES, Hosts

CONF = """
ClusterName=sft
SlurmctldHost={names[0]}({addresses[0]})
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SchedulerParameters=sched_interval=1,sched_min_interval=0
KillWait=20
NodeName={names[0]} NodeAddr={addresses[0]} CPUs=8 Gres=gpu:1
NodeName={names[1]} NodeAddr={addresses[1]} CPUs=8 Gres=gpu:1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there is no Slurm here; None when there is."""
    programs = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name) is None]
    return f"needs {', '.join(programs)}" if programs else None


@contextmanager
def slurm(hosts: Hosts) -> Iterator[Path]:
    """Both nodes idle; yields the configuration, for SLURM_CONF."""
    # Not below pytest's folder: names of Slurm's sockets have room for 108 characters.
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:
        yield from _slurm(hosts, Path(folder))


def _slurm(hosts: Hosts, folder: Path) -> Iterator[Path]:
    for name in NAMES:
        (folder / f"spool-{name}").mkdir()
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, names=NAMES, addresses=ADDRESSES))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    (folder / "munge.key").write_bytes(b"not a secret: these two hosts are one machine " * 4)
    (folder / "munge.key").chmod(0o600)
    files = {"key-file": "munge.key", "log-file": "munged.log", "pid-file": "munged.pid", "seed-file": "munged.seed"}
    files["socket"] = "munge.socket"
    words = [f"--{option}={folder / name}" for option, name in files.items()]
    daemons = [subprocess.Popen(["munged", "--force", "--foreground", *words])]
    try:
        for number, program in ((0, "slurmctld"), (0, "slurmd"), (1, "slurmd")):
            start = f"mount -t tmpfs tmpfs /sys/fs/cgroup && exec {program} -D -f {conf}"
            command = hosts.command(["unshare", "--mount", "sh", "-c", start], number)
            daemons.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        _wait_for_nodes(hosts, conf)
        yield conf
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=30)


def _wait_for_nodes(hosts: Hosts, conf: Path) -> None:
    deadline = time.monotonic() + 20
    command = hosts.command(["env", f"SLURM_CONF={conf}", "sinfo", "-h", "-o", "%T %D"])
    while True:
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        if said.stdout.split() == ["idle", "2"]:
            return
        assert time.monotonic() < deadline, (said, (conf.parent / "slurmctld.log").read_text())
        time.sleep(0.5)
