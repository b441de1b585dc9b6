"""How examples are split, asked, judged and scored: chains for models of characters, and problems in words."""

import json
import math

import pytest
import torch

from experiments.kdrl.parts import changed
from limbeck import params, sampling
from limbeck.experiments.kdrl import problems, real_model, starting_models
from limbeck.experiments.kdrl.problems import FAMILIES, Chains, WordProblems
from limbeck.models import language
from limbeck.sampling import Completions
from limbeck.tasks import chain_sum, gsm_symbolic, mathematics

TASKS = ("chain_sum", "gsm_symbolic", "mathematics")


@pytest.fixture(scope="module")
def starts():
    return params.load("kdrl", "table_starts", "smoke", starting_models.Params)


@pytest.fixture(scope="module")
def section(starts):
    return starts.chains


@pytest.fixture(scope="module")
def data(section):
    return Chains(section)


@pytest.fixture(scope="module")
def model(starts, data):
    """Untrained."""
    return starting_models.drawn(starts, data, 0)


def parts(data):
    named = {f"train {name}": examples for name, examples in data.family_train.items()}
    named |= {f"test {name}": examples for name, examples in data.family_test.items()}
    named["validation"] = data.validation
    return {name: [example.expression for example in examples] for name, examples in named.items()}


def test_no_chain_is_in_two_parts_and_each_part_has_its_size(section, data):
    splits = parts(data)
    every = [expression for part in splits.values() for expression in part]
    assert len(set(every)) == len(every)
    sizes = dict(zip([f"train {name}" for name in FAMILIES], section.train_sizes, strict=True))
    sizes |= {f"test {name}": section.test_size for name in FAMILIES}
    assert {name: len(part) for name, part in splits.items()} == sizes | {"validation": section.validation_size}


def test_more_texts_to_train_on_change_no_other_part(section, data):
    more = parts(Chains(changed(section, train_sizes=(90, 30, 25))))
    for name, part in parts(data).items():
        assert more[name][: len(part)] == part
        assert (len(more[name]) > len(part)) == name.startswith("train")


def test_families_differ_in_their_terms_and_digits(section, data):
    for name, family in section.families.items():
        for example in data.family_train[name] + data.family_test[name]:
            terms = example.expression.replace("-", "+").split("+")
            assert family.terms[0] <= len(terms) <= family.terms[1]
            assert all(family.digits[0] <= len(term) <= family.digits[1] for term in terms)


def test_a_model_is_asked_the_chain_and_an_equals_sign(data):
    example = data.train[0]
    problem = data.problem(example)
    assert problem.name == example.expression
    assert [chain_sum.ALPHABET[token] for token in problem.prompt] == [*example.expression, "="]


def test_a_right_answer_earns_1_only_if_it_ended(data):
    judge = data.verifier()
    for example in data.train:
        for text, right in ((example.gold, True), (chain_sum.solution(example), True), (f"{example.gold}1", False)):
            completion = data.tokens(text)
            assert data.score(example, (*completion, data.end)) == float(right), text
            assert judge(data.problem(example), (*completion, data.end)) == (float(right), right)
            assert data.score(example, completion) == 0.0
            assert judge(data.problem(example), completion) == (0.0, False)
        assert data.score(example, (data.end,)) == 0.0


def sampled(rows, end):
    """What a sampler would have given: these rows."""
    mask = torch.tensor([[position < len(row) for position in range(4)] for row in rows])
    tokens = torch.tensor([[*row, *[0] * (4 - len(row))] for row in rows])
    ended = torch.tensor([row[-1] == end for row in rows])
    return Completions(tokens, mask, torch.zeros(mask.shape), ended)


def test_scores_are_means_over_the_samples_of_each_example(section, model, monkeypatch):
    """Of two samples each: one right and ended, one right but cut; one wrong and ended, one right with a step.

    All examples are sampled together, twice as they come, then once with the most probable tokens.
    """
    data = Chains(changed(section, measured=("in_domain",), test_samples=2))
    first, second = data.tests["test"] = data.validation[:2]
    wrong = str((int(second.gold) + 1) % 10)
    texts = [data.tokens(text) for text in (first.gold, first.gold, wrong, f"={second.gold}")]
    rows = [text if index == 1 else (*text, data.end) for index, text in enumerate(texts)]
    calls = []

    def sampler(_, dtype, temperature):
        def sample(prompts, names, *, group_size, longest, seed):
            calls.append((len(prompts), group_size, seed, temperature))
            return sampled(rows if group_size == 2 else [rows[0], rows[2]], data.end)

        return sample

    monkeypatch.setattr(data, "sampler", sampler)
    scores = data.test_scores(model, seed=3, dtype=torch.float32)
    expected = {"accuracy": 0.5, "length": sum(map(len, rows)) / 4, "ended": 0.75, "greedy": 0.5}
    assert scores == {f"test/{name}": value for name, value in expected.items()}
    assert calls == [(2, 2, 3, None), (2, 1, 0, problems._COLD)]
    assert data.temperature == 1.0


def most_probable(model, data, prompt):
    """The most probable next token until the end, without a cache, and by how much each is ahead of the second."""
    tokens, leads = list(prompt), []
    while len(leads) < data.params.longest and (not leads or tokens[-1] != data.end):
        best = model(torch.tensor([tokens])).logits[0, -1].topk(2)
        tokens.append(best.indices[0].item())
        leads.append((best.values[0] - best.values[1]).item())
    return tuple(tokens[len(prompt) :]), min(leads)


@torch.no_grad()
def test_greedy_takes_the_most_probable_tokens(data, model, monkeypatch):
    """Where the first token leads by 0.02, at the temperature of 1e-3 the second has a chance of e^-20."""
    rows, examples = [], data.train[:16]
    monkeypatch.setattr(data, "score", lambda _, tokens: rows.append(tokens) or 0.0)
    data.measure(model, examples, samples=1, dtype=torch.float32, temperature=problems._COLD)
    expected = [most_probable(model, data, data.problem(example).prompt) for example in examples]
    clear = [(tokens, best) for tokens, (best, lead) in zip(rows, expected, strict=True) if lead > 0.02]
    assert [tokens for tokens, _ in clear] == [best for _, best in clear]
    assert len(clear) > 4


@pytest.mark.parametrize("measured", [("in_domain",), ("larger", "in_domain"), FAMILIES])
def test_only_the_families_that_are_asked_for_are_measured(section, model, measured, monkeypatch):
    data = Chains(changed(section, measured=measured))
    monkeypatch.setattr(data, "measure", lambda _, examples, **__: {"accuracy": float(len(examples[0].expression))})
    scores = data.test_scores(model, seed=0, dtype=torch.float32)
    splits = {"in_domain": "test", "longer": "longer", "larger": "larger"}
    expected = {splits[name]: len(data.family_test[name][0].expression) for name in measured}
    names = ("accuracy", "greedy")
    assert scores == {f"{split}/{name}": value for split, value in expected.items() for name in names}


def test_a_chain_that_cannot_be_judged_is_an_error_since_no_record_would_tell(data, model, monkeypatch):
    monkeypatch.setattr(data, "judge", lambda *_: math.sqrt(-1))
    monkeypatch.setattr(data, "sampler", lambda *_: lambda *_, **__: sampled([(1, data.end)], data.end))
    with pytest.raises(ValueError, match="math domain error"):
        data.measure(model, data.validation[:1], samples=1, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"terms": (3,)}, r"received terms \(3,\), expected the least and the most, at least 1"),
        ({"larger_digits": (3, 2)}, r"received larger_digits \(3, 2\), expected the least and the most"),
        ({"longer_terms": (0, 2)}, r"received longer_terms \(0, 2\), expected the least and the most, at least 1"),
        (
            {"train_sizes": (60, 20)},
            r"received train_sizes \(60, 20\), expected one each for in_domain, longer",
        ),
        ({"measured": ("harder",)}, "measured must be one of in_domain, longer, larger; got 'harder'"),
        ({"validation_size": 0}, "validation_size must be above 0, got 0"),
        ({"test_samples": 0}, "test_samples must be above 0, got 0"),
    ],
)
def test_a_section_of_chains_that_cannot_be_is_refused(section, change, message):
    with pytest.raises(ValueError, match=message):
        changed(section, **change)


@pytest.fixture(scope="session")
def local_problems(tmp_path_factory):
    """A folder that `datasets.load_dataset` reads, with twelve problems."""
    folder = tmp_path_factory.mktemp("problems")
    rows = [{"problem": f"Say {n} .", "answer": str(n)} for n in range(12)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


@pytest.fixture(scope="module")
def words():
    return params.load("kdrl", "fig_real_model", "smoke", real_model.Params).words


def made(section, judge, together=2):
    return WordProblems(section, "llama-1x16", judge, together=together)


@pytest.fixture(params=TASKS)
def each(request, words, local_problems):
    """The smoke section's problems, of every task."""
    task = f"math/{local_problems}" if request.param == "mathematics" else request.param
    return changed(words, task=task, taught_size=2, train_size=3, validation_size=3, test_size=4)


def no_judge(*_):
    raise AssertionError("nothing was to be judged")


def test_splits_have_their_sizes_and_share_no_question(each):
    data = made(each, no_judge)
    splits = (data.teacher_train, data.train, data.validation, data.tests["test"])
    assert [len(split) for split in splits] == [2, 3, 3, 4]
    assert len({example.question for split in splits for example in split}) == 12
    again = made(each, no_judge)
    assert (again.teacher_train, again.train, again.validation, again.tests["test"]) == splits
    assert made(changed(each, data_seed=1), no_judge).train != data.train


def test_the_own_solution_is_right_once_it_ended_and_wrong_before(each):
    if each.task.startswith("math/"):
        pytest.importorskip("math_verify")
    with problems.word_judge(each) as judge:
        data = made(each, judge)
        for example in data.train:
            text = f"The answer is {example.gold}"
            words = tuple(data.tokenizer.encode(text, add_special_tokens=False))
            if data.tokenizer.unk_token_id in words or example.gold.startswith("-"):
                continue
            assert data.score(example, (*words, data.end)) == 1.0
            assert data.score(example, words) == 0.0, "it was cut"
            assert judge(example, data.solution(example)) == 1.0
            assert judge(example, "garbage") == 0.0


def test_a_worked_solution_is_the_tasks_own_and_ends_once(each):
    data = made(each, no_judge)
    module = chain_sum if each.task == "chain_sum" else gsm_symbolic if each.task == "gsm_symbolic" else mathematics
    for example in data.train:
        assert data.solution(example) == module.solution(example)
        tokens = data.worked(example)
        assert tokens.count(data.end) == 1
        assert tokens[-1] == data.end


def test_the_answer_of_a_chain_is_the_last_number_with_its_sign(words):
    example = next(e for e in chain_sum.examples(chain_sum.Family((2, 2), (1, 1)), 150, seed=0) if int(e.gold) < -1)
    with problems.word_judge(words) as judge:
        assert judge(example, f"It is {example.gold}.") == 1.0
        assert judge(example, f"1+1=2; so {example.gold}") == 1.0
        assert judge(example, f"It is {example.gold[1:]}.") == 0.0
        assert judge(example, f"{example.gold}, or 9") == 0.0


def test_a_question_is_asked_with_a_space_behind_or_in_the_chat_template(words, monkeypatch):
    data = made(words, no_judge)
    plain = data.problem(data.train[0])
    assert plain.name == data.train[0].question
    assert plain.prompt == tuple(data.tokenizer.encode(data.train[0].question + " "))
    known = data.tokenizer
    known.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} ={% endif %}"
    )
    monkeypatch.setattr(language, "load_tokenizer", lambda *_: known)
    asked = made(changed(words, chat=True), no_judge).problem(data.train[0])
    assert asked.prompt == tuple(known.encode(data.train[0].question + " =", add_special_tokens=False))


def test_a_chat_without_a_template_is_refused(words):
    with pytest.raises(ValueError, match="expected a chat template with the tokenizer of llama-1x16"):
        made(changed(words, chat=True), no_judge)


@pytest.fixture
def spoken(words, monkeypatch):
    """Words with a model, and a sampler that writes what it is told, by question: rows of (text, ended)."""
    data, script, seen = made(words, no_judge), {}, []
    data.model = language.load("llama-1x16", data.tokenizer, seed=0)

    class Scripted:
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

    monkeypatch.setattr(problems, "Sampled", Scripted)
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
    scores = data.measure(data.model, data.train[:3], samples=2, dtype=torch.float32, seed=5)
    assert scores == pytest.approx(
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
    data.temperature, data.together, examples = 0.7, 4, data.tests["test"]
    data.judge = lambda _, text: float("1" in text)
    for example in examples:
        script[example.question] = [("= 1", True), ("=", True)]
    sampled = data.measure(data.model, examples, samples=2, dtype=torch.float32)
    assert sampled["accuracy"] == 0.5
    assert seen[-1][4] == 0.7
    script |= {question: rows[:1] for question, rows in script.items()}
    data.params = changed(data.params, test_samples=1)
    scores = data.test_scores(data.model, seed=3, dtype=torch.float32)
    assert set(scores) == {f"test/{name}" for name in ("accuracy", "length", "ended", "unjudged", "greedy")}
    assert [call[1:4] for call in seen[-2:]] == [(1, 12, 3), (1, 12, 0)]
    assert seen[-1][4] < 0.01 < seen[-2][4]


def test_a_verdict_is_correct_with_the_full_reward_and_a_judge_that_raises_is_heard(words):
    data = made(words, lambda _, text: float("1" in text))
    example = data.train[0]
    problem, one = data.problem(example), data.tokenizer.encode("1", add_special_tokens=False)
    assert data.verifier()(problem, (*one, data.end)) == (1.0, True)
    assert data.verifier()(problem, (data.end,)) == (0.0, False)
    broken = made(words, lambda *_: math.sqrt(-1))
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
def test_problems_in_words_that_cannot_be_are_refused(words, change, message):
    with pytest.raises(ValueError, match=message):
        changed(words, **change)
