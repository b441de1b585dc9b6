"""The adapted layers, on PEFT's base: W + s A B beside the frozen layer, or merged into it.

A [in, r] and B [r, out] are the paper's, the input on the left. `nn.Linear` stores W^T [out, in], transformers' Conv1D
W itself, `nn.Conv2d` W^T as [out, c_in, h, w]: a convolution to r channels, then one of 1 x 1, without unfolding.
"""

import functools
import itertools
import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from limbeck.adapters.basis import Bank, Stream
from limbeck.adapters.config import BLOCKS, NolaConfig
from limbeck.adapters.factor import Factor, from_rows, wide


class Coefficients(nn.Module):
    """All that trains of one adapter in one layer: alpha as `a` and beta as `b`, a row for each matrix.

    Its keys end in `.<adapter name>.a`: PEFT, transformers and TRL find an adapter's numbers between two dots.
    """

    def __init__(self, a: Float[Tensor, "matrix k"], b: Float[Tensor, "matrix l"]):
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)


class PackedCoefficients(Coefficients):
    """The same, for an adapter whose file holds them packed; any loader that knows a module's extra state reads it.

    Transformers then reports `a` and `b` as missing, since it does not know that the extra state fills them.
    """

    def __init__(self, a: Float[Tensor, "matrix k"], b: Float[Tensor, "matrix l"], bits: int):
        super().__init__(a, b)
        self.bits = bits

    def get_extra_state(self) -> Tensor:
        """Nothing: what is in memory is not packed."""
        return torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def set_extra_state(self, state: Tensor) -> None:
        """Unpack the rows of a file. Raises ValueError for another shape."""
        if state.numel():
            values = from_rows(state, self.bits, [self.a.shape, self.b.shape], wide(self.a.dtype))
            for coefficients, value in zip((self.a, self.b), values, strict=True):
                coefficients.copy_(value)


Update = tuple[Tensor, Tensor, float, tuple[str, ...] | None]  # A, B, s and the blocks, as they are merged


def _placed(columns: list[Tensor], blocks: tuple[str, ...] | None) -> Float[Tensor, "... out"]:
    if blocks is None:
        return columns[0]
    columns_by_block = dict(zip(blocks, columns, strict=True))
    return torch.cat([columns_by_block.get(block, torch.zeros_like(columns[0])) for block in BLOCKS], -1)


class NolaLayer(nn.Module, BaseTunerLayer):
    """A frozen layer and the coefficients of its adapters: alpha [matrix, k] and beta [matrix, l] each.

    A layer has one matrix, or one for each adapted column block of a fused projection. Coefficients are kept in
    float32 or wider whatever the base, since they are few; the branch is computed in their dtype, as LoRA's is.
    """

    adapter_layer_names = ("nola_coefficients",)
    other_param_names = ("nola_factors", "scaling", "blocks")

    def __init__(self, base_layer: nn.Module, adapter_name: str):
        super().__init__()
        self.base_layer = base_layer
        self.nola_coefficients = nn.ModuleDict()
        self.nola_factors: dict[str, tuple[Factor, Factor]] = {}
        self.scaling: dict[str, float] = {}
        self.blocks: dict[str, tuple[str, ...] | None] = {}
        self.merged_adapters, self._disable_adapters, self._active_adapter = [], False, adapter_name
        self._base_weight: Tensor | None = None
        self._updates: list[Update] = []
        self.in_features, self.out_features = self._shape()

    def _shape(self) -> tuple[int, int]:
        """(in, out) of the weight as a matrix."""
        base = self.get_base_layer()
        if isinstance(base, nn.Linear):
            return base.in_features, base.out_features
        return tuple(base.weight.shape) if isinstance(base, Conv1D) else (base.weight[0].numel(), len(base.weight))

    def update_layer(self, adapter_name: str, config: NolaConfig, key: str, bank: Bank) -> None:
        """Add an adapter to the module of the full name `key`, which names its bases where they are not shared."""
        blocks, out = config.slices_of(key), self.out_features
        if blocks and (not isinstance(self, NolaLinear) or out % len(BLOCKS)):
            raise ValueError(
                f"received fused_slices for {key} of {out} outputs, expected a linear layer of three blocks"
            )
        names = [f"{key}.{block}" for block in blocks] if blocks else [key]
        width = out // len(BLOCKS) if blocks else out
        self._require_use(config, key, width)
        self.nola_factors[adapter_name] = self._new_factors(config, names, width, bank)
        self.scaling[adapter_name], self.blocks[adapter_name] = config.nola_alpha / config.r, blocks
        weight = self.get_base_layer().weight
        values = [0.0 if config.init == "noop" else 1 / number for number in config.numbers]
        start = [
            torch.full((len(names), number), value, dtype=wide(weight.dtype), device=weight.device)
            for number, value in zip(config.numbers, values, strict=True)
        ]
        bits = config.quant_bits
        self.nola_coefficients[adapter_name] = PackedCoefficients(*start, bits) if bits else Coefficients(*start)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _require_use(self, config: NolaConfig, key: str, width: int) -> None:
        """Raise ValueError for more than any matrix needs: a stranger's config may ask for any amount of memory."""
        most = max(self.in_features, width)
        most_rank, most_basis = max(1024, most), max(2**16, config.r * most)
        if config.r > most_rank or max(config.numbers) > most_basis:
            raise ValueError(
                f"received r {config.r} and num_basis {config.num_basis} for {key} of {self.in_features} inputs and "
                f"{width} outputs, expected at most {most_rank} and {most_basis}: more make no other updates"
            )

    def _new_factors(self, config: NolaConfig, names: list[str], width: int, bank: Bank) -> tuple[Factor, Factor]:
        """A and B of matrices [in, width]. Shared bases have their shape as key, others the name of their matrix."""

        def streams(factor: str, shape: tuple[int, int], distribution: str) -> tuple[Stream, ...]:
            keys = ["x".join(map(str, shape))] * len(names) if config.share_basis else names
            return tuple(Stream(config.basis_seed, key, factor, shape, distribution) for key in keys)

        shape_a, shape_b = (self.in_features, config.r), (config.r, width)
        fixed = streams("A0", shape_a, "uniform") if config.init == "noop" else ()
        factor = functools.partial(
            Factor, bank, bits=config.quant_bits, chunk_size=config.chunk_size, budget=config.cache_bytes
        )
        return (
            factor(streams("A", shape_a, config.basis_distribution), config.numbers[0], fixed=fixed),
            factor(streams("B", shape_b, config.basis_distribution), config.numbers[1]),
        )

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the base's device; unlike PEFT's, not to its dtype, which would round what has been loaded."""
        device = device or self.get_base_layer().weight.device
        if adapter_name in self.nola_coefficients and self.nola_coefficients[adapter_name].a.device.type != "meta":
            self.nola_coefficients[adapter_name].to(device)

    def release_bases(self) -> None:
        """Let go of the bases in memory; they come back when they are needed."""
        for factor in itertools.chain.from_iterable(self.nola_factors.values()):
            factor.bank.kept.clear()

    def coefficients(self, adapter_name: str) -> tuple[Float[Tensor, "matrix k"], Float[Tensor, "matrix l"]]:
        """(alpha, beta), a row for each matrix."""
        return self.nola_coefficients[adapter_name].a, self.nola_coefficients[adapter_name].b

    def built(
        self, adapter_name: str
    ) -> tuple[Float[Tensor, "matrix inputs rank"], Float[Tensor, "matrix rank outputs"]]:
        """(A, B) of each matrix, without gradient, in float32 or wider."""
        pairs = zip(self.nola_factors[adapter_name], self.coefficients(adapter_name), strict=True)
        a, b = (factor.value(coefficients) for factor, coefficients in pairs)
        return a, b

    def side_by_side(self, columns: list[Tensor], adapter_name: str) -> Float[Tensor, "... out"]:
        """The columns of each matrix where they belong, 0 in blocks that are not adapted."""
        return _placed(columns, self.blocks[adapter_name])

    def _update(self, adapter: str) -> Update:
        return *self.built(adapter), self.scaling[adapter], self.blocks[adapter]

    def _delta(self, update: Update) -> Tensor:
        a, b, scaling, blocks = update
        delta = _placed([scaling * left @ right for left, right in zip(a, b, strict=True)], blocks)
        base = self.get_base_layer()
        return delta if isinstance(base, Conv1D) else delta.t().reshape(base.weight.shape)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Delta W as the layer stores its weight, in float32 or wider."""
        return self._delta(self._update(adapter))

    def _weight_to_merge(self) -> Tensor:
        weight = self.get_base_layer()._parameters.get("weight")
        if weight is None:
            raise ValueError(
                "received a weight that is computed from others, as by a parametrization, expected a parameter; "
                "`to_lora` needs no merging"
            )
        if not weight.is_floating_point():
            raise ValueError(
                f"received a weight of {weight.dtype}, expected floating point; `to_lora` needs no merging"
            )
        return weight.data

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add Delta W of the active or named adapters to the weight; safe: only where the sum is finite.

        The weight from before stays in memory until `unmerge`, as rounding loses what a subtraction would need.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.nola_coefficients:
                weight, update = self._weight_to_merge(), self._update(name)
                merged = self._sum(weight, [update])
                if safe_merge and not merged.isfinite().all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                if not self.merged:
                    self._base_weight, self._updates = weight.clone(), []
                weight.copy_(merged)
                self._updates.append(update)
                self.merged_adapters.append(name)

    def _sum(self, weight: Tensor, updates: list[Update]) -> Tensor:
        for update in updates:
            weight = (weight + self._delta(update).to(weight.device)).to(weight.dtype)  # the sum in the wider of both
        return weight

    def unmerge(self) -> None:
        """The weight from before, to the bit, whatever has become of the adapters.

        What else was done to the weight meanwhile stays: then what was added is subtracted, with the loss of rounding.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight, base = self.get_base_layer().weight.data, self._base_weight.to(self.get_base_layer().weight.device)
        merged = self._sum(self._base_weight, self._updates).to(weight.device)
        same = torch.allclose(merged.to(weight.dtype), weight, rtol=0, atol=0, equal_nan=True)
        weight.copy_(base if same else weight + (base - merged))
        self.merged_adapters, self._base_weight, self._updates = [], None, []

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The base's output, and s x A B of each active adapter."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.nola_coefficients:
                pairs = zip(self.nola_factors[name], self.coefficients(name), strict=True)
                a, b = (factor(coefficients) for factor, coefficients in pairs)
                result = result + self._branch(self._cast_input_dtype(x, a.dtype), a, b, name)
        return result.to(dtype)

    def _branch(self, x: Tensor, a: Tensor, b: Tensor, adapter_name: str) -> Tensor:
        raise NotImplementedError


class NolaLinear(NolaLayer):
    """`nn.Linear` or transformers' Conv1D."""

    def _branch(self, x: Tensor, a: Tensor, b: Tensor, adapter_name: str) -> Tensor:
        columns = [(x @ left) * self.scaling[adapter_name] @ right for left, right in zip(a, b, strict=True)]
        return self.side_by_side(columns, adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: PEFT's own conversion applies too, though `to_lora` is exact."""
        return True


class NolaConv2d(NolaLayer):
    """`nn.Conv2d` without groups, of any kernel, stride, padding, padding mode and dilation."""

    def _branch(self, x: Tensor, a: Tensor, b: Tensor, adapter_name: str) -> Tensor:
        base = self.get_base_layer()
        narrow = base._conv_forward(x, a[0].t().reshape(-1, *base.weight.shape[1:]), None)
        return F.conv2d(narrow * self.scaling[adapter_name], b[0].t()[:, :, None, None])
