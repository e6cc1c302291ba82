"""What the engine says of itself: its counters, and the facts of a snapshot.

Only the engine calls these, which has the locks that they ask for; what may change meanwhile is read atomically, so a
report is of no one moment.
"""

from libc.stdint cimport int64_t, uint64_t

import os

from fastcbw.cbw.keep cimport keep_counts
from fastcbw.cbw.locmap cimport STORES_MAX
from fastcbw.cbw.policy cimport why_text
from fastcbw.cbw.reader cimport SnapshotDevice
from fastcbw.cbw.state cimport (BREAK_GUEST_WRITE, BREAK_SNAPSHOT, EngineState, LINES, Line, STALL_CLAIM, STALL_DEVICE, STALL_ROOM, Ticket,
                                WAIT_FOR_ROOM, enter, leave)
from fastcbw.cbw.store cimport Store, StoreFill, log_dead, store_fill, store_room
from fastcbw.kernels.atomic cimport load_relaxed, load_seq

#: What on_full and on_cbw_error may be, with the engine's number of each.
POLICIES = {"break-snapshot": BREAK_SNAPSHOT, "break-guest-write": BREAK_GUEST_WRITE, "wait": WAIT_FOR_ROOM}
_POLICY_NAMES = {value: name for name, value in POLICIES.items()}


cdef dict guest_counters(EngineState state):
    cdef int i
    cdef Ticket ticket
    cdef uint64_t writes = 0, moved = 0, touches = 0, waits = 0, slowest = 0
    cdef Line *line
    for i in range(LINES):
        line = &state.lines[i]
        writes += load_relaxed(&line.writes)
        moved += load_relaxed(&line.bytes)
        touches += load_relaxed(&line.touches)
        waits += load_relaxed(&line.waits)
        slowest = max(slowest, load_relaxed(&line.wait_ns_max))
    facts = {"writes": writes, "bytes": moved, "touches": touches, "waits": waits, "wait_us_max": slowest // 1000,
             "ram_reads": load_relaxed(&state.ram_reads), "ram_read_bytes": load_relaxed(&state.ram_read_bytes),
             "lazy_bytes": 0, "lazy_recorded": load_relaxed(&state.lazy_recorded),
             "lazy_cancelled": load_relaxed(&state.lazy_cancelled),
             "lazy_carried_out": load_relaxed(&state.lazy_carried_out), "lazy_failed": load_relaxed(&state.lazy_failed)}
    ticket = enter(state)       # without the control lock: a report does not wait for a snapshot that begins or ends
    if ticket.epoch.geometry != NULL:
        facts["lazy_bytes"] = load_relaxed(&ticket.epoch.geometry.lazy_count) << ticket.epoch.geometry.cluster_bits
    leave(ticket)
    return facts


cdef dict inherited_bytes(EngineState state):
    cdef int i
    cdef Store *store
    cdef StoreFill fill
    ram = disk = 0
    for i in range(STORES_MAX):
        store = state.stores[i]
        if store != NULL and store.retired:
            fill = store_fill(store)
            ram += fill.slots_used * store.cluster_bytes
            disk += fill.log_used * store.cluster_bytes
    return {"inherited_ram_bytes": ram, "inherited_disk_bytes": disk}


cdef dict snapshot_facts(EngineState state, SnapshotDevice snapshot):
    cdef Store *store
    cdef StoreFill fill
    cdef int64_t size = (<int64_t>1) << snapshot.cluster_bits
    cdef uint64_t kept, spared
    facts = {
        "state": "live" if snapshot.broken_reason() is None else "broken",
        "reason": snapshot.broken_reason(),
        "cluster_size": size,
        "bitmap": snapshot.bitmap_name,
        "export": snapshot.export,
        "discarded_bytes": load_relaxed(&snapshot.snap.discarded),
        "preserved_clusters": load_relaxed(&snapshot.snap.preserved),
        "preserved_bytes": load_relaxed(&snapshot.snap.preserved) * size,
        "zero_clusters": load_relaxed(&snapshot.snap.preserved_zero),
        "preserved_by": {
            "write": (load_relaxed(&snapshot.snap.preserved) - load_relaxed(&snapshot.snap.preserved_zeroing)) * size,
            "write-zeroes": load_relaxed(&snapshot.snap.preserved_zeroing) * size,
            "copy-on-read": load_relaxed(&snapshot.snap.read_kept) * size,
        },
        "ram_bytes": 0, "ram_bytes_max": 0, "ram_limit": 0, "disk_bytes": 0, "disk_limit": 0, "disk_dead_bytes": 0,
        "copy_on_read": bool(snapshot.snap.copy_on_read),
        "kept_clusters": 0, "kept_bytes": 0,
        "read_kept_clusters": load_relaxed(&snapshot.snap.read_kept),
        "dropped_clusters": load_relaxed(&snapshot.snap.dropped),
        "copies_avoided": load_relaxed(&snapshot.snap.spared),
        "cbw_timeout_ms": snapshot.snap.cbw_timeout_ns // 1000000,
        "on_full": _POLICY_NAMES[load_relaxed(&snapshot.snap.on_full)],
        "on_cbw_error": _POLICY_NAMES[load_relaxed(&snapshot.snap.on_cbw_error)],
        "consumers": load_seq(&snapshot.snap.consumers),
        "refused_writes": load_relaxed(&snapshot.snap.refused),
        "refused_reason": why_text(load_relaxed(&snapshot.snap.refused_why)).decode() if load_relaxed(&snapshot.snap.refused_why) else None,
        "flushed_clusters": 0, "disk_error": None, "seconds_to_full": None,
        "stalls": {kind: {"count": load_relaxed(&snapshot.snap.stalls[i]), "us": load_relaxed(&snapshot.snap.stall_ns[i]) // 1000}
                   for kind, i in (("claim", STALL_CLAIM), ("device", STALL_DEVICE), ("room", STALL_ROOM))},
    }
    if not snapshot.retired:        # afterwards the store is gone, or an older snapshot's
        keep_counts(state, snapshot.snap, &kept, &spared)
        facts["kept_clusters"] = kept
        facts["kept_bytes"] = kept * size
        facts["copies_avoided"] = spared
        store = snapshot.snap.store
        fill = store_fill(store)
        facts["ram_bytes"] = fill.slots_used * size
        facts["ram_bytes_max"] = fill.slots_used_max * size
        facts["ram_limit"] = fill.slots_limit * size
        facts["disk_bytes"] = fill.log_used * size
        facts["disk_limit"] = fill.log_limit * size
        facts["disk_dead_bytes"] = log_dead(store) * size
        facts["flushed_clusters"] = load_relaxed(&store.flushed)
        if load_seq(&store.log_error):
            facts["disk_error"] = os.strerror(load_seq(&store.log_error))
        if fill.rate > 0 and not store.in_place:        # which is never full
            facts["seconds_to_full"] = round((store_room(store, True) + <int64_t>kept) / fill.rate, 1)
    return facts
