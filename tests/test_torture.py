"""The short form of `make torture`."""

import subprocess
import sys

import pytest

import tree


@pytest.mark.slow
def test_of_kills_full_disks_and_second_runs_nothing_is_lost_and_nothing_is_left():
    command = [sys.executable, str(tree.ROOT / "tests" / "torture.py"), "short"]
    environment = tree.environment(tree.ROOT)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout[-6000:] + done.stderr[-3000:]
