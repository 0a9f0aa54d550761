"""Checkpoints: a folder that is complete, hashed and on disk, or not there.

The model:
config.json            the ModelConfig
model.safetensors      weights (and the FAVOR+ projections); of a run with adapters, with these merged
tokenizer.json ...     what the model came with beside its weights (`slim_core.weights.source.COMPANIONS`)
README.md              its card
adapter/               adapter_config.json and adapter_model.safetensors in PEFT's layout, of a run with adapters whose
                       model has a layout of transformers'. In a folder of its own: transformers would add the adapter
                       it finds beside a model to weights that have it already

The training:
adapter.safetensors    the adapters' A and B, where there are adapters
base.safetensors       likewise the frozen weights beside them, bit for bit: merging rounds and cannot be undone
optimizer.safetensors  the tensors of the optimiser's state, `<parameter>.<name in the state>`
training.json          step and what the loop needs beside it

manifest.json          size and SHA-256 of each of the files above

A model that came in a layout of transformers' and still is what its config.json says is written in that layout, in the
precision of training, and transformers loads the folder as it is. Both layouts are read, in one file or in shards:

    from slim_core import load_model
    from slim_core.data.tokenizer import load_tokenizer
    model, tokenizer = load_model("checkpoint"), load_tokenizer(Path("checkpoint"))
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slim_core.model import LanguageModel
from slim_core.optim import optimizer_tensors, set_step
from slim_core.weights.files import (
    DTYPE_NAMES,
    CheckpointFile,
    Pieces,
    read_tensor,
    seal,
    seal_file,
    sha256,
    sync,
    write_json,
    write_tensors,
)
from slim_core.weights.folder import ModelFolderError, locate, read_config, read_json
from slim_core.weights.foreign import foreign_tensors, write_adapter
from slim_core.weights.header import HeaderError, read_header, read_metadata
from slim_core.weights.layout import Layout, layout_of, written_config
from slim_core.weights.lora import adapters
from slim_core.weights.source import ModelSource
from slim_core.weights.tables import FileTensor, Rows, tensor_table

_DTYPE_WORDS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""In transformers' words."""
_FEATURES = ".attention.features."
"""Buffers of a FAVOR+ performer: a model with softmax attention has none to give."""
_UNREADABLE = (OSError, EOFError, HeaderError)
"""What a file that is not what it should be makes of being read."""


class CheckpointError(ValueError):
    """A folder that is not a checkpoint of the model it should hold; the message says which file or tensor."""


def checkpoint_name(step: int) -> str:
    """Name of the folder after `step` optimiser steps."""
    return f"step-{step:08d}"


def save_checkpoint(
    parent: Path,
    step: int,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    training: dict[str, Any],
    *,
    source: ModelSource | None = None,
    card: str | None = None,
) -> list[CheckpointFile]:
    """Write `parent/step-XXXXXXXX` and return its files, the manifest last. `parent` must be there.

    The folder gets its name when everything in it is on disk, so a folder of that name is a whole checkpoint. One of
    the same step that is there already is replaced. No tensor is copied, and adapters are merged into the file, a few
    rows at a time, not into the model. `source` is where the model came from, `card` the text of README.md. Raises
    OSError and leaves no temporary folder.
    """
    final = parent / checkpoint_name(step)
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()  # not its parent: whoever takes that away wants no more checkpoints of this run
        _write_model(temporary, model, source)
        if source is not None:
            source.copy_companions(temporary)
        if card is not None:
            (temporary / "README.md").write_text(card)
        write_tensors(temporary / "optimizer.safetensors", optimizer_tensors(model, optimizer))
        write_json(temporary / "training.json", {"step": step, **training})
        files = seal(temporary)
        manifest = {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in files}
        write_json(temporary / "manifest.json", {"files": manifest})
        files.append(seal_file(temporary / "manifest.json", temporary))
        sync(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync(parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return files


def load_model(folder: Path | str) -> LanguageModel:
    """The model of a folder, on the CPU, in float32. Raises CheckpointError."""
    folder = Path(folder)
    try:
        model = LanguageModel(read_config(folder))
    except ModelFolderError as error:
        raise CheckpointError(str(error)) from error
    load_weights(model, folder)
    return model


def load_weights(model: LanguageModel, folder: Path) -> None:
    """Copy the weights of a model folder into `model`, tensor by tensor. Raises CheckpointError.

    A model without adapters gets the merged weights of a run that had some; one with adapters needs the checkpoint of
    such a run, and gets its base and its adapters. A performer may get the weights of a model with softmax attention,
    and keeps its own projections. Files are mapped, not read: beside the model there is never a whole tensor in memory.
    """
    tensors = _tensors(model)
    try:
        _fill_model(model, tensors.plain, folder)
    except ModelFolderError as error:
        raise CheckpointError(str(error)) from error
    if tensors.adapter:
        _fill(tensors.base, folder / "base.safetensors")
        _fill(tensors.adapter, folder / "adapter.safetensors", metadata=_adapter_metadata(model))


def load_training(model: LanguageModel, optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Any]:
    """Copy weights and the optimiser's state of a checkpoint folder; returns what `training.json` holds."""
    load_weights(model, folder)
    training = load_progress(folder)
    set_step(optimizer, training["step"])
    _fill(optimizer_tensors(model, optimizer), folder / "optimizer.safetensors")
    return training


def load_progress(folder: Path) -> dict[str, Any]:
    """What `training.json` holds: the step, and what the loop needs beside it. Raises CheckpointError."""
    try:
        training: dict[str, Any] = json.loads((folder / "training.json").read_text())
        return {**training, "step": int(training["step"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"training.json: {error}") from error


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


def _write_model(folder: Path, model: LanguageModel, source: ModelSource | None) -> None:
    """config.json, model.safetensors, and what makes adapters' training go on."""
    tensors = _tensors(model)
    if source is not None and source.foreign_config is not None and source.fits(model.config):
        config, layout = source.foreign_config, layout_of(source.foreign_config)
        word = _DTYPE_WORDS[DTYPE_NAMES[model.embedding.weight.dtype]]
        write_json(folder / "config.json", written_config(config, word))
        write_tensors(folder / "model.safetensors", foreign_tensors(model, layout), metadata={"format": "pt"})
        if tensors.adapter:
            (folder / "adapter").mkdir()
            write_adapter(folder / "adapter", model, layout, config.get("_name_or_path"))
    else:
        write_json(folder / "config.json", model.config.to_json())
        merged = {
            f"{name}.weight": Pieces(layer.weight.dtype, tuple(layer.weight.shape), layer.merged_rows())
            for name, layer in adapters(model).items()
        }
        write_tensors(folder / "model.safetensors", {**tensors.plain, **merged})
    if tensors.adapter:
        write_tensors(folder / "base.safetensors", tensors.base)
        write_tensors(folder / "adapter.safetensors", tensors.adapter, metadata=_adapter_metadata(model))


def _fill_model(model: LanguageModel, targets: Mapping[str, Tensor], folder: Path) -> None:
    """Copy those rows of the folder's model that belong to `targets`."""
    data = read_json(folder / "config.json")
    layout = layout_of(data)
    table = _table(model, layout, drop_features=layout != "slimtune" or data.get("attention") == "softmax")
    located = locate(folder, layout, table, tied=model.config.tied_embeddings)
    entries = sorted(located.items(), key=lambda item: (item[1].path, item[1].stored.offset))
    for path, group in groupby(entries, key=lambda item: item[1].path):
        try:
            with path.open("rb") as file:
                for short, entry in group:
                    for first, piece in read_tensor(file, entry.stored):
                        _copy(piece, first, table[short], targets)
        except _UNREADABLE as error:
            raise CheckpointError(f"{path.name}: {error}") from error


def _copy(piece: Tensor, first: int, of: FileTensor, targets: Mapping[str, Tensor]) -> None:
    """Rows of a file's tensor from `first` on, to where they belong in the model's parameters."""
    start = 0
    for part in of.parts:
        if part.parameter in targets:
            target = targets[part.parameter].detach()
            if not piece.dim():  # a number of a feature map that was registered
                target.copy_(piece)
            elif of.transposed:  # the piece has some inputs of all parts
                own = target[part.first : part.first + part.count]
                own[:, first : first + len(piece)].copy_(piece[:, start : start + part.count].T)
            else:
                low, high = max(first, start), min(first + len(piece), start + part.count)
                if low < high:
                    target[part.first + low - start : part.first + high - start].copy_(
                        piece[low - first : high - first]
                    )
        start += part.count


def _table(model: LanguageModel, layout: Layout, *, drop_features: bool) -> dict[str, FileTensor]:
    """What the files of this very model hold. A feature map that was registered may have weights that only it knows."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if ".lora_" not in name}
    if drop_features:
        own = {name: shape for name, shape in own.items() if _FEATURES not in name}
    if layout == "slimtune":
        return {
            name: FileTensor(name, shape, (Rows(name, 0, shape[0] if shape else 1),)) for name, shape in own.items()
        }
    table = tensor_table(layout, model.config)
    if {part.parameter for tensor in table.values() for part in tensor.parts} != own.keys():
        raise ModelFolderError([f"config.json: the model in training is none of the layout of {layout}"])
    return table


def _fill(
    targets: Mapping[str, Tensor],
    path: Path,
    *,
    others: Iterable[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Copy the tensors of a file into `targets`. It must hold them and `others`, nothing else, and the `metadata`."""
    try:
        header, found = read_header(path), read_metadata(path)
        _check_names({*targets, *others}, set(header), path)
        for key, value in (metadata or {}).items():
            if found.get(key) != value:
                raise CheckpointError(f"{path.name}: {key} is {found.get(key)}, the run has {value}")
        with path.open("rb") as file:
            for name, target in targets.items():
                stored = header[name]
                if stored.shape != tuple(target.shape):
                    raise CheckpointError(
                        f"{path.name}: {name!r} has shape {stored.shape}, the model wants {tuple(target.shape)}"
                    )
                whole = FileTensor(name, stored.shape, (Rows(name, 0, stored.shape[0] if stored.shape else 1),))
                for first, piece in read_tensor(file, stored):
                    _copy(piece, first, whole, targets)
    except _UNREADABLE as error:
        raise CheckpointError(f"{path.name}: {error}") from error


def _check_names(wanted: set[str], found: set[str], path: Path) -> None:
    if missing := sorted(wanted - found):
        raise CheckpointError(f"{path.name}: no tensor {missing[0]!r}")
    if unknown := sorted(found - wanted):
        raise CheckpointError(f"{path.name}: unknown tensor {unknown[0]!r}")
