import itertools
import random
import re

import pytest
import torch

from limbeck.tasks import gsm_symbolic


@pytest.fixture(scope="module")
def examples():
    return gsm_symbolic.examples(400, seed=3)


def entry(gold):
    return gsm_symbolic.Example({"question": "?", "answer": gold, "metadata": {}})


def test_examples_are_distinct_questions_with_a_number_as_their_answer(examples):
    assert len({example.question for example in examples}) == 400
    assert all(re.fullmatch(r"\d+(\.\d+)?", example.gold) for example in examples)
    assert all("final answer" in example.question for example in examples)


def test_a_longer_list_begins_with_the_shorter_and_none_is_refused(examples):
    assert gsm_symbolic.examples(50, seed=3) == examples[:50]
    with pytest.raises(ValueError, match="count must be above 0, got 0"):
        gsm_symbolic.examples(0, seed=3)


def test_draws_repeat_whatever_the_global_generators_hold(examples, global_generators):
    before = global_generators()
    assert gsm_symbolic.examples(50, seed=3) == examples[:50]
    assert global_generators() == before
    torch.rand(3)
    random.random()
    assert gsm_symbolic.examples(50, seed=3) == examples[:50]


def test_neighbouring_seeds_share_no_item(examples, monkeypatch):
    """reasoning-gym draws its item i from its seed + i, so its seeds must lie further apart than a list is long."""
    starts, create = [], gsm_symbolic.reasoning_gym.create_dataset

    def recorded(*arguments, seed, **options):
        starts.append(seed)
        return create(*arguments, seed=seed, **options)

    monkeypatch.setattr(gsm_symbolic.reasoning_gym, "create_dataset", recorded)
    for seed in range(8):
        gsm_symbolic.examples(5, seed=seed)
    starts.sort()
    assert min(y - x for x, y in itertools.pairwise(starts)) > 10**6
    other = {example.question for example in gsm_symbolic.examples(400, seed=4)}
    assert len(other & {example.question for example in examples}) < 20


def test_the_gold_answer_earns_1_however_it_is_spelled_and_another_number_0(examples):
    for example in examples:
        whole = "." not in example.gold
        spelled = [
            example.gold,
            f"The answer is {example.gold}.",
            f"1 + 2 = 3, so ${example.gold}",
            f"**{example.gold}**",
        ]
        spelled += [f"{int(example.gold):,}", f"{example.gold}.0", f"so 7% of it, {example.gold} km!"] if whole else []
        for text in spelled:
            assert gsm_symbolic.reward(example, text) == 1.0, text
        for text in (f"{example.gold}1", f"1{example.gold}", f"-{example.gold}", f"{example.gold} or 999999"):
            assert gsm_symbolic.reward(example, text) == 0.0, text


@pytest.mark.parametrize("text", ["", " ", "garbage", "nan", "inf", "-", ".", "####", "1/0", "ten", "x = y", "٧"])
def test_garbage_earns_0(text):
    assert gsm_symbolic.reward(entry("7"), text) == 0.0


def test_a_worked_solution_ends_in_the_gold_answer_and_earns_1(examples):
    for example in examples:
        solution = gsm_symbolic.solution(example)
        assert solution.splitlines()[-1] == f"#### {example.gold}"
        assert solution.count("####") == 1
        assert len(solution.splitlines()) > 1
        assert gsm_symbolic.reward(example, solution) == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 3 = 5.", "5"),
        ("5, then 6, so 7", "7"),
        ("1,234,567", "1234567"),
        ("12,34", "34"),
        ("1234,567", "567"),
        ("$3.50", "3.50"),
        ("costs £1,200.25 in all", "1200.25"),
        ("it is -4", "-4"),
        ("it is −4", "-4"),
        ("-$4", "-4"),
        ("10-4", "4"),
        ("x-4", "4"),
        ("(3)-4", "4"),
        ("10 - 4", "4"),
        ("(-4)", "-4"),
        (".5", "0.5"),
        ("50%", "50"),
        ("9.", "9"),
        ("#### 42", "42"),
        ("#### 42\n", "42"),
        ("007", "007"),
        ("1{,}234", "1234"),
        ("\\boxed{1{,}234}", "1234"),
        ("1\\,234", "1234"),
        ("\\boxed{3.50} for each of 4", "3.50"),
        ("\\boxed{5}, no: \\boxed{6}, of 7", "6"),
        ("\\boxed{\\frac{7}{2}}", "7/2"),
        ("\\boxed{9999999!}", ""),
        ("none", ""),
        ("", ""),
    ],
)
def test_the_answer_is_the_last_number_of_the_text(text, answer):
    assert gsm_symbolic.answer(text) == answer


def test_half_points_count():
    assert gsm_symbolic.reward(entry("2362.5"), "so 2,362.50 dollars") == 1.0
    assert gsm_symbolic.reward(entry("0.5"), ".5") == 1.0
    assert gsm_symbolic.reward(entry("2362.5"), "2362") == 0.0
    assert gsm_symbolic.reward(entry("3.5"), "\\boxed{\\frac{7}{2}}") == 1.0
    assert gsm_symbolic.reward(entry("2"), "\\boxed{\\frac{7}{2}}") == 0.0


def test_numbers_that_floats_cannot_tell_apart_are_not_equal():
    assert gsm_symbolic.reward(entry("9007199254740993"), "9007199254740992") == 0.0
    assert gsm_symbolic.reward(entry("2.5"), "2.50000000000000000001") == 0.0


def test_a_text_is_never_run(tmp_path):
    mark = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch() or 7"
    assert gsm_symbolic.reward(entry("7"), code) == 1.0
    assert gsm_symbolic.reward(entry("8"), f"7+1 if {code} else 3") == 0.0
    assert not mark.exists()


def test_more_examples_than_there_are_are_refused(monkeypatch):
    """Everything drawn is the same question."""
    one = gsm_symbolic.examples(1, seed=0)[0].entry
    monkeypatch.setattr(gsm_symbolic.reasoning_gym, "create_dataset", lambda *_, **__: [one] * 9)
    with pytest.raises(ValueError, match="received count 2, expected at most 1: seed 5 has no more"):
        gsm_symbolic.examples(2, seed=5)
