"""SinKD between language models: a model is taught to classify in words, and a smaller one learns from it.

Student and teacher read the same prompt and the right answer (teacher forcing); every loss is over the answer's tokens,
and over the whole vocabulary, though one line of the released code, commented out, would restrict it to two label
words. An arm is CE and up to two more terms, spelled `ce+kl+sinkhorn_answer`. Terms: `ce`, mean over tokens; `kl`, mean
over tokens; `sinkhorn_answer`, `sinkhorn_position`, `sinkhorn_tokens`, the batch-wise distance of the answers' first
tokens, of the tokens at each position, or of all tokens.

The weight of an added term is a multiple of the one that matches its gradient to CE's on the untrained student. The
multiple is chosen on the validation split, from one grid for every term and one term after another: KL first, then a
third term with KL's weight held. The test split is read once, after the last step.

The experiment here is on encoder-decoders: all weights of both are trained, and an answer ends in the end token, which
is a position of every loss. `decoder` shares all but the models.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck import assets, models
from limbeck.evaluation import answers
from limbeck.evaluation.answers import Question
from limbeck.experiments.runs import Cell, Workspace, best
from limbeck.experiments.sinkd.distillation import SPLITS, Loop, Run, Steps, Texts
from limbeck.losses import divergence, sinkd
from limbeck.models import language
from limbeck.params import flat, one_of, positive
from limbeck.tasks import prompted
from limbeck.training import resume

TEACHER = "teacher.safetensors"
FORMS = {f"sinkhorn_{form}": form for form in ("answer", "position", "tokens")}
TERMS = ("ce", "kl", *FORMS)
_LONGEST = 3  # terms in the longest arm: one wave of selection each, but for CE
Splits = dict[str, list[Question]]


@dataclass(frozen=True)
class Params:
    """The section of params/sinkd.yaml; sources stand there."""

    teacher: str
    student: str
    data: str
    texts: Texts
    loop: Loop
    arms: tuple[str, ...]
    multiples: tuple[float, ...]
    selection_texts: int
    selection_seed: int
    kl_temperature: float
    sinkhorn_temperature: float
    epsilon: float
    iterations: int

    def __post_init__(self) -> None:
        positive(kl_temperature=self.kl_temperature, sinkhorn_temperature=self.sinkhorn_temperature)
        positive(epsilon=self.epsilon, iterations=self.iterations)
        for arm in self.arms:
            terms = arm.split("+")
            for term in terms:
                one_of(f"term of arm {arm}", term, TERMS)
            if terms[0] != "ce" or len(set(terms)) < len(terms) or len(terms) > _LONGEST:
                raise ValueError(f"an arm is ce and up to {_LONGEST - 1} other terms, joined by +, got {arm!r}")
            if before := arm.rpartition("+")[0]:
                one_of(f"arm {arm} without its last term", before, self.arms)


def cells(section: Params, seeds: Sequence[int]) -> list[Cell]:
    """The teacher; selection runs of every added term, an arm's last term after those before it; every arm by seed."""
    inputs = {name: value for name, value in flat(section).items() if name not in ("arms", "multiples")}
    inputs["assets"] = assets.checksums(section.teacher, section.student, section.data)
    chosen_from = inputs | {"multiples": section.multiples}
    teacher = Cell({"phase": "teacher", "arm": "teacher", "seed": section.loop.teacher_seed}, inputs, (TEACHER,))
    selection = [
        Cell(
            {"phase": "selection", "arm": arm, "multiple": multiple, "seed": section.selection_seed},
            inputs if added == 1 else chosen_from,
            wave=added,
        )
        for added in range(1, _LONGEST)
        for arm in section.arms
        if arm.count("+") == added
        for multiple in section.multiples
    ]
    final = [
        Cell({"phase": "final", "arm": arm, "seed": seed}, chosen_from, wave=_LONGEST)
        for seed in seeds
        for arm in section.arms
    ]
    return [teacher, *selection, *final]


def run(cell: Cell, section: Params, workspace: Workspace) -> Steps:
    """Train and score one cell; yields once a step. An untrained model is drawn by the cell's seed."""
    tokenizer, data = tokenizer_and_splits(section, ends=True)
    name = section.teacher if cell.coordinates["phase"] == "teacher" else section.student
    model = language.load(name, tokenizer, seed=cell.coordinates["seed"])
    return (yield from train(model, data, cell, section, workspace))


@functools.lru_cache(maxsize=1)
def tokenizer_and_splits(section: Params, *, ends: bool) -> tuple[PreTrainedTokenizerBase, Splits]:
    """The teacher's tokenizer, which is the student's too, and the three splits; do answers end in the end token?"""
    parts = prompted.splits(section.data, section.texts.split_sizes, seed=section.texts.split_seed)
    words = (text for example in parts[0] for text in (example.prompt, *example.choices))
    tokenizer = language.load_tokenizer(section.teacher, words)
    end = (language.solution_end(tokenizer, chat=False),) if ends else ()
    encoded = [answers.encode(part, tokenizer, longest=section.texts.longest, end=end) for part in parts]
    return tokenizer, dict(zip(SPLITS, encoded, strict=True))


def train(model: PreTrainedModel, data: Splits, cell: Cell, section: Params, workspace: Workspace) -> Steps:
    """Train a teacher, or a student as its cell says, from the start that `model` is."""
    phase, seed, loop = cell.coordinates["phase"], cell.coordinates["seed"], section.loop
    texts = section.selection_texts if phase == "selection" else None
    lengths = torch.tensor([len(question.prompt) for question in data["train"][:texts]])
    epochs = loop.teacher_epochs if phase == "teacher" else loop.epochs
    run = LanguageRun(model, loop.batches(lengths, epochs=epochs, seed=seed), loop, workspace, data, section)
    return (yield from _train_teacher(run) if phase == "teacher" else _train_student(run, cell.coordinates))


@dataclass
class LanguageRun(Run):
    """A language model in training, and all that its loss needs."""

    data: Splits
    section: Params

    def answers(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The model's logits for the right answers of some training rows, the tokens themselves, and their mask."""
        questions = [self.data["train"][row] for row in rows.tolist()]
        with models.autocast(self.model.device, self.dtype):
            logits = answers.head(self.model)(answers.answer_states(self.model, questions)).float()
        return logits, *answers.right_tokens(questions, self.model.device)

    def predictions(self, split: str) -> Tensor:
        """The answer to every question of a split, by its index."""
        return answers.predictions(self.model, self.data[split], self.dtype)

    def accuracy(self, split: str, predictions: Tensor) -> float:
        """The share of predictions that are right, in [0, 1]."""
        return _share(predictions, torch.tensor([question.answer for question in self.data[split]]))

    def terms(self, rows: Tensor, names: Sequence[str], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """CE of some training rows, and the named terms, at weight 1."""
        section, (student_logits, tokens, mask) = self.section, self.answers(rows)
        values = {"ce": F.cross_entropy(student_logits[mask], tokens[mask])}
        if not names:
            return values
        with torch.no_grad(), models.autocast(self.model.device, self.dtype):
            states = teacher["states"][rows, : mask.shape[1]]
            logits = F.linear(states, teacher["head.weight"], teacher.get("head.bias")).float()
        for name in names:
            if name == "kl":
                values[name] = divergence.forward_kl(
                    student_logits, logits, mask=mask, temperature=section.kl_temperature
                )
            else:
                values[name] = sinkd.sequence_sinkhorn(
                    student_logits,
                    logits,
                    mask=mask,
                    form=FORMS[name],
                    temperature=section.sinkhorn_temperature,
                    epsilon=section.epsilon,
                    iterations=section.iterations,
                )
        return values


def _train_teacher(run: LanguageRun) -> Steps:
    """Fine-tune the teacher; leave its states and head, whose product are its logits, and its predictions."""
    curve = yield from run.fit(lambda rows: {"loss/ce": run.terms(rows, [], {})["ce"]}, run.loop.teacher_learning_rate)
    outputs = {split: run.predictions(split) for split in SPLITS[1:]}
    metrics = {f"{split}/accuracy": run.accuracy(split, predictions) for split, predictions in outputs.items()}
    outputs |= {"states": answers.all_states(run.model, run.data["train"], run.dtype)}
    outputs |= {f"head.{name}": tensor for name, tensor in answers.head(run.model).state_dict().items()}
    resume.write_tensors(run.workspace.checkpoints / TEACHER, outputs)
    return run.result(metrics, curve)


def _train_student(run: LanguageRun, coordinates: Mapping[str, Any]) -> Steps:
    """Train a student as its cell says and score it on the cell's split."""
    teacher = resume.read_tensors(run.workspace.checkpoints / TEACHER, device=run.workspace.device)
    weights = _weights(run, coordinates, teacher)

    def loss(rows: Tensor) -> dict[str, Tensor]:
        values = run.terms(rows, list(weights), teacher)
        return {f"loss/{name}": weights.get(name, 1.0) * value for name, value in values.items()}

    curve = yield from run.fit(loss, run.loop.learning_rate)
    split = "validation" if coordinates["phase"] == "selection" else "test"
    predictions = run.predictions(split)
    agreement = _share(predictions, teacher[split].cpu())
    metrics = {f"{split}/accuracy": run.accuracy(split, predictions), f"{split}/agreement": agreement}
    return run.result(metrics | {f"weight/{name}": weight for name, weight in weights.items()}, curve)


def _weights(run: LanguageRun, coordinates: Mapping[str, Any], teacher: Mapping[str, Tensor]) -> dict[str, float]:
    """The weight of every added term: as chosen, or while selecting, a multiple of what matches for the last term."""
    records, (before, _, last) = run.workspace.records, coordinates["arm"].rpartition("+")
    if not before:
        return {}
    if coordinates["phase"] == "final":
        return chosen_weights(records, coordinates["arm"])
    weight = run.gradient_matched_weight(lambda rows: run.terms(rows, [last], teacher))
    held = chosen_weights(records, before) if "+" in before else {}
    return held | {last: coordinates["multiple"] * weight}


def chosen_weights(records: Sequence[Mapping[str, Any]], arm: str) -> dict[str, float]:
    """The weights of an arm's selection run with the highest validation accuracy; of equals, the smallest multiple."""
    selection = {"phase": "selection", "arm": arm}
    selection["multiple"] = best(records, selection, "multiple", ["validation/accuracy"], highest=[True])
    [record] = [record for record in records if selection.items() <= record["cell"].items()]
    weights = {name: value for name, value in record["metrics"].items() if name.startswith("weight/")}
    return {name.removeprefix("weight/"): value for name, value in weights.items()}


def _share(predictions: Tensor, expected: Tensor) -> float:
    return (predictions == expected).double().mean().item()
