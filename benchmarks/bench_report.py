"""Tables of `make bench`, for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.bench_measure import MIB, Record, median, ratio
from benchmarks.bench_memory import fits_in, num_samples, peak_bytes, step_seconds
from benchmarks.bench_pair import POLICY
from benchmarks.bench_step import FULL as FULL_STEP
from benchmarks.bench_step import SGEMM
from benchmarks.bench_targets import overheads, sgemm_share
from benchmarks.page import fill, table, targets_table


def write_report(record: Record, path: Path) -> None:
    """Fill in what has been measured; the rest of the file stays as it is."""
    blocks = {"targets": f"{targets_table(record['targets'])}\n\n{_conditions(record)}"}
    for name, section in record["sections"].items():
        blocks[name] = _TABLES[name](section["result"])
    path.write_text(fill(path.read_text(), blocks))


def _conditions(record: Record) -> str:
    machine = record["machine"]
    processor = f"{machine['cpu']}, {machine['threads']} threads, {machine['memory_gib']} GiB"
    software = f"torch {machine['torch']}, Python {machine['python']}"
    rows = [
        [name, s["started"], f"{s['seconds'] / 60:.1f} min", f"{s['load_before']}", f"{s['load_after']}"]
        for name, s in record["sections"].items()
    ]
    when = "When each section ran, and the load average over a minute before and after it:"
    head = ["section", "started", "took", "load before", "load after"]
    return f"{processor}; {software}. {when}\n\n{table(head, rows)}"


def _figure(name: str, alternative: str) -> str:
    return f"![{alternative}](figures/bench_{name}.png)\n\n"


def _operator(result: Record) -> str:
    names = list(next(iter(result["seconds"].values())))

    def cells(by_name: dict[str, list[float]]) -> list[str]:
        ours = by_name["slimtune"]
        shown = [_milliseconds(ours)]
        for name in names[1:]:
            taken = by_name.get(name)
            shown.append(
                f"{_milliseconds(taken)}, {ratio(taken, ours):.3g} x{_few(taken, ours)}" if taken else "not run"
            )
        return shown

    rows = [[f"{int(length):,}", *cells(by_name)] for length, by_name in result["seconds"].items()]
    return _figure("operator", "Milliseconds against sequence length, each operator") + table(["T", *names], rows)


def _milliseconds(seconds: Sequence[float]) -> str:
    value = 1_000 * median(seconds)
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _few(taken: Sequence[float], most: Sequence[float]) -> str:
    """A note where a slow contender had fewer rounds."""
    return f" ({len(taken)} rounds)" if len(taken) < len(most) else ""


def _step(result: Record) -> str:
    parts = []
    for title, found in result["configurations"].items():
        seconds = found["seconds"]
        rate = result["sgemm_flops"] / median(seconds[SGEMM]) / 1e9
        share = f"{100 * sgemm_share(result, title):.1f} %"
        parts.append(
            f"**{title}**, {found['tokens']:,} tokens: the full step at {share} of the sgemm's {rate:.0f} GFLOP/s."
        )
        bounds = overheads(result, title)
        rows = [
            [
                name,
                f"{median(taken):.4g}{_few(taken, seconds[FULL_STEP])}",
                f"{ratio(taken, seconds[FULL_STEP]):.3g}",
                f"{bounds[name][1]:.3g}" if name in bounds else "",
            ]
            for name, taken in seconds.items()
            if name != SGEMM
        ]
        parts.append(table(["contender", "seconds a step", "over our full step", "bound of work"], rows))
    return _figure("step", "Seconds per optimiser step, each configuration and contender") + "\n\n".join(parts)


def _points(points: Iterable[Record]) -> str:
    rows = [
        [
            point["method"],
            f"{point['tokens']:,}",
            f"{point['chunk_length']:,}",
            f"{peak_bytes(point) / MIB:,.0f}"
            + (" (refused)" if any(r["out_of_memory"] for r in point["runs"]) else ""),
            f"{step_seconds(point):.4g}" if num_samples(point) else "",
            f"{num_samples(point)}",
        ]
        for point in points
    ]
    return table(["method", "T", "C", "peak, MiB", "seconds a step", "steps counted"], rows)


def _memory(result: Record) -> str:
    pair = result["pair"]
    full, slim = pair["seconds"].values()
    where = f"In turns in one process that keeps its memory, T {pair['tokens']:,}, {len(slim)} rounds"
    chunked = f"`{POLICY}` with C = {pair['chunk_length']} {median(slim):.4g} s"
    speeds = f"{where}: full {median(full):.4g} s, {chunked}, {ratio(slim, full):.3g} x."
    figure = _figure("memory", "Peak memory and time per token against sequence length")
    return f"{figure}{_points(result['points'])}\n\n{speeds}"


def _tradeoff(result: Record) -> str:
    return _figure("tradeoff", "Peak memory and step time against chunk length") + _points(result["points"])


def _longer(result: Record) -> str:
    slim = result["slim"]
    cap = result["cap_bytes"]
    outcome = "below the cap" if fits_in(slim, cap) else "NOT below the cap"
    longest = f"{result['full_tokens']:,} tokens ({result['full_too_long']:,} do not)"
    longer = f"{slim['tokens']:,} tokens, {slim['tokens'] / result['full_tokens']:.4g} times as many, {outcome}"
    figure = _figure("longer", "Peak memory against sequence length under a cap")
    points = _points([*sorted(result["full"], key=lambda point: int(point["tokens"])), slim])
    return f"{figure}The longest full step that runs in {cap // MIB:,} MiB: {longest}. SLiM ran {longer}:\n\n{points}"


_TABLES: dict[str, Callable[[Record], str]] = {
    "operator": _operator,
    "step": _step,
    "memory": _memory,
    "tradeoff": _tradeoff,
    "longer": _longer,
}
