"""Each way a function can end, and that the next call works; then that no worker is left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from limbeck.tasks.isolated import Isolated


class OddError(Exception):
    pass


def behave(how, *rest):
    """Do as told, in the worker."""
    if how == "hang":
        time.sleep(60)
    if how == "hang in C":
        pow(7, 10**9)
    if how == "hang and hold on":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    if how == "raise":
        raise OddError(*rest)
    if how == "exit":
        sys.exit(3)
    if how == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "unpicklable":
        return lambda: None
    return os.getpid() if how == "who" else rest


@pytest.fixture
def isolated():
    with Isolated(behave, limit=1.0) as worker:
        yield worker


def works(isolated):
    assert isolated("say", 1, "two") == (1, "two")
    return isolated("who")


def test_a_function_runs_in_one_other_process_call_after_call(isolated):
    first = works(isolated)
    assert first != os.getpid()
    assert works(isolated) == first


def test_what_a_function_raises_is_raised_here_and_its_worker_goes_on(isolated):
    first = works(isolated)
    with pytest.raises(OddError, match="no idea"):
        isolated("raise", "no idea")
    assert works(isolated) == first


@pytest.mark.parametrize("how", ["hang", "hang in C", "hang and hold on"])
def test_a_call_that_hangs_ends_at_the_limit_and_the_next_one_works(isolated, how):
    first = works(isolated)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"behave took longer than its limit of 1.0 seconds"):
        isolated(how)
    assert 1.0 <= time.monotonic() - started < 3.0
    assert not psutil.pid_exists(first)
    assert works(isolated) != first


@pytest.mark.parametrize(("how", "code"), [("exit", "3"), ("die", "-11"), ("unpicklable", "1")])
def test_a_call_that_ends_its_process_raises_and_the_next_one_works(isolated, how, code):
    first = works(isolated)
    with pytest.raises(RuntimeError, match=f"behave ended its process, exit code {code}"):
        isolated(how)
    assert works(isolated) != first


def test_a_worker_that_somebody_killed_is_replaced(isolated):
    os.kill(works(isolated), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="behave ended its process"):
        isolated("say")
    works(isolated)


def test_the_start_of_a_worker_does_not_count():
    """Spawning takes some hundredths of a second at least."""
    with Isolated(behave, limit=0.02) as hasty:
        assert hasty("say", 5) == (5,)


def test_an_answer_that_was_not_waited_for_is_not_the_next_calls(isolated, monkeypatch):
    works(isolated)

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(isolated._pipe, "poll", interrupted, raising=False)
        with pytest.raises(KeyboardInterrupt):
            isolated("say", "late")
    works(isolated)


def test_no_worker_and_no_pipe_is_left_behind():
    before = len(psutil.Process().open_files()), psutil.Process().num_fds()
    workers = []
    with Isolated(behave, limit=1.0) as isolated:
        workers.append(works(isolated))
        with pytest.raises(TimeoutError):
            isolated("hang")
        workers.append(works(isolated))
    assert isolated.close() is None, "there was still one to close"
    assert not any(map(psutil.pid_exists, workers))
    assert multiprocessing.active_children() == []
    assert (len(psutil.Process().open_files()), psutil.Process().num_fds()) == before


PARENT = """
import sys, time
sys.path.insert(0, {folder!r})
import test_isolated
from limbeck.tasks import isolated

if __name__ == "__main__":
    isolated._SPARE = -58.0  # so the alarm rings after two of the sixty seconds
    found = isolated.Isolated(test_isolated.behave, limit=60.0)
    print(found("who"), flush=True)
    found({how!r})
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["say", "hang", "hang in C"])
def test_a_worker_ends_after_its_parent_was_killed(how, tmp_path):
    """Idle at once, busy by its own alarm."""
    file = tmp_path / "parent.py"
    file.write_text(PARENT.format(folder=os.path.dirname(__file__), how=how))
    parent = subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.5)
    parent.kill()
    parent.communicate()
    worker.wait(timeout=30)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(ValueError, match=f"received limit {limit}, expected limit > 0"):
        Isolated(behave, limit=limit)
