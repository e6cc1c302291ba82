from fastcbw.block.device import BlockDevice

CONNECTIONS_DEFAULT: int

class NbdDevice(BlockDevice):
    """The export that an NBD URI names, over one or several pipelined connections."""

    @property
    def uri(self) -> str: ...
    @property
    def connections(self) -> int: ...
    @property
    def flags(self) -> int: ...
    @property
    def structured(self) -> bool: ...
    def __init__(
        self,
        uri: str,
        *,
        read_only: bool = False,
        connections: int | None = None,
        requests: int = 16,
        in_flight: int | str = "16M",
        timeout: float | None = None,
        name: str | None = None,
    ) -> None: ...
    def same_export(self, uri: str) -> bool: ...
