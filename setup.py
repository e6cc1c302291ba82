"""Build of the Cython extensions: one table, one set of flags.

Environment:
    FASTCBW_DEBUG=1            -Og, C assertions on (the invariants of the engine are asserted)
    FASTCBW_SANITIZE=thread    (or address,undefined) builds with that sanitizer; run the interpreter's real binary with
                               the runtime preloaded, see docs/hacking.md
    CYTHON_CACHE_DIR=...       keep there what Cython makes of each source, and take it from there
"""

import os

from setuptools import Extension, find_packages, setup

# Every extension of the package, leaf first. The source is the module's path with .pyx.
EXTENSIONS = [
    "fastcbw.kernels.bits",
    "fastcbw.kernels.bytes",
    "fastcbw.kernels.lent",
    "fastcbw.kernels.door",
    "fastcbw.kernels.sparse",
    "fastcbw.bitmaps.mapping",
    "fastcbw.bitmaps.runs",
    "fastcbw.bitmaps.bitmap",
    "fastcbw.bitmaps.dirty",
    "fastcbw.block.device",
    "fastcbw.block.filter",
    "fastcbw.block.memory",
    "fastcbw.block.threads",
    "fastcbw.block.queue",
    "fastcbw.block.queued",
    "fastcbw.block.file",
    "fastcbw.block.direct",
    "fastcbw.block.delay",
    "fastcbw.block.fault",
    "fastcbw.block.trace",
    "fastcbw.block.throttle",
    "fastcbw.block.cache",
    "fastcbw.block.switch",
    "fastcbw.block.python",
    "fastcbw.block.nbd_connection",
    "fastcbw.block.nbd",
    "fastcbw.block.vectors",
    "fastcbw.block.sectors",
    "fastcbw.cbw.latency",
    "fastcbw.cbw.state",
    "fastcbw.cbw.locmap",
    "fastcbw.cbw.room",
    "fastcbw.cbw.warm",
    "fastcbw.cbw.store",
    "fastcbw.cbw.worker",
    "fastcbw.cbw.lazy",
    "fastcbw.cbw.policy",
    "fastcbw.cbw.stops",
    "fastcbw.cbw.keep",
    "fastcbw.cbw.intercept",
    "fastcbw.cbw.guest",
    "fastcbw.cbw.flusher",
    "fastcbw.cbw.lifecycle",
    "fastcbw.cbw.discard",
    "fastcbw.cbw.reader",
    "fastcbw.cbw.dirty",
    "fastcbw.cbw.pace",
    "fastcbw.cbw.notifier",
    "fastcbw.cbw.landed",
    "fastcbw.cbw.notified",
    "fastcbw.cbw.offload",
    "fastcbw.cbw.kinds",
    "fastcbw.cbw.heat",
    "fastcbw.cbw.order",
    "fastcbw.cbw.access",
    "fastcbw.cbw.copier",
    "fastcbw.cbw.report",
    "fastcbw.cbw.engine",
    "fastcbw.export.nbd.pool",
    "fastcbw.export.nbd.contexts",
    "fastcbw.export.nbd.dirty",
    "fastcbw.export.nbd.flights",
    "fastcbw.export.nbd.cache_contexts",
    "fastcbw.export.nbd.replies",
    "fastcbw.export.nbd.answers",
    "fastcbw.export.nbd.reads",
    "fastcbw.export.nbd.transmission",
]
EXTENSIONS = [name for name in EXTENSIONS if os.path.exists(name.replace(".", "/") + ".pyx")]

DEBUG = os.environ.get("FASTCBW_DEBUG", "") not in ("", "0")
SANITIZE = os.environ.get("FASTCBW_SANITIZE", "")

COMPILE = ["-std=gnu11", "-Wall", "-Wno-unused-function", "-Wno-unused-variable", "-fno-strict-aliasing", "-pthread"]
COMPILE += ["-Og", "-g", "-UNDEBUG", "-DFASTCBW_DEBUG"] if DEBUG else ["-O3", "-g1", "-DNDEBUG"]
LINK = ["-pthread"]
if SANITIZE:
    # No optimisation: stacks that can be read, and a build in a third of the time. -Wno-tsan: the fences that the thread
    # sanitizer does not know are written out in ci/tsan.suppressions.
    COMPILE += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1", "-O0"]
    COMPILE += ["-Wno-tsan"] if SANITIZE == "thread" else []
    LINK += [f"-fsanitize={SANITIZE}"]

DIRECTIVES = {
    "language_level": 3,
    "cdivision": True,
    "initializedcheck": False,
    "embedsignature": True,
    "freethreading_compatible": False,
}


def refuse_performance_hints():
    """Make a Cython performance hint (a hidden GIL acquisition in the data plane) fail the build."""
    from Cython.Compiler import Errors

    def refuse(position, message, env):
        raise Errors.CompileError(position, f"performance hint: {message}")

    # The modules that report hints bind the name when they are imported, so patch it in each.
    import Cython.Compiler.ExprNodes
    import Cython.Compiler.Nodes

    for module in (Errors, Cython.Compiler.ExprNodes, Cython.Compiler.Nodes):
        if hasattr(module, "performance_hint"):
            module.performance_hint = refuse


def extensions():
    from Cython.Build import cythonize

    refuse_performance_hints()
    table = [
        Extension(
            name,
            [name.replace(".", "/") + ".pyx"],
            include_dirs=["fastcbw/csrc"],
            depends=sorted(f"fastcbw/csrc/{header}" for header in os.listdir("fastcbw/csrc")),
            extra_compile_args=COMPILE,
            extra_link_args=LINK,
        )
        for name in EXTENSIONS
    ]
    return cythonize(table, compiler_directives=DIRECTIVES, nthreads=os.cpu_count(), cache="CYTHON_CACHE_DIR" in os.environ)


setup(
    options={"build_ext": {"parallel": True}},      # as many compilers as processors
    packages=find_packages(include=["fastcbw", "fastcbw.*"]),
    package_data={"": ["*.pxd", "*.pyx", "*.pyi", "*.h", "py.typed"]},
    ext_modules=extensions(),
)
