"""The results of a run, as text and as figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fuzz.process import Result
from fuzz.watch import MIB, Limits


def figures(results: Sequence[Result], limits: Limits, seed: int, seconds: float) -> dict[str, Any]:
    """Return the figures of a run."""
    slowest = max(results, key=lambda result: result.seconds)
    largest = max(results, key=lambda result: result.peak)
    return {
        "seed": seed,
        "inputs": len(results),
        "seconds": round(seconds, 1),
        "by_kind": {kind: dict(_responses(results, kind)) for kind in sorted({result.kind for result in results})},
        "findings": [asdict(result) for result in results if result.faults],
        "slowest": asdict(slowest),
        "largest": asdict(largest),
        "limits": asdict(limits),
    }


def report(results: Sequence[Result], limits: Limits, seed: int, seconds: float) -> str:
    """Return a run as a Markdown table and a few lines."""
    kinds = sorted({result.kind for result in results})
    responses = sorted({result.response for result in results}, key=lambda response: (response != "success", response))
    rows = [["response", *kinds, "all"]]
    rows.append(["---", *["---:" for _ in kinds], "---:"])
    for response in responses:
        counts = [_responses(results, kind)[response] for kind in kinds]
        rows.append([response, *map(str, counts), str(sum(counts))])
    totals = [sum(_responses(results, kind).values()) for kind in kinds]
    rows.append(["all", *map(str, totals), str(sum(totals))])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    slowest = max(results, key=lambda result: result.seconds)
    largest = max(results, key=lambda result: result.peak)
    found = [result for result in results if result.faults]
    return "\n".join(
        [
            table,
            "",
            f"{len(results)} inputs in {seconds:.0f} s with seed {seed}; findings: {len(found)}",
            f"Slowest: {slowest.seconds:.1f} s of {limits.seconds:g} allowed ({_named(slowest)})",
            f"Peak memory: {largest.peak // MIB} MiB of {limits.memory // MIB} allowed, "
            f"{limits.loaded // MIB} before the first ({_named(largest)})",
            *(f"Finding: {_named(result)}: {result.faults[0].splitlines()[-1]}" for result in found),
        ]
    )


def _responses(results: Sequence[Result], kind: str) -> Counter[str]:
    return Counter(result.response for result in results if result.kind == kind)


def _named(result: Result) -> str:
    return f"input {result.number}, {result.kind}, {result.mutation}"
