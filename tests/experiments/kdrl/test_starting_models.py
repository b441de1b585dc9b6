"""The models that KDRL's experiments begin with, whole, at a size of seconds."""

import statistics

import pytest
import torch
from safetensors.torch import load_file, save_file

import cells
from experiments.kdrl.parts import changed
from limbeck import seeding
from limbeck.experiments.kdrl import starting_models
from limbeck.experiments.kdrl.problems import Chains


def test_the_weights_that_a_model_leaves_have_the_scores_of_its_record(starts, begun):
    runs, folder = begun
    assert {file.name for file in folder.glob("*.safetensors")} == {f"{name}.safetensors" for name in starts.names}
    data = Chains(starts.chains)
    for run in runs:
        model = starting_models.trained(starts, data, folder, run["cell"]["arm"])
        assert data.test_scores(model, seed=0, dtype=torch.float32) == run["metrics"]
        assert sum(parameter.numel() for parameter in model.parameters()) == run["trainable_parameters"]
        assert run["curve"]["loss/ce"][-1] < run["curve"]["loss/ce"][0] or run["cell"]["arm"] == "student"


def test_weights_that_are_not_there_are_asked_for(starts, tmp_path):
    message = r"expected the weights of base in .*, found none; run the experiment that trains it"
    with pytest.raises(ValueError, match=message):
        starting_models.trained(starts, Chains(starts.chains), tmp_path, "base")


def test_weights_of_other_parameters_are_refused(starts, begun, tmp_path):
    weights = load_file(begun[1] / "base.safetensors")
    name, _ = weights.popitem()
    save_file(weights, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match=rf"received {len(weights)} weights .* expected {len(weights) + 1}; {name} is"):
        starting_models.trained(starts, Chains(starts.chains), tmp_path, "base")


def first_loss(section, data, model, index):
    """The mean over tokens of a first batch, row by row."""
    prompts, solutions = starting_models.worked(section, data, index)
    lengths = torch.tensor([len(x) + len(y) for x, y in zip(prompts, solutions, strict=True)])
    options = {"size": section.start_batch, "steps": 1, "seed": section.start_seeds[index]}
    (rows,), logs = starting_models.batches(lengths, **options), []
    for row in rows.tolist():
        logprobs = model(torch.tensor([[*prompts[row], *solutions[row]]])).logits[0].log_softmax(-1)
        logs += [logprobs[len(prompts[row]) - 1 + t, token] for t, token in enumerate(solutions[row])]
    return -torch.stack(logs).mean().item()


def test_a_model_goes_on_from_the_one_that_it_begins_with(starts, begun):
    runs, folder = begun
    data = Chains(starts.chains)
    for index, begin in enumerate(starts.begins):
        with torch.no_grad():
            if begin == "nothing":
                model = starting_models.drawn(starts, data, starts.start_seeds[index])
            else:
                model = starting_models.trained(starts, data, folder, begin)
            expected = first_loss(starts, data, model, index)
        assert runs[index]["curve"]["loss/ce"][0] == pytest.approx(expected, abs=1e-5)


def test_an_interrupted_model_goes_on_to_the_same_bits(starts, begun, tmp_path):
    runs, folder = begun
    (tmp_path / "base.safetensors").write_bytes((folder / "base.safetensors").read_bytes())
    cell, where = starting_models.cells(starts, ())[2], cells.place(tmp_path, "cut")
    assert cells.drive(starting_models, starts, cell, where, kill_at=3) is None
    assert not (tmp_path / "student.safetensors").exists()
    torch.rand(7)
    assert vars(cells.drive(starting_models, starts, cell, where)).items() <= runs[2].items()
    assert (tmp_path / "student.safetensors").read_bytes() == (folder / "student.safetensors").read_bytes()


def test_matrices_are_scaled_and_norms_are_not(starts):
    data = Chains(starts.chains)
    one, four = (starting_models.drawn(changed(starts, scale=scale), data, 0) for scale in (1.0, 4.0))
    for (name, small), large in zip(one.named_parameters(), four.parameters(), strict=True):
        torch.testing.assert_close(large, (4 if small.ndim > 1 else 1) * small, msg=name)


def test_a_model_comes_in_the_turn_after_the_one_that_it_begins_with(starts):
    changes = {"begins": ("nothing", "teacher", "base")}
    for section, turns in ((starts, [0, 0, 1]), (changed(starts, **changes), [0, 1, 2])):
        listed = starting_models.cells(section, (5, 6))
        assert [cell.wave for cell in listed] == turns
        assert [cell.checkpoint_files for cell in listed] == [(f"{name}.safetensors",) for name in section.names]
        assert {cell.coordinates["seed"] for cell in listed} == {0}


def test_models_learn_from_the_training_chains_of_all_families_each_in_its_own_style(starts):
    data = Chains(starts.chains)
    examples = [example for part in data.family_train.values() for example in part]
    shares = []
    for index in range(3):
        prompts, solutions = starting_models.worked(starts, data, index)
        assert prompts == [data.problem(example).prompt for example in examples]
        shares.append(statistics.fmean(map(data.score, examples, solutions)))
        assert all(solution.count(data.end) == 1 and solution[-1] == data.end for solution in solutions)
    assert shares[:2] == [1.0, 1.0]
    assert 0.5 < shares[2] < 0.95
    assert starting_models.worked(starts, data, 0) == starting_models.worked(starts, data, 1)


def test_batches_go_through_all_rows_before_one_comes_again_and_hold_rows_of_like_length(global_generators):
    lengths = torch.randint(5, 60, (320,), generator=seeding.generator(0, "lengths"))
    before = global_generators()
    drawn = starting_models.batches(lengths, size=8, steps=100, seed=1)
    assert global_generators() == before
    assert len(drawn) == 100
    for epoch in (drawn[:40], drawn[40:80]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(320))
    spans = [(lengths[rows].max() - lengths[rows].min()).item() for rows in drawn]
    assert statistics.fmean(spans) < 55 / 8
    again, other = (starting_models.batches(lengths, size=8, steps=100, seed=seed) for seed in (1, 2))
    assert all(torch.equal(x, y) for x, y in zip(drawn, again, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(drawn, other, strict=True))
    means = [lengths[rows].double().mean().item() for rows in drawn[:40]]
    assert means != sorted(means)
