"""Comparisons of arms, whole, on a tiny model and data sets from folders, as hub names would be used."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import cells
from limbeck import params, paths, records
from limbeck.experiments import runs
from limbeck.experiments.sinkd import EXPERIMENTS, comparison, distillation
from limbeck.tasks import classification

ARMS = ("ce", "ce+kl", "ce+kl+kl", "ce+kl+sinkhorn", "ce+takd")
TABLES = [name for name, module in EXPERIMENTS.items() if module == "comparison"]
SEED = 100


@pytest.fixture(scope="module")
def section(tiny_bert, tiny_texts, tmp_path_factory):
    """Two tasks (the second has fewer of the same texts); all training texts serve the selection."""
    fewer = tmp_path_factory.mktemp("fewer")
    for split in ("train", "test"):
        lines = Path(tiny_texts, f"{split}.jsonl").read_text().splitlines()
        (fewer / f"{split}.jsonl").write_text("\n".join(lines[: len(lines) * 3 // 5]))
    changes = {"tasks": (tiny_texts, str(fewer)), "students": ("first-2",), "arms": ARMS, "multiples": (1.0, 30.0)}
    changes |= {"assistant": "first-3", "selection_texts": 48, "selection_seed": SEED}
    return cells.section("table_encoder", tiny_bert, **changes)


@pytest.fixture(scope="module")
def ran(section, tmp_path_factory):
    """All records of that section with the selection's own seed, and the folder of their checkpoints."""
    folder = tmp_path_factory.mktemp("ran")
    return cells.run_all(comparison, section, folder, (SEED,)), folder


def chosen_multiple(measured, arm, student):
    """The multiple with the highest mean validation score."""
    where = {"phase": "selection", "arm": arm, "student": student}
    return runs.best(measured, where, "multiple", ["validation/score"], highest=[True])


def names(section):
    return [runs.spelled(task) for task in section.tasks]


def cell_at(section, **coordinates):
    every = comparison.cells(section, (SEED,))
    (cell,) = [cell for cell in every if coordinates.items() <= cell.coordinates.items()]
    return cell


def test_the_whole_experiment_runs_and_every_score_is_a_share(section, ran):
    measured, folder = ran
    assert len(measured) == 2 * (1 + 4 * 2 + 1 + 5)
    assert {file.name for file in folder.glob("*.safetensors")} == {
        leaf for run in measured for leaf in run["checkpoint_files"]
    }
    for run in measured:
        assert all(0 <= value <= 1 for name, value in run["metrics"].items() if name != "loss/weight")
        terms = {"ce"} if run["cell"]["arm"] in ("ce", "teacher") else set(run["cell"]["arm"].split("+"))
        assert set(run["curve"]) == {f"loss/{term}" for term in terms} | {"optimiser/gradient_norm"}
    losses = [json.dumps(run["curve"]) for run in measured if run["cell"]["phase"] == "final"]
    assert len(set(losses)) == len(losses), "two arms took the same steps"


def test_a_final_cell_at_the_selections_seed_and_texts_takes_the_steps_of_the_chosen_cell(section, ran):
    """So its weights, all of them, are those of the chosen records of its own task, at one multiple for both tasks."""
    measured, _ = ran
    for arm in ARMS[1:]:
        multiple = chosen_multiple(measured, arm, "first-2")
        for task in names(section):
            chosen = cells.pick(measured, phase="selection", arm=arm, task=task, multiple=multiple)
            final = cells.pick(measured, phase="final", arm=arm, task=task)
            assert final["curve"] == chosen["curve"]
            assert final["metrics"]["loss/weight"] == chosen["metrics"]["loss/weight"]
            other = cells.pick(measured, phase="selection", arm=arm, task=task, multiple=31.0 - multiple)
            ratio = chosen["metrics"]["loss/weight"] / other["metrics"]["loss/weight"]
            assert ratio == pytest.approx(multiple / (31.0 - multiple), rel=1e-9), "a weight is not a multiple of one"


def test_a_task_takes_the_multiple_that_is_best_over_all_tasks_and_not_its_own(section, ran):
    measured, folder = ran
    one, other = names(section)
    said = {(one, 1.0): 0.25, (one, 30.0): 0.75, (other, 1.0): 1.0, (other, 30.0): 0.0}
    altered = []
    for run in (run for run in measured if run["cell"]["phase"] == "selection"):
        score = said[run["cell"]["task"], run["cell"]["multiple"]]
        altered.append(run | {"metrics": run["metrics"] | {"validation/score": score}})
    chosen = cells.pick(measured, phase="selection", arm="ce+kl", task=one, multiple=1.0)
    cell = cell_at(section, phase="final", arm="ce+kl", task=one)
    assert cells.drive(comparison, section, cell, cells.place(folder, "altered", altered)).curve == chosen["curve"]


def test_the_selection_of_a_third_term_holds_kl_at_its_chosen_weight(section, ran):
    """At the first step all students are the same, so KL's part of the loss tells its weight."""
    measured, _ = ran
    multiple = chosen_multiple(measured, "ce+kl", "first-2")
    for task in names(section):
        kl = cells.pick(measured, phase="selection", arm="ce+kl", task=task, multiple=multiple)
        for tried in section.multiples:
            third = cells.pick(measured, phase="selection", arm="ce+kl+sinkhorn", task=task, multiple=tried)
            assert third["curve"]["loss/kl"][0] == kl["curve"]["loss/kl"][0]


def test_kl_named_twice_counts_with_the_sum_of_two_chosen_weights(section, ran):
    measured, _ = ran
    for task in names(section):
        once, twice = (cells.pick(measured, phase="final", arm=arm, task=task) for arm in ("ce+kl", "ce+kl+kl"))
        weights = [run["metrics"]["loss/weight"] for run in (once, twice)]
        ratio = twice["curve"]["loss/kl"][0] / once["curve"]["loss/kl"][0]
        assert ratio == pytest.approx(sum(weights) / weights[0], rel=1e-5)


def test_the_assistant_is_deeper_and_its_kl_has_the_students_multiple_of_its_own_matched_weight(section, ran, tmp_path):
    measured, folder = ran
    multiple = chosen_multiple(measured, "ce+kl", "first-2")
    for task, name in zip(section.tasks, names(section), strict=True):
        assistant = cells.pick(measured, phase="assistant", task=name)
        assert assistant["trainable_parameters"] > cells.pick(measured, arm="ce", task=name)["trainable_parameters"]
        outputs = load_file(folder / distillation.outputs_file(task))
        where = cells.place(tmp_path, "run")
        run = distillation.start(section.setup, task, where, seed=0, student=section.assistant)
        expected = multiple * distillation.gradient_matched_weight(run, "kl", outputs)
        assert assistant["metrics"]["loss/weight"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("arm", "reads"), [("ce+takd", "assistant"), ("ce+kl", "teacher"), ("ce", None)])
def test_takd_learns_from_the_assistants_logits_and_others_from_the_teachers(section, ran, tmp_path, arm, reads):
    measured, folder = ran
    measured = [run for run in measured if run["cell"]["phase"] != "final"]
    task = names(section)[0]
    cell = cell_at(section, phase="final", arm=arm, task=task)
    before = cells.drive(comparison, section, cell, cells.place(folder, "again", measured)).curve
    shutil.rmtree(folder / "again")
    for source in ("teacher", "assistant"):
        changed = tmp_path / source
        shutil.copytree(folder, changed, ignore=lambda _, files: [f for f in files if "safetensors" not in f])
        file = changed / f"{task}_{source}.safetensors"
        held = load_file(file)
        read = "train" if source == "teacher" else source
        save_file(held | {read: held[read].flip(0).contiguous()}, file)
        after = cells.drive(comparison, section, cell, cells.place(changed, "run", measured)).curve
        assert (after != before) == (source == reads), source


def test_a_cell_run_twice_is_the_same_to_the_bit_whatever_the_global_generators_hold(section, ran, tmp_path):
    measured, folder = ran
    teacher, *_, final = comparison.cells(section, (SEED,))
    earlier = [run for run in measured if run["wave"] < final.wave]
    for cell, where in ((teacher, tmp_path), (final, folder)):
        torch.rand(11)
        again = cells.drive(comparison, section, cell, cells.place(where, "twice", earlier))
        assert vars(again).items() <= cells.pick(measured, **cell.coordinates).items()
    (file,) = teacher.checkpoint_files
    assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()
    other = dataclasses.replace(final, coordinates=final.coordinates | {"seed": SEED + 1})
    assert cells.drive(comparison, section, other, cells.place(folder, "other", earlier)).curve != again.curve


@pytest.fixture
def watched(section, ran):
    """The same section with its students watched, a cell of it, and a place for it by name."""
    measured, folder = ran
    section = cells.changed(section, watch=True)
    cell = cell_at(section, phase="final", arm="ce+kl+sinkhorn", task=names(section)[0])
    earlier = [run for run in measured if run["wave"] < cell.wave]
    return section, cell, lambda name: cells.place(folder, name, earlier)


def test_an_interrupted_cell_goes_on_to_the_same_bits_with_what_was_watched(watched):
    section, cell, place = watched
    whole = cells.drive(comparison, section, cell, place("whole"))
    assert cells.drive(comparison, section, cell, place("cut"), kill_at=3) is None
    assert place("cut").state.is_file()
    torch.rand(7)
    assert cells.drive(comparison, section, cell, place("cut")) == whole
    assert len(whole.curve["validation/score"]) == 3


def test_a_watched_student_takes_the_same_steps_and_ends_at_its_test_score(watched, ran):
    section, cell, place = watched
    watched = cells.drive(comparison, section, cell, place("watched"))
    plain = cells.pick(ran[0], **cell.coordinates)
    seen = {name: curve for name, curve in watched.curve.items() if not name.endswith("/score")}
    assert seen == plain["curve"]
    assert watched.curve["test/score"][-1] == watched.metrics["test/score"] == plain["metrics"]["test/score"]
    assert watched.curve["validation/score"][-1] == watched.metrics["validation/last"]
    best = max(watched.curve["validation/score"])
    reported = [
        t for v, t in zip(watched.curve["validation/score"], watched.curve["test/score"], strict=True) if v == best
    ]
    assert watched.metrics["validation/best"] == best
    assert watched.metrics["validation/optimism"] == pytest.approx(best - reported[-1])


def test_optimism_is_the_best_validation_score_minus_the_test_score_of_its_last_step():
    curve = {"validation/score": [0.5, 0.75, 0.75, 0.625], "test/score": [0.25, 0.5, 0.625, 1.0]}
    assert comparison._optimism(curve) == {
        "validation/best": 0.75,
        "validation/last": 0.625,
        "test/at_best": 0.625,
        "validation/optimism": 0.125,
    }


def test_the_choice_is_the_best_mean_over_tasks_of_a_student_and_of_equals_the_smallest_multiple():
    scores = {  # task a alone would choose 10, task b alone 0.25
        ("selection", "ce+kl", "first-2", "a"): {0.25: 0.5, 3.0: 0.75, 1.0: 0.75, 10.0: 1.0},
        ("selection", "ce+kl", "first-2", "b"): {0.25: 0.875, 3.0: 0.75, 1.0: 0.75, 10.0: 0.25},
        ("selection", "ce+kl", "random-2", "a"): {0.25: 0.875, 3.0: 0.75, 1.0: 0.5, 10.0: 0.5},
        ("selection", "ce+kl+kl", "first-2", "a"): {0.25: 0.5, 3.0: 0.75, 1.0: 0.5, 10.0: 1.0},
    }
    measured = [
        {
            "cell": {"phase": phase, "arm": arm, "student": student, "task": task, "multiple": multiple},
            "metrics": {"validation/score": score},
        }
        for (phase, arm, student, task), tried in scores.items()
        for multiple, score in tried.items()
    ]
    measured += [{"cell": {"phase": "final", "arm": "ce+kl", "student": "first-2", "seed": 0}, "metrics": {}}]
    assert chosen_multiple(measured, "ce+kl", "first-2") == 1.0
    assert chosen_multiple(measured, "ce+kl", "random-2") == 0.25
    assert chosen_multiple(measured, "ce+kl+kl", "first-2") == 10.0


def test_terms_are_chosen_in_their_order_and_takd_after_its_assistant():
    assert comparison.searched_arms(["ce"]) == []
    assert comparison.searched_arms(["ce", "ce+kl+sinkhorn", "ce+rkl"]) == ["ce+kl", "ce+kl+sinkhorn", "ce+rkl"]
    assert comparison.searched_arms(["ce+takd"]) == ["ce+kl", "ce+takd"]
    assert comparison.searched_arms(["ce+kl+kl"]) == ["ce+kl", "ce+kl+kl"]


def by_name(section, seeds=(0,)):
    every = comparison.cells(section, seeds)
    named = {records.cell_name(cell.coordinates): cell for cell in every}
    assert len(named) == len(every), "two cells have one record"
    return named


def test_a_seed_changes_no_other_cell_and_the_grid_and_the_tasks_only_what_was_chosen_from_them(section):
    section = cells.changed(section, students=("first-2", "random-1"))
    one, two = by_name(section), by_name(section, (0, 1))
    assert one == {name: two[name] for name in one}
    assert {cell.coordinates["seed"] for name, cell in two.items() if name not in one} == {1}
    later = {name for name, cell in one.items() if cell.wave > 1}
    for change in ({"multiples": (1.0, 30.0, 90.0)}, {"tasks": (*section.tasks, "vader_tweets")}):
        more = by_name(cells.changed(section, **change))
        assert {name for name in one if more[name] != one[name]} == later
    for change in ({"arms": (*ARMS, "ce+js")}, {"students": (*section.students, "first-1")}):
        more = by_name(cells.changed(section, **change))
        assert one == {name: more[name] for name in one}
    shorter = by_name(cells.changed(section, longest=9))
    assert not [name for name in one if shorter[name] == one[name]]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("profile", params.PROFILES)
def test_every_committed_cell_comes_after_all_that_it_reads(name, profile):
    if profile not in params.experiments("sinkd")[name]:
        return
    comes_after_all_that_it_reads(params.load("sinkd", name, profile, comparison.Params))


def test_every_cell_of_long_arms_and_of_assisted_ones_comes_after_all_that_it_reads(section):
    for arms in (("ce+kl+rkl+js+tvd+l1", "ce+rkl"), ("ce+takd+kl", "ce+kl+takd+js", "ce+kl+rkl+js"), ("ce+takd",)):
        comes_after_all_that_it_reads(cells.changed(section, arms=arms))


def comes_after_all_that_it_reads(section):
    by_cell = by_name(section, (0, 1))
    turns = {
        tuple(cell.coordinates.get(key) for key in ("phase", "task", "student", "arm")): cell.wave
        for cell in by_cell.values()
    }
    for (phase, task, student, arm), turn in turns.items():
        if phase == "teacher":
            continue
        assert turns["teacher", task, "teacher", "teacher"] < turn
        chain = arm.split("+")
        chooser = section.students[0] if phase == "assistant" else student
        for depth in range(2, len(chain) + (phase != "selection")):
            for other in map(runs.spelled, section.tasks):
                assert turns["selection", other, chooser, "+".join(chain[:depth])] < turn
        if "takd" in chain:
            assert turns["assistant", task, section.assistant, "ce+kl"] < turn


def test_the_checksums_of_the_assets_are_part_of_what_a_cell_depends_on():
    section = params.load("sinkd", "table_encoder", "default", comparison.Params)
    manifest = yaml.safe_load((paths.DATA / "assets.yaml").read_text())
    behind = {"multiwoz_acts": "multiwoz_acts", "r52": "topics", "20ng": "topics", "vader_movie": "vader"}
    for cell in comparison.cells(section, (0,)):
        if asset := behind.get(cell.coordinates["task"]):
            read = ("minilm", asset) if cell.wave < 2 else {"minilm", "vader", *behind.values()}
            assert set(cell.inputs["assets"]) == {manifest[name]["sha256"] for name in read}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"students": ("first-2", "whole")}, "spelled first-N or random-N, N layers, got 'whole'"),
        ({"assistant": "second-4"}, "spelled first-N or random-N, N layers, got 'second-4'"),
        ({"arms": ("ce", "ce+wasserstein")}, "ce or one of kl, .* got 'wasserstein' in 'ce.wasserstein'"),
        ({"arms": ("ce", "kl")}, "an arm of a comparison starts with ce, got 'kl'"),
    ],
)
def test_a_section_that_cannot_be_run_is_refused(section, change, message):
    with pytest.raises(ValueError, match=message):
        cells.changed(section, **change)


@pytest.mark.parametrize("task", ["cola", "mrpc"])
def test_the_paper_profile_runs_on_data_with_glues_columns(task, tiny_bert, tmp_path):
    """One sentence and Matthews correlation, two sentences and F1; labels that the first letter gives away."""
    columns = ("sentence",) if task == "cola" else ("sentence1", "sentence2")
    for split, count in (("train", 40), ("validation", 16)):
        rows = [
            dict.fromkeys(columns, f"{'xy'[i % 2]} a b c {'d ' * (i % 5)}") | {"label": i % 2} for i in range(count)
        ]
        file = tmp_path / "glue" / task / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(json.dumps(row | {"idx": i}) for i, row in enumerate(rows)))
    committed = params.load("sinkd", "table_encoder", "paper", comparison.Params)
    small = cells.SMALL | {"split_sizes": (-1, 8, -1), "selection_texts": 16, "multiples": (1.0,)}
    names = {"model": tiny_bert, "tasks": (f"glue/{task}@{tmp_path / 'glue'}",), "students": ("first-2",)}
    section = cells.changed(committed, **small | names)
    measured = cells.run_all(comparison, section, tmp_path)
    assert [run["cell"]["phase"] for run in measured] == [
        "teacher",
        "selection",
        "selection",
        "final",
        "final",
        "final",
    ]
    outputs = load_file(tmp_path / measured[0]["checkpoint_files"][0])
    assert [len(outputs[split]) for split in ("train", "validation", "test")] == [32, 8, 16]
    right = [example.label == "1" for example in classification.splits(section.tasks[0], (-1, 8, -1), seed=0)[2]]
    said = outputs["test"].argmax(-1).bool().tolist()
    both, wrong, missed = (
        sum(pair in kinds for pair in zip(right, said, strict=True))
        for kinds in ([(True, True)], [(False, True)], [(True, False)])
    )
    neither = 16 - both - wrong - missed
    product = (both + wrong) * (both + missed) * (neither + wrong) * (neither + missed)
    matthews = (both * neither - wrong * missed) / product**0.5
    expected = matthews if task == "cola" else 2 * both / (2 * both + wrong + missed)
    assert measured[0]["metrics"]["test/score"] == pytest.approx(expected)
    assert expected > 0.3
