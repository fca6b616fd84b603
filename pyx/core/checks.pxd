# Assertions of the checked build. What ships has none: there `check`, and what stands under `if CHECKED`, is nothing.

cdef extern from "core/checks.h" nogil:
    enum:
        CHECKED "KVB_CHECKED"
    void check "kvb_check"(bint ok, const char* what) noexcept nogil    # ends the process, with `what`, if not ok
