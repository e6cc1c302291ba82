# The part of POSIX threads that the pool and the transmission loop use.
cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef unsigned long pthread_t
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes) noexcept
    int pthread_mutex_destroy(pthread_mutex_t *mutex) noexcept
    int pthread_mutex_lock(pthread_mutex_t *mutex) noexcept
    int pthread_mutex_unlock(pthread_mutex_t *mutex) noexcept
    int pthread_cond_init(pthread_cond_t *condition, void *attributes) noexcept
    int pthread_cond_destroy(pthread_cond_t *condition) noexcept
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex) noexcept
    int pthread_cond_broadcast(pthread_cond_t *condition) noexcept
    pthread_t pthread_self() noexcept
    int pthread_setname_np(pthread_t thread, const char *name) noexcept
