"""Memory of Python objects for the kernels: see lent.pxd."""

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer


cdef class Lent:
    """The memory of an object that has a buffer; it is given back when this goes."""

    def __dealloc__(self):
        if self.taken:
            PyBuffer_Release(&self.view)


cdef Lent lend(object buffer, str what, Py_ssize_t size, bint writable):
    cdef Lent lent = Lent.__new__(Lent)
    try:
        PyObject_GetBuffer(buffer, &lent.view, PyBUF_ND | PyBUF_FORMAT | (PyBUF_WRITABLE if writable else 0))
    except (TypeError, ValueError, BufferError) as error:
        raise TypeError(f"{what}: expected {'writable, ' if writable else ''}contiguous memory: {error}") from None
    lent.taken = True
    if lent.view.ndim != 1 or lent.view.itemsize != size:
        raise TypeError(f"{what}: expected one dimension of items of {size} bytes, got {lent.view.ndim} of items of {lent.view.itemsize}")
    lent.start = lent.view.buf
    lent.count = lent.view.shape[0]
    return lent
