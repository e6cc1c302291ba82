"""block-commit: of an image in a format with backing files (qemu-nbd has it open) into its backing file, a raw image that is a node too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastcbw.block.image import same_image
from fastcbw.cbw.options import check_name
from fastcbw.errors import Error
from fastcbw.graph.allocation import allocated, backing_of, server_of
from fastcbw.graph.graph import Graph
from fastcbw.graph.node import NOTHING, Node, User
from fastcbw.graph.permissions import READER, TARGET, Needs, Permission
from fastcbw.jobs.commit import CommitJob
from fastcbw.qmp.jobs import JobRecord

if TYPE_CHECKING:
    from fastcbw.qmp.daemon import Daemon

#: A job that has to be alone with its source: it reads, and nobody writes.
ALONE = Needs(Permission.CONSISTENT_READ, Permission.ALL & ~(Permission.WRITE | Permission.RESIZE))


class Commits:
    """The commits of DAEMON, on its GRAPH. Methods are called with the daemon's change lock held."""

    def __init__(self, daemon: Daemon, graph: Graph):
        self.daemon, self.graph = daemon, graph

    def start(self, device: str, *, job_id: str | None = None, base_node: str | None = None, base: str | None = None,
              top_node: str | None = None, top: str | None = None, speed: int = 0, auto_finalize: bool = True,
              auto_dismiss: bool = True) -> JobRecord:
        """Check a block-commit and begin it."""
        overlay = self.graph.find(device)
        server = server_of(overlay)
        if server is None:
            raise Error(f"node '{device}': driver '{overlay.bottom.kind.driver}' has no backing file, so there is nothing to commit")
        backing = backing_of(server)
        if backing is None:
            raise Error(f"node '{device}': its image {server.path} has no backing file, so there is nothing to commit")
        if top_node is not None and self.graph.find(top_node).bottom is not overlay.bottom:
            raise Error(f"'top-node': '{top_node}' is not the active layer of '{device}' (a layer in between can't be committed here)")
        if top is not None and not same_image(top, server.path):
            raise Error(f"'top': '{top}' is not the active layer {server.path} of '{device}' (a layer in between can't be committed here)")
        target = self._find_base(backing, base_node, base)
        if target.read_only:
            raise Error(f"Block node is read-only: node '{target.name}'")
        if target.device.length != overlay.device.length:
            raise Error(f"node '{target.name}': its {target.device.length} bytes are not the {overlay.device.length} of '{device}' (resize the base first)")
        if speed < 0:
            raise Error("Parameter 'speed' expects a non-negative value")
        id = device if job_id is None else check_name(job_id, "job id")
        uses = [(overlay, "source", "source", READER), (target, "target", "target", TARGET)]
        users = [self.graph.attach(f"job '{id}'", uses, guarded=overlay)]
        try:
            id = self.daemon.jobs.reserve(id)
            try:
                job = CommitJob(overlay.disk(), target.guest(), lambda: allocated(server, overlay.device.length), id=id, rate=speed or None,
                                base_name=f"node '{target.name}'", alone=lambda: self._alone(id, overlay, target, users))
            except BaseException:
                self.daemon.jobs.give_back(id)
                raise
        except BaseException:
            self.graph.detach(users[0])
            raise
        record = JobRecord(id, job, overlay.name, "", target.name, type="commit", auto_dismiss=auto_dismiss, auto_finalize=auto_finalize)
        job.on_ready = lambda: self.daemon.jobs.became_ready(record)
        self.daemon.jobs.add(record, lambda record, outcome: self._end(users))
        job.start()
        return record

    def _find_base(self, backing: str, base_node: str | None, base: str | None) -> Node:
        """Return the node of the backing file: the one that was named, or the topmost that shows it."""
        if base is not None and not same_image(base, backing):
            raise Error(f"'base': '{base}' is not the backing file, which is {backing}")
        if base_node is not None:
            node = self.graph.find(base_node)
            if not self._shows(node, backing):
                raise Error(f"'base-node': '{base_node}' does not show the backing file {backing} as a raw image")
            return node
        found = [node for node in self.graph.nodes.values() if self._shows(node, backing)]
        if not found:
            raise Error(f"no node shows the backing file {backing} as a raw image (blockdev-add it, and name it as base-node)")
        return next((node for node in found if node.owned), found[0])

    @staticmethod
    def _shows(node: Node, path: str) -> bool:
        device = node.bottom.device
        return node.kind.live and hasattr(device, "fileno") and same_image(device.fileno(), path)

    @contextmanager
    def _alone(self, id: str, overlay: Node, base: Node, users: list[User]) -> Iterator[None]:
        """Hold the exports of OVERLAY, run the block, have them end at BASE; nobody may use the overlay from then on.

        Error while it is written otherwise than by an export of a node of its own, and while anybody else reads it or a snapshot of it:
        where the overlay has nothing of its own they would read what the guest writes to the base, and no engine sees the two as one
        disk. Then, and after an error of the block, nothing has changed.
        """
        nodes = self.daemon.nodes
        with self.daemon.changing():
            self._check_no_snapshots(overlay)
            (edge,) = [edge for edge in base.parents if edge.parent is users[0]]
            (source,) = [edge for edge in overlay.parents if edge.parent is users[0]]
            undo: list[Callable[[], None]] = []
            with self.graph.transaction(), nodes.live.collecting():
                try:
                    self.graph.change_needs(edge, Needs(edge.needs.taken, Permission.ALL))      # who comes from the overlay may be there, too
                    for export in [export for export in nodes.exports.values() if export.node.bottom is overlay.bottom]:
                        undo.append(nodes.replace(export.id, base.name))
                    self.graph.change_needs(source, NOTHING)        # it reads as the one that is alone
                    alone = self.graph.attach(f"job '{id}'", [(overlay.bottom, "source", "source", ALONE)])
                    self.graph.check()
                    self._check_no_readers(overlay, alone)
                    with nodes.live.carried_out():
                        yield
                except BaseException:
                    for step in reversed(undo):
                        step()
                    raise
            self.graph.detach(alone)
            overlay.bottom.committed_to = base.name

    @staticmethod
    def _check_no_snapshots(overlay: Node) -> None:
        snapshots = list(overlay.disk().snapshots)
        if snapshots:
            raise Error(f"node '{overlay.name}': its disk has the snapshot {', '.join(snapshots)}, which would read what the guest writes to the "
                        "base (delete it, or wait for its job; then complete again)")

    @staticmethod
    def _check_no_readers(overlay: Node, alone: User) -> None:
        """Error for whoever reads the overlay beside ALONE; the needs are worked out."""
        for edge in overlay.bottom.parents:
            if edge.parent is not alone and edge.needs.taken & Permission.CONSISTENT_READ:
                raise Error(f"{edge.label} reads node '{overlay.bottom.name}' as '{edge.name}', which would show it what the guest writes to the "
                            "base (end that; then complete again)")

    def _end(self, users: list[User]) -> None:
        with self.daemon.changing():
            for user in users:
                self.graph.detach(user)
