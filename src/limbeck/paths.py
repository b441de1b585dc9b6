"""Where things lie, all from this file, so that no notebook or stage depends on its working directory.

And how JSON and YAML are read: as data alone, and strictly, so that a file that was cut or written by a stranger is an
error with its path.
"""

import builtins
import json
import math
import os
from collections.abc import Hashable
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


def by_hand() -> bool:
    """Whether this is a notebook that the runner did not start: it shows, and leaves results/ alone."""
    return hasattr(builtins, "get_ipython") and RUNNER not in os.environ
