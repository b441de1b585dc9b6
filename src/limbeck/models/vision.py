"""Image classifiers by name, and what few images may change in them.

A name is a shape, `vit-4x128x7` (4 layers of width 128 on patches of 7 x 7 grey pixels, drawn by a seed), the asset
`efficientnet_lite0`, or a local folder or hub name of a ViTForImageClassification. Models come in evaluation mode,
without dropout. A head is always drawn anew.

Left out: positions for another side than a model was trained at; MAE's own normalisation of pixels.
"""

import re

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from limbeck import assets, models, seeding
from limbeck.adapters import NolaConfig
from limbeck.adapters.baselines import draw_start
from limbeck.models import efficientnet

HEADS = ("classifier", "_fc")
SIDE = 28  # of what a shape reads
_SHAPE = re.compile(r"vit-(\d+)x(\d+)x(\d+)")
_HEAD_WIDTH, _INNER, _RANGE = 32, 4, 0.02
_CONVOLUTIONS = ["_expand_conv", "_project_conv", "_conv_head"]
_LORA_TARGETS, _NOLA_TARGETS = ["q_proj", "v_proj"], ["mlp.fc1", "mlp.fc2"]


def drawn(name: str) -> bool:
    """Whether a name is a shape: its model has yet to learn from images."""
    return bool(_SHAPE.fullmatch(name))


def load(name: str, *, classes: int, seed: int) -> nn.Module:
    """The named model with a head over `classes` from N(0, 1 / inputs), biases 0; `seed` also draws a shape's rest."""
    if name == efficientnet.ASSET:
        # on CPUs a step takes a third less
        model = efficientnet.load(classes=classes, seed=seed).to(memory_format=torch.channels_last)
        stem = model._conv_stem.weight  # of the weights the one whose numbers change places, and a state has none
        stem.data = stem.data.contiguous()
        return model
    if shape := _SHAPE.fullmatch(name):
        return _vit(*map(int, shape.groups()), classes=classes, seed=seed)
    with torch.random.fork_rng(devices=[]):
        model = ViTForImageClassification.from_pretrained(
            assets.source(name), num_labels=classes, ignore_mismatched_sizes=True, dtype=torch.float32
        )
    redraw_head(model, seed)
    return model.eval()


def _vit(layers: int, width: int, patch: int, *, classes: int, seed: int) -> nn.Module:
    """An untrained ViT on 28 x 28 grey pixels: matrices N(0, 1 / inputs), class token and positions N(0, 0.02^2)."""
    heads = width // _HEAD_WIDTH
    if not layers or not heads or width % _HEAD_WIDTH or not patch or SIDE % patch:
        raise ValueError(
            f"expected layers, a width divisible by {_HEAD_WIDTH} and a patch that divides {SIDE}, "
            f"got vit-{layers}x{width}x{patch}"
        )
    size = {"hidden_size": width, "intermediate_size": _INNER * width, "num_attention_heads": heads}
    size |= {"num_hidden_layers": layers, "image_size": SIDE, "patch_size": patch, "num_channels": 1}
    with torch.random.fork_rng(devices=[]):
        model = ViTForImageClassification(ViTConfig(**size, num_labels=classes))
    source = seeding.generator(seed, "weights")
    for parameter in model.vit.parameters():
        if parameter.ndim > 1:
            deviation = _RANGE if parameter.ndim == 3 else parameter[0].numel() ** -0.5
            parameter.data.normal_(0.0, deviation, generator=source)
    redraw_head(model, seed)
    return model.eval()


def head_of(model: nn.Module) -> nn.Linear:
    """The last layer, from features to logits."""
    return next(module for name, module in model.named_modules() if name.rpartition(".")[2] in HEADS)


def redraw_head(model: nn.Module, seed: int) -> None:
    """Draw the head's weights from N(0, 1 / inputs); biases 0."""
    head = head_of(model)
    with torch.no_grad():
        fresh = torch.randn(head.weight.shape, generator=seeding.generator(seed, "head"))
        head.weight.copy_(fresh / head.in_features**0.5)
        head.bias.zero_()


def prepared(name: str, pixels: Float[Tensor, "batch channel side side"], side: int) -> Tensor:
    """Images in [0, 1] as a model reads them: bilinear to `side`, grey in three channels but for a shape.

    ViTs read [-1, 1], as Google's ImageNet checkpoints do; EfficientNet-Lite reads [0, 255].
    """
    if pixels.shape[-1] != side:
        pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    if not drawn(name):
        pixels = pixels.expand(-1, 3, -1, -1)
    return 255 * pixels if name == efficientnet.ASSET else 2 * pixels - 1


def logits(model: nn.Module, images: Tensor) -> Float[Tensor, "batch classes"]:
    """The model's logits, whatever it wraps them in."""
    outputs = model(images)
    return getattr(outputs, "logits", outputs)


def features(model: nn.Module, images: Tensor) -> Float[Tensor, "batch width"]:
    """What the head reads: the class token after the last norm, or the mean of the last map. No gradient."""
    captured = []
    hook = head_of(model).register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    try:
        with torch.no_grad():
            model(images)
    finally:
        hook.remove()
    return captured[0]


def attach(model: nn.Module, arm: str, *, rank: int, seed: int) -> int:
    """Leave to training what an arm changes: the head and, of the rest, as many parameters as this returns.

    `linear`: none; `full`: all; `lora_<r>`: LoRA of scale 1 on queries and values, A Kaiming-uniform by `seed`, B = 0;
    `nola` and `nola_half`: NOLA of scale 1 on both layers of each MLP, with at most the parameters of LoRA of rank 1,
    or half of them, and bases by `seed`. Of EfficientNet, LoRA and NOLA both adapt all 1 x 1 convolutions.

    Raises ValueError for another arm.
    """
    if arm == "full":
        body = set(map(id, model.parameters())) - set(map(id, head_of(model).parameters()))
        return sum(parameter.numel() for parameter in model.parameters() if id(parameter) in body)
    model.requires_grad_(False)
    if arm.startswith("lora_"):
        width, targets = int(arm.removeprefix("lora_")), _layer_names(model, _LORA_TARGETS)
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(LoraConfig(r=width, lora_alpha=width, target_modules=targets), model)
        draw_start(model, seed)
    elif arm in ("nola", "nola_half"):
        count = budget(model) // (1 if arm == "nola" else 2)
        matrices = len(_targets(model, _NOLA_TARGETS))
        number, targets = count // (2 * matrices), _layer_names(model, _NOLA_TARGETS)
        config = NolaConfig(r=rank, nola_alpha=rank, num_basis=number, target_modules=targets, basis_seed=seed)
        inject_adapter_in_model(config, model)
    elif arm != "linear":
        raise ValueError(f"received arm {arm!r}, expected linear, full, lora_<r>, nola or nola_half")
    added = sum(parameter.numel() for parameter in models.trainable(model).values())
    head_of(model).requires_grad_(True)
    return added


def budget(model: nn.Module) -> int:
    """The parameters of LoRA of rank 1: inputs + outputs of every layer that it adapts."""
    layers = _targets(model, _LORA_TARGETS)
    return sum(layer.weight.shape[0] + layer.weight.shape[1] for layer in layers)


def _layer_names(model: nn.Module, targets: list[str]) -> list[str]:
    return _CONVOLUTIONS if isinstance(model, efficientnet.EfficientNet) else targets


def _targets(model: nn.Module, targets: list[str]) -> list[nn.Module]:
    ends = tuple(f".{name}" for name in _layer_names(model, targets))
    return [module for name, module in model.named_modules() if f".{name}".endswith(ends)]
