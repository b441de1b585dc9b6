"""Write into dvc.lock what stands: `python -m limbeck.workflow.lock`, after a reseal or where records await a training.

`dvc commit` would ask for checkpoints, which a clone does not have, and copy the assets to its cache. What is missing
keeps the checksum that it had. A stage of an experiment whose records are of other code, and not listed as awaiting a
training, keeps its entry, and so do its exhibits: DVC goes on to call them changed.
"""

import functools
from itertools import groupby
from pathlib import PurePosixPath

from dvc.repo import Repo
from dvc.stage import Stage

from limbeck import paths, records
from limbeck.experiments.ledger import Ledger


def write() -> None:
    """Renew the entries of both pipelines."""
    with Repo(str(paths.ROOT)) as repo, repo.lock:
        for file, stages in groupby(repo.index.stages, key=lambda stage: stage.dvcfile):
            saved = [stage for stage in stages if all(map(stands, measured_by(stage)))]
            for stage in saved:
                stage.save(allow_missing=True, run_cache=False)
            file.dump_stages(saved, update_pipeline=False)


def measured_by(stage: Stage) -> list[str]:
    """The experiments, profile/paper/experiment, whose records a stage writes or reads."""
    files = [PurePosixPath(item.def_path) for item in (*stage.outs, *stage.deps)]
    return ["/".join([*file.parts[-3:-1], file.stem]) for file in files if file.suffix == ".jsonl"]


@functools.cache
def stands(name: str) -> bool:
    """Whether an experiment's records are of this code, or listed as awaiting a training."""
    profile, paper, experiment = name.split("/")
    return name in records.awaiting() or Ledger(paper, experiment, profile).is_of_this_code()


if __name__ == "__main__":
    write()
