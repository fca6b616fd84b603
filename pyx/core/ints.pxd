# Integer arguments as C arrays. Buffers (numpy arrays, CPU tensors through .numpy(), array.array, memoryview) are read
# in place; lists, tuples and ranges are converted once. All of it happens before the manager's lock is taken. What is
# read in place is read twice, to check and to use: nobody may write it during the call.

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from cpython.number cimport PyNumber_Index
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy

from core.checks cimport check
from core.memory cimport MAX_INT32, grab


cdef struct Ints:
    const void* data
    Py_ssize_t size
    bint wide           # elements are int64, else int32
    bint scalar         # one Python int was given
    int64_t value       # where `data` points for a scalar
    void* owned         # converted copy, to be freed
    bint viewed
    Py_buffer view


cdef inline int64_t at(const Ints* a, Py_ssize_t i) noexcept nogil:
    check(0 <= i < a.size, b"an element of an argument is within it")
    return (<const int64_t*>a.data)[i] if a.wide else (<const int32_t*>a.data)[i]


cdef inline int64_t as_int(object value, str name) except? -1:
    """`value` as a C integer; bools and floats are refused."""
    if type(value) is not int:
        value = index_of(value, name)
    try:
        return value
    except OverflowError:
        raise ValueError(f"{name}={value!r} does not fit in 64 bits") from None


cdef inline object index_of(object value, str name):
    """The integer that an object is, by `__index__`: what only rounds to one is none, and no truth is one."""
    if not isinstance(value, bool) and not str(getattr(value, "dtype", "")).endswith("bool"):
        try:
            return PyNumber_Index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an integer, not {value!r} ({type(value).__name__})")


cdef inline object array_of(object tensor, str name):
    """The numpy array that shares a CPU tensor's memory; a tensor elsewhere says so itself."""
    try:
        array = tensor.numpy()
        address = tensor.data_ptr() if hasattr(tensor, "data_ptr") else 1
    except RuntimeError as error:       # tensors of shape only, and wrappers of others
        raise TypeError(f"{name} is a {type(tensor).__name__} that is no array: {error}") from None
    # A storage may have been made smaller than its tensors, as FSDP does.
    if array.size and array.ndim < 2 and hasattr(tensor, "untyped_storage"):
        end = tensor.storage_offset() + 1 + (array.size - 1) * (tensor.stride(0) if array.ndim else 0)
        if address == 0 or tensor.untyped_storage().nbytes() < end * array.itemsize:
            raise TypeError(f"{name} is a {type(tensor).__name__} without memory for its elements; give a plain tensor")
    return array


cdef inline Ints unopened() noexcept nogil:
    """What `close_ints` can close whether `open_ints` has filled it or not."""
    cdef Ints a
    a.owned = NULL
    a.viewed = a.scalar = False
    return a


cdef inline int open_ints(object obj, str name, Ints* out) except -1:
    """Read `obj` into `out`, which is `unopened`; the caller closes it with `close_ints`, also after an error."""
    if isinstance(obj, (list, tuple, range)):
        return convert_items(obj, name, out)
    if not PyObject_CheckBuffer(obj):
        if type(obj) is int or hasattr(obj, "__index__") and not hasattr(obj, "numpy"):
            out.value = as_int(obj, name)
            out.data = &out.value
            out.size = 1
            out.wide = out.scalar = True
            return 0
        if not hasattr(obj, "numpy"):
            raise TypeError(f"{name} must be integers (array, CPU tensor or list), not {type(obj).__name__}")
        obj = array_of(obj, name)
    PyObject_GetBuffer(obj, &out.view, PyBUF_FORMAT | PyBUF_STRIDES)
    out.viewed = True
    if out.view.ndim > 1:
        raise TypeError(f"{name} must have one dimension, not {out.view.ndim}")
    out.size = 1 if out.view.ndim == 0 else out.view.shape[0]
    cdef const char* format = out.view.format
    if format == NULL:
        format = "B"
    if format[0] == c"@" or format[0] == c"=" or format[0] == c"<":
        format += 1
    cdef char kind = format[0]
    if kind == 0 or format[1] != 0 or kind not in b"bhilqBHILQ":
        raise TypeError(f"{name} must be integers, not elements of format {format.decode()!r}")
    cdef Py_ssize_t width = out.view.itemsize
    # Without strides (ctypes leaves them out) elements lie one after the other.
    cdef Py_ssize_t stride = width
    if out.view.ndim and out.view.strides != NULL:
        stride = out.view.strides[0]
    if kind in b"ilq" and (out.size < 2 or stride == width) and <size_t>out.view.buf % width == 0:
        out.data = out.view.buf
        out.wide = width == 8
    else:
        convert_buffer(name, out, stride, kind in b"bhilq")
    if out.view.ndim == 0:
        out.value = at(out, 0)
        out.scalar = True
    return 0


cdef inline int convert_items(object items, str name, Ints* out) except -1:
    cdef tuple fixed = tuple(items)  # __index__ may run any code: nothing may change under the loop
    cdef Py_ssize_t i
    out.size = len(fixed)
    out.wide = True
    out.owned = out.data = grab((out.size or 1) * sizeof(int64_t))
    if out.owned == NULL:
        raise MemoryError(f"no memory for {out.size} {name}")
    for i in range(out.size):
        item = fixed[i]
        if type(item) is not int:
            item = index_of(item, f"{name}[{i}]")
        try:
            (<int64_t*>out.owned)[i] = item
        except OverflowError:
            raise ValueError(f"{name}[{i}]={item!r} does not fit in 64 bits") from None
    return 0


cdef inline int convert_buffer(str name, Ints* out, Py_ssize_t stride, bint signed) except -1:
    """Widen elements of any width, spacing and alignment to int64."""
    cdef Py_ssize_t i, width = out.view.itemsize
    cdef int shift = 64 - 8 * <int>width
    cdef const char* source = <const char*>out.view.buf
    cdef int64_t* target = <int64_t*>grab((out.size or 1) * sizeof(int64_t))
    cdef uint64_t word
    if target == NULL:
        raise MemoryError(f"no memory for {out.size} {name}")
    out.owned = out.data = target
    out.wide = True
    for i in range(out.size):
        word = 0
        memcpy(&word, source + i * stride, width)
        target[i] = <int64_t>(word << shift) >> shift if signed else <int64_t>word
        if target[i] < 0 and not signed:
            raise ValueError(f"{name}[{i}]={word} does not fit in 64 signed bits")
    return 0


cdef inline void close_ints(Ints* a) noexcept:
    if a.viewed:
        PyBuffer_Release(&a.view)
    free(a.owned)


cdef extern from "core/ints.h" nogil:
    int64_t kvb_copy(const int32_t* source, Py_ssize_t n, int32_t* target) noexcept nogil
    int64_t kvb_narrow(const int64_t* source, Py_ssize_t n, int32_t* target) noexcept nogil
    int64_t kvb_bits(const int32_t* source, Py_ssize_t n) noexcept nogil


cdef inline Py_ssize_t bad_token(const Ints* tokens, int64_t bits) noexcept nogil:
    """The index of the first token outside 0...2**31-1, or -1 if there is none; `bits` is the or of all."""
    cdef Py_ssize_t i
    if 0 <= bits <= MAX_INT32:
        return -1
    for i in range(tokens.size):
        if at(tokens, i) < 0 or at(tokens, i) > MAX_INT32:
            return i
    return -1


cdef inline int64_t copy_tokens(
    const Ints* source, Py_ssize_t first, Py_ssize_t count, int32_t* target
) noexcept nogil:
    """Copy token ids from `first` on; the or of all, for `bad_token`."""
    if source.wide:
        return kvb_narrow(<const int64_t*>source.data + first, count, target)
    return kvb_copy(<const int32_t*>source.data + first, count, target)
