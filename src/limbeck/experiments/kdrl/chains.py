"""chain_sum for models of characters: which chains belong to which split, how they are asked, judged and scored.

Three families: the one that policies are trained on, longer chains, and chains of larger operands. Models learn all
three before; afterwards the harder two are only measured.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from limbeck.models import language
from limbeck.params import one_of, positive
from limbeck.sampling import Completions, Sampled, Tokens
from limbeck.tasks import chain_sum
from limbeck.tasks.chain_sum import Example, Family
from limbeck.training.rollouts import Problem, Verdict

FAMILIES = ("in_domain", "longer", "larger")
_COLD = 1e-3  # a temperature at which all but a tie takes the most probable token


@dataclass(frozen=True)
class Section:
    """What the chains are; sources stand in params/kdrl.yaml. Pairs are the least and the most."""

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
        """Check what no type can."""
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
    def families(self) -> tuple[Family, ...]:
        """The families, in the order of `FAMILIES`."""
        return (
            Family(self.terms, self.digits),
            Family(self.longer_terms, self.digits),
            Family(self.larger_terms, self.larger_digits),
        )


class Chains:
    """The chains of a section, in splits, and how a model of characters meets them."""

    def __init__(self, section: Section) -> None:
        self.section = section
        self.train: dict[str, list[Example]] = {}
        self.test: dict[str, list[Example]] = {}
        held, ends = section.test_size + section.validation_size, section.test_size
        for name, family, size in zip(FAMILIES, section.families, section.train_sizes, strict=True):
            found = chain_sum.examples(family, held + size, seed=section.data_seed)
            self.test[name], self.train[name] = found[:ends], found[held:]
            if name == FAMILIES[0]:
                self.validation = found[ends:held]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a character."""
        return language.character_tokenizer(chain_sum.ALPHABET)

    @property
    def end(self) -> int:
        """The token that ends a completion."""
        return self.tokenizer.eos_token_id

    def tokens(self, text: str) -> Tokens:
        """A text as tokens."""
        return tuple(self.tokenizer(text)["input_ids"])

    def problem(self, example: Example) -> Problem:
        """The chain and `=`; its stream of random numbers is named by the chain."""
        return Problem(self.tokens(example.expression + "="), example.expression)

    def score(self, example: Example, completion: Tokens) -> float:
        """1 if the completion ended and its answer is right."""
        ended = completion[-1] == self.end
        return chain_sum.reward(example, self.tokenizer.decode(completion[:-1])) if ended else 0.0

    def verifier(self, examples: Sequence[Example]):
        """What judges completions of these examples' problems."""
        known = {example.expression: example for example in examples}

        def verify(problem: Problem, completion: Tokens) -> Verdict:
            reward = self.score(known[problem.name], completion)
            return Verdict(reward, correct=reward == 1.0)

        return verify

    def measure(
        self, model: PreTrainedModel, examples: Sequence[Example], *, samples: int, seed: int, dtype: torch.dtype
    ) -> dict[str, float]:
        """Accuracy, length in tokens and share of ended completions, means over the samples of each example."""
        found = self._sampled(model, examples, samples, 1.0, seed, dtype)
        right = [self.score(examples[row // samples], tokens) for row, tokens in enumerate(found.rows())]
        return {
            "accuracy": sum(right) / len(right),
            "length": found.mask.sum(1).double().mean().item(),
            "ended": found.ended.double().mean().item(),
        }

    def greedy(self, model: PreTrainedModel, examples: Sequence[Example], dtype: torch.dtype) -> float:
        """Accuracy of the most probable tokens."""
        found = self._sampled(model, examples, 1, _COLD, 0, dtype)
        right = [self.score(example, tokens) for example, tokens in zip(examples, found.rows(), strict=True)]
        return sum(right) / len(right)

    def test_scores(self, model: PreTrainedModel, *, seed: int, dtype: torch.dtype) -> dict[str, float]:
        """`measure` and `greedy` on test splits; `test/` is that of the family that policies train on."""
        found = {}
        for name in self.section.measured:
            examples = self.test[name]
            space = "test" if name == FAMILIES[0] else name
            scores = self.measure(model, examples, samples=self.section.test_samples, seed=seed, dtype=dtype)
            scores["greedy"] = self.greedy(model, examples, dtype)
            found |= {f"{space}/{metric}": value for metric, value in scores.items()}
        return found

    def _sampled(
        self,
        model: PreTrainedModel,
        examples: Sequence[Example],
        samples: int,
        temperature: float,
        seed: int,
        dtype: torch.dtype,
    ) -> Completions:
        problems = [self.problem(example) for example in examples]
        names = [f"measured/{problem.name}" for problem in problems]
        sampler = Sampled(model, self.end, temperature, dtype)
        options = {"group_size": samples, "longest": self.section.longest, "seed": seed}
        return sampler([problem.prompt for problem in problems], names, **options)
