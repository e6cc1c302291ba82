/* Zero test and CRC-32C, in every instruction set of cpu.h. Included by kernels/bytes.pyx only. */
#ifndef FASTCBW_BYTEOPS_H
#define FASTCBW_BYTEOPS_H

#include <stdint.h>
#include <string.h>

#include "cpu.h"

struct fcbw_byteops {
    int (*is_zero)(const uint8_t *p, int64_t length);                       /* length >= FCBW_ZERO_LEAST */
    uint32_t (*crc)(uint32_t crc, const uint8_t *p, int64_t length);        /* without the inversions before and after */
};

static inline uint64_t fcbw_load_u64(const uint8_t *p)
{
    uint64_t word;
    memcpy(&word, p, 8);
    return word;
}

/* -- zero test. Blocks of 128 bytes, so that data is found out early and zeroes go by at the speed of memory; the last
 * block overlaps the one before it instead of a loop over what is left. */

#define FCBW_ZERO_LEAST 128

static FCBW_RACY int fcbw_is_zero_short(const uint8_t *p, int64_t length)
{
    uint64_t any = 0;
    int64_t i;
    for (i = 0; i + 8 <= length; i += 8)
        any |= fcbw_load_u64(p + i);
    for (; i < length; i++)
        any |= p[i];
    return any == 0;
}

static inline FCBW_RACY int fcbw_zero128_generic(const uint8_t *p)
{
    uint64_t any = 0;
    int i;
    for (i = 0; i < 128; i += 8)
        any |= fcbw_load_u64(p + i);
    return any == 0;
}

static FCBW_RACY int fcbw_is_zero_generic(const uint8_t *p, int64_t length)
{
    int64_t i;
    for (i = 0; i + 128 <= length; i += 128)
        if (!fcbw_zero128_generic(p + i))
            return 0;
    return fcbw_zero128_generic(p + length - 128);
}

/* -- CRC-32C (Castagnoli, reflected, polynomial 0x82f63b78) */

#define FCBW_CRC_LANE 256       /* bytes of each of the three streams of the hardware variant */

static uint32_t fcbw_crc_slices[8][256];    /* [k][b]: byte b followed by k zero bytes */
static uint32_t fcbw_crc_skip1[4][256];     /* [k][b]: byte k of a crc is b, then FCBW_CRC_LANE zero bytes follow */
static uint32_t fcbw_crc_skip2[4][256];     /* the same for two lanes */

static uint32_t fcbw_crc_zeroes(uint32_t crc, int64_t length)
{
    while (length-- > 0)
        crc = (crc >> 8) ^ fcbw_crc_slices[0][crc & 0xff];
    return crc;
}

static void fcbw_crc_tables(void)
{
    uint32_t b, k, crc;
    for (b = 0; b < 256; b++) {
        crc = b;
        for (k = 0; k < 8; k++)
            crc = (crc >> 1) ^ (0x82f63b78u & (0u - (crc & 1)));
        fcbw_crc_slices[0][b] = crc;
    }
    for (b = 0; b < 256; b++)
        for (k = 1; k < 8; k++)
            fcbw_crc_slices[k][b] = fcbw_crc_zeroes(fcbw_crc_slices[k - 1][b], 1);
    for (k = 0; k < 4; k++)
        for (b = 0; b < 256; b++) {
            fcbw_crc_skip1[k][b] = fcbw_crc_zeroes(b << (8 * k), FCBW_CRC_LANE);
            fcbw_crc_skip2[k][b] = fcbw_crc_zeroes(fcbw_crc_skip1[k][b], FCBW_CRC_LANE);
        }
}

static uint32_t fcbw_crc_generic(uint32_t crc, const uint8_t *p, int64_t length)
{
    for (; length >= 8; length -= 8, p += 8) {      /* bytes one by one: right on either byte order */
        uint32_t low = crc ^ (p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
        crc = fcbw_crc_slices[7][low & 0xff] ^ fcbw_crc_slices[6][(low >> 8) & 0xff] ^
              fcbw_crc_slices[5][(low >> 16) & 0xff] ^ fcbw_crc_slices[4][low >> 24] ^
              fcbw_crc_slices[3][p[4]] ^ fcbw_crc_slices[2][p[5]] ^ fcbw_crc_slices[1][p[6]] ^ fcbw_crc_slices[0][p[7]];
    }
    for (; length > 0; length--, p++)
        crc = (crc >> 8) ^ fcbw_crc_slices[0][(crc ^ *p) & 0xff];
    return crc;
}

#if FCBW_X86

static inline uint32_t fcbw_crc_skip(const uint32_t table[4][256], uint32_t crc)
{
    return table[0][crc & 0xff] ^ table[1][(crc >> 8) & 0xff] ^ table[2][(crc >> 16) & 0xff] ^ table[3][crc >> 24];
}

/* The instruction takes a word each cycle but answers after three: three streams side by side, joined by
 * crc(A B C) = skip2(crc(A)) ^ skip1(crc(B)) ^ crc(C), where skip moves a crc past a lane of zeroes. */
__attribute__((target("sse4.2"))) static uint32_t fcbw_crc_sse42(uint32_t crc, const uint8_t *p, int64_t length)
{
    uint64_t a, b, c;
    int i;
    for (; length >= 3 * FCBW_CRC_LANE; length -= 3 * FCBW_CRC_LANE, p += 3 * FCBW_CRC_LANE) {
        a = crc;
        b = c = 0;
        for (i = 0; i < FCBW_CRC_LANE; i += 8) {
            a = _mm_crc32_u64(a, fcbw_load_u64(p + i));
            b = _mm_crc32_u64(b, fcbw_load_u64(p + FCBW_CRC_LANE + i));
            c = _mm_crc32_u64(c, fcbw_load_u64(p + 2 * FCBW_CRC_LANE + i));
        }
        crc = fcbw_crc_skip(fcbw_crc_skip2, (uint32_t)a) ^ fcbw_crc_skip(fcbw_crc_skip1, (uint32_t)b) ^ (uint32_t)c;
    }
    for (a = crc; length >= 8; length -= 8, p += 8)
        a = _mm_crc32_u64(a, fcbw_load_u64(p));
    for (crc = (uint32_t)a; length > 0; length--, p++)
        crc = _mm_crc32_u8(crc, *p);
    return crc;
}

static inline __attribute__((target("avx2"))) FCBW_RACY int fcbw_zero128_avx2(const uint8_t *p)
{
    __m256i a = _mm256_or_si256(_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32)));
    __m256i b = _mm256_or_si256(_mm256_loadu_si256((const __m256i *)(p + 64)), _mm256_loadu_si256((const __m256i *)(p + 96)));
    a = _mm256_or_si256(a, b);
    return _mm256_testz_si256(a, a);
}

__attribute__((target("avx2"))) static FCBW_RACY int fcbw_is_zero_avx2(const uint8_t *p, int64_t length)
{
    int64_t i;
    for (i = 0; i + 128 <= length; i += 128)
        if (!fcbw_zero128_avx2(p + i))
            return 0;
    return fcbw_zero128_avx2(p + length - 128);
}

#endif

/* -- the choice */

static struct fcbw_byteops fcbw_byteops = {fcbw_is_zero_generic, fcbw_crc_generic};

/* Makes LEVEL the one that everything runs on, 0; or -1 when this machine has not got it. Not while kernels run. */
static int fcbw_byteops_choose(int level)
{
    if (level < 0 || level >= FCBW_LEVELS || !fcbw_level_runs(level))
        return -1;
    if (fcbw_crc_slices[0][1] == 0)
        fcbw_crc_tables();
    fcbw_byteops.is_zero = fcbw_is_zero_generic;
    fcbw_byteops.crc = fcbw_crc_generic;
#if FCBW_X86
    if (level >= FCBW_SSE42)
        fcbw_byteops.crc = fcbw_crc_sse42;
    if (level >= FCBW_AVX2)
        fcbw_byteops.is_zero = fcbw_is_zero_avx2;
#endif
    return 0;
}

#endif
