"""What KDRL's experiments ask a model: which examples belong to which split, and how they are asked, judged, scored.

`Chains` are chain_sum for models of characters. Models learn all three families before; policies then train on the
first, and the harder two, longer chains and larger operands, are only measured. `WordProblems` are for pretrained
decoders: `chain_sum` or `gsm_symbolic`, where a text's answer is its last number, or `math/<data set>` by a hub name or
a local folder, judged in a process of its own. A completion that has not ended is wrong, whatever it says.
"""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck.models import language
from limbeck.params import one_of, positive
from limbeck.sampling import Sampled, Sampler, Tokens
from limbeck.tasks import chain_sum, classification, gsm_symbolic, mathematics
from limbeck.tasks.chain_sum import Family
from limbeck.tasks.isolated import Isolated
from limbeck.training.rollouts import Problem, Verdict
from limbeck.vllm_sampling import VllmSampled

Example = chain_sum.Example | gsm_symbolic.Example | mathematics.Example
Judge = Callable[[Example, str], float]
FAMILIES = ("in_domain", "longer", "larger")
TASKS, MATHEMATICS = {"chain_sum": chain_sum, "gsm_symbolic": gsm_symbolic}, "math/"
_COLD = 1e-3  # a temperature at which all but a tie takes the most probable token


@dataclass(frozen=True)
class ChainParams:
    """What the chains are. Pairs are the least and the most; `train_sizes` has one number for each of `FAMILIES`."""

    terms: tuple[int, ...]
    digits: tuple[int, ...]
    longer_terms: tuple[int, ...]
    larger_terms: tuple[int, ...]
    larger_digits: tuple[int, ...]
    train_sizes: tuple[int, ...]
    validation_size: int
    test_size: int
    data_seed: int
    longest: int
    test_samples: int
    measured: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name.endswith(("terms", "digits")) and (len(value) != 2 or not 1 <= value[0] <= value[1]):
                raise ValueError(f"received {name} {value}, expected the least and the most, at least 1")
        if len(self.train_sizes) != len(FAMILIES):
            raise ValueError(f"received train_sizes {self.train_sizes}, expected one each for {', '.join(FAMILIES)}")
        for name in self.measured:
            one_of("measured", name, FAMILIES)
        positive(validation_size=self.validation_size, test_size=self.test_size, longest=self.longest)
        positive(test_samples=self.test_samples)

    @property
    def families(self) -> dict[str, Family]:
        """How many terms and digits the chains of each family have."""
        return {
            "in_domain": Family(self.terms, self.digits),
            "longer": Family(self.longer_terms, self.digits),
            "larger": Family(self.larger_terms, self.larger_digits),
        }


@dataclass(frozen=True)
class WordParams:
    """What the problems in words are, and how a model meets them.

    `terms` and `digits` are those of chain_sum, `columns` and `verify_limit` (seconds per completion) of mathematics;
    `taught_size` problems are for a teacher that is fine-tuned before the experiment.
    """

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
    test_samples: int

    def __post_init__(self) -> None:
        if not self.task.startswith(MATHEMATICS):
            one_of("task", self.task, (*TASKS, f"{MATHEMATICS}<data set>"))
        one_of("sampler", self.sampler, ("transformers", "vllm"))
        for name, value in (("terms", self.terms), ("digits", self.digits), ("columns", self.columns)):
            if len(value) != 2:
                raise ValueError(f"received {name} {value}, expected two")
        positive(train_size=self.train_size, validation_size=self.validation_size, test_size=self.test_size)
        positive(test_samples=self.test_samples)


class Problems:
    """Examples in splits, and how a model meets them. `tests` are test splits by what their metrics' names begin with.

    `end` ends a solution, a token of `ends` a completion. So many prompts as `together` says, all where it is None, are
    sampled at once when the `reported` scores are taken.
    """

    reported: tuple[str, ...] = ("accuracy", "length", "ended")
    temperature: float = 1.0
    together: int | None = None
    train: list[Example]
    validation: list[Example]
    tests: dict[str, list[Example]]

    def __init__(self, params: ChainParams | WordParams, tokenizer: PreTrainedTokenizerBase, judge: Judge) -> None:
        self.params, self.tokenizer, self.judge = params, tokenizer, judge
        self.end: int = tokenizer.eos_token_id
        self.ends: Tokens = (self.end,)

    def name(self, example: Example) -> str:
        """The text that tells an example from all others: it names the stream of random numbers of its samples."""
        return example.question

    def prompt(self, example: Example) -> Tokens:
        """What a model reads."""
        raise NotImplementedError

    def problem(self, example: Example) -> Problem:
        """An example as the training loop takes it."""
        return Problem(self.prompt(example), self.name(example))

    def score(self, example: Example, completion: Tokens) -> float:
        """The reward of a completion that ended, else 0; raises where it cannot be judged."""
        if not completion or completion[-1] not in self.ends:
            return 0.0
        return self.judge(example, self.tokenizer.decode(completion[:-1], skip_special_tokens=True))

    def verifier(self) -> Callable[[Problem, Tokens], Verdict]:
        """What judges completions of training problems."""
        examples = {self.name(example): example for example in self.train}

        def verify(problem: Problem, completion: Tokens) -> Verdict:
            reward = self.score(examples[problem.name], completion)
            return Verdict(reward, correct=reward == 1.0)

        return verify

    def sampler(self, model: PreTrainedModel, dtype: torch.dtype, temperature: float | None = None) -> Sampler:
        """Who samples from a model, at the problems' own temperature if there is no other."""
        return Sampled(model, self.ends, temperature or self.temperature, dtype)

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

        The same seed draws the same random numbers for each sample. Raises ValueError if nothing could be judged.
        """
        sampler, together = self.sampler(model, dtype, temperature), self.together or len(examples)
        longest = self.params.longest
        rewards, lengths, ended = [], [], []
        for start in range(0, len(examples), together):
            batch = examples[start : start + together]
            names = [f"measured/{self.name(example)}" for example in batch]
            prompts = [self.prompt(example) for example in batch]
            completions = sampler(prompts, names, group_size=samples, longest=longest, seed=seed)
            rewards += [self._judged(batch[row // samples], tokens) for row, tokens in enumerate(completions.rows())]
            lengths += completions.mask.sum(1).tolist()
            ended += completions.ended.double().tolist()
        judged = [reward for reward in rewards if math.isfinite(reward)]
        if not judged:
            raise ValueError(f"received no verdict on {len(rewards)} completions, expected one that works")
        scores = {"accuracy": judged, "length": lengths, "ended": ended}
        means = {name: float(statistics.fmean(values)) for name, values in scores.items()}
        means["unjudged"] = 1 - len(judged) / len(rewards)
        return {name: means[name] for name in self.reported}

    def validation_scores(self, model: PreTrainedModel, *, samples: int, dtype: torch.dtype) -> dict[str, float]:
        """`measure` on the validation split, with the same random numbers each time."""
        scores = self.measure(model, self.validation, samples=samples, dtype=dtype)
        return {f"validation/{name}": value for name, value in scores.items()}

    def test_scores(self, model: PreTrainedModel, *, seed: int, dtype: torch.dtype) -> dict[str, float]:
        """`measure` on the test splits, and the accuracy of the most probable tokens, as `greedy`."""
        scores = {}
        for split, examples in self.tests.items():
            sampled = self.measure(model, examples, samples=self.params.test_samples, seed=seed, dtype=dtype)
            cold = self.measure(model, examples, samples=1, dtype=dtype, temperature=_COLD)
            sampled["greedy"] = cold["accuracy"]
            scores |= {f"{split}/{name}": value for name, value in sampled.items()}
        return scores

    def _judged(self, example: Example, completion: Tokens) -> float:
        try:
            return self.score(example, completion)
        except Exception:  # whatever it is: counted, where that is reported
            if "unjudged" not in self.reported:
                raise
            return math.nan


class Chains(Problems):
    """Chains, read by a model of characters; policies train on those of the first family."""

    def __init__(self, params: ChainParams) -> None:
        super().__init__(params, language.character_tokenizer(chain_sum.ALPHABET), chain_sum.reward)
        self.family_train: dict[str, list[Example]] = {}
        self.family_test: dict[str, list[Example]] = {}
        held, ends = params.test_size + params.validation_size, params.test_size
        for (name, family), size in zip(params.families.items(), params.train_sizes, strict=True):
            examples = chain_sum.examples(family, held + size, seed=params.data_seed)
            self.family_test[name], self.family_train[name] = examples[:ends], examples[held:]
            if name == FAMILIES[0]:
                self.train, self.validation = examples[held:], examples[ends:held]
        self.tests = {"test" if name == FAMILIES[0] else name: self.family_test[name] for name in params.measured}

    def tokens(self, text: str) -> Tokens:
        """A text as tokens, one per character."""
        return tuple(self.tokenizer(text)["input_ids"])

    def name(self, example: Example) -> str:
        """The chain."""
        return example.expression

    def prompt(self, example: Example) -> Tokens:
        """The chain and `=`."""
        return self.tokens(example.expression + "=")


class WordProblems(Problems):
    """Problems in words, read by a pretrained decoder with its own tokenizer, `together` at once."""

    reported = (*Problems.reported, "unjudged")

    def __init__(self, params: WordParams, model: str, judge: Judge, *, together: int) -> None:
        sizes = [params.taught_size, params.train_size, params.validation_size, params.test_size]
        splits = classification.draw(_word_examples(params, sum(sizes)), sizes, seed=params.data_seed)
        self.teacher_train, self.train, self.validation, test = splits
        self.solution = TASKS.get(params.task, mathematics).solution
        self.texts = [text for e in self.teacher_train + self.train for text in (e.question, self.solution(e))]
        super().__init__(params, language.load_tokenizer(model, self.texts), judge)
        self.end = language.solution_end(self.tokenizer, chat=params.chat)
        self.ends = language.end_tokens(self.tokenizer, *language.generation_configs(model))
        self.tests, self.temperature, self.together = {"test": test}, params.temperature, together
        if params.chat and self.tokenizer.chat_template is None:
            raise ValueError(f"received chat: true, expected a chat template with the tokenizer of {model}")

    def sampler(self, model: PreTrainedModel, dtype: torch.dtype, temperature: float | None = None) -> Sampler:
        """Who samples from a model: vllm where the parameters say so."""
        if self.params.sampler == "vllm":
            return VllmSampled(model, self.ends, temperature or self.temperature)
        return super().sampler(model, dtype, temperature)

    def prompt(self, example: Example) -> Tokens:
        """The question in the model's chat template, or with a space behind."""
        if not self.params.chat:
            return tuple(self.tokenizer(f"{example.question} ")["input_ids"])
        messages = [{"role": "user", "content": example.question}]
        return tuple(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def worked(self, example: Example) -> Tokens:
        """The task's own solution, with the end token."""
        return (*self.tokenizer(self.solution(example), add_special_tokens=False)["input_ids"], self.end)


@contextlib.contextmanager
def word_judge(params: WordParams) -> Iterator[Judge]:
    """What gives a text its reward, and raises where it cannot judge."""
    if params.task == "chain_sum":
        yield lambda example, text: chain_sum.reward(example, gsm_symbolic.answer(text))
    elif params.task == "gsm_symbolic":
        yield gsm_symbolic.reward
    else:
        with Isolated(mathematics.reward, limit=params.verify_limit) as verify:
            yield lambda example, text: verify(example.gold, text)


def _word_examples(params: WordParams, count: int) -> Sequence[Example]:
    seed = params.data_seed
    if params.task == "chain_sum":
        return chain_sum.examples(Family(params.terms, params.digits), count, seed=seed)
    if params.task == "gsm_symbolic":
        return gsm_symbolic.examples(count, seed=seed)
    return mathematics.examples(params.task.removeprefix(MATHEMATICS), count, columns=params.columns, seed=seed)
