from collections.abc import Mapping

from fastcbw.bitmaps.dirty import DirtyWords
from fastcbw.cbw.dirty import DirtyBitmap
from fastcbw.cbw.reader import SnapshotDevice
from fastcbw.export.nbd.contexts import MetaContext

PREFIX: str

class LiveBitmapContext(MetaContext):
    def __init__(self, bitmap: DirtyBitmap) -> None: ...

class FrozenBitmapContext(MetaContext):
    def __init__(self, name: str, words: DirtyWords) -> None: ...

def contexts_of_disk(bitmaps: Mapping[str, DirtyBitmap]) -> dict[str, MetaContext]: ...
def contexts_of_snapshot(device: SnapshotDevice) -> dict[str, MetaContext]: ...
