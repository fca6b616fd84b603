# What compiled code elsewhere may rely on: the arrays of a step, by address.

from kvblocks.step_arrays cimport Arrays


cdef class StepArrays:
    cdef Arrays arrays
    cdef bint _begun
    cdef bint _uploads
    cdef list _views
    cdef readonly object manager
