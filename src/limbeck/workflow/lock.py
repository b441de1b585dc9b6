"""Write into dvc.lock what stands: `python -m limbeck.workflow.lock`, after a reseal or where records await a training.

`dvc commit` would take all that lies there. Here a stage of an experiment whose records are of other code, and not
listed as awaiting a training, keeps its entry, and so do an exhibit that was drawn by other code or from other claims,
and metrics that are not of today's exhibits: DVC goes on to call them changed.
"""

import functools
import json
import sys
from itertools import groupby
from pathlib import PurePosixPath

from dvc.repo import Repo
from dvc.stage import Stage

from limbeck import digests, paths, records
from limbeck.experiments.ledger import Ledger
from limbeck.workflow import metrics, stages


def write() -> None:
    """Renew the entries of both pipelines. Raises ValueError if digests.json is not of this code."""
    if json.loads(digests.FILE.read_text()) != digests.everything():
        raise ValueError(
            f"expected {digests.FILE.name} of this code, got an older one: run `python -m limbeck.digests`"
        )
    with Repo(str(paths.ROOT)) as repo, repo.lock:
        for file, listed in groupby(repo.index.stages, key=lambda stage: stage.dvcfile):
            saved = [stage for stage in listed if is_settled(stage)]
            for stage in saved:
                stage.save(allow_missing=True, run_cache=False)
            file.dump_stages(saved, update_pipeline=False)


def is_settled(stage: Stage) -> bool:
    """Whether the records that a stage writes or reads stand, and the exhibit that it draws is of this code."""
    if stage.name == "metrics":
        (profile,) = {PurePosixPath(out.def_path).parts[1] for out in stage.outs}
        return all(file.is_file() and file.read_text() == text for file, text in metrics.texts(profile).items())
    files = [PurePosixPath(item.def_path) for item in (*stage.outs, *stage.deps)]
    measured = ["/".join([*file.parts[-3:-1], file.stem]) for file in files if file.suffix == ".jsonl"]
    exhibits = [PurePosixPath(out.def_path) for out in stage.outs if out.def_path.startswith("results/")]
    drawn = [file.parts[-3:] for file in exhibits if file.suffix == ".json"]
    return all(map(stands, measured)) and all(is_drawn(profile, paper, name) for profile, paper, name in drawn)


@functools.cache
def stands(name: str) -> bool:
    """Whether the records of profile/paper/experiment are of this code, or listed as awaiting a training."""
    profile, paper, experiment = name.split("/")
    return name in records.awaiting() or Ledger(paper, experiment, profile).is_of_this_code()


def is_drawn(profile: str, paper: str, name: str) -> bool:
    """Whether an exhibit was drawn by this code from these claims; its records' hashes may have been renewed since."""
    provenance = paths.RESULTS / profile / "provenance" / paper / name
    told = json.loads(provenance.read_text())["inputs"] if provenance.is_file() else {}
    inputs = stages.inputs((paths.NOTEBOOKS / paper / name).with_suffix(".ipynb"), {"profile": profile})
    return all(told.get(key) == value for key, value in inputs.items() if not key.endswith(".jsonl"))


if __name__ == "__main__":
    try:
        write()
    except ValueError as error:
        sys.exit(f"limbeck.workflow.lock: {error}")
