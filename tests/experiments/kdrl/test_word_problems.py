"""How problems in words are split, asked, judged and scored."""

import dataclasses
import json
import math

import pytest
import torch

from limbeck import params, sampling
from limbeck.experiments.kdrl import real_model, word_problems
from limbeck.experiments.kdrl.word_problems import Words
from limbeck.models import language
from limbeck.tasks import chain_sum, gsm_symbolic, mathematics

NAMES = ("chain_sum", "gsm_symbolic", "mathematics")


@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    """A folder that `datasets.load_dataset` reads, with twelve problems."""
    folder = tmp_path_factory.mktemp("problems")
    rows = [{"problem": f"Say {n} .", "answer": str(n)} for n in range(12)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


@pytest.fixture(scope="module")
def section():
    return params.load("kdrl", "fig_real_model", "smoke", real_model.Params)


@pytest.fixture(params=NAMES)
def each(request, section, problems):
    """The smoke section on every task."""
    task = f"math/{problems}" if request.param == "mathematics" else request.param
    return dataclasses.replace(section, task=task, taught_size=2, train_size=3, validation_size=3, test_size=4)


def no_judge(*_):
    raise AssertionError("nothing was to be judged")


def test_splits_have_their_sizes_and_share_no_question(each):
    data = Words(each, no_judge)
    parts = (data.taught, data.train, data.validation, data.test)
    assert [len(part) for part in parts] == [2, 3, 3, 4]
    assert len({example.question for part in parts for example in part}) == 12
    again = Words(each, no_judge)
    assert (again.taught, again.train, again.validation, again.test) == parts
    assert Words(dataclasses.replace(each, data_seed=1), no_judge).train != data.train


def test_the_own_solution_is_right_once_it_ended_and_wrong_before(each):
    if each.task.startswith("math/"):
        pytest.importorskip("math_verify")
    with word_problems.judge(each) as judge:
        data = Words(each, judge)
        for example in data.train:
            said = f"The answer is {example.gold}"
            words = tuple(data.tokenizer.encode(said, add_special_tokens=False))
            if data.tokenizer.unk_token_id in words or example.gold.startswith("-"):
                continue
            assert data.score(example, (*words, data.end)) == 1.0
            assert data.score(example, words) == 0.0, "it was cut"
            assert judge(example, word_problems.solution(example)) == 1.0
            assert judge(example, "garbage") == 0.0


def test_a_worked_solution_is_the_tasks_own_and_ends_once(each):
    data = Words(each, no_judge)
    module = chain_sum if each.task == "chain_sum" else gsm_symbolic if each.task == "gsm_symbolic" else mathematics
    for example in data.train:
        assert word_problems.solution(example) == module.solution(example)
        tokens = data.worked(example)
        assert tokens.count(data.end) == 1
        assert tokens[-1] == data.end


def test_the_answer_of_a_chain_is_the_last_number_with_its_sign(section):
    example = next(e for e in chain_sum.examples(chain_sum.Family((2, 2), (1, 1)), 150, seed=0) if int(e.gold) < -1)
    with word_problems.judge(section) as judge:
        assert judge(example, f"It is {example.gold}.") == 1.0
        assert judge(example, f"1+1=2; so {example.gold}") == 1.0
        assert judge(example, f"It is {example.gold[1:]}.") == 0.0
        assert judge(example, f"{example.gold}, or 9") == 0.0


def test_a_question_is_asked_with_a_space_behind_or_in_the_chat_template(section, monkeypatch):
    data = Words(section, no_judge)
    plain = data.problem(data.train[0])
    assert plain.name == data.train[0].question
    assert plain.prompt == tuple(data.tokenizer.encode(data.train[0].question + " "))
    known = data.tokenizer
    known.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} ={% endif %}"
    )
    monkeypatch.setattr(language, "load_tokenizer", lambda *_: known)
    asked = Words(dataclasses.replace(section, chat=True), no_judge).problem(data.train[0])
    assert asked.prompt == tuple(known.encode(data.train[0].question + " =", add_special_tokens=False))


def test_a_chat_without_a_template_is_refused(section):
    with pytest.raises(ValueError, match="expected a chat template with the tokenizer of llama-1x16"):
        Words(dataclasses.replace(section, chat=True), no_judge)


@pytest.fixture
def spoken(section, monkeypatch):
    """Words with a model, and a sampler that writes what it is told, by question: rows of (text, ended)."""
    data, script, seen = Words(section, no_judge), {}, []
    data.model = language.load("llama-1x16", data.tokenizer, seed=0)

    class Told:
        def __init__(self, *settings):
            self.settings, self.temperature = settings, settings[2]

        def __call__(self, prompts, names, *, group_size, longest, seed):
            seen.append((len(prompts), group_size, longest, seed, self.settings[2]))
            rows = [row for name in names for row in script[name.removeprefix("measured/")]]
            assert len(rows) == group_size * len(prompts)
            texts = [data.tokenizer.encode(text, add_special_tokens=False) for text, _ in rows]
            tokens = [tuple(text + [data.end] * ended) for text, (_, ended) in zip(texts, rows, strict=True)]
            ids, mask = sampling.padded(tokens, torch.device("cpu"))
            ended = torch.tensor([ended for _, ended in rows])
            return sampling.Completions(ids, mask.bool(), torch.zeros(ids.shape), ended)

    monkeypatch.setattr(language, "Sampled", Told)
    return data, script, seen


def test_scores_are_means_over_samples_and_what_cannot_be_judged_is_not_wrong(spoken):
    """Three problems of two samples, of which one cannot be judged and one was cut."""
    data, script, seen = spoken
    texts = [[("= 1", True), ("=", True)], [("= 1", False), ("- -", True)], [("= 1", True), ("= 1", True)]]
    for example, rows in zip(data.train[:3], texts, strict=True):
        script[example.question] = rows

    asked = []

    def judge(example, text):
        asked.append(data.train.index(example))
        if "-" in text:
            raise TimeoutError
        return float("1" in text)

    data.judge = judge
    found = data.measure(data.model, data.train[:3], samples=2, dtype=torch.float32, seed=5)
    assert found == pytest.approx(
        {"accuracy": 3 / 5, "length": (3 + 2 + 2 + 3 + 3 + 3) / 6, "ended": 5 / 6, "unjudged": 1 / 6}
    )
    assert asked == [0, 0, 1, 2, 2], "what was cut needs no judge"
    assert [call[:4] for call in seen] == [(2, 2, 12, 5), (1, 2, 12, 5)], "as many prompts together as in a step"


def test_nothing_judged_is_an_error(spoken):
    data, script, _ = spoken
    script[data.train[0].question] = [("= 1", True)]

    def judge(*_):
        raise TimeoutError

    data.judge = judge
    with pytest.raises(ValueError, match="received no verdict on 1 completions"):
        data.measure(data.model, data.train[:1], samples=1, dtype=torch.float32)


def test_the_test_split_is_sampled_at_the_temperature_and_once_more_with_the_most_probable_tokens(spoken):
    data, script, seen = spoken
    data.section = dataclasses.replace(data.section, temperature=0.7, prompts=4)
    data.judge = lambda _, text: float("1" in text)
    for example in data.test:
        script[example.question] = [("= 1", True), ("=", True)]
    drawn = data.measure(data.model, data.test, samples=2, dtype=torch.float32)
    assert drawn["accuracy"] == 0.5
    assert seen[-1][4] == 0.7
    script |= {question: rows[:1] for question, rows in script.items()}
    data.section = dataclasses.replace(data.section, test_samples=1)
    found = data.test_scores(data.model, seed=3, dtype=torch.float32)
    assert set(found) == {f"test/{name}" for name in ("accuracy", "length", "ended", "unjudged", "greedy")}
    assert [call[1:4] for call in seen[-2:]] == [(1, 12, 3), (1, 12, 0)]
    assert seen[-1][4] < 0.01 < seen[-2][4]


def test_a_verdict_is_correct_with_the_full_reward_and_a_judge_that_raises_is_heard(section):
    data = Words(section, lambda _, text: float("1" in text))
    example = data.train[0]
    problem, one = data.problem(example), data.tokenizer.encode("1", add_special_tokens=False)
    assert data.verifier()(problem, (*one, data.end)) == (1.0, True)
    assert data.verifier()(problem, (data.end,)) == (0.0, False)
    broken = Words(section, lambda *_: math.sqrt(-1))
    with pytest.raises(ValueError, match="math domain error"):
        broken.verifier()(problem, (*one, data.end))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "sums"}, "task must be one of chain_sum, gsm_symbolic, math/<data set>; got 'sums'"),
        ({"terms": (2,)}, r"received terms \(2,\), expected two"),
        ({"columns": ("problem",)}, r"received columns \('problem',\), expected two"),
        ({"test_size": 0}, "test_size must be above 0, got 0"),
    ],
)
def test_a_section_that_cannot_be_run_is_refused(section, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(section, **change)
