"""The targets by name."""

from fastcbw.compare.targets.base import File, Nbdkit, Served, Target


class Nbd(Served):
    name = "nbd"
    title = "NBD on a unix socket"


class Slow20(Served):
    name = "20mbs"
    title = "20 MB/s"
    options = {"bytes_per_s": 20_000_000}


class Late50(Served):
    name = "50ms"
    title = "50 ms a write"
    options = {"write_ms": 50}


class Nbdkit20(Nbdkit):
    name = "nbdkit-20mbs"
    title = "nbdkit, 20 MB/s"
    filters, parameters, bytes_per_s = ("rate",), ("rate=160000000",), 20_000_000


class Nbdkit50(Nbdkit):
    name = "nbdkit-50ms"
    title = "nbdkit, 50 ms a write"
    filters, parameters = ("delay",), ("wdelay=50ms",)


class Stalling(Served):
    name = "stalling"
    title = "20 MB/s, one write takes 3 s"
    options = {"bytes_per_s": 20_000_000, "stall_after_bytes": 8 << 20, "stall_ms": 3000}


class FailingOnce(Served):
    name = "failing"
    title = "20 MB/s, one write fails"
    options = {"bytes_per_s": 20_000_000, "fail_after_bytes": 8 << 20, "fail_count": 1}


class Full(Served):
    name = "full"
    title = "20 MB/s, full after 16 MiB"
    options = {"bytes_per_s": 20_000_000, "full_after_bytes": 16 << 20}


TARGETS: dict[str, type[Target]] = {target.name: target for target in (
    File, Nbd, Slow20, Late50, Stalling, FailingOnce, Full, Nbdkit20, Nbdkit50)}
