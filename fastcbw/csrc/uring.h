/* io_uring by its three system calls: one ring, one thread.
 *
 * The rings are memory that the kernel and we share; each index has one writer.
 *
 *   SQ tail   ours.     The entry is written first, the index then with release: whoever acquires the index sees the
 *                       entry. (Without a kernel polling thread the kernel reads it within our own system call, where
 *                       program order would do; the code does not lean on that.)
 *   SQ head   kernel's. Loaded with acquire before an entry is reused: the kernel stores it with release once it has copied
 *                       the entry, so our new words cannot be seen in place of the old ones.
 *   CQ tail   kernel's. Loaded with acquire before a completion is read: the kernel stores it with release after the
 *                       completion. What the request did to the caller's buffer was done before that, so the same acquire
 *                       makes it visible to us.
 *   CQ head   ours.     Stored with release after the completion was copied out: the kernel acquires it before it writes
 *                       over the place, so it cannot get there before our reads.
 *
 * No full fence is needed: that takes a kernel polling thread that may fall asleep (IORING_SETUP_SQPOLL), which we don't use.
 *
 * The completion ring has twice as many places as the submission ring, and its user never has more requests in the kernel
 * than the submission ring has places: completions never overflow.
 *
 * All functions return 0 (or what the comment says) or -errno. Not safe for two threads at once. */
#ifndef FASTCBW_URING_H
#define FASTCBW_URING_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
#if defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#endif
#endif

struct fcbw_uring {
    int fd;             /* -1: not open */
    uint32_t entries;   /* of the submission ring */
    uint32_t tail;      /* our SQ tail, with entries that are not published yet */
    uint32_t *sq_head, *sq_tail, *sq_flags;
    uint32_t *cq_head, *cq_tail;
    uint32_t sq_mask, cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    void *rings;
    uint64_t rings_bytes, sqes_bytes;
};

enum { FCBW_URING_READ, FCBW_URING_WRITE, FCBW_URING_SYNC, FCBW_URING_POLL };

#if defined(IORING_ENTER_EXT_ARG) && defined(__NR_io_uring_setup)

#ifndef IORING_SETUP_COOP_TASKRUN
#define IORING_SETUP_COOP_TASKRUN (1U << 8)
#define IORING_SETUP_TASKRUN_FLAG (1U << 9)
#endif
#ifndef IORING_SQ_TASKRUN
#define IORING_SQ_TASKRUN (1U << 2)
#endif
/* One mapping for both rings; completions are never dropped; vectors are copied at submission; waits have a time limit. */
#define FCBW_URING_FEATURES (IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE | IORING_FEAT_EXT_ARG)

static inline void fcbw_uring_close(struct fcbw_uring *ring)
{
    if (ring->sqes)
        munmap(ring->sqes, ring->sqes_bytes);
    if (ring->rings)
        munmap(ring->rings, ring->rings_bytes);
    if (ring->fd >= 0)
        close(ring->fd);
    memset(ring, 0, sizeof *ring);
    ring->fd = -1;
}

/* In the child of a fork: the mappings were not inherited. */
static inline void fcbw_uring_close_forked(struct fcbw_uring *ring)
{
    if (ring->fd >= 0)
        close(ring->fd);
    memset(ring, 0, sizeof *ring);
    ring->fd = -1;
}

/* A ring of at least ENTRIES. -ENOSYS, -EPERM: the kernel has no io_uring, or not for us; or an older one than we need. */
static inline int fcbw_uring_open(struct fcbw_uring *ring, uint32_t entries)
{
    struct io_uring_params params;
    uint64_t sq_bytes, cq_bytes;
    uint32_t *array;
    char *base;
    int code;

    memset(ring, 0, sizeof *ring);
    memset(&params, 0, sizeof params);
    /* Completions are worked off when we are in the kernel anyway, instead of interrupting us. Newer kernels only. */
    params.flags = IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG;
    ring->fd = (int)syscall(__NR_io_uring_setup, entries, &params);
    if (ring->fd < 0 && errno == EINVAL) {
        memset(&params, 0, sizeof params);
        ring->fd = (int)syscall(__NR_io_uring_setup, entries, &params);
    }
    if (ring->fd < 0)
        return -errno;
    if ((params.features & FCBW_URING_FEATURES) != FCBW_URING_FEATURES) {
        fcbw_uring_close(ring);
        return -ENOSYS;
    }
    sq_bytes = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
    cq_bytes = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    ring->rings_bytes = sq_bytes > cq_bytes ? sq_bytes : cq_bytes;
    ring->sqes_bytes = params.sq_entries * sizeof(struct io_uring_sqe);
    base = mmap(NULL, ring->rings_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQ_RING);
    if (base == MAP_FAILED)
        goto failed;
    ring->rings = base;
    ring->sqes = mmap(NULL, ring->sqes_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQES);
    if ((void *)ring->sqes == MAP_FAILED) {
        ring->sqes = NULL;
        goto failed;
    }
    /* A child would share them, and with them our indices. */
    if (madvise(ring->rings, ring->rings_bytes, MADV_DONTFORK) != 0 || madvise(ring->sqes, ring->sqes_bytes, MADV_DONTFORK) != 0)
        goto failed;
    ring->entries = params.sq_entries;
    ring->sq_head = (uint32_t *)(base + params.sq_off.head);
    ring->sq_tail = (uint32_t *)(base + params.sq_off.tail);
    ring->sq_flags = (uint32_t *)(base + params.sq_off.flags);
    ring->sq_mask = *(uint32_t *)(base + params.sq_off.ring_mask);
    ring->cq_head = (uint32_t *)(base + params.cq_off.head);
    ring->cq_tail = (uint32_t *)(base + params.cq_off.tail);
    ring->cq_mask = *(uint32_t *)(base + params.cq_off.ring_mask);
    ring->cqes = (struct io_uring_cqe *)(base + params.cq_off.cqes);
    /* Entry n is always at place n. */
    array = (uint32_t *)(base + params.sq_off.array);
    for (uint32_t i = 0; i < params.sq_entries; i++)
        array[i] = i;
    ring->tail = *ring->sq_tail;
    return 0;
failed:
    code = -errno;
    fcbw_uring_close(ring);
    return code;
}

/* Entries that the kernel has not taken yet. */
static inline uint32_t fcbw_uring_waiting(struct fcbw_uring *ring)
{
    return ring->tail - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE);
}

/* Adds an entry; the kernel gets it with the next enter. There must be room. VECTOR is read then, not now: it has to stay.
 * READ, WRITE: COUNT entries of VECTOR at OFFSET; SYNC: fdatasync; POLL: until FD can be read. */
static inline void fcbw_uring_add(struct fcbw_uring *ring, int kind, int fd, const struct iovec *vector, int count,
                                  int64_t offset, uint64_t data)
{
    struct io_uring_sqe *entry = &ring->sqes[ring->tail & ring->sq_mask];
    int write = kind == FCBW_URING_WRITE;

    memset(entry, 0, sizeof *entry);
    entry->fd = fd;
    entry->user_data = data;
    if (kind == FCBW_URING_SYNC) {
        entry->opcode = IORING_OP_FSYNC;
        entry->fsync_flags = IORING_FSYNC_DATASYNC;
    } else if (kind == FCBW_URING_POLL) {
        entry->opcode = IORING_OP_POLL_ADD;
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        entry->poll32_events = 1u << 16; /* POLLIN, halves swapped as the kernel wants it */
#else
        entry->poll32_events = 1; /* POLLIN */
#endif
    } else {
        entry->off = (uint64_t)offset;
        if (count == 1) {
            entry->opcode = write ? IORING_OP_WRITE : IORING_OP_READ;
            entry->addr = (uintptr_t)vector->iov_base;
            entry->len = vector->iov_len < 1u << 30 ? (uint32_t)vector->iov_len : 1u << 30; /* the rest: a short transfer */
        } else {
            entry->opcode = write ? IORING_OP_WRITEV : IORING_OP_READV;
            entry->addr = (uintptr_t)vector;
            entry->len = count < 1024 ? (uint32_t)count : 1024;
        }
    }
    ring->tail++;
    __atomic_store_n(ring->sq_tail, ring->tail, __ATOMIC_RELEASE);
}

/* Takes back the newest entry that the kernel has not taken: 1 and its *data, or 0 when there is none. */
static inline int fcbw_uring_take_back(struct fcbw_uring *ring, uint64_t *data)
{
    if (fcbw_uring_waiting(ring) == 0)
        return 0;
    ring->tail--;
    *data = ring->sqes[ring->tail & ring->sq_mask].user_data;
    __atomic_store_n(ring->sq_tail, ring->tail, __ATOMIC_RELEASE);
    return 1;
}

/* Gives the kernel what waits, then waits for WANT completions, at most TIMEOUT_NS (negative: for ever).
 * 0; -ETIME, -EINTR; or the error of a kernel that has taken fewer entries than there were, or none. */
static inline int fcbw_uring_enter(struct fcbw_uring *ring, uint32_t want, int64_t timeout_ns)
{
    struct io_uring_getevents_arg argument;
    struct { int64_t tv_sec, tv_nsec; } limit;
    uint32_t flags = IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG;

    memset(&argument, 0, sizeof argument);
    if (want && timeout_ns >= 0) {
        limit.tv_sec = timeout_ns / 1000000000;
        limit.tv_nsec = timeout_ns % 1000000000;
        argument.ts = (uintptr_t)&limit;
    }
    for (;;) {
        uint32_t waiting = fcbw_uring_waiting(ring);
        long taken = syscall(__NR_io_uring_enter, ring->fd, waiting, want, flags, &argument, sizeof argument);
        if (taken < 0)
            return -errno;
        /* When entries were taken, an interrupted or failed wait is not told; the caller looks and asks again. */
        if ((uint32_t)taken == waiting)
            return 0;
        if (taken == 0)
            return -EAGAIN;
    }
}

/* The next completion: 1 with *data and *result, or 0 when there is none. */
static inline int fcbw_uring_reap(struct fcbw_uring *ring, uint64_t *data, int *result)
{
    uint32_t head = *ring->cq_head; /* only we write it */
    if (head == __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE))
        return 0;
    *data = ring->cqes[head & ring->cq_mask].user_data;
    *result = ring->cqes[head & ring->cq_mask].res;
    __atomic_store_n(ring->cq_head, head + 1, __ATOMIC_RELEASE);
    return 1;
}

/* Whether completions wait for us to enter the kernel. */
static inline int fcbw_uring_owes(struct fcbw_uring *ring)
{
    return (__atomic_load_n(ring->sq_flags, __ATOMIC_RELAXED) & IORING_SQ_TASKRUN) != 0;
}

#else   /* built where the headers don't know io_uring: it is not there */

static inline void fcbw_uring_close(struct fcbw_uring *ring) { ring->fd = -1; }
static inline void fcbw_uring_close_forked(struct fcbw_uring *ring) { ring->fd = -1; }
static inline int fcbw_uring_open(struct fcbw_uring *ring, uint32_t entries) { ring->fd = -1; return -ENOSYS; }
static inline uint32_t fcbw_uring_waiting(struct fcbw_uring *ring) { return 0; }
static inline void fcbw_uring_add(struct fcbw_uring *ring, int kind, int fd, const struct iovec *vector, int count,
                                  int64_t offset, uint64_t data) { }
static inline int fcbw_uring_take_back(struct fcbw_uring *ring, uint64_t *data) { return 0; }
static inline int fcbw_uring_enter(struct fcbw_uring *ring, uint32_t want, int64_t timeout_ns) { return -ENOSYS; }
static inline int fcbw_uring_reap(struct fcbw_uring *ring, uint64_t *data, int *result) { return 0; }
static inline int fcbw_uring_owes(struct fcbw_uring *ring) { return 0; }

#endif
#endif
