"""Problems in words for pretrained decoders: which belong to which split, how they are asked, judged and scored.

A task is `chain_sum`, `gsm_symbolic`, or `math/<data set>` with a hub name or a local folder. Of the first two a text's
answer is its last number; mathematics is judged in a process of its own. A completion that has not ended is wrong.
"""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from limbeck.models import language
from limbeck.params import one_of, positive
from limbeck.sampling import Sampled, Sampler, Tokens
from limbeck.tasks import chain_sum, classification, gsm_symbolic, mathematics
from limbeck.tasks.isolated import Isolated
from limbeck.training.rollouts import Problem, Verdict
from limbeck.vllm_sampling import VllmSampled

Example = chain_sum.Example | gsm_symbolic.Example | mathematics.Example
Judge = Callable[[Example, str], float]
TASKS = ("chain_sum", "gsm_symbolic")
MATHEMATICS = "math/"
SAMPLERS = ("transformers", "vllm")
_COLD = 1e-3  # a temperature at which all but a tie takes the most probable token


@dataclass(frozen=True)
class Section:
    """What the problems are, and how a model meets them; sources stand in params/kdrl.yaml.

    `terms` and `digits` are those of chain_sum, `columns` and `verify_limit` (seconds a completion) of mathematics;
    `taught_size` problems are for a teacher that is fine-tuned before the experiment.
    """

    student: str
    task: str
    terms: tuple[int, ...]
    digits: tuple[int, ...]
    columns: tuple[str, ...]
    verify_limit: float
    chat: bool
    taught_size: int
    train_size: int
    validation_size: int
    test_size: int
    data_seed: int
    longest: int
    temperature: float
    sampler: str
    prompts: int
    test_samples: int

    def __post_init__(self) -> None:
        """Check what no type can."""
        if not self.task.startswith(MATHEMATICS):
            one_of("task", self.task, (*TASKS, f"{MATHEMATICS}<data set>"))
        one_of("sampler", self.sampler, SAMPLERS)
        for name in ("terms", "digits", "columns"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"received {name} {getattr(self, name)}, expected two")
        positive(train_size=self.train_size, validation_size=self.validation_size, test_size=self.test_size)
        positive(prompts=self.prompts, test_samples=self.test_samples)


@contextlib.contextmanager
def judge(section: Section) -> Iterator[Judge]:
    """What gives a text its reward, and raises where it cannot judge."""
    if section.task == "chain_sum":
        yield lambda example, text: chain_sum.reward(example, gsm_symbolic.answer(text))
    elif section.task == "gsm_symbolic":
        yield gsm_symbolic.reward
    else:
        with Isolated(mathematics.reward, limit=section.verify_limit) as verify:
            yield lambda example, text: verify(example.gold, text)


class Words:
    """The problems of a section, in splits, and how a language model meets them."""

    def __init__(self, section: Section, judge: Judge) -> None:
        self.section, self.judge = section, judge
        sizes = [section.taught_size, section.train_size, section.validation_size, section.test_size]
        found = classification.draw(_examples(section, sum(sizes)), sizes, seed=section.data_seed)
        self.taught, self.train, self.validation, self.test = found
        self.texts = [text for example in found[0] + found[1] for text in (example.question, solution(example))]
        self.tokenizer = language.load_tokenizer(section.student, self.texts)
        if section.chat and self.tokenizer.chat_template is None:
            raise ValueError(f"received chat: true, expected a chat template with the tokenizer of {section.student}")

    @property
    def end(self) -> int:
        """The token that ends a completion."""
        return self.tokenizer.eos_token_id

    def sampler(self, model: PreTrainedModel, dtype: torch.dtype, temperature: float | None = None) -> Sampler:
        """Who samples from a model, at the section's temperature if there is no other."""
        temperature = temperature or self.section.temperature
        if self.section.sampler == "vllm":
            return VllmSampled(model, self.end, temperature)
        return Sampled(model, self.end, temperature, dtype)

    def problem(self, example: Example) -> Problem:
        """The question in the model's chat template, or with a space behind; its stream is named by the question."""
        if self.section.chat:
            said = [{"role": "user", "content": example.question}]
            ids = self.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        else:
            ids = self.tokenizer(f"{example.question} ")["input_ids"]
        return Problem(tuple(ids), example.question)

    def worked(self, example: Example) -> Tokens:
        """The task's own solution, with the end token."""
        return (*self.tokenizer(solution(example), add_special_tokens=False)["input_ids"], self.end)

    def score(self, example: Example, completion: Tokens) -> float:
        """The reward of a completion that ended, else 0; raises where it cannot be judged."""
        ended = completion[-1] == self.end
        return self.judge(example, self.tokenizer.decode(completion, skip_special_tokens=True)) if ended else 0.0

    def verifier(self) -> Callable[[Problem, Tokens], Verdict]:
        """What judges completions of training problems."""
        known = {example.question: example for example in self.train}

        def verify(problem: Problem, completion: Tokens) -> Verdict:
            reward = self.score(known[problem.name], completion)
            return Verdict(reward, correct=reward == 1.0)

        return verify

    def measure(
        self,
        model: PreTrainedModel,
        examples: Sequence[Example],
        *,
        samples: int,
        dtype: torch.dtype,
        seed: int = 0,
        temperature: float | None = None,
    ) -> dict[str, float]:
        """Accuracy over what was judged, length in tokens, shares of ended and of unjudged completions.

        As many prompts go together as in a training step. Raises ValueError if nothing could be judged.
        """
        sampler = self.sampler(model, dtype, temperature)
        options = {"group_size": samples, "longest": self.section.longest, "seed": seed}
        rewards, lengths, ended = [], [], []
        for start in range(0, len(examples), self.section.prompts):
            some = examples[start : start + self.section.prompts]
            problems = [self.problem(example) for example in some]
            names = [f"measured/{problem.name}" for problem in problems]
            found = sampler([problem.prompt for problem in problems], names, **options)
            rewards += [self._judged(some[row // samples], tokens) for row, tokens in enumerate(found.rows())]
            lengths += found.mask.sum(1).tolist()
            ended += found.ended.double().tolist()
        judged = [reward for reward in rewards if math.isfinite(reward)]
        if not judged:
            raise ValueError(f"received no verdict on {len(rewards)} completions, expected one that works")
        means = {"accuracy": judged, "length": lengths, "ended": ended}
        unjudged = 1 - len(judged) / len(rewards)
        return {name: float(statistics.fmean(values)) for name, values in means.items()} | {"unjudged": unjudged}

    def test_scores(self, model: PreTrainedModel, *, seed: int, dtype: torch.dtype) -> dict[str, float]:
        """`measure` on the test split, and the accuracy of the most probable tokens."""
        found = self.measure(model, self.test, samples=self.section.test_samples, seed=seed, dtype=dtype)
        cold = self.measure(model, self.test, samples=1, dtype=dtype, temperature=_COLD)
        return {f"test/{name}": value for name, value in (found | {"greedy": cold["accuracy"]}).items()}

    def _judged(self, example: Example, completion: Tokens) -> float:
        try:
            return self.score(example, completion)
        except Exception:  # whatever it is: counted, and reported as unjudged
            return math.nan


def solution(example: Example) -> str:
    """What a teacher learns from."""
    kinds = {chain_sum.Example: chain_sum, gsm_symbolic.Example: gsm_symbolic, mathematics.Example: mathematics}
    return kinds[type(example)].solution(example)


def _examples(section: Section, count: int) -> Sequence[Example]:
    seed = section.data_seed
    if section.task == "chain_sum":
        return chain_sum.examples(chain_sum.Family(section.terms, section.digits), count, seed=seed)
    if section.task == "gsm_symbolic":
        return gsm_symbolic.examples(count, seed=seed)
    return mathematics.examples(section.task.removeprefix(MATHEMATICS), count, columns=section.columns, seed=seed)
