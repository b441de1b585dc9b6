"""Are these the published results? `python -m limbeck.workflow.compare` sets every record and exhibit beside HEAD's.

`--against REV` compares with another commit. Neither hashes, provenance and wording nor what `make bench` timed are
compared. A verdict that is another makes the exit status 1; numbers that moved do not: they do on another processor.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from limbeck import paths
from limbeck.workflow import trees

TOLERANCE = 1e-5  # relative: the last digits of another processor
_SKIPPED = ("bench", "smoke")
_MEASURED = ("metrics", "curve", "trainable_parameters", "dtype")
_ESTIMATE = ("mean", "low", "high")
KINDS = (
    IDENTICAL := "identical",
    CLOSE := f"the same within a relative {TOLERANCE:g}",
    INSIDE := "other estimates, all inside the published intervals, with the same verdicts",
    OUTSIDE := "other estimates, some outside the published intervals, with the same verdicts",
    NUMBERS := "other numbers",
    ABSENT := "published, and not here",
    NEW := "here, and not published",
    VERDICT := "another verdict",
)


def compare(against: str) -> tuple[Counter, list[str]]:
    """How many records and exhibits are of which kind, by (what, kind), and each verdict that is another."""
    published = _units(trees.git("ls-tree", "-r", "--name-only", against, "results").split(), _at(against))
    files = (file.relative_to(paths.ROOT).as_posix() for file in paths.visible(paths.RESULTS, "**/*.json*"))
    here = _units(files, lambda name: (paths.ROOT / name).read_text(encoding="utf-8"))
    counts, changed = Counter(), []
    for name in sorted(published.keys() | here.keys()):
        one, other = here.get(name, {}), published.get(name, {})
        counts["exhibit" if "verdicts" in one | other else "record", kind(one, other)] += 1
        if one and other:
            changed += [
                f"{name}, {claim}: {one['verdicts'].get(claim)}; published: {other['verdicts'].get(claim)}"
                for claim in sorted(one.get("verdicts", {}).keys() | other.get("verdicts", {}).keys())
                if one["verdicts"].get(claim) != other["verdicts"].get(claim)
            ]
    return counts, changed


def kind(here: dict[str, Any], published: dict[str, Any]) -> str:
    """Which of `KINDS` a record or an exhibit is, beside the published one; an empty one is not there."""
    if not here or not published:
        return NEW if here else ABSENT
    if here == published:
        return IDENTICAL
    if _is_close(here, published):
        return CLOSE
    if "verdicts" not in published:
        return NUMBERS
    if here["verdicts"] != published["verdicts"]:
        return VERDICT
    pairs = [(here["estimates"].get(name), estimate) for name, estimate in published["estimates"].items()]
    return INSIDE if all(new and _is_inside(new[0], *old) for new, old in pairs) else OUTSIDE


def _units(files: Iterable[str], read: Callable[[str], str]) -> dict[str, dict[str, Any]]:
    """What is compared of the records and exhibits among some files, each by its name."""
    units: dict[str, dict[str, Any]] = {}
    for file in files:
        folder, _, suffix = file.removeprefix("results/").rpartition(".")
        if folder.count("/") != 2 or folder.startswith(_SKIPPED):
            continue
        if suffix == "json":
            units[folder] = _exhibit(json.loads(read(file)))
        elif suffix == "jsonl":
            runs = map(json.loads, read(file).splitlines())
            units |= {f"{folder} {sorted(run['cell'].items())}": {key: run[key] for key in _MEASURED} for run in runs}
    return units


def _exhibit(content: dict[str, Any]) -> dict[str, Any]:
    """Each estimate, (mean, low, high) by what it is of, and each verdict by its claim."""
    left_out = {*_ESTIMATE, "level", "count"}
    rows = {
        str(sorted((key, value) for key, value in row.items() if key not in left_out)): [row[key] for key in _ESTIMATE]
        for row in content["table"]
    }
    claims = {claim["id"]: [claim["ours"], *(claim["interval"] or (None, None))] for claim in content["claims"]}
    return {"estimates": rows | claims, "verdicts": {claim["id"]: claim["verdict"] for claim in content["claims"]}}


def _is_inside(mean: float | None, published: float | None, low: float | None, high: float | None) -> bool:
    if mean is None or low is None or high is None:
        return _is_close(mean, published)
    return low <= mean <= high or _is_close(mean, published)


def _is_close(one: Any, other: Any) -> bool:
    """Whether two contents differ by no more than the last digits of their numbers."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_close, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-9)
    return one == other


def _at(commit: str) -> Callable[[str], str]:
    return lambda name: trees.git("show", f"{commit}:{name}")


def _main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m limbeck.workflow.compare", description="Compare with what git has."
    )
    parser.add_argument("--against", default="HEAD", metavar="REV", help="the commit with the published results")
    against = parser.parse_args(arguments).against
    if not (paths.ROOT / ".git").exists():
        sys.stdout.write("compare: this tree has no git history to compare with; a clone of the repository has\n")
        return 0
    try:
        counts, changed = compare(against)
    except ValueError as error:
        parser.error(str(error))
    for name in KINDS:
        found = {what: counts[what, name] for what in ("record", "exhibit") if counts[what, name]}
        if found:
            listed = ", ".join(f"{count} {what}{'s' * (count > 1)}" for what, count in found.items())
            sys.stdout.write(f"{listed}: {name}\n")
    sys.stdout.writelines(f"  {line}\n" for line in changed)
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
