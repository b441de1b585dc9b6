"""What SinKD's encoder experiments share: splits, the fine-tuned teacher with its logits, students, and added terms.

`section` is the experiment's parameters: any dataclass with the fields that are read here.
"""

import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck import evaluation, models
from limbeck.experiments.cells import Place, Result
from limbeck.losses import divergence, transport
from limbeck.tasks import classification
from limbeck.training import resume, supervised

SPLITS = ("train", "validation", "test")
LOGITS = "teacher_logits.safetensors"
WEIGHTS = "teacher.safetensors"
Steps = Generator[dict[str, float], None, Result]
Splits = dict[str, classification.Encoded]


@functools.lru_cache(maxsize=1)
def splits(section: Any) -> tuple[Splits, tuple[str, ...]]:
    """The three splits by name, and the class names."""
    tokenizer = models.load_tokenizer(section.model)
    encoded, names = classification.encode(classification.examples(section.data), tokenizer, longest=section.longest)
    parts = classification.split(encoded, section.split_sizes, seed=section.split_seed)
    return dict(zip(SPLITS, parts, strict=True)), names


def pretrained(section: Any, classes: int, seed: int, layers: int | None = None) -> PreTrainedModel:
    """The pretrained encoder, or its first layers, with a head of its own; embeddings frozen."""
    model = models.load_encoder(section.model, classes=classes, seed=seed)
    model = models.first_layers(model, layers) if layers else model
    return models.read_first_token(models.freeze_embeddings(model))


def order(lengths: Tensor, section: Any, epochs: int, seed: int) -> list[Tensor]:
    """The rows of every batch of every epoch."""
    return [
        batch
        for epoch in range(epochs)
        for batch in classification.batches(lengths, size=section.batch_size, seed=seed, epoch=epoch)
    ]


def train_on(
    batches: Sequence[Tensor],
    parameters: dict[str, nn.Parameter],
    loss: Callable[[Tensor], dict[str, Tensor]],
    learning_rate: float,
    section: Any,
    place: Place,
) -> Generator[dict[str, float], None, supervised.Curve]:
    """`supervised.fit` with the section's settings."""
    return supervised.fit(
        parameters,
        loss,
        batches,
        learning_rate=learning_rate,
        clip_norm=section.clip_norm,
        state=place.state,
        save_every=section.save_every,
    )


def teacher(section: Any, place: Place, data: Splits, classes: int) -> Steps:
    """Fine-tune the whole encoder, and leave its weights and its logits of every split."""
    model = pretrained(section, classes, section.teacher_seed).to(place.device)
    dtype = models.precision(place.precision, width=model.config.hidden_size, where=place.device)
    train = data["train"]

    def loss(rows: Tensor) -> dict[str, Tensor]:
        return {"loss/ce": cross_entropy(evaluation.forward(model, train, rows, dtype), train.labels[rows])}

    parameters = models.trainable(model)
    batches = order(train.lengths, section, section.teacher_epochs, section.teacher_seed)
    curve = yield from train_on(batches, parameters, loss, section.teacher_learning_rate, section, place)
    logits = {split: evaluation.logits(model, data[split], dtype) for split in SPLITS}
    resume.write_tensors(place.checkpoints / WEIGHTS, model.state_dict())
    resume.write_tensors(place.checkpoints / LOGITS, logits)
    metrics = {f"{split}/accuracy": evaluation.accuracy(logits[split], data[split].labels) for split in SPLITS}
    return Result(metrics, curve, count(parameters), name(dtype))


def added_term(arm: str, section: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The added term of an arm, from student and teacher logits."""
    by_logits = {
        "kl": divergence.forward_kl,
        "rkl": divergence.reverse_kl,
        "js": divergence.jensen_shannon,
        "tvd": divergence.total_variation,
    }
    if arm in by_logits:
        return functools.partial(by_logits[arm], temperature=section.temperature)
    if arm == "l1":
        return lambda student, teacher: transport.sample_l1(student.softmax(-1), teacher.softmax(-1))
    if arm == "sinkhorn":
        return lambda student, teacher: transport.sinkhorn_distance(
            (student / section.temperature).softmax(-1),
            (teacher / section.temperature).softmax(-1),
            epsilon=section.epsilon,
            iterations=section.iterations,
            p=section.p,
        )
    return lambda student, teacher: student.new_zeros(())


def matched_weight(
    parameters: dict[str, nn.Parameter],
    pair: Callable[[Tensor], tuple[Tensor, Tensor]],
    batches: Sequence[Tensor],
) -> float:
    """The weight at which the divergence's gradient is as long as CE's, on average over some batches."""
    norms = [[supervised.gradient_norm(parameters, value) for value in pair(rows)] for rows in batches]
    return sum(ce for ce, _ in norms) / sum(extra for _, extra in norms)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the batch, in nats."""
    return nn.functional.cross_entropy(logits, labels.to(logits.device))


def count(parameters: dict[str, nn.Parameter]) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in parameters.values())


def name(dtype: torch.dtype) -> str:
    """A dtype as a record spells it."""
    return str(dtype).removeprefix("torch.")
