"""Where a model came from: what a checkpoint of it takes along, so that other tools load it as they loaded the first.
Free of torch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slim_core.config import ModelConfig
from slim_core.weights.folder import read_json
from slim_core.weights.layout import is_foreign, model_config

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files that go along with a model unchanged, where they are there."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The folder of a base model, of a checkpoint, or of a tokenizer alone."""

    folder: Path
    foreign_config: dict[str, Any] | None
    """Its config.json where that is one of transformers'."""

    @classmethod
    def of(cls, folder: Path) -> ModelSource:
        """Raises ModelFolderError for a config.json that cannot be read; a folder may have none."""
        path = folder / "config.json"
        data = read_json(path) if path.exists() else None
        return cls(folder, data if data is not None and is_foreign(data) else None)

    def fits(self, config: ModelConfig) -> bool:
        """Whether the model is still one that its foreign config.json describes: a performer made of it is not."""
        return self.foreign_config is not None and model_config(self.foreign_config) == config

    def copy_companions(self, target: Path) -> None:
        """Copy tokenizer and generation settings. Raises OSError."""
        for name in COMPANIONS:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, target / name)
