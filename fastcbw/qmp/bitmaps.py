"""QEMU's commands for dirty bitmaps: add, remove, clear, enable, disable, merge. A list of them is in fastcbw-status, as QEMU tells of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fastcbw.qmp.errors import QmpError
from fastcbw.qmp.schema import Argument, Command

if TYPE_CHECKING:
    from fastcbw.qmp.daemon import Daemon


def _do_add(daemon: Daemon, backups: list, node: str, name: str, granularity: int | None = None, persistent: bool = False,
            disabled: bool = False) -> Callable[[], None]:
    if persistent:
        raise QmpError("persistent: bitmaps that outlive the daemon are not built yet (leave it out)")
    return daemon.disk(node).add_bitmap(name, granularity=granularity, enabled=not disabled).remove


def _do_clear(daemon: Daemon, backups: list, node: str, name: str) -> Callable[[], None]:
    bitmap = daemon.bitmap(node, name)
    old = bitmap.clear()
    return lambda: bitmap.mark_again(old)


def _do_enable(daemon: Daemon, backups: list, node: str, name: str) -> Callable[[], None]:
    bitmap = daemon.bitmap(node, name)
    was = bitmap.enabled
    bitmap.enable()
    return bitmap.enable if was else bitmap.disable


def _do_disable(daemon: Daemon, backups: list, node: str, name: str) -> Callable[[], None] | None:
    """Undone too late for what was written meanwhile, so a transaction that fails marks all of the disk."""
    bitmap = daemon.bitmap(node, name)
    if not bitmap.enabled:
        return None
    bitmap.disable()

    def undo() -> None:
        bitmap.enable()
        bitmap.mark_all()

    return undo


def _do_merge(daemon: Daemon, backups: list, node: str, target: str, bitmaps: list[str]) -> None:
    # Not undone: to mark too much costs an increment some bytes, to mark too little would cost it data.
    daemon.bitmap(node, target).merge(*bitmaps)


def _do_remove(daemon: Daemon, backups: list, node: str, name: str) -> Callable[[], None]:
    """Undone too late for what was written meanwhile, as with disable."""
    bitmap = daemon.bitmap(node, name)
    granularity, enabled = bitmap.granularity, bitmap.enabled
    bitmap.remove()

    def undo() -> None:
        again = daemon.disk(node).add_bitmap(name, granularity=granularity, enabled=enabled)
        again.mark_all()

    return undo


_NODE = Argument("node", "str", "the disk", required=True)
_NAME = Argument("name", "str", "the bitmap", required=True)

#: What a transaction may hold, too. Those before a backup of the same transaction are done before its instant.
BITMAP_ACTIONS = (
    Command("block-dirty-bitmap-add", "add a bitmap that marks what the guest writes from now on", _do_add, (
        _NODE, _NAME,
        Argument("granularity", "size", "bytes per bit, a power of two from 512 to 2G (default 64K)"),
        Argument("persistent", "bool", "keep it when the daemon ends (not built yet)"),
        Argument("disabled", "bool", "mark nothing until it is enabled"))),
    Command("block-dirty-bitmap-clear", "forget what a bitmap marks; it goes on from now", _do_clear, (_NODE, _NAME)),
    Command("block-dirty-bitmap-enable", "have a bitmap mark guest writes", _do_enable, (_NODE, _NAME)),
    Command("block-dirty-bitmap-disable", "have a bitmap stay as it is", _do_disable, (_NODE, _NAME)),
    Command("block-dirty-bitmap-merge", "mark in one bitmap also what others mark", _do_merge, (
        _NODE,
        Argument("target", "str", "the bitmap that is changed", required=True),
        Argument("bitmaps", "strings", "names of bitmaps of the same disk, of any granularity", required=True))),
    Command("block-dirty-bitmap-remove", "remove a bitmap that no job uses", _do_remove, (_NODE, _NAME)),
)

