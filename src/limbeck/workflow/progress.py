"""`dvc repro` that says at which stage of how many it is and about how long the rest takes, for `make reproduce`.

`python -m limbeck.workflow.progress default` first trains what was not trained in this tree, though DVC calls the
records of a clone up to date; records of `full` are taken as they are committed. A stage's seconds are those of the
published run, by its provenance, times what the stages that have ended took here, by theirs.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from limbeck import paths, records
from limbeck.workflow import stages

_STAGE = re.compile(r"(Running stage|Stage) '(?:[^']*:)?([^']+)'")


def repro(profile: str) -> Iterator[str]:
    """Bring a profile up to date; the lines of DVC, and one above each stage. Exits as DVC does where it fails."""
    target = "pipelines/full/dvc.yaml" if profile == "full" else "dvc.yaml"
    first = [] if profile == "full" else untrained(profile)
    changed = {name.rpartition(":")[2] for name in json.loads("".join(_dvc("status", "--json", target)))}
    forced = _dvc("repro", "--force", "--single-item", *first) if first else ()
    lines = chain(_dvc("repro", "digests"), forced, _dvc("repro", target))
    yield from report(lines, planned(changed.union(first), profile))


def untrained(profile: str) -> list[str]:
    """The stages with records of which this tree's own checkpoints do not come."""
    names = []
    for paper in stages.papers():
        for experiment in stages.experiments(paper, profile):
            file = paths.DATA / "checkpoints" / profile / paper / experiment / "settled.json"
            settled = paths.read_json(file) if file.is_file() else []
            runs = records.read_by_cell(records.path(paper, experiment, profile)).values()
            if not {run["hash"] for run in runs} <= set(settled):
                names.append(f"{paper}-{experiment}-train")
    return names


def planned(run: set[str], profile: str) -> dict[str, float]:
    """The stages that run, and the exhibits that may have to after them, with the seconds of the published run."""
    seconds = dict.fromkeys(sorted(run), 0.0)
    for paper in stages.papers():
        for experiment in stages.experiments(paper, profile):
            train = f"{paper}-{experiment}-train"
            readers = [f"{paper}-{path.stem}" for path in stages.exhibits(paper, experiment)]
            for stage in [train, *readers] if train in run else run.intersection(readers):
                name = stage.removeprefix(f"{paper}-")
                file = paths.RESULTS / profile / "provenance" / paper / f"{name}.json"
                seconds[stage] = paths.read_json(file)["seconds"] if file.is_file() else 0.0
    return seconds


def report(lines: Iterable[str], seconds: dict[str, float], now: Callable[[], float] = time.monotonic) -> Iterator[str]:
    """The lines of DVC but those on what it skips, and above each stage its number and how long is to go with it."""
    left, total, running = dict(seconds), len(seconds), None
    here = published = since = 0.0
    for line in lines:
        if match := _STAGE.match(line):
            if running:
                here, published = here + now() - since, published + seconds.get(running, 0.0)
            name, running = match[2], None
            took = left.pop(name, 0.0)
            if match[1] == "Stage":
                continue
            total += name not in seconds
            rate, running, since = here / published if published else 1.0, name, now()
            minutes = max(1, round(rate * (took + sum(left.values())) / 60))
            yield f"\nStage {total - len(left)} of {total}, {name}: about {minutes} min to go\n"
        yield line


def _dvc(*arguments: str) -> Iterator[str]:
    command = [sys.executable, "-m", "dvc", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=paths.ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        yield from process.stdout
    if process.returncode:
        sys.exit(process.returncode)


if __name__ == "__main__":
    try:
        for line in repro(sys.argv[1]):
            sys.stdout.write(line)
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
