# Reports of the engine, for Engine alone, whose methods say what is in them.
from fastcbw.cbw.reader cimport SnapshotDevice
from fastcbw.cbw.state cimport EngineState

cdef dict guest_counters(EngineState state)                                     # without the control lock
cdef dict inherited_bytes(EngineState state)                                    # with it
cdef dict snapshot_facts(EngineState state, SnapshotDevice snapshot)            # with it
