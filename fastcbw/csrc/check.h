/* Assertions on the engine's invariants: compiled in by FASTCBW_DEBUG=1 only, since a library may not end its user. */
#ifndef FASTCBW_CHECK_H
#define FASTCBW_CHECK_H

#ifdef FASTCBW_DEBUG
#include <stdio.h>
#include <stdlib.h>
#define fcbw_check(condition, rule)                                                            \
    do {                                                                                       \
        if (!(condition)) {                                                                    \
            fprintf(stderr, "fastcbw: invariant broken: %s (%s:%d)\n", rule, __FILE__, __LINE__); \
            abort();                                                                           \
        }                                                                                      \
    } while (0)
#else
#define fcbw_check(condition, rule) ((void)sizeof(condition))
#endif

#endif
