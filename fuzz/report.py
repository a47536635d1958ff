"""What a run found, as text and as figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fuzz.process import Result
from fuzz.watch import MIB, Limits


@dataclass(frozen=True)
class Outcome:
    """An input and what came of it."""

    kind: str
    mutation: str
    result: Result


def figures(outcomes: Sequence[Outcome], limits: Limits, seed: int, seconds: float) -> dict[str, Any]:
    """The run in numbers."""
    slowest = max(outcomes, key=lambda outcome: outcome.result.seconds)
    largest = max(outcomes, key=lambda outcome: outcome.result.peak)
    return {
        "seed": seed,
        "inputs": len(outcomes),
        "seconds": round(seconds, 1),
        "by_kind": {kind: dict(_answers(outcomes, kind)) for kind in sorted({outcome.kind for outcome in outcomes})},
        "findings": [asdict(outcome) for outcome in outcomes if outcome.result.faults],
        "slowest": asdict(slowest),
        "largest": asdict(largest),
        "limits": asdict(limits),
    }


def report(outcomes: Sequence[Outcome], limits: Limits, seed: int, seconds: float) -> str:
    """The run as a Markdown table and a few lines."""
    kinds = sorted({outcome.kind for outcome in outcomes})
    answers = sorted({outcome.result.answer for outcome in outcomes}, key=lambda answer: (answer != "success", answer))
    rows = [["answer", *kinds, "all"]]
    rows.append(["---", *["---:" for _ in kinds], "---:"])
    for answer in answers:
        counts = [_answers(outcomes, kind)[answer] for kind in kinds]
        rows.append([answer, *map(str, counts), str(sum(counts))])
    totals = [sum(_answers(outcomes, kind).values()) for kind in kinds]
    rows.append(["all", *map(str, totals), str(sum(totals))])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    slowest = max(outcomes, key=lambda outcome: outcome.result.seconds)
    largest = max(outcomes, key=lambda outcome: outcome.result.peak)
    found = [outcome for outcome in outcomes if outcome.result.faults]
    return "\n".join(
        [
            table,
            "",
            f"{len(outcomes)} inputs in {seconds:.0f} s with seed {seed}; findings: {len(found)}",
            f"Slowest: {slowest.result.seconds:.1f} s of {limits.seconds:g} allowed ({_named(slowest)})",
            f"Peak memory: {largest.result.peak // MIB} MiB of {limits.memory // MIB} allowed, "
            f"{limits.loaded // MIB} before the first ({_named(largest)})",
            *(f"Finding: {_named(outcome)}: {outcome.result.faults[0].splitlines()[-1]}" for outcome in found),
        ]
    )


def _answers(outcomes: Sequence[Outcome], kind: str) -> Counter[str]:
    return Counter(outcome.result.answer for outcome in outcomes if outcome.kind == kind)


def _named(outcome: Outcome) -> str:
    return f"input {outcome.result.number}, {outcome.kind}, {outcome.mutation}"
