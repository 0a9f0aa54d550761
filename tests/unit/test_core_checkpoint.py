"""Checkpoints: bit for bit, hashed, whole or not there."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slim_core.config import FEATURE_MAPS, FeatureMap, ModelConfig, OptimizerConfig
from slim_core.model import Performer
from slim_core.optim import make_optimizer
from slim_core.weights.checkpoint import (
    CheckpointError,
    load_model,
    load_training,
    load_weights,
    save_checkpoint,
    sha256,
    verify_checkpoint,
)
from tests.unit.core_support import a_batch, a_model, names, small_config, stepped

ROOT = Path(__file__).resolve().parents[2]
FILES = ["config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "training.json"]


def trained(config: ModelConfig, steps: int = 3, seed: int = 0) -> tuple[Performer, torch.optim.AdamW]:
    """A model a few steps from its start, so that no moment is zero."""
    model = a_model(config, seed=seed)
    optimizer = make_optimizer(model, OptimizerConfig())
    for step in range(steps):
        tokens, targets = a_batch(config, 1, 40, seed=step)
        _, gradients = stepped(model, tokens, targets, 16, "keep")
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].float()
        optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return small_config("favor")


@pytest.fixture
def folder(config: ModelConfig, tmp_path: Path) -> Path:
    model, optimizer = trained(config)
    save_checkpoint(tmp_path, 3, model, optimizer, {"note": [1.5, None]})
    return tmp_path / "step-00000003"


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_round_trip_bit_for_bit(feature_map: FeatureMap, tmp_path: Path) -> None:
    config = small_config(feature_map)
    model, optimizer = trained(config)
    save_checkpoint(tmp_path, 3, model, optimizer, {"best": 0.1 + 0.2, "count": None})
    folder = tmp_path / "step-00000003"

    other, its_optimizer = trained(config, steps=5, seed=9)
    assert load_training(other, its_optimizer, folder) == {"step": 3, "best": 0.1 + 0.2, "count": None}
    loaded = load_model(folder)
    assert loaded.config == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for (name, parameter), its_parameter in zip(model.named_parameters(), other.parameters(), strict=True):
        state, its_state = optimizer.state[parameter], its_optimizer.state[its_parameter]
        assert state.keys() == its_state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for moment, tensor in state.items():
            assert torch.equal(its_state[moment], tensor), f"{name}.{moment}"
        assert state["step"] == 3
        assert state["exp_avg"].any()


def test_loading_replaces_no_tensor(folder: Path, config: ModelConfig) -> None:
    """The optimiser and the memory model know the tensors that are there."""
    model, optimizer = trained(config, seed=9)
    before = [tensor.data_ptr() for tensor in model.state_dict().values()]
    moments = [state["exp_avg"].data_ptr() for state in optimizer.state.values()]
    load_training(model, optimizer, folder)
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == before
    assert [state["exp_avg"].data_ptr() for state in optimizer.state.values()] == moments


def test_the_files_are_as_reported_and_readable_by_others(config: ModelConfig, tmp_path: Path) -> None:
    model, optimizer = trained(config)
    mask = os.umask(0o077)
    try:
        files = save_checkpoint(tmp_path, 3, model, optimizer, {})
    finally:
        os.umask(mask)
    folder = tmp_path / "step-00000003"
    assert files[-1].name == "manifest.json"
    assert sorted(file.name for file in files) == names(folder) == FILES
    for file in files:
        path = folder / file.name
        assert (file.bytes, file.sha256) == (path.stat().st_size, sha256(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert manifest == {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in files[:-1]}


def test_a_whole_checkpoint_verifies(folder: Path) -> None:
    verify_checkpoint(folder)


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "longer", "bit flipped", "missing"])
def test_damage_is_found_and_named(damage: str, name: str, folder: Path) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    match damage:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        case "longer":
            path.write_bytes(path.read_bytes() + b" ")
        case "bit flipped":
            path.write_bytes(content)
        case "missing":
            path.unlink()
    with pytest.raises(CheckpointError, match=name):
        verify_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"files": []}', b'{"files": {"config.json": {}}}', b"\xff"])
def test_a_broken_manifest_is_found(content: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify_checkpoint(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify_checkpoint(folder)


def test_a_missing_tensor_is_named(folder: Path, config: ModelConfig) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no tensor 'head\.weight'"):
        load_model(folder)


def test_an_unknown_tensor_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lora.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: unknown tensor 'lora\.weight'"):
        load_model(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path, config: ModelConfig) -> None:
    wider = Performer(small_config("favor", vocab_size=21))
    with pytest.raises(CheckpointError, match=r"'embedding\.weight' has shape \(19, 16\), the model wants \(21, 16\)"):
        load_weights(wider, folder)


def test_moments_of_another_shape_are_named(folder: Path, config: ModelConfig) -> None:
    tensors = load_file(folder / "optimizer.safetensors")
    tensors["head.weight.exp_avg"] = torch.zeros(1)  # copy_ alone would broadcast it
    save_file(tensors, folder / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: 'head\.weight\.exp_avg'"):
        load_training(*trained(config), folder)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "training.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff" * 100])
def test_a_file_that_cannot_be_read_is_named(
    name: str, content: bytes | None, folder: Path, config: ModelConfig
) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load_training(*trained(config), folder)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b'{"num_layers": 1}'])
def test_a_folder_without_a_configuration_is_no_checkpoint(content: bytes | None, folder: Path) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(folder)


def test_a_checkpoint_of_the_same_step_is_replaced(folder: Path, config: ModelConfig) -> None:
    (folder / "stray").write_text("of the one before")
    leftover = folder.with_suffix(".tmp")
    leftover.mkdir()
    (leftover / "half").write_text("of a process that died")
    model, optimizer = trained(config, seed=5)
    save_checkpoint(folder.parent, 3, model, optimizer, {})
    assert names(folder.parent) == [folder.name]
    assert names(folder) == FILES
    verify_checkpoint(folder)
    assert torch.equal(load_model(folder).head.weight, model.head.weight)


def test_everything_is_on_disk_before_the_folder_has_its_name(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "step-00000003"
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path == tmp_path:
            assert final.exists()
        else:
            assert not final.exists()
        synced.append(path.name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    save_checkpoint(tmp_path, 3, *trained(config), {})
    assert sorted(synced[:-2]) == FILES
    assert synced[-2:] == ["step-00000003.tmp", tmp_path.name]


WRITE_TOO_MUCH = """
import resource, sys
from pathlib import Path
from slim_core.config import ModelConfig, OptimizerConfig
from slim_core.model import Performer
from slim_core.optim import make_optimizer
from slim_core.weights.checkpoint import save_checkpoint

model = Performer(ModelConfig(num_layers=1, model_width=64, num_heads=2, mlp_width=64)).initialize(0)
optimizer = make_optimizer(model, OptimizerConfig())
parent = Path(sys.argv[1])
weights = 4 * sum(parameter.numel() for parameter in model.parameters())
# The moments are twice as large as the weights.
for limit, padding in [(1_000, 0), (weights + 10_000, 0), (3 * weights, 3 * weights)]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_checkpoint(parent, 1, model, optimizer, {"padding": "x" * padding})
    except OSError as error:
        print(error.errno, *(path.name for path in parent.iterdir()))
"""


def test_a_write_that_fails_leaves_the_last_checkpoint_and_nothing_else(folder: Path) -> None:
    """At the weights, at the moments, and at what follows."""
    command = [sys.executable, "-c", WRITE_TOO_MUCH, str(folder.parent)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    # The number tells a full disk from other failures.
    assert lines == [f"{errno.EFBIG} step-00000003"] * 3
    assert names(folder.parent) == [folder.name]
    verify_checkpoint(folder)
