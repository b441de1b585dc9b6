"""Two trees side by side: the code of a commit in a worktree of its own, a probe run by it and by today's, and what
differs between what the two report.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from limbeck import paths, records
from limbeck.workflow import probe

_SHOWN = 3  # differences of a cell that are shown
Report = dict[str, Any]


def git(*arguments: str) -> str:
    """What git answers in this tree. Raises ValueError with its complaint where it fails."""
    done = subprocess.run(["git", *arguments], cwd=paths.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def is_commit(name: str) -> bool:
    """Whether this repository has the commit."""
    command = ["git", "cat-file", "-e", f"{name}^{{commit}}"]
    return subprocess.run(command, cwd=paths.ROOT, capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A worktree of a commit, with the assets, for as long as it is needed."""
    with paths.scratch(Path(tempfile.gettempdir()), "limbeck-tree") as folder:
        git("worktree", "prune")  # a killed reseal's
        tree = folder.resolve() / commit[:12]
        git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        raw = tree / "data" / "raw"
        raw.parent.mkdir(exist_ok=True)
        raw.symlink_to((paths.DATA / "raw").resolve())
        try:
            yield tree
        finally:
            raw.unlink()
            git("worktree", "remove", "--force", str(tree))


def run(requests: dict[str, tuple[Path, Report]]) -> dict[str, int]:
    """Run the probe by the code of some trees at once; returns their exit statuses."""
    started: dict[str, subprocess.Popen] = {}
    for name, (tree, request) in requests.items():
        file = Path(request["folder"]) / "request.json"
        records.replace_text(file, json.dumps(request))
        variables = {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
        variables |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
        command = [sys.executable, "-P", probe.__file__, str(file)]
        started[name] = subprocess.Popen(command, cwd=tree, env=os.environ | variables)
    try:
        return {name: process.wait() for name, process in started.items()}
    finally:
        for process in started.values():
            process.kill()


def reports(folder: Path) -> dict[str, Report]:
    """What a probe left in its folder: a report of each cell, by experiment and cell."""
    files = sorted((folder / "cells").rglob("*.json"))
    names = [path.relative_to(folder / "cells").as_posix().removesuffix(".json") for path in files]
    return {name: json.loads(path.read_text()) for name, path in zip(names, files, strict=True)}


def differences(then: dict[str, Report], today: dict[str, Report]) -> list[str]:
    """Each cell that did not end, or of which the two differ, with the first things that do.

    Tensors of a file that are all there under other names do not differ.
    """
    lines = []
    for name in sorted(then.keys() | today.keys()):
        old, new = (_flat(side.get(name, {"error": "there is no such cell"})) for side in (then, today))
        gone, added = (_tensors(one, other) for one, other in ((old, new), (new, old)))
        same = {*gone, *added} if sorted(gone.values()) == sorted(added.values()) else set()
        parts = [part for part in sorted(old.keys() | new.keys()) if old.get(part) != new.get(part) or part == "error"]
        parts = [part for part in parts if part not in same]
        if parts:
            shown = "; ".join(f"{part}: {old.get(part)} then, {new.get(part)} today" for part in parts[:_SHOWN])
            lines.append(f"{name} differs in {len(parts)}: {shown}")
    return lines


def _tensors(one: dict[str, str], other: dict[str, str]) -> dict[str, tuple[str, str]]:
    """The tensors that have a name in one report alone: the file and group they are in, and their content."""
    lost = {part: text for part, text in one.items() if part not in other and text.startswith("torch.")}
    return {part: (part[: max(part.rfind("/"), part.rfind(" "))], text) for part, text in lost.items()}


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Every number and hash by its place, spelled so that no bit is lost."""
    if not isinstance(value, dict | list):
        return {name: value if isinstance(value, str) else repr(value)}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    start = f"{name} " if name else ""
    return {key: text for part, item in parts for key, text in _flat(item, f"{start}{part}").items()}
