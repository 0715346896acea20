"""The hooks of torchchat. A plugin is a module that implements some of them and is named by an entry point.

Entry-point group: `torchchat.v1`; the number is the major version of what stands here. A hook returns a list of
descriptions, made at once and without importing anything heavy; the factories that they name do the work.

    from torchchat_core.hookspecs import hookimpl
    from torchchat_core.specs import ExecutorInfo

    @hookimpl
    def torchchat_executors():
        return [ExecutorInfo(name="mine", summary="runs on my device", factory="mine.executor:Mine", ...)]
"""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from torchchat_core.specs import (
    CommandInfo,
    ExecutorInfo,
    ExporterInfo,
    ModelSourceInfo,
    QuantizerInfo,
    TokenizerInfo,
)

PROJECT = "torchchat"
ENTRY_POINT_GROUP = "torchchat.v1"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def torchchat_model_sources() -> Sequence[ModelSourceInfo]:
    """Where models come from and which file layouts can be read.

    When: once, when the registry is loaded.
    Returns: one description for each source; its factory makes a `specs.ModelSource`.
    Since: 1.0
    """
    raise AssertionError("a specification is not called")


@hookspec
def torchchat_tokenizers() -> Sequence[TokenizerInfo]:
    """Which tokenizer files can be read.

    When: once, when the registry is loaded.
    Returns: one description for each kind of file; its factory makes a `specs.TokenizerReader`.
    Since: 1.0
    """
    raise AssertionError("a specification is not called")


@hookspec
def torchchat_quantizers() -> Sequence[QuantizerInfo]:
    """How a model's layers can be made smaller.

    When: once, when the registry is loaded.
    Returns: one description for each quantizer; its factory makes a `specs.Quantizer`.
    Since: 1.0
    """
    raise AssertionError("a specification is not called")


@hookspec
def torchchat_executors() -> Sequence[ExecutorInfo]:
    """What runs a model: one description for each runtime.

    When: once, when the registry is loaded.
    Returns: one description for each executor; its factory makes a `specs.Executor`.
    Since: 1.0
    """
    raise AssertionError("a specification is not called")


@hookspec
def torchchat_exporters() -> Sequence[ExporterInfo]:
    """What writes a model to a file that runs elsewhere.

    When: once, when the registry is loaded.
    Returns: one description for each exporter; its factory makes a `specs.Exporter`.
    Since: 1.0
    """
    raise AssertionError("a specification is not called")


@hookspec
def torchchat_commands() -> Sequence[CommandInfo]:
    """Verbs of the command line.

    When: once, when the registry is loaded; the command's module is imported only when the verb runs.
    Returns: one description for each verb; its factory names a click command.
    Since: 1.0
    """
    raise AssertionError("a specification is not called")
