"""KDRL on a pretrained model: arms by seed on one task in words, with one teacher and one weight of it.

The teacher is a larger model of the same vocabulary, or the student's copy, fine-tuned here on problems that no arm
meets. `start` and `teacher` are only measured. The test split is read after the last step; it chooses nothing.

Left out: a choice of the teacher's weight, which would cost a run each; the small comparisons have it.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from limbeck import assets, models, seeding
from limbeck.experiments import runs
from limbeck.experiments.kdrl.comparison import START, TEACHER, Loop, Steps, only_score, train
from limbeck.experiments.kdrl.problems import WordParams, WordProblems, word_judge
from limbeck.experiments.runs import Cell, Workspace
from limbeck.models import language
from limbeck.params import flat, positive
from limbeck.sampling import Tokens
from limbeck.training import imitation, objectives, rollouts

FURTHER = "further"


@dataclass(frozen=True)
class Params:
    """The models, the problems and the loop. Of the seeds, the first `replicates` are used.

    `further_` is of a teacher called `further`. Of a model that is trained, here or in an arm, the last
    `trained_layers` layers are; 0 stands for all parameters.
    """

    student: str
    teacher: str
    words: WordParams
    loop: Loop
    trained_layers: int
    further_steps: int
    further_batch: int
    further_learning_rate: float
    arms: tuple[str, ...]
    kd_coef: float
    replicates: int

    def __post_init__(self) -> None:
        if any(map(_switches, self.arms)) and "kd" not in self.arms:
            raise ValueError(f"received arms {self.arms}, expected kd among them: one switches where kd stops")
        positive(replicates=self.replicates, kd_coef=self.kd_coef)
        if self.teacher == FURTHER:
            positive(further_steps=self.further_steps, further_batch=self.further_batch)
            positive(taught_size=self.words.taught_size)


def _switches(arm: str) -> bool:
    return arm not in (START, TEACHER) and objectives.arm(arm).schedule == "switch"


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """The teacher, if it is trained here, then every arm by seed. Raises ValueError for too few seeds."""
    if len(seeds) < params.replicates:
        raise ValueError(f"received the seeds {tuple(seeds)}, expected at least {params.replicates}")
    inputs = {name: value for name, value in flat(params).items() if name not in ("arms", "replicates")}
    inputs["assets"] = assets.checksums(params.student, params.teacher)
    every = []
    if params.teacher == FURTHER:
        every.append(Cell({"phase": "teacher", "arm": TEACHER, "seed": 0}, inputs, (imitation.weights_file(TEACHER),)))
    for seed in seeds[: params.replicates]:
        for arm in params.arms:
            every.append(Cell({"phase": "final", "arm": arm, "seed": seed}, inputs, wave=1 + _switches(arm)))
    return sorted(every, key=lambda cell: cell.wave)


def run(cell: Cell, params: Params, workspace: Workspace) -> Steps:
    """Train and score one cell; yields once per step."""
    arm = cell.coordinates["arm"]
    with word_judge(params.words) as judge:
        problems = WordProblems(params.words, params.student, judge, together=params.loop.prompts)
        if cell.coordinates["phase"] == "teacher":
            return (yield from _train_teacher(params, problems, workspace))
        if arm in (START, TEACHER):
            model = (load_student if arm == START else load_teacher)(params, problems, workspace)
            return (yield from only_score(model, problems, seed=cell.coordinates["seed"], workspace=workspace))
        method, student = objectives.arm(arm), load_student(params, problems, workspace)
        needed = method.asks_teacher or method.texts != "own"
        teacher = load_teacher(params, problems, workspace) if needed else None
        objective = functools.partial(objectives.objective, kd_coef=params.kd_coef)
        return (
            yield from train(
                cell.coordinates,
                student,
                teacher,
                problems,
                params.loop,
                objective=objective,
                workspace=workspace,
                teacher_ends=_teacher_ends(params, problems),
            )
        )


def _teacher_ends(params: Params, problems: WordProblems) -> Tokens:
    """The tokens with which the teacher ends a text."""
    if params.teacher == FURTHER:
        return problems.ends
    tokenizer = language.load_tokenizer(params.teacher, problems.texts)
    return language.end_tokens(tokenizer, *language.generation_configs(params.teacher))


def _train_teacher(params: Params, problems: WordProblems, workspace: Workspace) -> Steps:
    """Fine-tune a copy of the student on worked solutions; leave the weights that changed."""
    model = load_student(params, problems, workspace)
    examples, dtype = problems.teacher_train, workspace.dtype
    source = seeding.generator(0, "further")
    rows = rollouts.batches(len(examples), size=params.further_batch, steps=params.further_steps, source=source)
    prompts, solutions = map(problems.prompt, examples), map(problems.worked, examples)
    curve = yield from imitation.fit(
        model,
        list(prompts),
        list(solutions),
        list(map(torch.tensor, rows)),
        learning_rate=params.further_learning_rate,
        clip_norm=params.loop.clip_norm,
        dtype=dtype,
        state=workspace.state,
        save_every=params.loop.save_every,
    )
    imitation.save(model, workspace.checkpoints, TEACHER)
    metrics = problems.validation_scores(model, samples=params.loop.validation_samples, dtype=dtype)
    return runs.result(metrics, curve, weights=models.trainable(model), dtype=dtype)


def load_student(params: Params, problems: WordProblems, workspace: Workspace) -> PreTrainedModel:
    """The student at its start, the same for every seed; what is not trained is frozen."""
    model = _loaded(params.student, problems, workspace)
    return language.train_last_layers(model, params.trained_layers) if params.trained_layers else model


def load_teacher(params: Params, problems: WordProblems, workspace: Workspace) -> PreTrainedModel:
    """The teacher. Raises ValueError if its vocabulary is not the student's."""
    if params.teacher == FURTHER:
        return imitation.restore(load_student(params, problems, workspace), workspace.checkpoints, TEACHER)
    language.require_one_vocabulary(problems.tokenizer, language.load_tokenizer(params.teacher, problems.texts))
    return _loaded(params.teacher, problems, workspace)


def _loaded(name: str, problems: WordProblems, workspace: Workspace) -> PreTrainedModel:
    """A model without the rows that pad its vocabulary: no token stands for them, and sizes of Qwen2 differ there.

    transformers draws new embeddings before it fills them, hence the fork.
    """
    model = language.load(name, problems.tokenizer, seed=0)
    if model.config.vocab_size > len(problems.tokenizer):
        with torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(len(problems.tokenizer))
    return model.to(workspace.device)
