"""What the plugin offers. Imported on every start of torchchat: nothing heavy here."""

from dataclasses import dataclass

from torchchat_core.hookspecs import hookimpl
from torchchat_core.options import option
from torchchat_core.specs import QuantizerInfo


@dataclass(frozen=True, kw_only=True)
class Float8Options:
    output_layer: bool = option(False, "quantise the output layer too")


@hookimpl
def torchchat_quantizers() -> list[QuantizerInfo]:
    return [QuantizerInfo(
        name="float8", summary="weights in eight-bit floating point, one scale for each row", scheme="linear:float8",
        factory="tc_float8.quantizer:Float8Quantizer", options=Float8Options,
        devices=frozenset({"cpu", "cuda"}), dtypes=frozenset({"fp32", "bf16", "fp16"}))]
