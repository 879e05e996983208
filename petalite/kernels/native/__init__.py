"""The native kernels: one shared library of plain C functions, built by setup.py where there is a compiler.

`library()` loads it once and picks the best instruction set of this processor. `PETALITE_KERNELS` forces
one (`avx512`, `avx2`, `neon-i8mm`, `neon`, `scalar`), insists on the library (`native`), goes without it
(`torch`), or is the path of another build of it, as for sanitizers. ctypes releases the interpreter's lock
around every call. Knows how the library is found; what its functions do is told beside them, and `linears`
wraps them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import threading
from pathlib import Path

import torch

from petalite.errors import InvalidArgument

logger = logging.getLogger(__name__)

VARIABLE = "PETALITE_KERNELS"
_FOLDER = Path(__file__).parent
_BUILD = "build them with `make native` (or `pip install .`), which needs a C++ compiler"


class Library:
    """The loaded library, with the best instruction set of this processor until another is chosen."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self.functions = functions
        self._teams: dict[int, ctypes.c_void_p] = {}
        self._lock = threading.Lock()
        # A child of fork has none of its parent's threads.
        os.register_at_fork(after_in_child=self._forget_teams)

    @property
    def instructions(self) -> str:
        """The instruction set in use."""
        name: bytes = self.functions.petalite_table_chosen()
        return name.decode()

    def instruction_sets(self) -> dict[str, bool]:
        """Those that were built in, best first, and whether this processor has them."""
        found: dict[str, bool] = {}
        while (name := self.functions.petalite_table_name(len(found))) is not None:
            found[name.decode()] = bool(self.functions.petalite_table_runs(len(found)))
        return found

    def choose(self, name: str) -> None:
        """Use an instruction set from the next call on. Raises InvalidArgument where it cannot run."""
        here = self.instruction_sets()
        if name not in here:
            raise InvalidArgument(f"{name!r} is not built in; known are {', '.join(here)}")
        if not here[name]:
            able = ", ".join(name for name, runs in here.items() if runs)
            raise InvalidArgument(f"this processor does not run {name}; it runs {able}")
        self.functions.petalite_table_choose(list(here).index(name))

    def team(self, n_threads: int | None = None) -> ctypes.c_void_p:
        """The process's team of `n_threads`, by default as many as torch uses; made at first use and kept."""
        n_threads = torch.get_num_threads() if n_threads is None else n_threads
        team = self._teams.get(n_threads)
        return team if team is not None else self._new_team(n_threads)

    def _new_team(self, n_threads: int) -> ctypes.c_void_p:
        with self._lock:
            if n_threads not in self._teams:
                address = self.functions.petalite_team_new(n_threads)
                if address is None:
                    raise InvalidArgument(
                        f"the system gives no {n_threads} threads; ask for fewer or raise `ulimit -u`"
                    )
                self._teams[n_threads] = ctypes.c_void_p(address)
            return self._teams[n_threads]

    def _forget_teams(self) -> None:
        self._teams = {}
        self._lock = threading.Lock()


@functools.cache
def library() -> Library | None:
    """The native kernels, or None where torch's serve: there are none here, or `PETALITE_KERNELS=torch`.

    Raises InvalidArgument if the variable asks for what this build or this processor does not have.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "torch":
        return None
    try:
        functions = _load(Path(wanted) if "/" in wanted else None)
    except OSError as error:
        if wanted:
            raise InvalidArgument(f"{VARIABLE}={wanted}, but {error}") from error
        logger.warning("torch's kernels serve, more slowly: %s", error)
        return None
    found = Library(functions)
    if wanted not in ("", "native") and "/" not in wanted:
        try:
            found.choose(wanted)
        except InvalidArgument as error:
            raise InvalidArgument(
                f"{VARIABLE}={wanted}: {error}; or torch, or native for the best"
            ) from error
    return found


def _load(path: Path | None) -> ctypes.CDLL:
    """Raises OSError that says what is wrong."""
    if path is None:
        path = next(iter(sorted(_FOLDER.glob("kernels.*so"))), None)
        if path is None:
            raise OSError(f"there are no native kernels in {_FOLDER}; {_BUILD}")
    functions = ctypes.CDLL(str(path))
    _declare(functions)
    sources = source_digest()
    if sources is not None and functions.petalite_sources().decode() != sources:
        raise OSError(f"{path.name} was built from other sources than those beside it; {_BUILD}")
    return functions


def source_digest() -> str | None:
    """Of the sources beside this file, as setup.py makes it; None where there are none, as in a wheel."""
    paths = sorted([*_FOLDER.glob("*.h"), *_FOLDER.glob("*.cc")], key=lambda path: path.name)
    found = hashlib.sha256()
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()[:16] if paths else None


_POINTER, _I32, _I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "petalite_sources": (ctypes.c_char_p, []),
    "petalite_table_name": (ctypes.c_char_p, [_I32]),
    "petalite_table_runs": (_I32, [_I32]),
    "petalite_table_choose": (None, [_I32]),
    "petalite_table_chosen": (ctypes.c_char_p, []),
    "petalite_team_new": (_POINTER, [_I32]),
    "petalite_team_free": (None, [_POINTER]),
    "petalite_panel_bytes": (_I64, [_I32, _I64, _I64]),
    "petalite_huge_pages": (None, [_POINTER, _I64]),
    "petalite_pack_int8": (None, [_POINTER, _I64, _I64, _POINTER]),
    "petalite_unpack_int8": (None, [_POINTER, _I64, _I64, _POINTER]),
    "petalite_pack_nf4": (None, [_POINTER, _POINTER, _I64, _I64, _POINTER]),
    "petalite_unpack_nf4": (None, [_POINTER, _I64, _I64, _POINTER, _POINTER]),
    "petalite_pack_float": (None, [_I32, _POINTER, _I64, _I64, _POINTER, _POINTER, _POINTER]),
    "petalite_unpack_float": (None, [_I32, _POINTER, _I64, _I64, _I64, _POINTER]),
    "petalite_short_serves": (_I32, []),
    "petalite_short_range": (None, [_POINTER, _I64, _I64, _POINTER, _POINTER]),
    "petalite_shorten": (None, [_POINTER, _I64, _I64, _I32, _I32, _POINTER]),
    "petalite_checksum": (ctypes.c_uint64, [_POINTER, _I64, ctypes.c_uint64]),
    "petalite_linear": (None, [_POINTER, _POINTER, _POINTER, _I64, _POINTER, _POINTER]),
    "petalite_span_step": (_I64, [_POINTER, _POINTER]),
    "petalite_linear_scratch_bytes": (_I64, [_POINTER, _I64]),
    "petalite_q8_encode": (None, [_POINTER, _I64, _I64, _I64, _POINTER, _POINTER, _I64, _POINTER, _I64]),
    "petalite_q8_decode": (None, [_POINTER, _I64, _I64, _I64, _POINTER, _I64, _POINTER, _POINTER, _I64]),
    "petalite_finite": (_I32, [_I32, _POINTER, _I64]),
}


def _declare(functions: ctypes.CDLL) -> None:
    """Raises OSError for a library without one of them."""
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(functions, name)
        except AttributeError as error:
            raise OSError(f"the native kernels have no {name}; {_BUILD}") from error
        function.restype, function.argtypes = result, arguments
