"""From results to docs/paper.md, docs/figures/paper.json and the figures."""

from __future__ import annotations

import itertools
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import paper_copying, paper_figures, paper_gradients, paper_language
from benchmarks.page import Target, fill, table, targets_table
from benchmarks.paper_runs import BITS, read_result, write_json

Result = dict[str, Any]
Item = TypeVar("Item")

PARTS = ("copying", "language", "gradients")
CURVE_POINTS = 200
"""Of each curve in paper.json, at most."""
FINAL_STEPS = 200
"""Over whose samples a final accuracy is the mean."""
ACCURACY_BAR = 0.99
SPREAD_BAR = 0.01
APART_BAR_BITS = 0.02
GRADIENT_BAR = 1e-5


def write(work: Path, docs: Path) -> None:
    """Write the page's blocks, the figures and the record of every part that has all its results in the work folder.
    Of the others the page and the record keep what they have."""
    figures, page = docs / "figures", docs / "paper.md"
    figures.mkdir(parents=True, exist_ok=True)
    path = figures / "paper.json"
    parts: dict[str, Any] = json.loads(path.read_text())["parts"] if path.exists() else {}
    blocks: dict[str, str] = {}
    if copying := _results(work, [run.name for run in paper_copying.runs(None)]):
        parts["copying"] = {"targets": copying_targets(copying), "runs": [thinned(result) for result in copying]}
        blocks["copying"] = copying_block(copying)
        paper_figures.draw_copying(copying, figures / "paper-copying.png")
    if language := _results(work, [run.name for run in paper_language.runs(None)]):
        parts["language"] = {"targets": language_targets(language), "runs": [thinned(result) for result in language]}
        blocks["language"] = language_block(language)
        paper_figures.draw_language(language, figures / "paper-language.png")
    if gradients := read_result(work, paper_gradients.NAME):
        parts["gradients"] = {"targets": gradient_targets(gradients), "runs": gradients}
        blocks["gradients"] = gradient_block(gradients)
        paper_figures.draw_gradients(gradients, figures / "paper-gradients.png")
    targets = [target for name in PARTS if name in parts for target in parts[name]["targets"]]
    blocks["targets"] = targets_table(targets)
    blocks["machine"] = f"Measured with {_machine()}."
    write_json(path, {"targets": targets, "machine": _machine(), "parts": parts})
    page.write_text(fill(page.read_text(), blocks))
    for line in targets:
        print(f"{'met ' if line['met'] else 'OPEN'} {line['name']}: {line['value']:.4g} {line['unit']}")


def _results(work: Path, names: list[str]) -> list[Result]:
    """All of a part's results, or none: half a comparison is not shown."""
    results = [result for name in names if (result := read_result(work, name)) is not None]
    if len(results) < len(names):
        return []
    if len({result["steps"] for result in results}) > 1:
        raise SystemExit(f"{names[0].split('-')[0]}: runs of different lengths cannot be compared; run the part again")
    return results


def _machine() -> str:
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, one thread a run, "
        f"{os.cpu_count()} cores of {platform.machine()}"
    )


# What the results say


def final_accuracy(result: Result) -> float:
    """Mean of the accuracies that were sampled in the last steps."""
    last = [share for step, share in result["accuracies"] if step > result["steps"] - FINAL_STEPS]
    return float(sum(last) / len(last))


def difference_bits(result: Result, full: Result) -> list[float]:
    """|loss - loss of the full run| at every step, in bits per character."""
    pairs = zip(result["losses_nats"], full["losses_nats"], strict=True)
    return [abs(a - b) * BITS for a, b in pairs]


def _is_whole(result: Result) -> bool:
    return bool(result["steps"] >= result["planned_steps"])


def copying_targets(results: list[Result]) -> list[Target]:
    """Every variant learns to copy, and all equally well."""
    whole = all(map(_is_whole, results))
    accuracies = [final_accuracy(result) for result in results]
    spread = max(accuracies) - min(accuracies)
    return [
        *(
            _target(
                f"copying accuracy {result['label']}", value, "share", ACCURACY_BAR, whole and value >= ACCURACY_BAR
            )
            for result, value in zip(results, accuracies, strict=True)
        ),
        _target("copying accuracy spread", spread, "share", SPREAD_BAR, whole and spread <= SPREAD_BAR),
    ]


def language_targets(results: list[Result]) -> list[Target]:
    """The curves are one curve."""
    full, *others = results
    means = [sum(apart) / len(apart) for apart in (difference_bits(result, full) for result in others)]
    met = all(map(_is_whole, results)) and max(means) <= APART_BAR_BITS
    return [_target("learning curves apart", max(means), "bits per character, mean", APART_BAR_BITS, met)]


def gradient_targets(result: Result) -> list[Target]:
    """The gradient keeps its digits at every chunk length."""
    worst = max(result["ways"][0]["errors"])
    met = result["sequence_length"] >= paper_gradients.SEQUENCE_LENGTH and worst <= GRADIENT_BAR
    return [_target("gradient error reverse float64", worst, "relative, worst C", GRADIENT_BAR, met)]


def _target(name: str, value: float, unit: str, bar: float, met: bool) -> Target:
    return {"name": name, "value": float(f"{value:.4g}"), "unit": unit, "bar": bar, "met": met}


# What is shown


def copying_block(results: list[Result]) -> str:
    """The figure, and accuracy and time of each variant."""
    rows = [
        (
            result["label"],
            f"{final_accuracy(result):.4f}",
            f"{result['losses_nats'][-1]:.4f}",
            first_step_above(result, ACCURACY_BAR),
            f"{result['step_seconds'] * 1000:.0f} ms",
        )
        for result in results
    ]
    header = (
        "variant",
        f"accuracy, last {FINAL_STEPS} steps",
        "loss of the last step, nats",
        f"first sample at {ACCURACY_BAR} or more, step",
        "time per step",
    )
    return _block(results, "paper-copying.png", "Loss and accuracy of the copying task", table(header, rows))


def first_step_above(result: Result, bar: float) -> str:
    """The first sampled step whose accuracy is `bar` or more."""
    return next((f"{step:,}" for step, share in result["accuracies"] if share >= bar), "none")


def language_block(results: list[Result]) -> str:
    """The figure, and how far each curve is from that of the full run."""
    full = results[0]
    rows = []
    for result in results:
        apart = difference_bits(result, full)
        rows.append(
            (
                result["label"],
                "" if result is full else f"{sum(apart) / len(apart):.2g}",
                "" if result is full else f"{max(apart):.2g}",
                f"{result['validation_bits']:.4f}",
                f"{result['step_seconds']:.2f} s",
            )
        )
    header = ("variant", "mean difference to full", "largest", "validation, bits per character", "time per step")
    return _block(results, "paper-language.png", "Learning curves and their differences", table(header, rows))


def gradient_block(result: Result) -> str:
    """The figure, and the errors."""
    labels = [way["label"] for way in result["ways"]]
    header = ("C", *(f"gradient: {label}" for label in labels), *(f"state: {label}" for label in labels))
    columns = [way["errors"] for way in result["ways"]] + [way["state_errors"] for way in result["ways"]]
    rows = [
        (f"{chunk_length:,}", *("" if error is None else f"{error:.1e}" for error in errors))
        for chunk_length, *errors in itertools.zip_longest(result["chunk_lengths"], *columns)
    ]
    return f"![Gradient error against the chunk length](figures/paper-gradients.png)\n\n{table(header, rows)}"


def _block(results: list[Result], figure: str, alternative: str, rows: str) -> str:
    block = f"![{alternative}](figures/{figure})\n\n{rows}"
    if not all(map(_is_whole, results)):
        steps, planned = results[0]["steps"], results[0]["planned_steps"]
        block = f"**Shortened: {steps:,} steps of {planned:,}. This shows that the program runs, no more.**\n\n{block}"
    return block


def thin(values: Sequence[Item], limit: int) -> list[Item]:
    """At most `limit` values, evenly spaced, the first and the last among them."""
    if len(values) <= limit:
        return list(values)
    last = len(values) - 1
    return [values[round(index * last / (limit - 1))] for index in range(limit)]


def thinned(result: Result) -> Result:
    """A result whose curves are [step, value] pairs, few enough for a repository."""
    losses = [[step, round(loss, 6)] for step, loss in enumerate(result["losses_nats"], 1)]
    return {
        **result,
        "losses_nats": thin(losses, CURVE_POINTS),
        "accuracies": thin(result["accuracies"], CURVE_POINTS),
    }
