"""Files of tensors: the state of an interrupted run, and what one run leaves for others.

A state is one safetensors file, tensors and JSON together, replaced in one rename: of two files a kill could leave one
old and one new. A run that continues from it takes the same steps, on a CPU to the bit, as one never interrupted:
parameters, optimiser moments, the step and the curve so far are all of it.

Each file says in its metadata which file it is and what it holds, by checksum: one that was cut, changed, or put in
another's place is refused. A file without a checksum is read as it is.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from limbeck import paths

_SEAL = "sha256"


def save(
    path: Path, parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write parameters, optimiser moments and a JSON-able state; the old file stays whole until the rename."""
    tensors = {f"parameter/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, moment in optimiser.state[parameter].items():
            tensors[f"{key}/{name}"] = moment
    write_tensors(path, tensors, {"state": json.dumps(state)})


def load(path: Path, parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Put a saved state back in place; returns its JSON part, or None where nothing was saved.

    Raises ValueError, before anything is changed, for a damaged file, and for the state of another run.
    """
    if not path.is_file():
        return None
    remedy = f"delete {path} to begin the run anew"
    tensors, metadata = _read(path, remedy)
    try:
        state = json.loads(metadata["state"])
    except (KeyError, RecursionError, ValueError) as error:
        raise ValueError(f"received no state of a run in {path} ({error!r}), expected one; {remedy}") from None
    shapes = {f"parameter/{name}": parameter.shape for name, parameter in parameters.items()}
    saved = {key: tensor.shape for key, tensor in tensors.items() if key.startswith("parameter/")}
    moments = {key: shapes.get(f"parameter/{key.partition('/')[2]}") for key in tensors.keys() - saved.keys()}
    odd = [key for key in shapes.keys() | saved.keys() if shapes.get(key) != saved.get(key)]
    odd += [key for key, shape in moments.items() if shape is None or tensors[key].shape not in (shape, ())]
    if odd:
        raise ValueError(f"received a state of other parameters, such as {min(odd)}, expected {len(shapes)}; {remedy}")
    with torch.no_grad():
        for key, tensor in tensors.items():
            kind, name = key.split("/", 1)
            parameter = parameters[name]
            if kind == "parameter":
                parameter.copy_(tensor)
            else:
                moment = torch.empty_like(parameter, dtype=tensor.dtype) if tensor.ndim else torch.empty_like(tensor)
                optimiser.state[parameter][kind] = moment.copy_(tensor).to(parameter.device)
    return state


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with its checksum, whole or not at all."""
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    told, place = metadata or {}, _place(path)  # one key more: of several, safetensors writes an order that changes
    with paths.replacing(path) as temporary:
        save_file(plain, temporary, told | {_SEAL: f"{_checksum(plain, told, place)} {place}"})


def read_tensors(
    path: Path, *, like: Mapping[str, Tensor] | None = None, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """The tensors that another run left.

    Raises ValueError, with path and remedy, where there are none, the file is damaged or another's, or they have other
    names or shapes than those that they must be `like`.
    """
    remedy = f"delete {path} and run the experiment that leaves it again"
    if not path.is_file():
        raise ValueError(f"expected tensors in {path}, found none; run the experiment that leaves them")
    tensors, _ = _read(path, remedy)
    if like is not None:
        shapes, expected = ({name: tuple(x.shape) for name, x in group.items()} for group in (tensors, like))
        if odd := [name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name)]:
            name = min(odd)
            differs = f"{name} is {shapes.get(name)} there, not {expected.get(name)}"
            raise ValueError(f"received {len(shapes)} weights in {path}, expected {len(expected)}; {differs}; {remedy}")
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _read(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open does not iterate)
            told = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"received {path}, which cannot be read ({error}), expected one whole; {remedy}") from error
    if seal := told.pop(_SEAL, ""):
        checksum, _, place = seal.partition(" ")
        if checksum != _checksum(tensors, told, place):
            raise ValueError(
                f"received {path} with another content than its checksum is of, expected it whole; {remedy}"
            )
        if place != _place(path):
            raise ValueError(f"received {path}, which was written as {place}, expected its own content; {remedy}")
    return tensors, told


def _place(path: Path) -> str:
    """What tells a file from others of its kind: its name, or the folder of a run too, since all states have one."""
    return "/".join(path.absolute().parts[-2:]) if path.stem == "state" else path.name


def _checksum(tensors: dict[str, Tensor], told: dict[str, str], place: str) -> str:
    digest = hashlib.sha256(json.dumps([place, told], sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
