"""Four-bit integer weights. Imported on every start of torchchat: nothing heavy here."""

from __future__ import annotations

from dataclasses import dataclass

from torchchat_core.hookspecs import hookimpl
from torchchat_core.options import option
from torchchat_core.quantization.group_sizes import check_group_size
from torchchat_core.specs import QuantizerInfo

__version__ = "0.1.0"

GROUPS = (32, 64, 128, 256)
DEVICES = frozenset({"cpu", "cuda"})
DTYPES = frozenset({"fp32", "bf16", "fp16"})
METHODS = ("nearest", "hqq", "gptq")
METHOD_HELP = "how integers and scales are chosen; gptq looks at a calibration text, hqq needs torchao"


@dataclass(frozen=True, kw_only=True)
class Int4Options:
    groupsize: int = option(32, "columns that share one scale: 32, 64, 128 or 256")
    asymmetric: bool = option(False, "give each group a centre beside its scale")
    method: str = option("nearest", METHOD_HELP, choices=METHODS)

    def __post_init__(self) -> None:
        check_group_size(self.groupsize, GROUPS)


@dataclass(frozen=True, kw_only=True)
class Int4DynamicOptions:
    groupsize: int = option(32, "columns that share one scale: 32, 64, 128 or 256")
    method: str = option("nearest", METHOD_HELP, choices=METHODS)

    def __post_init__(self) -> None:
        check_group_size(self.groupsize, GROUPS)


@dataclass(frozen=True, kw_only=True)
class Int4EmbeddingOptions:
    groupsize: int = option(32, "columns that share one scale: 32, 64, 128 or 256; 0 for one scale a row")

    def __post_init__(self) -> None:
        check_group_size(self.groupsize, (0, *GROUPS))


@hookimpl
def torchchat_quantizers() -> list[QuantizerInfo]:
    return [
        QuantizerInfo(name="int4", summary="four-bit weights in groups, symmetric or asymmetric", scheme="linear:int4",
                      factory="tc_quant_int4.quantizers:Int4", options=Int4Options, devices=DEVICES, dtypes=DTYPES,
                      calibrates=True),
        QuantizerInfo(name="a8w4dq", summary="four-bit weights in groups, and activations rounded to eight bits row "
                                             "by row: what ExecuTorch takes",
                      scheme="linear:a8w4dq", factory="tc_quant_int4.quantizers:Int4Dynamic",
                      options=Int4DynamicOptions, devices=DEVICES, dtypes=DTYPES, calibrates=True),
        QuantizerInfo(name="embedding-int4", summary="the embedding in four bits, in groups", scheme="embedding:int4",
                      factory="tc_quant_int4.quantizers:Int4Embedding", options=Int4EmbeddingOptions, devices=DEVICES,
                      dtypes=DTYPES),
    ]
