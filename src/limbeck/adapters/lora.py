"""How LoRA starts (arXiv 2106.09685), drawn from a seed: PEFT draws from the global generator."""

import torch
from torch import nn

from limbeck import seeding


def draw_start(model: nn.Module, seed: int) -> None:
    """Draw A of every LoRA layer of PEFT's anew, Kaiming-uniform: within 1 / sqrt(inputs); B is 0 already.

    A layer's draw depends on its name and the seed alone, and is made on the CPU wherever the layer is; a convolution
    has c_in h w inputs.
    """
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            bound = parameter[0].numel() ** -0.5
            drawn = torch.empty(parameter.shape, dtype=parameter.dtype)
            parameter.data.copy_(drawn.uniform_(-bound, bound, generator=seeding.generator(seed, "lora", name)))
