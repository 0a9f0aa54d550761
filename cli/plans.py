"""Plans as people read them."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from cli.client import Plan
from cli.sizes import format_bytes, format_seconds

FRONTIER_ROWS = 6


def show_frontier(console: Console, plan: Plan, title: str) -> None:
    """At most a handful of the planner's best schedules, from the leanest to the fastest."""
    points = sorted(plan["frontier"], key=lambda point: point["predicted_peak_bytes"])
    if len(points) > FRONTIER_ROWS:
        last = len(points) - 1
        points = [points[round(row * last / (FRONTIER_ROWS - 1))] for row in range(FRONTIER_ROWS)]
    table = Table(title=title, title_justify="left")
    for column in ("chunk length", "states", "peak memory", "time per step"):
        table.add_column(column, justify="right")
    for point in points:
        table.add_row(
            f"{point['chunk_length']:,}",
            point["state_policy"],
            format_bytes(point["predicted_peak_bytes"]),
            format_seconds(point["predicted_step_seconds"]),
        )
    console.print(table)
    console.print(f"the ordinary, unchunked step would take {format_bytes(plan['unchunked_peak_bytes'])}")
    console.print(f"the least that a plan exists for is {format_bytes(plan['minimum_cap_bytes'])}")


def show_choice(console: Console, plan: Plan) -> None:
    """What the planner chose under the cap, and why."""
    chunks = "one chunk" if plan["num_chunks"] == 1 else f"{plan['num_chunks']} chunks"
    console.print(
        f"plan: {chunks} of {plan['chunk_length']:,} tokens, states: {plan['state_policy']}, "
        f"peak {format_bytes(plan['predicted_peak_bytes'])}, {format_seconds(plan['predicted_step_seconds'])} per step",
        soft_wrap=True,
    )
    console.print(f"because: {plan['reason']}", markup=False, soft_wrap=True)
