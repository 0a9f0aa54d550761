"""Checkpoints: a folder that is complete, hashed and on disk, or not there.

model.safetensors      weights (and the FAVOR+ projections); of a run with adapters, with these merged
adapter.safetensors    the adapters' A and B, where there are adapters
base.safetensors       likewise the frozen weights beside them, bit for bit: merging rounds and cannot be undone
config.json            the ModelConfig
optimizer.safetensors  the tensors of the optimiser's state, `<parameter>.<name in the state>`
training.json          step and what the loop needs beside it
manifest.json          size and SHA-256 of each of the files above
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slim_core.config import ModelConfig
from slim_core.model import LanguageModel
from slim_core.optim import optimizer_tensors, set_step
from slim_core.weights.lora import adapters

_BLOCK_BYTES = 1 << 20
"""Read at a time to hash a file; two of these exist at once."""
_MODE = 0o644
"""Whatever the umask is: another process serves the files."""

_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""Names and order of safetensors, the widest first, so that every tensor is aligned."""


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
    parent: Path, step: int, model: LanguageModel, optimizer: torch.optim.Optimizer, training: dict[str, Any]
) -> list[CheckpointFile]:
    """Write `parent/step-XXXXXXXX` and return its files, the manifest last. `parent` must be there.

    The folder gets its name when everything in it is on disk, so a folder of that name is a whole checkpoint. One of
    the same step that is there already is replaced. No tensor is copied, and adapters are merged into the file, a few
    rows at a time, not into the model. Raises OSError and leaves no temporary folder.
    """
    final = parent / checkpoint_name(step)
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()  # not its parent: whoever takes that away wants no more checkpoints of this run
        _write_model(temporary, model)
        _write_tensors(temporary / "optimizer.safetensors", optimizer_tensors(model, optimizer))
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
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return files


def load_model(folder: Path) -> LanguageModel:
    """The model of a checkpoint folder, on the CPU. Raises CheckpointError."""
    try:
        config = ModelConfig.from_json(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"config.json: {error}") from error
    model = LanguageModel(config)
    load_weights(model, folder)
    return model


def load_weights(model: LanguageModel, folder: Path) -> None:
    """Copy the weights of a checkpoint folder into `model`, tensor by tensor. Raises CheckpointError.

    A model without adapters gets the merged weights of a run that had some; one with adapters needs the checkpoint of
    such a run, and gets its base and its adapters.
    """
    tensors = _tensors(model)
    _fill(tensors.plain, folder / "model.safetensors", others=tensors.base)
    if tensors.adapter:
        _fill(tensors.base, folder / "base.safetensors")
        _fill(tensors.adapter, folder / "adapter.safetensors", metadata=_adapter_metadata(model))


def load_training(model: LanguageModel, optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Any]:
    """Copy weights and the optimiser's state of a checkpoint folder; returns what `training.json` holds."""
    load_weights(model, folder)
    try:
        training: dict[str, Any] = json.loads((folder / "training.json").read_text())
        step = int(training["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"training.json: {error}") from error
    set_step(optimizer, step)
    _fill(optimizer_tensors(model, optimizer), folder / "optimizer.safetensors")
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


class _ModelTensors(NamedTuple):
    """The tensors of a model by where a checkpoint has them; without adapters all are in `plain`."""

    plain: dict[str, Tensor]
    base: dict[str, Tensor]
    adapter: dict[str, Tensor]


def _tensors(model: LanguageModel) -> _ModelTensors:
    tensors = dict(model.state_dict())
    layers = adapters(model)
    base = {f"{name}.weight": tensors.pop(f"{name}.weight") for name in layers}
    adapter = {key: tensors.pop(key) for name in layers for key in (f"{name}.lora_A", f"{name}.lora_B")}
    return _ModelTensors(tensors, base, adapter)


def _adapter_metadata(model: LanguageModel) -> dict[str, str]:
    """What A and B mean nothing without."""
    return {"alpha": str(next(iter(adapters(model).values())).alpha)}


def _write_model(folder: Path, model: LanguageModel) -> None:
    tensors = _tensors(model)
    merged = {f"{name}.weight": layer.merged_rows() for name, layer in adapters(model).items()}
    _write_tensors(folder / "model.safetensors", {**tensors.plain, **tensors.base}, values=merged)
    if tensors.adapter:
        _write_tensors(folder / "base.safetensors", tensors.base)
        _write_tensors(folder / "adapter.safetensors", tensors.adapter, metadata=_adapter_metadata(model))


def _write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    values: Mapping[str, Iterable[Tensor]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A safetensors file, written piece by piece: `values` may give what is written for a tensor, in pieces of rows
    that need not exist together. safetensors itself wants all tensors at once, in memory.

    Source: https://github.com/huggingface/safetensors#format. Eight bytes of length, a header in JSON, the tensors.
    """
    order = list(_DTYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        dtype, shape = _DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for piece in (values or {}).get(name, (tensors[name],)):
                file.write(piece.detach().cpu().flatten().view(torch.uint8).numpy().data)


def _fill(
    targets: Mapping[str, Tensor],
    path: Path,
    *,
    others: Iterable[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Copy the tensors of a file into `targets`. It must hold them and `others`, nothing else, and the `metadata`."""
    try:
        with safe_open(path, framework="pt") as file:
            _check_names({*targets, *others}, set(file.keys()), path)
            for key, value in (metadata or {}).items():
                if (found := (file.metadata() or {}).get(key)) != value:
                    raise CheckpointError(f"{path.name}: {key} is {found}, the run has {value}")
            for name, target in targets.items():
                source = file.get_tensor(name)
                if source.shape != target.shape:
                    raise CheckpointError(
                        f"{path.name}: {name!r} has shape {tuple(source.shape)}, the model wants {tuple(target.shape)}"
                    )
                target.detach().copy_(source)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path.name}: {error}") from error


def _check_names(wanted: set[str], found: set[str], path: Path) -> None:
    if missing := sorted(wanted - found):
        raise CheckpointError(f"{path.name}: no tensor {missing[0]!r}")
    if unknown := sorted(found - wanted):
        raise CheckpointError(f"{path.name}: unknown tensor {unknown[0]!r}")


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
