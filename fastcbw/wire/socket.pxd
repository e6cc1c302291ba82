# The socket calls of both sides of NBD: the server's transmission loop, the client device.
cdef extern from "<sys/socket.h>" nogil:
    cdef struct msghdr:
        void *msg_iov               # struct iovec *, which block/sys has the name of
        size_t msg_iovlen
    ssize_t recv(int fd, void *buffer, size_t length, int flags) noexcept
    ssize_t send(int fd, const void *buffer, size_t length, int flags) noexcept
    ssize_t recvmsg(int fd, msghdr *message, int flags) noexcept
    ssize_t sendmsg(int fd, const msghdr *message, int flags) noexcept
    int shutdown(int fd, int how) noexcept
    int MSG_DONTWAIT
    int MSG_NOSIGNAL
    int SHUT_RDWR

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout_ms) noexcept
    short POLLIN
    short POLLOUT
