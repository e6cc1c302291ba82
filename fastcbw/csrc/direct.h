/* What direct I/O (O_DIRECT) needs: the alignment that a file asks for, and vectors cut at it. */
#ifndef FASTCBW_DIRECT_H
#define FASTCBW_DIRECT_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
#include <linux/fs.h>

#define FCBW_ALIGNMENT_MAX 65536

/* Tries reads at offset 0 into memory that is aligned to SKEW (1 to FCBW_ALIGNMENT_MAX) and no more. 0 or -errno. */
static inline int fcbw_direct_try(int fd, char *buffer, int64_t skew, int64_t length)
{
    ssize_t got;
    do
        got = pread(fd, buffer + (skew < FCBW_ALIGNMENT_MAX ? skew : 0), (size_t)length, 0);
    while (got < 0 && errno == EINTR);
    return got < 0 ? -errno : 0;
}

/* The alignment that FD, opened O_DIRECT, wants: *memory for addresses, *block for offsets and lengths; powers of two.
 *
 * statx tells it on newer kernels, a block device its sector; else it is tried. A read from a hole may pass with an
 * alignment that data would not, so outside memory file systems a success with 1 is not believed: 4096 then.
 * 0 or -errno; -EOPNOTSUPP when the kernel says that this file has no direct I/O (it would buffer without a word). */
static inline int fcbw_direct_alignment(int fd, int in_memory, int64_t *memory, int64_t *block)
{
    struct stat status;
    char *buffer;
    int64_t found;
    int code, sector = 0;

#ifdef STATX_DIOALIGN
    struct statx told;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &told) == 0 && told.stx_mask & STATX_DIOALIGN) {
        if (told.stx_dio_offset_align == 0)
            return -EOPNOTSUPP;
        *memory = told.stx_dio_mem_align;
        *block = told.stx_dio_offset_align;
        return 0;
    }
#endif
    if (fstat(fd, &status) != 0)
        return -errno;
    if (S_ISBLK(status.st_mode)) {
        if (ioctl(fd, BLKSSZGET, &sector) != 0)
            return -errno;
        *memory = *block = sector;
        return 0;
    }
    if (posix_memalign((void **)&buffer, FCBW_ALIGNMENT_MAX, 2 * FCBW_ALIGNMENT_MAX) != 0)
        return -ENOMEM;
    code = -EINVAL;
    for (found = 1; found <= FCBW_ALIGNMENT_MAX && code == -EINVAL; found = found == 1 ? 512 : 2 * found) {
        code = fcbw_direct_try(fd, buffer, found, found);
        if (code == 0)
            break;
    }
    free(buffer);
    if (code != 0)
        return code == -EINVAL ? -EOPNOTSUPP : code;
    if (found == 1 && !in_memory)
        found = 4096;
    *memory = *block = found;
    return 0;
}

/* Whether every entry may go to the device as it is. */
static inline int fcbw_iov_aligned(const struct iovec *vector, int count, int64_t memory, int64_t block)
{
    for (int i = 0; i < count; i++)
        if ((uintptr_t)vector[i].iov_base & (uintptr_t)(memory - 1) || vector[i].iov_len & (size_t)(block - 1))
            return 0;
    return 1;
}

/* Describes the bytes SKIP to SKIP + LENGTH of a vector by at most MAX entries in PART; their count, 0 when it takes more. */
static inline int fcbw_iov_slice(const struct iovec *vector, int count, int64_t skip, int64_t length, struct iovec *part,
                                 int max)
{
    int used = 0;
    for (int i = 0; i < count && length > 0; i++) {
        int64_t here = (int64_t)vector[i].iov_len;
        if (skip >= here) {
            skip -= here;
            continue;
        }
        if (used == max)
            return 0;
        here -= skip;
        if (here > length)
            here = length;
        part[used].iov_base = (char *)vector[i].iov_base + skip;
        part[used++].iov_len = (size_t)here;
        length -= here;
        skip = 0;
    }
    return used;
}

/* Copies LENGTH bytes at SKIP of a vector into BUFFER (GATHER 1) or out of it (0). */
static inline void fcbw_iov_copy(int gather, char *buffer, const struct iovec *vector, int count, int64_t skip,
                                 int64_t length)
{
    for (int i = 0; i < count && length > 0; i++) {
        int64_t here = (int64_t)vector[i].iov_len;
        char *at;
        if (skip >= here) {
            skip -= here;
            continue;
        }
        at = (char *)vector[i].iov_base + skip;
        here -= skip;
        if (here > length)
            here = length;
        if (gather)
            memcpy(buffer, at, (size_t)here);
        else
            memcpy(at, buffer, (size_t)here);
        buffer += here;
        length -= here;
        skip = 0;
    }
}

#endif
