"""Eight-bit integer weights. Imported on every start of torchchat: nothing heavy here."""

from __future__ import annotations

from dataclasses import dataclass

from torchchat_core.hookspecs import hookimpl
from torchchat_core.options import option
from torchchat_core.quantization.group_sizes import check_group_size
from torchchat_core.specs import QuantizerInfo

__version__ = "0.1.0"

GROUPS = (0, 32, 64, 128, 256)
DEVICES = frozenset({"cpu", "cuda"})
DTYPES = frozenset({"fp32", "bf16", "fp16"})


@dataclass(frozen=True, kw_only=True)
class Int8Options:
    groupsize: int = option(0, "columns that share one scale: 32, 64, 128 or 256; 0 for one scale a row")

    def __post_init__(self) -> None:
        check_group_size(self.groupsize, GROUPS)


@hookimpl
def torchchat_quantizers() -> list[QuantizerInfo]:
    return [
        QuantizerInfo(name="int8", summary="eight-bit weights, one scale a row or a group", scheme="linear:int8",
                      factory="tc_quant_int8.quantizers:Int8", options=Int8Options, devices=DEVICES, dtypes=DTYPES),
        QuantizerInfo(name="a8w8dq", summary="eight-bit weights, and activations rounded to eight bits row by row",
                      scheme="linear:a8w8dq", factory="tc_quant_int8.quantizers:Int8Dynamic", devices=DEVICES,
                      dtypes=DTYPES),
        QuantizerInfo(name="embedding-int8", summary="the embedding in eight bits, one scale a row or a group",
                      scheme="embedding:int8", factory="tc_quant_int8.quantizers:Int8Embedding", options=Int8Options,
                      devices=DEVICES, dtypes=DTYPES),
    ]
