"""``fastcbw graph``: the nodes of a running daemon, as a tree, as JSON, or for Graphviz."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from fastcbw.cli.common import UsageError, add_json, add_qmp, connect, print_json
from fastcbw.units import format_size


def add_parser(verbs) -> None:
    parser = verbs.add_parser("graph", help="show the nodes of a running daemon, their roles and permissions")
    add_qmp(parser)
    add_json(parser)
    parser.add_argument("--dot", action="store_true", help="as the input of Graphviz' dot")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.json and arguments.dot:
        raise UsageError("--dot: not together with --json (choose one)")
    with connect(arguments) as daemon:
        nodes = daemon.client.execute("fastcbw-graph")
    if arguments.json:
        print_json(nodes)
    else:
        print("\n".join(dot(nodes) if arguments.dot else tree(nodes)))
    return 0


def tree(nodes: list[dict]) -> Iterator[str]:
    """Yield the lines of a text tree: users on top, each node below what uses it. A node used twice is shown twice."""
    by_name = {node["node"]: node for node in nodes}
    for node in reversed(nodes):
        users = [parent for parent in node["parents"] if not parent["parent"].startswith("node ")]
        for parent in users:
            yield parent["parent"]
            yield from _below(by_name, node["node"], parent["role"], "", True)
        if not node["parents"]:
            yield _line(node)
            yield from _children(by_name, node, "")


def _line(node: dict) -> str:
    return f"{node['node']} ({node['driver']}, {format_size(node['length'])}{', read-only' if node['read_only'] else ''})"


def _below(by_name: dict, name: str, role: str, indent: str, last: bool) -> Iterator[str]:
    yield f"{indent}{'└─' if last else '├─'} {role}: {_line(by_name[name])}"
    yield from _children(by_name, by_name[name], indent + ("   " if last else "│  "))


def _children(by_name: dict, node: dict, indent: str) -> Iterator[str]:
    for i, edge in enumerate(node["children"]):
        yield from _below(by_name, edge["node"], edge["role"], indent, i == len(node["children"]) - 1)


def dot(nodes: list[dict]) -> Iterator[str]:
    """Yield the lines of a Graphviz graph: boxes are nodes, ellipses are exports and jobs."""
    yield "digraph fastcbw {"
    yield "  node [shape=box];"
    for node in nodes:
        yield f'  "{node["node"]}" [label="{node["node"]}\\n{node["driver"]}"];'
    for node in nodes:
        for edge in node["children"]:
            yield f'  "{node["node"]}" -> "{edge["node"]}" [label="{edge["role"]}"];'
        for parent in node["parents"]:
            if not parent["parent"].startswith("node "):
                yield f'  "{parent["parent"]}" [shape=ellipse];'
                yield f'  "{parent["parent"]}" -> "{node["node"]}" [label="{parent["role"]}"];'
    yield "}"
