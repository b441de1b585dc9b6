"""The cells of SinKD's experiments with language models, and the choice of the weights of their terms.

An arm is CE and up to two more terms, spelled `ce+kl+sinkhorn_answer`. The weight of an added term is a multiple of the
one that matches its gradient to CE's on the untrained student. The multiple is chosen on the validation split, from one
grid for every term and one term after another: KL first, then a third term with KL's weight held.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from limbeck import assets
from limbeck.experiments.runs import Cell
from limbeck.experiments.sinkd import section as common
from limbeck.params import one_of

TEACHER = "teacher.safetensors"
FORMS = {f"sinkhorn_{form}": form for form in ("answer", "position", "tokens")}
TERMS = ("ce", "kl", *FORMS)
_TURNS = 3  # terms in the longest arm: one turn of selection each, but for CE


@dataclass(frozen=True)
class Section(common.Section):
    """What both experiments have in params/sinkd.yaml; sources stand there."""

    teacher: str
    student: str
    data: str
    arms: tuple[str, ...]
    multiples: tuple[float, ...]
    selection_texts: int
    selection_seed: int
    sinkhorn_temperature: float

    def __post_init__(self) -> None:
        """Check what no type can."""
        super().__post_init__()
        for arm in self.arms:
            terms = arm.split("+")
            for term in terms:
                one_of(f"term of arm {arm}", term, TERMS)
            if terms[0] != "ce" or len(set(terms)) < len(terms) or len(terms) > _TURNS:
                raise ValueError(f"an arm is ce and up to {_TURNS - 1} other terms, joined by +, got {arm!r}")
            if before := arm.rpartition("+")[0]:
                one_of(f"arm {arm} without its last term", before, self.arms)


def cells(section: Section, seeds: Sequence[int]) -> list[Cell]:
    """The teacher; selection runs of every added term, an arm's last term after those before it; every arm by seed."""
    inputs = {k: v for k, v in asdict(section).items() if k not in ("arms", "multiples")}
    inputs["assets"] = assets.checksums(section.teacher, section.student, section.data)
    chosen_from = inputs | {"multiples": section.multiples}
    teacher = Cell({"phase": "teacher", "arm": "teacher", "seed": section.teacher_seed}, inputs, (TEACHER,))
    selection = [
        Cell(
            {"phase": "selection", "arm": arm, "multiple": multiple, "seed": section.selection_seed},
            inputs if added == 1 else chosen_from,
            wave=added,
        )
        for added in range(1, _TURNS)
        for arm in section.arms
        if arm.count("+") == added
        for multiple in section.multiples
    ]
    final = [
        Cell({"phase": "final", "arm": arm, "seed": seed}, chosen_from, wave=_TURNS)
        for seed in seeds
        for arm in section.arms
    ]
    return [teacher, *selection, *final]


def weights(
    coordinates: Mapping[str, Any], records: Sequence[Mapping[str, Any]], matched: Callable[[str], float]
) -> dict[str, float]:
    """The weight of every added term: as chosen, or while selecting, a multiple of what matches for the last term."""
    before, _, last = coordinates["arm"].rpartition("+")
    if not before:
        return {}
    if coordinates["phase"] == "final":
        return chosen(records, coordinates["arm"])
    return (chosen(records, before) if "+" in before else {}) | {last: coordinates["multiple"] * matched(last)}


def chosen(records: Sequence[Mapping[str, Any]], arm: str) -> dict[str, float]:
    """The weights of an arm's selection run with the highest validation accuracy; of equals, the smallest multiple."""
    tried = [r for r in records if r["cell"]["phase"] == "selection" and r["cell"]["arm"] == arm]
    best = max(tried, key=lambda r: (r["metrics"]["validation/accuracy"], -r["cell"]["multiple"]))
    return {k.removeprefix("weight/"): v for k, v in best["metrics"].items() if k.startswith("weight/")}
