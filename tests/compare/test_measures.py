"""From requests to figures, beside figures that were counted by hand."""

import numpy

from fastcbw.compare import measures

MS = 1_000_000


def requests(*rows):
    return numpy.array([(begun * MS, took * MS, write, length) for begun, took, write, length in rows], measures.REQUESTS)


def test_a_summary_counts_bytes_stalls_and_percentiles():
    found = measures.summary(requests((0, 1, True, 4096), (10, 1, True, 4096), (20, 200, False, 65536), (230, 1, True, 4096)), 2.0, 100)
    assert (found["requests"], found["iops"], found["written_bytes"], found["read_bytes"]) == (4, 2.0, 3 * 4096, 65536)
    assert (found["p50_us"], found["max_us"], found["stalls"], found["stalled_s"]) == (1000.0, 200000.0, 1, 0.2)


def test_requests_that_were_due_in_a_stall_count_as_paced():
    took = numpy.array([1, 1, 50], numpy.int64) * MS
    paced = sorted(measures.as_paced(took, 10 * MS) // MS)
    assert paced == [1, 1, 10, 20, 30, 40, 50]
    assert sorted(measures.as_paced(took, 60 * MS)) == sorted(took)


def test_no_request_has_no_latency():
    found = measures.summary(measures.no_requests(), 1.0, 10)
    assert found["requests"] == 0 and found["p99_us"] is None and found["p99_paced_us"] is None
    assert measures.curve(measures.no_requests()) == []


def test_of_what_was_under_way_in_a_pause_only_a_wait_after_it_counts():
    kept = measures.across_pause(requests((0, 5, True, 1), (8, 5, True, 1), (9, 13, True, 2), (9, 71, True, 3), (20, 1, True, 4)), 10 * MS, 20 * MS)
    assert [(int(one["begun_ns"]) // MS, int(one["took_ns"]) // MS, int(one["length"])) for one in kept] == [(0, 5, 1), (20, 60, 3), (20, 1, 4)]


def test_latencies_over_time_show_what_was_waited_for_where_nothing_began():
    series = measures.over_time(requests((100, 1, True, 1), (120, 33, True, 1), (260, 5, True, 1)), 100 * MS, 100 * MS, 300 * MS)
    assert series["t_s"] == [0.025, 0.075, 0.125, 0.175]
    assert series["max_us"] == [33000.0, 33000.0, None, 5000.0]
    assert series["iops"] == [40.0, 0.0, 0.0, 20.0]
