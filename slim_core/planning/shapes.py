"""What a model's weights are: the matrices of a layer, which of them are trained, and how many numbers that is."""

from __future__ import annotations

from slim_core.config import LoraConfig, ModelConfig, TrainConfig


def layer_matrices(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """The linear layers of a block by name, (outputs, inputs)."""
    d, f = model.model_width, model.mlp_width
    output = {"output": (d, d)} if model.output_projection else {}
    mlp = {"mlp_in": (model.mlp_in_width, d), "mlp_out": (d, f)}
    return {"query": (d, d), "key_value": (2 * model.kv_width, d), **output, **mlp}


def layer_vectors(model: ModelConfig) -> list[int]:
    """Lengths of a block's norms and biases."""
    d = model.model_width
    norms = [d, d] if model.norm_type == "rms" else [d, d, d, d]
    attention = [d, 2 * model.kv_width] if model.attention_bias else []
    output = [d] if model.output_bias else []
    mlp = [model.mlp_in_width, d] if model.mlp_bias else []
    return [*norms, *attention, *output, *mlp]


def check_adapters(model: ModelConfig, lora: LoraConfig) -> None:
    """Raises ValueError where a target is no linear layer of this model."""
    known = layer_matrices(model)
    for target in lora.targets:
        if target not in known:
            raise ValueError(f"targets: no linear layer {target!r} in this model; it has {', '.join(known)}")


def check_matching(model: ModelConfig, train: TrainConfig) -> None:
    """Raises ValueError where a phase of matching is not possible: the teacher's weights are the frozen ones, so what
    is trained must be beside them, and it must be able to change which keys a query finds."""
    if train.matching is None:
        return
    if model.attention != "performer" or model.feature_map != "favor":
        raise ValueError("matching: is for FAVOR+ attention in place of softmax attention")
    if train.lora is None:
        raise ValueError(
            "matching: needs method lora: the frozen weights are the teacher's; if they were trained, a second copy of "
            "all of them would have to be kept"
        )
    if not is_trained(train, "query", "key_value"):
        raise ValueError("matching: needs adapters on query or key_value (method.targets)")


def num_trained(model: ModelConfig, train: TrainConfig) -> int:
    """Numbers that have a gradient: all of the model's, or its adapters'."""
    if train.lora is None:
        return model.num_parameters
    shapes = layer_matrices(model)
    return model.num_layers * train.lora.rank * sum(sum(shapes[name]) for name in train.lora.targets)


def num_frozen(model: ModelConfig, train: TrainConfig) -> int:
    """Numbers that have none: the whole model beside its adapters."""
    return 0 if train.lora is None else model.num_parameters


def num_trained_tensors(model: ModelConfig, train: TrainConfig) -> int:
    """Parameters that are trained."""
    if train.lora is not None:
        return 2 * model.num_layers * len(train.lora.targets)
    layer = len(layer_matrices(model)) + len(layer_vectors(model))
    final_norm = (1 if model.norm_type == "rms" else 2) if model.norm == "pre" else 0
    ends = 1 + (not model.tied_embeddings) + (model.max_positions is not None) + final_norm
    return model.num_layers * layer + ends


def trained_matrices(model: ModelConfig, train: TrainConfig) -> list[tuple[int, int]]:
    """Shapes of every matrix that is updated."""
    return [shape for group in update_groups(model, train) for shape in group]


def update_groups(model: ModelConfig, train: TrainConfig) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The same as the optimiser goes through them: matrices that decay, then embeddings (`slim_core.optim`)."""
    blocks = layer_matrices(model)
    if train.lora is not None:
        rank = train.lora.rank
        pairs = [blocks[name] for name in blocks if name in train.lora.targets]
        return [shape for rows, columns in pairs for shape in ((rank, columns), (rows, rank))] * model.num_layers, []
    head = [] if model.tied_embeddings else [(model.vocab_size, model.model_width)]
    positions = [] if model.max_positions is None else [(model.max_positions, model.model_width)]
    embeddings = [(model.vocab_size, model.embedding_width), *positions]
    return [*blocks.values()] * model.num_layers + head, embeddings


def is_trained(train: TrainConfig, *layers: str) -> bool:
    """Whether any of these linear layers needs its input for a gradient."""
    return train.lora is None or any(name in train.lora.targets for name in layers)


def projection_size(model: ModelConfig) -> int:
    """Numbers of the FAVOR+ projections."""
    if model.attention != "performer" or model.feature_map != "favor":
        return 0
    return model.num_layers * model.features_per_head * model.head_width
