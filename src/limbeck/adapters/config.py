"""What a NOLA adapter is made of; PEFT saves it as adapter_config.json, with a README that says how it is loaded."""

import hashlib
import re
from dataclasses import dataclass
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor

from limbeck.adapters.basis import DISTRIBUTIONS
from limbeck.adapters.factor import require_bits

INITS = ("noop", "mean")
BLOCKS = ("q", "k", "v")  # the column blocks of a fused projection, in their order
MAX_SEED = 2**63
MAX_ALPHA = 2.0**64
PACKAGE = "limbeck"
CARD = """

## Loading

PEFT and transformers load this adapter, of type NOLA, once the package that defines it has been imported:

```python
import limbeck.adapters  # from the package limbeck
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, folder)
```
"""


class NolaType(str, Enum):  # noqa: UP042 - PEFT reads the name from `str`, as that of its own enum
    """The name of the method, as PEFT has those of its own: equal to the string, with a `value`."""

    NOLA = "NOLA"


def _require_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"received {name} {value!r}, expected an integer of at least {least}")


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"received {name} {value!r}, expected one of {', '.join(choices)}")


def _require_names(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a pattern, names, or None. What a stranger's file holds may be anything."""
    pattern = value if isinstance(value, str) and name not in ("modules_to_save", "layers_pattern") else ""
    named = isinstance(value, list | tuple | set) and all(isinstance(each, str) for each in value)
    try:
        re.compile(pattern)
    except re.error as fault:
        raise ValueError(f"received {name} {value!r}, expected a regular expression: {fault}") from fault
    if not (value is None or named or (isinstance(value, str) and name != "modules_to_save")):
        raise ValueError(f"received {name} {value!r}, expected names")


@dataclass
class NolaConfig(PeftConfig):
    """Delta W = s (A0 + sum_i alpha_i A_i / sqrt(k)) (B0 + sum_j beta_j B_j / sqrt(l)), s = nola_alpha / r.

    num_basis: k = l, or (k, l); the only numbers that are trained and stored, for each matrix. r costs none.
    init: "noop" (second release: A0 Kaiming-uniform, B0 = 0, alpha = beta = 0, so Delta W = 0) or "mean" (first
    release: no A0 and B0, alpha = 1 / k, beta = 1 / l). All zeros without A0 would never leave 0, so it is no choice.
    share_basis: the same bases for all factors of one shape, or others for each module.
    fused_slices: module name -> which of its column blocks q, k, v of one width get a matrix each, as in GPT-2's
    c_attn; a layout that interleaves them by head is not meant.
    quant_bits: coefficients are used and saved at so many bits, with straight-through gradients. A checkpoint holds
    the rounded ones, so a run that resumes goes on from them; to resume exactly, train without and `quantise` after.
    cache_bytes: bases stay in memory while they fit, and are else drawn `chunk_size` at a time, twice a step.
    save_basis: also save the bases, against any change of the generator; the file is then larger than LoRA's.
    basis_checksum: of a loaded adapter, what its bases are checked against before a coefficient is read. Saving writes
    it; to use a loaded config for another model, set it to None.
    package: where this method is defined.

    Raises ValueError for a value outside its range.
    """

    r: int = 8
    num_basis: int | tuple[int, ...] | list[int] = 512  # a list, and lists below, as JSON gives them back
    nola_alpha: int | float = 8
    basis_seed: int = 0
    target_modules: list[str] | set[str] | str | None = None
    init: str = "noop"
    share_basis: bool = True
    basis_distribution: str = "uniform"
    fused_slices: dict[str, tuple[str, ...] | list[str]] | None = None
    quant_bits: int | None = None
    chunk_size: int = 64
    cache_bytes: int = 2**30
    save_basis: bool = False
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    basis_checksum: str | None = None
    digest: str | None = None  # of the coefficients and of what decides their meaning, as last saved; None checks none
    package: str | None = None  # PACKAGE; only a file of the first layout lacks it

    def __post_init__(self) -> None:
        self.first_layout = self.peft_type is not None and self.peft_version is not None and self.package is None
        super().__post_init__()
        self.package = self.package or PACKAGE
        self.peft_type = NolaType.NOLA
        self._require_types()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"received layers_pattern {self.layers_pattern!r}, expected layers_to_transform with it")
        if isinstance(self.num_basis, list):
            self.num_basis = tuple(self.num_basis)
        if isinstance(self.num_basis, tuple) and len(self.num_basis) != 2:
            raise ValueError(f"received num_basis {self.num_basis!r}, expected an integer or a pair (k, l)")
        for number in self.numbers:
            _require_integer("num_basis", number, 1)
        for name, least in {"r": 1, "chunk_size": 1, "cache_bytes": 0, "basis_seed": 0}.items():
            _require_integer(name, getattr(self, name), least)
        if self.basis_seed >= MAX_SEED:
            raise ValueError(f"received basis_seed {self.basis_seed}, expected less than 2^63")
        number = isinstance(self.nola_alpha, int | float) and not isinstance(self.nola_alpha, bool)
        if not number or not 0 < self.nola_alpha < MAX_ALPHA:
            raise ValueError(f"received nola_alpha {self.nola_alpha!r}, expected a positive number below {MAX_ALPHA:g}")
        _require_choice("package", self.package, (PACKAGE,))
        _require_choice("init", self.init, INITS)
        _require_choice("basis_distribution", self.basis_distribution, DISTRIBUTIONS)
        if self.quant_bits is not None:
            require_bits(self.quant_bits)
        self.fused_slices = self._slices()

    def _require_types(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            _require_names(name, getattr(self, name))
        for name in ("share_basis", "save_basis", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"received {name} {getattr(self, name)!r}, expected true or false")
        layers = self.layers_to_transform
        for layer in layers if isinstance(layers, list | tuple) else [] if layers is None else [layers]:
            _require_integer("layers_to_transform", layer, 0)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"received layers_to_transform {self.layers_to_transform!r} with the pattern {self.target_modules!r}, "
                "which would ignore them; expected a list of target_modules, or the layers in the pattern"
            )

    def _slices(self) -> dict[str, tuple[str, ...]] | None:
        if not isinstance(self.fused_slices, dict | None):
            raise ValueError(f"received fused_slices {self.fused_slices!r}, expected a dict of module and slices")
        for module, names in (self.fused_slices or {}).items():
            known = isinstance(names, list | tuple | str) and all(name in BLOCKS for name in names)
            if not names or not known or len(set(names)) < len(names):
                raise ValueError(f"received the slices {names!r} of {module}, expected some of {', '.join(BLOCKS)}")
        return {module: tuple(names) for module, names in self.fused_slices.items()} if self.fused_slices else None

    def to_dict(self) -> dict[str, Any]:
        """As PEFT saves it, with the checksum of the bases that were last saved with it."""
        saved = {"basis_checksum": getattr(self, "saved_checksum", self.basis_checksum)}
        return super().to_dict() | saved | {"digest": getattr(self, "saved_digest", self.digest)}

    def digest_of(self, entries: dict[str, Tensor]) -> str:
        """SHA-256 over the entries of a file, in the order of their keys, and the settings that decide the numbers."""
        slices, settings = sorted((self.fused_slices or {}).items()), (self.init, self.share_basis, self.quant_bits)
        decides = [self.r, self.numbers, float(self.nola_alpha), self.basis_seed, self.basis_distribution, slices]
        digest = hashlib.sha256(repr((decides, settings)).encode())
        for key, value in sorted(entries.items()):
            digest.update(repr((key, value.dtype, tuple(value.shape))).encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save_pretrained(self, save_directory: str | PathLike, **kwargs: Any) -> None:
        """Write adapter_config.json, and into README.md how the adapter is loaded."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory, "README.md")
        text = card.read_text(encoding="utf-8") if card.exists() else ""
        if CARD.strip() not in text:
            card.write_text(text + CARD, encoding="utf-8")

    @property
    def numbers(self) -> tuple[int, int]:
        """(k, l)."""
        return self.num_basis if isinstance(self.num_basis, tuple) else (self.num_basis, self.num_basis)

    def slices_of(self, module: str) -> tuple[str, ...] | None:
        """The column blocks to adapt of the module of this full name, or None to adapt it as one matrix."""
        for suffix, names in (self.fused_slices or {}).items():
            if module == suffix or module.endswith(f".{suffix}"):
                return names
        return None
