"""The state of an interrupted run: one safetensors file, tensors and JSON together, replaced in one rename.

One file, since of two a kill could leave one old and one new. A run that continues from it takes the same steps, on a
CPU to the bit, as one never interrupted: parameters, optimiser moments, the step and the curve so far are all of it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from limbeck import paths


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

    Raises ValueError, before anything is changed, for a damaged file, and for the state of other parameters.
    """
    if not path.is_file():
        return None
    remedy = f"delete {path} to begin the run anew"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open does not iterate)
            state = json.loads(file.metadata()["state"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"received a state that cannot be read ({error!r}), expected one whole; {remedy}") from error
    shapes = {f"parameter/{name}": parameter.shape for name, parameter in parameters.items()}
    saved = {key: tensor.shape for key, tensor in tensors.items() if key.startswith("parameter/")}
    if odd := sorted(key for key in shapes.keys() | saved.keys() if shapes.get(key) != saved.get(key)):
        raise ValueError(f"received a state of other parameters, such as {odd[0]}, expected {len(shapes)}; {remedy}")
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


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all."""
    with paths.replacing(path) as temporary:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary, metadata)
