"""Rows of the teacher moved within the batch: KL learns something else, the Sinkhorn distance does not notice."""

import pytest
import torch

import cells
from limbeck.experiments.sinkd import distillation, permutation


@pytest.fixture(scope="module")
def section(tiny_bert, tiny_texts):
    return cells.section("fig_permutation", tiny_bert, task=tiny_texts)


@pytest.fixture(scope="module")
def ran(section, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ran")
    return cells.run_all(permutation, section, folder, (0, 1)), folder


def test_every_arm_learns_from_its_own_rows_and_from_moved_ones(section, ran):
    measured, _ = ran
    arms = [(run["cell"]["arm"], run["cell"]["rows"], run["cell"]["seed"]) for run in measured]
    students = [(arm, rows, seed) for seed in (0, 1) for arm in section.arms for rows in ("own", "moved")]
    assert arms == [("teacher", "own", section.setup.loop.teacher_seed), *students]
    for run in measured[1:]:
        assert set(run["curve"]) == {f"loss/{run['cell']['arm']}", "optimiser/gradient_norm"}, "no labels"
        assert set(run["metrics"]) == {"test/score", "test/agreement"}


@pytest.mark.parametrize(("arm", "notices"), [("kl", True), ("tvd", True), ("sinkhorn", False)])
def test_moved_rows_change_the_loss_and_gradient_of_kl_and_l1_and_not_those_of_sinkhorn(
    section, ran, arm, notices, tmp_path
):
    """Within a batch the distance sums the same numbers in another order: float32 rounding is all that is left."""
    run = distillation.start(section.setup, section.task, cells.place(tmp_path, "run"), seed=0, student=section.student)
    outputs = distillation.read_outputs(cells.place(ran[1], "run"), section.task)
    rows, parts = torch.arange(13), []
    for moved in permutation.ROWS.values():
        value = distillation.distillation_loss(run, arm, [1.0], outputs, moved=moved)(rows)[f"loss/{arm}"]
        gradients = torch.autograd.grad(value, list(run.parameters.values()))
        parts.append((value, torch.cat([part.flatten() for part in gradients])))
    (own, own_gradient), (other, other_gradient) = parts
    if notices:
        assert own != other
        assert (own_gradient - other_gradient).norm() > 0.01 * own_gradient.norm()
    else:
        torch.testing.assert_close(own, other, rtol=1e-6, atol=0)
        assert (own_gradient - other_gradient).norm() < 1e-5 * own_gradient.norm()


def test_a_moved_row_is_shown_the_outputs_of_the_row_before_it_in_the_batch(section, ran, tmp_path):
    run = distillation.start(section.setup, section.task, cells.place(tmp_path, "run"), seed=0, student=section.student)
    outputs = distillation.read_outputs(cells.place(ran[1], "run"), section.task)
    rows = torch.tensor([7, 3, 11, 20])
    shifted = outputs["train"].clone()
    shifted[rows] = outputs["train"][[20, 7, 3, 11]]
    moved = distillation.distillation_loss(run, "kl", [1.0], outputs, moved=1)(rows)
    assert moved == distillation.distillation_loss(run, "kl", [1.0], outputs | {"train": shifted})(rows)


def test_students_of_own_and_moved_rows_start_alike_and_part_only_if_the_loss_sees_the_order(section, ran):
    measured, _ = ran
    for arm in section.arms:
        own, moved = (
            cells.pick(measured, arm=arm, rows=rows, seed=0)["curve"][f"loss/{arm}"] for rows in ("own", "moved")
        )
        if arm == "sinkhorn":
            assert own == pytest.approx(moved, rel=1e-4)  # three steps carry the rounding of the first
        else:
            assert own[0] != moved[0]
