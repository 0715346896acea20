"""How fast one way to run a model is, and what it needs: a row of `torchchat bench`, measured in processes of its own.

The first process loads the model and runs it once, so that whatever is compiled and kept is there; the second one
measures. What the first load took beyond the second one's, and the first run beyond later ones, is the time of
compiling.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from torchchat_core.artifacts import exported_file, open_artifact
from torchchat_core.errors import TorchchatError
from torchchat_core.measure.bandwidth import read_speed
from torchchat_core.measure.rates import NEW_TOKENS, PROMPT_TOKENS, REPEATS, Rate, Rates, Spread, measure_rates
from torchchat_core.measure.text import OWN_TEXT
from torchchat_core.memory import peak_rss_bytes
from torchchat_core.own_process import in_own_process, request_arguments, request_of
from torchchat_core.pipeline import ModelRequest, OpenedModel, fetch_files, open_model
from torchchat_core.plugins import Registry
from torchchat_core.products import reference_of
from torchchat_core.quantization.recipe import is_json, recipe_names
from torchchat_core.small_files import read_text
from torchchat_core.specs import ExecutorInfo, QuantizerInfo
from torchchat_core.support import IN_MEMORY, readers

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to run the model, to be measured."""

    executor: str
    recipe: str | None  # as --quantize takes it
    request: ModelRequest


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one way."""

    executor: str
    qualified_executor: str
    device: str
    dtype: str
    recipe: str | None
    schemes: tuple[str, ...]
    made_by: str | None  # what quantised its layers, written out: pipeline.OpenedModel.recipe
    reference: str  # of the model: products.reference_of
    load_s: float  # from files to a model that can run, with what was compiled before at hand; importing left out
    compile_s: float
    rates: Rates
    peak_rss_bytes: int  # of the whole process
    peak_device_bytes: int | None  # on a GPU
    weight_bytes: int
    token_bytes: int  # of the weights that one token reads
    memory_speed: float | None  # bytes per second that the memory gives; None: not known for this device

    @property
    def label(self) -> str | None:
        """The recipe by its name, or what a JSON object says."""
        return self.made_by if is_json(self.recipe) else self.recipe

    @property
    def bandwidth(self) -> float:
        """Bytes per second of weights that decoding reads."""
        return self.token_bytes * self.rates.decode.median

    @property
    def share(self) -> float | None:
        """Of what the memory gives; above 1 where the weights lie in a cache of the processor."""
        return self.bandwidth / self.memory_speed if self.memory_speed else None


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A way that could not be measured here."""

    executor: str
    recipe: str | None
    reason: str
    fix: str | None = None


# ---- what is measured ---------------------------------------------------------------------------------------------


def ways(request: ModelRequest, registry: Registry) -> list[Way]:
    """Those that the request names; its executor and its recipe may be "all"."""
    recipes = [request.quantize] if request.quantize != ALL else \
        [None, *recipe_names(), *sorted({info.scheme for info in registry.infos(QuantizerInfo)})]
    executors = [request.executor] if request.executor != ALL else _executors(request, registry)
    return [Way(executor=executor, recipe=recipe,
                request=dataclasses.replace(request, executor=executor, quantize=recipe))
            for recipe in recipes for executor in executors]


def _executors(request: ModelRequest, registry: Registry) -> list[str]:
    """All that read the model: an exported file, or models in memory."""
    wanted, path = IN_MEMORY, exported_file(fetch_files(dataclasses.replace(request, executor="auto"), registry))
    if path is not None:
        wanted = open_artifact(path).manifest.kind
    found = readers(wanted, registry)
    if not found:
        raise TorchchatError("no installed executor runs this model", registry.how_to_get("reads", wanted))
    return list(found)


def passed_over(request: ModelRequest, registry: Registry) -> list[Failed]:
    """Of "all" executors, those that read other files than the model's."""
    files = fetch_files(dataclasses.replace(request, executor="auto"), registry) if request.executor == ALL else None
    if files is None or exported_file(files) is not None:  # nothing can be made of an exported file
        return []
    taken = set(_executors(request, registry))
    others = [info for qualified, info in registry.settled(ExecutorInfo) if not taken & {qualified, info.name}]
    return [Failed(executor=info.name, recipe=None, reason=f"it runs {', '.join(sorted(info.reads))} files alone",
                   fix=f"--executor {info.name} exports the model once and measures it; or give it an exported file")
            for info in sorted(others, key=lambda info: info.order)]


def measure_way(way: Way, registry: Registry, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = NEW_TOKENS,
                repeats: int = REPEATS) -> Row:
    """Raises `TorchchatError` where it cannot run."""
    request = request_arguments(way.request)
    first = in_own_process(f"{__name__}:run_once", {"request": request}, registry)
    found = in_own_process(f"{__name__}:run", {"request": request, "prompt_tokens": prompt_tokens,
                                               "new_tokens": new_tokens, "repeats": repeats}, registry)
    return row_of(found, way.recipe, first["load_s"])


def row_of(found: Mapping[str, Any], recipe: str | None, first_load: float) -> Row:
    """The row, from what `run` found in the other process."""
    plain = dict(found["rates"])
    prefill, decode, first = (plain.pop(name) for name in ("prefill", "decode", "first_token"))
    rates = Rates(prefill=Rate(**prefill), decode=Rate(**decode), first_token=Spread(**first), **plain)
    usual = rates.prompt_tokens / rates.prefill.median + rates.new_tokens / rates.decode.median
    compiling = max(0.0, first_load - found["load_s"]) + max(0.0, rates.warm_up - usual)
    others = {name: found[name] for name in found if name not in ("rates", "schemes")}
    return Row(**others, rates=rates, schemes=tuple(found["schemes"]), recipe=recipe, compile_s=compiling)


def fastest(rows: list[Row], registry: Registry) -> list[Row]:
    """Of each recipe, however it was written, the row that decodes fastest; of those that no other one beats, the one
    that auto would take."""
    best = []
    for recipe in dict.fromkeys((row.made_by, row.device, row.dtype) for row in rows):
        those = [row for row in rows if (row.made_by, row.device, row.dtype) == recipe]
        unbeaten = [row for row in those if not any(other.rates.decode.beats(row.rates.decode) for other in those)]
        best.append(min(unbeaten, key=lambda row: (registry.find(ExecutorInfo, row.qualified_executor).order,
                                                   -row.rates.decode.median)))
    return best


# ---- within the new process ---------------------------------------------------------------------------------------


def run_once(registry: Registry, request: Mapping[str, Any]) -> dict[str, Any]:
    """A task: loads the model, and runs it so that what is compiled when it first runs is compiled too."""
    started = time.perf_counter()
    with open_model(request_of(request), registry) as opened:
        seconds = time.perf_counter() - started
        session = opened.model.session(min(16, opened.model.max_context))
        session.prefill([0] * max(1, min(8, session.limit - 1)))
        if session.length < session.limit:
            session.decode(0)
        session.close()
    return {"load_s": seconds}


def run(registry: Registry, request: Mapping[str, Any], prompt_tokens: int, new_tokens: int, repeats: int
        ) -> dict[str, Any]:
    """A task: the figures of a `Row`, but for those that need other rows."""
    asked = request_of(request)
    reference = reference_of(fetch_files(asked, registry).ref)
    started = time.perf_counter()
    with open_model(asked, registry) as opened:
        seconds = time.perf_counter() - started
        qualified = next(name for name, info in registry.offers(ExecutorInfo) if info is opened.executor)
        rates = measure_rates(opened.model, _tokens(opened), opened.name, prompt_tokens=prompt_tokens,
                              new_tokens=new_tokens, repeats=repeats)
        peaks = peak_rss_bytes(), _peak_device_bytes(opened.model.device)
        return {
            "executor": opened.executor.name, "qualified_executor": qualified, "device": opened.model.device,
            "dtype": opened.model.dtype, "schemes": opened.schemes, "made_by": opened.recipe, "reference": reference,
            "load_s": seconds, "rates": dataclasses.asdict(rates),
            "peak_rss_bytes": peaks[0], "peak_device_bytes": peaks[1], "weight_bytes": opened.weight_bytes,
            "token_bytes": opened.token_bytes,
            "memory_speed": _memory_speed(opened.model.device)}


def _tokens(opened: OpenedModel) -> list[int]:
    """Those of torchchat's own text: random ones would not be slower, but a model that routes tokens may care."""
    return opened.text_format.tokenizer.encode(read_text(OWN_TEXT))


def _peak_device_bytes(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def _memory_speed(device: str) -> float | None:
    try:
        speed = read_speed(device=device)
    except (MemoryError, RuntimeError):  # the model leaves no room for it
        return None
    return speed if math.isfinite(speed) else None
