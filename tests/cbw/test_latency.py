"""Latency of guest writes: the buckets, and what is measured when."""

import numpy as np
import pytest

from fastcbw.block.delay import DelayDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.engine import Engine
from fastcbw.cbw.latency import KINDS, LIMITS_NS, bucket_of, count_above, percentile_us

K = 4096


@pytest.fixture
def late():
    return DelayDevice(MemoryDevice(256 * K))


@pytest.fixture
def engine(late):
    engine = Engine(late)
    yield engine
    engine.close()
    late.close()


def test_each_latency_is_in_the_first_bucket_whose_limit_is_above_it():
    for ns in [0, 1, 127, 128, 1000, 1023, 1024, 1151, 1152, 65_535, 65_536, 10**6, 10**9, 2**36 - 1]:
        assert bucket_of(ns) == np.searchsorted(LIMITS_NS, ns, side="right")
    assert bucket_of(2**36) == bucket_of(2**63) == len(LIMITS_NS) - 1
    assert (np.diff(LIMITS_NS) > 0).all() and (np.diff(LIMITS_NS)[8:] <= LIMITS_NS[8:-1] / 8).all()


def test_percentiles_are_the_limits_of_their_buckets():
    counts = np.zeros((len(KINDS), len(LIMITS_NS)), np.uint64)
    assert percentile_us(counts, 0.99) is None and count_above(counts, 0) == 0
    counts[0, bucket_of(1000)] = 98
    counts[1, bucket_of(5_000_000)] = 2
    assert percentile_us(counts, 0.5) == percentile_us(counts, 0.98) == 1.024
    assert 5000 < percentile_us(counts, 0.99) <= 5000 * 1.125
    assert percentile_us(counts[0], 0.99) == 1.024
    assert [count_above(counts, limit) for limit in (0, 2, 4000, 6000)] == [100, 2, 2, 0]


def test_writes_are_told_apart_by_what_they_had_to_preserve(engine):
    engine.snapshot("s", cluster_size=K)
    with engine.latency_meter() as meter:
        engine.device.write(0, b"x" * K)
        engine.device.write_zeroes(2 * K, 3 * K)
        engine.device.discard(8 * K, K)
        assert meter.look().sum(axis=1).tolist() == [0, 3]
        for _ in range(5):
            engine.device.write(0, b"y" * K)
        engine.device.read(0, K)
        assert meter.look().sum(axis=1).tolist() == [5, 0]
        assert meter.look().sum() == 0


def test_what_the_disk_takes_is_in_it(engine, late):
    late.set(write_ms=20)
    with engine.latency_meter() as meter:
        for i in range(3):
            engine.device.write(i * K, b"x" * K)
        counts = meter.look()
    assert count_above(counts, 17_000) == 3 and percentile_us(counts, 0.01) > 20_000


def test_nothing_is_measured_while_nobody_asks(engine):
    first = engine.latency_meter()
    second = engine.latency_meter()
    first.close()
    first.close()
    engine.device.write(0, b"x")
    assert second.look().sum() == 1
    second.close()
    engine.device.write(0, b"x")
    with pytest.raises(ValueError, match="closed"):
        second.look()
    with engine.latency_meter() as third:
        engine.device.write(0, b"x")
        assert third.look().sum() == 1


def test_a_meter_outlives_its_engine():
    child = MemoryDevice(16 * K)
    engine = Engine(child)
    meter = engine.latency_meter()
    engine.device.write(0, b"x")
    engine.close()
    del engine
    assert meter.look().sum() == 1
    meter.close()
