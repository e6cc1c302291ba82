"""For tests: writers that race as fast as the machine can, over sectors that tell which write they are of.

A sector of version v of sector s holds the two words (s, v) thirty-two times. Writer i of N owns the sectors s with s % N == i, so
that the versions of a sector are ordered: what holds after a write was acknowledged, and before it was issued, can be checked of
any image of the disk. All writers work on the stretch of sectors that the test points at, until it points elsewhere.
"""

from libc.stdint cimport int64_t, uint64_t

from fastcbw.block.device cimport BlockDevice
from fastcbw.kernels.atomic cimport add_relaxed, cas_seq, load_relaxed, load_seq, store_seq
from fastcbw.sync cimport sleep_ns

import numpy as _np

cdef enum:
    SECTOR = 512


cdef class SectorLoad:
    """Writers of DEVICE. stretch: sectors that all work on at a time. Call run() in as many threads as shall write."""

    def __cinit__(self, BlockDevice device not None, int64_t stretch):
        cdef uint64_t[::1] issued, acknowledged
        self.device = device
        self.stretch = stretch
        self.sectors = device.length // SECTOR // stretch * stretch
        if self.sectors <= 0:
            raise ValueError(f"stretch: {stretch} sectors are not in {device.length} bytes")
        issued = _np.zeros(self.sectors, _np.uint64)
        acknowledged = _np.zeros(self.sectors, _np.uint64)
        self.arrays = (issued.base, acknowledged.base)
        self.issued = &issued[0]
        self.acknowledged = &acknowledged[0]

    def run(self, int64_t number, int64_t writers):
        """Write as writer NUMBER of WRITERS until stop(). Holds no interpreter lock."""
        cdef uint64_t data[64]
        cdef uint64_t focus
        cdef int64_t sector = number
        cdef int code
        with nogil:
            while not load_seq(&self.stopping):
                focus = load_seq(&self.focus)
                if focus == 0:
                    sleep_ns(2000)
                    continue
                sector += writers
                if sector >= self.stretch:
                    sector = number
                code = self.write(<int64_t>(focus - 1) * self.stretch + sector, data)
                if code:
                    cas_seq(&self.error, 0, <uint64_t>-code)
                    break

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

    def point_at(self, stretch):
        """Have the writers work on the STRETCH-th stretch; None: let them rest (a write may still be under way)."""
        store_seq(&self.focus, 0 if stretch is None else <uint64_t>stretch + 1)

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
