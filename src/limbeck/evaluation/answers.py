"""Classification in words: a language model reads a prompt and is asked for one of several answers.

`answer_states` is teacher forcing on the right answer; `predictions` is rank classification: the answer with the
largest sum of token log-probabilities, over the whole vocabulary, wins. Both read the model at answer positions only,
and only there the head is computed, since a vocabulary of 50,000 words costs more than the layers of a small model.
Whether that gives the model's own logits is tried once per model; where it does not, `predictions` reads whole rows.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from limbeck import models
from limbeck.tasks.prompted import Prompted

_BATCH = 32
Tokens = tuple[int, ...]


class Question(NamedTuple):
    """A prompt and its possible answers as token ids, and the index of the right one."""

    prompt: Tokens
    choices: tuple[Tokens, ...]
    answer: int

    @property
    def right(self) -> Tokens:
        """The right answer."""
        return self.choices[self.answer]


def encode(
    examples: Sequence[Prompted], tokenizer: PreTrainedTokenizerBase, *, longest: int, end: Tokens
) -> list[Question]:
    """Token ids of the examples; a prompt keeps its last `longest` tokens, where the question stands.

    Every answer ends in `end`: an encoder-decoder's end token, or nothing.
    Raises ValueError for an empty prompt, or where one answer is the beginning of another.
    """
    encoded: dict[tuple[str, ...], tuple[Tokens, ...]] = {}
    questions = []
    for example in examples:
        if example.choices not in encoded:
            encoded[example.choices] = tuple((*ids, *end) for ids in _ids(tokenizer, example.choices))
            _require_distinct(encoded[example.choices], example.choices)
        (prompt,) = _ids(tokenizer, [example.prompt])
        if not prompt:
            raise ValueError(f"expected a prompt of at least one token, got {example.prompt!r}")
        questions.append(Question(prompt[-longest:], encoded[example.choices], example.answer))
    return questions


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Tokens]:
    return [tuple(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def _require_distinct(choices: Sequence[Tokens], texts: Sequence[str]) -> None:
    for first, one in zip(choices, texts, strict=True):
        for second, other in zip(choices, texts, strict=True):
            if one != other and second[: len(first)] == first:
                raise ValueError(f"expected no answer that begins another, got {one!r} and {other!r} as {first}")


def answer_states(model: PreTrainedModel, questions: Sequence[Question]) -> Float[Tensor, "question time width"]:
    """The states from which the model's head predicts each token of the right answers.

    Raises ValueError for a model whose logits are not its head's on these states.
    """
    if not _head_is_last(model, questions[0]):
        raise ValueError(f"received a {type(model).__name__}, expected a model whose logits are its head's")
    owners = torch.arange(len(questions), device=model.device)
    return _states(model, [q.prompt for q in questions], owners, [q.right[:-1] for q in questions])


def right_tokens(
    questions: Sequence[Question], device: torch.device
) -> tuple[Int[Tensor, "question time"], Bool[Tensor, "question time"]]:
    """The right answers as padded token ids, and where they are not padding."""
    ids, mask = _padded([q.right for q in questions], device)
    return ids, mask.bool()


@torch.inference_mode()
def predictions(model: PreTrainedModel, questions: Sequence[Question], dtype: torch.dtype) -> Int[Tensor, " question"]:
    """The index of the answer with the largest sum of token log-probabilities; of equals, the first.

    A prompt is read once, and every distinct beginning of its answers once after it.
    Raises ValueError for logits with NaN.
    """
    best = torch.empty(len(questions), dtype=torch.long)
    with models.evaluating(model), models.autocast(model.device, dtype):
        for rows in _batches(questions):
            scores = _scores(model, [questions[row] for row in rows])
            best[rows] = torch.stack([models.likeliest(torch.tensor(score)) for score in scores])
    return best


@torch.inference_mode()
def all_states(
    model: PreTrainedModel, questions: Sequence[Question], dtype: torch.dtype
) -> Float[Tensor, "question time width"]:
    """`answer_states` of many questions, in float32 on the CPU."""
    longest = max(len(question.right) for question in questions)
    padded_states = torch.zeros(len(questions), longest, head(model).in_features)
    for rows in _batches(questions):
        with models.evaluating(model), models.autocast(model.device, dtype):
            states = answer_states(model, [questions[row] for row in rows])
        padded_states[rows, : states.shape[1]] = states.float().cpu()
    return padded_states


def _batches(questions: Sequence[Question]) -> list[list[int]]:
    """The rows of all questions, in batches of prompts of like length."""
    order = sorted(range(len(questions)), key=lambda row: len(questions[row].prompt))
    return [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]


def _scores(model: PreTrainedModel, questions: Sequence[Question]) -> list[list[float]]:
    steps = [
        ((row, choice[:k]), choice[k])
        for row, question in enumerate(questions)
        for choice in question.choices
        for k in range(len(choice))
    ]
    beginnings = {key: place for place, key in enumerate(dict.fromkeys(key for key, _ in steps))}
    owners = torch.tensor([row for row, _ in beginnings], device=model.device)
    read = ([q.prompt for q in questions], owners, [tokens for _, tokens in beginnings])
    last = torch.tensor([len(tokens) for _, tokens in beginnings])
    ends = (torch.arange(len(last)), last)
    shortcut = _head_is_last(model, questions[0])
    logits = (head(model)(_states(model, *read)[ends]) if shortcut else _own_logits(model, *read)[ends]).float()
    places, tokens = (list(x) for x in zip(*((beginnings[key], token) for key, token in steps), strict=True))
    values = iter((logits[places, tokens] - logits.logsumexp(-1)[places]).tolist())
    return [[sum(next(values) for _ in choice) for choice in question.choices] for question in questions]


def head(model: PreTrainedModel) -> nn.Module:
    """The map from states to logits over the vocabulary."""
    return model.get_output_embeddings()


def _head_is_last(model: PreTrainedModel, question: Question) -> bool:
    """Whether the head on `_states` gives the model's logits, up to the square root of the weights' rounding."""
    prompts, tail = [question.prompt[-3:], question.prompt[-1:]], question.right[:1]
    read = (prompts, torch.arange(2, device=model.device), [tail, tail])
    with models.autocast(model.device, torch.float32):
        return models.agrees(
            model,
            "answers",
            lambda: head(model)(_states(model, *read)),
            lambda: _own_logits(model, *read),
            tolerance=torch.finfo(model.dtype).eps ** 0.5,
        )


def _own_logits(
    model: PreTrainedModel, prompts: Sequence[Tokens], owners: Int[Tensor, " tail"], tails: Sequence[Tokens]
) -> Float[Tensor, "tail time vocab"]:
    """What the model's own forward says where `_states` would be read, by whole rows without a cache."""
    if model.config.is_encoder_decoder:
        return _decoded(model, prompts, owners, tails)
    rows = [(*prompts[owner], *tail) for owner, tail in zip(owners.tolist(), tails, strict=True)]
    ids, mask = _padded(rows, model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    starts = torch.tensor([len(prompts[owner]) - 1 for owner in owners.tolist()], device=model.device)
    columns = starts[:, None] + torch.arange(1 + max(map(len, tails)), device=model.device)
    return logits.gather(1, columns.clamp_max(ids.shape[1] - 1)[..., None].expand(-1, -1, logits.shape[-1]))


def _decoded(
    model: PreTrainedModel, prompts: Sequence[Tokens], owners: Int[Tensor, " tail"], tails: Sequence[Tokens]
) -> Tensor:
    """What an encoder-decoder says after its start and after each token of a tail; a prompt is encoded once."""
    ids, mask = _padded(prompts, model.device)
    encoded = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    ids, _ = _padded([(model.config.decoder_start_token_id, *tail) for tail in tails], model.device)
    inputs = {"encoder_outputs": BaseModelOutput(encoded[owners]), "decoder_input_ids": ids, "use_cache": False}
    return model(attention_mask=mask[owners], **inputs).logits


def _states(
    model: PreTrainedModel, prompts: Sequence[Tokens], owners: Int[Tensor, " tail"], tails: Sequence[Tokens]
) -> Float[Tensor, "tail time width"]:
    """What the head would read: after a prompt, then after each token of a tail. `owners` are the tails' prompts.

    A decoder's prompts are padded on the left, so that a tail follows its prompt without a gap (GPT-Neo's windows count
    stored places).
    """
    with _without_head(model):
        if model.config.is_encoder_decoder:
            return _decoded(model, prompts, owners, tails)
        ids, mask = _padded(prompts, model.device, left=True)
        inputs = {"past_key_values": DynamicCache(config=model.config), "use_cache": True}
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        ends = model(input_ids=ids, attention_mask=mask, position_ids=positions, **inputs).logits[owners, -1:]
        if not any(tails):
            return ends
        inputs["past_key_values"].batch_select_indices(owners)
        ids, seen = _padded(tails, model.device)
        positions = mask.sum(1)[owners, None] + torch.arange(ids.shape[1], device=model.device)
        seen = torch.cat([mask[owners], seen], 1)
        return torch.cat([ends, model(input_ids=ids, attention_mask=seen, position_ids=positions, **inputs).logits], 1)


@contextlib.contextmanager
def _without_head(model: PreTrainedModel) -> Iterator[None]:
    """The model's logits are its states for a while."""
    original_head = head(model)
    model.set_output_embeddings(nn.Identity())
    try:
        yield
    finally:
        model.set_output_embeddings(original_head)


def _padded(rows: Sequence[Tokens], device: torch.device, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids, padded with 0, and the mask of what is not padding, both int64 [row, longest]."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for row, tokens in enumerate(rows):
        columns = slice(longest - len(tokens), longest) if left else slice(len(tokens))
        ids[row, columns], mask[row, columns] = torch.tensor(tokens, dtype=torch.long), 1
    return ids.to(device), mask.to(device)
