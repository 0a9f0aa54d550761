"""What a model, an optimiser and a training run are: frozen, validated, free of torch.

Everything that plans (the API among it) reads these classes without importing a tensor library.
Symbols: D model width, H heads, K = D / H head width, M features per head, S layers, F MLP width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, Self

FeatureMap = Literal["squared", "relu", "elu1", "favor"]
FEATURE_MAPS: tuple[FeatureMap, ...] = typing.get_args(FeatureMap)

BYTE_VOCABULARY = 257
"""256 byte values and one document border (`slim_core.data.tokenizer`)."""


class _Json:
    """`to_json` / `from_json` for the frozen configs; unknown, missing and ill-typed fields are refused by name."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        hints = typing.get_type_hints(cls)
        unknown = sorted(set(data) - set(hints))
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown field {unknown[0]!r}")
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        required = {
            f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        if missing := sorted(required - set(data)):
            raise ValueError(f"{cls.__name__}: missing field {missing[0]!r}")
        return cls(**{name: _convert(hints[name], value, name) for name, value in data.items()})


def _convert(hint: Any, value: Any, name: str) -> Any:
    """`value` as `hint`, descending into configs; the types that these classes use, and no others."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if value is None and len(options) < len(typing.get_args(hint)):
            return None
        (hint,) = options
        origin = typing.get_origin(hint)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{name}: must be one of {', '.join(map(str, typing.get_args(hint)))}")
        return value
    if origin is tuple:
        (item_hint, _) = typing.get_args(hint)  # tuple[X, ...]
        return tuple(_convert(item_hint, item, name) for item in value)
    if isinstance(hint, type) and issubclass(hint, _Json):
        if not isinstance(value, dict):
            raise ValueError(f"{name}: must be an object")
        return hint.from_json(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{name}: must be of type {hint.__name__}")
    return value


def _require(condition: bool, field_name: str, rule: str) -> None:
    if not condition:
        raise ValueError(f"{field_name}: {rule}")


@dataclass(frozen=True, slots=True)
class ModelConfig(_Json):
    """A causal linear-attention model (Performer). The only description of a model anywhere in the project."""

    num_layers: int
    """S, number of blocks."""
    model_width: int
    """D, width of the residual stream; even, and a multiple of `num_heads`."""
    num_heads: int
    """H."""
    mlp_width: int
    """F, inner width of the MLP."""
    vocab_size: int = BYTE_VOCABULARY
    """V."""
    feature_map: FeatureMap = "squared"
    """g(.) of linear attention: x^2, relu(x), elu(x) + 1, or FAVOR+ positive orthogonal random features."""
    num_features: int | None = None
    """M, features per head; only FAVOR+ may set it, the others have M = K. None means K."""
    feature_seed: int = 0
    """Seed of the FAVOR+ projection, which is drawn from it and saved with the weights."""
    norm: Literal["pre", "post"] = "pre"
    """Layer normalisation before each sub-layer (and once before the head), or after each residual sum."""
    output_projection: bool = True
    """A D x D projection after attention. The paper's layer has none."""
    attention_epsilon: float = 1e-6
    """Added to the attention normaliser, the same everywhere: squared features can bring it close to zero."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "model_width", "num_heads", "mlp_width", "vocab_size"):
            _require(getattr(self, name) >= 1, name, "must be at least 1")
        _require(
            self.model_width % self.num_heads == 0, "model_width", f"must be a multiple of num_heads ({self.num_heads})"
        )
        _require(self.model_width % 2 == 0, "model_width", "must be even: half sines, half cosines of the position")
        _require(self.vocab_size <= 65_535, "vocab_size", "must be at most 65535: token files hold 16-bit tokens")
        _require(self.feature_map in FEATURE_MAPS, "feature_map", f"must be one of {', '.join(FEATURE_MAPS)}")
        _require(self.norm in ("pre", "post"), "norm", "must be pre or post")
        _require(
            self.num_features is None or self.feature_map == "favor",
            "num_features",
            "only the favor feature map can choose it; the others have as many features as the head is wide",
        )
        _require(self.num_features is None or self.num_features >= 1, "num_features", "must be at least 1")
        _require(self.attention_epsilon > 0, "attention_epsilon", "must be positive")

    @property
    def head_width(self) -> int:
        """K."""
        return self.model_width // self.num_heads

    @property
    def features_per_head(self) -> int:
        """M."""
        return self.num_features or self.head_width

    @property
    def state_size(self) -> int:
        """Numbers in the attention state of one sequence in one layer: H * M * (K + 1)."""
        return self.num_heads * self.features_per_head * (self.head_width + 1)

    @property
    def num_parameters(self) -> int:
        """Trained numbers, the FAVOR+ projection not among them."""
        d, f, v = self.model_width, self.mlp_width, self.vocab_size
        block = 3 * d * d + 2 * d * f + f + d + 4 * d + (d * d if self.output_projection else 0)
        final_norm = 2 * d if self.norm == "pre" else 0
        return self.num_layers * block + final_norm + 2 * v * d


BUILTIN_MODELS: dict[str, ModelConfig] = {
    # The paper's configurations: copying task, Penn Treebank, enwik8 (section 4 and appendix).
    "performer-tiny": ModelConfig(num_layers=1, model_width=256, num_heads=4, mlp_width=1024, output_projection=False),
    "performer-ptb": ModelConfig(num_layers=3, model_width=512, num_heads=8, mlp_width=2048, output_projection=False),
    "performer-enwik8": ModelConfig(
        num_layers=3, model_width=1024, num_heads=16, mlp_width=4096, output_projection=False
    ),
}


@dataclass(frozen=True, slots=True)
class OptimizerConfig(_Json):
    """AdamW (Loshchilov and Hutter, ICLR 2019); decay on matrices only, not on biases, norms and embeddings."""

    name: Literal["adamw"] = "adamw"
    learning_rate: float = 1e-3
    """Peak of the schedule."""
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        _require(0 < self.learning_rate <= 10, "learning_rate", "must be above 0 and at most 10")
        _require(0 <= self.weight_decay < 10, "weight_decay", "must be at least 0 and below 10")
        _require(0 <= self.beta1 < 1, "beta1", "must be at least 0 and below 1")
        _require(0 <= self.beta2 < 1, "beta2", "must be at least 0 and below 1")
        _require(0 < self.epsilon < 1, "epsilon", "must be above 0 and below 1")


@dataclass(frozen=True, slots=True)
class ScheduleConfig(_Json):
    """Learning rate over steps: linear warm-up, then constant or a half cosine down to `final_fraction` of the peak."""

    name: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        _require(self.warmup_steps >= 0, "warmup_steps", "must be at least 0")
        _require(0 <= self.final_fraction <= 1, "final_fraction", "must be between 0 and 1")


@dataclass(frozen=True, slots=True)
class EarlyStoppingConfig(_Json):
    """Stop after `patience` evaluations in a row that improve the best validation loss by less than `min_delta`."""

    patience: int = 3
    min_delta: float = 0.0
    """Nats per token."""

    def __post_init__(self) -> None:
        _require(self.patience >= 1, "patience", "must be at least 1")
        _require(self.min_delta >= 0, "min_delta", "must be at least 0")


@dataclass(frozen=True, slots=True)
class TrainConfig(_Json):
    """One training run, apart from model, data and plan. Nothing here depends on the memory cap."""

    sequence_length: int
    """T, tokens per sequence."""
    batch_size: int
    """Sequences per optimiser step."""
    steps: int
    """Optimiser steps."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    gradient_clip: float | None = 1.0
    """Largest global norm of the gradient; None for no clipping."""
    evaluate_every: int | None = None
    """Steps between validation losses (and one at the end); None for none."""
    evaluate_sequences: int = 8
    """Validation sequences of length T per evaluation, at most."""
    checkpoint_every: int | None = None
    """Steps between checkpoints (and one at the end); None for one every five minutes."""
    early_stopping: EarlyStoppingConfig | None = None
    seed: int = 0
    """Of the initial weights and the order of the data."""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "batch_size", "steps", "evaluate_sequences"):
            _require(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("evaluate_every", "checkpoint_every"):
            _require(getattr(self, name) is None or getattr(self, name) >= 1, name, "must be at least 1")
        _require(self.gradient_clip is None or self.gradient_clip > 0, "gradient_clip", "must be positive")
        _require(
            self.early_stopping is None or self.evaluate_every is not None, "early_stopping", "needs evaluate_every"
        )
        _require(0 <= self.seed < 2**63, "seed", "must be at least 0 and below 2^63")
