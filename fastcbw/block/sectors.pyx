"""For tests: writers that race as fast as the machine can, over sectors that tell which write they are of.

A sector of version v of sector s holds the two words (s, v) thirty-two times. Writer i of N owns the sectors s with s % N == i, so
that the versions of a sector are ordered: what holds after a write was acknowledged, and before it was issued, can be checked of
any image of the disk. In a sweep each writer writes its own sectors of a range once, all of them side by side; then they rest.
"""

from libc.stdint cimport int64_t, uint64_t

from fastcbw.block.device cimport BlockDevice
from fastcbw.kernels.atomic cimport add_relaxed, add_seq, cas_seq, load_relaxed, load_seq, store_seq
from fastcbw.kernels.lent cimport Lent, lend
from fastcbw.sync cimport sleep_ns

import numpy as _np

cdef enum:
    SECTOR = 512


cdef class SectorLoad:
    """Writers of DEVICE. Call run() in as many threads as shall write."""

    def __cinit__(self, BlockDevice device not None):
        cdef Lent issued, acknowledged
        self.device = device
        self.sectors = device.length // SECTOR
        if self.sectors == 0:
            raise ValueError(f"{device.name}: has no whole sector")
        self.arrays = (_np.zeros(self.sectors, _np.uint64), _np.zeros(self.sectors, _np.uint64))
        issued = lend(self.arrays[0], "issued", "uint64", True)
        acknowledged = lend(self.arrays[1], "acknowledged", "uint64", True)
        self.issued = <uint64_t *>issued.start
        self.acknowledged = <uint64_t *>acknowledged.start

    def run(self, int64_t number, int64_t writers):
        """Write as writer NUMBER of WRITERS in every sweep until stop(). Holds no interpreter lock."""
        cdef uint64_t data[64]
        cdef uint64_t turn = 0
        cdef int64_t sector, end
        cdef int code
        with nogil:
            while not load_seq(&self.stopping):
                if load_seq(&self.turn) == turn:
                    sleep_ns(1000)
                    continue
                turn = load_seq(&self.turn)
                end = <int64_t>(self.first + self.count)
                sector = (<int64_t>self.first + writers - 1 - number) // writers * writers + number
                while sector < end:
                    code = self.write(sector, data)
                    if code:
                        cas_seq(&self.error, 0, <uint64_t>-code)
                    sector += writers
                add_seq(&self.ended, 1)

    cdef int write(self, int64_t sector, uint64_t *data) noexcept nogil:
        cdef uint64_t version = load_relaxed(&self.issued[sector]) + 1
        cdef int i, code
        for i in range(0, 64, 2):
            data[i] = <uint64_t>sector
            data[i + 1] = version
        store_seq(&self.issued[sector], version)
        code = self.device.pwrite(data, sector * SECTOR, SECTOR, 0)
        store_seq(&self.acknowledged[sector], version)
        add_relaxed(&self.writes, 1)
        return code

    def sweep(self, first, count):
        """Have the writers write the sectors first..first+count once. The sweep before has ended."""
        if first < 0 or count < 0 or first > self.sectors - count:
            raise ValueError(f"sweep: sectors {first}+{count} are not within {self.sectors}")
        self.first = first
        self.count = count
        store_seq(&self.ended, 0)
        add_seq(&self.turn, 1)

    def wait(self, uint64_t writers):
        """Return when the sweep has been ended by all WRITERS: no write is under way."""
        with nogil:
            while load_seq(&self.ended) < writers and not load_seq(&self.stopping):
                sleep_ns(1000)

    def stop(self):
        """Let the writers end."""
        store_seq(&self.stopping, 1)

    @property
    def issued_now(self):
        """The versions issued so far, one per sector; a copy."""
        return self.arrays[0].copy()

    @property
    def acknowledged_now(self):
        """The versions acknowledged so far, one per sector; a copy."""
        return self.arrays[1].copy()

    @property
    def total(self):
        """Writes so far, and the errno of the first that failed, or 0."""
        return load_relaxed(&self.writes), load_seq(&self.error)
