/* Explicit atomics on plain 64-bit and 32-bit words, and the fences the protocols name.
 *
 * Cython has no C11 atomics. Every access to a word that another thread may touch goes through one of these, so
 * that the ordering stands in the code and not in the habits of one processor: right on aarch64, cheap on x86-64. */
#ifndef FASTCBW_ATOMICS_H
#define FASTCBW_ATOMICS_H

#include <stdint.h>

static inline uint64_t fcbw_load_relaxed(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline uint64_t fcbw_load_acquire(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline uint64_t fcbw_load_seq(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline void fcbw_store_relaxed(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
static inline void fcbw_store_release(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline void fcbw_store_seq(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
static inline uint64_t fcbw_add_relaxed(uint64_t *p, uint64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
static inline uint64_t fcbw_add_seq(uint64_t *p, uint64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
static inline uint64_t fcbw_sub_seq(uint64_t *p, uint64_t v) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }
static inline uint64_t fcbw_or_acquire(uint64_t *p, uint64_t v) { return __atomic_fetch_or(p, v, __ATOMIC_ACQUIRE); }
static inline uint64_t fcbw_or_release(uint64_t *p, uint64_t v) { return __atomic_fetch_or(p, v, __ATOMIC_RELEASE); }
static inline uint64_t fcbw_or_seq(uint64_t *p, uint64_t v) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }
static inline uint64_t fcbw_and_release(uint64_t *p, uint64_t v) { return __atomic_fetch_and(p, v, __ATOMIC_RELEASE); }
static inline uint64_t fcbw_and_seq(uint64_t *p, uint64_t v) { return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); }
/* 1 when *p was EXPECTED and is now V. Sequentially consistent both ways. */
static inline int fcbw_cas_seq(uint64_t *p, uint64_t expected, uint64_t v)
{
    return __atomic_compare_exchange_n(p, &expected, v, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

static inline uint32_t fcbw_load32_relaxed(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline uint32_t fcbw_load32_acquire(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline uint32_t fcbw_load32_seq(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline void fcbw_store32_relaxed(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
static inline void fcbw_store32_release(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline void fcbw_store32_seq(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
static inline uint32_t fcbw_add32_seq(uint32_t *p, uint32_t v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
static inline uint32_t fcbw_sub32_seq(uint32_t *p, uint32_t v) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }

static inline void fcbw_fence_acquire(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
static inline void fcbw_fence_release(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }
static inline void fcbw_fence_seq(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

#endif
