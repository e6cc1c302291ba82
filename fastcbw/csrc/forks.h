/* How many forks lie between the process that loaded the module and this one: a number that differs in a child. */
#ifndef FASTCBW_FORKS_H
#define FASTCBW_FORKS_H

#include <pthread.h>
#include <stdint.h>

static uint32_t fcbw_forks_count;
static pthread_once_t fcbw_forks_once = PTHREAD_ONCE_INIT;

static void fcbw_forks_child(void) { fcbw_forks_count++; } /* the child has one thread */
static void fcbw_forks_watch(void) { pthread_atfork(NULL, NULL, fcbw_forks_child); }

/* Watched from the first call on. */
static inline uint32_t fcbw_forks(void)
{
    pthread_once(&fcbw_forks_once, fcbw_forks_watch);
    return fcbw_forks_count;
}

#endif
