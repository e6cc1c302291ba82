"""What all benchmarks share: their size, the host they ran on, and floors measured in the same run.

    pytest benchmarks                                   smoke size: seconds, so that they never rot
    pytest benchmarks --bench-size=full --bench-goals   the sizes that figures are quoted for; a ratio below its goal fails

The size can also come from FASTCBW_BENCH_SIZE. Ratios are printed at the end, and are in the JSON that --benchmark-json writes.
"""

import os
import platform
import statistics
import time

import pytest

RATIOS = pytest.StashKey()


def pytest_addoption(parser):
    group = parser.getgroup("fastcbw benchmarks")
    group.addoption("--bench-size", choices=["smoke", "full"], default=os.environ.get("FASTCBW_BENCH_SIZE", "smoke"),
                    help="how much work each benchmark does (default: smoke)")
    group.addoption("--bench-goals", action="store_true", help="fail where a ratio is below its goal")


def pytest_configure(config):
    config.stash[RATIOS] = []


def pytest_collect_file(file_path, parent):
    # Files named on the command line are collected by pytest itself.
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[RATIOS]:
        terminalreporter.section(f"ratios to the floors of the same run, size {config.getoption('--bench-size')}")
        for line in config.stash[RATIOS]:
            terminalreporter.write_line(line)


def host():
    """Return what a figure means nothing without."""
    facts = {"machine": platform.machine(), "system": platform.platform(), "python": platform.python_version(),
             "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    with open("/proc/cpuinfo") as lines:
        facts["cpu"] = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return facts


@pytest.fixture
def full(request):
    """True when figures are to be quoted, False when it is only to be seen that everything runs."""
    return request.config.getoption("--bench-size") == "full"


@pytest.fixture(name="host")
def host_facts():
    """What a figure means nothing without, as a dict."""
    return host()


@pytest.fixture
def note(request):
    """note(line): a line of the summary, for benchmarks that `beside` does not fit."""
    return request.config.stash[RATIOS].append


def seconds_per_call(call, number):
    begin = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - begin) / number


@pytest.fixture
def beside(request, benchmark, full):
    """Measure OURS beside its FLOORS, turn by turn, so that a noisy moment hits all; then as a pytest-benchmark.

    beside(ours, {"name": call, ...}, goals={"name": least ratio}, bytes=moved by one call of ours)
    The ratio is time of the floor by time of ours, of each round; reported are median, least and most.
    """
    from fastcbw.kernels import door

    def run(ours, floors, goals=None, bytes=None):
        calls = {"ours": ours, **floors}
        numbers = {name: max(1, int(0.002 / max(seconds_per_call(call, 1), 1e-9))) for name, call in calls.items()}
        rounds = [{name: seconds_per_call(call, numbers[name]) for name, call in calls.items()} for _ in range(11 if full else 3)]
        benchmark.extra_info.update(host(), size="full" if full else "smoke", instruction_set=door.instruction_set())
        median_s = statistics.median(turn["ours"] for turn in rounds)
        rate = f", {bytes / median_s / 1e9:.1f} GB/s" if bytes else ""
        lines, missed = [f"{request.node.name}: {median_s * 1e6:.1f} us{rate}"], []
        for name in floors:
            ratios = sorted(turn[name] / turn["ours"] for turn in rounds)
            ratio, goal = statistics.median(ratios), (goals or {}).get(name)
            benchmark.extra_info[f"ratio to {name}"] = {"median": ratio, "least": ratios[0], "most": ratios[-1], "goal": goal}
            lines.append(f"    {ratio:8.2f} x {name} ({ratios[0]:.2f} to {ratios[-1]:.2f})" + (f", goal {goal}" if goal else ""))
            if goal and ratio < goal:
                missed.append(lines[-1].strip())
        request.config.stash[RATIOS].extend(lines)
        benchmark.pedantic(ours, rounds=5 if full else 2, iterations=numbers["ours"])
        if request.config.getoption("--bench-goals"):
            assert not missed, missed

    return run
