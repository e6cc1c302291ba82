from fastcbw.block.device import BlockDevice
from fastcbw.cbw.notifier import WriteNotifier

class NotifiedView(BlockDevice):
    """The disk at the begin() of a WriteNotifier, read-only."""

    notifier: WriteNotifier
    def __init__(self, notifier: WriteNotifier, name: str | None = ...) -> None: ...
