"""What the plugin offers. Imported on every start of torchchat: nothing heavy here."""

from dataclasses import dataclass

from torchchat_core.hookspecs import hookimpl
from torchchat_core.options import option
from torchchat_core.specs import QuantizerInfo


@dataclass(frozen=True, kw_only=True)
class TernaryOptions:
    threshold: float = option(0.5, "weights below this share of a row's mean size become 0", minimum=0.0, maximum=2.0)


@hookimpl
def torchchat_quantizers() -> list[QuantizerInfo]:
    return [QuantizerInfo(
        name="ternary", summary="weights -1, 0 and 1, one scale for each row", scheme="linear:ternary",
        factory="tc_ternary.quantizer:TernaryQuantizer", options=TernaryOptions,
        devices=frozenset({"cpu", "cuda"}), dtypes=frozenset({"fp32", "bf16", "fp16"}))]
