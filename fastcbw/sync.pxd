# POSIX threads and csrc/sync.h. Times are nanoseconds of the monotonic clock.
from libc.stdint cimport int64_t

cdef extern from "sync.h" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes) noexcept
    int pthread_mutex_destroy(pthread_mutex_t *mutex) noexcept
    int pthread_mutex_lock(pthread_mutex_t *mutex) noexcept
    int pthread_mutex_unlock(pthread_mutex_t *mutex) noexcept
    int pthread_cond_destroy(pthread_cond_t *cond) noexcept
    int pthread_cond_signal(pthread_cond_t *cond) noexcept
    int pthread_cond_broadcast(pthread_cond_t *cond) noexcept
    int pthread_cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex) noexcept
    int cond_init "fcbw_cond_init"(pthread_cond_t *cond) noexcept
    int cond_wait_until "fcbw_cond_wait_until"(pthread_cond_t *cond, pthread_mutex_t *mutex, int64_t deadline_ns) noexcept
    int64_t now_ns "fcbw_now_ns"() noexcept
    void sleep_ns "fcbw_sleep_ns"(int64_t ns) noexcept
    void waits "fcbw_waits"() noexcept
    int sched_yield() noexcept
    int run_in_background "fcbw_run_in_background"() noexcept
    void give_way "fcbw_give_way"() noexcept
    void wake_at_once "fcbw_wake_at_once"() noexcept
