"""The reference executor: PyTorch, operation by operation. Other runtimes are checked against it."""

from __future__ import annotations

from torchchat_core.hookspecs import hookimpl
from torchchat_core.specs import ANY_SCHEME, DTYPES, ExecutorInfo

__version__ = "0.1.0"


@hookimpl
def torchchat_executors() -> list[ExecutorInfo]:
    return [
        ExecutorInfo(
            name="eager",
            summary="PyTorch, operation by operation: the reference for every other runtime",
            factory="tc_eager.executor:EagerExecutor",
            reads=frozenset({"module"}),
            devices=frozenset({"cpu", "cuda", "mps"}),
            dtypes=frozenset(DTYPES),
            schemes=frozenset({ANY_SCHEME}),
            abilities=frozenset({"score", "batch", "prompt_batch", "fork", "embed"}),
        )
    ]
