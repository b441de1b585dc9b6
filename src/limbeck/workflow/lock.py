"""Write into dvc.lock what stands: `python -m limbeck.workflow.lock`, after a reseal or where records await a training.

`dvc commit` would ask for checkpoints, which a clone does not have, and copy the assets to its cache. What is missing
keeps the checksum that it had. Whether records stand is the ledger's to say; this only tells DVC.
"""

from itertools import groupby

from dvc.repo import Repo

from limbeck import paths


def write() -> None:
    """Renew the entries of every stage of both pipelines."""
    with Repo(str(paths.ROOT)) as repo, repo.lock:
        for file, stages in groupby(repo.index.stages, key=lambda stage: stage.dvcfile):
            saved = list(stages)
            for stage in saved:
                stage.save(allow_missing=True, run_cache=False)
            file.dump_stages(saved, update_pipeline=False)


if __name__ == "__main__":
    write()
