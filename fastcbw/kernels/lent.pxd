# Memory of a Python object, lent for as long as a Lent lives: one row of items, contiguous.
#
# In place of Cython's typed memoryviews: each module that has one of those carries twenty thousand lines of C with it.
from libc.stdint cimport int64_t

cdef class Lent:
    cdef Py_buffer view
    cdef bint taken
    cdef void *start
    cdef int64_t count          # items

# BUFFER's memory as items of KIND: "uint8", "uint32", "uint64", "int64". TypeError names WHAT when it has others, or more dimensions than
# one, or may not be written and is to be WRITABLE.
cdef Lent lend(object buffer, str what, str kind, bint writable)
