# The numbers of constants.py that the data plane needs, as C constants. No module behind it: cimport only.
cdef enum:
    FLAG_SEND_FLUSH = 4
    FLAG_SEND_FUA = 8
    FLAG_SEND_TRIM = 32
    FLAG_SEND_WRITE_ZEROES = 64
    FLAG_CAN_MULTI_CONN = 256
    FLAG_SEND_FAST_ZERO = 2048

    REQUEST_MAGIC = 0x25609513
    SIMPLE_REPLY_MAGIC = 0x67446698
    STRUCTURED_REPLY_MAGIC = 0x668E33EF
    REQUEST_LENGTH = 28             # bytes of a request's header
    SIMPLE_REPLY_LENGTH = 16
    CHUNK_LENGTH = 20               # bytes of a structured chunk's header

    CMD_READ = 0
    CMD_WRITE = 1
    CMD_DISC = 2
    CMD_FLUSH = 3
    CMD_TRIM = 4
    CMD_CACHE = 5
    CMD_WRITE_ZEROES = 6
    CMD_BLOCK_STATUS = 7

    CMD_FLAG_FUA = 1
    CMD_FLAG_NO_HOLE = 2
    CMD_FLAG_DF = 4
    CMD_FLAG_REQ_ONE = 8
    CMD_FLAG_FAST_ZERO = 16

    REPLY_FLAG_DONE = 1
    REPLY_TYPE_NONE = 0
    REPLY_TYPE_OFFSET_DATA = 1
    REPLY_TYPE_OFFSET_HOLE = 2
    REPLY_TYPE_BLOCK_STATUS = 5
    REPLY_TYPE_ERROR = 32769
    REPLY_TYPE_ERROR_OFFSET = 32770
    REPLY_TYPE_ERROR_BIT = 32768    # of every type that is an error

    STRING_LENGTH_MAX = 4096

    PAYLOAD_LENGTH_MAX = 33554432
    CONTEXTS_MAX = 32
