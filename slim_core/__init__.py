"""slim_core: exact training of causal linear-attention models in memory that does not grow with the sequence.

Source: Likhosherstov, Choromanski, Davis, Song, Weller, "Sub-Linear Memory: How to Make Performers SLiM", NeurIPS 2021.
Importing this package imports no torch; `slim_core.model` and everything that holds tensors does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slim_core.weights.checkpoint import load_model as load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from slim_core.weights.checkpoint import load_model  # noqa: PLC0415  # torch: not before it is wanted

    return load_model
