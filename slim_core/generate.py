"""Sampling from a checkpoint with a recurrent state: memory does not grow with the text, unless attention is softmax.

python -m slim_core.generate FOLDER --prompt "def " --tokens 200
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from slim_core.data.tokenizer import load_tokenizer
from slim_core.model import LanguageModel
from slim_core.sampler_memory import PROMPT_CHUNK
from slim_core.step import ChunkSpans
from slim_core.text_stream import TextStream
from slim_core.weights.checkpoint import load_model

FinishReason = Literal["stop", "length", "time"]
"""Why a text ends: the model ended its document or a stop string came; enough tokens; the time was over."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn from the model's predictions."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token every time."""
    top_k: int | None = None
    """Only the k most likely tokens; None for all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability (Holtzman et al., 2020); at least one."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError("temperature: must be at least 0 and finite")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError("top_k: must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError("top_p: must be above 0 and at most 1")


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    end_of_document: int,
    vocab_size: int,
    sampling: Sampling,
    deadline: float = math.inf,
) -> Generator[int, None, FinishReason]:
    """Continue `prompt`, and return why the continuation ends. `end_of_document` ends it and is not yielded.

    Args:
        prompt: tokens, at least one, at most as many as a model of learned positions has positions.
        max_tokens: at least 1; a model of learned positions may yield fewer.
        vocab_size: of the tokenizer; a model may predict more, which mean nothing.
        deadline: of `time.monotonic()`; looked at before each token and each PROMPT_CHUNK tokens of the prompt.
    """
    if not prompt:
        raise ValueError("prompt: must have at least one token")
    limit = model.config.max_positions
    if limit is not None:
        max_tokens = min(max_tokens, limit - len(prompt) + 1)
    generator = torch.Generator().manual_seed(sampling.seed)
    device = next(model.parameters()).device
    states = model.initial_states(1, len(prompt) + max_tokens)
    tokens = torch.tensor([list(prompt)], device=device)
    for span in ChunkSpans(len(prompt), PROMPT_CHUNK):
        if time.monotonic() > deadline:
            return "time"
        hidden, _, states = model.forward_chunk(tokens[:, span], span.start, states)
    for position in range(len(prompt), len(prompt) + max_tokens):
        if time.monotonic() > deadline:
            return "time"
        # Drawn on the CPU: the same sample on every device.
        token = draw(model.logits(hidden[0, -1])[:vocab_size].cpu(), sampling, generator)
        if token == end_of_document:
            return "stop"
        yield token
        if position + 1 < len(prompt) + max_tokens:
            hidden, _, states = model.forward_chunk(torch.tensor([[token]], device=device), position, states)
    return "length"


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token by its logits, (V,) in float32. Raises ValueError where they are not finite."""
    if not logits.isfinite().all():
        raise ValueError("the model's predictions are not finite")
    if sampling.temperature == 0:
        return int(logits.argmax())
    # From the largest down, so that a temperature close to 0 overflows nothing; in float64, where it is not 0 itself.
    probabilities = ((logits - logits.max()).double() / sampling.temperature).softmax(-1).float()
    if sampling.top_k is None and sampling.top_p == 1:
        return int(torch.multinomial(probabilities, 1, generator=generator))
    ordered, order = probabilities.sort(descending=True, stable=True)
    if sampling.top_k is not None:
        ordered[sampling.top_k :] = 0
    before = ordered.cumsum(-1) - ordered
    before[0] = 0  # up to rounding it is, and one token has to stay
    ordered[before >= sampling.top_p * ordered.sum()] = 0
    return int(order[torch.multinomial(ordered, 1, generator=generator)])


def main() -> None:
    """Print a prompt and its continuation, as it comes."""
    parser = argparse.ArgumentParser(description="Sample from a slimtune checkpoint.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", default="\n")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.folder if (options.folder / "tokenizer.json").exists() else None)
    prompt = tokenizer.encode(options.prompt)
    tokens = generate(
        load_model(options.folder),
        prompt,
        max_tokens=options.tokens,
        end_of_document=tokenizer.end_of_document,
        vocab_size=tokenizer.vocab_size,
        sampling=Sampling(options.temperature, options.top_k, options.top_p, options.seed),
    )
    stream = TextStream(tokenizer.decode, before=prompt)
    print(options.prompt, end="", flush=True)  # this is a command
    for token in tokens:
        print(stream.push(token), end="", flush=True)
    print(stream.finish())


if __name__ == "__main__":
    main()
