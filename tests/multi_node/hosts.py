"""Two hosts on one machine: network namespaces with an address, an ssh server, a name and a /dev/shm each."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

NAMES = ("sfthost1", "sfthost2")
ADDRESSES = ("10.177.0.1", "10.177.0.2")
SSHD = """
Port 22
ListenAddress {address}
HostKey {folder}/key
PidFile none
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
PermitUserEnvironment no
SetEnv XDG_CACHE_HOME={folder}/{name}/cache
"""
SSH = """
Host *
    IdentityFile {folder}/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


def missing() -> str | None:
    """Why two hosts can't be made here; None when they can."""
    programs = [name for name in ("ip", "sshd", "ssh", "ssh-keygen", "pdsh", "unshare") if _which(name) is None]
    if programs:
        return f"needs {', '.join(programs)}"
    if os.geteuid() != 0:
        return "needs to be root, to make network namespaces"
    name = f"sftprobe{os.getpid()}"  # several workers of pytest ask at once
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return None if probe.returncode == 0 else f"no network namespace can be made: {probe.stderr.strip()}"


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@dataclass
class Hosts:
    """The two hosts while they are up."""

    folder: Path  # shared by both; a folder of its own below it holds each host's cache
    servers: list[subprocess.Popen]

    def command(self, words: list[str], number: int = 0) -> list[str]:
        """`words` as a command on one of the hosts, the first unless given."""
        return [
            "nsenter",
            f"--target={self.servers[number].pid}",
            "--net",
            "--mount",
            "--uts",
            f"--wd={self.folder}",
            "--",
            *map(str, words),
        ]

    def environment(self) -> dict[str, str]:
        """For commands on the first host: ssh finds the key, and the cache is the host's own."""
        own = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "XDG_CACHE_HOME": f"{self.folder}/{NAMES[0]}/cache"}
        return {**os.environ, **own}

    def kill(self, number: int) -> None:
        """Take a host down: every process in its network ends at once."""
        pids = subprocess.run(["ip", "netns", "pids", NAMES[number]], capture_output=True, text=True, check=True)
        subprocess.run(["kill", "-KILL", *pids.stdout.split()], check=False)


@contextmanager
def two_hosts(folder: Path):
    """Bring both up, with everything they need in `folder`, and take them down; one pair at a time on a machine."""
    with FileLock(Path(tempfile.gettempdir()) / "sft_two_hosts.lock"):
        yield from _two_hosts(folder)


def _two_hosts(folder: Path) -> Iterator[Hosts]:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    lines = [f"{address} {name}\n" for address, name in zip(ADDRESSES, NAMES, strict=True)]
    (folder / "names").write_text("127.0.0.1 localhost\n" + "".join(lines))
    (folder / "bin").mkdir()
    for program in ("ssh",):
        wrapper = folder / "bin" / program
        wrapper.write_text(f'#!/bin/sh\nexec {_which(program)} -F {folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    servers = []
    _take_down([])
    try:
        for name in NAMES:
            subprocess.run(["ip", "netns", "add", name], check=True)
        subprocess.run(
            ["ip", "link", "add", "eth0", "netns", NAMES[0], "type", "veth", "peer", "name", "eth0", "netns", NAMES[1]],
            check=True,
        )
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            for words in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
                subprocess.run(["ip", "-n", name, *words], check=True)
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
            (folder / name).mkdir()
            config = folder / name / "sshd_config"
            config.write_text(SSHD.format(folder=folder, address=address, name=name))
            names = f"mount --bind {folder}/names /etc/hosts"
            shared = "mount -t tmpfs tmpfs /dev/shm"
            start = f"{shared} && {names} && hostname {name} && exec {_which('sshd')} -D -e -f {config}"
            inside = ["ip", "netns", "exec", name, "unshare", "--mount", "--uts", "sh", "-c", start]
            with open(folder / name / "sshd.log", "w") as log:
                servers.append(subprocess.Popen(inside, stdout=log, stderr=log))
        hosts = Hosts(folder, servers)
        for address in ADDRESSES:
            _wait_for_ssh(hosts, address)
        yield hosts
    finally:
        _take_down(servers)


def _wait_for_ssh(hosts: Hosts, address: str) -> None:
    deadline = time.monotonic() + 20
    words = hosts.command(["ssh", address, "true"])
    while subprocess.run(words, env=hosts.environment(), capture_output=True, check=False).returncode != 0:
        assert time.monotonic() < deadline, subprocess.run(
            words, env=hosts.environment(), capture_output=True, text=True
        )
        time.sleep(0.2)


def _take_down(servers: list[subprocess.Popen]) -> None:
    for name in NAMES:
        pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout.split()
        if pids:
            subprocess.run(["kill", "-KILL", *pids], check=False)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    for server in servers:
        server.wait()
