/* A small number for each live thread, 1 to 255, and 0 for all threads beyond: the index of its line of counters. */
#ifndef FASTCBW_THREADS_H
#define FASTCBW_THREADS_H

#include <pthread.h>
#include <stdint.h>

#define FCBW_THREAD_SLOTS 256

static uint64_t fcbw_thread_used[FCBW_THREAD_SLOTS / 64] = { 1 };      /* slot 0 is everybody's */
static pthread_key_t fcbw_thread_key;
static pthread_once_t fcbw_thread_once = PTHREAD_ONCE_INIT;
static __thread int fcbw_thread_mine = -1;

static void fcbw_thread_free(void *slot_as_pointer)
{
    uintptr_t slot = (uintptr_t)slot_as_pointer;
    __atomic_fetch_and(&fcbw_thread_used[slot / 64], ~((uint64_t)1 << (slot % 64)), __ATOMIC_RELEASE);
}

static void fcbw_thread_make_key(void) { pthread_key_create(&fcbw_thread_key, fcbw_thread_free); }

static int fcbw_thread_take(void)
{
    pthread_once(&fcbw_thread_once, fcbw_thread_make_key);
    fcbw_thread_mine = 0;
    for (uintptr_t slot = 1; slot < FCBW_THREAD_SLOTS; slot++) {
        uint64_t bit = (uint64_t)1 << (slot % 64);
        if (__atomic_fetch_or(&fcbw_thread_used[slot / 64], bit, __ATOMIC_ACQUIRE) & bit)
            continue;
        if (pthread_setspecific(fcbw_thread_key, (void *)slot) != 0) {
            fcbw_thread_free((void *)slot);     /* without a destructor the slot would never come back */
            break;
        }
        fcbw_thread_mine = (int)slot;
        break;
    }
    return fcbw_thread_mine;
}

static inline int fcbw_thread_slot(void)
{
    return fcbw_thread_mine >= 0 ? fcbw_thread_mine : fcbw_thread_take();
}

#endif
