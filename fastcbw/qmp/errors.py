"""The error of the QMP server: a class and a description, as they go over the wire."""

from __future__ import annotations

GENERIC = "GenericError"
COMMAND_NOT_FOUND = "CommandNotFound"


class QmpError(Exception):
    """A request that is answered with an error.

    description: one line, shown to the user as it is.
    kind: the error class on the wire, GenericError or CommandNotFound.
    """

    def __init__(self, description: str, kind: str = GENERIC):
        super().__init__(description)
        self.description = description
        self.kind = kind

    def wire(self) -> dict:
        """Return the value of the reply's member ``error``."""
        return {"class": self.kind, "desc": self.description}
