"""Check what an sdist and a wheel contain: everything that is needed, and nothing that was built on the way."""

import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath


def missing_and_extra(sdist: str, wheel: str) -> list[str]:
    """Return what is wrong with the files of SDIST and WHEEL, one line each."""
    with tarfile.open(sdist) as archive:
        source = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        built = set(archive.namelist())
    wrong = []
    for path in Path("fastcbw").rglob("*"):
        name = path.as_posix()
        if path.suffix in (".py", ".pyx", ".pxd", ".pyi", ".h"):
            wrong += [f"sdist lacks {name}"] * (name not in source)
            if path.suffix != ".h":
                wrong += [f"wheel lacks {name}"] * (name not in built)
        if path.suffix == ".pyx":
            stem = name.removesuffix(".pyx") + "."
            wrong += [f"wheel lacks the extension of {name}"] * (not any(
                found.startswith(stem) and found.endswith(".so") for found in built))
    for name in ("LICENSE", "CHANGELOG.md", "README.md", "pyproject.toml", "setup.py", "ci/test", "tests"):
        wrong += [f"sdist lacks {name}"] * (name not in source)
    wrong += [f"sdist has {name}" for name in source if name.endswith((".so", ".pyc"))]
    wrong += [f"wheel has {name}" for name in built if not name.startswith("fastcbw")]
    return wrong


if __name__ == "__main__":
    problems = missing_and_extra(*sys.argv[1:])
    print("\n".join(problems))
    sys.exit(bool(problems))
