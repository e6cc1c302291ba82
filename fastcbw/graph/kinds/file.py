"""`file` and `host_device`: a raw image file or block device of this machine."""

from __future__ import annotations

import os
import stat

from fastcbw.block.image import open_image
from fastcbw.errors import Error
from fastcbw.graph.kinds.base import Kind
from fastcbw.graph.node import Node
from fastcbw.graph.options import NodeOption


class File(Kind):
    driver = "file"
    options = (
        NodeOption("filename", "str", "the path", required=True),
        NodeOption("cache", "dict", '{"direct": bool, "no-flush": false}: past the page cache'),
        NodeOption("aio", "str", "who does requests that must be waited for (default threads)", choices=("threads", "io_uring")),
        NodeOption("locking", "str", "QEMU's image locks (default auto, the same as on)", choices=("auto", "on", "off")),
    )

    def open(self, node: Node) -> None:
        options = node.options
        cache = options.get("cache", {})
        for name, value in cache.items():
            if name not in ("direct", "no-flush") or not isinstance(value, bool):
                raise Error(f"Parameter 'cache.{name}' is unexpected (there is direct and no-flush, each a boolean)")
        if cache.get("no-flush"):
            raise Error("Parameter 'cache.no-flush' does not accept value 'true' (a flush of the guest is never dropped)")
        self._check_path(options["filename"])
        arguments = {"lock": options.get("locking") != "off" and not options.get("force-share"), "name": node.name,
                     "direct": cache.get("direct", False), "format": "raw"}
        if "aio" in options:
            arguments["io"] = {"threads": "threads", "io_uring": "uring"}[options["aio"]]
        read_only = options.get("read-only", False)
        try:
            node.device = open_image(options["filename"], read_only=read_only, **arguments)
        except PermissionError:
            if read_only or not options.get("auto-read-only"):
                raise
            node.device = open_image(options["filename"], read_only=True, **arguments)

    def _check_path(self, path: str) -> None:
        if stat.S_ISBLK(os.stat(path).st_mode):
            raise Error(f"'{self.driver}' driver requires '{path}' to be a regular file (take host_device)")


class HostDevice(File):
    driver = "host_device"

    def _check_path(self, path: str) -> None:
        if not stat.S_ISBLK(os.stat(path).st_mode):
            raise Error(f"'{self.driver}' driver requires '{path}' to be a block device (take file)")
