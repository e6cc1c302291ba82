"""`nbd`: an export of an NBD server."""

from __future__ import annotations

from urllib.parse import quote

from fastcbw.block.nbd import NbdDevice
from fastcbw.errors import Error
from fastcbw.graph.kinds.base import Kind
from fastcbw.graph.node import Node
from fastcbw.graph.options import NodeOption


class Nbd(Kind):
    driver = "nbd"
    options = (
        NodeOption("server", "dict", '{"type": "unix", "path": …} or {"type": "inet", "host": …, "port": …}', required=True),
        NodeOption("export", "str", "the export's name (default: the server's only one)"),
    )

    def open(self, node: Node) -> None:
        uri = server_uri(node.options["server"], node.options.get("export", ""))
        node.device = NbdDevice(uri, read_only=node.options.get("read-only", False), name=node.name)

    def give_up(self, node: Node) -> None:
        node.device.close()


def server_uri(server: dict, export: str) -> str:
    """Return the NBD URI of EXPORT at SERVER, an address as QEMU's SocketAddress."""
    kind = server.get("type")
    wanted = {"unix": {"type", "path"}, "inet": {"type", "host", "port"}}.get(kind if isinstance(kind, str) else "")
    if wanted is None:
        raise Error(f"Parameter 'server.type' does not accept value '{kind}' (there is unix, inet)")
    for name in sorted(wanted - set(server)):
        raise Error(f"Parameter 'server.{name}' is missing")
    for name in sorted(set(server) - wanted):
        raise Error(f"Parameter 'server.{name}' is unexpected")
    for name in sorted(wanted):
        if not isinstance(server[name], str):
            raise Error(f"Invalid parameter type for 'server.{name}', expected: string")
    if kind == "unix":
        return f"nbd+unix:///{quote(export, safe='')}?socket={quote(server['path'], safe='/')}"
    host = f"[{server['host']}]" if ":" in server["host"] else server["host"]
    return f"nbd://{host}:{server['port']}/{quote(export, safe='')}"
