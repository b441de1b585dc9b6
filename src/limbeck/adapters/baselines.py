"""What NOLA is compared with at the same number of coefficients: PRANC, and LoRA as it starts.

PRANC (arXiv 2206.08464) on one weight's update: Delta W = sum_i c_i C_i / sqrt(p), C_i [in, out] full matrices from the
generator of NOLA's bases; a convolution is a matrix [c_in h w, out]. Left out: PRANC's own setting, a whole network as
one sum of random networks; the comparison is about Delta W alone.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from limbeck import seeding
from limbeck.adapters.basis import Bank, Stream
from limbeck.adapters.factor import Factor


class Pranc(nn.Module):
    """W^T [out, in] -> W^T + s Delta W^T; c starts at 0, which the sum, being linear, leaves at once."""

    def __init__(self, weight: Float[Tensor, "outputs ..."], *, num_basis: int, seed: int, key: str, scale: float):
        super().__init__()
        stream = Stream(seed, key, "C", (weight[0].numel(), len(weight)))
        self.coefficients = nn.Parameter(weight.new_zeros(1, num_basis))
        self.factor, self.scale = Factor(Bank(), (stream,), num_basis, budget=2**30), scale

    def forward(self, weight: Float[Tensor, "outputs ..."]) -> Float[Tensor, "outputs ..."]:
        """The weight and its update. Gradient: to both."""
        return weight + self.scale * self.factor(self.coefficients)[0].t().reshape(weight.shape)


def attach_pranc(
    layer: nn.Linear | nn.Conv2d, *, num_basis: int, seed: int, key: str = "", scale: float = 1.0
) -> nn.Parameter:
    """Freeze the layer and give its weight a PRANC update; returns the coefficients, all that trains.

    Layers of one shape have different bases where their keys differ.
    Raises ValueError for num_basis < 1.
    """
    if num_basis < 1:
        raise ValueError(f"received num_basis {num_basis}, expected at least 1")
    layer.requires_grad_(False)
    update = Pranc(layer.weight, num_basis=num_basis, seed=seed, key=key, scale=scale)
    parametrize.register_parametrization(layer, "weight", update)
    return update.coefficients


def draw_start(model: nn.Module, seed: int) -> None:
    """Draw A of every LoRA layer (arXiv 2106.09685) anew, within 1 / sqrt(inputs); B is 0 already.

    PEFT draws from the global generator. Here a layer's draw depends on its name and the seed alone, and is made on the
    CPU wherever the layer is; a convolution has c_in h w inputs.
    """
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            bound = parameter[0].numel() ** -0.5
            drawn = torch.empty(parameter.shape, dtype=parameter.dtype)
            parameter.data.copy_(drawn.uniform_(-bound, bound, generator=seeding.generator(seed, "lora", name)))
