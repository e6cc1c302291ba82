class IoThreads:
    """The threads of one queue; nothing of it is for Python."""

    def __init__(self, limit: int) -> None: ...
