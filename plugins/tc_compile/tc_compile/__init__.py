"""An executor whose layers are compiled once by AOTInductor, and loaded without the compiler ever after."""

from __future__ import annotations

from torchchat_core.hookspecs import hookimpl
from torchchat_core.specs import ANY_SCHEME, DTYPES, ExecutorInfo

__version__ = "0.1.0"


@hookimpl
def torchchat_executors() -> list[ExecutorInfo]:
    return [
        ExecutorInfo(
            name="compile",
            summary="layers compiled for this machine, once; later starts load what was compiled",
            factory="tc_compile.executor:CompileExecutor",
            reads=frozenset({"module"}),
            devices=frozenset({"cpu", "cuda"}),
            dtypes=frozenset(DTYPES),
            schemes=frozenset({ANY_SCHEME}),
            abilities=frozenset({"score", "batch", "prompt_batch", "fork", "embed"}),
            order=60,  # after eager, which needs no compiler and answers at once
        )
    ]
