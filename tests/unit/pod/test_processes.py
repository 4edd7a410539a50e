"""Ending a process tree, however it was started."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

FAMILY = """
import subprocess, sys, time
from pathlib import Path
from otj_runtime.pod.processes import become_subreaper, descendants, kill_descendants, reap, zombies
import os
become_subreaper()
sleep = "import time; time.sleep(600)"
orphan = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', %r], start_new_session=True, stdout=subprocess.DEVNULL).pid)" % sleep
pids = [subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True).pid]
pids.append(int(subprocess.check_output([sys.executable, "-c", orphan], start_new_session=True)))
assert set(descendants(os.getpid())) == set(pids), (descendants(os.getpid()), pids)
assert kill_descendants() == []
assert zombies() == set(pids)
reap(zombies())
assert zombies() == set()
print(*pids)
"""


def test_sessions_and_orphans_are_found_killed_and_reaped() -> None:
    out = subprocess.run([sys.executable, "-c", FAMILY], capture_output=True, text=True, timeout=30, check=False)
    assert out.returncode == 0, out.stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in out.stdout.split())


PARENT = """
import os, subprocess, sys
child = '''
import os, signal, sys, time
from otj_runtime.pod.processes import die_with_parent
die_with_parent(signal.SIGKILL, parent=int(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(600)
'''
process = subprocess.Popen([sys.executable, "-c", child, str(os.getpid())], stdout=subprocess.PIPE, text=True)
print(process.stdout.readline(), flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_child_bound_to_its_parent_does_not_outlive_its_sudden_death() -> None:
    out = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, timeout=30, check=False)
    child = int(out.stdout)
    deadline = time.monotonic() + 10
    while _alive(child):
        assert time.monotonic() < deadline, f"process {child} still runs"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
