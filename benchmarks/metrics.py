"""Computes a run's numbers from its arrival times. Pure; seconds in, milliseconds out.

    due -------- first message --- message ------- message --- last message
        TTFT                   gap         gap              gap

A message of k tokens counts as one gap and k - 1 zeros between its tokens. A latency starts when
its request was due, so it includes an open loop's queue. Requests with errors are counted, not
measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.plan import Record, Result

TTFT_TARGETS_MS = (100, 200, 500, 1000, 2000, 5000, 10000)
ITL_TARGETS_MS = (10, 20, 30, 50, 100, 200, 500)


def gaps_s(record: Record) -> list[float]:
    """Time before each token but the first."""
    gaps = [0.0] * max(sum(record.counts[:1]) - 1, 0)
    for i in range(1, len(record.times_s)):
        gaps.append(record.times_s[i] - record.times_s[i - 1])
        gaps.extend([0.0] * (record.counts[i] - 1))
    return gaps


def ttft_s(record: Record) -> float:
    """From due to the first token."""
    return record.times_s[0] - record.planned_s


def time_per_token_s(record: Record) -> float | None:
    """Mean time a token after the first message; None where nothing came after it."""
    later = sum(record.counts[1:])
    return (record.times_s[-1] - record.times_s[0]) / later if later else None


def percentile_ms(values_s: Sequence[float], q: float) -> float | None:
    """Interpolated percentile in milliseconds; None without values."""
    return float(np.percentile(values_s, q)) * 1000 if len(values_s) else None


def summarize(records: Iterable[Record]) -> dict[str, Any]:
    """All numbers of some requests of one run."""
    records = list(records)
    good = [r for r in records if not r.error and r.counts]
    gaps = [gap for r in good for gap in gaps_s(r)]
    messages = [b - a for r in good for a, b in zip(r.times_s, r.times_s[1:], strict=False)]
    first = [ttft_s(r) for r in good]
    per_token = [t for r in good if (t := time_per_token_s(r)) is not None]
    tokens, prompt_tokens = sum(sum(r.counts) for r in good), sum(r.prompt_tokens for r in good)
    span_s = max(r.end_s for r in good) - min(r.planned_s for r in good) if good else 0.0
    drafted, accepted = sum(r.draft_tokens for r in good), sum(r.accepted_tokens for r in good)
    return {
        "num_requests": len(records),
        "num_errors": len(records) - len(good),
        "ttft_ms_p50": percentile_ms(first, 50),
        "ttft_ms_p99": percentile_ms(first, 99),
        "itl_ms_p50": percentile_ms(gaps, 50),
        "itl_ms_p99": percentile_ms(gaps, 99),
        "message_gap_ms_p50": percentile_ms(messages, 50),
        "message_gap_ms_p99": percentile_ms(messages, 99),
        "token_ms_p50": percentile_ms(per_token, 50),
        "token_ms_p99": percentile_ms(per_token, 99),
        "span_s": span_s,
        "output_tokens": tokens,
        "prompt_tokens": prompt_tokens,
        "cached_tokens": sum(r.cached_tokens for r in good),
        "output_tokens_per_s": tokens / span_s if span_s else None,
        "prompt_tokens_per_s": prompt_tokens / span_s if span_s else None,
        "tokens_per_message": tokens / max(sum(len(r.counts) for r in good), 1),
        "draft_tokens": drafted,
        "accepted_tokens": accepted,
        "acceptance": accepted / drafted if drafted else None,
        "goodput": goodput(good, len(records)),
    }


def goodput(good: Sequence[Record], num_requests: int) -> list[dict[str, float]]:
    """Share of requests within each pair of targets: TTFT, and the request's own p99 gap.

    `share_mean` is the looser reading of the second target: mean time a token.
    """
    first = np.array([ttft_s(r) * 1000 for r in good])
    worst = np.array([percentile_ms(gaps_s(r), 99) or 0.0 for r in good])
    mean = np.array([(time_per_token_s(r) or 0.0) * 1000 for r in good])
    cells = []
    for ttft in TTFT_TARGETS_MS:
        for itl in ITL_TARGETS_MS:
            met = int(np.sum((first <= ttft) & (worst <= itl)))
            met_mean = int(np.sum((first <= ttft) & (mean <= itl)))
            cells.append(
                {
                    "ttft_ms": ttft,
                    "itl_ms": itl,
                    "share": met / max(num_requests, 1),
                    "share_mean": met_mean / max(num_requests, 1),
                }
            )
    return cells


def by_role(result: Result) -> dict[str, dict[str, Any]]:
    """A summary a role, in the order in which roles appear."""
    roles = dict.fromkeys(r.role for r in result.records)
    return {role: summarize(r for r in result.records if r.role == role) for role in roles}


def drift(records: Iterable[Record], num_slices: int = 10) -> list[dict[str, float | None]]:
    """Latency over the length of a run: requests in slices by when they were due."""
    good = sorted((r for r in records if not r.error and r.counts), key=lambda r: r.planned_s)
    slices = []
    for part in np.array_split(np.arange(len(good)), num_slices):
        chosen = [good[i] for i in part]
        if not chosen:
            continue
        gaps = [gap for r in chosen for gap in gaps_s(r)]
        slices.append(
            {
                "from_s": chosen[0].planned_s,
                "ttft_ms_p50": percentile_ms([ttft_s(r) for r in chosen], 50),
                "itl_ms_p50": percentile_ms(gaps, 50),
                "itl_ms_p99": percentile_ms(gaps, 99),
            }
        )
    return slices


def median(values: Iterable[float | None]) -> float | None:
    """Median over repetitions; None if any repetition has no value."""
    present = list(values)
    if not present or any(v is None for v in present):
        return None
    return float(np.median(np.array(present, dtype=float)))
