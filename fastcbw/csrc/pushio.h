/* What the kernel offers a copier whose ends are regular files in the page cache, each as a whole request.
 *
 * As sysio.h: 0 or -errno, EINTR and partial transfers handled here, any thread. */
#ifndef FASTCBW_PUSHIO_H
#define FASTCBW_PUSHIO_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <unistd.h>

/* The range of one file into the same range of another. *DONE: bytes that were copied, also when it fails. The source's
 * end inside the range is -EIO, as in a read: the image is shorter than announced. */
static inline int fcbw_copy_range(int source, int target, int64_t offset, int64_t length, int64_t *done)
{
    *done = 0;
    while (*done < length) {
        off64_t from = offset + *done, to = from;
        ssize_t got = copy_file_range(source, &from, target, &to, (size_t)(length - *done), 0);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (got == 0)
            return -EIO;
        *done += got;
    }
    return 0;
}

/* Whether CODE, of a first copy, says that the kernel or these file systems do not copy between such files at all. */
static inline int fcbw_copy_is_lacking(int code)
{
    return code == -EXDEV || code == -EOPNOTSUPP || code == -ENOSYS || code == -EINVAL || code == -ENOTTY;
}

/* Whether FD always appends, whatever offset is named. */
static inline int fcbw_appends(int fd)
{
    int flags = fcntl(fd, F_GETFL);
    return flags < 0 || (flags & O_APPEND);
}

/* Begin to write the range back; does not wait unless the device's queue is full. */
static inline int fcbw_write_back(int fd, int64_t offset, int64_t length)
{
    while (sync_file_range(fd, offset, length, SYNC_FILE_RANGE_WRITE) != 0) {
        if (errno != EINTR)
            return -errno;
    }
    return 0;
}

/* Wait until the range has been written back, and give its pages away. No promise of durability: that is fdatasync's. */
static inline int fcbw_write_back_end(int fd, int64_t offset, int64_t length)
{
    while (sync_file_range(fd, offset, length,
                           SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER) != 0) {
        if (errno != EINTR)
            return -errno;
    }
    posix_fadvise(fd, offset, length, POSIX_FADV_DONTNEED);
    return 0;
}

#endif
