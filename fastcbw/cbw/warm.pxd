# Populated slots kept ahead of the guest. See warm.pyx.
from libc.stdint cimport int64_t

from fastcbw.cbw.store cimport Store

cdef bint warm_wanted(Store *store) noexcept nogil          # under the store's lock, by who took slots: worth a warm_ask
cdef void warm_ask(Store *store) noexcept nogil             # not under it: wakes the thread, or starts it
cdef void warm_stop(Store *store) noexcept nogil            # ends and joins it: the store is about to go
