import random
import re

import pytest
import torch

from limbeck.tasks import chain_sum
from limbeck.tasks.chain_sum import Family

FAMILIES = (Family((3, 4), (1, 1)), Family((2, 2), (2, 3)), Family((1, 5), (1, 2)))
FAMILY = FAMILIES[0]


def terms(expression):
    """A chain's terms with their signs; raises where there is anything else."""
    assert re.fullmatch(r"-?\d+([+-]\d+)*", expression), expression
    return [int(term) for term in re.findall(r"[+-]?\d+", expression)]


def steps(solution):
    """Each step's operands, if written, and its result."""
    halves = [step.rpartition("=") for step in solution.split(";")]
    return [(terms(left) if equals else None, int(right)) for left, equals, right in halves]


def partial_sums(example):
    numbers = terms(example.expression)
    return [sum(numbers[: end + 1]) for end in range(1, len(numbers))]


@pytest.fixture(scope="module")
def examples():
    return chain_sum.examples(FAMILY, 400, seed=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_examples_are_distinct_chains_of_as_many_terms_and_digits_as_their_family_has(family):
    examples = chain_sum.examples(family, 100, seed=3)
    chains = [terms(example.expression) for example in examples]
    assert len({example.expression for example in examples}) == 100
    assert {len(chain) for chain in chains} == set(range(family.terms[0], family.terms[1] + 1))
    digits = {len(str(abs(number))) for chain in chains for number in chain}
    assert digits == set(range(family.digits[0], family.digits[1] + 1))


def test_the_gold_answer_is_the_sum_and_the_question_asks_for_it(examples):
    for example in examples:
        assert int(example.gold) == sum(terms(example.expression))
        assert example.expression in example.question.replace(" ", "")
    assert any(int(example.gold) < 0 for example in examples)


def test_a_longer_list_begins_with_the_shorter_and_none_is_refused(examples):
    assert chain_sum.examples(FAMILY, 100, seed=3) == examples[:100]
    with pytest.raises(ValueError, match="count must be above 0, got 0"):
        chain_sum.examples(FAMILY, 0, seed=3)


def test_draws_repeat_whatever_the_global_generators_hold_and_another_seed_has_others(examples, global_generators):
    before = global_generators()
    drawn = []
    for _ in range(2):
        again = chain_sum.examples(FAMILY, 50, seed=3)
        options = {"terse": 0.5, "mistakes": 0.5, "seed": 4}
        drawn.append((again, [chain_sum.solution(example, **options) for example in again]))
        assert global_generators() == before
        torch.rand(3)
        random.random()
        before = global_generators()
    assert drawn[0] == drawn[1]
    assert drawn[0][1] != [chain_sum.solution(e, terse=0.5, mistakes=0.5, seed=5) for e in drawn[0][0]]
    other = chain_sum.examples(FAMILY, 50, seed=10_000)
    assert len({e.expression for e in other} & {e.expression for e in examples}) < 25


def test_a_worked_solution_goes_from_sum_to_sum_and_earns_1(examples):
    for example in examples:
        solution = chain_sum.solution(example)
        sums, numbers = partial_sums(example), terms(example.expression)
        befores = [numbers[0], *sums]
        assert steps(solution) == [([x, y], x + y) for x, y in zip(befores, numbers[1:], strict=False)]
        assert steps(solution)[-1][1] == int(example.gold)
        assert chain_sum.reward(example, solution) == 1.0
        assert set(solution) <= set(chain_sum.ALPHABET)


def test_a_terse_solution_has_the_results_alone(examples):
    for example in examples:
        solution = chain_sum.solution(example, terse=1.0)
        assert steps(solution) == [(None, value) for value in partial_sums(example)]
        assert chain_sum.reward(example, solution) == 1.0


def test_each_step_with_a_mistake_is_wrong_and_the_chain_goes_on_with_it(examples):
    for example in examples:
        total, *numbers = terms(example.expression)
        for (operands, result), number in zip(steps(chain_sum.solution(example, mistakes=1.0)), numbers, strict=True):
            assert operands == [total, number], "a step does not begin where the one before ended"
            assert result != sum(operands)
            total = result


def test_mistakes_and_terse_steps_are_as_frequent_as_asked(examples):
    """About 1,000 steps; four standard errors are under 0.06."""
    written = [step for example in examples for step in steps(chain_sum.solution(example, mistakes=0.3))]
    assert sum(sum(operands) != result for operands, result in written) / len(written) == pytest.approx(0.3, abs=0.06)
    written = [step for example in examples for step in steps(chain_sum.solution(example, terse=0.6))]
    assert sum(operands is None for operands, _ in written) / len(written) == pytest.approx(0.6, abs=0.06)


def test_a_mistake_that_is_not_made_up_for_earns_0(examples):
    for example in examples:
        solution = chain_sum.solution(example, mistakes=0.5, terse=0.5)
        assert chain_sum.reward(example, solution) == float(steps(solution)[-1][1] == int(example.gold))


@pytest.mark.parametrize("change", ["{}0", "1{}", "{}-", "={}=", "{};", "{}+0", "0+{}", "--{}", "{}.5", "a{}"])
def test_what_is_not_the_answer_and_nothing_else_earns_0(examples, change):
    wrong = [chain_sum.reward(example, change.format(example.gold)) for example in examples[:50] if example.gold != "0"]
    assert wrong == [0.0] * len(wrong)
    assert len(wrong) > 40


def test_garbage_nothing_and_another_digit_earn_0_and_the_gold_answer_1(examples):
    for example in examples:
        for text in ("", ";", "=", "+", "-", "garbage", "nan", example.expression, str(int(example.gold) + 1)):
            assert chain_sum.reward(example, text) == 0.0
        assert chain_sum.reward(example, example.gold) == 1.0


def test_signs_and_zeros_in_front_change_no_number():
    (seven,) = [e for e in chain_sum.examples(Family((2, 2), (1, 1)), 190, seed=0) if e.expression == "3+4"]
    for text in ("7", "+7", "07", "+07", "3+4=7", "1;2=3;7"):
        assert chain_sum.reward(seven, text) == 1.0, text
    for text in ("-7", "70", "17", "7;8", "7=8", "0", "+-7", "0_7", "00,7", "7e0", "７"):
        assert chain_sum.reward(seven, text) == 0.0, text


@pytest.mark.parametrize(
    ("text", "answer"), [("7", "7"), ("1+2=3;3+4=7", "7"), ("3;7", "7"), ("3+4=-7", "-7"), ("7;", ""), ("", "")]
)
def test_the_answer_is_what_follows_the_last_step(text, answer):
    assert chain_sum.answer(text) == answer


def test_more_examples_than_a_family_has_are_refused():
    """Two digits and a sign between them: 200 chains."""
    with pytest.raises(ValueError, match=r"received count 201, expected at most (1\d\d|200): Family.* with seed 0"):
        chain_sum.examples(Family((2, 2), (1, 1)), 201, seed=0)
