"""Records: what runs measured, one file per experiment with one line per cell; the only bridge to the notebooks.

A record holds compared fields only, so that the same cell run twice gives the same bytes. Times, versions and hosts
are left out on purpose. `pandas.read_json(path, lines=True)` reads a file too. An exhibit is the second kind of file:
claims with their verdicts, and the table shown.
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from limbeck import params, paths

TYPES = {
    "paper": str,
    "experiment": str,
    "cell": dict,
    "profile": str,
    "hash": str,
    "params": dict,
    "metrics": dict,
    "curve": dict,
    "trainable_parameters": int,
    "dtype": str,
}


def cell_name(cell: Mapping[str, Any]) -> str:
    """Name of a cell: `arm=kl,seed=0`, coordinates in the order given.

    Raises ValueError for an empty cell or for a character that could be taken for another part of the name.
    """
    for name, value in cell.items():
        if not isinstance(value, str | int | float) or not re.fullmatch(r"\w+", str(name), re.ASCII):
            raise ValueError(f"a coordinate is a word with a string or a number, got {name!r}: {value!r}")
        if not re.fullmatch(r"[A-Za-z0-9_.+-]+", str(value)):
            raise ValueError(f"coordinate {name!r} may hold letters, digits, '_', '.', '+' and '-', got {value!r}")
    if not cell:
        raise ValueError("a cell needs at least one coordinate, such as {'arm': 'kl', 'seed': 0}, got none")
    return ",".join(f"{name}={value}" for name, value in cell.items())


def cell_key(cell: Mapping[str, Any]) -> frozenset:
    """What tells cells apart, whatever the order of their coordinates."""
    return frozenset(cell.items())


def path(paper: str, experiment: str, profile: str) -> Path:
    """The file with the records of an experiment."""
    return _place(paper, f"{experiment}.jsonl", profile)


def _place(*parts: str) -> Path:
    """A file under results/. Raises ValueError for a name that would lead elsewhere."""
    paper, name, profile = parts
    if odd := [part for part in parts if not re.fullmatch(r"\w[\w.+-]*", part)]:
        raise ValueError(f"received {odd[0]!r} as a part of a path, expected letters, digits and any of _ . + -")
    return paths.RESULTS / profile / paper / name


def write(file: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Write the records of an experiment in the order given, one line each, whole or not at all.

    Keys are sorted, but for the coordinates of the cell: their order makes its name.
    Raises ValueError, before anything is written, where a key is missing or unknown, a value has the wrong type, a
    number is not finite, or a metric has no namespace.
    """
    for run in runs:
        _check(run, "record")
    replace_text(file, "".join(map(_line, runs)))


def read_by_cell(file: Path) -> dict[frozenset, dict[str, Any]]:
    """The records in one file by `cell_key`, in its order; none if there is no file.

    Raises ValueError, naming file and line, if a line is torn or no record, repeats a cell, or belongs to another file.
    """
    runs: dict[frozenset, dict[str, Any]] = {}
    home = "/".join([*file.parts[-3:-1], file.stem])
    for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else (), start=1):
        try:
            run = paths.parse_json(line)
            _check(run, "record")
            if (owner := "/".join([run["profile"], run["paper"], run["experiment"]])) != home:
                raise ValueError(f"expected a record of {home}, got one of {owner}")
            if runs.setdefault(cell_key(run["cell"]), run) is not run:
                raise ValueError(f"expected one line per cell, got {cell_name(run['cell'])} again")
        except (RecursionError, ValueError) as error:  # json's and unicode's errors are ValueErrors too
            raise ValueError(f"{file}, line {number}: {error}; delete it and run the experiment again") from None
    return runs


def read(paper: str, experiment: str, profile: str) -> list[dict[str, Any]]:
    """Every record of one experiment, by the names of its cells: reordering cells changes no last bit of a mean.

    Says in a line where they are of earlier code. Raises ValueError, with the command that makes them or the profiles
    that exist, if there is none.
    """
    file = path(paper, experiment, profile)
    sys.stdout.write(awaiting_line(paper, experiment, profile))
    runs = sorted(read_by_cell(file).values(), key=lambda run: cell_name(run["cell"]))
    if not runs:
        raise ValueError(missing(paper, experiment, profile))
    return [run | {"cell": dict(sorted(run["cell"].items()))} for run in runs]


def missing(paper: str, experiment: str, profile: str) -> str:
    """What to do about records that are not there. Raises ValueError for an experiment or a profile that is not."""
    params.layers(paper, experiment, profile)
    train = f"notebooks/{paper}/train.ipynb experiment={experiment} profile={profile}"
    command = {"default": "make reproduce", "full": "make full"}.get(
        profile, f"python -m limbeck.workflow.notebooks {train}"
    )
    return f"expected records in {path(paper, experiment, profile)}, got none; `{command}` makes them"


def awaiting() -> dict[str, dict[str, Any]]:
    """The experiments whose records are of earlier code and wait for a training: the entries of data/awaiting.yaml.

    Each, named profile/paper/experiment, has the `commit` whose code made its records, and the `reason` why no reseal
    can renew them. Raises ValueError for one of another form.
    """
    file = paths.DATA / "awaiting.yaml"
    entries = (paths.read_yaml(file) or {}) if file.is_file() else {}
    if not isinstance(entries, dict):
        raise ValueError(f"{file}: expected experiments with commit and reason, got {entries!r:.200}")
    for name, entry in entries.items():
        if str(name).count("/") != 2 or not isinstance(entry, dict) or set(entry) != {"commit", "reason"}:
            raise ValueError(f"{file}: expected profile/paper/experiment with commit and reason, got {name}: {entry}")
    return entries


def end_awaiting(name: str) -> None:
    """Take an experiment, profile/paper/experiment, off data/awaiting.yaml; what is not listed changes nothing."""
    file = paths.DATA / "awaiting.yaml"
    if name in (entries := awaiting()):
        head = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        rest = {other: entry for other, entry in entries.items() if other != name}
        body = yaml.safe_dump(rest, sort_keys=False, width=120) if rest else ""
        replace_text(file, "\n".join([*head, body]))


def awaiting_line(paper: str, experiment: str, profile: str) -> str:
    """What an exhibit says of records that await a training; nothing of others."""
    entry = awaiting().get(f"{profile}/{paper}/{experiment}")
    if entry is None:
        return ""
    return f"The records of {experiment} are of earlier code (commit {entry['commit']}): {entry['reason']}.\n"


def frame(runs: Sequence[Mapping[str, Any]], replicate: str = "seed") -> pd.DataFrame:
    """Coordinates and metrics as columns; one row per record, or one per element where metrics are lists.

    The column `replicate` is the cell's own coordinate, or else counts the elements: 0, 1, 2 ...
    A number is a list of one: beside a list it stands on the first row only, so it never counts as many replicates.
    Raises ValueError if a record has lists of different lengths, or lists and a coordinate called `replicate`.
    """
    rows = []
    for run in runs:
        lists = {name: value if isinstance(value, list) else [value] for name, value in run["metrics"].items()}
        lengths = {len(value) for value in lists.values()} - {1}
        if len(lengths) > 1 or (lengths and replicate in run["cell"]):
            sizes = {name: len(value) for name, value in lists.items()}
            raise ValueError(f"expected lists of one length and no {replicate!r} in {run['cell']}, got lengths {sizes}")
        for index in range(max(lengths, default=1)):
            values = {name: value[index] for name, value in lists.items() if index < len(value)}
            rows.append({replicate: index, **run["cell"], **values})
    if not rows:
        raise ValueError("expected at least one record, got none")
    coordinates = list(dict.fromkeys(name for run in runs for name in run["cell"]))
    metrics = list(dict.fromkeys(name for run in runs for name in run["metrics"]))
    return pd.DataFrame(rows, columns=list(dict.fromkeys([*coordinates, replicate, *metrics])))


def curves(runs: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The curves of runs of a loop, one row per window: coordinates, `window`, `step` and `tokens` at its end, means.

    Only what was measured in every window has a column. Runs without a curve have no row.
    """
    rows = []
    for run in (run for run in runs if run["curve"]):
        windows, tokens = len(run["curve"]["rollout/tokens"]), 0.0
        whole = {name: values for name, values in run["curve"].items() if len(values) == windows}
        for window in range(windows):
            start = window * run["params"]["save_every"]
            step = min(start + run["params"]["save_every"], run["params"]["steps"])
            tokens += whole["rollout/tokens"][window] * (step - start)
            means = {name: values[window] for name, values in whole.items()}
            rows.append({**run["cell"], "window": window, "step": step, "tokens": tokens, **means})
    return pd.DataFrame(rows)


def write_exhibit(
    paper: str, exhibit: str, profile: str, *, claims: Sequence[Mapping[str, Any]], table: Sequence[Mapping[str, Any]]
) -> Path:
    """Write results/<profile>/<paper>/<exhibit>.json and return its path; null is allowed, NaN is not.

    A notebook run by hand writes nothing, and says so.
    """
    content = {"paper": paper, "exhibit": exhibit, "profile": profile, "claims": list(claims), "table": list(table)}
    _check_values(content, exhibit)
    file = _place(paper, f"{exhibit}.json", profile)
    if paths.by_hand():
        command = f"python -m limbeck.workflow.notebooks notebooks/{paper}/{exhibit}.ipynb profile={profile}"
        sys.stdout.write(f"Nothing was written; `{command}` writes what is shown here to results/.\n")
        return file
    replace_text(file, json.dumps(content, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return file


def read_exhibit(file: Path) -> dict[str, Any]:
    """What `write_exhibit` left. Raises ValueError, with path and remedy, for another content or another's."""
    content, remedy = paths.read_json(file), "draw it again"
    if not isinstance(content, dict) or set(content) != {"paper", "exhibit", "profile", "claims", "table"}:
        raise ValueError(f"{file}: expected an exhibit's paper, profile, claims and table, got others; {remedy}")
    if (home := [content["profile"], content["paper"], content["exhibit"]]) != [*file.parts[-3:-1], file.stem]:
        raise ValueError(f"{file}: expected its own exhibit, got that of {home}; {remedy}")
    for claim in content["claims"] if isinstance(content["claims"], list) else [content["claims"]]:
        if not isinstance(claim, dict) or not {"id", "ours", "interval", "verdict"} <= claim.keys():
            raise ValueError(
                f"{file}: expected claims with id, ours, interval and verdict, got {claim!r:.200}; {remedy}"
            )
    return content


def replace_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with paths.replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _line(run: Mapping[str, Any]) -> str:
    values = (f'"{key}": {json.dumps(run[key], sort_keys=key != "cell", allow_nan=False)}' for key in sorted(run))
    return "{" + ", ".join(values) + "}\n"


def _check(record: Any, where: str) -> None:
    if not isinstance(record, Mapping) or set(record) != set(TYPES):
        got = sorted(record) if isinstance(record, Mapping) else record
        raise ValueError(f"expected exactly the keys {', '.join(sorted(TYPES))}; got {got!r}")
    for key, kind in TYPES.items():
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            raise ValueError(f"{where}.{key} must be {kind.__name__}, got {record[key]!r}")
    _check_values(record, where)
    cell_name(record["cell"])
    if not record["metrics"]:
        raise ValueError(f"{where}.metrics must name at least one metric, got none")
    for name, value in record["metrics"].items():
        if "/" not in name:
            raise ValueError(f"{where}.metrics needs a namespace, such as eval/accuracy, got {name!r}")
        if value == [] or not _numbers(value if isinstance(value, list) else [value]):
            raise ValueError(f"{where}.metrics.{name} must be a number or a list of numbers, got {value!r}")
    for name, value in record["curve"].items():
        if not isinstance(value, list) or not _numbers(value):
            raise ValueError(f"{where}.curve.{name} must be a list of numbers, got {value!r}")


def _numbers(values: list) -> bool:
    return all(isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= sys.float_info.max for x in values)


def _check_values(value: Any, where: str) -> None:
    """Raise ValueError naming the first key path that JSON cannot hold exactly."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} must have strings as keys, got {key!r}")
            _check_values(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_values(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value!r}")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(f"{where} must be a string, a number, a list or a mapping, got {type(value).__name__}")
