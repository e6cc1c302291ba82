"""Memory of Python objects for the kernels: see lent.pxd."""

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer

# Of each kind: its size in bytes, and its letters in a buffer's format, where C has two names for one thing.
cdef dict KINDS = {"uint8": (1, "B"), "uint32": (4, "IL"), "uint64": (8, "LQ"), "int64": (8, "lq")}


cdef class Lent:
    """The memory of an object that has a buffer; it is given back when this goes."""

    def __dealloc__(self):
        if self.taken:
            PyBuffer_Release(&self.view)


cdef Lent lend(object buffer, str what, str kind, bint writable):
    cdef Lent lent = Lent.__new__(Lent)
    try:
        PyObject_GetBuffer(buffer, &lent.view, PyBUF_ND | PyBUF_FORMAT | (PyBUF_WRITABLE if writable else 0))
    except (TypeError, ValueError, BufferError) as error:
        raise TypeError(f"{what}: expected {'writable, ' if writable else ''}contiguous memory: {error}") from None
    lent.taken = True
    size, letters = KINDS[kind]
    format_ = "B" if lent.view.format == NULL else lent.view.format.decode().lstrip("@=<")
    if lent.view.ndim != 1 or lent.view.itemsize != size or len(format_) != 1 or format_ not in letters:
        raise TypeError(f"{what}: expected one dimension of {kind}, got {lent.view.ndim} of {format_!r}, {lent.view.itemsize} bytes each")
    lent.start = lent.view.buf
    lent.count = lent.view.shape[0]
    return lent
