"""Where things lie, all from this file, so that no notebook or stage depends on its working directory."""

import builtins
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
NOTEBOOKS = ROOT / "notebooks"
PARAMS = ROOT / "params"
RESULTS = ROOT / "results"
RUNNER = "LIMBECK_RUNNER"  # set in the kernels that `workflow.notebooks` starts


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """What matches in a folder, sorted, but for hidden files and folders: what editors and systems leave is no data."""
    matching = (path for path in folder.glob(pattern) if "/." not in f"/{path.relative_to(folder).as_posix()}")
    return sorted(matching)


def by_hand() -> bool:
    """Whether this is a notebook that the runner did not start: it shows, and leaves results/ alone."""
    return hasattr(builtins, "get_ipython") and RUNNER not in os.environ
