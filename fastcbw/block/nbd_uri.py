"""NBD URIs: what they name, and whether two name the same thing.

    nbd://HOST[:PORT]/NAME              TCP; without a port 10809
    nbd+unix:///NAME?socket=PATH        a unix socket

Source: NetworkBlockDevice/nbd, doc/uri.md. NAME may be empty, and is percent-decoded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urlsplit

PORT_DEFAULT = 10809

_SCHEMES = ("nbd", "nbd+unix")
_SCHEMES_LATER = {"nbds": "TLS", "nbds+unix": "TLS", "nbd+vsock": "vsock", "nbds+vsock": "TLS", "nbd+ssh": "ssh", "nbds+ssh": "TLS"}
_EXAMPLES = "nbd://HOST[:PORT]/NAME or nbd+unix:///NAME?socket=PATH"


@dataclass(frozen=True)
class NbdUri:
    """An NBD URI taken apart. address: a socket's path, or (host, port)."""

    text: str
    address: str | tuple[str, int]
    export: str

    def absolute(self) -> str:
        """Return the URI as it is understood in any folder."""
        if not isinstance(self.address, str):
            return self.text
        return f"nbd+unix:///{quote(self.export)}?socket={quote(os.path.abspath(self.address))}"

    def same_as(self, other: NbdUri) -> bool:
        """Tell whether both name one export of one server, as far as names can tell."""
        return self._place() == other._place()

    def _place(self) -> tuple[object, str]:
        address = self.address
        return os.path.realpath(address) if isinstance(address, str) else (address[0].lower(), address[1]), self.export


def is_nbd_uri(text: str) -> bool:
    """Tell whether TEXT is meant as an NBD URI rather than as a path."""
    return text.startswith((*(f"{scheme}:" for scheme in (*_SCHEMES, *_SCHEMES_LATER)),))


def parse_nbd_uri(text: str) -> NbdUri:
    """Take TEXT apart. Raises ValueError, naming it and what is wrong, for what is no NBD URI or not built."""
    scheme = text.partition(":")[0]
    if scheme in _SCHEMES_LATER:
        raise ValueError(f"{text}: {_SCHEMES_LATER[scheme]} is not built yet (there is {_EXAMPLES})")
    if scheme not in _SCHEMES or not text.startswith(f"{scheme}://"):
        raise ValueError(f"{text}: is no NBD URI (there is {_EXAMPLES})")
    try:
        parts = urlsplit(text)
        port = parts.port
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError as error:
        raise ValueError(f"{text}: is no NBD URI: {error} (there is {_EXAMPLES})") from None
    if "\0" in unquote(text):
        raise ValueError(f"{text!r}: is no NBD URI: a zero byte in it")
    path = options.pop("socket", None)
    if options:
        raise ValueError(f"{text}: the parameter {next(iter(options))!r} is not built yet (there is socket)")
    if parts.fragment or parts.username is not None or parts.password is not None:
        raise ValueError(f"{text}: fragments, users and passwords have no meaning here (there is {_EXAMPLES})")
    export = unquote(parts.path.removeprefix("/"))
    if scheme == "nbd+unix":
        if not path:
            raise ValueError(f"{text}: names no socket (there is nbd+unix:///NAME?socket=PATH)")
        if parts.netloc:
            raise ValueError(f"{text}: a host with a unix socket (three slashes: nbd+unix:///NAME?socket=PATH)")
        return NbdUri(text, path, export)
    if path is not None:
        raise ValueError(f"{text}: a socket with TCP (nbd+unix:///NAME?socket=PATH, or no socket)")
    if not parts.hostname:
        raise ValueError(f"{text}: names no host (there is {_EXAMPLES})")
    return NbdUri(text, (parts.hostname, PORT_DEFAULT if port is None else port), export)
