"""The sweep over SinKD's hyperparameters on a tiny model: an axis moves one number and nothing else."""

import pytest

import cells
from limbeck import params, records
from limbeck.experiments.sinkd import sweep

VALUES = {"epsilon": 1.0, "iterations": 3, "temperature": 4.0, "group": 5, "p": 2, "strength": 10.0}


@pytest.fixture(scope="module")
def section(tiny_bert, tiny_texts):
    """One value an axis beside the centre's."""
    committed = cells.section("fig_hyperparameters", tiny_bert, task=tiny_texts)
    axes = {f"{axis}_values": (params.flat(committed)[axis], value) for axis, value in VALUES.items()}
    return cells.changed(committed, **axes)


@pytest.fixture(scope="module")
def ran(section, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ran")
    return cells.run_all(sweep, section, folder), folder


def test_every_axis_has_its_values_but_the_centres_and_arms_without_transport_the_centre_alone(section, ran):
    coordinates = [tuple(run["cell"][key] for key in ("axis", "value", "arm")) for run in ran[0]]
    centre = [("centre", 0, arm) for arm in ("ce", "ce+kl", "ce+kl+sinkhorn")]
    expected = {("teacher", 0, "teacher"), *centre, *((*pair, "ce+kl+sinkhorn") for pair in VALUES.items())}
    assert set(coordinates) == expected
    assert len(coordinates) == len(expected)


@pytest.mark.parametrize("axis", sweep.AXES)
def test_a_setting_is_the_centre_of_a_section_that_has_its_value_there(section, ran, axis, tmp_path):
    measured, folder = ran
    moved = cells.changed(section, **{axis: VALUES[axis]})
    (cell,) = [
        cell
        for cell in sweep.cells(moved, (0,))
        if {"axis": "centre", "arm": "ce+kl+sinkhorn"}.items() <= cell.coordinates.items()
    ]
    result = cells.drive(sweep, moved, cell, cells.place(folder, axis))
    setting, centre = (cells.pick(measured, axis=name, arm="ce+kl+sinkhorn") for name in (axis, "centre"))
    assert vars(result).items() <= setting.items()
    assert setting["curve"] != centre["curve"], f"{axis} moves nothing"
    assert setting["curve"]["loss/kl"][0] == centre["curve"]["loss/kl"][0], f"{axis} moves KL"


def test_each_added_term_has_its_strength_times_the_weight_that_matches_ces_gradient(section, ran):
    """A strength of KL doubled at the centre doubles its part of the first step's loss, and no other part."""
    measured, folder = ran
    matched = cells.pick(measured, axis="centre", arm="ce+kl+sinkhorn")
    strong = cells.pick(measured, axis="strength", value=10.0)
    ratio = 10.0 / section.strength
    assert strong["metrics"]["loss/weight"] == pytest.approx(ratio * matched["metrics"]["loss/weight"], rel=1e-12)
    double = cells.changed(section, kl_strength=2 * section.kl_strength)
    (cell,) = [c for c in sweep.cells(double, (0,)) if c.coordinates == matched["cell"]]
    curve = cells.drive(sweep, double, cell, cells.place(folder, "double")).curve
    for term, factor in (("ce", 1), ("kl", 2), ("sinkhorn", 1)):
        assert curve[f"loss/{term}"][0] == pytest.approx(factor * matched["curve"][f"loss/{term}"][0], rel=1e-6)


def test_a_seed_and_a_value_change_no_other_cell(section):
    def by_name(section, seeds=(0,)):
        return {records.cell_name(cell.coordinates): cell for cell in sweep.cells(section, seeds)}

    one = by_name(section)
    for more in (by_name(section, (0, 1)), by_name(cells.changed(section, epsilon_values=(0.1, 1.0, 7.0)))):
        assert one == {name: more[name] for name in one}
        assert len(more) > len(one)
    moved = by_name(cells.changed(section, kl_strength=3.0))
    assert not [name for name in one if moved[name] == one[name]]


def test_the_centre_is_a_point_of_every_committed_axis():
    """As the figure assumes; an axis that is not swept has no values."""
    for profile in ("smoke", "full", "paper"):
        section = params.section("sinkd", "fig_hyperparameters", profile)
        for axis in sweep.AXES:
            assert section[axis] in section[f"{axis}_values"] or profile == "smoke", axis


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": "second-2"}, "spelled first-N or random-N, N layers, got 'second-2'"),
        ({"arms": ("ce+wasserstein",)}, "ce or one of kl, .* got 'wasserstein'"),
        ({"p_values": (1, 3)}, "p must be one of 1, 2; got 3"),
        ({"group_values": (1, 0)}, "group must be above 0, got 0"),
        ({"epsilon_values": (-0.1,)}, "epsilon must be above 0, got -0.1"),
    ],
)
def test_a_section_that_cannot_be_run_is_refused(section, change, message):
    with pytest.raises(ValueError, match=message):
        cells.changed(section, **change)
