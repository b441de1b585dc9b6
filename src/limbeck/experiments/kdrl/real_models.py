"""A pretrained student and its teacher: a larger model of the same vocabulary, or the student's copy, taught here."""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck import language_models, models, sampling, seeding
from limbeck.experiments.cells import Place, Result
from limbeck.experiments.kdrl import language
from limbeck.experiments.kdrl.language import Words
from limbeck.losses import policy
from limbeck.params import positive
from limbeck.training import learner, resume, supervised

FURTHER, WEIGHTS = "further", "teacher.safetensors"
Steps = Generator[dict[str, float], None, Result]


@dataclass(frozen=True)
class Section(language.Section):
    """Both models; `further_` is of a teacher called `further`.

    Of student and `further` teacher the last `trained_layers` layers are trained; 0 trains all parameters.
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
        positive(further_steps=self.further_steps, further_batch=self.further_batch)
        positive(validation_samples=self.validation_samples)


@dataclass(frozen=True)
class Bench:
    """What every cell works with."""

    section: Section
    place: Place
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

    def order(self, wanted: int, seed: int) -> Tensor:
        """Training rows in a drawn order, epoch after epoch."""
        count, source = len(self.data.train), seeding.generator(seed, "prompts")
        epochs = -(-wanted // count)
        return torch.cat([torch.randperm(count, generator=source) for _ in range(epochs)])[:wanted]

    def student(self) -> PreTrainedModel:
        """The student at its start, the same for every seed."""
        model, layers = self._loaded(self.section.student), self.section.trained_layers
        return language_models.train_last_layers(model, layers) if layers else model

    def teacher(self) -> PreTrainedModel:
        """The teacher. Raises ValueError if its vocabulary is not the student's."""
        if self.section.teacher != FURTHER:
            tokenizer = language_models.load_tokenizer(self.section.teacher, self.data.texts)
            learner.require_one_vocabulary(self.data.tokenizer, tokenizer)
            return self._loaded(self.section.teacher)
        model, device = self._loaded(self.section.student), str(self.place.device)
        model.load_state_dict(load_file(self.place.checkpoints / WEIGHTS, device=device), strict=False)
        return model

    def _loaded(self, name: str) -> PreTrainedModel:
        """A model without the rows that pad its vocabulary: no token stands for them, and sizes of Qwen2 differ there.

        transformers draws new embeddings before it fills them, hence the fork.
        """
        model = language_models.load(name, self.data.tokenizer, seed=0)
        if model.config.vocab_size > len(self.data.tokenizer):
            with torch.random.fork_rng(devices=[]):
                model.resize_token_embeddings(len(self.data.tokenizer))
        return model.to(self.place.device)


def train_teacher(bench: Bench) -> Steps:
    """Fine-tune the student's copy on the training problems' own solutions; leave the weights that changed."""
    section, data, model = bench.section, bench.data, bench.student()
    asked = [data.problem(example).prompt for example in data.train]
    said = [data.worked(example) for example in data.train]
    batches = bench.order(section.further_steps * section.further_batch, seed=0).split(section.further_batch)

    def loss(rows: Tensor) -> dict[str, Tensor]:
        prompts, solutions = ([texts[row] for row in rows.tolist()] for texts in (asked, said))
        with models.autocast(model.device, bench.dtype(model)):
            logits, kept = sampling.completion_logits(model, prompts, solutions, temperature=1.0)
        logprobs = sampling.completion_logprobs(logits, kept, solutions)
        return {"loss/ce": -policy.weighted_sum(logprobs, policy.token_weights(kept))}

    weights = models.trainable(model)
    options = {"clip_norm": section.clip_norm, "state": bench.place.state, "save_every": section.save_every}
    curve = yield from supervised.fit(weights, loss, batches, learning_rate=section.further_learning_rate, **options)
    resume.write_tensors(bench.place.checkpoints / WEIGHTS, dict(weights))
    return bench.result(model, bench.validation(model), curve, weights)
