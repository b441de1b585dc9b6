"""KDRL on a pretrained model: arms by seed on one task in words, with one teacher and one weight of it.

A seed fixes the prompts of every step and the random numbers of every sample, for every arm. `start` and `teacher` are
only measured. The test split is read after the last step; it chooses nothing.

Left out: a choice of the teacher's weight, which would cost a run each; the small comparisons have it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from limbeck import assets, models, seeding
from limbeck.experiments.kdrl import curves, real_models, word_problems
from limbeck.experiments.kdrl.real_models import FURTHER, TEACHER, Bench, Steps
from limbeck.experiments.kdrl.word_problems import Words
from limbeck.experiments.runs import Cell, Workspace
from limbeck.params import positive
from limbeck.training import grpo, imitation, learner, objectives, rollouts

_MEASURED = ("start", TEACHER)  # arms that are not trained
_SETTINGS = ("group_size", "longest", "learning_rate", "clip_norm", "save_every", "micro_tokens")


@dataclass(frozen=True)
class Params(real_models.Section):
    """The section of params/kdrl.yaml; sources stand there. Of the seeds, the first `replicates` are used."""

    arms: tuple[str, ...]
    kd_coef: float
    replicates: int
    steps: int
    group_size: int
    learning_rate: float
    micro_tokens: int
    measure_every: int
    target: float

    def __post_init__(self) -> None:
        """Check what no type can."""
        super().__post_init__()
        if any(map(_switches, self.arms)) and "kd" not in self.arms:
            raise ValueError(f"received arms {self.arms}, expected kd among them: one switches where kd stops")
        positive(steps=self.steps, replicates=self.replicates, kd_coef=self.kd_coef)


def _switches(arm: str) -> bool:
    return arm not in _MEASURED and objectives.arm(arm).schedule == "switch"


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """The teacher, if it is trained here, then every arm by seed. Raises ValueError for too few seeds."""
    if len(seeds) < params.replicates:
        raise ValueError(f"received the seeds {tuple(seeds)}, expected at least {params.replicates}")
    inputs = {name: value for name, value in asdict(params).items() if name not in ("arms", "replicates")}
    inputs["assets"] = assets.checksums(params.student, params.teacher)
    found = []
    if params.teacher == FURTHER:
        found.append(Cell({"phase": "teacher", "arm": TEACHER, "seed": 0}, inputs, (imitation.weights_file(TEACHER),)))
    for seed in seeds[: params.replicates]:
        for arm in params.arms:
            found.append(Cell({"phase": "final", "arm": arm, "seed": seed}, inputs, wave=1 + _switches(arm)))
    return sorted(found, key=lambda cell: cell.wave)


def run(cell: Cell, params: Params, place: Workspace) -> Steps:
    """Train and score one cell; yields once a step."""
    arm, seed = cell.coordinates["arm"], cell.coordinates["seed"]
    with word_problems.judge(params) as judge:
        bench = Bench(params, place, Words(params, judge))
        if cell.coordinates["phase"] == "teacher":
            return (yield from real_models.train_teacher(bench))
        if arm not in _MEASURED:
            return (yield from _train(arm, seed, params, bench))
        model = bench.student() if arm != TEACHER else bench.teacher()
        yield {"step": 1, "steps": 1}
        return bench.result(model, bench.data.test_scores(model, seed=seed, dtype=bench.dtype(model)))


def _train(arm: str, seed: int, params: Params, bench: Bench) -> Steps:
    """One arm: its steps, then its scores on the test split."""
    data, method, student = bench.data, objectives.arm(arm), bench.student()
    own, dtype = method.texts == "own", bench.dtype(student)
    teacher = bench.teacher() if method.asks_teacher or not own else None
    switch = _switch(seed, params, bench.place) if _switches(arm) else None
    options = {"steps": params.steps, "switch": switch, "measure_every": params.measure_every}
    aim = objectives.objective(method, kd_coef=params.kd_coef, **options)
    chosen = {name: getattr(params, name) for name in _SETTINGS}
    settings = learner.Settings(**chosen, seed=seed, split_every=params.measure_every)
    sampler = data.sampler(student if own else teacher, dtype)
    scorer = teacher if method.asks_teacher else None
    runner = learner.Run(student, sampler, data.verifier(), scorer, settings, dtype)
    source = seeding.generator(seed, "prompts")
    drawn = rollouts.batches(len(data.train), size=params.prompts, steps=params.steps, source=source)
    problems = [[data.problem(data.train[row]) for row in rows] for rows in drawn]
    weights = models.trainable(student)

    def measure() -> dict[str, float]:
        return bench.validation(student)

    curve = yield from grpo.fit(runner, weights, problems, aim, state=bench.place.state, measure=measure)
    metrics = curves.summary(curve, steps=params.steps, window=params.save_every, target=params.target)
    metrics |= {} if switch is None else {"kd/switch": float(switch)}
    metrics |= data.test_scores(student, seed=seed, dtype=dtype)
    return bench.result(student, metrics, curve, weights)


def _switch(seed: int, params: Params, place: Workspace) -> int:
    """The step at which `kd`, of the same seed, stopped rising on the validation split."""
    wanted = {"phase": "final", "arm": "kd", "seed": seed}
    (record,) = (record for record in place.records if record["cell"] == wanted)
    scores = record["curve"]["validation/accuracy"]
    return curves.ends(params.steps, params.save_every)[curves.stopped(scores)]
