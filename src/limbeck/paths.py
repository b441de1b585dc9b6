"""Where things lie, all from this file, so that no notebook or stage depends on its working directory."""

import builtins
import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
NOTEBOOKS = ROOT / "notebooks"
PARAMS = ROOT / "params"
RESULTS = ROOT / "results"
RUNNER = "LIMBECK_RUNNER"  # set in the kernels that `workflow.notebooks` starts


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary name beside a file, renamed to it at the end: it is written whole or not at all.

    What killed processes left under such names goes first. Raises OSError, with the file and a remedy, where the disk
    is full or read-only.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        clear(file.parent, file.name)
        yield temporary
        os.replace(temporary, file)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        remedy = "nothing was changed; make room for it, or let it be written, and run again"
        raise OSError(error.errno, f"{error.strerror}: {remedy}", str(file)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch(folder: Path, name: str) -> Iterator[Path]:
    """A temporary folder inside another; those that killed processes left under the same name go first."""
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder, name)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.{os.getpid()}.") as temporary:
        yield Path(temporary)


def clear(folder: Path, name: str) -> None:
    """Delete the temporary files and folders of a name whose process, told in theirs, is gone."""
    for left in folder.glob(".*"):
        match = re.fullmatch(rf"\.{re.escape(name)}\.(\d{{1,9}})(\..+)?", left.name)
        if match and not _runs(int(match[1])):
            with contextlib.suppress(OSError):  # another process may clear too
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def by_hand() -> bool:
    """Whether this is a notebook that the runner did not start: it shows, and leaves results/ alone."""
    return hasattr(builtins, "get_ipython") and RUNNER not in os.environ
