/* Mutexes, conditions on the monotonic clock, short sleeps, and a small number for each thread.
 *
 * What Cython lacks of POSIX: initialisers with attributes, and thread-local storage with a destructor. */
#ifndef FASTCBW_SYNC_H
#define FASTCBW_SYNC_H

#include <errno.h>
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

/* What waits for other threads may not hold the interpreter: a device written in Python could not end what is waited for. */
static inline void fcbw_waits(void)
{
#ifdef Py_PYTHON_H
    fcbw_check(!PyGILState_Check(), "a thread that holds the interpreter waits for others");
#endif
}

static inline int64_t fcbw_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline void fcbw_sleep_ns(int64_t ns)
{
    fcbw_waits();
    struct timespec pause = { ns / 1000000000, ns % 1000000000 };
    nanosleep(&pause, NULL);
}

static inline int fcbw_cond_init(pthread_cond_t *cond)
{
    pthread_condattr_t attributes;
    int code = pthread_condattr_init(&attributes);
    if (code == 0) {
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
        code = pthread_cond_init(cond, &attributes);
        pthread_condattr_destroy(&attributes);
    }
    return code;
}

/* Waits until signalled or until the monotonic clock reads DEADLINE_NS; 0 or ETIMEDOUT. May wake without a reason. */
static inline int fcbw_cond_wait_until(pthread_cond_t *cond, pthread_mutex_t *mutex, int64_t deadline_ns)
{
    struct timespec until = { deadline_ns / 1000000000, deadline_ns % 1000000000 };
    return pthread_cond_timedwait(cond, mutex, &until);
}

/* From here on the calling thread yields the processor to any other thread that wants it, at once and not at the end of a
 * time slice: a guest's request that wakes up runs before a background copy. Returns errno where the system refuses. */
static inline int fcbw_run_in_background(void)
{
    struct sched_param none = { 0 };
    return pthread_setschedparam(pthread_self(), SCHED_IDLE, &none);
}

/* From here on the calling thread gets a small share of a busy processor (nice 10), and its disk I/O comes after that of
 * others where the disk's scheduler looks (the lowest best-effort level). For work that gives way to the guest, and that a guest
 * may yet have to wait for: SCHED_IDLE or the idle class could keep it from its turn for seconds. */
static inline void fcbw_give_way(void)
{
    if (setpriority(PRIO_PROCESS, 0, 10) == 0)              /* 0: on Linux this thread */
        syscall(SYS_ioprio_set, 1 /* a thread */, 0 /* this one */, 2 << 13 | 7);
}

/* From here on the calling thread is scheduled in slices of 0.1 ms instead of about 3: when it wakes up it need not wait until
 * the slice of who is running has ended (EEVDF, Linux 6.12; older kernels take it as no wish). For threads that serve a guest. */
static inline void fcbw_wake_at_once(void)
{
    struct {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } wish = { sizeof(wish), SCHED_OTHER, 0, getpriority(PRIO_PROCESS, 0), 0, 100000, 0, 0 };
    if (sched_getscheduler(0) == SCHED_OTHER)
        syscall(SYS_sched_setattr, 0, &wish, 0);
}

#endif
