"""IoQueue: many requests of one thread under way, the same results from every engine."""

import errno
import os
import select
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from fastcbw.block import vectors
from fastcbw.block.delay import DelayDevice
from fastcbw.block.direct import DirectDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.file import FileDevice
from fastcbw.block.image import as_device
from fastcbw.block.memory import MemoryDevice
from fastcbw.block.nbd import NbdDevice
from fastcbw.block.queue import IoQueue, check_engine

ENGINES = ("sync", "threads", "uring")
BLOCK = 4096


def aligned(length):
    room = np.zeros(length + BLOCK, np.uint8)
    start = -room.ctypes.data % BLOCK
    return room[start:start + length]


@pytest.fixture(params=ENGINES)
def engine(request):
    return request.param


@pytest.fixture(params=["buffered", "direct"])
def device(request, tmp_path):
    """A file of 1 MiB on a disk, and its bytes as device.data."""
    path = tmp_path / "vm.img"
    path.write_bytes(np.random.default_rng(1).bytes(1 << 20))
    with {"buffered": FileDevice, "direct": DirectDevice}[request.param](path) as device:
        yield device


def content(device):
    with open(device.path, "rb") as file:
        return file.read()


def test_what_is_submitted_is_done_and_every_cookie_comes_back_once(device, engine):
    random, model = np.random.default_rng(2), bytearray(content(device))
    with IoQueue(engine, 16) as queue:
        for round_ in range(100):
            reads, cookies = {}, set()
            # The parts of one round don't overlap: 16 places of 64 KiB.
            for place in range(16):
                cookie = round_ * 100 + place
                offset = place * 65536 + int(random.integers(30000)) // random.choice([1, BLOCK]) * 1
                length = int(random.choice([1, 512, BLOCK, 30000]))
                if random.integers(2):
                    offset, length = offset // BLOCK * BLOCK, -(-length // BLOCK) * BLOCK
                part, memory = slice(offset, offset + length), aligned(length)
                match random.integers(5):
                    case 0 | 1:
                        queue.submit_read_into(device, offset, memory, cookie)
                        reads[cookie] = part, memory
                    case 2 | 3:
                        model[part] = random.bytes(length)
                        memory[:] = np.frombuffer(model[part], np.uint8)
                        queue.submit_write_from(device, offset, memory, cookie, flags=int(random.choice([0, 0, vectors.FUA])))
                    case 4:
                        queue.submit_zeroes(device, offset, length, cookie, flags=vectors.MAY_UNMAP)
                        model[part] = bytes(length)
                cookies.add(cookie)
            assert queue.in_flight == 16
            ended = queue.wait(16)
            assert len(ended) == 16 and dict(ended) == dict.fromkeys(cookies, 0)
            assert queue.in_flight == 0 and queue.wait(1) == []
            for part, memory in reads.values():
                assert memory.tobytes() == model[part]
        queue.submit_flush(device, 1)
        assert queue.wait(1) == [(1, 0)]
    assert content(device) == model


def test_a_full_queue_refuses_and_takes_more_after_a_wait(device, engine):
    buffers = [aligned(BLOCK) for _ in range(4)]
    with IoQueue(engine, 3) as queue:
        for cookie in range(3):
            queue.submit_read_into(device, cookie * BLOCK, buffers[cookie], cookie)
        with pytest.raises(BlockingIOError, match="the queue is full, 3 requests"):
            queue.submit_read_into(device, 0, buffers[3], 3)
        ended = queue.wait(1)
        assert 1 <= len(ended) <= 3
        queue.submit_read_into(device, 0, buffers[3], 3)
        ended += queue.wait(queue.in_flight)
        assert sorted(ended) == [(cookie, 0) for cookie in range(4)]
        assert buffers[3].tobytes() == content(device)[:BLOCK]




@pytest.mark.parametrize("engine", ENGINES[1:])
def test_requests_end_in_any_order_and_a_slow_one_holds_up_nobody(tmp_path, engine, held_range):
    slow, others, release = held_range(tmp_path)
    late, buffers = aligned(BLOCK), [aligned(BLOCK) for _ in range(8)]
    with IoQueue(engine, 16) as queue:
        late[:] = 7
        queue.submit_write_from(slow, 100, late[:50], 1000)     # waits for the block that somebody else has
        for cookie, buffer in enumerate(buffers):
            queue.submit_read_into(others, cookie * BLOCK, buffer, cookie)
        assert sorted(queue.wait(8)) == [(cookie, 0) for cookie in range(8)]
        assert queue.in_flight == 1 and queue.wait(1, timeout=0.01) == []
        release()
        assert queue.wait(1) == [(1000, 0)]
    assert slow.read(100, 50) == bytes([7]) * 50


@pytest.fixture
def held_range():
    """make(folder) -> (direct device of whose first block somebody has hold, another device, let go)."""
    made = []

    def make(folder):
        (folder / "slow.img").write_bytes(bytes(1 << 16))
        (folder / "other.img").write_bytes(bytes(range(256)) * 256)
        slow, other = DirectDevice(folder / "slow.img", alignment=BLOCK), FileDevice(folder / "other.img")
        # A write that another queue has not seen the end of holds its block.
        holder, memory = IoQueue("uring", 1), aligned(BLOCK)
        holder.submit_write_from(slow, 0, memory, 1)
        made.extend([holder, slow, other])
        return slow, other, lambda: holder.wait(1)

    yield make
    for thing in made:
        thing.close()


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_closing_waits_for_what_is_under_way(tmp_path, engine, held_range):
    slow, _, release = held_range(tmp_path)
    queue, data = IoQueue(engine, 4), b"unaligned"
    queue.submit_write_from(slow, 3, data, 1)
    queue.submit_write_from(slow, BLOCK, b"x" * BLOCK, 2)
    thread = threading.Thread(target=queue.close)
    thread.start()
    assert thread.is_alive()
    release()
    thread.join()
    assert slow.read(3, 9) == data and slow.read(BLOCK, BLOCK) == b"x" * BLOCK
    with pytest.raises(ValueError, match="the queue is closed"):
        queue.submit_flush(slow, 3)
    queue.close()


def test_a_queue_that_nobody_closed_ends_what_is_under_way(device, engine):
    queue, memory = IoQueue(engine, 8), aligned(8 * 65536)
    memory[:] = 5
    for cookie in range(8):
        queue.submit_write_from(device, cookie * 65536, memory[cookie * 65536:(cookie + 1) * 65536], cookie)
    del queue
    assert content(device)[:8 * 65536] == bytes([5]) * (8 * 65536)


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_the_descriptor_wakes_who_sleeps_beside_sockets(tmp_path, engine, held_range):
    slow, others, release = held_range(tmp_path)
    with IoQueue(engine, 4) as queue:
        queue.submit_write_from(slow, 3, b"slow", 1)
        memory = aligned(BLOCK)
        queue.submit_read_into(others, 0, memory, 2)
        ended, deadline = [], time.monotonic() + 30
        while len(ended) < 2 and time.monotonic() < deadline:
            while got := queue.wait(0):
                ended += got
            if (2, 0) in ended and (1, 0) not in ended:
                release()
            if len(ended) < 2:
                select.select([queue], [], [], 10)
        assert sorted(ended) == [(1, 0), (2, 0)]


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_a_wait_for_nothing_ends_with_its_time(tmp_path, engine, held_range):
    slow, _, release = held_range(tmp_path)
    with IoQueue(engine, 4) as queue:
        queue.submit_write_from(slow, 3, b"slow", 1)
        begin = time.monotonic()
        assert queue.wait(1, timeout=0.05) == []
        assert 0.04 < time.monotonic() - begin < 30
        release()
        assert queue.wait(1) == [(1, 0)]


def test_errors_are_those_of_the_synchronous_methods(device, engine):
    memory = aligned(1 << 16)
    os.truncate(device.path, 5000)
    with IoQueue(engine, 8) as queue:
        for cookie, (offset, length) in enumerate([(0, 8192), (8192, 4096), (4999, 2), (65536, 65536), (512, 4096)]):
            queue.submit_read_into(device, offset, memory[:length], cookie)
            expected = -errno.EIO if offset + length > 5000 else 0
            assert queue.wait(1) == [(cookie, expected)]


def test_a_read_only_file_refuses_writes_by_its_errno(tmp_path, engine):
    (tmp_path / "vm.img").write_bytes(bytes(BLOCK))
    with FileDevice(tmp_path / "vm.img", read_only=True) as device, IoQueue(engine, 2) as queue:
        queue.submit_write_from(device, 0, b"x" * BLOCK, 1)
        assert queue.wait(1) == [(1, -errno.EBADF)]


def test_a_descriptor_that_went_bad_is_an_error_and_the_queue_goes_on(tmp_path, engine):
    (tmp_path / "vm.img").write_bytes(bytes(BLOCK))
    memory = bytearray(512)
    with FileDevice(tmp_path / "vm.img") as device, IoQueue(engine, 2) as queue:
        fd = device.fileno()
        good = os.dup(fd)
        os.close(fd)
        queue.submit_read_into(device, 0, memory, 1)
        assert queue.wait(1) == [(1, -errno.EBADF)]
        os.dup2(good, fd, inheritable=False)
        os.close(good)
        queue.submit_read_into(device, 0, memory, 2)
        assert queue.wait(1) == [(2, 0)]


def test_a_failed_flush_stays_failed_for_queues_and_methods(tmp_path, engine):
    (tmp_path / "vm.img").write_bytes(bytes(BLOCK))
    with FileDevice(tmp_path / "vm.img") as device, IoQueue(engine, 4) as queue:
        fd = device.fileno()
        good, (reader, writer) = os.dup(fd), os.pipe()
        os.dup2(writer, fd)         # fdatasync on a pipe is EINVAL: it stands for the disk that fails
        queue.submit_flush(device, 1)
        (cookie, first), = queue.wait(1)
        os.dup2(good, fd, inheritable=False)
        for other in (good, reader, writer):
            os.close(other)
        assert cookie == 1 and first < 0
        queue.submit_flush(device, 2)
        queue.submit_write_from(device, 0, b"durable", 3, flags=vectors.FUA)
        assert sorted(queue.wait(2)) == [(2, first), (3, first)]
        queue.submit_write_from(device, 0, b"plain", 4)
        assert queue.wait(1) == [(4, 0)]
        with pytest.raises(OSError) as caught:
            device.flush()
        assert caught.value.errno == -first


def test_devices_that_cannot_be_queued_are_done_at_once(engine):
    memory = MemoryDevice(1 << 16)
    failing = FaultDevice(MemoryDevice(1 << 16))
    with IoQueue(engine, 4) as queue, failing.fail_on("write", errno=errno.ENOSPC):
        assert not memory.queueable
        queue.submit_write_from(memory, 10, b"at once", 1)
        assert memory.read(10, 7) == b"at once"
        queue.submit_write_from(failing, 10, b"fails", 2)
        assert queue.wait(2) == [(1, 0), (2, -errno.ENOSPC)]


def test_several_devices_share_a_queue(tmp_path, engine):
    devices = []
    for n in range(3):
        (tmp_path / f"{n}.img").write_bytes(bytes([n]) * BLOCK)
        devices.append((FileDevice, DirectDevice)[n % 2](tmp_path / f"{n}.img"))
    buffers = [aligned(BLOCK) for _ in devices]
    with IoQueue(engine, 4) as queue:
        for n, device in enumerate(devices):
            queue.submit_read_into(device, 0, buffers[n], n)
        assert sorted(queue.wait(3)) == [(0, 0), (1, 0), (2, 0)]
    assert [buffer[-1] for buffer in buffers] == [0, 1, 2]
    for device in devices:
        device.close()


def test_neighbouring_parts_of_one_block_lose_nothing_in_a_queue(tmp_path, engine):
    (tmp_path / "vm.img").write_bytes(bytes(4 * BLOCK))
    with DirectDevice(tmp_path / "vm.img", alignment=BLOCK) as device, IoQueue(engine, 8) as queue:
        for i in range(300):
            parts = [bytes([(n * 17 + i) % 256]) * 512 for n in range(8)]
            for n, part in enumerate(parts):
                queue.submit_write_from(device, BLOCK + n * 512, part, n)
            assert sorted(queue.wait(8)) == [(n, 0) for n in range(8)]
            assert device.read(BLOCK, BLOCK) == b"".join(parts)


def test_two_queues_on_one_device_wait_for_each_other_and_never_in_a_circle(tmp_path, engine):
    (tmp_path / "vm.img").write_bytes(bytes(4 * BLOCK))
    errors = []

    def work(seed):
        random, whole = np.random.default_rng(seed), [aligned(BLOCK) for _ in range(4)]
        try:
            with IoQueue(engine, 4) as queue:
                for _ in range(300):
                    for n in range(4):      # whole blocks and parts of the same blocks, in any order
                        block = int(random.integers(2)) * BLOCK
                        if random.integers(2):
                            queue.submit_write_from(device, block, whole[n], n)
                        else:
                            queue.submit_write_from(device, block + 10 * seed, b"part", n)
                    assert sorted(queue.wait(4)) == [(n, 0) for n in range(4)]
        except BaseException as error:
            errors.append(error)

    with DirectDevice(tmp_path / "vm.img", alignment=BLOCK) as device:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []


def test_a_child_of_a_fork_is_refused_and_disturbs_nobody(device, engine):
    with IoQueue(engine, 4) as queue:
        memory = aligned(BLOCK)
        queue.submit_read_into(device, 0, memory, 1)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for call in (lambda: queue.submit_flush(device, 2), lambda: queue.wait(1)):
                    with pytest.raises(RuntimeError, match="a fork does not take queues along"):
                        call()
                queue.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert queue.wait(1) == [(1, 0)]
        queue.submit_flush(device, 2)
        assert queue.wait(1) == [(2, 0)]
        assert memory.tobytes() == content(device)[:BLOCK]


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_signals_do_not_cut_waits_short(tmp_path, engine, held_range):
    slow, _, release = held_range(tmp_path)
    with IoQueue(engine, 4) as queue:
        queue.submit_write_from(slow, 3, b"slow", 1)
        timer = threading.Timer(0.05, release)      # ends the wait; the signals before it must not
        me = threading.get_ident()
        before = signal.signal(signal.SIGUSR1, lambda *_: None)
        pinger = threading.Thread(target=lambda: [signal.pthread_kill(me, signal.SIGUSR1) for _ in range(100)])
        timer.start()
        pinger.start()
        assert queue.wait(1) == [(1, 0)]
        pinger.join()
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_bad_arguments_change_nothing(device):
    with pytest.raises(ValueError, match="io: 'aio' is no engine .there are sync, threads, uring"):
        IoQueue("aio")
    for depth in (0, 5000):
        with pytest.raises(ValueError, match=f"depth: {depth}"):
            IoQueue("uring", depth)
    with IoQueue("threads", 2) as queue:
        with pytest.raises(ValueError, match="not within the device"):
            queue.submit_read_into(device, 1 << 20, bytearray(1), 1)
        with pytest.raises(TypeError, match="read-only"):
            queue.submit_read_into(device, 0, b"x", 1)
        assert queue.in_flight == 0


def test_images_are_opened_with_an_engine_by_name(tmp_path, engine):
    import fastcbw

    (tmp_path / "vm.img").write_bytes(bytes(BLOCK))
    with as_device(tmp_path / "vm.img", io=engine) as device:
        assert device.io == engine
    with fastcbw.open(tmp_path / "vm.img", io=engine, direct=True) as disk:
        disk.write(5, b"x")
    with pytest.raises(ValueError, match="io: 'aio' is no engine"):
        as_device(tmp_path / "vm.img", io="aio")
    with pytest.raises(ValueError, match="io: memory: the device exists already"):
        as_device(MemoryDevice(10), io="uring")


# A seccomp filter that answers EPERM to io_uring_setup (425), as container runtimes do: load the number of the call, compare.
WITHOUT_URING = """
import ctypes, struct, sys
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7fff0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in code))
filter = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code), ctypes.addressof(program)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, filter, 0, 0) == 0
from fastcbw.block.file import FileDevice
from fastcbw.block.nbd import NbdDevice
from fastcbw.block.queue import IoQueue
for make in (lambda: IoQueue("uring"), lambda: FileDevice(sys.argv[1], io="uring")):
    try:
        make()
    except OSError as error:
        assert error.errno == 1, error
        print(error)
with FileDevice(sys.argv[1], io="threads") as device, IoQueue("threads") as queue:
    queue.submit_flush(device, 1)
    assert queue.wait(1) == [(1, 0)]
"""


def test_an_engine_that_the_kernel_refuses_is_an_error_and_never_another_engine(tmp_path):
    (tmp_path / "vm.img").write_bytes(b"x")
    done = subprocess.run([sys.executable, "-c", WITHOUT_URING, str(tmp_path / "vm.img")], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("io: 'uring': the kernel gives no io_uring: Operation not permitted (take io='threads')") == 2
    assert check_engine("uring") == 2


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_an_nbd_export_is_waited_for_by_the_threads_of_the_queue(served, engine):
    behind = DelayDevice(MemoryDevice(1 << 16))
    uri = served("vm", behind)
    memory = bytearray(100)
    with NbdDevice(uri) as device, IoQueue(engine, 4) as queue:
        with behind.hold("read", 0, 10) as gate:
            queue.submit_read_into(device, 0, memory, 1)
            gate.wait_arrived()     # two at the same moment may take the same connection, and its server answers one after the other
            queue.submit_write_from(device, 5000, b"not held up", 2)
            assert queue.wait(1) == [(2, 0)]
        assert queue.wait(1) == [(1, 0)]
    behind.close()


def threads_of_ours():
    """The threads of this process, without those of the kernel."""
    names = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/comm") as comm:
            names.append(comm.read())
    return sum(not name.startswith("iou-") for name in names)


def threads_at_rest():
    """As threads_of_ours, once those that another test has joined are out of the kernel's list, and a new one of the kernel's has its name."""
    before, now = None, threads_of_ours()
    while now != before:
        time.sleep(0.01)
        before, now = now, threads_of_ours()
    return now


def test_the_kernel_does_plain_requests_and_threads_the_others(device):
    before, memory = threads_at_rest(), aligned(BLOCK)
    with IoQueue("uring", 8) as queue:
        queue.submit_read_into(device, 0, memory, 1)
        queue.submit_write_from(device, BLOCK, memory, 2)
        queue.submit_flush(device, 3)
        assert sorted(queue.wait(3)) == [(1, 0), (2, 0), (3, 0)]
        assert threads_at_rest() == before
        queue.submit_zeroes(device, 0, BLOCK, 4)
        assert queue.wait(1) == [(4, 0)]
        assert threads_of_ours() == before + 1


def test_a_queue_of_threads_has_no_more_of_them_than_it_is_deep(device):
    before, memory = threads_at_rest(), aligned(BLOCK)
    with IoQueue("threads", 3) as queue:
        for _ in range(20):
            for cookie in range(3):
                queue.submit_write_from(device, cookie * BLOCK, memory, cookie)
            assert len(queue.wait(3)) == 3
        assert before < threads_of_ours() <= before + 3
    with IoQueue("threads", 300) as queue:
        for cookie in range(200):
            queue.submit_write_from(device, cookie * BLOCK, memory, cookie)
        assert threads_of_ours() <= before + 32
        assert len(queue.wait(200)) == 200
