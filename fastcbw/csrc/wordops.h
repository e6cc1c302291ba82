/* Bulk loops over bitmap words, in every instruction set of cpu.h. Included by kernels/bits.pyx only.
 *
 * The loops are in wordops_body.h, which is included once per instruction set with
 *   FN(name)     the function's name for that set
 *   TARGET       its target attribute
 *   OR8(p)       1 when any of the eight words at p is not zero
 *   NOT_ONES8(p) 1 when any of the eight words at p is not all ones
 *   MASK64(p)    bit i is set when word i of the 64 at p is not zero
 *   STREAMS      defined where stores past the caches exist (AVX2). */
#ifndef FASTCBW_WORDOPS_H
#define FASTCBW_WORDOPS_H

#include <stdint.h>
#include <string.h>

#include "bitrun.h"
#include "cpu.h"

/* What one instruction set offers. `words` are counts of 64-bit words; targets may be a source, not overlap otherwise. */
struct fcbw_wordops {
    int64_t (*count)(const uint64_t *p, int64_t words);
    void (*and_not)(uint64_t *target, const uint64_t *left, const uint64_t *right, int64_t words);
    void (*or_into)(uint64_t *target, const uint64_t *source, int64_t words);
    int64_t (*skip_zeroes)(const uint64_t *p, int64_t word, int64_t end);    /* index of the first word not 0, or end */
    int64_t (*skip_ones)(const uint64_t *p, int64_t word, int64_t end);      /* index of the first word not ~0, or end */
    /* Runs of ones in the bits first..end (end > first), at most room; *resume is where to go on (end when done). */
    int64_t (*runs)(const uint64_t *p, int64_t first, int64_t end, struct fcbw_run *out, int64_t room, int64_t *resume);
};

/* A result larger than this many words does not stay in a cache: write it past the caches, which saves reading it. */
#define FCBW_STREAM_WORDS (1 << 20)

/* -- plain C */

static inline FCBW_RACY int64_t fcbw_count_generic(const uint64_t *p, int64_t words)
{
    int64_t i, total = 0;
    for (i = 0; i < words; i++) {       /* the parallel sum, which compilers vectorise; the builtin would be a call */
        uint64_t x = p[i];
        x -= (x >> 1) & 0x5555555555555555u;
        x = (x & 0x3333333333333333u) + ((x >> 2) & 0x3333333333333333u);
        x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
        x += x >> 8;
        x += x >> 16;
        total += (int64_t)((x + (x >> 32)) & 0x7f);
    }
    return total;
}

static inline FCBW_RACY uint64_t fcbw_mask64_generic(const uint64_t *p)
{
    uint64_t mask = 0;
    int i;
    for (i = 0; i < 64; i++)
        mask |= (uint64_t)(p[i] != 0) << i;
    return mask;
}

#define FN(name) fcbw_##name##_generic
#define TARGET
#define OR8(p) (((p)[0] | (p)[1] | (p)[2] | (p)[3] | (p)[4] | (p)[5] | (p)[6] | (p)[7]) != 0)
#define NOT_ONES8(p) (((p)[0] & (p)[1] & (p)[2] & (p)[3] & (p)[4] & (p)[5] & (p)[6] & (p)[7]) != ~(uint64_t)0)
#define MASK64(p) fcbw_mask64_generic(p)
#include "wordops_body.h"

#if FCBW_X86

/* -- SSE4.2: the popcnt instruction, 8 bytes a cycle */

__attribute__((target("sse4.2,popcnt"))) static FCBW_RACY int64_t fcbw_count_sse42(const uint64_t *p, int64_t words)
{
    int64_t i = 0, a = 0, b = 0, c = 0, d = 0;
    for (; i + 4 <= words; i += 4) {
        a += _mm_popcnt_u64(p[i]);
        b += _mm_popcnt_u64(p[i + 1]);
        c += _mm_popcnt_u64(p[i + 2]);
        d += _mm_popcnt_u64(p[i + 3]);
    }
    for (; i < words; i++)
        a += _mm_popcnt_u64(p[i]);
    return a + b + c + d;
}

#define FN(name) fcbw_##name##_sse42
#define TARGET __attribute__((target("sse4.2,popcnt")))
#define OR8(p) (((p)[0] | (p)[1] | (p)[2] | (p)[3] | (p)[4] | (p)[5] | (p)[6] | (p)[7]) != 0)
#define NOT_ONES8(p) (((p)[0] & (p)[1] & (p)[2] & (p)[3] & (p)[4] & (p)[5] & (p)[6] & (p)[7]) != ~(uint64_t)0)
#define MASK64(p) fcbw_mask64_generic(p)
#include "wordops_body.h"

/* -- AVX2: 32 bytes a load */

#define FCBW_LOAD4(p) _mm256_loadu_si256((const __m256i *)(p))

#define FN(name) fcbw_##name##_avx2
#define TARGET __attribute__((target("avx2,bmi,bmi2,popcnt")))
#define OR8(p) fcbw_or8_avx2(p)
#define NOT_ONES8(p) fcbw_not_ones8_avx2(p)
#define MASK64(p) fcbw_mask64_avx2(p)
#define STREAMS 1

static inline TARGET FCBW_RACY int fcbw_or8_avx2(const uint64_t *p)
{
    __m256i v = _mm256_or_si256(FCBW_LOAD4(p), FCBW_LOAD4(p + 4));
    return !_mm256_testz_si256(v, v);
}

static inline TARGET FCBW_RACY int fcbw_not_ones8_avx2(const uint64_t *p)
{
    return !_mm256_testc_si256(_mm256_and_si256(FCBW_LOAD4(p), FCBW_LOAD4(p + 4)), _mm256_set1_epi64x(-1));
}

static inline TARGET FCBW_RACY uint64_t fcbw_mask64_avx2(const uint64_t *p)
{
    uint64_t zeroes = 0;
    int i;
    for (i = 0; i < 64; i += 4) {
        __m256i equal = _mm256_cmpeq_epi64(FCBW_LOAD4(p + i), _mm256_setzero_si256());
        zeroes |= (uint64_t)(unsigned)_mm256_movemask_pd(_mm256_castsi256_pd(equal)) << i;
    }
    return ~zeroes;
}

#include "wordops_body.h"

/* -- AVX-512 with VPOPCNTDQ: only the count gains (512-bit loads made the walk slower) */

__attribute__((target("avx512f,avx512vpopcntdq"))) static FCBW_RACY int64_t fcbw_count_avx512(const uint64_t *p, int64_t words)
{
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    int64_t i = 0, total;
    for (; i + 32 <= words; i += 32) {
        a = _mm512_add_epi64(a, _mm512_popcnt_epi64(_mm512_loadu_si512(p + i)));
        b = _mm512_add_epi64(b, _mm512_popcnt_epi64(_mm512_loadu_si512(p + i + 8)));
        c = _mm512_add_epi64(c, _mm512_popcnt_epi64(_mm512_loadu_si512(p + i + 16)));
        d = _mm512_add_epi64(d, _mm512_popcnt_epi64(_mm512_loadu_si512(p + i + 24)));
    }
    total = _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_add_epi64(a, b), _mm512_add_epi64(c, d)));
    return total + fcbw_count_sse42(p + i, words - i);
}

#endif

/* -- the choice */

#define FCBW_WORDOPS(set, count_set) \
    {fcbw_count_##count_set, fcbw_and_not_##set, fcbw_or_into_##set, fcbw_skip_zeroes_##set, fcbw_skip_ones_##set, fcbw_runs_##set}

static const struct fcbw_wordops fcbw_wordops_of[FCBW_LEVELS] = {
    [FCBW_GENERIC] = FCBW_WORDOPS(generic, generic),
#if FCBW_X86
    [FCBW_SSE42] = FCBW_WORDOPS(sse42, sse42),
    [FCBW_AVX2] = FCBW_WORDOPS(avx2, sse42),
    [FCBW_AVX512] = FCBW_WORDOPS(avx2, avx512),
#endif
};

static struct fcbw_wordops fcbw_wordops = FCBW_WORDOPS(generic, generic);

/* Makes LEVEL the one that everything runs on, 0; or -1 when this machine has not got it. Not while kernels run. */
static int fcbw_wordops_choose(int level)
{
    if (level < 0 || level >= FCBW_LEVELS || !fcbw_level_runs(level))
        return -1;
    fcbw_wordops = fcbw_wordops_of[level];
    return 0;
}

#endif
