"""A pretrained student and its teacher: a larger model of the same vocabulary, or the student's copy, taught here.

A teacher that is taught here learns from problems that no arm meets.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from limbeck import models, seeding
from limbeck.experiments.kdrl import word_problems
from limbeck.experiments.kdrl.word_problems import Words
from limbeck.experiments.runs import Result, Workspace
from limbeck.models import language
from limbeck.params import positive
from limbeck.training import imitation, learner, resume, rollouts, supervised

FURTHER = "further"
TEACHER = "teacher"
Steps = Generator[dict[str, float], None, Result]


@dataclass(frozen=True)
class Section(word_problems.Section):
    """Both models; `further_` is of a teacher called `further`.

    Of a model that is trained, here or in an arm, the last `trained_layers` layers are; 0 stands for all parameters.
    """

    teacher: str
    trained_layers: int
    further_steps: int
    further_batch: int
    further_learning_rate: float
    clip_norm: float
    save_every: int
    validation_samples: int

    def __post_init__(self) -> None:
        """Check what no type can."""
        super().__post_init__()
        positive(validation_samples=self.validation_samples)
        if self.teacher == FURTHER:
            positive(further_steps=self.further_steps, further_batch=self.further_batch, taught_size=self.taught_size)


@dataclass(frozen=True)
class Bench:
    """What every cell works with."""

    section: Section
    place: Workspace
    data: Words

    def dtype(self, model: PreTrainedModel) -> torch.dtype:
        """The dtype of the model's matrix products."""
        return models.precision(self.place.precision, width=model.config.hidden_size, where=self.place.device)

    def validation(self, model: PreTrainedModel) -> dict[str, float]:
        """Scores on the validation split, the same random numbers each time."""
        options = {"samples": self.section.validation_samples, "dtype": self.dtype(model)}
        scores = self.data.measure(model, self.data.validation, **options)
        return {f"validation/{name}": value for name, value in scores.items()}

    def result(
        self,
        model: PreTrainedModel,
        metrics: dict[str, float],
        curve: supervised.Curve | None = None,
        weights: dict[str, nn.Parameter] | None = None,
    ) -> Result:
        """A cell's result; one without weights trained none."""
        count = sum(weight.numel() for weight in (weights or {}).values())
        return Result(metrics, curve or {}, count, str(self.dtype(model)).removeprefix("torch."))

    def student(self) -> PreTrainedModel:
        """The student at its start, the same for every seed; what is not trained is frozen."""
        model, layers = self._loaded(self.section.student), self.section.trained_layers
        return language.train_last_layers(model, layers) if layers else model

    def teacher(self) -> PreTrainedModel:
        """The teacher. Raises ValueError if its vocabulary is not the student's."""
        if self.section.teacher == FURTHER:
            return imitation.restore(self.student(), self.place.checkpoints, TEACHER)
        tokenizer = language.load_tokenizer(self.section.teacher, self.data.texts)
        learner.require_one_vocabulary(self.data.tokenizer, tokenizer)
        return self._loaded(self.section.teacher)

    def _loaded(self, name: str) -> PreTrainedModel:
        """A model without the rows that pad its vocabulary: no token stands for them, and sizes of Qwen2 differ there.

        transformers draws new embeddings before it fills them, hence the fork.
        """
        model = language.load(name, self.data.tokenizer, seed=0)
        if model.config.vocab_size > len(self.data.tokenizer):
            with torch.random.fork_rng(devices=[]):
                model.resize_token_embeddings(len(self.data.tokenizer))
        return model.to(self.place.device)


def train_teacher(bench: Bench) -> Steps:
    """Fine-tune a copy of the student on worked solutions; leave the weights that changed."""
    section, data, model = bench.section, bench.data, bench.student()
    asked = [data.problem(example).prompt for example in data.taught]
    said = [data.worked(example) for example in data.taught]
    sizes = {"size": section.further_batch, "steps": section.further_steps}
    found = rollouts.batches(len(asked), **sizes, source=seeding.generator(0, "further"))
    drawn = [torch.tensor(rows) for rows in found]
    loss, weights = imitation.solution_loss(model, asked, said, bench.dtype(model)), models.trainable(model)
    options = {"clip_norm": section.clip_norm, "state": bench.place.state, "save_every": section.save_every}
    curve = yield from supervised.fit(weights, loss, drawn, learning_rate=section.further_learning_rate, **options)
    resume.write_tensors(bench.place.checkpoints / imitation.weights_file(TEACHER), dict(weights))
    return bench.result(model, bench.validation(model), curve, weights)
