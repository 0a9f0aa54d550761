"""Training steps of one way to fine-tune a model folder, in a process of its own with the trainer's environment.

    python -m benchmarks.smollm2_step '{"folder": ..., "text": ..., "method": ..., "tokens": 2048, ...}'

Methods: `slim` (chunks of `chunk_length`; the whole sequence is the ordinary step), `checkpoint_layers` (the ordinary
step of the same code, each layer's activations recomputed in backward), and `transformers` and
`transformers_checkpoint`, the same two in the transformers and PEFT packages. Each adds the gradient of rank-8 adapters
on queries, keys and values.
With `planned_bytes` idle memory is given back above it, as in a job. Prints one line of JSON: runtime_bytes (before the
model), peak_bytes, step_seconds (each step but the first), loss.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from slim_core.calibrate import warm_up
from slim_core.config import LoraConfig
from slim_core.data.tokenizer import load_tokenizer
from slim_core.memory import make_meter, private_bytes
from slim_core.step import slim_step
from slim_core.weights.checkpoint import load_model
from slim_core.weights.lora import add_adapters

RANK = 8
LORA = LoraConfig(rank=RANK, alpha=16.0, targets=("query", "key_value"))


def main() -> None:
    """Take the steps that the first argument describes."""
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    warm_up(torch.device("cpu"))
    runtime_bytes = private_bytes()
    folder = Path(spec["folder"])
    tokens = _tokens(folder, spec["text"], spec["tokens"])
    step = _transformers(folder, spec) if spec["method"].startswith("transformers") else _slim(folder, spec)
    meter = make_meter(torch.device("cpu"))  # not before: the pages of the model's file are not the process's own
    if spec["planned_bytes"] is not None:
        meter.keep_within(spec["planned_bytes"])
    losses, seconds = [], []
    for _ in range(1 + spec["steps"]):
        started = time.perf_counter()
        losses.append(step(tokens[:, :-1], tokens[:, 1:]))
        seconds.append(time.perf_counter() - started)
    record = {"runtime_bytes": runtime_bytes, "peak_bytes": meter.peak_bytes(), "step_seconds": seconds[1:]}
    print(json.dumps({**record, "loss": losses[-1]}))


def _tokens(folder: Path, text: str, count: int) -> Tensor:
    tokens = load_tokenizer(folder).encode(text)[: count + 1]
    assert len(tokens) == count + 1, "the text is too short"
    return torch.tensor([tokens])


def _slim(folder: Path, spec: dict[str, Any]) -> Callable[[Tensor, Tensor], float]:
    model = load_model(folder)
    add_adapters(model, LORA, seed=0)
    recomputed = spec["method"] == "checkpoint_layers"
    if recomputed:
        for block in model.blocks:
            block.forward = _recomputed(block.forward)

    def step(tokens: Tensor, targets: Tensor) -> float:
        model.zero_grad(set_to_none=recomputed)  # what is recomputed has weights without gradients to add to
        return slim_step(
            model,
            tokens,
            targets,
            chunk_length=spec["chunk_length"],
            state_policy="prefix",
            normaliser=targets.numel(),
        )

    return step


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same forward pass, computed again in backward. Only x is what PyTorch calls its input: the buffer of keys and
    values is written to by every pass."""

    def call(x: Tensor, *arguments: Any, **options: Any) -> Any:
        return checkpoint(lambda y: forward(y, *arguments, **options), x, use_reentrant=False)

    return call


def _transformers(folder: Path, spec: dict[str, Any]) -> Callable[[Tensor, Tensor], float]:
    import peft  # noqa: PLC0415  # `make test-extra` and `make demo-smollm2` install it
    import transformers  # noqa: PLC0415

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    adapted: Any = peft.get_peft_model(model, config)
    if spec["method"] == "transformers_checkpoint":
        adapted.enable_input_require_grads()
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted.train()

    def step(tokens: Tensor, targets: Tensor) -> float:
        adapted.zero_grad(set_to_none=False)
        logits = adapted(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        torch.autograd.backward(loss)
        return loss.item()

    return step


if __name__ == "__main__":
    main()
