"""Sampling from a checkpoint with a recurrent state: memory does not grow with the text, unless attention is softmax.

python -m slim_core.generate FOLDER --prompt "def " --tokens 200
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from slim_core.data import tokenizer
from slim_core.model import LanguageModel
from slim_core.step import ChunkSpans
from slim_core.weights.checkpoint import load_model

_PROMPT_CHUNK = 512


@torch.inference_mode()
def generate(
    model: LanguageModel, prompt: Sequence[int], *, max_tokens: int, temperature: float = 0.8, seed: int = 0
) -> Iterator[int]:
    """Continue `prompt` by up to `max_tokens` tokens, ending early at a document border.

    Args:
        prompt: tokens, at least one.
        temperature: divides the logits; 0 takes the most likely token every time.
    """
    if not prompt:
        raise ValueError("prompt: must have at least one token")
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    states = model.initial_states(1, len(prompt) + max_tokens)
    tokens = torch.tensor([list(prompt)], device=device)
    for span in ChunkSpans(len(prompt), _PROMPT_CHUNK):
        hidden, _, states = model.forward_chunk(tokens[:, span], span.start, states)
    for position in range(len(prompt), len(prompt) + max_tokens):
        logits = model.logits(hidden[0, -1]).cpu()  # drawn there: the same sample on every device
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        if token == tokenizer.DOCUMENT_BORDER:
            return
        yield token
        hidden, _, states = model.forward_chunk(torch.tensor([[token]], device=device), position, states)


def main() -> None:
    """Print a prompt and its continuation."""
    parser = argparse.ArgumentParser(description="Sample from a slimtune checkpoint.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", default="\n")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = load_model(options.folder)
    sample = generate(
        model,
        tokenizer.encode(options.prompt),
        max_tokens=options.tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    print(options.prompt + tokenizer.decode(sample))  # this is a command


if __name__ == "__main__":
    main()
