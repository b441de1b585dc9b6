"""What a step costs: GRPO in our loop beside TRL's GRPOTrainer, and beside our loop with a teacher.

Every arm starts from the same untrained model of characters, with the same prompts, group size, longest completion,
verifier and optimiser (AdamW at a constant rate, clipped gradients, no decay), in float32, and a round is one step of
each: sampling, judging, an update. Completions end where they are drawn to (`drawn`), or all have the longest length
(`full`), since their end token is then one that the model cannot write. TRL runs without vLLM, reference policy and
gradient checkpointing, and is timed from the beginning of a step to its end, without the start of its `train()`. Each
round, TRL's losses and gradients are compared with ours on completions and advantages that both are given.

Left out: what our loop measures every tenth step (gradients of terms apart, the exact KL), here in the uncounted round
only. TRL seeds the global generators: torch's is put back, those of random and numpy are not.
"""

import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from limbeck import measurements, models, params, sampling, seeding
from limbeck.losses import policy
from limbeck.models import language
from limbeck.tasks import chain_sum
from limbeck.training import grpo, objectives, rollouts
from limbeck.training.rollouts import Problem, Verdict

SECTIONS = {"smoke": "tiny", "bench": "bench"}  # profile: section of params/kdrl.yaml
OURS, LENGTHS = ("grpo", "kd", "kdrl"), ("drawn", "full")
NORMALISERS = {"grpo": "sequence", "dr_grpo": "constant", "dapo": "token", "bnpo": "token"}  # TRL's loss_type: ours
TRL = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "dataloader_pin_memory": False}
TRL |= {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "max_steps": 1}
TRL |= {"shuffle_dataset": False, "temperature": 1.0, "beta": 0.0, "num_iterations": 1, "loss_type": "dapo"}
TRL |= {"optim": "adamw_torch_fused", "lr_scheduler_type": "constant", "weight_decay": 0.0}
_STALENESS = 0.3  # deviation of older log-probabilities, so that some ratios are clipped
_COMPARED = 4  # prompts on which losses are compared
Examples = dict[str, chain_sum.Example]  # by prompt


@dataclass(frozen=True)
class Params:
    """What is timed: `lengths` of completions, sizes of groups, and how many samples each side takes at once."""

    shape: str
    terms: tuple[int, ...]
    digits: tuple[int, ...]
    data_seed: int
    lengths: tuple[str, ...]
    group_sizes: tuple[int, ...]
    samples: int
    longest: int
    learning_rate: float
    clip_norm: float
    kd_coef: float
    micro_tokens: int
    trl_rows: int
    rounds: int
    threads: int

    def __post_init__(self) -> None:
        for name in self.lengths:
            params.one_of("lengths", name, LENGTHS)
        params.positive(rounds=self.rounds, threads=self.threads)
        for size in (*self.group_sizes, self.trl_rows):
            if size < 1 or self.samples % size:
                raise ValueError(f"received parts of {size} samples, expected parts that add up to {self.samples}")


class _Clock(TrainerCallback):
    """Seconds of TRL's steps; mean lengths of their completions, from the log that a `train()` ends with."""

    def __init__(self) -> None:
        self.seconds, self.lengths = [], []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.seconds.append(time.perf_counter() - self.started)

    def on_log(self, *_: object, logs: dict[str, float], **__: object) -> None:
        self.lengths.append(logs["completions/mean_length"])


def measure(profile: str) -> pd.DataFrame:
    """One row per kind of lengths, group size, arm and round: seconds, samples and tokens per second, mean length, and
    samples per second as a multiple of TRL's in that round; for TRL, the largest difference of its losses to ours.
    """
    params.one_of("profile", profile, SECTIONS)
    section = params.load("kdrl", "table_efficiency", SECTIONS[profile], Params)
    threads = torch.get_num_threads()
    torch.set_num_threads(section.threads)
    try:
        kinds = itertools.product(section.lengths, section.group_sizes)
        return pd.DataFrame([row for lengths, size in kinds for row in _rows(section, lengths, size)])
    finally:
        torch.set_num_threads(threads)


def _rows(section: Params, lengths: str, size: int) -> list[dict[str, float | int | str]]:
    family, clock, rows = chain_sum.Family(section.terms, section.digits), _Clock(), []
    drawn = chain_sum.examples(family, section.samples // size, seed=section.data_seed)
    examples = {f"{example.expression}=": example for example in drawn}
    means = {arm: [] for arm in OURS} | {"trl": clock.lengths}
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        trainer = theirs(section, lengths, size, examples, folder)
        trainer.add_callback(clock)
        steps = {arm: ours(arm, section, lengths, size, examples) for arm in OURS}
        calls = {arm: lambda arm=arm: means[arm].append(steps[arm]()) for arm in OURS} | {"trl": trainer.train}
        seconds = measurements.alternate(calls, rounds=section.rounds) | {"trl": clock.seconds[1:]}
        for arm, index in itertools.product(calls, range(section.rounds)):
            spent, length = seconds[arm][index], means[arm][1 + index]
            row = {"lengths": lengths, "group_size": size, "arm": arm, "round": index, "bench/seconds": spent}
            row |= {"bench/samples": section.samples / spent, "bench/tokens": section.samples * length / spent}
            row |= {"bench/length": length, "bench/ratio": seconds["trl"][index] / spent}
            rows.append(row | ({"loss/difference": difference(trainer, seed=index)} if arm == "trl" else {}))
    return rows


def start(section: Params, lengths: str, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """An untrained model, and its tokenizer with the token that ends a completion."""
    tokenizer = language.character_tokenizer(chain_sum.ALPHABET)
    model = language.load(section.shape, tokenizer, seed=seed)
    if lengths == "full":
        tokenizer.add_special_tokens({"eos_token": "[NEVER]"})
        model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def ours(arm: str, section: Params, lengths: str, size: int, examples: Examples) -> Callable[[], float]:
    """A step of our loop, as a call that returns the mean length of its completions."""
    method, count = objectives.arm(arm), section.rounds + 1
    student, tokenizer = start(section, lengths, 0)
    teacher = start(section, lengths, 1)[0] if method.asks_teacher else None

    def verify(problem: Problem, completion: sampling.Tokens) -> Verdict:
        reward = chain_sum.reward(examples[problem.name], tokenizer.decode(completion, skip_special_tokens=True))
        return Verdict(reward, correct=reward == 1.0)

    settings = rollouts.Settings(
        group_size=size,
        longest=section.longest,
        seed=0,
        learning_rate=section.learning_rate,
        clip_norm=section.clip_norm,
        save_every=count,
        micro_tokens=section.micro_tokens,
        split_every=count,
    )
    run = rollouts.Run(student, sampling.Sampled(student, tokenizer.eos_token_id), verify, teacher, settings)
    problems = [[Problem(tuple(tokenizer(prompt)["input_ids"]), prompt) for prompt in examples]] * count
    objective = objectives.objective(method, kd_coef=section.kd_coef, steps=count, measure_every=count)
    steps = grpo.fit(run, models.trainable(student), problems, objective, state=None)
    return lambda: next(steps)["rollout/length"]


def theirs(section: Params, lengths: str, size: int, examples: Examples, folder: str) -> GRPOTrainer:
    """TRL's trainer, whose `train()` is one step."""
    model, tokenizer = start(section, lengths, 0)
    options = {"learning_rate": section.learning_rate, "max_grad_norm": section.clip_norm, "num_generations": size}
    options |= {"per_device_train_batch_size": section.trl_rows, "max_completion_length": section.longest}
    options |= {"gradient_accumulation_steps": section.samples // section.trl_rows, "output_dir": folder}

    def reward(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        return [chain_sum.reward(examples[prompt], text) for prompt, text in zip(prompts, completions, strict=True)]

    prompts = Dataset.from_dict({"prompt": list(examples)})
    trainer = GRPOTrainer(model, reward, GRPOConfig(**options, **TRL), prompts, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def losses(trainer: GRPOTrainer, kind: str, *, seed: int) -> list[tuple[Tensor, Tensor]]:
    """TRL's loss of a kind and its gradient, then ours, on completions drawn by `seed` with random advantages."""
    model, tokenizer, size = trainer.model.eval(), trainer.processing_class, trainer.num_generations
    longest, normalise = trainer.max_completion_length, NORMALISERS[kind]
    questions = [tuple(tokenizer(text)["input_ids"]) for text in trainer.train_dataset["prompt"][:_COMPARED]]
    sampler, prompts = sampling.Sampled(model, tokenizer.eos_token_id), [row for row in questions for _ in range(size)]
    sampled = sampler(questions, range(len(questions)), group_size=size, longest=longest, seed=seed)
    source, completions, mask = seeding.generator(seed, "bench"), sampled.rows(), sampled.mask
    old = sampled.logprobs + _STALENESS * torch.randn(mask.shape, generator=source)
    advantages = torch.randn(len(completions), generator=source)

    trainer.loss_type = kind
    ids, seen = sampling.padded(prompts, model.device, left=True)
    batch = {"prompt_ids": ids, "prompt_mask": seen, "completion_ids": sampled.tokens, "advantages": advantages}
    batch |= {"completion_mask": mask.long(), "old_per_token_logps": old, "num_items_in_batch": mask.sum()}
    logits, kept = sampling.completion_logits(model, prompts, completions, temperature=trainer.temperature)
    logprobs = sampling.completion_logprobs(logits, kept, completions)
    options = {"clip_eps": trainer.epsilon_low, "longest": longest if normalise == "constant" else None}
    pair = [trainer.compute_loss(model, batch)]
    pair.append(policy.grpo_loss(logprobs, old, advantages, mask=kept, normalise=normalise, **options))
    weights = list(models.trainable(model).values())
    return [(x.detach(), torch.cat([part.flatten() for part in torch.autograd.grad(x, weights)])) for x in pair]


def difference(trainer: GRPOTrainer, *, seed: int) -> float:
    """The largest difference of a loss of TRL's to ours, or of its gradient, as a share of that gradient's length."""
    pairs = [losses(trainer, kind, seed=seed) for kind in NORMALISERS]
    values = [(our - loss).abs().item() for (loss, _), (our, _) in pairs]
    return max(values + [((our - gradient).norm() / gradient.norm()).item() for (_, gradient), (_, our) in pairs])


if __name__ == "__main__":
    measurements.write("kdrl", "table_efficiency", measure, *sys.argv[1:])
