"""What can be counted of a daemon: one table of names, units and words, and the text that Prometheus reads.

A row of a table says where in the reports of a disk or a snapshot its number stands. A number in a report that the table does not name
is exported all the same, under its own name, so that nothing that is counted is ever hidden.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np

from fastcbw.cbw.latency import KINDS, LIMITS_NS

#: Latencies are measured this long after somebody asked for them.
ASKED_SECONDS = 60.0


@dataclass(frozen=True)
class Metric:
    """key: in the report. name: after `fastcbw_disk_` or `fastcbw_snapshot_`, as Prometheus wants it (a counter ends in _total).

    scale: by which the report's number is multiplied to get the unit.
    """

    key: str
    name: str
    unit: str
    help: str
    scale: float = 1

    @property
    def type(self) -> str:
        return "counter" if self.name.endswith("_total") else "gauge"


#: Of Engine.counters(), a disk's.
DISK_METRICS = (
    Metric("writes", "guest_writes_total", "requests", "Guest writes, write-zeroes and discards."),
    Metric("bytes", "guest_written_bytes_total", "bytes", "Bytes of those."),
    Metric("touches", "guest_preserving_total", "requests", "Guest writes that had something to preserve."),
    Metric("waits", "guest_waits_total", "requests", "Guest writes that waited for a claim or a slow device."),
    Metric("wait_us_max", "guest_wait_seconds_max", "seconds", "The longest that a guest write took to preserve.", 1e-6),
    Metric("ram_reads", "guest_ram_reads_total", "requests", "Guest reads served from RAM, in whole or in part."),
    Metric("ram_read_bytes", "guest_ram_read_bytes_total", "bytes", "Bytes of those that the device was not asked for."),
    Metric("lazy_bytes", "lazy_discard_bytes", "bytes", "Bytes of guest discards that are recorded and not yet carried out."),
    Metric("lazy_recorded", "lazy_recorded_bytes_total", "bytes", "Bytes of guest discards that were recorded: no copy was made for them."),
    Metric("lazy_cancelled", "lazy_cancelled_bytes_total", "bytes", "Of these, cancelled by a later guest write."),
    Metric("lazy_carried_out", "lazy_carried_out_bytes_total", "bytes", "Of these, carried out when no snapshot needed them any more."),
    Metric("inherited_ram_bytes", "inherited_ram_bytes", "bytes", "RAM in use by what ended snapshots have left to older ones."),
    Metric("inherited_disk_bytes", "inherited_disk_bytes", "bytes", "Disk tiers in use by what ended snapshots have left to older ones."),
    Metric("lazy_failed", "lazy_failed_bytes_total", "bytes", "Of these, refused by the disk when they were carried out."),
)

#: Of Engine.report(name), a snapshot's.
SNAPSHOT_METRICS = (
    Metric("cluster_size", "cluster_bytes", "bytes", "Unit of copy-before-write."),
    Metric("preserved_clusters", "preserved_clusters_total", "clusters", "Clusters whose old data was preserved."),
    Metric("preserved_bytes", "preserved_bytes_total", "bytes", "The same in bytes."),
    Metric("zero_clusters", "zero_clusters_total", "clusters", "Of the preserved clusters, those that were zeroes and took no room."),
    Metric("ram_bytes", "ram_bytes", "bytes", "RAM tier in use."),
    Metric("ram_bytes_max", "ram_bytes_max", "bytes", "The most that the RAM tier has held."),
    Metric("ram_limit", "ram_limit_bytes", "bytes", "Limit of the RAM tier."),
    Metric("disk_bytes", "disk_bytes", "bytes", "Disk tier in use."),
    Metric("disk_limit", "disk_limit_bytes", "bytes", "Limit of the disk tier."),
    Metric("disk_dead_bytes", "disk_dead_bytes", "bytes", "Disk tier that came free and can't be used before the rest of its segment has gone."),
    Metric("kept_clusters", "kept_clusters", "clusters", "Clusters in RAM that readers left there and the guest has not changed."),
    Metric("kept_bytes", "kept_bytes", "bytes", "The same in bytes."),
    Metric("read_kept_clusters", "read_kept_clusters_total", "clusters", "Clusters that readers left in RAM."),
    Metric("dropped_clusters", "dropped_clusters_total", "clusters", "Of these, dropped again to make room."),
    Metric("copies_avoided", "copies_avoided_total", "clusters", "First touches that found their cluster in RAM and copied nothing."),
    Metric("discarded_bytes", "discarded_bytes_total", "bytes", "Bytes that readers discarded from the snapshot: guest writes there copy nothing."),
    Metric("consumers", "consumers", "readers", "Exports and jobs that drop from the snapshot what they have read."),
    Metric("refused_writes", "refused_writes_total", "requests", "Guest writes that failed for the snapshot's sake (break-guest-write)."),
    Metric("holds", "holds", "readers", "Clients and jobs that hold the snapshot."),
    Metric("flushed_clusters", "flushed_clusters_total", "clusters", "Clusters moved from RAM to the disk tier."),
    Metric("seconds_to_full", "to_full_seconds", "seconds", "Forecast of when both tiers are full, at the rate of now."),
    Metric("cbw_timeout_ms", "cbw_timeout_seconds", "seconds", "The longest that a guest write may wait.", 1e-3),
)

#: What a snapshot's report has for each cause: key -> member or None, and how it is shown.
CAUSES = {
    "stalls": (("count", Metric("stalls", "stalls_total", "requests", "Guest writes that waited, by what they waited for.")),
               ("us", Metric("stalls", "stall_seconds_total", "seconds", "How long they waited.", 1e-6))),
    "preserved_by": ((None, Metric("preserved_by", "preserved_by_bytes_total", "bytes", "Bytes preserved, by what made it necessary.")),),
}

#: What features have saved: cause -> how a report's numbers give the bytes. A gauge: a recorded discard that a write cancels saved nothing.
DISK_SAVED = {
    "lazy-discard": lambda guest: guest["lazy_recorded"] - guest["lazy_cancelled"],
    "ram-reads": lambda guest: guest["ram_read_bytes"],
}
SNAPSHOT_SAVED = {
    "zeroes": lambda facts: facts["zero_clusters"] * facts["cluster_size"],
    "copy-on-read": lambda facts: facts["copies_avoided"] * facts["cluster_size"],
    "snapshot-discard": lambda facts: facts["discarded_bytes"],
}
SAVED_HELP = ("Bytes that were not copied, read or kept, by the feature that saved them: lazy-discard (no copy for a guest's discard), ram-reads (not "
              "read from the device), zeroes (no room), copy-on-read (no copy at a first touch), snapshot-discard (not needed any more).")

#: Of an NBD export's counters: the key is in `counters`.
EXPORT_METRICS = tuple(Metric(key, f"{key}_total", unit, text) for key, unit, text in (
    ("requests", "requests", "Requests of NBD clients."),
    ("reads", "requests", "Reads."), ("writes", "requests", "Writes."), ("zeroes", "requests", "Write-zeroes."), ("trims", "requests", "Trims."),
    ("flushes", "requests", "Flushes."), ("caches", "requests", "CACHE requests."), ("statuses", "requests", "BLOCK_STATUS requests."),
    ("bytes_read", "bytes", "Bytes read."), ("bytes_written", "bytes", "Bytes written."), ("bytes_zeroed", "bytes", "Bytes zeroed."),
    ("bytes_trimmed", "bytes", "Bytes trimmed."), ("errors", "requests", "Requests that got an error."),
    ("receives", "calls", "Calls that received something; requests by this is the batching.")))


def _known(table: tuple[Metric, ...], report: dict) -> list[tuple[Metric, float]]:
    """Return every number of REPORT with its row; those that the table does not name with a row made for them."""
    rows = {metric.key: metric for metric in table}
    return [(rows.get(key) or Metric(key, key, "", "See the documentation."), value) for key, value in report.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)]


class LatencyMeters:
    """Latency of guest writes of every disk, measured from the first ask until nobody has asked for ASKED_SECONDS.

    Of disks that the daemon serves, and of those under nodes; one that has gone, or come under a name again, begins anew. Lock order: the daemon's
    change lock, then ours.
    """

    def __init__(self, daemon):
        self._daemon = daemon
        self._lock = threading.Lock()
        self._meters: dict[str, tuple[object, object, np.ndarray, float]] = {}      # name: disk, its meter, sums, when it began
        self._timer: threading.Timer | None = None
        self._asked = 0.0
        self._closed = False

    def look(self) -> dict[str, dict]:
        """Return, for each disk, when measuring began and the histogram of each kind: pairs of a limit in ns and a count.

        Sums since the beginning: who wants a rate subtracts. A beginning that is another than before says that they began anew.
        """
        with self._daemon.changing(), self._lock:
            if self._closed:
                return {}
            self._asked = time.monotonic()
            if self._timer is None:
                self._start_timer(ASKED_SECONDS)
            seen = {}
            disks = self._daemon.live_disks()
            for name in [name for name, (disk, *_) in self._meters.items() if disks.get(name) is not disk]:
                self._meters.pop(name)[1].close()
            for name, disk in disks.items():
                _, meter, sums, began = self._meters.get(name) or (
                    disk, disk.latency_meter(), np.zeros((len(KINDS), len(LIMITS_NS)), np.uint64), time.time())
                sums = sums + meter.look()
                self._meters[name] = disk, meter, sums, began
                seen[name] = {"since": round(began, 3), **{
                    kind: [[int(LIMITS_NS[i]), int(sums[k, i])] for i in np.flatnonzero(sums[k])] for k, kind in enumerate(KINDS)}}
            return seen

    def _start_timer(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.name = "fastcbw-meters"
        self._timer.start()

    def _expire(self) -> None:
        with self._lock:
            left = self._asked + ASKED_SECONDS - time.monotonic()
            if self._closed or left <= 0:
                self._timer = None
                self._end()
            else:
                self._start_timer(left)

    def _end(self) -> None:
        for _, meter, _, _ in self._meters.values():
            meter.close()
        self._meters.clear()

    def close(self) -> None:
        """End every measurement; look() shows nothing from then on."""
        with self._lock:
            self._closed = True
            timer, self._timer = self._timer, None
            self._end()
        if timer is not None:
            timer.cancel()
            timer.join()


class _Text:
    """Samples by metric, since Prometheus wants those of one name together, under one HELP and TYPE."""

    def __init__(self):
        self.samples: dict[str, list[str]] = {}

    def add(self, name: str, type_: str, words: str, value: float, suffix: str = "", **labels: str) -> None:
        head = self.samples.setdefault(name, [f"# HELP {name} {words}", f"# TYPE {name} {type_}"])
        text = ",".join(f'{label}="{_escaped(str(content))}"' for label, content in labels.items())
        head.append(f"{name}{suffix}{{{text}}} {value:g}" if isinstance(value, float) and not value.is_integer() else f"{name}{suffix}{{{text}}} {int(value)}")

    def __str__(self) -> str:
        return "".join(line + "\n" for lines in self.samples.values() for line in lines)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def prometheus(status: dict, latencies: dict[str, dict]) -> str:
    """Return STATUS (Daemon.status) and LATENCIES (LatencyMeters.look) in Prometheus' text format."""
    text = _Text()
    text.add("fastcbw_info", "gauge", "The version that runs.", 1, version=status["version"])
    text.add("fastcbw_uptime_seconds", "gauge", "How long it has.", float(status["uptime_s"]))
    for name, disk in status["disks"].items():
        text.add("fastcbw_disk_length_bytes", "gauge", "Length of the disk.", disk["length"], disk=name)
        for metric, value in _known(DISK_METRICS, disk["guest"]):
            text.add(f"fastcbw_disk_{metric.name}", metric.type, metric.help, value * metric.scale, disk=name)
        for cause, bytes_of in DISK_SAVED.items():
            text.add("fastcbw_disk_saved_bytes", "gauge", SAVED_HELP, bytes_of(disk["guest"]), disk=name, cause=cause)
        for snapshot, facts in disk["snapshots"].items():
            text.add("fastcbw_snapshot_broken", "gauge", "1 when it was given up for the guest's sake.", int(facts.get("state") == "broken"),
                     disk=name, snapshot=snapshot)
            for metric, value in _known(SNAPSHOT_METRICS, facts):
                text.add(f"fastcbw_snapshot_{metric.name}", metric.type, metric.help, value * metric.scale, disk=name, snapshot=snapshot)
            for cause, bytes_of in SNAPSHOT_SAVED.items() if "cluster_size" in facts else ():      # not when it has just been deleted
                text.add("fastcbw_snapshot_saved_bytes", "gauge", SAVED_HELP, bytes_of(facts), disk=name, snapshot=snapshot, cause=cause)
            for key, shown in CAUSES.items():
                for cause, value in facts.get(key, {}).items():
                    for member, metric in shown:
                        number = value if member is None else value[member]
                        text.add(f"fastcbw_snapshot_{metric.name}", metric.type, metric.help, number * metric.scale,
                                 disk=name, snapshot=snapshot, cause=cause)
    for export in (status["nbd"] or {"exports": []})["exports"]:
        text.add("fastcbw_nbd_connections", "gauge", "Clients that are connected.", export["connections"], export=export["name"])
        for metric, value in _known(EXPORT_METRICS, export["counters"]):
            text.add(f"fastcbw_nbd_{metric.name}", metric.type, metric.help, value, export=export["name"])
    for job in status["jobs"]:
        for key, words in (("current-progress", "Bytes that the job has done."), ("total-progress", "Bytes that it has to do."),
                           ("bytes-per-s", "Its rate.")):
            text.add(f"fastcbw_job_{key.replace('-', '_').replace('progress', 'bytes')}", "gauge", words, job[key],
                     job=job["id"], status=job.get("outcome", job["status"]))
    for name, kinds in latencies.items():
        for kind in KINDS:
            _histogram(text, name, kind, kinds[kind])
    return str(text)


def _histogram(text: _Text, disk: str, kind: str, pairs: list[list[int]]) -> None:
    """Buckets at powers of two; the sum is of the buckets' limits, so up to an eighth too large."""
    metric = "fastcbw_disk_guest_write_seconds"
    words = "Latency of guest writes since somebody began to ask."
    counts = np.zeros(len(LIMITS_NS), np.int64)
    for limit, count in pairs:
        counts[np.searchsorted(LIMITS_NS, limit)] += count
    cumulated = np.cumsum(counts)
    for power in range(10, 36, 2):
        seconds = f"{2.0**power / 1e9:.9g}"
        text.add(metric, "histogram", words, int(cumulated[np.searchsorted(LIMITS_NS, 1 << power)]), "_bucket", disk=disk, kind=kind, le=seconds)
    text.add(metric, "histogram", words, int(cumulated[-1]), "_bucket", disk=disk, kind=kind, le="+Inf")
    text.add(metric, "histogram", words, float((counts * (LIMITS_NS / 1e9)).sum()), "_sum", disk=disk, kind=kind)
    text.add(metric, "histogram", words, int(cumulated[-1]), "_count", disk=disk, kind=kind)
