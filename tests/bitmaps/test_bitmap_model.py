"""ClusterBitmap beside a plain bitarray, driven by Hypothesis, on every instruction set of this machine."""

import bitarray
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from fastcbw.bitmaps.bitmap import ClusterBitmap
from fastcbw.kernels import door

LENGTHS = st.sampled_from([0, 1, 63, 64, 65, 511, 512, 513, 32767, 32768, 32769, 70_000])


def model_runs(model):
    """The runs of ones of a NumPy bool array, from its differences."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], model.view(np.int8), [0]))))
    return edges.reshape(-1, 2)[:, 0], np.diff(edges.reshape(-1, 2)).ravel()


class BitmapMachine(RuleBasedStateMachine):
    """One bitmap, one array of bools; every operation on both."""

    @initialize(length=LENGTHS, fill=st.booleans())
    def begin(self, length, fill):
        self.bitmap = ClusterBitmap(length, fill=fill)
        self.model = np.full(length, fill, np.bool_)

    def span(self, data):
        """A range, as likely near its edges as anywhere."""
        first = data.draw(st.integers(0, len(self.model)))
        return first, data.draw(st.one_of(st.integers(0, min(130, len(self.model) - first)), st.integers(0, len(self.model) - first)))

    @rule(data=st.data())
    def set(self, data):
        first, count = self.span(data)
        self.bitmap.set(first, count)
        self.model[first:first + count] = True

    @rule(data=st.data())
    def clear(self, data):
        first, count = self.span(data)
        self.bitmap.clear(first, count)
        self.model[first:first + count] = False

    @rule(data=st.data())
    def claim(self, data):
        first, count = self.span(data)
        starts, counts = model_runs(~self.model[first:first + count])
        got = self.bitmap.claim(first, count)
        assert np.array_equal(got["first"], starts + first) and np.array_equal(got["count"], counts)
        self.model[first:first + count] = True

    @rule(seed=st.integers(0, 9), density=st.sampled_from([0.001, 0.5, 0.999]))
    def combine(self, seed, density):
        other = np.random.default_rng(seed).random(len(self.model)) < density
        bitmap = ClusterBitmap.from_bools(other)
        assert np.array_equal(bitmap.and_not(self.bitmap).to_bools(), other & ~self.model)
        self.bitmap.and_not(bitmap, out=self.bitmap)
        self.model &= ~other
        if seed % 2:
            self.bitmap.update(bitmap)
            self.model |= other

    @rule()
    def tidy(self):
        self.bitmap.tidy()

    @rule(data=st.data())
    def look(self, data):
        first, count = self.span(data)
        part = bitarray.bitarray(self.model[first:first + count].tolist(), endian="little")
        assert self.bitmap.count(first, count) == part.count()
        assert self.bitmap.any(first, count) == part.any() and self.bitmap.all(first, count) == part.all()
        one, zero = part.find(1), part.find(0)
        assert self.bitmap.next_one(first, count) == (None if one < 0 else first + one)
        assert self.bitmap.next_zero(first, count) == (None if zero < 0 else first + zero)
        starts, counts = model_runs(self.model[first:first + count])
        runs = self.bitmap.runs(first, count)
        assert np.array_equal(runs["first"], starts + first) and np.array_equal(runs["count"], counts)
        run = self.bitmap.next_run(first, count)
        assert run == ((first + starts[0], counts[0]) if len(starts) else None)

    @invariant()
    def same_bits(self):
        assert np.array_equal(self.bitmap.to_bools(), self.model)
        assert self.bitmap.bitarray[len(self.model):].count() == 0
        assert self.bitmap == ClusterBitmap.from_bools(self.model) == self.bitmap.copy()


@pytest.mark.parametrize("instruction_set", door.instruction_sets())
def test_bitmap_does_what_the_model_does(instruction_set):
    before = door.use_instruction_set(instruction_set)
    try:
        run_state_machine_as_test(BitmapMachine, settings=settings(max_examples=40, stateful_step_count=20, deadline=None))
    finally:
        door.use_instruction_set(before)


@pytest.mark.parametrize("instruction_set", door.instruction_sets())
def test_runs_of_every_density_are_those_of_the_model(instruction_set):
    before = door.use_instruction_set(instruction_set)
    try:
        random = np.random.default_rng(7)
        for density in (0, 0.0005, 0.01, 0.3, 0.7, 0.99, 0.9995, 1):
            model = random.random(200_003) < density
            starts, counts = model_runs(model)
            runs = ClusterBitmap.from_bools(model).runs()
            assert np.array_equal(runs["first"], starts) and np.array_equal(runs["count"], counts)
    finally:
        door.use_instruction_set(before)


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=200))
def test_bools_go_in_and_come_out(bits):
    assert ClusterBitmap.from_bools(np.array(bits, np.bool_)).to_bools().tolist() == bits
