"""config.json of a model folder: ours (a ModelConfig), or that of the `transformers` library. Free of torch and numpy.

Four architectures of that library are the same functions as a ModelConfig's: Llama (SmolLM2 among others), Mistral,
Qwen2 and GPT-2. What the conversion cannot express exactly is refused by the name of its field; fields that a
calculation without dropout does not read are ignored.

Source of fields and defaults: transformers' configuration_llama.py, configuration_mistral.py, configuration_qwen2.py,
configuration_gpt2.py and modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

from slim_core.config import ModelConfig, RotaryScalingConfig

Layout = Literal["slimtune", "llama", "gpt2"]
"""How tensors are named: as ours, as Llama's (Mistral's and Qwen2's are the same), or as GPT-2's."""

LAYOUTS: dict[str, Layout] = {"llama": "llama", "mistral": "llama", "qwen2": "llama", "gpt2": "gpt2"}
"""By `model_type`."""

_KV_HEADS = {"llama": None, "mistral": 8, "qwen2": 32}
"""Where the file does not say; None means as many as query heads."""
_MISTRAL_WINDOW = 4_096
_MISTRAL_POSITIONS = 131_072
_GPT2_ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh"]] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}
_T = TypeVar("_T")


def is_foreign(data: dict[str, Any]) -> bool:
    """Whether a config.json is one of transformers' rather than ours."""
    return "model_type" in data or "architectures" in data


def layout_of(data: dict[str, Any]) -> Layout:
    """Raises ValueError, naming the field."""
    if not is_foreign(data):
        return "slimtune"
    model_type = _get(data, "model_type", str)
    if model_type not in LAYOUTS:
        raise ValueError(f"model_type: {model_type!r} is not supported; {', '.join(LAYOUTS)} are")
    return LAYOUTS[model_type]


def model_config(data: dict[str, Any]) -> ModelConfig:
    """The model that a config.json describes, with softmax attention where it is one of transformers'.

    Raises ValueError, naming the field, for what a ModelConfig cannot express exactly.
    """
    match layout_of(data):
        case "slimtune":
            return ModelConfig.from_json(data)
        case "llama":
            _refuse_quantised(data)
            return _llama(data, data["model_type"])
        case "gpt2":
            _refuse_quantised(data)
            return _gpt2(data)


def written_config(data: dict[str, Any], dtype: str) -> dict[str, Any]:
    """transformers' config.json of a model that came with `data`, its weights now in `dtype` ("float32")."""
    written = {key: value for key, value in data.items() if key not in ("dtype", "torch_dtype")}
    # Readers before version 5 know only the first name, later ones both.
    return {**written, "torch_dtype": dtype}


def _llama(data: dict[str, Any], model_type: str) -> ModelConfig:
    heads = _get(data, "num_attention_heads", int)
    width = _get(data, "hidden_size", int)
    positive = {"num_attention_heads": heads, "hidden_size": width}
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"{name}: must be at least 1")
    head_dim = _optional(data, "head_dim", int, None)
    if head_dim is not None and head_dim * heads != width:
        raise ValueError(
            f"head_dim: {head_dim}; only hidden_size / num_attention_heads ({width} / {heads}) is supported"
        )
    if (activation := _optional(data, "hidden_act", str, "silu")) not in ("silu", "swish"):
        raise ValueError(f"hidden_act: {activation!r} is not supported, only silu")
    _refuse_windows(data, model_type)
    # Llama's flag is for all four projections; Qwen2 has biases in three whatever the file says, Mistral none.
    bias = _optional(data, "attention_bias", bool, default=False) if model_type == "llama" else False
    base, scaling = _rotary(data)
    return ModelConfig(
        num_layers=_get(data, "num_hidden_layers", int),
        model_width=width,
        num_heads=heads,
        mlp_width=_get(data, "intermediate_size", int),
        vocab_size=_get(data, "vocab_size", int),
        attention="softmax",
        num_kv_heads=_kv_heads(data, model_type, heads),
        norm="pre",
        norm_type="rms",
        norm_epsilon=float(_optional(data, "rms_norm_eps", float, 1e-6)),
        activation="swiglu",
        mlp_bias=_optional(data, "mlp_bias", bool, default=False) if model_type == "llama" else False,
        positions="rotary",
        rotary_base=base,
        rotary_scaling=scaling,
        output_projection=True,
        output_bias=bias,
        attention_bias=bias or model_type == "qwen2",
        scaled_embeddings=False,
        tied_embeddings=_optional(data, "tie_word_embeddings", bool, default=False),
    )


def _gpt2(data: dict[str, Any]) -> ModelConfig:
    for name, needed in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if _optional(data, name, bool, needed) != needed:
            raise ValueError(f"{name}: only {str(needed).lower()} is supported")
    activation = _optional(data, "activation_function", str, "gelu_new")
    if activation not in _GPT2_ACTIVATIONS:
        known = ", ".join(_GPT2_ACTIVATIONS)
        raise ValueError(f"activation_function: {activation!r} is not supported; {known} are")
    width = _get(data, "n_embd", int)
    return ModelConfig(
        num_layers=_get(data, "n_layer", int),
        model_width=width,
        num_heads=_get(data, "n_head", int),
        mlp_width=_optional(data, "n_inner", int, None) or 4 * width,
        vocab_size=_get(data, "vocab_size", int),
        attention="softmax",
        norm="pre",
        norm_type="layer",
        norm_epsilon=float(_optional(data, "layer_norm_epsilon", float, 1e-5)),
        activation=_GPT2_ACTIVATIONS[activation],
        mlp_bias=True,
        positions="learned",
        max_positions=_get(data, "n_positions", int),
        output_projection=True,
        output_bias=True,
        attention_bias=True,
        scaled_embeddings=False,
        tied_embeddings=_optional(data, "tie_word_embeddings", bool, default=True),
    )


def _kv_heads(data: dict[str, Any], model_type: str, heads: int) -> int | None:
    count: int | None = _KV_HEADS[model_type]
    if "num_key_value_heads" in data:
        count = _optional(data, "num_key_value_heads", int, None)
    if count is None or count == heads:
        return None
    if count < 1 or heads % count:
        raise ValueError(f"num_key_value_heads: {count} does not divide num_attention_heads ({heads})")
    return count


def _rotary(data: dict[str, Any]) -> tuple[float, RotaryScalingConfig | None]:
    """Base and scaling. transformers 5 has both in `rope_parameters`, versions before it in `rope_theta` and
    `rope_scaling`."""
    field = "rope_scaling" if data.get("rope_scaling") else "rope_parameters"
    parameters: dict[str, Any] = _optional(data, field, dict, {})
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ValueError(f"{field}: other positions in some layers than in others are not supported")
    fraction = parameters.get("partial_rotary_factor", data.get("partial_rotary_factor", 1.0))
    if fraction not in (None, 1):
        raise ValueError(f"partial_rotary_factor: {fraction} is not supported, only 1")
    try:
        base = float(_optional(parameters, "rope_theta", float, _optional(data, "rope_theta", float, 10_000.0)))
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        match kind:
            case "default":
                return base, None
            case "linear":
                return base, RotaryScalingConfig("linear", float(_get(parameters, "factor", float)))
            case "llama3":
                return base, RotaryScalingConfig(
                    "llama3",
                    factor=float(_get(parameters, "factor", float)),
                    low_frequency_factor=float(_get(parameters, "low_freq_factor", float)),
                    high_frequency_factor=float(_get(parameters, "high_freq_factor", float)),
                    original_positions=_get(parameters, "original_max_position_embeddings", int),
                )
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    raise ValueError(f"{field}: rope_type {kind!r} is not supported; default, linear and llama3 are")


def _refuse_windows(data: dict[str, Any], model_type: str) -> None:
    """Attention that sees only so many positions back is another function than ours, unless no sequence is longer."""
    if model_type == "llama":
        return
    window = data.get("sliding_window", _MISTRAL_WINDOW if model_type == "mistral" else None)
    if model_type == "qwen2":
        layers = _optional(data, "layer_types", list, None)
        if layers is not None:
            used = "sliding_attention" in layers
        else:
            first = _optional(data, "max_window_layers", int, 28)
            layers_in_all = _get(data, "num_hidden_layers", int)
            used = _optional(data, "use_sliding_window", bool, default=False) and first < layers_in_all
        window = window if used else None
    longest = _optional(data, "max_position_embeddings", int, _MISTRAL_POSITIONS)
    if window is not None and not (isinstance(window, int) and window >= longest):
        raise ValueError(
            f"sliding_window: {window} of {longest} positions; attention here sees all of them. With null in its place "
            f"the model is the same for sequences of up to {window} tokens"
        )


def _refuse_quantised(data: dict[str, Any]) -> None:
    if data.get("quantization_config") is not None:
        raise ValueError("quantization_config: only weights of float32, float16, bfloat16 or float64 are supported")


def _get(data: dict[str, Any], name: str, kind: type[_T]) -> _T:
    if name not in data:
        raise ValueError(f"{name}: missing")
    return _typed(name, data[name], kind)


def _optional(data: dict[str, Any], name: str, kind: type[Any], default: Any) -> Any:
    """The field, or `default` where it is missing or null."""
    value = data.get(name)
    return default if value is None else _typed(name, value, kind)


def _typed(name: str, value: Any, kind: type[_T]) -> _T:
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}: must be of type {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: must be a finite number")
    return value  # type: ignore[return-value]
