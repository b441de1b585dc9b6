"""SinKD's comparison of divergences: one teacher, one student, one added term at a time.

A pretrained encoder is fine-tuned as teacher and its logits are computed once. Students are the first layers of the
same pretrained encoder, trained on CE + weight * divergence. The weight of each divergence is a multiple of the one
that matches its gradient norm to that of CE on the untrained student; the multiple is chosen on the validation split,
from the same grid with the same budget for every divergence; the test split is read once, after the last step.

Two arms are the same quantity at different temperatures: total variation is half the L1 norm, so `tvd` is the L1
control at the temperature of `sinkhorn`, and `l1` is the released sample-wise term, which leaves temperature out.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from limbeck import assets, evaluation, models
from limbeck.experiments.cells import Cell, Place, Result
from limbeck.experiments.sinkd import encoder
from limbeck.params import one_of, positive

ARMS = ("ce", "kl", "rkl", "js", "tvd", "l1", "sinkhorn")
_SEEDLESS = ("arms", "multiples")


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
        if len(self.split_sizes) != len(encoder.SPLITS):
            raise ValueError(
                f"split_sizes must hold one number each for {', '.join(encoder.SPLITS)}, got {self.split_sizes}"
            )
        positive(**{name: value for name, value in asdict(self).items() if type(value) is float})
        positive(batch_size=self.batch_size, epochs=self.epochs, iterations=self.iterations, save_every=self.save_every)


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """The teacher, then the selection runs of every divergence, then every arm by seed."""
    checksums = [assets.checksum(name) for name in (params.model, params.data) if name in assets.manifest()]
    inputs = {k: v for k, v in asdict(params).items() if k not in _SEEDLESS} | {"assets": checksums}
    teacher = Cell(
        {"phase": "teacher", "arm": "teacher", "seed": params.teacher_seed}, inputs, (encoder.LOGITS, encoder.WEIGHTS)
    )
    selection = [
        Cell({"phase": "selection", "arm": arm, "multiple": multiple, "seed": params.selection_seed}, inputs, turn=1)
        for arm in params.arms
        if arm != "ce"
        for multiple in params.multiples
    ]
    chosen_from = inputs | {"multiples": params.multiples}
    final = [
        Cell({"phase": "final", "arm": arm, "seed": seed}, chosen_from, turn=2) for seed in seeds for arm in params.arms
    ]
    return [teacher, *selection, *final]


def run(cell: Cell, params: Params, place: Place) -> encoder.Steps:
    """Train and score one cell; yields once a step."""
    data, names = encoder.splits(params)
    if cell.coordinates["phase"] == "teacher":
        return (yield from encoder.teacher(params, place, data, len(names)))
    return (yield from _student(cell.coordinates, params, place, data, len(names)))


def _student(
    coordinates: dict[str, Any], params: Params, place: Place, data: encoder.Splits, classes: int
) -> encoder.Steps:
    arm, seed, selecting = coordinates["arm"], coordinates["seed"], coordinates["phase"] == "selection"
    model = encoder.pretrained(params, classes, seed, params.layers).to(place.device)
    dtype = models.precision(place.precision, width=model.config.hidden_size, where=place.device)
    train, parameters = data["train"], models.trainable(model)
    teacher_logits = load_file(place.checkpoints / encoder.LOGITS)
    rows = train.lengths[: params.selection_texts] if selecting else train.lengths
    batches = encoder.order(rows, params, params.epochs, seed)
    term, matching = encoder.added_term(arm, params), params.matching_batches

    def pair(rows: Tensor) -> tuple[Tensor, Tensor]:
        student = evaluation.forward(model, train, rows, dtype)
        ce = encoder.cross_entropy(student, train.labels[rows])
        return ce, term(student, teacher_logits["train"][rows].to(student.device))

    weight = _weight(coordinates, place, lambda: encoder.matched_weight(parameters, pair, batches[:matching]))

    def loss(rows: Tensor) -> dict[str, Tensor]:
        ce, extra = pair(rows)
        return {"loss/ce": ce} | ({f"loss/{arm}": weight * extra} if weight else {})

    curve = yield from encoder.train_on(batches, parameters, loss, params.learning_rate, params, place)
    split = "validation" if selecting else "test"
    logits = evaluation.logits(model, data[split], dtype)
    metrics = {
        f"{split}/accuracy": evaluation.accuracy(logits, data[split].labels),
        f"{split}/agreement": evaluation.accuracy(logits, teacher_logits[split].argmax(-1)),
        "loss/weight": weight,
    }
    return Result(metrics, curve, encoder.count(parameters), encoder.name(dtype))


def _weight(coordinates: dict[str, Any], place: Place, matched: Callable[[], float]) -> float:
    """None for CE alone, a multiple of the matched weight while selecting, then the weight that was selected."""
    if coordinates["arm"] == "ce":
        return 0.0
    if coordinates["phase"] == "selection":
        return coordinates["multiple"] * matched()
    return choose(place.records, coordinates["arm"])["metrics"]["loss/weight"]


def choose(records: Sequence[dict[str, Any]], arm: str) -> dict[str, Any]:
    """The selection record of an arm with the highest validation accuracy; of equals, the smallest multiple."""
    tried = [r for r in records if r["cell"]["phase"] == "selection" and r["cell"]["arm"] == arm]
    return max(tried, key=lambda r: (r["metrics"]["validation/accuracy"], -r["cell"]["multiple"]))
