"""One schedule, run for a few steps the way the trainer runs it, in a process of its own.

    python -m benchmarks.probe '{"model": {...}, "train": {...}, "plan": {...}, "data": "tokens-bytes", "threads": 2,
    "validation": false}'

Prints one line of JSON: runtime_bytes (private memory before the model), peak_bytes, step_seconds (median without the
first).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from slim_core.calibrate import warm_up
from slim_core.config import ModelConfig, TrainConfig
from slim_core.data.dataset import Windows
from slim_core.memory import make_meter, private_bytes
from slim_core.model import LanguageModel
from slim_core.planning import Plan
from slim_core.train import StepMetrics, TrainingRun


def main() -> None:
    """Run the schedule that the first argument describes."""
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    warm_up(torch.device("cpu"))
    meter = make_meter(torch.device("cpu"))
    runtime_bytes = private_bytes()
    config = TrainConfig.from_json(spec["train"])
    windows = Windows(Path(spec["data"]), config.sequence_length, config.seed)
    model = LanguageModel(ModelConfig.from_json(spec["model"])).initialize(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        run = TrainingRun(
            model,
            config,
            Plan.from_json(spec["plan"]),
            windows,
            windows if spec["validation"] else None,
            Path(folder),
            meter,
        )
        seconds = [report.step_seconds for report in run.reports() if isinstance(report, StepMetrics)]
    step_seconds = statistics.median(seconds[1:] or seconds)
    print(json.dumps({"runtime_bytes": runtime_bytes, "peak_bytes": meter.peak_bytes(), "step_seconds": step_seconds}))


if __name__ == "__main__":
    main()
