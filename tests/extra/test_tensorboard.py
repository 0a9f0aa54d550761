"""A file of events, read by TensorBoard itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from service import tensorboard_events

pytestmark = pytest.mark.extra

STEPS = 1_500
"""More than TensorBoard keeps of a tag by default."""


@pytest.mark.filterwarnings("ignore")  # TensorBoard's own
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    accumulator_module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with (tmp_path / "events.out.tfevents.1764047412.slimtune").open("wb") as file:
        file.write(tensorboard_events.header(100.0))
        file.write(tensorboard_events.text(100.0, "job", '    {"model": "performer-tiny | ünïcode"}'))
        for step in range(1, STEPS + 1):
            values = {"loss": 5.0 / step, "peak_bytes": 270_000_000.0}
            file.write(tensorboard_events.scalars(100.0 + step / 4, step, values))
        file.write(tensorboard_events.scalars(900.0, 2**40, {"validation_loss": 1e300}))
    read = accumulator_module.EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "tensors": 0})
    read.Reload()
    assert set(read.Tags()["scalars"]) | set(read.Tags()["tensors"]) == {"loss", "peak_bytes", "validation_loss", "job"}
    losses = read.Scalars("loss")
    assert [event.step for event in losses] == list(range(1, STEPS + 1))
    assert [event.wall_time for event in losses[:2]] == [100.25, 100.5]
    assert losses[1].value == 2.5
    assert read.Scalars("peak_bytes")[0].value == pytest.approx(270_000_000)
    assert [(event.step, event.value) for event in read.Scalars("validation_loss")] == [(2**40, float("inf"))]
    (text,) = read.Tensors("job")
    assert "ünïcode" in text.tensor_proto.string_val[0].decode()
    assert read.SummaryMetadata("job").plugin_data.plugin_name == "text"
