"""What a model, an optimiser and a training run are: frozen, validated, free of torch.

Everything that plans (the API among it) reads these classes without importing a tensor library.
Symbols: D model width, H heads, K = D / H head width, M features per head, S layers, F MLP width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, Self

FEATURE_MAPS = ("squared", "relu", "elu1", "favor")
CUSTOM_FEATURE_MAPS: set[str] = set()
"""Names that `slim_core.layers.features.register_feature_map` has added."""

Precision = Literal["float32", "bfloat16"]
Packing = Literal["continuous", "packed", "single"]

BYTE_VOCABULARY = 257
"""256 byte values and one document border (`slim_core.data.tokenizer`)."""


_hints = functools.cache(typing.get_type_hints)


class _Json:
    """`to_json` / `from_json` for the frozen configs; unknown, missing and ill-typed fields are refused by name."""

    def to_json(self) -> dict[str, Any]:
        # `dataclasses.asdict` takes several times as long: it copies what is never changed.
        names = self.__dataclass_fields__  # type: ignore[attr-defined]
        return {name: _plain(getattr(self, name)) for name in names}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        hints = _hints(cls)  # type: ignore[arg-type]  # a class is hashable
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


def _plain(value: Any) -> Any:
    """As JSON has it, but for tuples, which `json` takes for lists."""
    if isinstance(value, _Json):
        return value.to_json()
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


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
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _finite(value, name)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{name}: must be of type {hint.__name__}")
    return value


def _finite(value: float, name: str) -> float:
    """JSON has numbers that no float holds: Python reads 1e999 as infinity, and whole numbers of any size."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    _require(math.isfinite(number), name, "must be a finite number")
    return number


def _require(condition: bool, field_name: str, rule: str) -> None:
    if not condition:
        raise ValueError(f"{field_name}: {rule}")


@dataclass(frozen=True, slots=True)
class RotaryScalingConfig(_Json):
    """How the angles of rotary positions are slowed down for texts longer than those of the first training."""

    name: Literal["linear", "llama3"]
    """All by `factor`; or, as in Llama 3.1, slow ones by it, fast ones not at all and those between by degrees."""
    factor: float
    low_frequency_factor: float = 1.0
    """llama3 only, and so below: turns within `original_positions` up to which `factor` counts in full."""
    high_frequency_factor: float = 4.0
    """Turns from which on nothing changes."""
    original_positions: int = 8_192

    def __post_init__(self) -> None:
        _require(self.factor >= 1, "factor", "must be at least 1")
        _require(
            0 < self.low_frequency_factor < self.high_frequency_factor,
            "low_frequency_factor",
            "must be above 0 and below high_frequency_factor",
        )
        _require(self.original_positions >= 1, "original_positions", "must be at least 1")


@dataclass(frozen=True, slots=True)
class ModelConfig(_Json):
    """A causal language model of linear attention. The only description of a model anywhere in the project."""

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
    attention: Literal["performer", "gated", "softmax"] = "performer"
    """Linear attention of positive features; linear attention that decays by a learned gate; or softmax attention,
    whose state is the keys and values so far."""
    num_kv_heads: int | None = None
    """G, heads of keys and values, each shared by H / G query heads (Ainslie et al., "GQA", 2023). None means H."""
    feature_map: str = "squared"
    """g(.) of the performer: x^2, relu(x), elu(x) + 1, FAVOR+ positive orthogonal random features (`favor`), or one
    that was registered."""
    num_features: int | None = None
    """M, features per head; squared, ReLU and ELU have M = K. None means K."""
    feature_seed: int = 0
    """Seed of the FAVOR+ projection, which is drawn from it and saved with the weights."""
    feature_redraw_steps: int | None = None
    """Optimiser steps after which FAVOR+ draws its projection afresh, from seed and step; None for never."""
    norm: Literal["pre", "post", "branch"] = "pre"
    """Layer normalisation before each sub-layer (and once before the head), after each residual sum, or of each
    sub-layer's output before it is added (the published SLiM code's language models)."""
    norm_type: Literal["layer", "rms"] = "layer"
    """Layer normalisation; or RMS normalisation, which subtracts no mean and has no bias (Zhang and Sennrich, 2019)."""
    norm_epsilon: float = 1e-5
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu"
    """Of the MLP: GELU, its approximation by tanh, or SwiGLU, which has a third matrix."""
    mlp_bias: bool = True
    """Biases of the MLP."""
    positions: Literal["sinusoidal", "concatenated", "learned", "rotary", "none"] = "sinusoidal"
    """Sines and cosines added to the token embedding; concatenated with one of half the width (the published SLiM
    code); a learned vector added; queries and keys rotated before the feature map; or none."""
    max_positions: int | None = None
    """Longest document, for learned positions only."""
    rotary_base: float = 10_000.0
    """Of the angles of rotary positions: position / base^(2 i / K)."""
    rotary_scaling: RotaryScalingConfig | None = None
    output_projection: bool = True
    """A D x D projection after attention. The paper's layer has none."""
    output_bias: bool = False
    """A bias of that projection."""
    attention_bias: bool = False
    """Biases of queries, keys and values."""
    scaled_embeddings: bool = True
    """Token embeddings are multiplied by sqrt(D), as large as sines and cosines (Vaswani et al., section 3.4)."""
    tied_embeddings: bool = False
    """The head reads the embedding's matrix."""
    attention_epsilon: float = 1e-6
    """Added to the attention normaliser, the same everywhere: squared features can bring it close to zero."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "model_width", "num_heads", "mlp_width", "vocab_size"):
            _require(getattr(self, name) >= 1, name, "must be at least 1")
        _require(
            self.model_width % self.num_heads == 0, "model_width", f"must be a multiple of num_heads ({self.num_heads})"
        )
        _require(self.vocab_size < 2**31, "vocab_size", "must be below 2^31")
        _require(self.attention_epsilon > 0, "attention_epsilon", "must be positive")
        _require(self.norm_epsilon > 0, "norm_epsilon", "must be positive")
        _require(
            self.num_kv_heads is None or (self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads == 0),
            "num_kv_heads",
            f"must divide num_heads ({self.num_heads})",
        )
        _require(
            self.kv_heads == self.num_heads or self.attention != "gated",
            "num_kv_heads",
            "gated attention has as many as query heads",
        )
        _require(self.output_projection or not self.output_bias, "output_bias", "needs output_projection")
        self._check_features()
        self._check_positions()

    def _check_features(self) -> None:
        known = [*FEATURE_MAPS, *sorted(CUSTOM_FEATURE_MAPS)]
        _require(self.feature_map in known, "feature_map", f"must be one of {', '.join(known)}, or registered before")
        _require(
            self.num_features is None or self.feature_map not in ("squared", "relu", "elu1"),
            "num_features",
            "only the favor feature map can choose it; the others have as many features as the head is wide",
        )
        _require(self.num_features is None or self.num_features >= 1, "num_features", "must be at least 1")
        _require(
            self.feature_redraw_steps is None or self.feature_map == "favor",
            "feature_redraw_steps",
            "only the favor feature map has something to draw",
        )
        _require(self.feature_redraw_steps is None or self.feature_redraw_steps >= 1, "feature_redraw_steps", ">= 1")

    def _check_positions(self) -> None:
        _require(self.model_width % 2 == 0, "model_width", "must be even: half sines, half cosines of the position")
        _require(
            self.positions != "concatenated" or self.model_width % 4 == 0,
            "model_width",
            "must be a multiple of 4 where positions are concatenated: half of it is theirs",
        )
        _require(
            self.positions != "concatenated" or not self.tied_embeddings,
            "tied_embeddings",
            "impossible with concatenated positions: the embedding has half the head's width",
        )
        _require(self.positions != "rotary" or self.head_width % 2 == 0, "num_heads", "rotary needs an even head width")
        _require(self.rotary_base > 0, "rotary_base", "must be positive")
        _require(
            self.rotary_scaling is None or self.positions == "rotary", "rotary_scaling", "goes with rotary positions"
        )
        _require(
            (self.max_positions is not None) == (self.positions == "learned"),
            "max_positions",
            "goes with learned positions, and only with them",
        )
        _require(self.max_positions is None or self.max_positions >= 1, "max_positions", "must be at least 1")

    @property
    def head_width(self) -> int:
        """K."""
        return self.model_width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.num_kv_heads or self.num_heads

    @property
    def kv_width(self) -> int:
        """Width of all keys, and of all values, of one position: G * K."""
        return self.kv_heads * self.head_width

    @property
    def features_per_head(self) -> int:
        """M."""
        if self.attention == "gated":
            return self.head_width
        return self.num_features or self.head_width

    @property
    def state_size(self) -> int:
        """Numbers in the attention state of one sequence in one layer: H * M * (K + 1) of a performer. That of softmax
        attention grows with the sequence: 2 * G * K numbers a position, which this does not count."""
        match self.attention:
            case "performer":
                return self.num_heads * self.features_per_head * (self.head_width + 1)
            case "gated":
                return self.num_heads * self.features_per_head * self.head_width
            case "softmax":
                return 0

    @property
    def embedding_width(self) -> int:
        """Width of a token's own embedding."""
        return self.model_width // 2 if self.positions == "concatenated" else self.model_width

    @property
    def mlp_in_width(self) -> int:
        """Width of the MLP's first matrix product: the gate's as well for SwiGLU."""
        return self.mlp_width * (2 if self.activation == "swiglu" else 1)

    @property
    def num_parameters(self) -> int:
        """Trained numbers of the model itself, the FAVOR+ projection not among them."""
        d, f, v = self.model_width, self.mlp_width, self.vocab_size
        attention = d * d + 2 * d * self.kv_width + (d * d if self.output_projection else 0)
        attention += (d + 2 * self.kv_width if self.attention_bias else 0) + (d if self.output_bias else 0)
        if self.attention == "gated":
            attention += d * self.num_heads + self.num_heads + d * d + self.head_width
        mlp = d * self.mlp_in_width + f * d + (self.mlp_in_width + d if self.mlp_bias else 0)
        norm = d if self.norm_type == "rms" else 2 * d
        final_norm = norm if self.norm == "pre" else 0
        embedding = v * self.embedding_width + (self.max_positions or 0) * d
        head = 0 if self.tied_embeddings else v * d
        return self.num_layers * (attention + mlp + 2 * norm) + final_norm + embedding + head


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
    """The rule of an update; weight decay on matrices only, not on biases, norms and embeddings."""

    name: Literal["adamw", "adafactor", "sgd"] = "adamw"
    """AdamW (Loshchilov and Hutter, ICLR 2019), Adafactor (Shazeer and Stern, ICML 2018) or SGD with momentum."""
    learning_rate: float = 1e-3
    """Peak of the schedule."""
    weight_decay: float = 0.01
    beta1: float = 0.9
    """AdamW only."""
    beta2: float = 0.98
    """AdamW only."""
    epsilon: float = 1e-8
    """AdamW only."""
    momentum: float = 0.9
    """SGD only."""

    def __post_init__(self) -> None:
        _require(0 < self.learning_rate <= 10, "learning_rate", "must be above 0 and at most 10")
        _require(0 <= self.weight_decay < 10, "weight_decay", "must be at least 0 and below 10")
        _require(0 <= self.beta1 < 1, "beta1", "must be at least 0 and below 1")
        _require(0 <= self.beta2 < 1, "beta2", "must be at least 0 and below 1")
        _require(0 < self.epsilon < 1, "epsilon", "must be above 0 and below 1")
        _require(0 <= self.momentum < 1, "momentum", "must be at least 0 and below 1")


@dataclass(frozen=True, slots=True)
class LoraConfig(_Json):
    """Low-rank adapters (Hu et al., "LoRA", ICLR 2022): W + alpha / rank * B A, only A and B trained."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "key_value")
    """Linear layers of a block by name: query, key_value, output, mlp_in, mlp_out; gate and decay of gated ones."""

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "rank", "must be at least 1")
        _require(self.alpha > 0, "alpha", "must be positive")
        _require(len(self.targets) > 0, "targets", "must name at least one linear layer")


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
class MatchingConfig(_Json):
    """A phase before fine-tuning, in which FAVOR+ attention learns to give what softmax attention gave with the same
    weights (`slim_core.matching`): AdamW on the adapters of attention, one sequence a step, half a cosine down to a
    tenth of the learning rate."""

    steps: int
    """Updates of the phase; those of `TrainConfig.steps` come after them."""
    learning_rate: float = 1e-3
    sequence_length: int = 512
    """L, tokens of one matching sequence; T where that is shorter."""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "matching.steps", "must be at least 1")
        _require(0 < self.learning_rate <= 10, "matching.learning_rate", "must be above 0 and at most 10")
        _require(self.sequence_length >= 1, "matching.sequence_length", "must be at least 1")


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
    lora: LoraConfig | None = None
    """Train adapters in place of the model's own weights."""
    matching: MatchingConfig | None = None
    """What comes before the first step of a Transformer with FAVOR+ attention; needs adapters on its attention."""
    precision: Precision = "float32"
    """Of matrix products and activations. Weights, states, normalisers and the loss stay in float32."""
    dropout: float = 0.0
    """Share of channels set to zero after the embedding, each attention and each MLP."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread evenly over the vocabulary."""
    packing: Packing = "continuous"
    """How documents become sequences of T tokens. Cut from all of them in a row, attention seeing the end of the one
    before; the same, but attention and positions start afresh with each document; or one document a sequence, the rest
    of which has no loss, and documents longer than T in several."""
    validation_fraction: float | None = None
    """Share of the documents, drawn by the seed, that is kept from training, for validation losses."""
    compile: bool = False
    """Let torch.compile generate code for what lies between matrix products; falls back with a warning."""
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
        for name in ("dropout", "label_smoothing"):
            _require(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")
        _require(
            self.validation_fraction is None or 0 < self.validation_fraction <= 0.5,
            "validation_fraction",
            "must be above 0 and at most 0.5",
        )
        _require(self.gradient_clip is None or self.gradient_clip > 0, "gradient_clip", "must be positive")
        _require(
            self.early_stopping is None or self.evaluate_every is not None, "early_stopping", "needs evaluate_every"
        )
        _require(0 <= self.seed < 2**63, "seed", "must be at least 0 and below 2^63")

    @property
    def matching_length(self) -> int:
        """L; 0 without a phase of matching."""
        return 0 if self.matching is None else min(self.matching.sequence_length, self.sequence_length)
