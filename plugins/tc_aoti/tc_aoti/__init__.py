"""Models exported through AOTInductor: a program and its weights in one file, and the executor that runs it."""

from __future__ import annotations

from typing import Any

from torchchat_core.hookspecs import hookimpl
from torchchat_core.specs import ANY_SCHEME, DTYPES, ExecutorInfo, ExporterInfo

__version__ = "0.1.0"

PACKAGE, LIBRARY = "aoti-package", "aoti-dso"  # kinds of files
SCHEMES = frozenset({"linear:int4", "linear:int8", "linear:a8w4dq", "linear:a8w8dq", "embedding:int4",
                     "embedding:int8"})


@hookimpl
def torchchat_exporters() -> list[ExporterInfo]:
    common: dict[str, Any] = {"devices": frozenset({"cpu", "cuda"}), "dtypes": frozenset(DTYPES), "schemes": SCHEMES,
                              "stands_alone": True}
    return [
        ExporterInfo(
            name="aoti-package",
            summary="an AOTInductor package (.pt2) for machines like this one",
            factory="tc_aoti.exporter:PackageExporter",
            writes=PACKAGE,
            suffix=".pt2",
            flag="--output-aoti-package-path",
            **common,
        ),
        ExporterInfo(
            name="aoti-dso",
            summary="a shared library (.so) made by AOTInductor, for machines like this one",
            factory="tc_aoti.exporter:LibraryExporter",
            writes=LIBRARY,
            suffix=".so",
            flag="--output-dso-path",
            **common,
        ),
    ]


@hookimpl
def torchchat_executors() -> list[ExecutorInfo]:
    return [
        ExecutorInfo(
            name="aoti",
            summary="files that AOTInductor compiled: no compiler is needed where they run",
            factory="tc_aoti.executor:AotiExecutor",
            reads=frozenset({PACKAGE, LIBRARY}),
            devices=frozenset({"cpu", "cuda"}),
            dtypes=frozenset(DTYPES),
            schemes=frozenset({ANY_SCHEME}),
            abilities=frozenset({"score", "batch"}),
        )
    ]
