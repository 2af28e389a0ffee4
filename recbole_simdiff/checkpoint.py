"""Checkpoints: one safetensors file that holds tensors and JSON, replaced atomically.

Tensors and the JSON values that belong to them are in a single file, which one rename publishes, so
they always fit together. Loading reads tensors and JSON only and runs no code, so a file from any
source is safe to open.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recbole_simdiff.errors import UserError
from recbole_simdiff.files import digest, write_atomically

FORMAT = "recbole_simdiff checkpoint 1"

_CONTENT = "content.json"


def save(path: Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Write a checkpoint; after a crash the file is either the old or the new one.

    Args:
        path (Path): file to write or replace.
        tensors (Mapping): name -> tensor; copied to the CPU.
        content (Mapping): values that JSON can hold.

    Raises:
        OSError: see ``write_atomically``.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # Stored as a tensor of bytes: the header of a safetensors file is limited to 100 MB.
    text = json.dumps(content).encode()
    plain[_CONTENT] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    header = {"format": FORMAT, "digest": digest(plain)}
    write_atomically(path, lambda name: save_file(plain, name, metadata=header))


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint. Nothing is unpickled.

    Args:
        path (str | Path): a .safetensors file.

    Returns:
        tuple: name -> tensor, on the CPU; and the JSON content.

    Raises:
        UserError: if the file is missing, damaged, or not a checkpoint of this package.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist; give a .safetensors file of a run")
    try:
        with open(path, "rb"):  # safetensors does not say why a file cannot be opened
            pass
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise UserError(f"{path} is not a {FORMAT!r} (it says {header.get('format')!r})")
        if header.get("digest") != digest(tensors):
            raise UserError(
                f"checkpoint {path} is damaged: its checksum does not match its content"
            )
        content: dict[str, Any] = json.loads(tensors.pop(_CONTENT).numpy().tobytes())
    except PermissionError as error:
        raise UserError(f"checkpoint {path} cannot be read ({error.strerror})") from None
    except (SafetensorError, KeyError, ValueError, OSError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is not a readable checkpoint ({error}). Checkpoints are safetensors files; "
            "pickled .pth files are never opened"
        ) from None
    if not isinstance(content, dict):
        raise foreign(path, f"its content is a {type(content).__name__}")
    return tensors, content


def foreign(path: Path, what: str) -> UserError:
    """The error for a checkpoint whose content is not what this version writes.

    Args:
        path (Path): the checkpoint.
        what (str): what is wrong with it.
    """
    return UserError(f"{path} is not a checkpoint of this version: {what}")


def resolve(location: str | Path, name: str) -> Path:
    """The checkpoint at ``location``: the file itself, or ``name`` inside a run folder.

    Args:
        location (str | Path): a .safetensors file or a run folder.
        name (str): ``best.safetensors`` or ``last.safetensors``.

    Raises:
        UserError: if there is no such file.
    """
    location = Path(location)
    path = location / name if location.is_dir() else location
    if not path.is_file():
        raise UserError(
            f"no checkpoint at {path}; give a run folder that holds {name}, or a .safetensors file"
        )
    return path


def subset(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix.``; this prefix is removed from the names."""
    start = len(prefix) + 1
    return {name[start:]: t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


LAST, BEST = "last.safetensors", "best.safetensors"


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors and JSON.

    Args:
        optimizer (Optimizer): the optimiser.

    Returns:
        tuple: tensors under ``<number of the parameter>.<slot>``; and values that JSON can hold:
            settings of the groups, slots that are not tensors, number of tensors.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    slots: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                slots.setdefault(str(index), {})[key] = value
    content = {"groups": state["param_groups"], "slots": slots, "tensors": len(tensors)}
    return tensors, json.loads(json.dumps(content))


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], content: dict[str, Any]
) -> None:
    """Restore a state that ``optimizer_state`` returned.

    Args:
        optimizer (Optimizer): has the same groups of parameters as the stored one.
        tensors, content (dict): what ``optimizer_state`` returned.
    """
    state: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in content["slots"].items()}
    for key, value in tensors.items():
        index, _, slot = key.partition(".")
        state.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": content["groups"]})


def optimizer_mismatch(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], content: dict[str, Any]
) -> str | None:
    """How a stored state differs from this optimiser's; None if it fits.

    Settings that only another version of torch has are not compared.

    Args:
        optimizer (Optimizer): the optimiser of the run.
        tensors, content (dict): what ``optimizer_state`` returned.
    """
    groups, stored_groups = optimizer_state(optimizer)[1]["groups"], content["groups"]
    if len(stored_groups) != len(groups):
        return f"{len(stored_groups)} groups of parameters, not {len(groups)}"
    for group, stored in zip(groups, stored_groups, strict=True):
        for key in {"params", "lr"} | (group.keys() & stored.keys()):
            if group[key] != stored.get(key):
                return f"{key}, which is not the run's"
    if len(tensors) != content.get("tensors", len(tensors)):
        return f"{len(tensors)} tensors, not {content['tensors']}"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shapes = {str(number): (p.shape, torch.Size()) for number, p in enumerate(parameters)}
    for name, tensor in tensors.items():
        if tensor.shape not in shapes.get(name.partition(".")[0], ()):
            return f"a {name} of another model"
    return None


def load_model_state(model: Any, state: dict[str, Tensor], path: Path) -> None:
    """``load_state_dict`` with a message that names the first difference.

    Args:
        model (Any): a torch module.
        state (dict): name -> tensor.
        path (Path): the checkpoint, for the message.

    Raises:
        UserError: if names or shapes differ.
    """
    expected = model.state_dict()
    for name in expected.keys() ^ state.keys():
        difference = "lacks" if name in expected else "has, unlike the model,"
        raise UserError(f"checkpoint {path} does not fit the model: it {difference} {name!r}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"checkpoint {path} does not fit: {name} has shape {tuple(tensor.shape)}, the "
                f"model needs {tuple(expected[name].shape)}"
            )
        if tensor.dtype != expected[name].dtype:
            raise UserError(
                f"checkpoint {path} does not fit: {name} is {tensor.dtype}, the model needs "
                f"{expected[name].dtype}"
            )
    model.load_state_dict(state)
