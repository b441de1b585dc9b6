"""A function in a process of its own, with a hard limit of time: for verifiers that may hang.

The worker is spawned, so it shares nothing with its parent, and it is replaced after a call that hung or that it did
not survive. It ends with its parent: idle, when the pipe closes; busy, by an alarm of the kernel, which needs no help
from Python (so the function itself may not use SIGALRM).
"""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_GRACE = 5.0  # seconds that a worker which has closed its pipe may take to end
_SPARE = 5.0  # seconds after the limit when a worker ends itself, if nobody has ended it


class Isolated:
    """`function(*args)`, run elsewhere; use it in a `with`, which leaves no worker behind."""

    def __init__(self, function: Callable[..., Any], *, limit: float) -> None:
        """`function` must be importable by name, `limit` is in seconds. Raises ValueError for limit <= 0."""
        if not limit > 0:
            raise ValueError(f"received limit {limit}, expected limit > 0")
        self.function, self.limit = function, limit
        self._worker: BaseProcess | None = None

    def __enter__(self) -> "Isolated":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, *args: Any) -> Any:
        """What the function returns or raises. TimeoutError after the limit, RuntimeError if it ended its process.

        A new worker's start, seconds of imports, does not count against the limit.
        """
        try:
            if self._worker is None:
                self._start()
            self._pipe.send(args)
            if not self._pipe.poll(self.limit):
                raise TimeoutError(f"{self.function.__name__} took longer than its limit of {self.limit} seconds")
            returned, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._worker.join(_GRACE)
            raise RuntimeError(f"{self.function.__name__} ended its process, exit code {self.close()}") from None
        except BaseException:  # an interrupt too: else the next call would read this one's answer
            self.close()
            raise
        if not returned:
            raise value
        return value

    def close(self) -> int | None:
        """End the worker, if there is one, and return its exit code; a later call starts another."""
        if self._worker is None:
            return None
        self._pipe.close()
        self._worker.kill()
        self._worker.join()
        code, self._worker = self._worker.exitcode, None
        return code

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        worker = context.Process(target=_serve, args=(other, self.function, self.limit + _SPARE), daemon=True)
        worker.start()
        self._worker = worker
        other.close()  # else the end of the worker would not end the pipe
        self._pipe.recv()


def _serve(pipe: Connection, function: Callable[..., Any], alarm: float) -> None:
    """Answer one call after the other, until the pipe closes."""
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            args = pipe.recv()
            signal.setitimer(signal.ITIMER_REAL, alarm)
            try:
                result = (True, function(*args))
            except Exception as error:
                result = (False, error)
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(result)
