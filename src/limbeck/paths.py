"""Where things lie, all from this file, so that no notebook or stage depends on its working directory.

And how JSON and YAML are read: as data alone, and strictly, so that a file that was cut or written by a stranger is an
error with its path.
"""

import builtins
import contextlib
import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

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


def parse_json(text: str | bytes) -> Any:
    """The content of a JSON text. Raises ValueError for another text, a key that comes twice, NaN and Infinity."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_refused)
    except RecursionError:
        raise ValueError("expected JSON, got more brackets in each other than can be read") from None


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises ValueError, with the path, where `parse_json` does."""
    try:
        return parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got what cannot be read: {error}") from None


def read_yaml(file: Path) -> Any:
    """The content of a YAML file. Raises ValueError, with the path, as for JSON."""
    try:
        return yaml.load(file.read_text(encoding="utf-8"), _Strict)
    except (RecursionError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: expected YAML, got what cannot be read: {error}") from None


def _once(pairs: list[tuple[Hashable, Any]]) -> dict[Hashable, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} comes twice, expected once")
    return content


def _refused(value: str) -> None:
    raise ValueError(f"received {value}, expected a finite number")


class _Strict(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        _once([(self.construct_object(key, deep=True), None) for key, _ in node.value])
        return super().construct_mapping(node, deep)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        value = super().construct_yaml_float(node)
        return value if math.isfinite(value) else _refused(node.value)


_Strict.add_constructor("tag:yaml.org,2002:float", _Strict.construct_yaml_float)


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
