"""Adapters on every linear layer of the top layers of a frozen decoder but the head, as in the paper's LLaMA runs.

LoRA has rank 1, NOLA the share of its parameters that the section says: k = l over all matrices alike.
"""

from transformers import PreTrainedModel

from limbeck.experiments.nola import adapting
from limbeck.experiments.nola.adapting import Model

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARMS = ("none", "lora_1", "nola")


def attach(
    arm: str, model: PreTrainedModel, settings: adapting.Settings, *, layers: int, share: float, seed: int
) -> Model:
    """The frozen model with the arm's adapter in its last `layers` layers, all with 0; `share` is NOLA's of LoRA's."""
    if arm == "none":
        return model
    chosen, drawn = adapting.top(model, layers), {"seed": seed, "targets": TARGETS}
    if arm == "lora_1":
        return adapting.lora(model, chosen, rank=1, scale=settings.lora_scale, **drawn)
    number = adapting.bases(model, chosen, share, TARGETS)
    return adapting.nola(model, chosen, rank=settings.nola_rank, number=number, scale=settings.nola_scale, **drawn)
