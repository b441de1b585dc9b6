"""EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946; the lite variant) for inference, with its ImageNet weights.

Lite: no squeeze-and-excitation, ReLU6 instead of swish, stem and head of fixed width. Names of weights are those of the
checkpoint, underscores included. Left out: training from nothing; drop-connect and dropout. Batch norm always uses its
stored statistics, so the model never leaves evaluation mode.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from limbeck import assets, seeding

ASSET = "efficientnet_lite0"
STEM, FEATURES, IMAGENET = 32, 1280, 1000
STAGES = (  # blocks, kernel, stride of the first, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_BATCH_NORM_EPSILON = 1e-3


class SameConv2d(nn.Conv2d):
    """TensorFlow's "SAME": ceil(size / stride) outputs, an odd pixel of padding on the right and below.

    Adapters call `_conv_forward` for their own kernels, so they are padded alike.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        sides = []
        for size, kernel, stride in zip(x.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            sides += [missing // 2, missing - missing // 2]
        return F.conv2d(F.pad(x, sides) if any(sides) else x, weight, bias, self.stride, 0, 1, self.groups)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> SameConv2d:
    return SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_BATCH_NORM_EPSILON)


class Block(nn.Module):
    """Expand by 1 x 1, filter each channel, project by 1 x 1; the input is added where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = inputs * expansion
        self._expand_conv = _conv(inputs, inner, 1) if expansion > 1 else None
        self._bn0 = _norm(inner) if expansion > 1 else None
        self._depthwise_conv, self._bn1 = _conv(inner, inner, kernel, stride, groups=inner), _norm(inner)
        self._project_conv, self._bn2 = _conv(inner, outputs, 1), _norm(outputs)
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Float[Tensor, "batch inputs h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """The block's output; the projection has no activation."""
        inner = x if self._expand_conv is None else F.relu6(self._bn0(self._expand_conv(x)))
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)))
        projected = self._bn2(self._project_conv(inner))
        return x + projected if self.skips else projected


def _blocks() -> Iterator[Block]:
    inputs = STEM
    for count, kernel, stride, expansion, outputs in STAGES:
        for index in range(count):
            yield Block(inputs, outputs, kernel, stride if index == 0 else 1, expansion)
            inputs = outputs


class EfficientNet(nn.Module):
    """Images to logits; built without weights, on the meta device or in memory that nobody has set."""

    def __init__(self, classes: int):
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, STEM, 3, 2), _norm(STEM)
        self._blocks = nn.ModuleList(_blocks())
        self._conv_head, self._bn1 = _conv(STAGES[-1][-1], FEATURES, 1), _norm(FEATURES)
        self._fc = nn.Linear(FEATURES, classes)

    def train(self, mode: bool = True) -> "EfficientNet":
        """Stay in evaluation mode, whatever is asked for."""
        return super().train(False)

    def features(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 1280"]:
        """What the head reads: the mean over the last map. Images are RGB in [0, 255]; trained at 224 x 224."""
        x = F.relu6(self._bn0(self._conv_stem((images - 127) / 128)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def forward(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self._fc(self.features(images))


def _fresh_head(classes: int, seed: int) -> dict[str, Tensor]:
    """N(0, 1 / inputs) weights and no bias."""
    source = seeding.generator(seed, "head")
    weight = torch.randn(classes, FEATURES, generator=source) / FEATURES**0.5
    return {"_fc.weight": weight, "_fc.bias": torch.zeros(classes)}


def _with(state: dict[str, Tensor], classes: int) -> EfficientNet:
    with torch.device("meta"):
        model = EfficientNet(classes)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def load(*, classes: int | None, seed: int) -> EfficientNet:
    """The ImageNet model with a fresh head drawn by `seed`, or with its own of 1000 classes where classes is None.

    Raises ValueError if the asset was not fetched or is damaged.
    """
    state = torch.load(assets.path(ASSET) / f"{ASSET}.pth", map_location="cpu", weights_only=True)
    return _with(state if classes is None else state | _fresh_head(classes, seed), classes or IMAGENET)


def draw(*, classes: int, seed: int) -> EfficientNet:
    """The same network with random weights that keep the scale of a signal: to try code without the asset."""
    with torch.device("meta"):
        template = EfficientNet(classes).state_dict()
    source, state = seeding.generator(seed, "efficientnet"), {}
    for name, tensor in template.items():
        if tensor.ndim == 4:
            state[name] = torch.randn(tensor.shape, generator=source) * (2 / tensor[0].numel()) ** 0.5
        else:
            ones = name.endswith(("running_var", ".weight"))
            state[name] = torch.full(tensor.shape, float(ones)).to(tensor.dtype)
    return _with(state | _fresh_head(classes, seed), classes)
