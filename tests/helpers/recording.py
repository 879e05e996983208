"""A recorder without a GPU that forgets as much as CUDA graphs do.

While work is recorded, every tensor operation and every kernel that Triton's interpreter runs is kept with
its arguments as they are then: numbers are baked in, tensors are their memory. Replaying does those
again and runs none of the Python between them. Work that asks for a tensor's value, or that takes what is not
in device memory, cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Work = Callable[[], None]
ASKS = ("_local_scalar_dense", "nonzero", "_unique2", "equal", "is_nonzero")  # for values


class Remembering:
    """Implements `graphs.Recorder`. It may be told to leave out a kernel."""

    def __init__(self, forgotten: str = "") -> None:
        self._forgotten = forgotten
        self.recorded = 0
        self.replayed = 0

    def record(self, work: Work) -> Work:
        work()
        launches: list[tuple[str, Work]] = []
        with _Operations(launches), _interpreted(launches):
            work()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            for name, launch in launches:
                if name != self._forgotten:
                    launch()

        return replay


class _Operations(TorchDispatchMode):
    def __init__(self, launches: list[tuple[str, Work]]) -> None:
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op.__name__.split(".")[0] in ASKS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {op}")
        made = op(*args, **kwargs)
        writes = any(each.alias_info is not None and each.alias_info.is_write for each in op._schema.returns)
        given = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        if not writes and all(_memory(tensor) in given for tensor in _tensors(made)):
            return made  # a view of memory that stays where it is

        def launch() -> None:
            again = op(*args, **kwargs)
            if not writes:
                for old, new in zip(_tensors(made), _tensors(again), strict=True):
                    old.copy_(new)

        self._launches.append((op.__name__.split(".")[0], launch))
        return made


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _interpreted(launches: list[tuple[str, Work]]) -> Iterator[None]:
    """Kernels, too. What the interpreter itself asks of torch is no part of the work."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def remembered(self: Any, *args: Any, **kwargs: Any) -> None:
        def launch() -> None:
            with torch.utils._python_dispatch._disable_current_modes():
                run(self, *args, **kwargs)

        launch()
        launches.append((self.fn.__name__, launch))

    InterpretedFunction.run = remembered
    try:
        yield
    finally:
        InterpretedFunction.run = run


class Refusing(Remembering):
    """Cannot record more than `most`."""

    def __init__(self, most: int = 0) -> None:
        super().__init__()
        self._most = most

    def record(self, work: Work) -> Work:
        if self.recorded < self._most:
            return super().record(work)
        work()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nmore lines")
