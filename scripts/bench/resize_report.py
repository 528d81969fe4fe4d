"""What resizes did to the streams beside them: figures of each, the table, and whether the goal is met. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from load import percentile
from streams import BAD, Request, first_tokens, gaps, longest_gap

# The longest gap beside a resize, over the 99th percentile of gaps just before it.
GOAL = 3.0


@dataclass(frozen=True)
class Resize:
    """One operation; its span is ``asked`` to ``over``, and ``steady`` the one before it, without any.

    ``operation`` is the server's account of it, ``error`` why it failed.
    """

    from_size: int
    to_size: int
    steady: tuple[float, float]
    asked: float
    seconds: float
    over: float
    operation: dict[str, Any] = field(default_factory=dict)
    replayed: float | None = None
    error: str = ""


def figures(resize: Resize, requests: Sequence[Request], stalls: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """One resize in numbers; times in milliseconds, but ``seconds``. What can't be known is None."""
    operation = resize.operation
    steady = gaps(requests, *resize.steady, inside=True)
    longest, since = longest_gap(requests, resize.asked, resize.over)
    p50, p99 = percentile(steady, 50), percentile(steady, 99)
    beside = [request for request in requests if request.sent < resize.over and request.ended > resize.asked]
    pause_s = operation.get("pause_s")
    return {
        "from_size": resize.from_size,
        "to_size": resize.to_size,
        "epoch": operation.get("epoch"),
        "seconds": round(resize.seconds, 3),
        "seconds_by_phase": operation.get("seconds", {}),
        "longest_gap": _known(longest),
        "longest_gap_in": _phase_at(operation.get("seconds", {}), since + longest / 1000 - resize.asked),
        "steady_gap_p50": _known(p50),
        "steady_gap_p99": _known(p99),
        "steady_gap_max": _known(max(steady, default=math.nan)),
        "steady_gaps": len(steady),
        "ratio": _known(longest / p99, 2),
        "first_token_max": _known(max(first_tokens(requests, resize.asked, resize.over), default=math.nan)),
        "first_token_max_steady": _known(max(first_tokens(requests, *resize.steady), default=math.nan)),
        "pause": None if pause_s is None else _known(pause_s * 1000),
        "own_stall_max": _known(
            1000 * max((late for due, late in stalls if due < resize.over and due + late > resize.asked), default=0.0)
        ),
        "requests": len(beside),
        **_bad(beside),
        "replayed": resize.replayed,
        "experts_moved": operation.get("experts_moved"),
        "error": resize.error,
        "failed_phase": operation.get("failed_phase", ""),
    }


def totals(requests: Sequence[Request], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the whole run, also between resizes; the first notes say what went wrong."""
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    return {
        "resizes": len(rows),
        "resizes_failed": sum(bool(row["error"]) for row in rows),
        "requests": sum(request.outcome != "open" for request in requests),
        **_bad(requests),
        "tokens": sum(len(request.arrivals) for request in requests),
        "ratio_max": max(ratios, default=None),
        "longest_gap": max((row["longest_gap"] for row in rows if row["longest_gap"] is not None), default=None),
        "notes": [f"{request.outcome}: {request.note}" for request in requests if request.outcome in BAD][:10],
    }


def met(total: dict[str, Any]) -> bool:
    """Whether the goal is: nothing goes wrong, and no gap is much longer than without a resize."""
    clean = not any(total[bad] for bad in BAD) and not total["resizes_failed"]
    return bool(clean and total["resizes"] and total["ratio_max"] is not None and total["ratio_max"] <= GOAL)


def line(row: dict[str, Any]) -> str:
    """One resize for who watches the run."""
    ended = f"FAILED in {row['failed_phase'] or 'no phase'}: {row['error']}" if row["error"] else "done"
    bad = ", ".join(f"{row[name]} {name}" for name in BAD)
    gap, p99 = _cell(row["longest_gap"]), _cell(row["steady_gap_p99"])
    return (
        f"    {row['from_size']} -> {row['to_size']}: {ended} after {row['seconds']:.1f} s; "
        f"longest gap {gap} ms, steady p99 {p99} ms; {row['requests']} requests: {bad}"
    )


def table(report: dict[str, Any]) -> str:
    """A line per resize, the totals and the goal, in Markdown."""
    machine, load, total = report["hardware"], report["load"], report["totals"]
    heads = (
        "resize",
        "seconds",
        "by phase",
        "longest gap",
        "in",
        "steady p50 / p99",
        "longest / p99",
        "first token / steady",
    )
    heads = *heads, "pause", "own stall", "requests", *BAD, "replayed", "experts moved", "result"
    lines = [
        "",
        f"{machine['cpu']}, {machine['cores']} cores; {load['model']}, {load['streams']} greedy streams, "
        f"{load['prompts']} prompts of 32-128 tokens, 48-96 out; {load['server']}; milliseconds unless said; "
        f"{report['date']}, {report['commit']}",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    for row in report["resizes"]:
        phases = ", ".join(f"{name} {spent:.1f}" for name, spent in row["seconds_by_phase"].items() if spent >= 0.05)
        cells = [
            f"{row['from_size']} → {row['to_size']}",
            f"{row['seconds']:.1f}",
            phases or "-",
            _cell(row["longest_gap"]),
            row["longest_gap_in"] or "-",
            f"{_cell(row['steady_gap_p50'])} / {_cell(row['steady_gap_p99'])}",
            "-" if row["ratio"] is None else f"{row['ratio']:.1f}",
            f"{_cell(row['first_token_max'])} / {_cell(row['first_token_max_steady'])}",
            _cell(row["pause"]),
            _cell(row["own_stall_max"]),
            str(row["requests"]),
            *(str(row[name]) for name in BAD),
            _cell(row["replayed"]),
            _cell(row["experts_moved"]),
            f"failed: {row['failed_phase']}" if row["error"] else "done",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines += [
        f"{row['from_size']} → {row['to_size']} FAILED: {row['error']}" for row in report["resizes"] if row["error"]
    ]
    bad = ", ".join(f"{total[name]} {name}" for name in BAD)
    lines.append(
        f"in all: {total['resizes']} resizes, {total['resizes_failed']} failed; {total['requests']} requests, {bad}"
    )
    lines += total["notes"]
    lines += _leaks(report["before"], report["after"])
    lines.append(goal(total))
    return "\n".join(lines)


def goal(total: dict[str, Any]) -> str:
    numbers = ", ".join(str(total[name]) for name in BAD)
    ratio = "unknown" if total["ratio_max"] is None else f"{total['ratio_max']:.1f}"
    return (
        f"goal: {', '.join(BAD)} 0, 0, 0, 0 and longest gap at most {GOAL:g} times the steady p99 beside it; "
        f"here: {numbers} and {ratio}: {'met' if met(total) else 'MISSED'}"
    )


def _leaks(before: dict[str, float] | None, after: dict[str, float] | None) -> list[str]:
    if not before or not after:
        return []
    lines = ["", "| under the same load, with the same size | before | after |", "|---|---|---|"]
    lines += [f"| {name} | {before.get(name, 0):g} | {after.get(name, 0):g} |" for name in {**before, **after}]
    return [*lines, ""]


def _bad(requests: Sequence[Request]) -> dict[str, int]:
    counted = Counter(request.outcome for request in requests)
    return {name: counted[name] for name in BAD}


def _phase_at(seconds: dict[str, float], moment: float) -> str | None:
    """The phase in which the operation was ``moment`` seconds after its begin."""
    if math.isnan(moment) or not seconds:
        return None
    for phase, spent in seconds.items():
        moment -= spent
        if moment <= 0:
            return phase
    return "after"


def _known(value: float, digits: int = 1) -> float | None:
    return round(value, digits) if math.isfinite(value) else None


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
