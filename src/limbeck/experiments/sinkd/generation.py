"""What SinKD's experiments with language models share: texts, the teacher and its states, weights, one training run.

A task is classification in words. Student and teacher read the same prompt and the right answer (teacher forcing);
every loss is over the answer's tokens, and over the whole vocabulary, though one line of the released code, commented
out, would restrict it to two label words. Terms: `ce`, mean over tokens; `kl`, mean over tokens; `sinkhorn_answer`,
`sinkhorn_position`, `sinkhorn_tokens`, the batch-wise distance of the answers' first tokens, of the tokens at each
position, or of all tokens. The test split is read once, after the last step.
"""

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck import models
from limbeck.evaluation import answers
from limbeck.evaluation.answers import Question
from limbeck.experiments.runs import Result, Workspace
from limbeck.experiments.sinkd import arms
from limbeck.experiments.sinkd.generation_cells import FORMS, TEACHER, Section, weights
from limbeck.experiments.sinkd.section import SPLITS
from limbeck.losses import divergence, sinkd
from limbeck.models import language
from limbeck.tasks import classification, prompted
from limbeck.training import resume, supervised

Steps = Generator[dict[str, float], None, Result]
Splits = dict[str, list[Question]]


@functools.lru_cache(maxsize=1)
def prepare(section: Section, *, ends: bool) -> tuple[PreTrainedTokenizerBase, Splits]:
    """The teacher's tokenizer, which is the student's too, and the three splits; do answers end in the end token?"""
    parts = prompted.splits(section.data, section.split_sizes, seed=section.split_seed)
    words = (text for example in parts[0] for text in (example.prompt, *example.choices))
    tokenizer = language.load_tokenizer(section.teacher, words)
    end = (tokenizer.eos_token_id,) if ends else ()
    encoded = [answers.encode(part, tokenizer, longest=section.longest, end=end) for part in parts]
    return tokenizer, dict(zip(SPLITS, encoded, strict=True))


@dataclass
class Run:
    """A model in training, and all that its loss needs."""

    model: PreTrainedModel
    data: Splits
    section: Section
    place: Workspace

    def __post_init__(self) -> None:
        """Move the model to the device and settle the dtype of its matrix products."""
        self.model.to(self.place.device)
        width = self.model.config.hidden_size
        self.dtype = models.precision(self.place.precision, width=width, where=self.place.device)
        self.parameters: dict[str, nn.Parameter] = models.trainable(self.model)

    def answers(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The model's logits for the right answers of some training rows, the tokens themselves, and their mask."""
        questions = [self.data["train"][row] for row in rows.tolist()]
        with models.autocast(self.model.device, self.dtype):
            logits = answers.head(self.model)(answers.answer_states(self.model, questions)).float()
        return logits, *answers.right_tokens(questions, self.model.device)

    def batches(self, epochs: int, seed: int, texts: int | None = None) -> list[Tensor]:
        """The rows of every batch of every epoch over the first `texts` rows, or all."""
        lengths = torch.tensor([len(question.prompt) for question in self.data["train"][:texts]])
        size = self.section.batch_size
        order = [classification.batches(lengths, size=size, seed=seed, epoch=epoch) for epoch in range(epochs)]
        return [batch for epoch in order for batch in epoch]

    def fit(
        self, loss: Callable[[Tensor], dict[str, Tensor]], batches: Sequence[Tensor], learning_rate: float
    ) -> Generator[dict[str, float], None, supervised.Curve]:
        """`supervised.fit` with the section's settings."""
        clip_norm, state, save_every = self.section.clip_norm, self.place.state, self.section.save_every
        options = {"learning_rate": learning_rate, "clip_norm": clip_norm, "state": state, "save_every": save_every}
        return supervised.fit(self.parameters, loss, batches, **options)

    def accuracy(self, split: str, found: Tensor) -> float:
        """The share of predictions that are right, in [0, 1]."""
        return _share(found, torch.tensor([question.answer for question in self.data[split]]))

    def result(self, metrics: dict[str, float], curve: supervised.Curve) -> Result:
        """The run's result."""
        count = sum(parameter.numel() for parameter in self.parameters.values())
        return Result(metrics, curve, count, str(self.dtype).removeprefix("torch."))


def train_teacher(run: Run) -> Steps:
    """Fine-tune the teacher; leave its states and head, whose product are its logits, and its predictions."""

    def loss(rows: Tensor) -> dict[str, Tensor]:
        return {"loss/ce": _terms(run, {}, rows, [])["ce"]}

    section = run.section
    batches = run.batches(section.teacher_epochs, section.teacher_seed)
    curve = yield from run.fit(loss, batches, section.teacher_learning_rate)
    found = {split: answers.predictions(run.model, run.data[split], run.dtype) for split in SPLITS[1:]}
    left = found | {"states": answers.all_states(run.model, run.data["train"], run.dtype)}
    left |= {f"head.{name}": tensor for name, tensor in answers.head(run.model).state_dict().items()}
    resume.write_tensors(run.place.checkpoints / TEACHER, left)
    return run.result({f"{split}/accuracy": run.accuracy(split, found[split]) for split in found}, curve)


def train_student(run: Run, coordinates: Mapping[str, Any]) -> Steps:
    """Train a student as its cell says and score it on the cell's split."""
    section, selecting = run.section, coordinates["phase"] == "selection"
    taught = load_file(run.place.checkpoints / TEACHER, device=str(run.place.device))
    batches = run.batches(section.epochs, coordinates["seed"], section.selection_texts if selecting else None)
    first = batches[: section.matching_batches]
    weight = weights(coordinates, run.place.records, lambda term: _matched(run, taught, term, first))

    def loss(rows: Tensor) -> dict[str, Tensor]:
        values = _terms(run, taught, rows, list(weight))
        return {f"loss/{term}": weight.get(term, 1.0) * value for term, value in values.items()}

    curve = yield from run.fit(loss, batches, section.learning_rate)
    split = "validation" if selecting else "test"
    found = answers.predictions(run.model, run.data[split], run.dtype)
    agreement = _share(found, taught[split].cpu())
    metrics = {f"{split}/accuracy": run.accuracy(split, found), f"{split}/agreement": agreement}
    return run.result(metrics | {f"weight/{term}": value for term, value in weight.items()}, curve)


def _terms(run: Run, taught: Mapping[str, Tensor], rows: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """CE of some training rows, and the named terms, at weight 1."""
    section, (student, tokens, mask) = run.section, run.answers(rows)
    values = {"ce": F.cross_entropy(student[mask], tokens[mask])}
    if not names:
        return values
    with torch.no_grad(), models.autocast(run.model.device, run.dtype):
        states = taught["states"][rows, : mask.shape[1]]
        teacher = F.linear(states, taught["head.weight"], taught.get("head.bias")).float()
    for name in names:
        if name == "kl":
            values[name] = divergence.forward_kl(student, teacher, mask=mask, temperature=section.kl_temperature)
        else:
            options = {"form": FORMS[name], "epsilon": section.epsilon, "iterations": section.iterations}
            options["temperature"] = section.sinkhorn_temperature
            values[name] = sinkd.sequence_sinkhorn(student, teacher, mask=mask, **options)
    return values


def _matched(run: Run, taught: Mapping[str, Tensor], term: str, batches: Sequence[Tensor]) -> float:
    """The weight at which a term's gradient is as long as CE's, on average over some batches."""

    def pair(rows: Tensor) -> tuple[Tensor, Tensor]:
        values = _terms(run, taught, rows, [term])
        return values["ce"], values[term]

    return arms.matched_weight(run.parameters, pair, batches)


def _share(found: Tensor, expected: Tensor) -> float:
    return (found == expected).double().mean().item()
