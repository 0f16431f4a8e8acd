"""Compile locks: one that a killed process left is removed, one that a process holds is not."""

import subprocess
import sys
import time

from utils.machine.compile_locks import clear_stale_build_locks

# torch's own way: create exclusively, keep open until done.
HOLD = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held', flush=True); time.sleep(60)"


def test_only_left_over_locks_are_removed(tmp_path):
    lock = tmp_path / "py311_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert clear_stale_build_locks(tmp_path) == []
        assert lock.exists()
        holder.kill()
    assert lock.exists()
    assert clear_stale_build_locks(tmp_path) == [lock]
    assert not lock.exists()


def test_another_node_is_given_time(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.machine.compile_locks.REMOTE_PATIENCE", 1.5)
    (tmp_path / "lock").touch()
    start = time.time()
    assert len(clear_stale_build_locks(tmp_path, several_nodes=True)) == 1
    assert time.time() - start >= 1


def test_no_cache_yet(tmp_path):
    assert clear_stale_build_locks(tmp_path / "absent") == []


BUSY = """
import os, sys, time
end = time.time() + 3
taken = 0
while time.time() < end:
    try:
        held = os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        continue
    os.close(held)
    os.remove(sys.argv[1])  # fails, and with it the test, if the code under test removed the lock
    taken += 1
print("took", taken)
"""


def test_a_lock_in_busy_use_is_never_taken_away(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", BUSY, str(tmp_path / "lock")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as busy:
        while busy.poll() is None:
            assert clear_stale_build_locks(tmp_path) == []
        out, err = busy.communicate()
    assert busy.returncode == 0, err
    assert int(out.split()[1]) > 100
