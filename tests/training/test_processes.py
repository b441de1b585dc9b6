"""Several processes, started as accelerate starts them, take the steps of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from limbeck import paths
from limbeck.training import rollouts
from training import test_grpo

COUNT = 2


def test_alone_a_process_has_all_the_work_and_adds_nothing():
    assert (rollouts.process_count(), rollouts.process_rank()) == (1, 0)
    assert rollouts.chunk([1, 2, 3]) == [1, 2, 3]
    assert rollouts.gathered("mine") == ["mine"]
    tensor = torch.ones(2)
    rollouts.add_up([tensor])
    assert tensor.tolist() == [1, 1]


@pytest.mark.parametrize(("items", "count"), [(5, 2), (6, 3), (7, 4), (3, 3)])
def test_all_chunks_in_order_are_the_items_and_none_is_empty(monkeypatch, items, count):
    monkeypatch.setattr(rollouts, "process_count", lambda: count)
    parts = []
    for rank in range(count):
        monkeypatch.setattr(rollouts, "process_rank", lambda rank=rank: rank)
        parts.append(rollouts.chunk(list(range(items))))
    assert all(parts)
    assert [item for part in parts for item in part] == list(range(items))
    with pytest.raises(ValueError, match=f"received {count - 1} items for {count} processes"):
        rollouts.chunk(list(range(count - 1)))


def test_parts_of_a_rollout_make_the_rollout():
    run, problems = test_grpo.make(seed=2, longest=12), test_grpo.problems(1)[0]
    whole, parts = run.roll(problems, 0), [run.roll(problems[:1], 0), run.roll(problems[1:], 0)]
    merged = rollouts.merged(parts)
    assert parts[0].mask.shape[1] != parts[1].mask.shape[1], "nothing to pad"
    for name, value in vars(whole).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(merged, name), value, atol=1e-6, rtol=0, msg=name)
        else:
            assert getattr(merged, name) == value, name


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(COUNT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    common |= {"PYTHONPATH": os.pathsep.join(str(paths.ROOT / name) for name in ("src", "tests"))}
    script = Path(__file__).with_name("processes_main.py")
    running = [
        subprocess.Popen(
            [sys.executable, script, tmp_path], env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in map(str, range(COUNT))
    ]
    assert [process.wait(timeout=240) for process in running] == [0] * COUNT
    (number, records, curve), (_, others, _) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    weights, same = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert number == COUNT
    assert records == others, "the processes tell different stories"
    assert all(torch.equal(weight, same[name]) for name, weight in weights.items())
    expected, expected_curve, alone = test_grpo.train(test_grpo.make(micro_tokens=40), 4)
    for record, other in zip(records, expected, strict=True):
        assert record == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert set(curve) == set(expected_curve)
    for name, weight in alone.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=0)
