"""The reproduction of the paper (benchmarks/paper*.py): its data, its runs, its page."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import paper_copying, paper_figures, paper_gradients, paper_language, paper_report, paper_runs
from benchmarks.page import fill
from slim_core.config import ModelConfig
from slim_core.layers.head import IGNORED
from slim_core.model import LanguageModel
from slim_core.step import count_targets, slim_step

torch.set_num_threads(1)  # the tests themselves run side by side

SMALL = ModelConfig(
    num_layers=1,
    model_width=16,
    num_heads=2,
    mlp_width=16,
    vocab_size=paper_copying.VOCABULARY,
    output_projection=False,
    positions="concatenated",
    attention_bias=True,
)


def small_model() -> LanguageModel:
    return paper_runs.initialise_as_published(LanguageModel(SMALL), seed=1)


def small_run(number: int, steps: int = 6) -> paper_runs.Run:
    """Variant `number` of the copying task on a model of a few thousand weights."""
    return replace(paper_copying.runs(steps)[number], make_model=small_model, accuracy_every=2)


def test_copying_sequence_is_a_zero_and_random_tokens_twice() -> None:
    sequence = paper_copying.copying_sequence(3)
    assert sequence.shape == (512,)
    assert torch.equal(sequence[:256], sequence[256:])
    assert sequence[0] == 0
    assert sequence[1:256].min() >= 1
    assert sequence[1:256].max() <= 255


def test_copying_sequence_is_a_function_of_the_step() -> None:
    assert torch.equal(paper_copying.copying_sequence(5), paper_copying.copying_sequence(5))
    assert not torch.equal(paper_copying.copying_sequence(5), paper_copying.copying_sequence(6))


def test_copying_loss_is_that_of_the_second_half() -> None:
    sequence = paper_copying.copying_sequence(0)
    tokens, targets = paper_copying.copying_batch(0)
    assert tokens.shape == targets.shape == (1, 511)
    assert count_targets(targets) == 256
    assert torch.equal(targets[0, 255:], sequence[256:])
    assert (targets[0, :255] == IGNORED).all()


@pytest.mark.parametrize("chunk_length", [512, 100, 64])
def test_accuracy_does_not_depend_on_the_chunk_length(chunk_length: int) -> None:
    tokens, targets = paper_copying.copying_batch(0)
    model = small_model()
    hidden = model.forward_chunk(tokens, 0, model.initial_states(*tokens.shape)).hidden
    expected = (model.logits(hidden).argmax(-1) == targets).sum().item() / 256
    assert paper_copying.accuracy(model, tokens, targets, chunk_length) == expected


def test_variants_of_the_copying_task() -> None:
    full, _, chunked, _, switched = paper_copying.runs(None)
    assert full.steps == full.planned_steps == 15_000
    assert [run.chunk_length(7_499) for run in (full, chunked, switched)] == [512, 64, 512]
    assert [run.chunk_length(7_500) for run in (full, chunked, switched)] == [512, 64, 64]
    assert full.learning_rate(9_999) == 1e-2
    assert full.learning_rate(10_000) == pytest.approx(1e-3)


def test_language_windows_follow_one_another_and_start_again() -> None:
    data = torch.arange(2 * 1_024 + 5)
    tokens, targets = paper_language.language_batch(data, 1)
    assert tokens[0].tolist() == list(range(1_024, 2_047))
    assert targets[0].tolist() == list(range(1_025, 2_048))
    assert torch.equal(paper_language.language_batch(data, 2)[0], paper_language.language_batch(data, 0)[0])


def test_validation_text_is_not_trained_on() -> None:
    held_out = paper_language.validation_length()
    assert len(paper_language.training_text()) + held_out == len(paper_language.text())
    assert held_out > 1_024


def test_stopped_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(1)
    paper_runs.perform(run, tmp_path / "whole")
    monkeypatch.setattr(paper_runs, "SAVE_SECONDS", 0.0)

    def stop_at_4(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step == 4:
            raise KeyboardInterrupt
        return run.batch(step)

    with pytest.raises(KeyboardInterrupt):
        paper_runs.perform(replace(run, batch=stop_at_4), tmp_path / "stopped")
    assert paper_runs.read_result(tmp_path / "stopped", run.name) is None

    def only_the_rest(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert step >= 4
        return run.batch(step)

    paper_runs.perform(replace(run, batch=only_the_rest), tmp_path / "stopped")
    whole, stopped = (paper_runs.read_result(tmp_path / name, run.name) for name in ("whole", "stopped"))
    assert whole is not None
    assert stopped is not None
    assert stopped["losses_nats"] == whole["losses_nats"]
    assert stopped["accuracies"] == whole["accuracies"]
    assert [step for step, _ in whole["accuracies"]] == [2, 4, 6]
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == [f"{run.name}.json"]


def test_common_beginning_is_trained_once_and_changes_nothing(tmp_path: Path) -> None:
    full, switched = small_run(0), small_run(3)
    paper_runs.perform(switched, tmp_path / "alone")
    paper_runs.perform(full, tmp_path / "after")

    def only_the_second_half(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert step >= 3
        return switched.batch(step)

    paper_runs.perform(replace(switched, batch=only_the_second_half), tmp_path / "after")
    alone, after = (paper_runs.read_result(tmp_path / name, switched.name) for name in ("alone", "after"))
    assert alone is not None
    assert after is not None
    assert after["losses_nats"] == alone["losses_nats"]


def test_precision_of_states_reaches_the_step_and_is_put_back() -> None:
    model = LanguageModel(replace(SMALL, num_layers=2)).initialize(0)
    tokens, targets = paper_copying.copying_batch(0)
    reference = paper_gradients.gradient(copy.deepcopy(model).double(), tokens, targets, 511, "keep")
    with paper_gradients.state_dtype(torch.float32):
        assert model.initial_states(1, 1)[0].dtype == torch.float32
        chunk = model.forward_chunk(tokens, 0, model.initial_states(*tokens.shape))
        assert chunk.exit_states[0].dtype == torch.float32
        single = paper_gradients.gradient(model, tokens, targets, 16, "reverse")
    assert model.initial_states(1, 1)[0].dtype == torch.float64
    double = paper_gradients.gradient(model, tokens, targets, 16, "reverse")
    assert paper_gradients.relative_error(single, reference) < 1e-3
    assert 0 < paper_gradients.relative_error(double, reference) < 1e-5


def test_states_that_pass_2_starts_from_are_seen() -> None:
    model = LanguageModel(replace(SMALL, num_layers=2)).initialize(0).double()
    tokens, targets = paper_copying.copying_batch(0)
    with paper_gradients.entry_states_of(model, 64) as seen:
        paper_gradients.gradient(model, tokens, targets, 64, "reverse")
    assert sorted(seen) == [0, 1]
    recovered = torch.cat([seen[layer].flatten() for layer in sorted(seen)])
    expected = paper_gradients.states_after(model, tokens[:, :64])
    assert 0 < paper_gradients.relative_error(recovered, expected) < 1e-12


def test_published_initial_weights_have_the_published_distributions() -> None:
    model = LanguageModel(paper_copying.MODEL)
    paper_runs.initialise_as_published(model, seed=2)
    again = paper_runs.initialise_as_published(LanguageModel(paper_copying.MODEL), seed=2)
    weights = dict(model.named_parameters())
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, weights[name])
    assert model.embedding.weight.std().item() == pytest.approx(1, abs=0.03)
    query = weights["blocks.0.attention.query.weight"]
    assert query.abs().max().item() == pytest.approx(1 / 16, rel=1e-2)
    assert query.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=1e-2)


def test_model_of_the_copying_task_has_no_norm_before_the_head() -> None:
    tokens, targets = paper_copying.copying_batch(0)
    model = paper_copying.make_model()
    slim_step(model, tokens, targets, chunk_length=256, state_policy="reverse", normaliser=256)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(name.startswith("final_norm") for name, _ in model.named_parameters())


@pytest.mark.parametrize(("length", "limit"), [(1, 5), (5, 5), (6, 5), (1_000, 7)])
def test_thinned_curve_keeps_its_ends(length: int, limit: int) -> None:
    thinned = paper_report.thin(range(length), limit)
    assert len(thinned) == min(length, limit)
    assert thinned[0] == 0
    assert thinned[-1] == length - 1
    assert thinned == sorted(set(thinned))


def test_page_is_filled_between_its_markers_and_again() -> None:
    page = "# Page\n<!-- a -->\nold\n<!-- /a -->\ntext\n"
    once = fill(page, {"a": r"new \1"})
    assert once == "# Page\n<!-- a -->\n\nnew \\1\n\n<!-- /a -->\ntext\n"
    assert fill(once, {"a": "old"}) == page.replace("old", "\nold\n")
    with pytest.raises(ValueError, match="b: "):
        fill(page, {"b": ""})


def a_result(label: str, accuracy: float, losses: list[float], planned_steps: int) -> dict[str, Any]:
    samples = [[step, 0.0 if step <= len(losses) - 200 else accuracy] for step in range(20, len(losses) + 1, 20)]
    return {
        "label": label,
        "steps": len(losses),
        "planned_steps": planned_steps,
        "step_seconds": 0.5,
        "losses_nats": losses,
        "accuracies": samples,
        "validation_bits": 2.0,
    }


@pytest.mark.parametrize(("planned_steps", "met"), [(1_000, True), (1_001, False)])
def test_bars_are_met_by_whole_runs_only(planned_steps: int, met: bool) -> None:
    results = [a_result(label, share, [1.0] * 1_000, planned_steps) for label, share in (("full", 1.0), ("C", 0.995))]
    targets = paper_report.copying_targets(results)
    assert [(line["value"], line["met"]) for line in targets] == [(1.0, met), (0.995, met), (0.005, met)]
    assert ("Shortened: 1,000 steps of 1,001" in paper_report.copying_block(results)) is not met


def test_curves_apart_are_compared_step_by_step_in_bits() -> None:
    full = a_result("full", 1.0, [1.0, 1.0], 2)
    near = a_result("C", 1.0, [1.0, 1.0], 2)
    far = a_result("c", 1.0, [1.0 + 0.02, 1.0 - 0.02], 2)
    (line,) = paper_report.language_targets([full, near, far])
    assert line["value"] == pytest.approx(0.02885, abs=1e-5)
    assert not line["met"]


@pytest.mark.parametrize(("length", "error", "met"), [(8_192, 1e-6, True), (8_192, 2e-5, False), (64, 1e-6, False)])
def test_gradient_error_is_that_of_the_worst_chunk_length(length: int, error: float, met: bool) -> None:
    ways = [{"label": "ours", "errors": [1e-7, error], "state_errors": [1e-7]}]
    result = {"sequence_length": length, "chunk_lengths": [16, length], "ways": ways}
    (line,) = paper_report.gradient_targets(result)
    assert (line["value"], line["met"]) == (error, met)
    assert paper_report.gradient_block(result).endswith(f"| {length:,} | {error:.1e} |  |")


def test_labels_keep_their_order_and_their_distance() -> None:
    heights = paper_figures.spread_apart([0.5, 0.51, 0.1, 0.5], 0.05)
    assert heights[2] == pytest.approx(0.1, abs=0.05)
    ordered = sorted(heights)
    assert all(b - a >= 0.05 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert all(0 <= height <= 1 for height in paper_figures.spread_apart([1.0] * 5, 0.05))


def test_committed_page_has_every_marker() -> None:
    page = (Path(__file__).parents[2] / "docs" / "paper.md").read_text()
    fill(page, dict.fromkeys(("copying", "language", "gradients", "targets", "machine"), "x"))
