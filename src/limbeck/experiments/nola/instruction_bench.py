"""A decoder that follows instructions: its texts in tokens, its losses, and which of four answers it finds likeliest.

An instruction is put in the model's chat template, with an empty system turn, or, without one, in Alpaca's form. The
answer with the largest mean log-probability of a token is the model's; the sum is measured too.
"""

import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from limbeck import assets, models
from limbeck.experiments.nola import instruction_adapting, text_bench, text_model
from limbeck.experiments.nola.adapting import Model
from limbeck.experiments.nola.text_model import Pair, Texts
from limbeck.models import language
from limbeck.params import one_of, positive
from limbeck.sampling import Tokens
from limbeck.tasks import instructions
from limbeck.tasks.instructions import Asked, Question
from limbeck.training import supervised
from limbeck.training.supervised import Terms

_PLAIN = "### Instruction:\n{}\n\n### Response:"


@dataclass(frozen=True)
class Section(text_bench.Section):
    """The section of params/nola.yaml but for arms and rates; sources stand there.

    `split_sizes` as in `instruction_texts.load`. Gradients of a batch are computed `micro_texts` texts at a time, which
    changes their last bits alone. With `base_bits` 4 the frozen model is held in NF4, its scales quantised too, and
    multiplied in bfloat16, as in the paper's released scripts (QLoRA, arXiv 2305.14314); with 32 as it comes.
    """

    questions: str
    base_bits: int
    chat: bool
    longest_prompt: int
    nola_share: float
    batch_size: int
    micro_texts: int
    steps: int

    def __post_init__(self) -> None:
        """Check what no type can."""
        super().__post_init__()
        positive(longest_prompt=self.longest_prompt, nola_share=self.nola_share, micro_texts=self.micro_texts)
        positive(batch_size=self.batch_size, steps=self.steps)
        one_of("base_bits", self.base_bits, (4, 32))
        instructions.require_pair(self.data, self.questions)


@dataclass(frozen=True)
class Data:
    """The texts of a section in tokens."""

    section: Section
    tokenizer: PreTrainedTokenizerBase
    train: list[Asked]
    validation: list[Asked]
    questions: list[Question]

    def prompt(self, said: str, *, plain: bool) -> Tokens:
        """An instruction in the section's form, or a plain text, as its last tokens."""
        if self.section.chat and not plain:
            turns = [{"role": "system", "content": ""}, {"role": "user", "content": said}]
            ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        else:
            ids = self.tokenizer(said if plain else _PLAIN.format(said))["input_ids"]
        return tuple(ids[-self.section.longest_prompt :])

    def answer(self, text: str, *, plain: bool) -> Tokens:
        """What follows a prompt, without an end token; after a space, where no turn of a chat has begun."""
        said = text if self.section.chat and not plain else f" {text}"
        return tuple(self.tokenizer(said, add_special_tokens=False)["input_ids"])

    def pair(self, asked: Asked) -> Pair:
        """An instruction and its answer, which ends in the end token unless it is cut."""
        target = (*self.answer(asked.text, plain=False), self.tokenizer.eos_token_id)
        return Pair(self.prompt(asked.instruction, plain=False), target[: self.section.longest])

    @functools.cached_property
    def pairs(self) -> dict[str, list[Pair]]:
        """What is learned, what the loss is measured on, and every choice of every question."""
        found = {name: [self.pair(asked) for asked in getattr(self, name)] for name in ("train", "validation")}
        found["choices"] = [
            Pair(self.prompt(question.prompt, plain=question.plain), self.answer(choice, plain=question.plain))
            for question in self.questions
            for choice in question.choices
        ]
        return found


@functools.lru_cache(maxsize=2)
def prepare(section: Section) -> Data:
    """The data of a section. Raises ValueError for `chat` with a tokenizer that has no template."""
    options = {"train_texts": section.train_texts, "references": section.references, "seed": section.split_seed}
    parts = instructions.load(section.data, section.questions, section.split_sizes, **options)
    words = (text for asked in parts[0] for text in (_PLAIN.format(asked.instruction), asked.text))
    tokenizer = language.load_tokenizer(section.model, words)
    if section.chat and tokenizer.chat_template is None:
        raise ValueError(f"received chat: true, expected a chat template with the tokenizer of {section.model}")
    return Data(section, tokenizer, *parts)


class Bench(text_bench.Bench):
    """What every cell works with."""

    @functools.cached_property
    def data(self) -> Data:
        """The data."""
        return prepare(self.section)

    def decoder(self) -> PreTrainedModel:
        """The model, frozen."""
        in_full = self.section.base_bits == 32
        return super().decoder() if in_full else in_four_bits(self.section.model, self.place.device)

    def attach(self, arm: str, *, seed: int) -> Model:
        """The frozen model with the arm's adapter."""
        section, options = self.section, {"layers": self.section.layers, "share": self.section.nola_share, "seed": seed}
        return instruction_adapting.attach(arm, self.decoder(), section, **options)

    def train(
        self, model: Model, *, learning_rate: float, seed: int
    ) -> Generator[dict[str, float], None, supervised.Curve]:
        """Train the adapter, by `supervised.fit`."""
        section, texts = self.section, self.texts["train"]
        loss = in_parts(text_model.loss_of(model, texts, self.dtype(model)), texts, section.micro_texts)
        drawn = text_bench.batches(texts.pairs, size=section.batch_size, steps=section.steps, seed=seed)
        options = {"clip_norm": section.clip_norm, "state": self.place.state, "save_every": section.save_every}
        return supervised.fit(models.trainable(model), loss, drawn, learning_rate=learning_rate, **options)

    def loss(self, model: Model, part: str) -> float:
        """Mean over the answers' tokens, the end token among them, in nats."""
        return text_model.mean_loss(model, self.texts[part], self.dtype(model))

    def accuracies(self, model: Model) -> dict[str, float]:
        """The share of questions whose right answer is the likeliest: by the mean over its tokens, and by their sum."""
        logprobs = choice_logprobs(model, self.texts["choices"], self.dtype(model))
        questions, at, right = self.data.questions, 0, {"accuracy": 0, "accuracy_of_sums": 0}
        for question in questions:
            mine, at = logprobs[at : at + len(question.choices)], at + len(question.choices)
            for name, values in {
                "accuracy": [x.mean() for x in mine],
                "accuracy_of_sums": [x.sum() for x in mine],
            }.items():
                right[name] += int(torch.stack(values).argmax()) == question.answer
        return {f"test/{name}": count / len(questions) for name, count in right.items()}


def in_four_bits(name: str, where: torch.device) -> PreTrainedModel:
    """A decoder from a local folder or the hub, frozen, its linear layers but the head in NF4; needs bitsandbytes."""
    form = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**form, bnb_4bit_compute_dtype=torch.bfloat16)
    options = {"quantization_config": config, "dtype": torch.bfloat16, "device_map": {"": str(where)}}
    return AutoModelForCausalLM.from_pretrained(assets.source(name), **options).eval().requires_grad_(False)


def in_parts(loss: Callable[[Tensor], Terms], texts: Texts, size: int) -> Callable[[Tensor], Terms]:
    """The same mean over a batch's tokens from `size` texts at a time, each computed again in the backward."""

    def whole(rows: Tensor) -> Terms:
        if len(rows) <= size:
            return loss(rows)
        counts = torch.tensor([len(texts.pairs[row].target) for row in rows.tolist()])
        total = torch.zeros(())
        for part, count in zip(rows.split(size), counts.split(size), strict=True):
            value = checkpoint(lambda some: loss(some)["loss/ce"], part, use_reentrant=False, preserve_rng_state=False)
            total = total.to(value) + value * (count.sum() / counts.sum()).to(value)
        return {"loss/ce": total}

    return whole


@torch.no_grad()
def choice_logprobs(model: Model, texts: Texts, dtype: torch.dtype) -> list[Tensor]:
    """log p of each token of each target, in nats."""
    found: dict[int, Tensor] = {}
    for rows in text_model.by_length(texts.pairs):
        some = texts.rows(rows)
        with models.autocast(model.device, dtype):
            logits, tokens = text_model.target_logits(model, some)
        values = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        found |= dict(zip(rows, values.split([len(pair.target) for pair in some.pairs]), strict=True))
    return [found[row] for row in range(len(texts))]
