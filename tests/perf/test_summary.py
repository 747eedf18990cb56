"""Medians, ratios and the table of targets, from records that are made up."""

import pytest

from perf.summary import MEMCPY, MEMCPY_AHEAD, READING, Results, Spread, goals

CASE = "page-cache/4k-randread-d32"


def record(backend, iops, round_number=0, case=CASE, mean_ns=1000):
    side = {"requests": 1, "latency_ns": {"mean": mean_ns}}
    return {
        "kind": "measurement",
        "backend": backend,
        "case": case,
        "round": round_number,
        "iops": iops,
        "cpu_us_per_request": 1e6 / iops,
        "result": {"read": side, "write": side},
    }


def goal(results, start):
    return next(each for each in goals(results) if each.what.startswith(start))


def test_a_spread_of_one_value_is_that_value():
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 7.0, 7.0, 1)


def test_a_spread_has_quartiles_and_extremes():
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0, 1.0, 5.0, 5)


def test_a_ratio_is_that_of_medians_and_its_spread_that_of_rounds():
    ours = [record("vvupipe socket", iops, k) for k, iops in enumerate((100, 300, 200))]
    theirs = [record("qsd threads", iops, k) for k, iops in enumerate((10, 10, 40))]
    ratio = Results([*ours, *theirs]).ratio(CASE, "vvupipe socket", "qsd threads")
    assert (ratio.median, ratio.least, ratio.most) == (20.0, 5.0, 30.0)


def test_what_was_not_measured_has_no_ratio():
    results = Results([record("vvupipe socket", 1)])
    assert results.ratio(CASE, "vvupipe socket", "qsd threads") is None
    assert results.best_rival(CASE) is None


def test_ours_is_the_engine_that_a_user_gets():
    names = ["vvupipe socket mmap", "vvupipe socket auto", "qsd threads"]
    results = Results([record(name, 1) for name in names])
    assert results.ours("socket") == "vvupipe socket auto"
    assert results.ours("vfio") is None


@pytest.mark.parametrize(("iops", "met"), [(91, True), (89, False)])
def test_a_target_is_met_or_not(iops, met):
    found = goal(Results([record("vvupipe socket", iops), record(MEMCPY, 100)]), "4 KiB randread")
    assert found.met is met
    assert found.target == ">= 0.9"


def test_what_copies_alone_and_reading_alone_would_come_to_stands_beside_it():
    results = [
        record("vvupipe socket", 500),
        record(MEMCPY, 400),
        record(MEMCPY_AHEAD, 600),
        record(READING, 700),
        record("qsd io_uring", 100),
    ]
    found = goal(Results(results), "the same: of qsd aio=io_uring")
    assert (found.measured, found.met) == ("5.00 (5.00 - 5.00)", False)
    assert (found.copies, found.reading) == ("6.00", "7.00")
    alone = goal(Results(results[:1]), "the same: of qsd aio=io_uring")
    assert (alone.copies, alone.reading) == ("-", "-")


def test_targets_without_results_say_so():
    assert {each.met for each in goals(Results([record("qsd threads", 1)]))} == {None}


@pytest.mark.parametrize(("mean_ns", "met"), [(1400, True), (1600, False)])
def test_the_polling_target_is_a_latency(mean_ns, met):
    results = Results([record("vvupipe socket", 1, case="page-cache/4k-randread-d1", mean_ns=mean_ns)])
    assert goal(results, "depth 1, polling").met is met


def test_idle_targets():
    idle = {"kind": "idle", "backend": "vvupipe socket", "round": 0, "idle_percent": 0.7, "start_s": 0.8, "memory": []}
    results = Results([record("vvupipe socket", 1), idle])
    assert goal(results, "idle CPU, --socket").met is False
    assert goal(results, "start to first answer, kernels in the cache, --socket").met is True
    assert goal(results, "idle CPU, --vfio").met is None
