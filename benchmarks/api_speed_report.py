"""What had to be reached by the API's speed, and the tables of docs/api-speed.md."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.bench_measure import MIB, Record
from benchmarks.page import Target, at_least, at_most, table, targets_table

OURS = "slimtune"
BAR_SERVER = "nginx, sendfile on"
"""What a plain static file server does: no other one copies less."""
BARS = {"GET /jobs/{id}": 1_000, "POST /jobs, a sweep": 150, "POST /jobs, all different": 150}
"""Requests a second."""
BAR_SHARE = 0.8
"""Of that server's throughput."""
BAR_GROWTH_BYTES = 30e6


def rates(rounds: list[Record], kind: str) -> list[float]:
    """Requests a second of one kind, a value a round."""
    return [each["requests"] / each["seconds"] for each in rounds if each["kind"] == kind]


def growth_bytes(memory: Record) -> int:
    """By how much the API was larger at its largest."""
    return int(max(resident for _, resident in memory["resident"]) - memory["before"])


def speed(downloads: Record, server: str, clients: str) -> float:
    """Gigabytes a second, the median."""
    return float(statistics.median(downloads[server][clients]["speed"]))


def targets(record: Record) -> list[Target]:
    """What was reached of what had to be."""
    found = [
        at_least(kind, statistics.median(rates(record["rounds"], kind)), "a second", bar) for kind, bar in BARS.items()
    ]
    wrong = sum(each["refused"] + each["lost"] for each in record["rounds"])
    found.append(at_most("requests: errors", wrong, f"of {sum(each['requests'] for each in record['rounds'])}", 0))
    for clients in record["downloads"][OURS]:
        share = speed(record["downloads"], OURS, clients) / speed(record["downloads"], BAR_SERVER, clients)
        found.append(at_least(f"download over {BAR_SERVER}, {_clients(clients)}", share, "ratio", BAR_SHARE))
    growth = growth_bytes(record["memory"])
    name = f"growth of the API while {record['memory']['clients']} clients download"
    found.append(at_most(name, growth / 1e6, "MB", BAR_GROWTH_BYTES / 1e6))
    return found


def blocks(record: Record) -> dict[str, str]:
    """What stands between the markers of the page."""
    return {
        "targets": targets_table(record["targets"]),
        "requests": _requests(record),
        "downloads": _downloads(record),
    }


def _clients(count: str) -> str:
    return f"{count} client" + ("" if count == "1" else "s")


def _requests(record: Record) -> str:
    before = (record.get("before") or {}).get("rounds", [])
    rows = []
    for kind in BARS:
        mine = [each for each in record["rounds"] if each["kind"] == kind]
        values, old = rates(mine, kind), rates(before, kind)
        requests = sum(each["requests"] for each in mine)
        used = [f"{1_000 * sum(e['cpu_seconds'][role] for e in mine) / requests:.2f}" for role in ("API", "PostgreSQL")]
        shown = [f"{statistics.median(old):.0f}" if old else "", f"{statistics.median(values):.0f}"]
        span = f"{min(values):.0f} to {max(values):.0f}"
        times = [f"{statistics.median(each[name] for each in mine):.1f}" for name in ("median", "p99")]
        rows.append([f"`{kind}`", *shown, span, *times, *used])
    head = ["requests a second", "before", "now", "rounds", "median ms", "99 % ms", "API, CPU ms", "PostgreSQL, CPU ms"]
    return table(head, rows) + "\n\n" + _where(record)


def _where(record: Record) -> str:
    size = record["size"]
    text = (
        f"{record['machine']['cpu']}, {record['cores']} cores for everything, wrk included; {size['jobs']:,} jobs in "
        f"the table; {size['rounds']} rounds of {size['seconds']} s each. Load {record['load'][0]} before, "
        f"{record['seconds'] / 60:.1f} minutes."
    )
    before = record.get("before")
    return text + (f" Load {before['load'][0]} before the rounds of the version before." if before else "")


def _downloads(record: Record) -> str:
    before: dict[str, Any] = record.get("before") or {}
    rows = []
    for name, found in _named(record, before):
        cells = [name]
        for clients in record["downloads"][OURS]:
            server = OURS if name.startswith(OURS) else name
            cells += [f"{speed(found, server, clients):.2f}", f"{statistics.median(found[server][clients]['cpu']):.2f}"]
        rows.append(cells)
    columns = [(f"{_clients(c)}, GB a second", "CPU s a GB") for c in record["downloads"][OURS]]
    head = ["server", *(name for pair in columns for name in pair)]
    memory = record["memory"]
    kept = (memory["after"] - memory["before"]) / MIB
    note = (
        f"The API had {memory['before'] / MIB:.0f} MiB before, at most {growth_bytes(memory) / MIB:.1f} MiB more while "
        f"{memory['clients']} clients downloaded the file {len(memory['ends'])} times, and {kept:.1f} MiB more after."
    )
    if before:
        note += f" The version before grew by {growth_bytes(before['memory']) / MIB:.1f} MiB."
    return table(head, rows) + "\n\n" + note


def _named(record: Record, before: Record) -> list[tuple[str, Record]]:
    named = [(name, record["downloads"]) for name in record["downloads"]]
    if before:
        named.insert(1, (f"{OURS}, before", before["downloads"]))
    return named
