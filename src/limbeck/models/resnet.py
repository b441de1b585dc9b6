"""A small residual network for images (He et al., arXiv 1512.03385): 6 n + 2 layers in three stages, as for CIFAR.

Shortcuts have no parameters: where a stage begins, every other pixel is taken and the new channels are zero. Batch norm
learns from each batch's statistics; what it uses in evaluation is measured on demand (`measure_statistics`), so it
depends on the weights alone and not on how they came about.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from limbeck import seeding

STAGES = (1, 2, 4)  # channels, in widths


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, momentum=None)  # running statistics are plain means over batches


class Block(nn.Module):
    """Two convolutions of 3 x 3 beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.first_norm, self.second_norm = _norm(outputs), _norm(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Float[Tensor, "batch inputs h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """The block's output."""
        inner = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        shortcut = F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(inner + shortcut)


class ResNet(nn.Module):
    """Images to logits, with weights that nobody has set; `draw` makes one to use."""

    def __init__(self, *, channels: int, width: int, blocks: int, classes: int):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(channels, width, 3, padding=1, bias=False), _norm(width)
        made, inputs = [], width
        for stage, times in enumerate(STAGES):
            for index in range(blocks):
                made.append(Block(inputs, times * width, 2 if stage and not index else 1))
                inputs = times * width
        self.blocks, self.head = nn.Sequential(*made), nn.Linear(inputs, classes)

    def forward(self, images: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self.head(self.blocks(F.relu(self.norm(self.stem(images)))).mean((2, 3)))


def draw(*, channels: int, width: int, blocks: int, classes: int, seed: int) -> ResNet:
    """A network as it starts: convolutions N(0, 2 / inputs), the head N(0, 1 / inputs), no bias, norms of scale 1."""
    with torch.device("meta"):
        model = ResNet(channels=channels, width=width, blocks=blocks, classes=classes)
    source, state = seeding.generator(seed, "residual"), {}
    for name, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            gain = 1 if name == "head.weight" else 2
            state[name] = torch.randn(tensor.shape, generator=source) * (gain / tensor[0].numel()) ** 0.5
        else:
            state[name] = torch.full(tensor.shape, float(name.endswith(("running_var", ".weight")))).to(tensor.dtype)
    model.load_state_dict(state, assign=True)
    return model


@torch.no_grad()
def measure_statistics(model: nn.Module, images: Float[Tensor, "image ..."], size: int = 256) -> None:
    """Set every batch norm's statistics to their means over batches of `size` of these images.

    The model is left in evaluation mode; one without batch norm is only put there.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
    model.train()
    for batch in images.split(size) if norms else ():
        model(batch)
    model.eval()
