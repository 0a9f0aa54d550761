"""Checkpoints: a folder that is complete, hashed and on disk, or not there.

model.safetensors      weights (and the FAVOR+ projections)
config.json            the ModelConfig
optimizer.safetensors  both moments of AdamW, by parameter
training.json          step and what the loop needs beside it
manifest.json          size and SHA-256 of each of the files above
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slim_core.config import ModelConfig
from slim_core.model import Performer
from slim_core.optim import MOMENTS

_BLOCK_BYTES = 1 << 22
_MODE = 0o644
"""safetensors creates its files readable by their owner only; another process serves them."""


class CheckpointError(ValueError):
    """A folder that is not a checkpoint of the model it should hold; the message says which file or tensor."""


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """A file of a checkpoint."""

    name: str
    bytes: int
    sha256: str


def checkpoint_name(step: int) -> str:
    """Name of the folder after `step` optimiser steps."""
    return f"step-{step:08d}"


def save_checkpoint(
    parent: Path, step: int, model: Performer, optimizer: torch.optim.Optimizer, training: dict[str, Any]
) -> list[CheckpointFile]:
    """Write `parent/step-XXXXXXXX` and return its files, the manifest last.

    The folder gets its name when everything in it is on disk, so a folder of that name is a whole checkpoint. One of
    the same step that is there already is replaced. No tensor is copied. Raises OSError and leaves no temporary folder.
    """
    final = parent / checkpoint_name(step)
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(dict(model.state_dict()), temporary / "model.safetensors")
        save_file(_optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
        _write_json(temporary / "config.json", model.config.to_json())
        _write_json(temporary / "training.json", {"step": step, **training})
        files = [_seal(path) for path in sorted(temporary.iterdir())]
        manifest = {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in files}
        _write_json(temporary / "manifest.json", {"files": manifest})
        files.append(_seal(temporary / "manifest.json"))
        _sync(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(parent)
    except SafetensorError as error:
        raise _os_error(error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return files


def load_model(folder: Path) -> Performer:
    """The model of a checkpoint folder, on the CPU. Raises CheckpointError."""
    try:
        config = ModelConfig.from_json(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"config.json: {error}") from error
    model = Performer(config)
    load_weights(model, folder)
    return model


def load_weights(model: Performer, folder: Path) -> None:
    """Copy the weights of a checkpoint folder into `model`, tensor by tensor. Raises CheckpointError."""
    _fill(model.state_dict(), folder / "model.safetensors")


def load_training(model: Performer, optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Any]:
    """Copy weights and optimiser moments of a checkpoint folder; returns what `training.json` holds."""
    load_weights(model, folder)
    try:
        training: dict[str, Any] = json.loads((folder / "training.json").read_text())
        step = float(training["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"training.json: {error}") from error
    for parameter in model.parameters():
        optimizer.state[parameter]["step"].fill_(step)
    _fill(_optimizer_tensors(model, optimizer), folder / "optimizer.safetensors")
    return training


def verify_checkpoint(folder: Path) -> None:
    """Raise CheckpointError unless every file has the size and SHA-256 of the manifest."""
    try:
        entries = json.loads((folder / "manifest.json").read_text())["files"].items()
        for name, entry in entries:
            if (folder / name).stat().st_size != entry["bytes"] or sha256(folder / name) != entry["sha256"]:
                raise CheckpointError(f"{name}: not the bytes that were written")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"manifest.json: {error}") from error


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _optimizer_tensors(model: Performer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in MOMENTS
    }


def _fill(targets: dict[str, Tensor], path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if missing := sorted(set(targets) - names):
                raise CheckpointError(f"{path.name}: no tensor {missing[0]!r}")
            if unknown := sorted(names - set(targets)):
                raise CheckpointError(f"{path.name}: unknown tensor {unknown[0]!r}")
            for name, target in targets.items():
                source = file.get_tensor(name)
                if source.shape != target.shape:
                    raise CheckpointError(
                        f"{path.name}: {name!r} has shape {tuple(source.shape)}, the model wants {tuple(target.shape)}"
                    )
                target.detach().copy_(source)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path.name}: {error}") from error


def _os_error(error: SafetensorError) -> OSError:
    """The system's error behind one of safetensors, which gives its number in the text only."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _seal(path: Path) -> CheckpointFile:
    path.chmod(_MODE)
    _sync(path)
    return CheckpointFile(path.name, path.stat().st_size, sha256(path))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
