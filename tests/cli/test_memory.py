"""What the daemon's resident memory is. Bounds with room for other interpreters; benchmarks/versus.py has the goals."""

import os

import fastcbw

M = 1 << 20


def resident(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_daemon_is_small_and_a_backup_adds_little(serve, tmp_path):
    with open(tmp_path / "vm.img", "wb") as file:
        for _ in range(64):
            file.write(os.urandom(M))
    served = serve(tmp_path / "vm.img", "--socket", "nbd")
    idle = resident(served.process.pid)
    assert idle <= 80 * M
    with fastcbw.connect(tmp_path / "nbd.qmp") as daemon:
        daemon.disks["vm"].backup(tmp_path / "backup.img").wait(60)
    assert (tmp_path / "backup.img").stat().st_size == 64 * M
    assert resident(served.process.pid) - idle <= 40 * M
