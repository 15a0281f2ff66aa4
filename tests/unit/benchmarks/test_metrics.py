import pytest

from benchmarks import metrics
from benchmarks.limits import ModelCost, floor_ms
from benchmarks.plan import Record, Result
from benchmarks.plots import step_phases
from benchmarks.report import against_peers, rows, table


def record(times, counts, planned=0.0, **fields):
    return Record("all", 10, planned, times_s=times, counts=counts, end_s=times[-1], **fields)


def test_a_message_of_k_tokens_is_one_gap_and_zeros():
    r = record([1.0, 1.5, 1.75], [2, 3, 1])
    assert metrics.gaps_s(r) == [0.0, 0.5, 0.0, 0.0, 0.25]
    assert metrics.time_per_token_s(r) == pytest.approx(0.75 / 4)
    assert metrics.time_per_token_s(record([1.0], [4])) is None


def test_latency_counts_from_when_a_request_was_due():
    late = record([3.0, 3.1], [1, 1], planned=1.0, sent_s=2.5)
    assert metrics.ttft_s(late) == 2.0
    summary = metrics.summarize([late])
    assert summary["ttft_ms_p50"] == pytest.approx(2000)
    assert summary["output_tokens_per_s"] == pytest.approx(2 / 2.1)


def test_errors_are_counted_and_not_measured():
    summary = metrics.summarize([record([1.0, 2.0], [1, 1]), record([9.0], [1], error="gone")])
    assert (summary["num_requests"], summary["num_errors"]) == (2, 1)
    assert summary["ttft_ms_p99"] == pytest.approx(1000)
    assert metrics.summarize([])["ttft_ms_p50"] is None


def test_goodput_asks_for_both_targets():
    fast = record([0.05, 0.06, 0.07], [1, 1, 1])
    stalled = record([0.05, 0.06, 1.07], [1, 1, 1])
    slow_start = record([4.0, 4.01, 4.02], [1, 1, 1])
    failed = record([0.05], [1], error="gone")
    cells = metrics.summarize([fast, stalled, slow_start, failed])["goodput"]
    share = {(c["ttft_ms"], c["itl_ms"]): c["share"] for c in cells}
    assert share[100, 20] == 0.25
    assert share[5000, 20] == 0.5
    assert share[100, 500] == 0.25


def test_drift_slices_by_time():
    records = [record([i + 0.1, i + 0.1 + gap], [1, 1], planned=i) for i, gap in
               enumerate([0.01] * 10 + [0.02] * 10)]  # fmt: skip
    slices = metrics.drift(records, num_slices=2)
    assert [round(s["itl_ms_p50"]) for s in slices] == [10, 20]
    assert slices[1]["from_s"] == 10


def test_the_floor_of_a_step_is_its_bytes_or_its_flops():
    limits = {"read_gb_s": {"98MB": {"1": 5.0, "2": 10.0}}, "gemm_gflops": {"1": 1.0, "64": 100.0}}
    cost = ModelCost(weight_bytes=10**8, num_params=10**8, kv_bytes_per_token=10**4)
    assert floor_ms(cost, limits, 1, 0) == pytest.approx(10)
    assert floor_ms(cost, limits, 1, 1000) == pytest.approx(11)
    assert floor_ms(cost, limits, 64, 0) == pytest.approx(128)


def test_phases_of_a_step():
    counters = {
        'decode:diptych_engine_step_seconds_sum{model_name="m",phase="forward"}': 2.0,
        'decode:diptych_engine_step_seconds_count{model_name="m",phase="forward"}': 100.0,
        'decode:diptych_engine_step_seconds_sum{model_name="m",phase="sample"}': 0.1,
        'decode:diptych_engine_step_seconds_count{model_name="m",phase="sample"}': 50.0,
        'prefill:diptych_engine_step_seconds_sum{model_name="m",phase="forward"}': 9.0,
    }
    assert step_phases(counters) == pytest.approx({"forward": 20.0, "sample": 1.0})
    assert step_phases({}) == {}


def run(system, itl_s, repetition=1):
    records = [record([1.0, 1.0 + itl_s, 1.0 + 2 * itl_s], [1, 1, 1])]
    roles = metrics.by_role(Result(0.0, 2.0, 0.1, records))
    return {"system": system, "workload": "W1", "repetition": repetition, "roles": roles,
            "peak_rss_bytes": 10**9, "pss_bytes": None}  # fmt: skip


def test_the_table_takes_medians_and_compares_with_the_best_peer():
    data = {"runs": [run("ours-nospec", 0.004), run("slow", 0.02), run("fast", 0.008)]}
    data["runs"] += [run("ours-nospec", 0.04, 2), run("ours-nospec", 0.004, 3)]
    data["runs"].append({"system": "broken", "workload": "W1", "repetition": 1, "error": "x"})
    ours, slow, _ = found = rows(data)
    assert ours.middle("itl_ms_p50") == pytest.approx(4)
    assert against_peers(ours, found) == pytest.approx(2)
    assert against_peers(slow, found) is None
    assert "2.00x" in table(data)
