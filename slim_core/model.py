"""The model: embedding, blocks, head. It knows layers of attention by their interface and never sees a whole sequence.

Legend: B batch, C positions of a chunk, R = B * C rows, D model width, S layers, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from slim_core.config import ModelConfig
from slim_core.layers.attention import Attention, Place, rotation, sinusoids
from slim_core.layers.dropout import NO_DROPOUT, Dropout
from slim_core.layers.features import Favor
from slim_core.layers.gated import GatedAttention
from slim_core.layers.head import embed, head_loss
from slim_core.layers.linear import Linear, linear
from slim_core.layers.norm import make_norm
from slim_core.layers.performer import PerformerAttention
from slim_core.layers.softmax import SoftmaxAttention
from slim_core.planning.plan import StatePolicy

States = list[Tensor]
"""One state of attention per layer."""

_ATTENTION: dict[str, Callable[[ModelConfig, int], Attention]] = {
    "performer": PerformerAttention,
    "gated": GatedAttention,
    "softmax": SoftmaxAttention,
}


class Documents(NamedTuple):
    """Documents packed into the rows of a chunk. Attention never crosses their borders."""

    starts: Tensor | None
    """(B, C) booleans, true where a document begins; None where none does."""
    positions: Tensor
    """(B, C) integers: distance from the start of the document."""


class Chunk(NamedTuple):
    """One chunk after the forward pass."""

    hidden: Tensor
    """(B, C, D), what the head reads."""
    entry_states: States
    """Leaves of the graph, whose gradients belong to the chunk before; of softmax attention what was given."""
    exit_states: States


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's approximation by tanh (Hendrycks and Gimpel, 2016), as GPT-2 has it."""
    return nn.functional.gelu(x, approximate="tanh")


def swiglu(x: Tensor) -> Tensor:
    """(..., 2 F) -> (..., F): swish of the first half times the second (Shazeer, "GLU Variants", 2020)."""
    gate, up = x.chunk(2, -1)
    return nn.functional.silu(gate) * up


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": gelu_tanh,
    "swiglu": swiglu,
}


class Block(nn.Module):
    """Attention and MLP with residual sums, normalised before or after each, or on the branch."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm = config.norm
        self.activate = _ACTIVATIONS[config.activation]
        self.attention = _ATTENTION[config.attention](config, layer)
        self.attention_norm = make_norm(config)
        self.mlp_norm = make_norm(config)
        self.mlp_in = Linear(config.model_width, config.mlp_in_width, bias=config.mlp_bias)
        self.mlp_out = Linear(config.mlp_width, config.model_width, bias=config.mlp_bias)

    def _mlp(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.mlp_out(self.activate(self.mlp_in(x)))
        return hidden

    def forward(
        self, x: Tensor, state: Tensor, place: Place, dropout: Dropout, *, state_is_exit: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, D) and a state -> (B, C, D), entry state, exit state."""
        attended, entry, exit_state = self.attention(self.attention_input(x), state, place, state_is_exit=state_is_exit)
        return self.after_attention(x, attended, place, dropout), entry, exit_state

    def attention_input(self, x: Tensor) -> Tensor:
        """What attention reads of the residual stream, (B, C, D)."""
        read: Tensor = self.attention_norm(x) if self.norm == "pre" else x
        return read

    def after_attention(self, x: Tensor, attended: Tensor, place: Place, dropout: Dropout) -> Tensor:
        """The residual stream behind the block, given attention's output; (B, C, D) each."""
        x = self._sum(x, attended, self.attention_norm, place, dropout, "attention")
        inner = self._mlp(self.mlp_norm(x) if self.norm == "pre" else x)
        return self._sum(x, inner, self.mlp_norm, place, dropout, "mlp")

    def _sum(self, x: Tensor, branch: Tensor, norm: nn.Module, place: Place, dropout: Dropout, site: str) -> Tensor:
        if self.norm == "branch":
            branch = norm(branch)
        x = x + dropout(branch, place.start, self.layer, site)
        return norm(x) if self.norm == "post" else x

    def exit_state(self, x: Tensor, entry: Tensor, place: Place) -> Tensor:
        """The exit state alone, at the least cost: no output, no MLP."""
        state: Tensor = self.attention.exit_state(self.attention_input(x), entry, place)
        return state


class LanguageModel(nn.Module):
    """A causal language model whose every chunk is one function: (tokens, entry states) -> (hidden, exit states)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        """Precision of matrix products and activations; None for that of the weights."""
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_width)
        self.position = None if config.max_positions is None else nn.Embedding(config.max_positions, config.model_width)
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.num_layers)])
        self.final_norm = make_norm(config) if config.norm == "pre" else nn.Identity()
        self.head = None if config.tied_embeddings else nn.Linear(config.model_width, config.vocab_size, bias=False)

    @property
    def policies(self) -> tuple[StatePolicy, ...]:
        """State policies that work for this kind of attention; none if it needs the whole sequence in one chunk."""
        return self._blocks()[0].attention.policies

    def initialize(self, seed: int) -> LanguageModel:
        """Draw all weights from `seed`; the same weights on every device and under every plan. Returns itself.

        Matrices: normal of variance 1 / D, those that write to the residual stream scaled by 1 / sqrt(2 S) (GPT-2).
        """
        generator = torch.Generator().manual_seed(seed)
        residual_scale = 1 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                continue  # biases start at 0 and norms at 1: already so, or set below
            std = 1 / math.sqrt(parameter.shape[1])
            if name.endswith(("mlp_out.weight", "attention.output.weight")):
                std *= residual_scale
            elif name == "head.weight":
                std *= 0.1  # close to uniform predictions at the start
            # In place where that is possible: a copy of the largest matrix may be the peak of a run that trains little.
            in_place = parameter.device.type == "cpu" and parameter.dtype == torch.float32
            drawn = parameter.data if in_place else torch.empty(parameter.shape)
            parameter.data.copy_(drawn.normal_(generator=generator).mul_(std))
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        return self

    def redraw_features(self, step: int) -> None:
        """Draw the FAVOR+ projections that optimiser step `step`, counted from 0, trains with."""
        every = self.config.feature_redraw_steps
        if every is not None:
            for module in self.modules():
                if isinstance(module, Favor):
                    module.redraw(step // every)

    def initial_states(self, batch: int, length: int) -> States:
        """States before position 0 of sequences of `length` positions."""
        dtype = self.compute_dtype or self.embedding.weight.dtype
        return [block.attention.initial_state(batch, length, dtype) for block in self._blocks()]

    def forward_chunk(
        self,
        tokens: Tensor,
        start: int,
        states: States,
        *,
        states_are_exit: bool = False,
        documents: Documents | None = None,
        dropout: Dropout = NO_DROPOUT,
    ) -> Chunk:
        """One chunk through all layers.

        Args:
            tokens: (B, C) integers.
            start: absolute position of the chunk's first token.
            states: entry states, one per layer; or exit states if `states_are_exit`, from which each layer recovers its
                entry state by subtraction (policy `reverse`).
            documents: borders inside the rows; None for one document a row.
            dropout: masks of this optimiser step.
        """
        x, place = self.embedded(tokens, start, documents, dropout)
        entries: States = []
        exits: States = []
        for block, state in zip(self._blocks(), states, strict=True):
            x, entry, exit_state = block(x, state, place, dropout, state_is_exit=states_are_exit)
            entries.append(entry)
            exits.append(exit_state)
        return Chunk(self.final_norm(x), entries, exits)

    def advance(
        self,
        tokens: Tensor,
        start: int,
        states: States,
        *,
        documents: Documents | None = None,
        dropout: Dropout = NO_DROPOUT,
    ) -> States:
        """Exit states of a chunk from its entry states, at the least cost: the last layer computes keys and values
        only."""
        x, place = self.embedded(tokens, start, documents, dropout)
        *blocks, last = self._blocks()
        exits: States = []
        for block, state in zip(blocks, states, strict=False):
            x, _, exit_state = block(x, state, place, dropout)
            exits.append(exit_state)
        return [*exits, last.exit_state(x, states[-1], place)]

    def loss(self, hidden: Tensor, targets: Tensor, *, scale: float = 1.0, label_smoothing: float = 0.0) -> Tensor:
        """Scaled sum of cross-entropies in nats over the positions of (B, C) that are not `IGNORED`.

        Scale here, not afterwards, what is to reach the weights (`slim_core.layers.head.head_loss`).
        """
        rows = hidden.flatten(0, 1)
        return head_loss(rows, self._head_weight(), targets.flatten(), smoothing=label_smoothing, scale=scale)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), in float32 at least."""
        logits = linear(hidden, self._head_weight())
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def _blocks(self) -> Sequence[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def embedded(
        self, tokens: Tensor, start: int, documents: Documents | None, dropout: Dropout
    ) -> tuple[Tensor, Place]:
        """Token embeddings with their positions, (B, C, D), and what the layers need to know."""
        config = self.config
        starts, in_documents = (None, None) if documents is None else documents
        positions = in_documents
        if positions is None:
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = embed(tokens, self.embedding.weight)
        if config.scaled_embeddings and config.positions != "concatenated":
            x = x * math.sqrt(config.model_width)  # as large as the positions (Vaswani et al., section 3.4)
        if self.position is not None:
            longest = start + tokens.shape[1] if documents is None else int(positions.max()) + 1
            if longest > self.position.num_embeddings:
                raise ValueError(f"max_positions: the model has learned only {self.position.num_embeddings} positions")
            x = x + embed(positions, self.position.weight)
        elif config.positions == "sinusoidal":
            x = x + sinusoids(positions, config.model_width, x.dtype)
        elif config.positions == "concatenated":
            table = sinusoids(positions, config.model_width // 2, x.dtype)
            x = torch.cat([x, table.expand(*x.shape[:-1], -1)], -1)
        x = x.to(self.compute_dtype or x.dtype)
        turned = None
        if config.positions == "rotary":
            turned = rotation(positions, config.head_width, x.dtype, config.rotary_base, config.rotary_scaling)
        place = Place(start, starts, in_documents, turned)
        return dropout(x, start, layer=-1, site="embedding"), place
