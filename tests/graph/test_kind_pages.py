"""Each kind of node has its page, and the page's table is the schema: options, types, children and roles."""

import pathlib

import pytest

from fastcbw.graph.kinds import KINDS
from fastcbw.graph.kinds.fault import RULE
from fastcbw.graph.kinds.foreign import FORMATS
from fastcbw.graph.options import COMMON

PAGES = pathlib.Path(__file__).resolve().parents[2] / "docs" / "kinds"


def page_of(driver):
    """Formats have one page together, and so have file and host_device."""
    return PAGES / f"{'formats' if driver in FORMATS else {'host_device': 'file'}.get(driver, driver.removeprefix('x-fastcbw-'))}.md"


def table(kind):
    """What the page of KIND has to hold. Copy it from here when the schema changes."""
    rows = ["| option | type | meaning |", "|---|---|---|"]
    for child, role in kind.children.items():
        rows.append(f"| `{child}` | node | child, role `{role}`; required |")
    for option in kind.options:
        rows.append(row(option))
    return "\n".join(rows) if len(rows) > 2 else ""


def row(option):
    kind = {"dict": "object", "dicts": "array of objects", "int": "integer", "str": "string", "bool": "boolean"}[option.type]
    words = [option.doc]
    words += [f"one of {', '.join(f'`{choice}`' for choice in option.choices)}"] if option.choices else []
    words += [f"at least {option.least}"] if option.least else []
    words += ["required"] if option.required else []
    return f"| `{option.name}` | {kind} | {'; '.join(words)} |"


@pytest.mark.parametrize("driver", KINDS)
def test_the_page_of_a_kind_has_its_table(driver):
    page = page_of(driver).read_text()
    assert f"`{driver}`" in page and table(KINDS[driver]) in page, f"{page_of(driver)} lacks\n{table(KINDS[driver])}"


def test_the_rules_of_the_fault_node_are_on_its_page():
    page = page_of("x-fastcbw-fault").read_text()
    for option in RULE:
        assert row(option) in page, row(option)


def test_what_every_kind_takes_is_told_once():
    page = (PAGES / "README.md").read_text()
    for option in COMMON:
        assert row(option) in page, row(option)


def test_every_page_is_linked_and_of_a_kind():
    index = (PAGES / "README.md").read_text()
    pages = {page_of(driver).name for driver in KINDS}
    assert pages == {path.name for path in PAGES.glob("*.md")} - {"README.md"}
    assert all(f"({name})" in index for name in pages)
