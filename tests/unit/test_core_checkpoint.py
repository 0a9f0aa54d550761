"""Checkpoints: bit for bit, hashed, whole or not there."""

from __future__ import annotations

import copy
import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slim_core.config import FEATURE_MAPS, LoraConfig, ModelConfig, OptimizerConfig
from slim_core.model import LanguageModel
from slim_core.optim import make_optimizer, optimizer_tensors
from slim_core.step import slim_step
from slim_core.weights.checkpoint import (
    CheckpointError,
    load_model,
    load_training,
    load_weights,
    save_checkpoint,
    verify_checkpoint,
)
from slim_core.weights.files import sha256, write_tensors
from slim_core.weights.lora import adapters, add_adapters, merge_adapters
from tests.unit.core_support import a_batch, a_model, names, small_config, stepped

ROOT = Path(__file__).resolve().parents[2]
FILES = ["config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "training.json"]


def trained(config: ModelConfig, steps: int = 3, seed: int = 0) -> tuple[LanguageModel, torch.optim.Optimizer]:
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
def test_round_trip_bit_for_bit(feature_map: str, tmp_path: Path) -> None:
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
    wider = LanguageModel(small_config("favor", vocab_size=21))
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
    assert_same(dict(load_model(folder).state_dict()), dict(model.state_dict()))


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


LORA = LoraConfig(rank=3, alpha=5.0, targets=("query", "mlp_in", "key_value"))
TARGETS = {
    f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attention.query", "attention.key_value", "mlp_in")
}


def a_run(
    config: ModelConfig, optimizer: str, lora: LoraConfig | None, seed: int = 0
) -> tuple[LanguageModel, torch.optim.Optimizer]:
    model = a_model(config, seed=seed)
    if lora is not None:
        add_adapters(model, lora, seed)
    settings = {"name": optimizer, "learning_rate": 0.01, "weight_decay": 0.1}
    return model, make_optimizer(model, OptimizerConfig.from_json(settings))


def train(model: LanguageModel, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        tokens, targets = a_batch(model.config, 2, 40, seed=step)
        slim_step(model, tokens, targets, chunk_length=16, state_policy="reverse", normaliser=80)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("lora", [None, LORA], ids=["plain", "lora"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
def test_a_resumed_run_is_the_same_bit_for_bit(optimizer: str, lora: LoraConfig | None, tmp_path: Path) -> None:
    config = small_config("favor", tied_embeddings=True)
    straight = a_run(config, optimizer, lora)
    train(*straight, range(5))

    first = a_run(config, optimizer, lora)
    train(*first, range(3))
    save_checkpoint(tmp_path, 3, *first, {})
    verify_checkpoint(tmp_path / "step-00000003")
    resumed = a_run(config, optimizer, lora, seed=9)
    load_training(*resumed, tmp_path / "step-00000003")
    assert_same(resumed[0].state_dict(), first[0].state_dict())
    train(*resumed, range(3, 5))
    assert_same(resumed[0].state_dict(), straight[0].state_dict())
    assert_same(optimizer_tensors(*resumed), optimizer_tensors(*straight))
    steps = {float(state["step"]) for state in resumed[1].state.values() if "step" in state}
    assert steps == (set() if optimizer == "sgd" else {5.0})


def test_sgd_without_momentum_has_a_checkpoint(config: ModelConfig, tmp_path: Path) -> None:
    model = a_model(config)
    optimizer = make_optimizer(model, OptimizerConfig(name="sgd", momentum=0.0))
    save_checkpoint(tmp_path, 3, model, optimizer, {})
    load_training(model, optimizer, tmp_path / "step-00000003")


def test_a_checkpoint_of_another_optimiser_is_refused(folder: Path, config: ModelConfig) -> None:
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: no tensor '.*\.momentum_buffer'"):
        load_training(*a_run(config, "sgd", None), folder)


def test_a_checkpoint_as_the_first_release_wrote_it_loads(folder: Path, config: ModelConfig) -> None:
    """By safetensors' own writer, moments of AdamW under these very names."""
    model, optimizer = trained(config, steps=4, seed=3)
    moments = {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in ("exp_avg", "exp_avg_sq")
    }
    save_file(moments, folder / "optimizer.safetensors")
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    other, its_optimizer = trained(config, steps=1, seed=9)
    load_training(other, its_optimizer, folder)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    assert_same(optimizer_tensors(other, its_optimizer), moments)


def test_files_are_safetensors_of_any_precision_and_shape(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5).to(torch.bfloat16),
        "half": torch.randn(5).to(torch.float16),
        "a scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "not contiguous": torch.randn(4, 6).T,
        "wide": torch.randn(7, dtype=torch.float64),
        "whole numbers": torch.arange(3),
    }
    write_tensors(tmp_path / "file", tensors, metadata={"key": "value"})
    loaded = load_file(tmp_path / "file")
    assert_same(loaded, tensors)
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {n: t.dtype for n, t in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"key": "value"})
    assert (tmp_path / "file").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.fixture
def lora_folder(config: ModelConfig, tmp_path: Path) -> Path:
    model, optimizer = a_run(config, "adamw", LORA)
    train(model, optimizer, range(3))
    save_checkpoint(tmp_path, 3, model, optimizer, {})
    return tmp_path / "step-00000003"


def test_a_checkpoint_of_adapters_holds_the_plain_model_and_leaves_the_one_in_training(
    config: ModelConfig, tmp_path: Path
) -> None:
    model, optimizer = a_run(config, "adamw", LORA)
    train(model, optimizer, range(3))
    before = copy.deepcopy(model.state_dict())
    files = save_checkpoint(tmp_path, 3, model, optimizer, {})
    folder = tmp_path / "step-00000003"
    assert_same(model.state_dict(), before)
    assert sorted(file.name for file in files) == sorted([*FILES, "adapter.safetensors", "base.safetensors"])
    assert load_file(folder / "base.safetensors").keys() == {f"{name}.weight" for name in TARGETS}
    matrices = {f"{name}.{matrix}" for name in TARGETS for matrix in ("lora_A", "lora_B")}
    assert load_file(folder / "adapter.safetensors").keys() == matrices

    loaded = load_model(folder)
    assert adapters(loaded) == {}
    merge_adapters(model)
    assert_same(loaded.state_dict(), model.state_dict())
    assert not torch.equal(loaded.get_parameter("blocks.0.mlp_in.weight"), before["blocks.0.mlp_in.weight"])


@pytest.mark.parametrize("name", ["base.safetensors", "adapter.safetensors"])
def test_a_file_of_adapters_that_is_missing_is_named(name: str, lora_folder: Path, config: ModelConfig) -> None:
    (lora_folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        verify_checkpoint(lora_folder)
    with pytest.raises(CheckpointError, match=name):
        load_training(*a_run(config, "adamw", LORA), lora_folder)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            LoraConfig(rank=4, alpha=5.0, targets=LORA.targets),
            r"lora_A' has shape \(3, 16\), the model wants \(4, 16\)",
        ),
        (LoraConfig(rank=3, alpha=6.0, targets=LORA.targets), r"alpha is 5\.0, the run has 6\.0"),
        (LoraConfig(rank=3, alpha=5.0, targets=("query",)), r"base\.safetensors: unknown tensor"),
        (LoraConfig(rank=3, alpha=5.0, targets=("query", "output")), r"base\.safetensors: no tensor"),
        (None, r"optimizer\.safetensors: no tensor"),
    ],
)
def test_adapters_of_another_kind_are_refused(
    lora: LoraConfig | None, message: str, lora_folder: Path, config: ModelConfig
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_training(*a_run(config, "adamw", lora), lora_folder)


def test_adapters_do_not_resume_from_a_plain_checkpoint(folder: Path, config: ModelConfig) -> None:
    with pytest.raises(CheckpointError, match=r"base\.safetensors"):
        load_training(*a_run(config, "adamw", LORA), folder)


WRITE_TOO_MUCH = """
import resource, sys
from pathlib import Path
from slim_core.config import ModelConfig, OptimizerConfig
from slim_core.model import LanguageModel
from slim_core.optim import make_optimizer
from slim_core.weights.checkpoint import save_checkpoint

model = LanguageModel(ModelConfig(num_layers=1, model_width=64, num_heads=2, mlp_width=64)).initialize(0)
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
