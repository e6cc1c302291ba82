# Atomics of csrc/atomics.h. The suffix is the memory order; `or`, `and`, `add`, `sub` return the word before.
from libc.stdint cimport uint32_t, uint64_t

cdef extern from "atomics.h" nogil:
    uint64_t load_relaxed "fcbw_load_relaxed"(const uint64_t *word) noexcept
    uint64_t load_acquire "fcbw_load_acquire"(const uint64_t *word) noexcept
    uint64_t load_seq "fcbw_load_seq"(const uint64_t *word) noexcept
    void store_relaxed "fcbw_store_relaxed"(uint64_t *word, uint64_t value) noexcept
    void store_release "fcbw_store_release"(uint64_t *word, uint64_t value) noexcept
    void store_seq "fcbw_store_seq"(uint64_t *word, uint64_t value) noexcept
    uint64_t add_relaxed "fcbw_add_relaxed"(uint64_t *word, uint64_t value) noexcept
    uint64_t add_seq "fcbw_add_seq"(uint64_t *word, uint64_t value) noexcept
    uint64_t sub_seq "fcbw_sub_seq"(uint64_t *word, uint64_t value) noexcept
    uint64_t or_acquire "fcbw_or_acquire"(uint64_t *word, uint64_t value) noexcept
    uint64_t or_release "fcbw_or_release"(uint64_t *word, uint64_t value) noexcept
    uint64_t or_seq "fcbw_or_seq"(uint64_t *word, uint64_t value) noexcept
    uint64_t and_release "fcbw_and_release"(uint64_t *word, uint64_t value) noexcept
    uint64_t and_seq "fcbw_and_seq"(uint64_t *word, uint64_t value) noexcept
    bint cas_seq "fcbw_cas_seq"(uint64_t *word, uint64_t expected, uint64_t value) noexcept
    uint32_t load32_relaxed "fcbw_load32_relaxed"(const uint32_t *word) noexcept
    uint32_t load32_acquire "fcbw_load32_acquire"(const uint32_t *word) noexcept
    uint32_t load32_seq "fcbw_load32_seq"(const uint32_t *word) noexcept
    void store32_relaxed "fcbw_store32_relaxed"(uint32_t *word, uint32_t value) noexcept
    void store32_release "fcbw_store32_release"(uint32_t *word, uint32_t value) noexcept
    void store32_seq "fcbw_store32_seq"(uint32_t *word, uint32_t value) noexcept
    uint32_t add32_seq "fcbw_add32_seq"(uint32_t *word, uint32_t value) noexcept
    uint32_t sub32_seq "fcbw_sub32_seq"(uint32_t *word, uint32_t value) noexcept
    void fence_acquire "fcbw_fence_acquire"() noexcept
    void fence_release "fcbw_fence_release"() noexcept
    void fence_seq "fcbw_fence_seq"() noexcept
