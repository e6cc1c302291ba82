/* Which instruction set the kernels may use: one build, chosen at run time.
 *
 * Every kernel exists in a plain C form that is right everywhere. On x86-64 it exists again for wider instruction sets;
 * the modules pick a table of functions when they are imported. Function pointers and not `target_clones`: an ifunc
 * resolver runs before a sanitizer's runtime is up, musl has none, and a test can run every variant by its name. */
#ifndef FASTCBW_CPU_H
#define FASTCBW_CPU_H

#if defined(__x86_64__) && defined(__GNUC__)
#define FCBW_X86 1
#include <immintrin.h>
#else
#define FCBW_X86 0
#endif

/* Bulk kernels read words that other threads may change (a report, a scan that is checked again later). Every aligned
 * 64-bit word is read whole, old or new; that is all they promise, so the thread sanitizer is told not to look. */
#define FCBW_RACY __attribute__((no_sanitize("thread")))

enum { FCBW_GENERIC, FCBW_SSE42, FCBW_AVX2, FCBW_AVX512, FCBW_LEVELS };

static const char *const fcbw_level_names[FCBW_LEVELS] = {"generic", "sse4.2", "avx2", "avx512"};

/* 1 when this processor (and the operating system) can run LEVEL. */
static int fcbw_level_runs(int level)
{
#if FCBW_X86
    int sse42, avx2, avx512;
    __builtin_cpu_init();
    sse42 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    avx2 = sse42 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vpopcntdq");
    switch (level) {
    case FCBW_SSE42: return sse42;
    case FCBW_AVX2: return avx2;
    case FCBW_AVX512: return avx512;
    }
#endif
    return level == FCBW_GENERIC;
}

static int fcbw_level_best(void)
{
    int level = FCBW_LEVELS - 1;
    while (!fcbw_level_runs(level))
        level--;
    return level;
}

#endif
