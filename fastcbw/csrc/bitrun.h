/* A run of ones in a bitmap, as kernels return it and as a NumPy array of (first, count) sees it. */
#ifndef FASTCBW_BITRUN_H
#define FASTCBW_BITRUN_H

#include <stdint.h>

struct fcbw_run {
    int64_t first, count;       /* bits */
};

#endif
