/* The system calls of the file device that Cython has no words for, each as a whole request.
 *
 * All return 0 (or what the comment says) or -errno, never set anything on the side, and may be called from any thread.
 * EINTR and short transfers are handled here. A read that meets the end of the file is -EIO: the image is shorter
 * than announced, and zeroes in its place would be a lie. */
#ifndef FASTCBW_SYSIO_H
#define FASTCBW_SYSIO_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef RWF_DSYNC
#define RWF_DSYNC 0x00000002
#endif
#ifndef RWF_NOWAIT
#define RWF_NOWAIT 0x00000008
#endif

/* The kernel's UIO_MAXIOV: more entries in one call are EINVAL. */
#define FCBW_IOV_MAX 1024
/* Entries rebuilt on the stack when a transfer stopped inside one. */
#define FCBW_IOV_REBUILT 128

static inline int fcbw_pread_all(int fd, char *buffer, int64_t offset, int64_t length)
{
    while (length > 0) {
        ssize_t got = pread(fd, buffer, (size_t)length, offset);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (got == 0)
            return -EIO;
        buffer += got;
        offset += got;
        length -= got;
    }
    return 0;
}

static inline int fcbw_pwrite_all(int fd, const char *buffer, int64_t offset, int64_t length)
{
    while (length > 0) {
        ssize_t got = pwrite(fd, buffer, (size_t)length, offset);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (got == 0)
            return -EIO;
        buffer += got;
        offset += got;
        length -= got;
    }
    return 0;
}

/* One call of readv (WRITING 0) or writev; RWF: flags of preadv2/pwritev2, 0 takes the older calls. */
static inline ssize_t fcbw_transfer(int writing, int fd, const struct iovec *vector, int count, int64_t offset, int rwf)
{
    if (writing)
        return rwf ? pwritev2(fd, vector, count, offset, rwf) : pwritev(fd, vector, count, offset);
    return rwf ? preadv2(fd, vector, count, offset, rwf) : preadv(fd, vector, count, offset);
}

/* The whole vector, of any count. LENGTH is the sum of its entries. */
static inline int fcbw_transfer_all(int writing, int fd, const struct iovec *vector, int count, int64_t offset,
                                    int64_t length, int rwf)
{
    struct iovec rebuilt[FCBW_IOV_REBUILT];
    const struct iovec *use;
    size_t skip = 0; /* bytes done of vector[0] */
    ssize_t got;
    int n, i;

    while (length > 0) {
        while (count > 0 && vector->iov_len == skip) {
            vector++;
            count--;
            skip = 0;
        }
        if (count == 0)
            return -EINVAL; /* the vector is shorter than LENGTH */
        if (skip == 0) {
            use = vector;
            n = count < FCBW_IOV_MAX ? count : FCBW_IOV_MAX;
        } else {
            n = count < FCBW_IOV_REBUILT ? count : FCBW_IOV_REBUILT;
            for (i = 0; i < n; i++)
                rebuilt[i] = vector[i];
            rebuilt[0].iov_base = (char *)rebuilt[0].iov_base + skip;
            rebuilt[0].iov_len -= skip;
            use = rebuilt;
        }
        got = fcbw_transfer(writing, fd, use, n, offset, rwf);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (got == 0)
            return -EIO;
        offset += got;
        length -= got;
        while (got > 0) {
            size_t left = vector->iov_len - skip;
            if ((size_t)got < left) {
                skip += (size_t)got;
                break;
            }
            got -= (ssize_t)left;
            vector++;
            count--;
            skip = 0;
        }
    }
    return 0;
}

static inline int fcbw_preadv_all(int fd, const struct iovec *vector, int count, int64_t offset, int64_t length)
{
    return fcbw_transfer_all(0, fd, vector, count, offset, length, 0);
}

static inline int fcbw_pwritev_all(int fd, const struct iovec *vector, int count, int64_t offset, int64_t length)
{
    return fcbw_transfer_all(1, fd, vector, count, offset, length, 0);
}

/* Durable before the return: data and the metadata needed to read it. -EOPNOTSUPP where the kernel lacks RWF_DSYNC. */
static inline int fcbw_pwritev_durable(int fd, const struct iovec *vector, int count, int64_t offset, int64_t length)
{
    int code = fcbw_transfer_all(1, fd, vector, count, offset, length, RWF_DSYNC);
    return code == -ENOSYS ? -EOPNOTSUPP : code;
}

/* All of it from the page cache in one call, or -EAGAIN; -EOPNOTSUPP where the file system can't tell. */
static inline int fcbw_preadv_cached(int fd, const struct iovec *vector, int count, int64_t offset, int64_t length)
{
    ssize_t got;
    if (count > FCBW_IOV_MAX)
        return -EAGAIN;
    got = preadv2(fd, vector, count, offset, RWF_NOWAIT);
    if (got == (ssize_t)length)
        return 0;
    if (got < 0 && (errno == EOPNOTSUPP || errno == ENOSYS))
        return -EOPNOTSUPP;
    /* Partly cached, interrupted, past the end or failed: the caller asks again with the call that may wait. */
    return -EAGAIN;
}

static inline int fcbw_fallocate(int fd, int mode, int64_t offset, int64_t length)
{
    while (fallocate(fd, mode, offset, length) != 0) {
        if (errno == ENOSYS)
            return -EOPNOTSUPP;
        if (errno != EINTR)
            return -errno;
    }
    return 0;
}

static inline int fcbw_punch_hole(int fd, int64_t offset, int64_t length)
{
    return fcbw_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
}

static inline int fcbw_zero_range(int fd, int64_t offset, int64_t length)
{
    return fcbw_fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length);
}

static inline int fcbw_fdatasync(int fd)
{
    while (fdatasync(fd) != 0) {
        if (errno != EINTR)
            return -errno;
    }
    return 0;
}

/* Of a block device: drops the data. Offset and length are multiples of its sector. */
static inline int fcbw_discard_sectors(int fd, int64_t offset, int64_t length)
{
    uint64_t range[2] = {(uint64_t)offset, (uint64_t)length};
    while (ioctl(fd, BLKDISCARD, range) != 0) {
        if (errno == ENOTTY)
            return -EOPNOTSUPP;
        if (errno != EINTR)
            return -errno;
    }
    return 0;
}

/* Bytes of a logical sector of a block device, or -errno. */
static inline int fcbw_sector_bytes(int fd)
{
    int bytes = 0;
    if (ioctl(fd, BLKSSZGET, &bytes) != 0)
        return -errno;
    return bytes > 0 ? bytes : -EINVAL;
}

/* 1 when the file lives in memory (tmpfs, ramfs), so that reading it never waits for a device. */
static inline int fcbw_in_memory(int fd)
{
    struct statfs fs;
    if (fstatfs(fd, &fs) != 0)
        return 0;
    return (uint32_t)fs.f_type == 0x01021994u || (uint32_t)fs.f_type == 0x858458f6u;
}

/* Have the page cache begin to read a range; 0 or -errno of the first piece that was refused. In pieces, as the kernel takes no more of
 * one call than the device's read-ahead. */
static inline int fcbw_read_ahead(int fd, int64_t offset, int64_t length)
{
    int64_t piece = 128 << 10;
    int code = 0;
    while (length > 0 && code == 0) {
        if (piece > length)
            piece = length;
        code = -posix_fadvise(fd, offset, piece, POSIX_FADV_WILLNEED);
        offset += piece;
        length -= piece;
    }
    return code;
}

/* The first extent of a range of a regular file: its length (1..LENGTH), *hole 1 or 0. What the file system does not
 * tell, or tells while it changes, is data. Past a shrunk file's end it is data too, so that a reader meets the error.
 * *data_end: where the data ends that begins at OFFSET, beyond the range as a rule; 0 where it is not known. */
/* 1 when every page of the range is in the page cache, 0 when not or where the kernel (before 6.5) does not tell. On tmpfs
 * what is in the page cache is what the file has. Costs a walk over the range's pages and no further. */
static inline int fcbw_all_cached(int fd, int64_t offset, int64_t length)
{
    struct { uint64_t offset, length; } range = { (uint64_t)offset, (uint64_t)length };
    struct { uint64_t cached, dirty, writeback, evicted, recently_evicted; } pages = { 0 };
    int64_t page = sysconf(_SC_PAGESIZE);
    if (syscall(451 /* cachestat, the same number everywhere */, fd, &range, &pages, 0) != 0)
        return 0;
    return pages.cached == (uint64_t)((offset + length - 1) / page - offset / page + 1);
}

static inline int64_t fcbw_first_extent(int fd, int64_t offset, int64_t length, int *hole, int64_t *data_end)
{
    off_t data, end;
    *hole = 0;
    *data_end = 0;
    data = lseek(fd, offset, SEEK_DATA);
    if (data < 0) {
        if (errno != ENXIO)
            return length;
        end = lseek(fd, 0, SEEK_END); /* no data from here on: a hole up to the end of the file */
        if (end <= offset)
            return length;
        *hole = 1;
        return end - offset < length ? end - offset : length;
    }
    if (data > offset) {
        *hole = 1;
        return data - offset < length ? data - offset : length;
    }
    end = lseek(fd, offset, SEEK_HOLE);
    if (end <= offset)
        return length;
    *data_end = end;
    return end - offset < length ? end - offset : length;
}

#endif
