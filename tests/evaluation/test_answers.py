import itertools

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

from limbeck.evaluation import answers
from limbeck.evaluation.answers import Question
from limbeck.models import language
from limbeck.tasks.prompted import Prompted

WORDS = list("abcdefghijklmnopqrstuvwxyz")
QUESTIONS = [
    Question((3, 4, 5, 6, 7, 8, 9), ((10, 11), (10, 12, 13), (14,)), 1),
    Question((9,), ((15, 4), (5,)), 0),
    Question((8, 8, 6, 3), ((10, 11), (10, 12, 13), (14,)), 2),
]


@pytest.fixture(scope="module")
def tokenizer():
    return language.load_tokenizer("llama-1x16", WORDS * 2)


def gpt_neo(tokenizer):
    """Its second layer sees the last three tokens only, and counts them by their places in memory."""
    config = GPTNeoConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, window_size=3,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=32, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPTNeoForCausalLM(config).eval()


@pytest.fixture(params=["llama-2x32", "t5-2x32", "gpt-neo"])
def model(request, tokenizer):
    """A model whose probabilities are far from uniform, in float64."""
    if request.param == "gpt-neo":
        return gpt_neo(tokenizer).double()
    model = language.load(request.param, tokenizer, seed=1)
    if request.param.startswith("llama"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8 if parameter.ndim > 1 else 1)
    return model.double()


def naive_logits(model, prompt, answer):
    """One prompt, one answer, no padding, no memory: the logits that predict the answer's tokens."""
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        return model(torch.tensor([prompt]), decoder_input_ids=torch.tensor([[start, *answer[:-1]]])).logits[0]
    return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]


def naive_scores(model, question):
    logprobs = [naive_logits(model, question.prompt, choice).log_softmax(-1) for choice in question.choices]
    pairs = zip(logprobs, question.choices, strict=True)
    return [sum(rows[k, token].item() for k, token in enumerate(choice)) for rows, choice in pairs]


def test_scores_are_the_sums_that_a_naive_loop_finds(model):
    with torch.inference_mode():
        for scores, question in zip(answers._scores(model, QUESTIONS), QUESTIONS, strict=True):
            assert scores == pytest.approx(naive_scores(model, question), rel=1e-6)  # they are summed from float32


def test_predictions_are_the_naive_loops_in_the_order_of_the_questions(model, monkeypatch):
    monkeypatch.setattr(answers, "_BATCH", 2)
    predicted = answers.predictions(model.float(), QUESTIONS, torch.float32)
    scores = [naive_scores(model, question) for question in QUESTIONS]
    assert predicted.tolist() == [score.index(max(score)) for score in scores]


def test_padding_reaches_neither_the_logits_of_an_answer_nor_their_gradient(model):
    tolerance = 1e-5 if isinstance(model, GPTNeoForCausalLM) else 1e-10  # it attends in float32 whatever its dtype

    def gradients(values):
        value = sum((v * torch.linspace(-1, 1, v.numel()).reshape(v.shape)).sum() for v in values)
        return torch.autograd.grad(value, list(model.parameters()))

    logits = answers.head(model)(answers.answer_states(model, QUESTIONS))
    tokens, mask = answers.right_tokens(QUESTIONS, model.device)
    together = [row[kept] for row, kept in zip(logits, mask, strict=True)]
    alone = [naive_logits(model, question.prompt, question.right) for question in QUESTIONS]
    for left, right in zip(together + list(gradients(together)), alone + list(gradients(alone)), strict=True):
        torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)
    assert [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)] == [list(q.right) for q in QUESTIONS]


def test_states_of_many_questions_are_those_of_each(model, monkeypatch):
    monkeypatch.setattr(answers, "_BATCH", 2)
    model.float()
    with torch.inference_mode():
        for question, states in zip(QUESTIONS, answers.all_states(model, QUESTIONS, torch.float32), strict=True):
            logits = answers.head(model)(states[: len(question.right)])
            expected = naive_logits(model, question.prompt, question.right)
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)  # logits of size 10 in float32


def test_reading_states_leaves_the_head_where_it_was(model):
    before = answers.head(model)
    answers.answer_states(model, QUESTIONS)
    assert answers.head(model) is before
    with pytest.raises(IndexError):
        answers.answer_states(model, [Question((3, 10**6), ((4,),), 0)])
    assert answers.head(model) is before


def test_a_prompt_keeps_its_end_and_an_answer_gets_one(tokenizer):
    examples = [Prompted("a b c d", (" e", " f g"), 1), Prompted("h i", (" e", " f g"), 0)]
    plain = answers.encode(examples, tokenizer, longest=3, end=())
    ended = answers.encode(examples, tokenizer, longest=3, end=(tokenizer.eos_token_id,))
    assert [tokenizer.decode(q.prompt) for q in plain] == ["b c d", "h i"]
    assert [tokenizer.decode(q.right) for q in plain] == ["f g", "e"]
    assert [q.right for q in ended] == [(*q.right, tokenizer.eos_token_id) for q in plain]


def test_an_answer_that_begins_another_needs_an_end(tokenizer):
    for choices in itertools.permutations((" f", " e", " f g")):
        example = [Prompted("a b", choices, 0)]
        with pytest.raises(ValueError, match="expected no answer that begins another, got ' f' and ' f g'"):
            answers.encode(example, tokenizer, longest=3, end=())
        assert len(answers.encode(example, tokenizer, longest=3, end=(tokenizer.eos_token_id,))) == 1


def test_an_empty_prompt_is_refused(tokenizer):
    with pytest.raises(ValueError, match="at least one token, got ''"):
        answers.encode([Prompted("", (" b", " c"), 0)], tokenizer, longest=3, end=())


@pytest.fixture
def capped(tokenizer):
    """A decoder that changes its logits after the head, by enough to change which answer wins."""
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, intermediate_size=32, initializer_range=1.0, final_logit_softcapping=0.5, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma2ForCausalLM(config).eval()


def test_logits_that_change_after_the_head_are_scored_as_the_model_says(capped):
    source = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 20, (40, 6), generator=source).tolist()
    questions = [Question(tuple(row[:3]), ((row[3], 21), (row[4], 22, 23), (24,)), 0) for row in rows]
    with torch.no_grad():
        scores = [naive_scores(capped, question) for question in questions]
        answered = answers.predictions(capped, questions, torch.float32).tolist()
        assert answered == [score.index(max(score)) for score in scores]
        logits = [naive_logits(capped, q.prompt, choice) for q in questions for choice in q.choices]
    uncapped = [0.5 * (row / 0.5).clamp(-1 + 1e-6, 1 - 1e-6).atanh() for row in logits]
    values = iter(
        sum(row.log_softmax(-1)[k, token].item() for k, token in enumerate(choice))
        for row, choice in zip(uncapped, (c for q in questions for c in q.choices), strict=True)
    )
    wrong = [[next(values) for _ in question.choices] for question in questions]
    assert answered != [score.index(max(score)) for score in wrong]  # so the cap matters here
    for read in (answers.answer_states, lambda m, q: answers.all_states(m, q, torch.float32)):
        with pytest.raises(ValueError, match="received a Gemma2ForCausalLM, expected a model whose logits are its"):
            read(capped, questions)


def test_predictions_are_those_of_evaluation_mode_and_the_mode_stays(tokenizer):
    model = gpt_neo(tokenizer)
    expected = answers.predictions(model, QUESTIONS * 10, torch.float32)
    noisy = GPTNeoForCausalLM(type(model.config)(**model.config.to_diff_dict() | {"resid_dropout": 0.9}))
    noisy.load_state_dict(model.state_dict())
    assert torch.equal(answers.predictions(noisy.train(), QUESTIONS * 10, torch.float32), expected)
    assert all(module.training for module in noisy.modules())


def test_logits_that_are_no_numbers_are_refused(model):
    with torch.no_grad():
        answers.head(model).weight[14] = torch.nan
    with pytest.raises(ValueError, match=r"NaN among the logits, the first in row \[\]"):
        answers.predictions(model, QUESTIONS, torch.float32)
