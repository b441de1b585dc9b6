"""Renew the hashes of records whose code changed and whose numbers did not: shown on this machine, to the bit.

`python -m limbeck.workflow.reseal [--against COMMIT] [paper/experiment ...]`, or `make reseal` for all. The code of
the records' commit, in a temporary worktree, and today's run side by side (`probe`): every cell of the smoke section
whole, and one cell of each phase of the records' own section for its first steps, measured once. Where all that they
measure and leave is equal, moments of the optimiser included, the experiment's hashes are renewed, and its provenance
says so. Where not, the cells are named, and nothing of that experiment is renewed. What was found equal stands in
data/resume/reseal.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck import paths, records
from limbeck.experiments.ledger import Ledger
from limbeck.workflow import notebooks, probe, stages, trees

FIRST = 10  # steps of a cell of the records' own section
_PROFILES = ("default", "full")
_RESUME = paths.DATA / "resume" / "reseal"
Record = dict[str, Any]


@dataclass(frozen=True)
class Sealed:
    """An experiment, its ledger by today's code, and its records, by the names of their cells."""

    paper: str
    experiment: str
    profile: str
    ledger: Ledger
    records: dict[str, Record]

    @property
    def renewed(self) -> dict[str, str]:
        """The hash by today's code of every record that does not stand."""
        hashes = {probe.spelled(cell.coordinates): self.ledger.hash(cell) for cell in self.ledger.cells}
        return {name: hashes[name] for name, record in self.records.items() if record["hash"] != hashes[name]}

    def __str__(self) -> str:
        """Where its records lie under results."""
        return f"{self.profile}/{self.paper}/{self.experiment}"


def main(arguments: list[str]) -> int:
    """Reseal the named experiments, or all; the exit status is 1 if one was not."""
    options = argparse.ArgumentParser(prog="limbeck.workflow.reseal")
    options.add_argument("--against", help="a commit whose code gives the hashes that the records have")
    options.add_argument("experiments", nargs="*", help="paper/experiment; all of them if none is named")
    given = options.parse_args(arguments)
    against = given.against and trees.git("rev-parse", f"{given.against}^{{commit}}")
    if modified := trees.git("status", "--porcelain", "--", "src", "params", "params.yaml"):
        raise ValueError(f"received changes that are in no commit, expected none, since one is named:\n{modified}")
    done = True
    with contextlib.ExitStack() as stack:
        tree_of = functools.cache(lambda commit: stack.enter_context(trees.worktree(commit)))
        for sealed in _sealed(given.experiments):
            done = _reseal(sealed, against, tree_of) and done
    return 0 if done else 1


def _sealed(names: list[str]) -> Iterator[Sealed]:
    """The experiments with records that do not stand, but those that await a training."""
    known = [(profile, p, e) for profile in _PROFILES for p in stages.papers() for e in stages.experiments(p, profile)]
    if unknown := sorted(set(names) - {f"{paper}/{experiment}" for _, paper, experiment in known}):
        raise ValueError(f"received {', '.join(unknown)}, expected paper/experiment")
    for profile, paper, experiment in known:
        if names and f"{paper}/{experiment}" not in names:
            continue
        ledger = Ledger(paper, experiment, profile)
        sealed = Sealed(paper, experiment, profile, ledger, read_records(ledger))
        if sealed.renewed and str(sealed) in records.awaiting():
            _say(sealed, "awaits a training, skipped")
        elif sealed.renewed:
            yield sealed


def _reseal(sealed: Sealed, against: str | None, tree_of: Any) -> bool:
    """Compare one experiment and renew it, or say why not; whether it was renewed."""
    started = time.monotonic()
    faults = changed_parameters(sealed)
    commit = None if faults else _commit(sealed, against, tree_of)
    cells = {"smoke": [], "real": []}
    if not faults and commit is None:
        faults = ["no known commit gives the hashes that its records have; name one by --against COMMIT"]
    for kind, request in requests(sealed).items() if not faults else ():
        reports = _compared(request, sealed, commit, tree_of)
        cells[kind] = sorted(reports["today"])
        faults += trees.differences(reports["then"], reports["today"])
        faults += other_dtypes(sealed, reports["today"]) if kind == "real" else []
    for fault in faults:
        _say(sealed, fault)
    spent = f"{time.monotonic() - started:.0f} s"
    if faults:
        _say(sealed, f"nothing renewed ({spent})")
        return False
    _renew(sealed, commit, cells)
    _say(sealed, f"{len(cells['smoke'])} + {len(cells['real'])} cells equal, renewed ({spent})")
    return True


def _say(sealed: Sealed, what: str) -> None:
    sys.stdout.write(f"{sealed}: {what}\n")
    sys.stdout.flush()


def changed_parameters(sealed: Sealed) -> list[str]:
    """The cells whose hash changed since their parameters did: no code can show that their numbers are the same."""
    inputs = {probe.spelled(cell.coordinates): json.loads(json.dumps(cell.inputs)) for cell in sealed.ledger.cells}
    return [
        f"{name}: its parameters changed" for name in sealed.renewed if sealed.records[name]["params"] != inputs[name]
    ]


def _commit(sealed: Sealed, against: str | None, tree_of: Any) -> str | None:
    """The commit whose code gives the hashes that the records have: of a reseal, of their training, or their own."""
    provenance = _provenance(sealed)
    candidates = [entry["today"] for entry in reversed(provenance.get("resealed", []))]
    candidates += [provenance.get("commit", ""), trees.git("log", "-1", "--format=%H", "--", f"results/{sealed}.jsonl")]
    for commit in dict.fromkeys([against] if against else candidates):
        if trees.is_commit(commit) and _hashes_match(sealed, tree_of(commit)):
            return commit
    return None


def _hashes_match(sealed: Sealed, tree: Path) -> bool:
    """Whether the code of a tree gives every record that does not stand the hash that it has."""
    with tempfile.TemporaryDirectory() as folder:
        request = {**_names(sealed), "kind": "hashes", "folder": folder}
        (status,) = trees.run({"then": (tree, request)}).values()
        if status:
            return False
        hashes = json.loads(Path(folder, "hashes.json").read_text())
    return all(hashes.get(name) == sealed.records[name]["hash"] for name in sealed.renewed)


def requests(sealed: Sealed) -> dict[str, Record]:
    """`smoke`: every cell of the smoke section, whole; `real`: the chosen cells of the records' own section, after the
    committed records of the waves before theirs.

    The older code runs in float32 where all records are of it: that `precision: auto` meant other things on other
    processors then is no change of theirs.
    """
    low = any(record["dtype"] == "bfloat16" for record in sealed.records.values())
    shared = {**_names(sealed), "kind": "run", "precision": {"then": None if low else "float32", "today": None}}
    real = {"first": FIRST, "cells": chosen_cells(sealed), "records": [*sealed.records.values()]}
    return {
        "smoke": {**shared, "profile": "smoke", "first": None, "cells": None, "records": None},
        "real": {**shared, **real},
    }


def _names(sealed: Sealed) -> Record:
    return {"paper": sealed.paper, "experiment": sealed.experiment, "profile": sealed.profile}


def chosen_cells(sealed: Sealed) -> list[str]:
    """One cell for each phase, by wave and dtype, trained or not: the one whose curve tells most, the first of equals.

    Where there are no phases, axes stand for them, and where there are no axes, arms. Then the first cell of each text
    among the coordinates (an arm, a model, a task) that neither these nor the cells of the smoke section have.
    """
    groups: dict[tuple, list[str]] = collections.defaultdict(list)
    texts: dict[str, set[tuple[str, str]]] = {}
    for cell in sealed.ledger.cells:
        name = probe.spelled(cell.coordinates)
        if name in sealed.records:
            coordinates, record = cell.coordinates, sealed.records[name]
            phase = coordinates.get("phase", coordinates.get("axis", coordinates.get("arm")))
            groups[probe.wave(cell), phase, record["dtype"], bool(record["curve"])].append(name)
            texts[name] = _texts(coordinates)
    chosen = [max(names, key=lambda name: len(sealed.records[name]["curve"])) for names in groups.values()]
    smoke = Ledger(sealed.paper, sealed.experiment, "smoke").cells
    seen = set().union(*(_texts(cell.coordinates) for cell in smoke), *(texts[name] for name in chosen))
    for name, own in texts.items():
        if own - seen:
            chosen.append(name)
            seen |= own
    return chosen


def _texts(coordinates: dict[str, Any]) -> set[tuple[str, str]]:
    return {(name, value) for name, value in coordinates.items() if isinstance(value, str)}


def _compared(request: Record, sealed: Sealed, commit: str, tree_of: Any) -> dict[str, dict[str, Record]]:
    """What both codes report of a request's cells, `then` and `today`; where it was found equal before, the dtypes."""
    ledger = Ledger(sealed.paper, sealed.experiment, request["profile"])
    content = [commit, [ledger.hash(cell) for cell in ledger.cells], request, Path(probe.__file__).read_text()]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    memory, folder = _RESUME / f"{key}.json", _RESUME / key
    if memory.is_file():
        return dict.fromkeys(("then", "today"), json.loads(memory.read_text()))
    sides = {"then": tree_of(commit), "today": paths.ROOT}
    asks = {side: request | {"precision": request["precision"][side], "folder": str(folder / side)} for side in sides}
    status = trees.run({side: (tree, asks[side]) for side, tree in sides.items()})
    if any(status.values()):
        raise ValueError(f"{sealed}: received the exit statuses {status} from the probes, expected 0")
    reports = {side: trees.reports(folder / side) for side in sides}
    if not trees.differences(**reports):
        dtypes = {name: {"dtype": report["dtype"]} for name, report in reports["today"].items()}
        records.replace_text(memory, json.dumps(dtypes, indent=1) + "\n")
        shutil.rmtree(folder)
    return reports


def other_dtypes(sealed: Sealed, today: dict[str, Record]) -> list[str]:
    """The compared cells whose matrices would be multiplied in another dtype than their records'."""
    changed = []
    for name, record in sealed.records.items():
        report = today.get(f"{sealed.experiment}/{name}", {})
        if report.get("dtype", record["dtype"]) != record["dtype"]:
            changed.append(f"{name}: {record['dtype']} in its record, {report['dtype']} today")
    return changed


def _renew(sealed: Sealed, commit: str, cells: dict[str, list[str]]) -> None:
    """Say in provenance what was compared, then renew settled.json, then the records: a kill in between is made good
    by the next call.
    """
    provenance, today = _provenance(sealed), trees.git("rev-parse", "HEAD")
    entry = {"records": commit, "today": today, "cells": cells, "machine": notebooks.machine()}
    before = [past for past in provenance.get("resealed", []) if past["today"] != today]
    provenance["resealed"] = [*before, entry]
    records.replace_text(_provenance_file(sealed), json.dumps(provenance, indent=1, sort_keys=True) + "\n")
    renewed = {sealed.records[name]["hash"]: new for name, new in sealed.renewed.items()}
    sealed.ledger.renew(renewed)


def _provenance_file(sealed: Sealed) -> Path:
    return paths.RESULTS / sealed.profile / "provenance" / sealed.paper / f"{sealed.experiment}-train.json"


def _provenance(sealed: Sealed) -> Record:
    file = _provenance_file(sealed)
    return json.loads(file.read_text()) if file.is_file() else {}


def read_records(ledger: Ledger) -> dict[str, Record]:
    """The records of a ledger's cells, by the names of the cells."""
    measured = ledger.measured()
    record_of = {probe.spelled(c.coordinates): measured.get(records.cell_key(c.coordinates)) for c in ledger.cells}
    return {name: record for name, record in record_of.items() if record}


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"limbeck.workflow.reseal: {error}")
