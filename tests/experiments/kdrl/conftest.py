"""The models that comparisons begin with, trained once."""

import pytest

import cells
from experiments.kdrl.parts import SMALL, changed
from limbeck import params
from limbeck.experiments.kdrl import starting_models


@pytest.fixture(scope="session")
def starts():
    committed = params.load("kdrl", "table_starts", "smoke", starting_models.Params)
    return changed(committed, **SMALL)


@pytest.fixture(scope="session")
def begun(starts, tmp_path_factory):
    """The records of the models, and the folder of their weights."""
    folder = tmp_path_factory.mktemp("kdrl") / "table_starts"
    return cells.run_all(starting_models, starts, folder), folder
