"""Two hosts that share a folder alone, network and /dev/shm apart: `deepspeed --hostfile` over ssh, and by hand."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from fork_runs import checkpoint_steps, finished_run, outcome
from hosts import ADDRESSES, NAMES, missing, two_hosts

from utils.machine.compile_locks import extension_folder


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_two_hosts_lose_one_go_on_and_end_as_one_node(run_setting, tmp_path):
    """The second host dies in the second epoch; the same command goes on, to the weights of two ranks on one node."""
    place = run_setting.index("--data_output_path")
    setting = run_setting[:place] + run_setting[place + 2 :]  # each host has a cache of its own
    finished_run([*run_setting, "--output_dir", tmp_path / "one_node"], ranks=2)
    with two_hosts(tmp_path / "hosts") as hosts:
        (hosts.folder / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        passed_on = {
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "PATH": os.environ["PATH"],
            "TORCH_EXTENSIONS_DIR": extension_folder(),
        }  # fmt: skip
        (hosts.folder / ".deepspeed_env").write_text("".join(f"{key}={value}\n" for key, value in passed_on.items()))
        output = tmp_path / "two_hosts"
        command = hosts.command(
            [
                Path(sys.executable).parent / "deepspeed", "--hostfile", hosts.folder / "hostfile",
                "--master_addr", ADDRESSES[0], ROOT / "main.py", *setting, "--output_dir", output,
                "--save_steps", "2", "--resume_from_checkpoint",
            ]
        )  # fmt: skip

        with open(tmp_path / "log", "w") as log:
            run = subprocess.Popen(command, env=hosts.environment(), stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 240
        while "Epoch: 1, Step: 0," not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline and run.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        hosts.kill(1)
        assert run.wait(timeout=60) != 0
        killed = (tmp_path / "log").read_text()
        assert "saving the final model" not in killed, "the host died while the run was at work"
        assert "stopped: another rank is gone" in killed or "exits with return code" in killed
        assert checkpoint_steps(output)[-1] >= 4

    with two_hosts(tmp_path / "hosts_again") as hosts:
        for name in ("hostfile", ".deepspeed_env"):
            (hosts.folder / name).write_text((tmp_path / "hosts" / name).read_text())
        command = [
            word.replace(f"{tmp_path}/hosts/", f"{tmp_path}/hosts_again/")
            for word in command[command.index("--") + 1 :]
        ]
        run = subprocess.run(
            hosts.command(command), env=hosts.environment(), capture_output=True, text=True, timeout=240, check=False
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert "Resuming from" in run.stdout
        assert outcome(output) == outcome(tmp_path / "one_node")
        for name in NAMES:
            assert list((hosts.folder / name / "cache").rglob("prompts_*/report.json")), "each host built its own cache"


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_each_host_started_by_hand_with_a_cache_for_both(run_setting, tmp_path):
    """`deepspeed --no_ssh` on each host with a cold cache on the shared folder, then torchrun on the warm one."""
    finished_run([*run_setting, "--output_dir", tmp_path / "one_node"], ranks=2)
    cache = tmp_path / "shared_cache"
    setting = [*run_setting, "--data_output_path", cache]  # the last one counts
    programs = Path(sys.executable).parent
    with two_hosts(tmp_path / "hosts") as hosts:
        (hosts.folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NAMES))
        environment = hosts.environment() | {
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0",
            "TORCH_EXTENSIONS_DIR": extension_folder(),
        }  # fmt: skip

        def on_both(launcher: list[list], output: Path) -> str:
            runs = [
                subprocess.Popen(
                    hosts.command([*words, ROOT / "main.py", *setting, "--output_dir", output], number),
                    env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                )
                for number, words in enumerate(launcher)
            ]  # fmt: skip
            said = [run.communicate(timeout=240)[0] for run in runs]
            assert [run.returncode for run in runs] == [0, 0], "\n".join(said)
            return "\n".join(said)

        no_ssh = [programs / "deepspeed", "--no_ssh", "--hostfile", hosts.folder / "hostfile"]
        no_ssh += ["--master_addr", NAMES[0], "--master_port", "29600"]
        cold = on_both([[*no_ssh, "--node_rank", str(number)] for number in (0, 1)], tmp_path / "no_ssh")
        torchrun = [programs / "torchrun", "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", NAMES[0]]
        warm = on_both([[*torchrun, "--node_rank", str(number)] for number in (0, 1)], tmp_path / "torchrun")
    built = re.compile(rf"Data cache {cache}/\S+: built")
    assert len(built.findall(cold)) == 1, "one of the hosts, for both"
    assert f"Data cache {cache}" in warm and not built.findall(warm)
    assert outcome(tmp_path / "no_ssh") == outcome(tmp_path / "one_node")
    assert outcome(tmp_path / "torchrun") == outcome(tmp_path / "one_node")
