"""In a copy of the tree: what moving, renaming and documenting leaves of records' hashes, and what a change does."""

import json
import re
import subprocess
import sys

import pytest

import tree

HASHES = """
import json
from limbeck import digests, params
from limbeck.experiments.ledger import Ledger

hashes = {}
for profile in ("default", "full"):
    for paper in ("kdrl", "nola", "sinkd"):
        for name in digests.experiments(paper):
            if profile in params.experiments(paper)[name]:
                ledger = Ledger(paper, name, profile)
                hashes[f"{profile}/{paper}/{name}"] = [ledger.hash(cell) for cell in ledger.cells]
print(json.dumps(hashes))
"""


def hashes(root):
    """The hash that each cell's record must carry to stand, by experiment."""
    command = [sys.executable, "-c", HASHES]
    done = subprocess.run(command, cwd=root, env=tree.environment(root), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def replace(root, old, new):
    """Write a word of the package otherwise, everywhere; returns in how many files."""
    changed = 0
    for file in (root / "src").rglob("*.py"):
        text = file.read_text()
        if (other := re.sub(rf"\b{old}\b", new, text)) != text:
            file.write_text(other)
            changed += 1
    return changed


@pytest.mark.slow
def test_moves_renames_and_documents_make_nothing_stale_and_a_constant_just_what_reaches_it(tmp_path):
    root = tree.copy(tmp_path / "copy")
    before, losses = hashes(root), root / "src" / "limbeck" / "losses"
    assert replace(root, "manhattan", "city_block") > 1
    (losses / "manhattan.py").rename(losses / "city_block.py")
    assert replace(root, "masked_mean", "mean_where") > 2
    file = losses / "divergence.py"
    file.write_text(file.read_text().replace('"""', '"""Documented anew. ', 1))
    assert hashes(root) == before
    file = root / "src" / "limbeck" / "tasks" / "chain_sum.py"
    file.write_text(file.read_text().replace("_POOL = 4", "_POOL = 5"))
    after = hashes(root)
    for name, cells in before.items():
        reaches = name.split("/", 1)[1] in (
            "kdrl/table_starts",
            "kdrl/table_main",
            "kdrl/ablations",
            "kdrl/fig_real_model",
        )
        assert [one != other for one, other in zip(cells, after[name], strict=True)] == [reaches] * len(cells), name
