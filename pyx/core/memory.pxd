# Memory and limits. Every allocation goes through here, so that a test can make each of them fail in turn.
#
# The manager's big arrays are mapped: zeroed without being touched, and on huge pages where the system has them,
# because publishing and evicting reach all over them and would wait for page table walks (a fifth of their time).

from libc.stdint cimport int64_t


cdef extern from "core/memory.h" nogil:
    int64_t kvb_fail_after(int64_t n) noexcept nogil
    void* grab "kvb_grab"(size_t n) noexcept nogil
    void* grab_zeroed "kvb_grab_zeroed"(size_t n, size_t width) noexcept nogil
    void* regrow "kvb_regrow"(void* p, size_t n) noexcept nogil
    void* map_zeroed "kvb_map"(size_t n, size_t width) noexcept nogil
    void unmap "kvb_unmap"(void* p, size_t n, size_t width) noexcept nogil
    int64_t least_multiple "kvb_least_multiple"(int64_t a, int64_t b) noexcept nogil
    const int64_t MAX_GENERATION "KVB_MAX_GENERATION"


cdef enum:
    MAX_INT32 = 0x7FFFFFFF
    SLOT_BITS = 24
    SLOT_MASK = 0xFFFFFF
    MAX_GROUPS = 64
