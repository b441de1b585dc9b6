"""A frozen decoder and its texts, meanings and what people said for them: what NOLA's experiments on text share.

Cells of the first wave leave the states below the adapted layers (`texts`), in two halves for two processes.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck import assets, models
from limbeck.evaluation import text_overlap
from limbeck.experiments.nola import texts
from limbeck.experiments.nola.arms import Model
from limbeck.experiments.nola.texts import Pair, Texts
from limbeck.experiments.runs import Cell, Result, Workspace
from limbeck.models import language
from limbeck.params import flat, positive
from limbeck.sampling import Tokens
from limbeck.tasks import classification, meanings
from limbeck.tasks.meanings import Meaning
from limbeck.training import resume, supervised

STATES = "states"
_HALVES = 2


@dataclass(frozen=True)
class TextSettings:
    """A decoder and its texts; sources stand in params/nola.yaml. `layers` are the last ones, 0 for all.

    `split_sizes` counts meanings. `train_texts` texts are drawn from those to train on (-1: all); of those to validate
    on, the first `references` texts each count. Targets are cut at `longest` tokens, and sentences end there.
    """

    model: str
    layers: int
    data: str
    split_sizes: tuple[int, ...]
    split_seed: int
    train_texts: int
    references: int
    longest: int

    def __post_init__(self) -> None:
        positive(references=self.references, longest=self.longest)


@dataclass(frozen=True)
class Loop:
    """The steps of a run, of `batch_size` texts each; its state and its curve are kept every `save_every`."""

    steps: int
    batch_size: int
    clip_norm: float
    save_every: int

    def __post_init__(self) -> None:
        positive(steps=self.steps, batch_size=self.batch_size, save_every=self.save_every)


@dataclass(frozen=True)
class Data:
    """The parts of a data set in words and in tokens; the order of the texts to train on is drawn."""

    settings: TextSettings
    train: list[Meaning]
    validation: list[Meaning]
    test: list[Meaning]
    tokenizer: PreTrainedTokenizerBase
    drawn: list[tuple[Meaning, str]]

    def tokens(self, text: str) -> Tokens:
        """A text as tokens, nothing added."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, meaning: Meaning) -> Tokens:
        """A meaning in tokens."""
        return self.tokens(meanings.prompt(meaning))

    def pair(self, meaning: Meaning, text: str) -> Pair:
        """A meaning and a text of it in tokens."""
        target = (*self.tokens(f" {text}"), language.solution_end(self.tokenizer, chat=False))
        return Pair(self.prompt(meaning), target[: self.settings.longest])

    @functools.cached_property
    def pairs(self) -> dict[str, list[Pair]]:
        """What is learned, and what the loss is measured on."""
        held = [(meaning, text) for meaning in self.validation for text in meaning.texts[: self.settings.references]]
        parts = {"train": self.drawn, "validation": held}
        return {name: [self.pair(*row) for row in rows] for name, rows in parts.items()}


@functools.lru_cache(maxsize=2)
def prepare(settings: TextSettings) -> Data:
    """The texts of a decoder, drawn and in tokens."""
    train, validation, test = meanings.splits(settings.data, settings.split_sizes, seed=settings.split_seed)
    pool = [(meaning, text) for meaning in train for text in meaning.texts]
    (drawn,) = classification.draw(pool, [settings.train_texts], seed=settings.split_seed)
    words = (part for meaning, text in drawn for part in (meanings.prompt(meaning), text))
    return Data(settings, train, validation, test, language.load_tokenizer(settings.model, words), drawn)


def shared_inputs(params: Any, seeds: Sequence[int], left_out: Collection[str]) -> dict[str, Any]:
    """What every cell of an experiment on texts depends on: its parameters but for those `left_out`, and its assets.

    Raises ValueError for fewer seeds than `replicates`.
    """
    if len(seeds) < params.replicates:
        raise ValueError(f"received the seeds {tuple(seeds)}, expected at least {params.replicates}")
    inputs = {name: value for name, value in flat(params).items() if name not in left_out}
    return inputs | {"assets": assets.checksums(params.texts.model, params.texts.data)}


def state_cells(settings: TextSettings, inputs: dict[str, Any]) -> list[Cell]:
    """The cells that leave the states; none where all layers are adapted."""
    files = [f"{STATES}_{half}.safetensors" for half in range(_HALVES)] if settings.layers else []
    return [Cell({"phase": STATES, "arm": "none", "half": half}, inputs, (name,)) for half, name in enumerate(files)]


def write_states(cell: Cell, decoder: "FrozenDecoder") -> Generator[dict[str, float], None, Result]:
    """Run such a cell: the states of every other text."""
    pairs = decoder.all_pairs()[cell.coordinates["half"] :: _HALVES]
    yield {"step": 1, "steps": 1}
    states = texts.states(decoder.load(), pairs, decoder.settings.layers)
    resume.write_tensors(decoder.workspace.checkpoints / cell.checkpoint_files[0], {STATES: torch.cat(states)})
    return Result({"states/tokens": float(sum(map(len, states)))})


@dataclass(frozen=True)
class FrozenDecoder:
    """A decoder and its texts where one cell runs: what it learns from, and what it is measured on."""

    settings: TextSettings
    workspace: Workspace

    @functools.cached_property
    def data(self) -> Data:
        """The texts, in words and in tokens."""
        return prepare(self.settings)

    def load(self) -> PreTrainedModel:
        """The model, frozen; one of a shape is drawn by seed 0."""
        model = language.load(self.settings.model, self.data.tokenizer, seed=0)
        return model.eval().requires_grad_(False).to(self.workspace.device)

    def all_pairs(self) -> list[Pair]:
        """The pairs of every part, part after part."""
        return [pair for part in self.data.pairs.values() for pair in part]

    @functools.cached_property
    def texts(self) -> dict[str, Texts]:
        """The parts of the data, with their states where a cell has left them."""
        parts, layers = self.data.pairs, self.settings.layers
        if not layers:
            return {name: Texts(pairs) for name, pairs in parts.items()}
        pairs, below = self.all_pairs(), {}
        for half in range(_HALVES):
            rows = range(half, len(pairs), _HALVES)
            file = self.workspace.checkpoints / f"{STATES}_{half}.safetensors"
            tensors = resume.read_tensors(file, device=self.workspace.device)
            states = tensors[STATES].split([len(pairs[row].read) for row in rows])
            below |= dict(zip(rows, states, strict=True))
        whole, rows = Texts(pairs, [below[row] for row in range(len(pairs))], layers), iter(range(len(pairs)))
        return {name: whole.rows(list(itertools.islice(rows, len(part)))) for name, part in parts.items()}

    def train_loss(self, model: Model, *, smoothing: float = 0.0) -> Callable[[Tensor], supervised.Terms]:
        """The loss of some rows of the texts to train on, by `texts.loss_of`."""
        return texts.loss_of(model, self.texts["train"], self.workspace.dtype, smoothing=smoothing)

    def fit(
        self,
        model: Model,
        loss: Callable[[Tensor], supervised.Terms],
        loop: Loop,
        *,
        learning_rate: float,
        seed: int,
    ) -> Generator[dict[str, float], None, supervised.Curve]:
        """Train what is trainable, by `supervised.fit`; the seed draws the order of the texts."""
        return supervised.fit(
            models.trainable(model),
            loss,
            batches(self.texts["train"].pairs, size=loop.batch_size, steps=loop.steps, seed=seed),
            learning_rate=learning_rate,
            clip_norm=loop.clip_norm,
            state=self.workspace.state,
            save_every=loop.save_every,
        )

    def loss(self, model: Model, part: str) -> float:
        """Mean over the tokens of a part's targets, the end token among them, in nats."""
        return texts.mean_loss(model, self.texts[part], self.workspace.dtype)

    def sentences(self, model: Model, asked: Sequence[Meaning], beams: int) -> list[str]:
        """What the whole model says for each meaning: the best of some beams; with 1, each time the likeliest token."""
        prompts, tokenizer = [self.data.prompt(meaning) for meaning in asked], self.data.tokenizer
        own, longest, dtype = texts.base(model), self.settings.longest, self.workspace.dtype
        ends = language.end_tokens(tokenizer, own.config, own.generation_config)
        complete = functools.partial(texts.beam_completions, beams=beams) if beams > 1 else texts.greedy_completions
        completions = complete(model, prompts, ends=ends, longest=longest, dtype=dtype)
        return [tokenizer.decode(tokens).strip() for tokens in completions]

    def test_scores(self, model: Model, beams: int) -> dict[str, float]:
        """BLEU and ROUGE-L in [0, 100], and where slots are known the errors per slot, of what is said for the test."""
        test, sentences = self.data.test, self.sentences(model, self.data.test, beams)
        scores = text_overlap.overlaps(sentences, [meaning.texts for meaning in test])
        if slots := sum(len(meaning.slots) for meaning in test):
            wrong = sum(meanings.slot_errors(meaning, text) for meaning, text in zip(test, sentences, strict=True))
            scores["slot_error_rate"] = wrong / slots
        return {f"test/{name}": value for name, value in scores.items()}


def require_smoothing(smoothing: float) -> None:
    """Raise ValueError unless it is a share of the probability that a model can do without."""
    if not 0 <= smoothing < 1:
        raise ValueError(f"received smoothing {smoothing}, expected at least 0 and less than 1")


def batches(pairs: Sequence[Pair], *, size: int, steps: int, seed: int) -> list[Tensor]:
    """The rows of every step, epoch after epoch, texts of like length together (`classification.batches`)."""
    lengths, drawn = torch.tensor([len(pair.read) for pair in pairs]), []
    while len(drawn) < steps:
        drawn += classification.batches(lengths, size=size, seed=seed, epoch=len(drawn))
    return drawn[:steps]
