"""Which tensors a model file has, by name and shape, and which rows of our parameters each one is. Free of torch.

One table serves for checking headers, for loading and for writing. Legend: D model width, F MLP width, G * K width of
keys, V vocabulary. Matrices of ours are (outputs, inputs); GPT-2's file has most of them the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from slim_core.config import ModelConfig
from slim_core.weights.layout import Layout

PREFIXES: dict[Layout, str] = {"slimtune": "", "llama": "model.", "gpt2": "transformer."}
"""What stands before the names of all tensors but the head's; files of the bare model lack it."""
_UNPREFIXED = frozenset({"lm_head.weight"})
TIED: dict[Layout, tuple[str, str]] = {
    "llama": ("lm_head.weight", "embed_tokens.weight"),
    "gpt2": ("lm_head.weight", "wte.weight"),
}
"""Short names of head and embeddings: a file may have both though they are tied, if they are equal."""
_IGNORED = re.compile(r"h\.\d+\.attn\.(masked_)?bias|(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Constants that older files have among their weights: GPT-2's causal mask, the frequencies of rotary positions."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows (numbers, of a vector) of one of our parameters."""

    parameter: str
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor of a model file."""

    name: str
    shape: tuple[int, ...]
    """In the file."""
    parts: tuple[Rows, ...]
    """What it consists of, in the order of its rows; of its columns if `transposed`."""
    transposed: bool = False


def tensor_table(layout: Layout, config: ModelConfig) -> dict[str, FileTensor]:
    """The tensors of a model in a layout, by name without prefix (`short_name`).

    The buffers of a FAVOR+ performer are in none of the foreign layouts.
    """
    match layout:
        case "slimtune":
            tensors = _own(config)
        case "llama":
            tensors = _llama(config)
        case "gpt2":
            tensors = _gpt2(config)
    return {short_name(layout, tensor.name): tensor for tensor in tensors}


def short_name(layout: Layout, name: str) -> str:
    """A tensor's name without the layout's prefix, which it may lack."""
    return name.removeprefix(PREFIXES[layout])


def is_ignored(layout: Layout, short: str) -> bool:
    """Whether a tensor of this short name is a constant that the model has without it."""
    return layout != "slimtune" and _IGNORED.fullmatch(short) is not None


def _tensor(layout: Layout, name: str, shape: tuple[int, ...], *parts: Rows, transposed: bool = False) -> FileTensor:
    full = name if name in _UNPREFIXED else PREFIXES[layout] + name
    return FileTensor(full, shape, parts, transposed)


def _llama(config: ModelConfig) -> Iterator[FileTensor]:
    D, F, V = config.model_width, config.mlp_width, config.vocab_size

    def whole(name: str, parameter: str, *shape: int) -> FileTensor:
        return _tensor("llama", name, shape, Rows(parameter, 0, shape[0]))

    def projection(
        name: str, parameter: str, first: int, outputs: int, inputs: int, *, bias: bool
    ) -> Iterator[FileTensor]:
        yield _tensor("llama", f"{name}.weight", (outputs, inputs), Rows(f"{parameter}.weight", first, outputs))
        if bias:
            yield _tensor("llama", f"{name}.bias", (outputs,), Rows(f"{parameter}.bias", first, outputs))

    yield whole("embed_tokens.weight", "embedding.weight", V, D)
    for layer in range(config.num_layers):
        theirs, ours = f"layers.{layer}", f"blocks.{layer}"
        yield whole(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight", D)
        bias, keys = config.attention_bias, config.kv_width
        yield from projection(f"{theirs}.self_attn.q_proj", f"{ours}.attention.query", 0, D, D, bias=bias)
        for name, first in (("k_proj", 0), ("v_proj", keys)):
            yield from projection(
                f"{theirs}.self_attn.{name}", f"{ours}.attention.key_value", first, keys, D, bias=bias
            )
        yield from projection(
            f"{theirs}.self_attn.o_proj", f"{ours}.attention.output", 0, D, D, bias=config.output_bias
        )
        yield whole(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.weight", D)
        for name, first in (("gate_proj", 0), ("up_proj", F)):
            yield from projection(f"{theirs}.mlp.{name}", f"{ours}.mlp_in", first, F, D, bias=config.mlp_bias)
        yield from projection(f"{theirs}.mlp.down_proj", f"{ours}.mlp_out", 0, D, F, bias=config.mlp_bias)
    yield whole("norm.weight", "final_norm.weight", D)
    if not config.tied_embeddings:
        yield whole("lm_head.weight", "head.weight", V, D)


def _gpt2(config: ModelConfig) -> Iterator[FileTensor]:
    D, F, V = config.model_width, config.mlp_width, config.vocab_size

    def whole(name: str, parameter: str, *shape: int) -> FileTensor:
        return _tensor("gpt2", name, shape, Rows(parameter, 0, shape[0]))

    def convolution(name: str, inputs: int, **parts: int) -> Iterator[FileTensor]:
        """Their Conv1D is a linear layer whose matrix is (inputs, outputs)."""
        outputs = sum(parts.values())
        weights = [Rows(f"{ours}.{parameter}.weight", 0, count) for parameter, count in parts.items()]
        biases = [Rows(f"{ours}.{parameter}.bias", 0, count) for parameter, count in parts.items()]
        yield _tensor("gpt2", f"{theirs}.{name}.weight", (inputs, outputs), *weights, transposed=True)
        yield _tensor("gpt2", f"{theirs}.{name}.bias", (outputs,), *biases)

    yield whole("wte.weight", "embedding.weight", V, D)
    yield whole("wpe.weight", "position.weight", config.max_positions or 0, D)
    for layer in range(config.num_layers):
        theirs, ours = f"h.{layer}", f"blocks.{layer}"
        for name, parameter in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
            for kind in ("weight", "bias"):
                yield whole(f"{theirs}.{name}.{kind}", f"{ours}.{parameter}.{kind}", D)
        yield from convolution("attn.c_attn", D, **{"attention.query": D, "attention.key_value": 2 * D})
        yield from convolution("attn.c_proj", D, **{"attention.output": D})
        yield from convolution("mlp.c_fc", D, mlp_in=F)
        yield from convolution("mlp.c_proj", F, mlp_out=D)
    for kind in ("weight", "bias"):
        yield whole(f"ln_f.{kind}", f"final_norm.{kind}", D)
    if not config.tied_embeddings:
        yield whole("lm_head.weight", "head.weight", V, D)


def _own(config: ModelConfig) -> Iterator[FileTensor]:
    for name, shape in _own_shapes(config):
        yield FileTensor(name, shape, (Rows(name, 0, shape[0]),))


def _own_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, V = config.model_width, config.vocab_size
    yield "embedding.weight", (V, config.embedding_width)
    if config.max_positions is not None:
        yield "position.weight", (config.max_positions, D)
    for layer in range(config.num_layers):
        yield from ((f"blocks.{layer}.{name}", shape) for name, shape in _block_shapes(config))
    if config.norm == "pre":
        yield from _norm("final_norm", config)
    if not config.tied_embeddings:
        yield "head.weight", (V, D)


def _block_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, F, H = config.model_width, config.mlp_width, config.num_heads
    yield from _norm("attention_norm", config)
    yield from _linear("attention.query", D, D, bias=config.attention_bias)
    yield from _linear("attention.key_value", 2 * config.kv_width, D, bias=config.attention_bias)
    if config.output_projection:
        yield from _linear("attention.output", D, D, bias=config.output_bias)
    if config.attention == "performer" and config.feature_map == "favor":
        yield "attention.features.projection", (config.features_per_head, config.head_width)
    if config.attention == "gated":
        yield from _linear("attention.decay", H, D, bias=True)
        yield from _linear("attention.gate", D, D, bias=False)
        yield "attention.head_norm", (config.head_width,)
    yield from _norm("mlp_norm", config)
    yield from _linear("mlp_in", config.mlp_in_width, D, bias=config.mlp_bias)
    yield from _linear("mlp_out", D, F, bias=config.mlp_bias)


def _linear(name: str, outputs: int, inputs: int, *, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _norm(name: str, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (config.model_width,)
    if config.norm_type == "layer":
        yield f"{name}.bias", (config.model_width,)
