import itertools
import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from limbeck.training import resume, supervised


def problem(seed=0):
    """A small regression whose loss on a batch depends on the rows: parameters, and the loss of rows."""
    source = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randn(12, 3, generator=source), torch.randn(12, generator=source)
    parameters = {"weight": nn.Parameter(torch.zeros(3)), "bias": nn.Parameter(torch.zeros(()))}

    def loss(rows):
        error = inputs[rows] @ parameters["weight"] + parameters["bias"] - targets[rows]
        return {"loss/fit": error.square().mean(), "loss/size": 0.1 * parameters["weight"].square().sum()}

    return parameters, loss


BATCHES = [torch.tensor([i % 12, (i + 5) % 12]) for i in range(10)]
SETTINGS = {"learning_rate": 0.1, "clip_norm": 1.0, "save_every": 3}


def finish(steps):
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def test_a_step_is_textbook_adamw_with_linear_decay_and_clipping(tmp_path):
    parameters, loss = problem()
    finish(supervised.fit(parameters, loss, BATCHES, state=tmp_path / "state", **SETTINGS))
    twin, twin_loss = problem()
    first, second = ({name: torch.zeros_like(p) for name, p in twin.items()} for _ in range(2))
    for step, rows in enumerate(BATCHES):
        gradients = torch.autograd.grad(sum(twin_loss(rows).values()), list(twin.values()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for (name, parameter), gradient in zip(twin.items(), gradients, strict=True):
            gradient = gradient * min(1.0, 1.0 / (norm + 1e-6))  # noqa: PLW2901
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            corrected = (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            rate = 0.1 * (1 - step / len(BATCHES))
            parameter.data -= rate * first[name] / (1 - 0.9 ** (step + 1)) / corrected
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, twin[name], atol=1e-5, rtol=1e-5)


def test_the_curve_is_the_mean_of_every_term_over_windows_and_the_rest(tmp_path):
    parameters, loss = problem()
    steps = list(supervised.fit(parameters, loss, BATCHES, state=tmp_path / "a", **SETTINGS))
    other, other_loss = problem()
    curve = finish(supervised.fit(other, other_loss, BATCHES, state=tmp_path / "b", **SETTINGS))
    for name in ("loss/fit", "loss/size", "optimiser/gradient_norm"):
        values = [record[name] for record in steps]
        windows = [values[0:3], values[3:6], values[6:9], values[9:]]
        assert curve[name] == pytest.approx([sum(w) / len(w) for w in windows])
    assert [(record["step"], record["steps"]) for record in steps] == [(i + 1, 10) for i in range(10)]


@pytest.mark.parametrize("stop", [1, 3, 4, 9, 10])
def test_a_run_stopped_anywhere_and_continued_equals_an_unbroken_one_to_the_bit(tmp_path, stop):
    whole, loss = problem()
    curve = finish(supervised.fit(whole, loss, BATCHES, state=tmp_path / "whole", **SETTINGS))
    broken, broken_loss = problem()
    list(itertools.islice(supervised.fit(broken, broken_loss, BATCHES, state=tmp_path / "s", **SETTINGS), stop))
    again, again_loss = problem()
    taken = 0

    def counted(rows):
        nonlocal taken
        taken += 1
        return again_loss(rows)

    continued = finish(supervised.fit(again, counted, BATCHES, state=tmp_path / "s", **SETTINGS))
    assert continued == curve
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert taken == 10 - 3 * ((stop - 1) // 3)


@pytest.mark.parametrize("stop", [2, 5, 9])
def test_what_is_measured_stands_in_the_curve_after_every_window_also_in_a_continued_run(tmp_path, stop):
    """`measure` sees the parameters after the window's last step, and is called no more often than that."""

    def measured(parameters):
        return lambda: {"eval/bias": parameters["bias"].item()}

    whole, loss = problem()
    steps = supervised.fit(whole, loss, BATCHES, state=None, measure=measured(whole), **SETTINGS)
    biases = []
    try:
        while True:
            next(steps)
            biases.append(whole["bias"].item())
    except StopIteration as end:
        curve = end.value
    assert curve["eval/bias"] == [biases[2], biases[5], biases[8], biases[9]]
    plain, plain_loss = problem()
    without = finish(supervised.fit(plain, plain_loss, BATCHES, state=None, **SETTINGS))
    assert without == {name: values for name, values in curve.items() if name != "eval/bias"}
    options = {"state": tmp_path / "state", **SETTINGS}
    broken, broken_loss = problem()
    cut = supervised.fit(broken, broken_loss, BATCHES, measure=measured(broken), **options)
    list(itertools.islice(cut, stop))
    again, again_loss = problem()
    assert finish(supervised.fit(again, again_loss, BATCHES, measure=measured(again), **options)) == curve


def test_a_run_without_a_state_takes_the_same_steps_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept, loss = problem()
    curve = finish(supervised.fit(kept, loss, BATCHES, state=tmp_path / "folder" / "state", **SETTINGS))
    shutil.rmtree(tmp_path / "folder")
    free, free_loss = problem()
    assert finish(supervised.fit(free, free_loss, BATCHES, state=None, **SETTINGS)) == curve
    assert all(torch.equal(kept[name], free[name]) for name in kept)
    assert list(tmp_path.iterdir()) == []


def test_the_state_is_one_safetensors_file_with_the_step_in_it(tmp_path):
    parameters, loss = problem()
    list(itertools.islice(supervised.fit(parameters, loss, BATCHES, state=tmp_path / "s" / "state", **SETTINGS), 4))
    assert [file.name for file in (tmp_path / "s").iterdir()] == ["state"]
    with safe_open(tmp_path / "s" / "state", "pt") as file:
        assert json.loads(file.metadata()["state"])["step"] == 3
        assert {key.split("/")[0] for key in file.keys()} == {"parameter", "exp_avg", "exp_avg_sq", "step"}  # noqa: SIM118


def test_an_interrupted_write_leaves_the_old_state_whole(tmp_path, monkeypatch):
    resume.write_tensors(tmp_path / "state", {"x": torch.ones(2)})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        resume.write_tensors(tmp_path / "state", {"x": torch.zeros(2)})
    with safe_open(tmp_path / "state", "pt") as file:
        assert torch.equal(file.get_tensor("x"), torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def half_run(state):
    parameters, loss = problem()
    steps = supervised.fit(parameters, loss, BATCHES, state=state, **SETTINGS)
    for _ in range(5):
        next(steps)
    return state.read_bytes()


def test_a_damaged_state_is_refused_with_path_and_remedy_and_changes_nothing(tmp_path):
    state = tmp_path / "state"
    whole = half_run(state)
    other = {"parameter/weight": torch.zeros(4), "parameter/bias": torch.zeros(())}
    resume.write_tensors(tmp_path / "other", other, {"state": json.dumps({"step": 1, "curve": {}})})
    resume.write_tensors(tmp_path / "bare", {"parameter/weight": torch.zeros(3)})
    half_run(tmp_path / "another" / "state")
    foreign = [(tmp_path / name).read_bytes() for name in ("other", "bare", "another/state")]
    flipped = [bytes([*whole[:n], whole[n] ^ 1, *whole[n + 1 :]]) for n in range(0, len(whole), 41)]
    foreign += [one for one in flipped if b"sha256" in one]
    for damaged in (b"", whole[:7], whole[: len(whole) // 2], whole[:-1], b"x" * 100, *foreign):
        state.write_bytes(damaged)
        parameters, loss = problem()
        with pytest.raises(ValueError, match=f"delete {state} to begin the run anew"):
            next(supervised.fit(parameters, loss, BATCHES, state=state, **SETTINGS))
        assert all(not parameter.any() for parameter in parameters.values())
        assert state.read_bytes() == damaged


def test_the_state_of_other_shapes_is_refused_also_without_a_checksum(tmp_path):
    parameters, loss = problem()
    for key, tensor in {
        "parameter/bias": torch.zeros(2),
        "exp_avg/bias": torch.zeros(2),
        "step/x": torch.ones(()),
    }.items():
        kept = {"parameter/weight": torch.zeros(3), "parameter/bias": torch.zeros(()), key: tensor}
        save_file(kept, tmp_path / "state", {"state": json.dumps({"step": 1, "curve": {}})})
        with pytest.raises(ValueError, match=rf"state of other parameters, such as {key}, expected 2; delete"):
            next(supervised.fit(parameters, loss, BATCHES, state=tmp_path / "state", **SETTINGS))


def test_what_a_run_left_is_read_whole_from_its_own_place_or_refused(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones((), dtype=torch.bfloat16), "c": torch.zeros(0, 2)}
    one, other = tmp_path / "one" / "x.safetensors", tmp_path / "one" / "y.safetensors"
    resume.write_tensors(one, tensors)
    read = resume.read_tensors(one, like=tensors)
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with pytest.raises(ValueError, match=rf"3 weights in {one}, expected 1; a is \(2, 3\) there, not \(3,\); delete"):
        resume.read_tensors(one, like={"a": torch.zeros(3)})
    with pytest.raises(ValueError, match=rf"expected tensors in {other}, found none; run the experiment"):
        resume.read_tensors(other)
    shutil.copytree(one.parent, tmp_path / "moved")
    assert resume.read_tensors(tmp_path / "moved" / "x.safetensors").keys() == tensors.keys()
    shutil.copy(one, other)
    with pytest.raises(ValueError, match=rf"{other}, which was written as x.safetensors, expected its own content"):
        resume.read_tensors(other)
    whole = one.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in range(header, len(whole)):
        one.write_bytes(bytes([*whole[:place], whole[place] ^ 4, *whole[place + 1 :]]))
        with pytest.raises(ValueError, match=rf"{one} with another content than its checksum is of"):
            resume.read_tensors(one)


def test_a_continued_run_keeps_the_memory_layout_of_its_moments(tmp_path):
    weight = nn.Parameter(torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)))
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    parameters = {"weight": weight}
    first, second = (torch.optim.AdamW([weight], lr=0.1) for _ in range(2))
    weight.square().sum().backward()
    first.step()
    resume.save(tmp_path / "state", parameters, first, {})
    resume.load(tmp_path / "state", parameters, second)
    for name, moment in first.state[weight].items():
        assert second.state[weight][name].stride() == moment.stride(), name
        assert torch.equal(second.state[weight][name], moment), name


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    parameters, _ = problem()
    steps = supervised.fit(
        parameters, lambda _: {"loss/bad": parameters["bias"] * torch.nan}, BATCHES, state=tmp_path / "s", **SETTINGS
    )
    with pytest.raises(RuntimeError, match="non-finite"):
        next(steps)


def test_the_gradient_norm_is_that_of_all_parameters_and_accumulates_nothing():
    parameters, _ = problem()
    value = 3 * parameters["weight"][0] + 4 * parameters["bias"]
    assert supervised.gradient_norm(parameters, value) == pytest.approx(5.0)
    assert parameters["bias"].grad is None
