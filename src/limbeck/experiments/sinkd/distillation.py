"""One training run of SinKD: a teacher's, which leaves its outputs, or a student's from them.

`Texts`, `Loop` and `Run` serve every architecture, the rest encoders. There, a pretrained encoder is fine-tuned as
teacher; a student is the first layers of the same pretrained encoder (`first-2`), or as many layers drawn at random
over its embeddings (`random-3`). The teacher is run once over every split; its logits, and the first token's states of
the training split, lie in a file that students read.
"""

import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from limbeck import models
from limbeck.evaluation import classifier
from limbeck.evaluation.classifier import Outputs
from limbeck.experiments import runs
from limbeck.experiments.runs import Result, Workspace
from limbeck.experiments.sinkd import arms
from limbeck.models import encoders
from limbeck.params import positive
from limbeck.tasks import classification
from limbeck.training import resume, supervised

SPLITS = ("train", "validation", "test")
Splits = dict[str, classification.Encoded]
Loss = Callable[[Tensor], dict[str, Tensor]]
Steps = Generator[dict[str, float], None, Result]


@dataclass(frozen=True)
class Texts:
    """How many texts each split has, and how many tokens of a text are read."""

    longest: int
    split_sizes: tuple[int, ...]
    split_seed: int

    def __post_init__(self) -> None:
        if len(self.split_sizes) != len(SPLITS):
            raise ValueError(f"split_sizes must hold one number each for {', '.join(SPLITS)}, got {self.split_sizes}")
        positive(longest=self.longest)


@dataclass(frozen=True)
class Loop:
    """How a teacher is trained, and each of its students; on the first `matching_batches` gradients are compared."""

    teacher_seed: int
    teacher_epochs: int
    teacher_learning_rate: float
    epochs: int
    learning_rate: float
    batch_size: int
    clip_norm: float
    save_every: int
    matching_batches: int

    def __post_init__(self) -> None:
        positive(**{name: value for name, value in vars(self).items() if name != "teacher_seed"})

    def batches(self, lengths: Tensor, *, epochs: int, seed: int) -> list[Tensor]:
        """The rows of every batch, epoch after epoch, of texts of such lengths."""
        size = self.batch_size
        order = (classification.batches(lengths, size=size, seed=seed, epoch=epoch) for epoch in range(epochs))
        return [batch for epoch in order for batch in epoch]


@dataclass
class Run:
    """A model in training: the rows of its batches, how they are learnt from, and where."""

    model: PreTrainedModel
    batches: list[Tensor]
    loop: Loop
    workspace: Workspace

    def __post_init__(self) -> None:
        device = self.workspace.device
        self.model.to(device)
        self.dtype = self.workspace.dtype
        self.parameters = models.trainable(self.model)

    def fit(
        self, loss: Loss, learning_rate: float, measure: Callable[[], dict[str, float]] | None = None
    ) -> Generator[dict[str, float], None, supervised.Curve]:
        """`supervised.fit` on the run's batches."""
        return supervised.fit(
            self.parameters,
            loss,
            self.batches,
            learning_rate=learning_rate,
            clip_norm=self.loop.clip_norm,
            state=self.workspace.state,
            save_every=self.loop.save_every,
            measure=measure,
        )

    def gradient_matched_weight(self, loss: Loss) -> float:
        """The weight at which a term's gradient is as long as CE's, on average over the first batches.

        `loss` gives CE and the term of a batch. Raises ValueError if the term has no gradient at all.
        """
        first = self.batches[: self.loop.matching_batches]
        norms = [[supervised.gradient_norm(self.parameters, value) for value in loss(rows).values()] for rows in first]
        if not (total := sum(other for _, other in norms)):
            raise ValueError("expected a term with a gradient, got one whose gradient is 0 on every batch")
        return sum(ce for ce, _ in norms) / total

    def result(self, metrics: dict[str, float], curve: supervised.Curve) -> Result:
        """What was measured, with the weights counted and the dtype of the matrix products."""
        return runs.result(metrics, curve, weights=self.parameters, dtype=self.dtype)


@dataclass(frozen=True)
class Setup:
    """What every experiment on encoders sets: the pretrained one, the texts, both trainings and the terms."""

    model: str
    texts: Texts
    loop: Loop
    terms: arms.Terms


def layers_of(student: str) -> tuple[str, int]:
    """`first-2` as ("first", 2). Raises ValueError for another spelling."""
    kind, _, layers = student.partition("-")
    if kind not in ("first", "random") or not layers.isdecimal():
        raise ValueError(f"a student is spelled first-N or random-N, N layers, got {student!r}")
    return kind, int(layers)


@functools.lru_cache(maxsize=8)
def splits(model: str, task: str, texts: Texts) -> tuple[Splits, tuple[str, ...]]:
    """The three splits of a task by name, as a model reads them, and the class names."""
    parts = classification.splits(task, texts.split_sizes, seed=texts.split_seed)
    names, tokenizer = classification.class_names(parts), encoders.load_tokenizer(model)
    encoded = [classification.encode(part, tokenizer, longest=texts.longest, classes=names) for part in parts]
    return dict(zip(SPLITS, encoded, strict=True)), names


def pretrained(name: str, classes: int, seed: int, student: str = "") -> PreTrainedModel:
    """The pretrained encoder, or a student of it, with a head of its own; embeddings frozen."""
    model = encoders.load_encoder(name, classes=classes, seed=seed)
    if student:
        kind, layers = layers_of(student)
        model = encoders.first_layers(model, layers)
        model = encoders.redraw_layers(model, seed) if kind == "random" else model
    return encoders.read_first_token(encoders.freeze_embeddings(model))


@dataclass
class EncoderRun(Run):
    """An encoder in training on one task, and all that its loss needs."""

    data: Splits
    task: str
    terms: arms.Terms

    def outputs(self, rows: Tensor, *, states: bool = False) -> Outputs:
        """The model's outputs of some training rows."""
        return classifier.forward(self.model, self.data["train"], rows, self.dtype, states=states)

    def logits(self, split: str) -> Tensor:
        """The model's logits of a whole split."""
        return classifier.all_rows(self.model, self.data[split], self.dtype).logits

    def score(self, split: str, logits: Tensor) -> float:
        """The task's own metric on a split."""
        return classifier.score(classification.metric(self.task), logits, self.data[split].labels)

    def scores(self, split: str, teacher: dict[str, Tensor]) -> dict[str, float]:
        """The student's score on a split, and how often it says what the teacher says."""
        logits = self.logits(split)
        agreement = classifier.accuracy(logits, teacher[split].argmax(-1))
        return {f"{split}/score": self.score(split, logits), f"{split}/agreement": agreement}


def start(
    setup: Setup, task: str, workspace: Workspace, *, seed: int, student: str = "", texts: int | None = None
) -> EncoderRun:
    """A model at its start: the teacher, or a student by its name, on the first `texts` training rows (or all)."""
    data, names = splits(setup.model, task, setup.texts)
    model = pretrained(setup.model, classes=len(names), seed=seed, student=student)
    epochs = setup.loop.epochs if student else setup.loop.teacher_epochs
    batches = setup.loop.batches(data["train"].lengths[:texts], epochs=epochs, seed=seed)
    return EncoderRun(model, batches, setup.loop, workspace, data=data, task=task, terms=setup.terms)


def outputs_file(task: str, model: str = "teacher") -> str:
    """Where a task's teacher, or assistant, leaves its outputs, under the experiment's checkpoints."""
    return f"{runs.spelled(task)}_{model}.safetensors"


def read_outputs(workspace: Workspace, task: str, model: str = "teacher") -> dict[str, Tensor]:
    """What an earlier cell left: logits by split and `states` of the teacher, or an `assistant`'s logits."""
    return resume.read_tensors(workspace.checkpoints / outputs_file(task, model))


def train_teacher(setup: Setup, task: str, workspace: Workspace) -> Steps:
    """Fine-tune the whole encoder but its embeddings; leave its logits and, of the training split, its states."""
    run = start(setup, task, workspace, seed=setup.loop.teacher_seed)
    curve = yield from run.fit(distillation_loss(run, "ce", [], {}), setup.loop.teacher_learning_rate)
    outputs = {split: run.logits(split) for split in SPLITS[1:]}
    train = classifier.all_rows(run.model, run.data["train"], run.dtype, states=True)
    outputs |= {"train": train.logits, "states": train.states}
    resume.write_tensors(workspace.checkpoints / outputs_file(task), outputs)
    return run.result({f"{split}/score": run.score(split, outputs[split]) for split in SPLITS}, curve)


def distillation_loss(
    run: EncoderRun, arm: str, weights: Sequence[float], teacher: dict[str, Tensor], *, moved: int = 0
) -> Loss:
    """The loss of an arm: CE, unless the arm leaves it out, and every added term at its weight.

    `teacher` holds its logits by split, and `states` of the training split; for `takd`, `assistant` holds the logits of
    the training split that it reads. With `moved`, each row learns from the outputs of the row so many places before
    it in the batch.
    """
    names, device = arms.added(arm), run.model.device
    terms = [arms.term(name, run.terms) for name in names]
    states = any(name in arms.OF_STATES for name in names)

    def target(name: str, rows: Tensor) -> Outputs:
        logits = teacher["assistant" if name == arms.ASSISTED else "train"][rows].to(device)
        return Outputs(logits, teacher["states"][:, rows].to(device) if name in arms.OF_STATES else None)

    def loss(rows: Tensor) -> dict[str, Tensor]:
        outputs, labels = run.outputs(rows, states=states), run.data["train"].labels[rows].to(device)
        total = {"loss/ce": arms.cross_entropy(outputs.logits, labels)} if "ce" in arm.split("+") else {}
        for name, term, weight in zip(names, terms, weights, strict=True):
            value = weight * term(outputs, target(name, rows.roll(moved)), labels)
            total[f"loss/{name}"] = total.get(f"loss/{name}", 0) + value
        return total

    return loss


def gradient_matched_weight(run: EncoderRun, name: str, teacher: dict[str, Tensor]) -> float:
    """The weight of a term that matches CE's gradient on the first batches of the untrained student."""
    return run.gradient_matched_weight(distillation_loss(run, f"ce+{name}", [1.0], teacher))
