"""Results as CSV: a line for each measurement, its facts flattened."""

from __future__ import annotations

import csv
from typing import IO, Any

GUEST = ("requests", "seconds", "iops", "p50_us", "p99_us", "p999_us", "max_us", "p99_paced_us", "stalls", "stalled_s", "written_bytes", "read_bytes")
BACKUP = ("seconds", "done_bytes", "total_bytes", "verified", "error")
USE = ("cpu_s", "read_bytes", "written_bytes", "preserved_bytes", "amplification", "ram_tier_bytes_max", "disk_tier_bytes_max", "resident_bytes_max")
KEYS = ("scheme", "load", "target", "repetition", "status", "why", "attempts", "steal")
HEADS = (*KEYS, *(f"{phase}_{name}" for phase in ("before", "during", "after") for name in GUEST), *(f"backup_{name}" for name in BACKUP), *USE)


def write(document: dict[str, Any], file: IO[str]) -> None:
    """Write DOCUMENT into FILE, under a line of heads."""
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(HEADS)
    for record in document["cells"]:
        guest, backup, use = record.get("guest", {}), record.get("backup") or {}, record.get("use", {})
        lines.writerow([*(record.get(key) for key in KEYS), *(guest.get(phase, {}).get(name) for phase in ("before", "during", "after") for name in GUEST),
                        *(backup.get(name) for name in BACKUP), *(use.get(name) for name in USE)])
