"""Copy orders by name: what a list like "ram-first,zero-last" means for each kind of cluster.

A policy ranks the kinds of clusters; a list of them compares by the first, then by the second, and so on, as a
dictionary compares words by their letters. Kinds that no policy of the list tells apart share a class, and within a class the
order ascends. So every list comes down to a class for each of five kinds, 0 first.
"""

from __future__ import annotations

#: The kinds, in the order of the enum in order.pxd: where the old data of a cluster is. `hot` and `cold` clusters are in no
#: store: they are read from the active disk, and a guest write there costs a copy; hot ones lie where the guest wrote lately.
KINDS = ("ram", "disk", "zero", "hot", "cold")

#: policy -> rank of each kind it names; all others have the rank `rest`.
_RANKS: dict[str, tuple[dict[str, int], int]] = {
    "sequential": ({}, 0),
    "ram-first": ({"ram": 0}, 1),
    "disk-early": ({"ram": 0, "disk": 1}, 2),
    "disk-last": ({"disk": 1}, 0),
    "zero-last": ({"zero": 1}, 0),
    "hot-first": ({"hot": 0}, 1),
}
ORDERS = tuple(_RANKS)
#: The smallest cache and nearly the fewest guest copies in every pattern of benchmarks/orders.py, whose table is in docs/copy-order.md.
ORDER_DEFAULT = "ram-first,hot-first"


def parse_order(order: str) -> list[str]:
    """Return the policies of ORDER, a list with commas.

    Raises ValueError for what is no text, and for a policy that is unknown, named twice, contradicts another, or follows
    `sequential`, after which nothing is left to decide.
    """
    if not isinstance(order, str):
        raise ValueError(f"order: {order!r} is no text (there is {', '.join(ORDERS)}; several with commas)")
    policies = order.split(",")
    for i, policy in enumerate(policies):
        if policy not in _RANKS:
            raise ValueError(f"order: {policy!r} is unknown (there is {', '.join(ORDERS)}; several with commas)")
        if policy in policies[:i]:
            raise ValueError(f"order: {policy!r} is named twice")
        if "sequential" in policies[:i]:
            raise ValueError(f"order: {policy!r} comes after 'sequential', which leaves nothing to decide (name it last)")
    if "disk-early" in policies and "disk-last" in policies:
        raise ValueError("order: 'disk-early' and 'disk-last' contradict each other (name one of them)")
    return policies


def classes_of(order: str) -> tuple[int, ...]:
    """Return the class of each of KINDS under ORDER: whole numbers from 0 on, each used. Raises as parse_order."""
    ranks = [_RANKS[policy] for policy in parse_order(order)]
    keys = [tuple(named.get(kind, rest) for named, rest in ranks) for kind in KINDS]
    steps = sorted(set(keys))
    return tuple(steps.index(key) for key in keys)
