"""SinKD's comparison of divergences: one teacher, one student, one added term at a time.

A pretrained encoder is fine-tuned as teacher and its logits are computed once. Students are the first layers of the
same pretrained encoder, trained on CE + weight * divergence. The weight of each divergence is a multiple of the one
that matches its gradient norm to that of CE on the untrained student; the multiple is chosen on the validation split,
from the same grid with the same budget for every divergence; the test split is read once, after the last step.

Two arms are the same quantity at different temperatures: total variation is half the L1 norm, so `tvd` is the L1
control at the temperature of `sinkhorn`, and `l1` is the released sample-wise term, which leaves temperature out.
"""

import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck import assets, evaluation, models
from limbeck.experiments.cells import Cell, Place, Result
from limbeck.losses import divergence, transport
from limbeck.params import one_of, positive
from limbeck.tasks import classification
from limbeck.training import resume, supervised

ARMS = ("ce", "kl", "rkl", "js", "tvd", "l1", "sinkhorn")
SPLITS = ("train", "validation", "test")
LOGITS = "teacher_logits.safetensors"
WEIGHTS = "teacher.safetensors"
_SEEDLESS = ("arms", "multiples")
Steps = Generator[dict[str, float], None, Result]


@dataclass(frozen=True)
class Params:
    """The section of params/sinkd.yaml; sources stand there."""

    model: str
    data: str
    longest: int
    split_sizes: tuple[int, ...]
    split_seed: int
    teacher_seed: int
    teacher_epochs: int
    teacher_learning_rate: float
    layers: int
    epochs: int
    learning_rate: float
    batch_size: int
    clip_norm: float
    save_every: int
    arms: tuple[str, ...]
    multiples: tuple[float, ...]
    selection_texts: int
    selection_seed: int
    matching_batches: int
    temperature: float
    epsilon: float
    iterations: int
    p: int

    def __post_init__(self) -> None:
        """Check what no type can."""
        for arm in self.arms:
            one_of("arm", arm, ARMS)
        if len(self.split_sizes) != len(SPLITS):
            raise ValueError(f"split_sizes must hold one number each for {', '.join(SPLITS)}, got {self.split_sizes}")
        positive(**{name: value for name, value in asdict(self).items() if type(value) is float})
        positive(batch_size=self.batch_size, epochs=self.epochs, iterations=self.iterations, save_every=self.save_every)


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """The teacher, then the selection runs of every divergence, then every arm by seed."""
    checksums = [assets.checksum(name) for name in (params.model, params.data) if name in assets.manifest()]
    inputs = {k: v for k, v in asdict(params).items() if k not in _SEEDLESS} | {"assets": checksums}
    teacher = Cell({"phase": "teacher", "arm": "teacher", "seed": params.teacher_seed}, inputs, (LOGITS, WEIGHTS))
    selection = [
        Cell({"phase": "selection", "arm": arm, "multiple": multiple, "seed": params.selection_seed}, inputs)
        for arm in params.arms
        if arm != "ce"
        for multiple in params.multiples
    ]
    chosen_from = inputs | {"multiples": params.multiples}
    final = [Cell({"phase": "final", "arm": arm, "seed": seed}, chosen_from) for seed in seeds for arm in params.arms]
    return [teacher, *selection, *final]


def run(cell: Cell, params: Params, place: Place) -> Steps:
    """Train and score one cell; yields once a step."""
    data, names = _splits(params)
    if cell.coordinates["phase"] == "teacher":
        return (yield from _teacher(params, place, data, len(names)))
    return (yield from _student(cell.coordinates, params, place, data, len(names)))


@functools.lru_cache(maxsize=1)
def _splits(params: Params) -> tuple[dict[str, classification.Encoded], tuple[str, ...]]:
    tokenizer = models.load_tokenizer(params.model)
    encoded, names = classification.encode(classification.examples(params.data), tokenizer, longest=params.longest)
    parts = classification.split(encoded, params.split_sizes, seed=params.split_seed)
    return dict(zip(SPLITS, parts, strict=True)), names


def _encoder(params: Params, classes: int, seed: int, layers: int | None = None) -> PreTrainedModel:
    model = models.load_encoder(params.model, classes=classes, seed=seed)
    model = models.first_layers(model, layers) if layers else model
    return models.read_first_token(models.freeze_embeddings(model))


def _order(lengths: Tensor, params: Params, epochs: int, seed: int) -> list[Tensor]:
    return [
        batch
        for epoch in range(epochs)
        for batch in classification.batches(lengths, size=params.batch_size, seed=seed, epoch=epoch)
    ]


def _teacher(params: Params, place: Place, data: dict[str, classification.Encoded], classes: int) -> Steps:
    model = _encoder(params, classes, params.teacher_seed).to(place.device)
    dtype = models.precision(place.precision, width=model.config.hidden_size, where=place.device)
    train = data["train"]

    def loss(rows: Tensor) -> dict[str, Tensor]:
        return {"loss/ce": _cross_entropy(evaluation.forward(model, train, rows, dtype), train.labels[rows])}

    parameters = models.trainable(model)
    curve = yield from supervised.fit(
        parameters,
        loss,
        _order(train.lengths, params, params.teacher_epochs, params.teacher_seed),
        learning_rate=params.teacher_learning_rate,
        clip_norm=params.clip_norm,
        state=place.state,
        save_every=params.save_every,
    )
    logits = {split: evaluation.logits(model, data[split], dtype) for split in SPLITS}
    resume.write_tensors(place.checkpoints / WEIGHTS, model.state_dict())
    resume.write_tensors(place.checkpoints / LOGITS, logits)
    metrics = {f"{split}/accuracy": evaluation.accuracy(logits[split], data[split].labels) for split in SPLITS}
    return Result(metrics, curve, _count(parameters), _name(dtype))


def _student(
    coordinates: dict[str, Any], params: Params, place: Place, data: dict[str, classification.Encoded], classes: int
) -> Steps:
    arm, seed, selecting = coordinates["arm"], coordinates["seed"], coordinates["phase"] == "selection"
    model = _encoder(params, classes, seed, params.layers).to(place.device)
    dtype = models.precision(place.precision, width=model.config.hidden_size, where=place.device)
    train, parameters = data["train"], models.trainable(model)
    teacher_logits = load_file(place.checkpoints / LOGITS)
    rows = train.lengths[: params.selection_texts] if selecting else train.lengths
    batches = _order(rows, params, params.epochs, seed)
    term = _divergence(arm, params)

    def pair(rows: Tensor) -> tuple[Tensor, Tensor]:
        student = evaluation.forward(model, train, rows, dtype)
        ce = _cross_entropy(student, train.labels[rows])
        return ce, term(student, teacher_logits["train"][rows].to(student.device))

    if arm == "ce":
        weight = 0.0
    elif selecting:
        weight = coordinates["multiple"] * _matched(parameters, pair, batches[: params.matching_batches])
    else:
        weight = choose(place.records, arm)["metrics"]["loss/weight"]

    def loss(rows: Tensor) -> dict[str, Tensor]:
        ce, extra = pair(rows)
        return {"loss/ce": ce} | ({f"loss/{arm}": weight * extra} if weight else {})

    curve = yield from supervised.fit(
        parameters,
        loss,
        batches,
        learning_rate=params.learning_rate,
        clip_norm=params.clip_norm,
        state=place.state,
        save_every=params.save_every,
    )
    split = "validation" if selecting else "test"
    logits = evaluation.logits(model, data[split], dtype)
    metrics = {
        f"{split}/accuracy": evaluation.accuracy(logits, data[split].labels),
        f"{split}/agreement": evaluation.accuracy(logits, teacher_logits[split].argmax(-1)),
        "loss/weight": weight,
    }
    return Result(metrics, curve, _count(parameters), _name(dtype))


def choose(records: Sequence[dict[str, Any]], arm: str) -> dict[str, Any]:
    """The selection record of an arm with the highest validation accuracy; of equals, the smallest multiple."""
    tried = [r for r in records if r["cell"]["phase"] == "selection" and r["cell"]["arm"] == arm]
    return max(tried, key=lambda r: (r["metrics"]["validation/accuracy"], -r["cell"]["multiple"]))


def _divergence(arm: str, params: Params) -> Callable[[Tensor, Tensor], Tensor]:
    """The added term of an arm, from student and teacher logits."""
    by_logits = {
        "kl": divergence.forward_kl,
        "rkl": divergence.reverse_kl,
        "js": divergence.jensen_shannon,
        "tvd": divergence.total_variation,
    }
    if arm in by_logits:
        return functools.partial(by_logits[arm], temperature=params.temperature)
    if arm == "l1":
        return lambda student, teacher: transport.sample_l1(student.softmax(-1), teacher.softmax(-1))
    if arm == "sinkhorn":
        return lambda student, teacher: transport.sinkhorn_distance(
            (student / params.temperature).softmax(-1),
            (teacher / params.temperature).softmax(-1),
            epsilon=params.epsilon,
            iterations=params.iterations,
            p=params.p,
        )
    return lambda student, teacher: student.new_zeros(())


def _matched(
    parameters: dict[str, nn.Parameter],
    pair: Callable[[Tensor], tuple[Tensor, Tensor]],
    batches: Sequence[Tensor],
) -> float:
    """The weight at which the divergence's gradient is as long as CE's, on average over some batches."""
    norms = [[supervised.gradient_norm(parameters, value) for value in pair(rows)] for rows in batches]
    return sum(ce for ce, _ in norms) / sum(extra for _, extra in norms)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels.to(logits.device))


def _count(parameters: dict[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
