"""Before fine-tuning: linear attention learns to give what the softmax attention in whose place it stands gave.

A Transformer whose attention becomes FAVOR+ keeps its weights, and its layers no longer see what they were trained on.
Here the hidden stream of a sequence runs through the blocks as it did before, with softmax attention over the frozen
weights (the teacher). In each layer the new attention with its adapters (the student) reads the same normalised input;
the loss is what its output differs by, squared and relative to the energy of the teacher's output, as a mean over the
layers. Layers do not wait for each other: each has its input from the teacher, so one layer's graph exists at a time.

The teacher's weights are the student's own frozen ones, under a second module: no copy of them exists. That is why the
student must be adapters (Hu et al., "LoRA"), and why training all weights does not go with it.

Source: the "attention transfer" of Zhang et al., "LoLCATs: On Low-Rank Linearizing of Large Language Models", 2024;
here with FAVOR+ features, which have no weights to train, and adapters in their place.

Legend: B = 1 batch, L positions of a matching sequence, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from slim_core.config import MatchingConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from slim_core.data.dataset import Batch, Windows
from slim_core.layers.attention import Attention, Place
from slim_core.layers.documents import positions_in_documents
from slim_core.layers.dropout import NO_DROPOUT
from slim_core.layers.head import IGNORED
from slim_core.layers.linear import gradients_in_place
from slim_core.layers.softmax import SoftmaxAttention
from slim_core.model import Block, Documents, LanguageModel
from slim_core.optim import learning_rate, make_optimizer
from slim_core.planning.shapes import check_matching
from slim_core.weights.lora import adapters


@dataclass(frozen=True, slots=True)
class MatchingStep:
    """One update of the phase."""

    relative_error: float
    """Squared error of the student's outputs over the energy of the teacher's, mean over the layers; before the
    update. An output of zeros has 1."""
    learning_rate: float


class Matcher:
    """The phase's own optimiser over a model's attention adapters, one update a call.

    Memory: that of one layer over one sequence, and two numbers for each number of these adapters.
    """

    def __init__(self, model: LanguageModel, train: TrainConfig) -> None:
        """Raises ValueError where `train` has no matching or model and adapters do not go with it."""
        if train.matching is None:
            raise ValueError("matching: the run has none")
        check_matching(model.config, train)
        self._model = model
        self._train = train
        self._config: MatchingConfig = train.matching
        self._teachers = [_teacher_of(block, layer) for layer, block in enumerate(_blocks(model))]
        self._trained = list(_attention_adapters(model))
        self.optimizer = make_optimizer(
            model, OptimizerConfig(learning_rate=self._config.learning_rate, weight_decay=0.0), self._trained
        )

    def step(self, number: int, data: Windows, between_layers: Callable[[], None] = lambda: None) -> MatchingStep:
        """Update `number`, counted from 0: a function of it, of the data and of the weights, and of nothing else.

        `between_layers` is called before every layer; may raise to give up the step, which then has changed nothing.
        """
        rate = learning_rate(number, self._config.steps, self._config.learning_rate, ScheduleConfig())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            error = self.add_gradient(matching_sequence(data, number, self._train), between_layers)
            torch.nn.utils.clip_grad_norm_(self._trained, self._train.gradient_clip or math.inf)
            if math.isfinite(error):
                self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=False)
        return MatchingStep(error, rate)

    def add_gradient(self, batch: Batch, between_layers: Callable[[], None] = lambda: None) -> float:
        """Of one sequence, (1, L), added to the adapters' `.grad`; returns the relative error."""
        device = self._model.embedding.weight.device
        tokens, _, starts = batch.to(device)
        documents = None
        if starts is not None:
            documents = Documents(starts if bool(starts.any()) else None, positions_in_documents(starts).long())
        total = 0.0
        with torch.no_grad():
            x, place = self._model.embedded(tokens.long(), 0, documents, NO_DROPOUT)
        for block, teacher in zip(_blocks(self._model), self._teachers, strict=True):
            between_layers()
            with torch.no_grad():
                read = block.attention_input(x)
                wanted = _attended(teacher, read, place)
            with torch.enable_grad(), gradients_in_place():
                error = _relative_error(_attended(block.attention, read, place), wanted)
                (error / len(self._teachers)).backward()  # type: ignore[no-untyped-call]
            total += float(error.detach())
            del error, read
            with torch.no_grad():
                x = block.after_attention(x, wanted, place, NO_DROPOUT)
        return total / len(self._teachers)


def matching_sequence(data: Windows, number: int, train: TrainConfig) -> Batch:
    """Sequence of step `number`, (1, L) at most: the windows of fine-tuning in their order, each in pieces of L.

    What lies behind the last target of a piece may be padding and is cut off; a piece without targets, such as all
    padding or a long prompt, is replaced by the window's first one, as it is.
    """
    length = train.matching_length
    window, piece = divmod(number, train.sequence_length // length)
    batch = data.batch(window, 1)
    for start in (piece * length, 0):
        part = slice(start, start + length)
        with_loss = (batch.targets[0, part] != IGNORED).nonzero()
        if len(with_loss):
            part = slice(start, start + int(with_loss[-1]) + 1)
            break
    starts = batch.document_starts
    return Batch(batch.tokens[:, part], batch.targets[:, part], None if starts is None else starts[:, part])


def _blocks(model: LanguageModel) -> Iterator[Block]:
    for block in model.blocks:
        assert isinstance(block, Block)
        yield block


def _teacher_of(block: Block, layer: int) -> SoftmaxAttention:
    """Softmax attention over the very weights of the block's own, its adapters apart."""
    own = block.attention
    with torch.device("meta"):
        teacher = SoftmaxAttention(replace(own.config, attention="softmax"), layer)
    for name, mine in teacher.named_children():
        base = getattr(own, name)
        assert isinstance(mine, nn.Linear)
        mine.weight, mine.bias = base.weight, base.bias
    return teacher


def _attention_adapters(model: LanguageModel) -> Iterator[nn.Parameter]:
    for name, layer in adapters(model).items():
        if ".attention." in name:
            yield from (layer.lora_A, layer.lora_B)


def _attended(attention: Attention, x: Tensor, place: Place) -> Tensor:
    """The output over a whole sequence, (1, L, D)."""
    out: Tensor = attention(x, attention.initial_state(x.shape[0], x.shape[1], x.dtype), place)[0]
    return out


def _relative_error(got: Tensor, wanted: Tensor) -> Tensor:
    """Of all numbers together, in float32 at least."""
    wide = torch.promote_types(got.dtype, torch.float32)
    return (got.to(wide) - wanted.to(wide)).square().sum() / wanted.to(wide).square().sum()
