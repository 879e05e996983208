"""The native kernels: one shared library, loaded by ctypes, and optional: without a compiler the install
goes on.

Everything else about the package is in pyproject.toml.
"""

import hashlib
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("petalite/kernels/native")


def digest() -> str:
    """Of the sources, as `petalite.kernels.native` makes it to see whether a library is theirs."""
    found = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cc")], key=lambda path: path.name):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


setup(
    ext_modules=[
        Extension(
            "petalite.kernels.native.kernels",
            sources=[str(path) for path in sorted(SOURCES.glob("*.cc"))],
            depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
            define_macros=[("PETALITE_SOURCES", f'"{digest()}"')],
            # No contraction: results are the same to the bit from every compiler only if it fuses nothing
            # by itself.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-ffp-contract=off",
                "-fvisibility=hidden",
                "-pthread",
                *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # gcc's own intrinsics
            ],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
            py_limited_api=True,  # it knows nothing of Python: one file serves every version
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
