"""What is made of results: table, CSV, and a page that stands alone."""

import csv
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from fastcbw.compare.output import report, sheet, svg, table
from fastcbw.compare.results import FORM


def record(scheme, repetition, p99, *, backup=True, target="file", **fields):
    guest = {"requests": 100, "seconds": 1.0, "iops": 100.0, "p50_us": p99 / 2, "p99_us": p99, "p999_us": p99 * 2, "max_us": p99 * 3,
             "p99_paced_us": p99, "stalls": 0, "stalled_s": 0.0, "written_bytes": 409600, "read_bytes": 0}
    facts = {"seconds": 1.5, "done_bytes": 1, "total_bytes": 1, "verified": True, "error": None} if backup else None
    return {"scheme": scheme, "load": "paced-4k", "target": target, "repetition": repetition, "status": "measured",
            "guest": {"before": guest, "during": guest, "after": guest}, "backup": facts, "settings": {}, "load_settings": {},
            "use": {"cpu_s": 0.5, "read_bytes": 1000, "written_bytes": 2000, "preserved_bytes": 1, "amplification": 1.5,
                    "ram_tier_bytes_max": 4096, "disk_tier_bytes_max": 0, "resident_bytes_max": 1},
            "curve": [[0, 1.0], [50, p99 / 2], [99, p99], [100, p99 * 3]],
            "time": {"t_s": [-0.5, 0.5, 1.0], "p50_us": [1, None, 2], "p99_us": [10.0, None, p99], "max_us": [1, None, 2], "iops": [1, 0, 1]},
            "tiers": {"t_s": [0.1, 0.2], "ram": [0, 4096], "disk": [0, 0], "done": [0, 1]}, "pause_s": 0.1, "backup_ends_s": 1.5} | fields


@pytest.fixture
def document():
    cells = [record("none", 0, 100.0, backup=False), record("none", 1, 200.0, backup=False), record("filter-tiers", 0, 150.0),
             record("filter-tiers", 1, 220.0), record("<odd> & new", 0, 9e6, backup=True, target="20mbs"),
             {"scheme": "qemu-fleecing", "load": "paced-4k", "target": "file", "repetition": 0, "status": "not installed", "why": "not installed: x"}]
    return {"form": FORM, "host": {"cpu": "one <fast>"}, "settings": {"length": 1 << 20, "pinned": True}, "cells": cells}


class Checked(HTMLParser):
    """Collects tags, and that each is closed."""

    VOID = {"meta", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.count, self.attributes = [], {}, []

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_whole_and_needs_no_network(document):
    page = report.page(document)
    found = Checked()
    found.feed(page)
    assert found.open == [] and "script" not in found.count and "img" not in found.count
    assert not [value for name, value in found.attributes if name in ("href", "src")]
    assert set(re.findall(r"https?://[^\"]*", page)) == {"http://www.w3.org/2000/svg"}
    assert page.count("<h3>") == 8 and page.count("viewBox") == 8
    assert "nothing to draw" not in page and "<odd>" not in page and "&lt;odd&gt; &amp; new" in page and "not installed: x" in page


def test_plots_are_files_of_their_own_with_every_name(document):
    files = report.plots(document)
    assert sorted(files) == [f"{kind}-{target}-paced-4k.svg" for kind in ("latency", "percentiles") for target in ("20mbs", "file")]
    root = ElementTree.fromstring(files["latency-file-paced-4k.svg"])
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"none", "filter-tiers"} <= set(texts) and root.get("height") == root.get("viewBox").split()[3]


def test_the_table_has_ratios_of_the_same_repetition(document):
    text = "\n".join(table.lines(document))
    (line,) = [line for line in text.splitlines() if line.startswith("filter-tiers")]
    assert re.search(r" 185 us +150 us\.\.220 us +\S+ us +185 us +1\.30 ", line) and "verified" in line
    assert "not installed: x" in text


def test_what_the_host_took_is_in_every_output(document):
    for cell, share in zip(document["cells"][2:4], (0.004, 0.02)):
        cell["steal"] = share
    (line,) = [line for line in table.lines(document) if line.startswith("filter-tiers")]
    assert line.endswith(" 1.2%") and "<td>1.2%</td>" in report.page(document)
    (none,) = [line for line in table.lines(document) if line.startswith("none")]
    assert none.endswith(" s")      # of results that have none
    file = io.StringIO()
    sheet.write(document, file)
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert [row["steal"] for row in rows[1:4]] == ["", "0.004", "0.02"]


def test_a_wrong_backup_is_not_to_be_overlooked(document):
    document["cells"][3]["backup"] |= {"verified": False, "error": "differs"}
    assert "WRONG" in "\n".join(table.lines(document)) and "class=wrong" in report.page(document)


def test_csv_has_a_line_for_each_cell(document):
    file = io.StringIO()
    sheet.write(document, file)
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert len(rows) == len(document["cells"])
    assert (rows[2]["during_p99_us"], rows[2]["backup_verified"], rows[2]["amplification"]) == ("150.0", "True", "1.5")
    assert (rows[5]["why"], rows[5]["during_p99_us"]) == ("not installed: x", "")


def test_lines_are_cut_where_a_value_is_missing():
    plot = svg.lines([("a", [(0, 1.0), (1, 2.0), (2, None), (3, 4.0)], 0)], x_label="x", y_label="y", y_text=str)
    assert plot.count("<polyline") == 1 and plot.count("<circle") == 1


@pytest.mark.parametrize(("low", "high", "expected"), [(0, 10, [0, 2, 4, 6, 8, 10]), (0.3, 2.1, [0.5, 1.0, 1.5, 2.0]), (0, 0, [0])])
def test_marks_are_round(low, high, expected):
    assert svg.ticks(low, high) == pytest.approx(expected)
