"""Experiments whose records are of earlier code, and wait for a training: data/awaiting.yaml.

Each entry, named profile/paper/experiment, has the `commit` whose code made its records and the `reason` why no reseal
can renew them.
"""

from typing import Any

import yaml

from limbeck import paths


def listed() -> dict[str, dict[str, Any]]:
    """The entries of data/awaiting.yaml. Raises ValueError for one that has not just a commit and a reason."""
    file = paths.DATA / "awaiting.yaml"
    entries = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}
    for name, entry in entries.items():
        if name.count("/") != 2 or not isinstance(entry, dict) or set(entry) != {"commit", "reason"}:
            raise ValueError(f"{file}: expected profile/paper/experiment with commit and reason, got {name}: {entry}")
    return entries


def line(paper: str, experiment: str, profile: str) -> str:
    """What an exhibit says of records that await a training; nothing of others."""
    entry = listed().get(f"{profile}/{paper}/{experiment}")
    if entry is None:
        return ""
    return f"The records of {experiment} are of earlier code (commit {entry['commit']}): {entry['reason']}.\n"
