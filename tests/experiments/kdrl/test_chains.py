import dataclasses

import pytest
import torch

from limbeck import params
from limbeck.experiments.kdrl import chains, starting_models
from limbeck.experiments.kdrl.chains import Chains
from limbeck.sampling import Completions
from limbeck.tasks import chain_sum


@pytest.fixture(scope="module")
def section():
    return params.load("kdrl", "table_starts", "smoke", starting_models.Params)


@pytest.fixture(scope="module")
def data(section):
    return Chains(section)


@pytest.fixture(scope="module")
def model(section, data):
    """Untrained."""
    return starting_models._drawn(section, data, 0)


def parts(data):
    named = {f"train {name}": found for name, found in data.train.items()}
    named |= {f"test {name}": found for name, found in data.test.items()} | {"validation": data.validation}
    return {name: [example.expression for example in found] for name, found in named.items()}


def test_no_chain_is_in_two_parts_and_each_part_has_its_size(section, data):
    found = parts(data)
    every = [expression for part in found.values() for expression in part]
    assert len(set(every)) == len(every)
    sizes = dict(zip([f"train {name}" for name in chains.FAMILIES], section.train_sizes, strict=True))
    sizes |= {f"test {name}": section.test_size for name in chains.FAMILIES}
    assert {name: len(part) for name, part in found.items()} == sizes | {"validation": section.validation_size}


def test_more_texts_to_train_on_change_no_other_part(section, data):
    more = parts(Chains(dataclasses.replace(section, train_sizes=(90, 30, 25))))
    for name, part in parts(data).items():
        assert more[name][: len(part)] == part
        assert (len(more[name]) > len(part)) == name.startswith("train")


def test_families_differ_in_their_terms_and_digits(section, data):
    for name, family in zip(chains.FAMILIES, section.families, strict=True):
        for example in data.train[name] + data.test[name]:
            terms = example.expression.replace("-", "+").split("+")
            assert family.terms[0] <= len(terms) <= family.terms[1]
            assert all(family.digits[0] <= len(term) <= family.digits[1] for term in terms)


def test_a_model_is_asked_the_chain_and_an_equals_sign(data):
    example = data.train["in_domain"][0]
    problem = data.problem(example)
    assert problem.name == example.expression
    assert [chain_sum.ALPHABET[token] for token in problem.prompt] == [*example.expression, "="]


def test_a_right_answer_earns_1_only_if_it_ended(data):
    for example in data.validation:
        judge = data.verifier(data.validation)
        for said, right in ((example.gold, True), (chain_sum.solution(example), True), (f"{example.gold}0", False)):
            completion = data.tokens(said)
            assert data.score(example, (*completion, data.end)) == float(right), said
            assert judge(data.problem(example), (*completion, data.end)) == (float(right), right)
            assert data.score(example, completion) == 0.0
            assert judge(data.problem(example), completion) == (0.0, False)
        assert data.score(example, (data.end,)) == 0.0


def sampled(rows, end):
    """What a sampler would have said: these rows."""
    mask = torch.tensor([[position < len(row) for position in range(4)] for row in rows])
    tokens = torch.tensor([[*row, *[0] * (4 - len(row))] for row in rows])
    ended = torch.tensor([row[-1] == end for row in rows])
    return Completions(tokens, mask, torch.zeros(mask.shape), ended)


def test_scores_are_means_over_the_samples_of_each_example(data, model, monkeypatch):
    """Of two samples each: one right and ended, one right but cut; one wrong and ended, one right with a step."""
    first, second = data.validation[:2]
    wrong = str((int(second.gold) + 1) % 10)
    texts = [data.tokens(text) for text in (first.gold, first.gold, wrong, f"={second.gold}")]
    rows = [(*text, data.end) if at != 1 else text for at, text in enumerate(texts)]
    asked = []

    def said(model, examples, samples, temperature, *_):
        asked.append((samples, temperature))
        return sampled(rows if samples == 2 else [rows[0], rows[2]], data.end)

    monkeypatch.setattr(data, "_sampled", said)
    options = {"samples": 2, "seed": 0, "dtype": torch.float32}
    found = data.measure(model, [first, second], **options)
    assert found == {"accuracy": 0.5, "length": sum(map(len, rows)) / 4, "ended": 0.75}
    assert data.greedy(model, [first, second], torch.float32) == 0.5
    assert [samples for samples, _ in asked] == [2, 1]
    assert asked[0][1] == 1.0
    assert asked[1][1] < 0.01


def most_probable(model, data, prompt):
    """The most probable next token until the end, without a cache, and by how much each is ahead of the second."""
    tokens, leads = list(prompt), []
    while len(leads) < data.section.longest and (not leads or tokens[-1] != data.end):
        best = model(torch.tensor([tokens])).logits[0, -1].topk(2)
        tokens.append(best.indices[0].item())
        leads.append((best.values[0] - best.values[1]).item())
    return tuple(tokens[len(prompt) :]), min(leads)


@torch.no_grad()
def test_greedy_takes_the_most_probable_tokens(data, model, monkeypatch):
    """Where the first token leads by 0.02, at the temperature of 1e-3 the second has a chance of e^-20."""
    said, examples = [], data.train["in_domain"][:16]
    monkeypatch.setattr(data, "score", lambda _, tokens: said.append(tokens) or 0.0)
    data.greedy(model, examples, torch.float32)
    expected = [most_probable(model, data, data.problem(example).prompt) for example in examples]
    clear = [(tokens, best) for tokens, (best, lead) in zip(said, expected, strict=True) if lead > 0.02]
    assert [tokens for tokens, _ in clear] == [best for _, best in clear]
    assert len(clear) > 4


@pytest.mark.parametrize("measured", [("in_domain",), ("larger", "in_domain"), chains.FAMILIES])
def test_only_the_families_that_are_asked_for_are_measured(section, model, measured, monkeypatch):
    data = Chains(dataclasses.replace(section, measured=measured))
    monkeypatch.setattr(data, "measure", lambda _, examples, **__: {"accuracy": float(len(examples[0].expression))})
    monkeypatch.setattr(data, "greedy", lambda *_: 0.25)
    found = data.test_scores(model, seed=0, dtype=torch.float32)
    spaces = {"in_domain": "test", "longer": "longer", "larger": "larger"}
    expected = {f"{spaces[name]}/accuracy": len(data.test[name][0].expression) for name in measured}
    assert found == expected | {f"{spaces[name]}/greedy": 0.25 for name in measured}


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
        dataclasses.replace(section, **change)
