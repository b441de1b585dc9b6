"""The bench of the ablations: where layers are frozen, the softmax is over the tokens that occur in the targets alone.

The whole vocabulary would take three quarters of a step on two layers. The loss is then -log p of a token given that it
is one of these, at most the usual one.
"""

import functools
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from limbeck.experiments.nola import text_bench
from limbeck.experiments.nola.text_model import Pair, Texts


@dataclass(frozen=True)
class Bench(text_bench.Bench):
    """With `layers` 0, that of all experiments on text: the tokens of a target are then read from the vocabulary."""

    @functools.cached_property
    def kept(self) -> list[int]:
        """The tokens that occur in targets, to learn or to validate on."""
        return sorted({token for pair in self.all_pairs() for token in pair.target})

    def decoder(self) -> PreTrainedModel:
        """The model, frozen; its head has a row for each kept token."""
        model = super().decoder()
        if self.section.layers:
            rows = model.get_output_embeddings().weight.detach()[self.kept]
            head = nn.utils.skip_init(nn.Linear, rows.shape[1], len(rows), bias=False)
            head.weight = nn.Parameter(rows, requires_grad=False)
            model.set_output_embeddings(head)
        return model

    @functools.cached_property
    def texts(self) -> dict[str, Texts]:
        """`train` and `validation`, with their states; targets count through the kept tokens."""
        found = super().texts
        if not self.section.layers:
            return found
        numbers = {token: number for number, token in enumerate(self.kept)}
        return {
            name: replace(
                texts, pairs=[Pair(p.prompt, tuple(numbers[token] for token in p.target)) for p in texts.pairs]
            )
            for name, texts in found.items()
        }
