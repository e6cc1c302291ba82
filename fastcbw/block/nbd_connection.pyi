SLOTS: int

class NbdConnection:
    """The transmission phase of one connection of the NBD client device."""

    def __init__(
        self, fd: int, *, structured: bool, context: int | None, requests: int, bytes: int, timeout_ns: int
    ) -> None: ...
    def close(self) -> None: ...
