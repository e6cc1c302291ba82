"""Imports point down, and the architecture page names every file: the package by its text."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastcbw"

# Lowest first. A file imports from its own layer's package and from layers before it; __init__ is the public API, which
# the command line may use like anybody else.
LAYERS = [
    ("version", "errors", "units", "sync"),
    ("kernels",),
    ("bitmaps",),
    ("wire",),
    ("block",),
    ("cbw",),
    ("jobs",),
    ("export",),
    ("disk",),
    ("graph",),
    ("qmp",),
    ("__init__",),
    ("compare",),
    ("cli",),
    ("__main__",),
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

SOURCES = sorted(path for suffix in ("py", "pyx", "pxd") for path in PACKAGE.rglob(f"*.{suffix}"))


def part_of(path):
    """Return the name in LAYERS that the file at PATH belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first if (PACKAGE / first).is_dir() else path.stem


def absolute(module, level, path):
    """Return the dotted name of a module imported in PATH with LEVEL dots in front."""
    if not level:
        return module
    package = ["fastcbw", *path.relative_to(PACKAGE).parent.parts]
    return ".".join(package[:len(package) - level + 1] + ([module] if module else []))


def imported(path):
    """Yield (line, dotted module, names) of each import and cimport in PATH, names being what `from` takes of it."""
    text = path.read_text()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node.lineno, alias.name, []
            elif isinstance(node, ast.ImportFrom):
                yield node.lineno, absolute(node.module or "", node.level, path), [alias.name for alias in node.names]
        return
    text = re.sub(r"#[^\n]*", "", text)
    statement = re.compile(r"^[ \t]*(?:from[ \t]+(\.*)([\w.]*)[ \t]+c?import[ \t]+(\([^)]*\)|(?:\\\n|[^\n])*)|c?import[ \t]+([^\n]*))", re.M)
    for match in statement.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        dots, module, names, plain = match.groups()
        if plain is not None:
            for name in plain.split(","):
                yield line, name.split()[0], []
        else:
            taken = [name.split()[0] for name in names.strip("()").replace("\\", " ").split(",") if name.split()]
            yield line, absolute(module, len(dots), path), taken


def parts_imported(path):
    """Yield (line, part) of each import in PATH from the package, the part being a name in LAYERS."""
    for line, module, names in imported(path):
        package, _, rest = module.partition(".")
        if package != "fastcbw":
            continue
        if rest:
            yield line, rest.split(".")[0]
        else:
            for name in names or [""]:
                yield line, name if name in RANK else "__init__"


def test_every_file_has_a_layer():
    unknown = {part_of(path) for path in SOURCES} - set(RANK)
    assert SOURCES and not unknown, f"not in the layers of {__file__}: {sorted(unknown)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    mine = part_of(path)
    up = [
        f"{path.relative_to(ROOT)}:{line}: {mine} imports {part}"
        for line, part in parts_imported(path)
        if part != mine and RANK.get(part, len(LAYERS)) >= RANK[mine] and not (RANK[mine] == RANK.get(part) == 0)
    ]
    assert not up, "\n".join(up)


def test_packages_have_no_cycle():
    edges = {}
    for path in SOURCES:
        edges.setdefault(part_of(path), set()).update(part for _, part in parts_imported(path) if part != part_of(path))
    while ends := [part for part, below in edges.items() if not below & set(edges)]:
        for part in ends:
            del edges[part]
    assert not edges, f"a cycle is among {edges}"


def test_the_parser_sees_every_form_of_import(tmp_path):
    source = tmp_path / "x.pyx"
    source.write_text(
        "from fastcbw.kernels.bits cimport (\n    a, b,   # why\n    c as d,\n)\n"
        "cimport fastcbw.cbw.state as state, cython\n"
        "import fastcbw.jobs.backup\n"
        "    from fastcbw import disk, open\n"
        "# from fastcbw.qmp import nothing\n"
        "from libc.stdint cimport int64_t\n"
    )
    assert list(parts_imported(source)) == [(1, "kernels"), (5, "cbw"), (6, "jobs"), (7, "disk"), (7, "__init__")]


def test_the_architecture_page_names_every_file():
    page = (ROOT / "docs" / "architecture.md").read_text()
    files = {path.relative_to(PACKAGE) for suffix in ("py", "pyx", "pxd", "h") for path in PACKAGE.rglob(f"*.{suffix}")}
    # An __init__ that only makes a folder a package is no news. In a folder, a .pyx and its .pxd are named once, as
    # folder/name with or without a suffix; what lies at the top is named with its suffix, else any word would do.
    named = {
        path.as_posix() if path.parent.name == "" else path.with_suffix("").as_posix()
        for path in files
        if path.name != "__init__.py" or path.parent.name == ""
    }
    missing = sorted(name for name in named if not re.search(rf"(?<![\w/.-])(?:fastcbw/)?{re.escape(name)}(?![\w/-])", page))
    assert not missing, f"docs/architecture.md does not name {missing}"
