"""A model folder before anything of it is loaded: is it whole, and the model that its config.json says?

config.json and model.safetensors, or shards (model-00001-of-00002.safetensors ...) with
model.safetensors.index.json; in our layout or in one of transformers' (`slim_core.weights.layout`). Only headers are
read, so the check takes little memory whatever the files hold; it trusts none of them. Free of torch and numpy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slim_core.config import ModelConfig
from slim_core.weights.header import DTYPE_BYTES, Header, HeaderError, StoredTensor, loads, read_header
from slim_core.weights.layout import Layout, layout_of, model_config
from slim_core.weights.tables import TIED, FileTensor, is_ignored, short_name, tensor_table

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16", "F64")
"""What weights may be; float32 they are when they are loaded."""
MAX_PROBLEMS = 20
_MAX_CONFIG_BYTES = 1 << 20
_MAX_INDEX_BYTES = 8 << 20
_MAX_SHARDS = 1_000
_BLOCK_BYTES = 1 << 20


class ModelFolderError(ValueError):
    """A folder that is not a model that can be loaded. `problems` are the first MAX_PROBLEMS, each a sentence."""

    def __init__(self, problems: list[str]) -> None:
        more = len(problems) - MAX_PROBLEMS
        self.problems = problems[:MAX_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])
        super().__init__("; ".join(self.problems))


@dataclass(frozen=True, slots=True)
class FolderSummary:
    """A model folder that is whole."""

    config: ModelConfig
    layout: Layout
    tensors: int
    """That are weights of the model."""
    bytes: int
    """Of these."""
    dtypes: tuple[str, ...]
    """Of these, in the words of safetensors, the most frequent first."""


@dataclass(frozen=True, slots=True)
class Located:
    """Where a tensor of the table is."""

    path: Path
    stored: StoredTensor


def read_json(path: Path, limit_bytes: int = _MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A small JSON object from a file that nobody vouches for. Raises ModelFolderError."""
    try:
        size = path.stat().st_size
        if size > limit_bytes:
            raise ModelFolderError([f"{path.name}: {size} bytes; at most {limit_bytes} are read"])
        return loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelFolderError([f"{path.name}: missing"]) from error
    except (OSError, HeaderError) as error:
        raise ModelFolderError([f"{path.name}: {error}"]) from error


def read_config(folder: Path) -> ModelConfig:
    """The model of a folder, from its config.json alone. Raises ModelFolderError."""
    return _config(read_json(folder / "config.json"))


def check_folder(folder: Path) -> FolderSummary:
    """Check config.json against every tensor's name, shape, type and place in its file.

    Raises ModelFolderError with all that is wrong, by file and tensor.
    """
    data = read_json(folder / "config.json")
    config, layout = _config(data), layout_of(data)
    stored = _stored(folder)
    if 2 * config.num_layers > len(stored):  # before a table of as many layers as a stranger's file says
        raise ModelFolderError(
            [f"config.json: {config.num_layers} layers, but the files have only {len(stored)} tensors"]
        )
    located = _locate(stored, folder, layout, tensor_table(layout, config), tied=config.tied_embeddings)
    dtypes = Counter(entry.stored.dtype for entry in located.values())
    return FolderSummary(
        config=config,
        layout=layout,
        tensors=len(located),
        bytes=sum(entry.stored.bytes for entry in located.values()),
        dtypes=tuple(name for name, _ in dtypes.most_common()),
    )


def locate(folder: Path, layout: Layout, table: dict[str, FileTensor], *, tied: bool) -> dict[str, Located]:
    """Where each tensor of the table is, by short name.

    Raises ModelFolderError unless all are there as they have to be, and nothing else is.
    """
    return _locate(_stored(folder), folder, layout, table, tied=tied)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises ModelFolderError."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ModelFolderError([f"{WEIGHTS}: missing, and no {INDEX} either"])
    return [folder / name for name in sorted(set(_weight_map(folder).values()))]


def _config(data: dict[str, Any]) -> ModelConfig:
    try:
        return model_config(data)
    except (ValueError, TypeError, OverflowError) as error:
        raise ModelFolderError([f"config.json: {error}"]) from error


def _weight_map(folder: Path) -> dict[str, str]:
    """Of the index: the shard of each tensor."""
    weight_map = read_json(folder / INDEX, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise ModelFolderError([f"{INDEX}: weight_map must be an object that names the file of each tensor"])
    names = set(weight_map.values())
    if len(names) > _MAX_SHARDS:
        raise ModelFolderError([f"{INDEX}: {len(names)} files; at most {_MAX_SHARDS} are read"])
    strange = [
        name
        for name in sorted(names)
        if not name.endswith(".safetensors") or name.startswith(".") or any(char in name for char in "/\\\0")
    ]
    if strange:
        raise ModelFolderError([f"{INDEX}: {name!r} is no name of a .safetensors file beside it" for name in strange])
    return weight_map


def _stored(folder: Path) -> dict[str, Located]:
    """Every tensor in the files by its name there."""
    found: dict[str, Located] = {}
    problems: list[str] = []
    paths = _weight_files(folder)
    for path in paths:
        try:
            header: Header = read_header(path)
        except FileNotFoundError:
            problems.append(f"{path.name}: missing, though {INDEX} names it")
            continue
        except (OSError, HeaderError) as error:
            problems.append(f"{path.name}: {error}")
            continue
        for name, stored in header.items():
            if name in found:
                problems.append(f"{path.name}: {name!r} is in {found[name].path.name} as well")
            found[name] = Located(path, stored)
    if not problems and paths[0].name != WEIGHTS:
        problems += _index_errors(_weight_map(folder), found)
    if problems:
        raise ModelFolderError(problems)
    return found


def _locate(
    found: dict[str, Located], folder: Path, layout: Layout, table: dict[str, FileTensor], *, tied: bool
) -> dict[str, Located]:
    problems: list[str] = []
    located: dict[str, Located] = {}
    twins = TIED.get(layout) if tied else None
    for name, entry in found.items():
        short = short_name(layout, name)
        if short in located:
            problems.append(f"{entry.path.name}: {name!r} is there twice, with and without its prefix")
        elif short in table or (twins and short == twins[0]):
            located[short] = entry
        elif not is_ignored(layout, short):
            problems.append(f"{entry.path.name}: unknown tensor {name!r}")
    problems += _mismatches(folder, table, located)
    if twins and (twin := located.pop(twins[0], None)) and twins[1] in located:
        problems += _difference(twin, located[twins[1]])
    if problems:
        raise ModelFolderError(problems)
    return located


def _index_errors(weight_map: dict[str, str], found: dict[str, Located]) -> Iterator[str]:
    for name, shard in weight_map.items():
        if name not in found or found[name].path.name != shard:
            yield f"{INDEX}: {name!r} is said to be in {shard}, and is not"
    for name, entry in found.items():
        if name not in weight_map:
            yield f"{entry.path.name}: {name!r} is not in {INDEX}"


def _mismatches(folder: Path, table: dict[str, FileTensor], located: dict[str, Located]) -> Iterator[str]:
    where = WEIGHTS if (folder / WEIGHTS).is_file() else "the shards"
    for short, wanted in table.items():
        if short not in located:
            yield f"{where}: no tensor {wanted.name!r}, which has shape {wanted.shape}"
            continue
        entry = located[short]
        if entry.stored.shape != wanted.shape:
            yield (
                f"{entry.path.name}: {entry.stored.name!r} has shape {entry.stored.shape}, "
                f"the model wants {wanted.shape}"
            )
        if entry.stored.dtype not in FLOATS:
            yield (
                f"{entry.path.name}: {entry.stored.name!r} has type {entry.stored.dtype}; {', '.join(FLOATS)} are "
                "supported"
            )


def _difference(head: Located, embeddings: Located) -> Iterator[str]:
    """Tied embeddings may be in a file twice, but only if both are the same."""
    same = (head.stored.dtype, head.stored.shape) == (embeddings.stored.dtype, embeddings.stored.shape)
    if not same or any(one != other for one, other in zip(_blocks(head), _blocks(embeddings), strict=True)):
        yield (
            f"{head.path.name}: {head.stored.name!r} differs from {embeddings.stored.name!r}, though config.json says "
            "tie_word_embeddings"
        )


def _blocks(entry: Located) -> Iterator[bytes]:
    assert entry.stored.dtype in DTYPE_BYTES
    with entry.path.open("rb") as file:
        file.seek(entry.stored.offset)
        left = entry.stored.bytes
        while left:
            block = file.read(min(left, _BLOCK_BYTES))
            left -= len(block)
            yield block
