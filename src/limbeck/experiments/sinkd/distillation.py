"""One training run of SinKD's encoder experiments: the teacher's, which leaves its outputs, or a student's from them.

The teacher is run once over every split; its logits, and the first token's states of the training split, lie in a file
that students read.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck import models
from limbeck.evaluation import classifier
from limbeck.evaluation.classifier import Outputs
from limbeck.experiments.runs import Result, Workspace
from limbeck.experiments.sinkd import arms, encoder
from limbeck.experiments.sinkd.encoder import Section, Splits
from limbeck.experiments.sinkd.section import SPLITS
from limbeck.tasks import classification
from limbeck.training import resume, supervised

Steps = Generator[dict[str, float], None, Result]


@dataclass
class Run:
    """A model in training on one task, and all that its loss needs."""

    model: PreTrainedModel
    data: Splits
    task: str
    section: Section
    place: Workspace
    dtype: torch.dtype
    batches: list[Tensor]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What training changes."""
        return models.trainable(self.model)

    def outputs(self, rows: Tensor, *, states: bool = False) -> Outputs:
        """The model's outputs of some training rows."""
        return classifier.forward(self.model, self.data["train"], rows, self.dtype, states=states)

    def labels(self, rows: Tensor) -> Tensor:
        """Their labels, where the model is."""
        return self.data["train"].labels[rows].to(self.model.device)

    def logits(self, split: str) -> Tensor:
        """The model's logits of a whole split."""
        return classifier.all_rows(self.model, self.data[split], self.dtype).logits

    def score(self, split: str, logits: Tensor | None = None) -> float:
        """The task's own metric on a split."""
        logits = self.logits(split) if logits is None else logits
        return classifier.score(classification.metric(self.task), logits, self.data[split].labels)

    def scores(self, split: str, outputs: dict[str, Tensor]) -> dict[str, float]:
        """The student's score on a split, and how often it says what the teacher says."""
        logits = self.logits(split)
        agreement = classifier.accuracy(logits, outputs[split].argmax(-1))
        return {f"{split}/score": self.score(split, logits), f"{split}/agreement": agreement}

    def fit(
        self,
        loss: Callable[[Tensor], dict[str, Tensor]],
        learning_rate: float,
        measure: Callable[[], dict[str, float]] | None = None,
    ) -> Generator[dict[str, float], None, supervised.Curve]:
        """`supervised.fit` with the section's settings."""
        return supervised.fit(
            self.parameters,
            loss,
            self.batches,
            learning_rate=learning_rate,
            clip_norm=self.section.clip_norm,
            state=self.place.state,
            save_every=self.section.save_every,
            measure=measure,
        )

    def result(self, metrics: dict[str, float], curve: supervised.Curve) -> Result:
        """The run's result."""
        count = sum(parameter.numel() for parameter in self.parameters.values())
        return Result(metrics, curve, count, str(self.dtype).removeprefix("torch."))


def start(
    section: Section, task: str, place: Workspace, *, seed: int, student: str = "", texts: int | None = None
) -> Run:
    """A model at its start: the teacher, or a student by its name, on the first `texts` training rows (or all)."""
    data, names = encoder.splits(section, task)
    model = encoder.pretrained(section, len(names), seed, student).to(place.device)
    dtype = models.precision(place.precision, width=model.config.hidden_size, where=place.device)
    epochs = section.epochs if student else section.teacher_epochs
    batches = [
        batch
        for epoch in range(epochs)
        for batch in classification.batches(
            data["train"].lengths[:texts], size=section.batch_size, seed=seed, epoch=epoch
        )
    ]
    return Run(model, data, task, section, place, dtype, batches)


def outputs_file(task: str) -> str:
    """Where a task's teacher leaves its outputs, under the experiment's checkpoints."""
    return f"{encoder.spelled(task)}_teacher.safetensors"


def train_teacher(section: Section, task: str, place: Workspace) -> Steps:
    """Fine-tune the whole encoder but its embeddings; leave its logits and, of the training split, its states."""
    run = start(section, task, place, seed=section.teacher_seed)

    def loss(rows: Tensor) -> dict[str, Tensor]:
        return {"loss/ce": arms.cross_entropy(run.outputs(rows).logits, run.labels(rows))}

    curve = yield from run.fit(loss, section.teacher_learning_rate)
    found = {split: run.logits(split) for split in SPLITS[1:]}
    train = classifier.all_rows(run.model, run.data["train"], run.dtype, states=True)
    found |= {"train": train.logits, "states": train.states}
    resume.write_tensors(place.checkpoints / outputs_file(task), found)
    return run.result({f"{split}/score": run.score(split, found[split]) for split in SPLITS}, curve)


def taught(
    run: Run, arm: str, weights: Sequence[float], outputs: dict[str, Tensor], *, moved: int = 0
) -> Callable[[Tensor], dict[str, Tensor]]:
    """The loss of an arm: CE, unless the arm leaves it out, and every added term at its weight.

    `outputs` are the teacher's: logits a split, and `states` of the training split; for `takd`, `assistant` holds the
    logits of the training split that it reads. With `moved`, each row is shown the outputs of the row so many places
    before it in the batch.
    """
    names = arms.added(arm)
    forms = [arms.term(name, run.section) for name in names]
    states = any(name in arms.OF_STATES for name in names)

    def loss(rows: Tensor) -> dict[str, Tensor]:
        found, labels = run.outputs(rows, states=states), run.labels(rows)
        total = {"loss/ce": arms.cross_entropy(found.logits, labels)} if "ce" in arm.split("+") else {}
        for name, form, weight in zip(names, forms, weights, strict=True):
            shown = _shown(run, outputs, name, rows.roll(moved))
            total[f"loss/{name}"] = total.get(f"loss/{name}", 0) + weight * form(found, shown, labels)
        return total

    return loss


def _shown(run: Run, outputs: dict[str, Tensor], name: str, rows: Tensor) -> Outputs:
    """What a term reads of the teacher, or of the assistant, at some training rows, where the student is."""
    where, logits = run.model.device, outputs["assistant" if name == arms.ASSISTED else "train"]
    states = outputs["states"][:, rows].to(where) if name in arms.OF_STATES else None
    return Outputs(logits[rows].to(where), states)


def matched(run: Run, name: str, outputs: dict[str, Tensor]) -> float:
    """The weight of a term that matches CE's gradient on the first batches of the untrained student."""
    form, states = arms.term(name, run.section), name in arms.OF_STATES

    def pair(rows: Tensor) -> tuple[Tensor, Tensor]:
        found, labels = run.outputs(rows, states=states), run.labels(rows)
        shown = _shown(run, outputs, name, rows)
        return arms.cross_entropy(found.logits, labels), form(found, shown, labels)

    return arms.matched_weight(run.parameters, pair, run.batches[: run.section.matching_batches])


def load_outputs(place: Workspace, file: str) -> dict[str, Tensor]:
    """What an earlier cell left under a name: its teacher's outputs, or an assistant's."""
    return load_file(place.checkpoints / file)
