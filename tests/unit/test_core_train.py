"""The training loop on real text: it learns, resumes bit for bit, stops, evaluates and saves by its rules."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from slim_core import step as step_module
from slim_core import train
from slim_core.config import ModelConfig, OptimizerConfig, Packing, ScheduleConfig, TrainConfig
from slim_core.data.dataset import Batch, Windows
from slim_core.data.prepare import make_tokens
from slim_core.data.tokens import DatasetError
from slim_core.model import LanguageModel
from slim_core.optim import learning_rate, make_optimizer
from slim_core.planning import Plan
from slim_core.reference import reference_loss
from slim_core.step import count_targets
from slim_core.train import Checkpoint, DivergedError, Done, Evaluation, Report, StepMetrics, TrainingRun
from slim_core.weights.checkpoint import load_model, verify_checkpoint
from tests.unit.core_support import TINY, a_plan, names, text_windows, write_text

T = 96
CONFIG = TrainConfig(
    sequence_length=T,
    batch_size=3,
    steps=6,
    optimizer=OptimizerConfig(learning_rate=3e-3),
    schedule=ScheduleConfig(warmup_steps=2),
    seed=5,
)
PLAN = a_plan(40, "reverse", micro_batch=2)


class NoMeter:
    """Memory is the subject of test_core_memory.py."""

    def peak_bytes(self) -> int:
        return 123

    def forget_files(self) -> None:
        raise NotImplementedError

    def enforce_cap(self, cap_bytes: int) -> None:
        raise NotImplementedError

    def keep_within(self, planned_bytes: int) -> None:
        """Nothing is idle here."""


class Bench:
    """Data once, and a run for the asking."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = text_windows(folder / "data", T, seed=5)
        self.runs = itertools.count()
        self.model = LanguageModel(TINY)

    def run(
        self,
        config: TrainConfig = CONFIG,
        plan: Plan = PLAN,
        *,
        seed: int | None = None,
        validation: Windows | None = None,
        checkpoints: Path | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
        model_config: ModelConfig = TINY,
        dtype: torch.dtype = torch.float32,
    ) -> TrainingRun:
        """A run of a new model, `self.model`, into a folder of its own, `self.checkpoints`."""
        self.model = LanguageModel(model_config).initialize(config.seed if seed is None else seed).to(dtype)
        self.checkpoints = checkpoints or self.folder / f"checkpoints-{next(self.runs)}"
        self.checkpoints.mkdir(exist_ok=True)
        return TrainingRun(self.model, config, plan, self.data, validation, self.checkpoints, NoMeter(), stop_requested)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def losses(reports: list[Report]) -> list[float]:
    return [report.loss for report in reports if isinstance(report, StepMetrics)]


def weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(model: LanguageModel, wanted: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_loss_falls(bench: Bench) -> None:
    config = replace(CONFIG, steps=100, optimizer=OptimizerConfig(learning_rate=1e-2))
    curve = losses(list(bench.run(config, a_plan(48, "keep", micro_batch=3)).reports()))
    assert curve[0] == pytest.approx(5.55, abs=0.3)  # log 257: nothing is known yet
    assert sum(curve[-5:]) / 5 < 3.0  # the bytes' own frequencies give about 3.2


def test_a_quiet_run_reports_its_steps_and_one_checkpoint(bench: Bench) -> None:
    run = bench.run()
    reports = list(run.reports())
    steps = reports[:6]
    assert all(isinstance(report, StepMetrics) for report in steps)
    for number, report in enumerate(steps, 1):
        assert isinstance(report, StepMetrics)
        assert (report.step, report.tokens, report.peak_bytes) == (number, number * 3 * T, 123)
        assert report.learning_rate == learning_rate(number - 1, 6, 3e-3, CONFIG.schedule)
        assert report.step_seconds > 0
        assert report.grad_norm > 0
    checkpoint, done = reports[6:]
    assert isinstance(checkpoint, Checkpoint)
    assert (checkpoint.step, checkpoint.name, checkpoint.validation_loss) == (6, "step-00000006", None)
    assert done == Done(6, "completed")
    assert run.step == 6
    assert names(bench.checkpoints) == ["step-00000006"]
    assert_same_weights(load_model(bench.checkpoints / "step-00000006"), weights(bench.model))


def test_the_first_step_is_the_oracle_s(bench: Bench) -> None:
    """Loss and gradient norm of the whole batch, unaltered by chunks, micro-batches or clipping."""
    first = next(bench.run(replace(CONFIG, gradient_clip=1e-3)).reports())
    assert isinstance(first, StepMetrics)
    model = LanguageModel(TINY).initialize(CONFIG.seed)
    loss = reference_loss(model, *bench.data.batch(0, 3)[:2])
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert first.loss == pytest.approx(loss.item(), rel=1e-5)
    assert first.grad_norm == pytest.approx(norm.item(), rel=1e-4)


def conversations(folder: Path, count: int = 40) -> Path:
    """A token folder of prompts and completions of 20 to 140 bytes, more or less."""
    folder.mkdir(parents=True)
    words = topics["assert"].split()
    records = [
        {"prompt": " ".join(words[n : n + 1 + n % 9]), "completion": " ".join(words[n + 20 : n + 22 + n % 17])}
        for n in range(count)
    ]
    source = folder / "data.jsonl"
    source.write_text("\n".join(json.dumps(record) for record in records))
    return make_tokens(source)


@pytest.mark.parametrize("packing", ["continuous", "packed", "single"])
def test_steps_and_evaluations_of_documents_are_the_oracle_s(bench: Bench, packing: Packing, tmp_path: Path) -> None:
    """Micro-batches of sequences with different numbers of targets are one mean, with borders that nothing crosses."""
    windows = Windows(conversations(tmp_path / "documents"), T, 5, packing)
    bench.data = windows
    config = replace(CONFIG, packing=packing, steps=1, evaluate_every=1, evaluate_sequences=2)
    _, metrics, evaluation, *_ = bench.run(config, validation=windows).reports()
    assert isinstance(metrics, StepMetrics)
    assert isinstance(evaluation, Evaluation)
    assert metrics.tokens == 3 * T
    model = LanguageModel(TINY).initialize(CONFIG.seed)
    tokens, targets, starts = windows.batch(0, 3)
    assert len({int(count_targets(row)) for row in targets}) > 1
    loss = reference_loss(model, tokens, targets, document_starts=starts)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert metrics.loss == pytest.approx(loss.item(), rel=1e-5)
    assert metrics.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    tokens, targets, starts = windows.validation(0, 2)
    with torch.no_grad():
        wanted = reference_loss(bench.model, tokens, targets, document_starts=starts).item()
    assert evaluation.loss == pytest.approx(wanted, rel=1e-5)


def test_a_step_without_a_target_changes_nothing(bench: Bench, tmp_path: Path) -> None:
    """Of a prompt of many windows, all but the last have none."""
    folder = tmp_path / "documents"
    folder.mkdir()
    source = folder / "data.jsonl"
    source.write_text(json.dumps({"prompt": "x" * 1000, "completion": "y"}))
    bench.data = Windows(make_tokens(source), T, 5, "single")
    last = bench.data.per_epoch - 1
    config = replace(CONFIG, packing="single", batch_size=1, steps=bench.data.per_epoch)
    changed = []
    run = bench.run(config, a_plan(40, "reverse"), validation=bench.data)
    before = weights(bench.model)
    assert run.probe() == 123
    assert_same_weights(bench.model, before)
    for report in run.reports():
        if isinstance(report, StepMetrics):
            same = all(torch.equal(tensor, before[name]) for name, tensor in bench.model.state_dict().items())
            changed.append(not same)
            assert same == (report.loss == 0.0) == (report.grad_norm == 0.0)
            before = weights(bench.model)
        elif isinstance(report, Evaluation):
            tokens, targets, _ = bench.data.validation(last, 1)
            with torch.no_grad():
                assert report.loss == pytest.approx(reference_loss(bench.model, tokens, targets).item(), rel=1e-5)
    assert sum(changed) == 1
    if changed[-1]:
        assert 0 < run.check_gradient(13).relative_error < 1e-5
    else:
        with pytest.raises(DatasetError, match="no sequence of the step has a target"):
            run.check_gradient(13)


def test_validation_data_without_a_target_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Windows, "num_validation_targets", lambda *_: 0)
    with pytest.raises(DatasetError, match="no sequence of the validation data"):
        list(bench.run(validation=bench.data).reports())


@pytest.mark.parametrize("limit", [1e-4, None])
def test_clipping_bounds_the_update(bench: Bench, limit: float | None) -> None:
    # With a large epsilon AdamW's step is close to the gradient's size; by default it is blind to it.
    optimizer = OptimizerConfig(learning_rate=1.0, weight_decay=0.0, epsilon=0.9)
    config = replace(CONFIG, gradient_clip=limit, optimizer=optimizer, schedule=ScheduleConfig("constant"))
    reports = bench.run(config).reports()
    before = weights(bench.model)
    next(reports)
    change = torch.stack([(p - before[name]).norm() for name, p in bench.model.named_parameters()]).norm().item()
    if limit is None:
        assert change > 1e-2
    else:
        assert 0.5 * limit < change < 1.2 * limit


def stop_after(step: int) -> tuple[Callable[[], bool], Callable[[Iterator[Report]], list[Report]]]:
    """A stop that is requested when the report of `step` is read, and what reads the reports."""
    seen: list[Report] = []

    def read(reports: Iterator[Report]) -> list[Report]:
        seen.extend(reports)  # one by one, so that the stop sees each before the next step
        return seen

    return lambda: any(isinstance(report, StepMetrics) and report.step >= step for report in seen), read


@pytest.mark.parametrize("stop_step", [1, 2, 5])
def test_resuming_continues_bit_for_bit(bench: Bench, stop_step: int, tmp_path: Path) -> None:
    config = replace(CONFIG, evaluate_every=2, checkpoint_every=5)
    validation = text_windows(tmp_path / "validation", T)
    undisturbed = list(bench.run(config, validation=validation).reports())
    wanted_files = contents(bench.checkpoints / "step-00000006")

    stop, read = stop_after(stop_step)
    stopped = read(bench.run(config, validation=validation, stop_requested=stop).reports())
    assert stopped[-1] == Done(stop_step, "stopped")
    assert isinstance(stopped[-2], Checkpoint)
    assert stopped[-2].step == stop_step

    resumed = bench.run(config, seed=77, validation=validation, checkpoints=bench.checkpoints)
    resumed.resume(bench.checkpoints / f"step-{stop_step:08d}")
    assert resumed.step == stop_step
    rest = list(resumed.reports())
    assert losses(stopped) + losses(rest) == losses(undisturbed)
    evaluations = [report for report in stopped + rest if isinstance(report, Evaluation)]
    assert evaluations == [report for report in undisturbed if isinstance(report, Evaluation)]
    assert contents(bench.checkpoints / "step-00000006") == wanted_files


@pytest.mark.parametrize("calls_before_stop", [0, 1, 4, 6, 7, 9])
def test_a_stop_between_chunks_leaves_the_weights_of_the_step_before(bench: Bench, calls_before_stop: int) -> None:
    """Of step 3, which asks ten times: two micro-batches, each of two chunks in pass 1 and three in pass 2."""
    undisturbed = losses(list(bench.run().reports()))
    asked = itertools.count()
    run = bench.run(stop_requested=lambda: next(asked) >= 20 + calls_before_stop)
    reports = []
    after: dict[str, torch.Tensor] = {}
    for report in run.reports():
        reports.append(report)
        if isinstance(report, StepMetrics):
            after = weights(bench.model)
    assert losses(reports) == undisturbed[:2]
    assert next(asked) == 20 + calls_before_stop + 1  # it was not asked again
    assert reports[-1] == Done(2, "stopped")
    assert names(bench.checkpoints) == ["step-00000002"]
    assert_same_weights(bench.model, after)
    assert_same_weights(load_model(bench.checkpoints / "step-00000002"), after)
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in bench.model.parameters())


def test_a_stop_before_the_first_step_saves_the_start(bench: Bench) -> None:
    reports = list(bench.run(stop_requested=lambda: True).reports())
    assert [type(report) for report in reports] == [Checkpoint, Done]
    assert reports[-1] == Done(0, "stopped")
    assert_same_weights(load_model(bench.checkpoints / "step-00000000"), weights(LanguageModel(TINY).initialize(5)))


def test_a_resumed_run_that_is_over_ends_at_once(bench: Bench) -> None:
    list(bench.run().reports())
    folder = bench.checkpoints / "step-00000006"
    before = contents(folder)
    run = bench.run(checkpoints=bench.checkpoints)
    run.resume(folder)
    assert list(run.reports()) == [Done(6, "completed")]
    assert contents(folder) == before


def test_the_validation_loss_is_the_reference_s(bench: Bench, tmp_path: Path) -> None:
    validation = text_windows(tmp_path / "validation", T)
    config = replace(CONFIG, steps=1, evaluate_every=1, evaluate_sequences=3)
    run = bench.run(config, validation=validation)
    with torch.no_grad():
        before = reference_loss(bench.model, *validation.validation(0, 3)[:2]).item()
    reports = list(run.reports())
    with torch.no_grad():
        after = reference_loss(bench.model, *validation.validation(0, 3)[:2]).item()
    assert before > after
    evaluations = [report for report in reports if isinstance(report, Evaluation)]
    assert [evaluation.step for evaluation in evaluations] == [0, 1]
    assert [evaluation.loss for evaluation in evaluations] == pytest.approx([before, after], rel=1e-5)
    (checkpoint,) = (report for report in reports if isinstance(report, Checkpoint))
    assert checkpoint.validation_loss == evaluations[1].loss


def test_an_evaluation_takes_no_more_sequences_than_there_are(bench: Bench, tmp_path: Path) -> None:
    short = Windows(make_tokens(write_bytes(tmp_path / "short", 2 * T)), T, seed=0)
    assert short.per_epoch == 2
    config = replace(CONFIG, steps=1, evaluate_every=1, evaluate_sequences=100)
    evaluation = list(bench.run(config, validation=short).reports())[2]
    assert isinstance(evaluation, Evaluation)
    with torch.no_grad():
        wanted = reference_loss(bench.model, *short.validation(0, 2)[:2]).item()
    assert evaluation.loss == pytest.approx(wanted, rel=1e-5)


def write_bytes(folder: Path, count: int) -> Path:
    """The first bytes of a text."""
    source = write_text(folder, ["assert"])
    source.write_bytes(source.read_bytes()[:count])
    return source


def scripted(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    validation_losses: list[float],
    resume: Path | None = None,
    **changes: object,
) -> list[tuple[str, int, object]]:
    """A run whose evaluations give 9, before the first step, and then what the script says: (kind, step, what matters)
    of each report but the metrics and that first evaluation."""
    script = iter(validation_losses if resume is not None else [9.0, *validation_losses])
    monkeypatch.setattr(train, "evaluate_loss", lambda *_args, **_options: next(script) * T)
    config = TrainConfig.from_json({**CONFIG.to_json(), "batch_size": 1, "evaluate_sequences": 1, **changes})
    run = bench.run(config, validation=bench.data, checkpoints=None if resume is None else resume.parent)
    if resume is not None:
        run.resume(resume)
    events: list[tuple[str, int, object]] = []
    for report in run.reports():
        match report:
            case Evaluation(step, loss):
                events.append(("evaluation", step, pytest.approx(loss)))
            case Checkpoint(step, _, _, loss):
                events.append(("checkpoint", step, loss if loss is None else pytest.approx(loss)))
            case Done(step, reason):
                events.append(("done", step, reason))
    if resume is None:
        assert events.pop(0) == ("evaluation", 0, 9.0)
    return events


def test_a_checkpoint_for_every_best_loss_every_so_often_and_at_the_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert scripted(bench, monkeypatch, [3.0, 3.5, 2.5, 2.6], steps=7, evaluate_every=2, checkpoint_every=5) == [
        ("evaluation", 2, 3.0),
        ("checkpoint", 2, 3.0),
        ("evaluation", 4, 3.5),
        ("checkpoint", 5, None),
        ("evaluation", 6, 2.5),
        ("checkpoint", 6, 2.5),
        ("evaluation", 7, 2.6),
        ("checkpoint", 7, 2.6),
        ("done", 7, "completed"),
    ]
    assert len(names(bench.checkpoints)) == 4


def test_one_checkpoint_when_two_rules_want_one(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    events = scripted(bench, monkeypatch, [3.0, 2.0], steps=2, evaluate_every=1, checkpoint_every=1)
    assert [event[:2] for event in events] == [
        ("evaluation", 1),
        ("checkpoint", 1),
        ("evaluation", 2),
        ("checkpoint", 2),
        ("done", 2),
    ]


def test_a_validation_set_without_an_interval_is_used_at_the_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    events = scripted(bench, monkeypatch, [3.0], steps=3)
    assert events == [("evaluation", 3, 3.0), ("checkpoint", 3, 3.0), ("done", 3, "completed")]


def test_early_stopping_wants_min_delta_within_patience(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """2.95 is the best loss so far, and saved as such, but no improvement by 0.1; 2.8 is one."""
    script = [3.0, 2.95, 2.8, 2.9, 2.75, 2.0]
    stopping = {"patience": 2, "min_delta": 0.1}
    events = scripted(bench, monkeypatch, script, steps=50, evaluate_every=1, early_stopping=stopping)
    assert events == [
        ("evaluation", 1, 3.0),
        ("checkpoint", 1, 3.0),
        ("evaluation", 2, 2.95),
        ("checkpoint", 2, 2.95),
        ("evaluation", 3, 2.8),
        ("checkpoint", 3, 2.8),
        ("evaluation", 4, 2.9),
        ("evaluation", 5, 2.75),
        ("checkpoint", 5, 2.75),
        ("done", 5, "early_stopping"),
    ]


def test_patience_and_the_best_loss_survive_a_resume(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = {"patience": 2}
    options: dict[str, Any] = {"steps": 50, "evaluate_every": 1, "checkpoint_every": 1, "early_stopping": stopping}
    first = scripted(bench, monkeypatch, [3.0, 3.2, 3.1], **options)
    assert first[-1] == ("done", 3, "early_stopping")
    checkpoints = bench.checkpoints
    again = scripted(bench, monkeypatch, [3.1, 1.0], resume=checkpoints / "step-00000002", **options)
    assert again == [("evaluation", 3, 3.1), ("checkpoint", 3, 3.1), ("done", 3, "early_stopping")]
    over = scripted(bench, monkeypatch, [], resume=checkpoints / "step-00000003", **options)
    assert over == [("done", 3, "early_stopping")]


def test_divergence_is_an_error_that_leaves_the_last_checkpoint(bench: Bench) -> None:
    # Each step multiplies every matrix by 1 - 10 * 9.
    optimizer = OptimizerConfig(learning_rate=10.0, weight_decay=9.0)
    config = replace(
        CONFIG,
        steps=100,
        optimizer=optimizer,
        schedule=ScheduleConfig("constant"),
        gradient_clip=None,
        checkpoint_every=2,
    )
    reports: list[Report] = []
    with pytest.raises(DivergedError) as caught:
        reports.extend(bench.run(config).reports())
    curve = losses(reports)
    assert all(math.isfinite(loss) for loss in curve)
    assert caught.value.step == len(curve) + 1 > 2
    assert f"step {caught.value.step}" in str(caught.value)
    for tensor in bench.model.state_dict().values():
        assert tensor.isfinite().all()
    saved = names(bench.checkpoints)
    assert saved == [f"step-{step:08d}" for step in range(2, len(curve) + 1, 2)]
    verify_checkpoint(bench.checkpoints / saved[-1])
    load_model(bench.checkpoints / saved[-1])


def test_a_validation_loss_that_is_no_number_is_divergence(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    script = itertools.chain([3.0] * CONFIG.evaluate_sequences, itertools.repeat(math.nan))
    monkeypatch.setattr("slim_core.train.evaluate_loss", lambda *_args, **_options: next(script))
    run = bench.run(replace(CONFIG, evaluate_every=2), validation=bench.data)
    with pytest.raises(DivergedError, match="validation loss of step 2"):
        list(run.reports())


def test_without_an_interval_a_checkpoint_is_due_by_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slim_core.train.CHECKPOINT_SECONDS", 0.0)
    saved = [report.step for report in bench.run().reports() if isinstance(report, Checkpoint)]
    assert saved == [1, 2, 3, 4, 5, 6]


def test_no_more_than_a_micro_batch_of_tokens_is_held(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory model counts the token ids of one micro-batch (`planning.memory_model`)."""
    asked = []
    batch = Windows.batch

    def spy(self: Windows, first: int, count: int) -> Batch:
        asked.append((first, count))
        return batch(self, first, count)

    monkeypatch.setattr(Windows, "batch", spy)
    list(bench.run(replace(CONFIG, steps=2)).reports())
    assert asked == [(0, 2), (2, 1), (3, 2), (5, 1)]


def test_the_plan_changes_no_loss(bench: Bench) -> None:
    plans = [a_plan(T, "keep", 3), a_plan(16, "keep", 1), a_plan(33, "reverse", 2), a_plan(7, "reverse", 3)]
    curves = [losses(list(bench.run(plan=plan).reports())) for plan in plans]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


def test_a_run_goes_on_under_another_plan_as_if_nothing_had_happened(bench: Bench) -> None:
    """A job that is resumed under another cap: in float64 the loss curve is the same to 1e-9."""
    undisturbed = losses(list(bench.run(plan=a_plan(40, "reverse", 2), dtype=torch.float64).reports()))
    stop, read = stop_after(3)
    before = read(bench.run(plan=a_plan(40, "reverse", 2), stop_requested=stop, dtype=torch.float64).reports())
    for plan in (a_plan(T, "keep", 3), a_plan(16, "reverse", 1), a_plan(7, "keep", 2)):
        resumed = bench.run(plan=plan, checkpoints=bench.checkpoints, dtype=torch.float64)
        resumed.resume(bench.checkpoints / "step-00000003")
        assert losses(before) + losses(list(resumed.reports())) == pytest.approx(undisturbed, rel=1e-9)


def test_a_probe_changes_nothing(bench: Bench) -> None:
    undisturbed = losses(list(bench.run().reports()))
    run = bench.run()
    before = weights(bench.model)
    assert run.probe() == 123
    assert_same_weights(bench.model, before)
    assert losses(list(run.reports())) == undisturbed
    assert run.probe() == 123  # at the end there is nothing left to try


@pytest.mark.parametrize("other", [1, 13, T])
def test_the_gradient_is_checked_against_another_chunk_length(bench: Bench, other: int) -> None:
    run = bench.run(replace(CONFIG, dropout=0.1, batch_size=3))
    list(run.reports())
    after = weights(bench.model)
    check = run.check_gradient(other)
    assert (check.chunk_length, check.compared_with) == (40, other)
    assert 0 < check.relative_error < 1e-5
    assert_same_weights(bench.model, after)
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in bench.model.parameters())


def test_the_check_sees_a_wrong_gradient(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that forgets what the chunks before had to do with the loss."""
    run = bench.run()
    list(run.reports())
    backward = step_module._backward

    def forgetful(loss: Any, states: Any, grads: Any) -> None:
        backward(loss, states, grads and [grad * 0 for grad in grads])

    monkeypatch.setattr(step_module, "_backward", forgetful)
    assert run.check_gradient(T).relative_error > 0.01


def test_weight_decay_is_for_matrices(bench: Bench) -> None:
    model = LanguageModel(TINY).initialize(0)
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and name != "embedding.weight"
        assert decay[id(parameter)] == (0.3 if is_matrix else 0.0), name
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        (ScheduleConfig("constant"), [1.0] * 9),
        (ScheduleConfig("constant", warmup_steps=4), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        (ScheduleConfig("cosine", final_fraction=0.0), [1, 0.9619398, 0.8535534, 0.6913417, 0.5, 0.3086583]),
        (
            ScheduleConfig("cosine", warmup_steps=4, final_fraction=0.2),
            [0.25, 0.5, 0.75, 1, 1, 0.8828427, 0.6, 0.3171573, 0.2, 0.2],
        ),
        (ScheduleConfig("cosine", warmup_steps=16), [1 / 16, 2 / 16]),
    ],
)
def test_learning_rate(schedule: ScheduleConfig, wanted: list[float]) -> None:
    rates = [learning_rate(step, 8, 2.0, schedule) for step in range(len(wanted))]
    assert rates == pytest.approx([2.0 * fraction for fraction in wanted], rel=1e-6)


REDRAWN = replace(TINY, feature_map="favor", num_features=24, feature_redraw_steps=2)


@pytest.mark.parametrize(
    ("options", "model_config"),
    [({"dropout": 0.3}, TINY), ({"label_smoothing": 0.2}, TINY), ({"precision": "bfloat16"}, TINY), ({}, REDRAWN)],
    ids=["dropout", "label-smoothing", "bfloat16", "redrawn-features"],
)
def test_every_option_changes_the_run_survives_the_plan_and_resumes(
    options: dict[str, Any], model_config: ModelConfig, bench: Bench
) -> None:
    config = replace(CONFIG, **options)
    straight = losses(list(bench.run(config, model_config=model_config).reports()))
    wanted, folder = weights(bench.model), bench.checkpoints
    plain = replace(model_config, feature_redraw_steps=None)
    assert straight != losses(list(bench.run(model_config=plain).reports()))
    other_plan = losses(list(bench.run(config, a_plan(T, "keep", 3), model_config=model_config).reports()))
    tolerance = 1e-2 if options.get("precision") == "bfloat16" else 1e-5
    assert other_plan == pytest.approx(straight, rel=tolerance)

    calls = itertools.count()
    first = bench.run(config, model_config=model_config, stop_requested=lambda: next(calls) > 30)
    assert 0 < len(losses(list(first.reports()))) < config.steps
    (half,) = bench.checkpoints.iterdir()
    second = bench.run(config, model_config=model_config)
    second.resume(half)
    assert losses(list(second.reports())) == straight[first.step :]
    assert_same_weights(bench.model, wanted)
    assert folder.is_dir()


@pytest.mark.slow
def test_compiled_or_not_the_losses_are_the_same(bench: Bench) -> None:
    config = replace(CONFIG, compile=True, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a machine without a compiler falls back; torch warns about its own internals
        compiled = losses(list(bench.run(config).reports()))
    assert compiled == pytest.approx(losses(list(bench.run(replace(config, compile=False)).reports())), rel=1e-5)


def test_without_a_compiler_training_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("no C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.warns(RuntimeWarning, match="compile: training goes on without it: no C"):
        run = bench.run(replace(CONFIG, compile=True, steps=1))
    assert len(losses(list(run.reports()))) == 1
