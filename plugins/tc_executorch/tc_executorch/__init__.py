"""ExecuTorch: models as .pte files for phones and desktops. Imported on every start: nothing heavy here."""

from __future__ import annotations

from dataclasses import dataclass

from torchchat_core.hookspecs import hookimpl
from torchchat_core.options import option
from torchchat_core.specs import DTYPES, ExecutorInfo, ExporterInfo, ExportPreset

__version__ = "0.1.0"

SCHEMES = frozenset({"linear:a8w4dq", "linear:a8w8dq", "linear:int8", "embedding:int4", "embedding:int8"})
# Four-bit weights and eight-bit activations are what XNNPACK multiplies fastest.
MOBILE = '{"embedding:int4": {"groupsize": 32}, "linear:a8w4dq": {"groupsize": 32}}'


@dataclass(frozen=True, kw_only=True)
class ExecutorchOptions:
    prefill_length: int = option(512, "tokens that are read in one step; more of a prompt are read in several",
                                 minimum=1, maximum=65536)


@hookimpl
def torchchat_exporters() -> list[ExporterInfo]:
    return [ExporterInfo(
        name="executorch",
        summary="an ExecuTorch program, for phones, desktops and the C++ runner",
        factory="tc_executorch.exporter:ExecutorchExporter",
        options=ExecutorchOptions,
        writes="executorch",
        suffix=".pte",
        stands_alone=True,
        devices=frozenset({"cpu"}),
        dtypes=frozenset(DTYPES),  # of the weights that it is given; programs compute in float32
        schemes=SCHEMES,
        flag="--output-pte-path",
        presets=(
            ExportPreset(name="android", summary="for an Android app: four bits, 2048 positions", quantize=MOBILE,
                         max_seq_length=2048),
            ExportPreset(name="ios", summary="for an iOS app, whose memory is limited: four bits, 1024 positions",
                         quantize=MOBILE, max_seq_length=1024),
        ),
    )]


@hookimpl
def torchchat_executors() -> list[ExecutorInfo]:
    return [ExecutorInfo(
        name="executorch",
        summary="ExecuTorch with XNNPACK, which runs .pte files",
        factory="tc_executorch.executor:ExecutorchExecutor",
        reads=frozenset({"executorch"}),
        devices=frozenset({"cpu"}),
        dtypes=frozenset({"fp32"}),
        schemes=SCHEMES,
        abilities=frozenset({"score"}),
        order=70,
    )]
