"""The schemes by name, in the order of the table."""

from fastcbw.cbw.policies import ORDERS
from fastcbw.compare.schemes import ours, qemu
from fastcbw.compare.schemes.base import Scheme

SCHEMES: dict[str, type[Scheme]] = {scheme.name: scheme for scheme in (
    ours.NoBackup, ours.Notifier, ours.NotifierTuned, ours.FilterRam, ours.FilterTiers, *map(ours.with_order, ORDERS), ours.Pull,
    ours.StoreIsTarget, ours.SyncNone, ours.Overlay, ours.SlowSource, ours.SlowSourceKept,
    qemu.Direct, qemu.DirectTuned, qemu.SyncNone, qemu.Fleecing, qemu.FleecingTuned, qemu.FleecingPull, qemu.Overlay)}
