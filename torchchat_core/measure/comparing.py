"""What recipes cost and gain: the unquantised model and each recipe measured on the same text, on this machine.

Models are loaded one after the other, never two at once (see `divergence`). Speeds are therefore not measured in turns:
on a machine with other work their spread, which is that of the repeats of one model, says too little.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torchchat_core.errors import TorchchatError
from torchchat_core.measure.divergence import Divergence, DivergenceSum, Reference, reference_file
from torchchat_core.measure.perplexity import Perplexity, perplexity_of, scored_blocks
from torchchat_core.measure.rates import Rates, measure_rates
from torchchat_core.measure.text import MeasuredText, Window, encoded, text_windows, window_size
from torchchat_core.pipeline import ModelRequest, OpenedModel, fetch_files, looks_at_text, open_checkpoint, open_model
from torchchat_core.plugins import Registry
from torchchat_core.quantization.calibration import CalibrationText
from torchchat_core.quantization.recipe import RecipeReport, is_json, parse_recipe, recipe_names
from torchchat_core.quantization.saved import MANIFEST, refuse_quantised
from torchchat_core.small_files import expanded
from torchchat_core.specs import QuantizerInfo

UNQUANTISED = "unquantised"
NAME_LENGTH = 48  # characters of a recipe's text that stand for it in progress


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to make the model smaller, and the request that opens it so."""

    name: str
    request: ModelRequest
    report: RecipeReport | None = None  # of a folder, from when it was written


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one candidate."""

    name: str
    executor: str
    device: str
    dtype: str
    bytes: int  # of all weights as they are stored; shared ones count once
    rates: Rates
    perplexity: Perplexity
    divergence: Divergence  # from the unquantised model
    report: RecipeReport | None = None  # None: the unquantised model, or a folder that was written before
    made_by: str | None = None  # what quantised its layers, written out: pipeline.OpenedModel.recipe

    @property
    def label(self) -> str:
        """Its name, or what a JSON object says."""
        return self.made_by if self.made_by is not None and is_json(self.name) else self.name


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A candidate that could not be measured here."""

    name: str
    reason: str
    fix: str | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that was measured, in the order that was asked for; the unquantised model is the first row."""

    model: str
    text: MeasuredText
    window: int  # tokens
    rows: tuple[Row, ...]
    refused: tuple[Refused, ...]
    calibration: CalibrationText | None = None  # what recipes that look at a text were given

    @property
    def reference(self) -> Row:
        return self.rows[0]

    @property
    def front(self) -> tuple[Row, ...]:
        """The rows that no other one beats: see `dominates`."""
        return tuple(row for row in self.rows if not any(dominates(other, row) for other in self.rows))


def dominates(one: Row, other: Row) -> bool:
    """Whether `one` is better in bytes, mean KL divergence or decoding speed, and worse in none of them.

    The quality is the divergence and not the perplexity, which rounding can lower by luck: the unquantised model would
    then be off the front. Speeds are different where the ranges of their repeats do not touch.
    """
    worse = one.bytes > other.bytes or one.divergence.mean_kl > other.divergence.mean_kl \
        or other.rates.decode.beats(one.rates.decode)
    better = one.bytes < other.bytes or one.divergence.mean_kl < other.divergence.mean_kl \
        or one.rates.decode.beats(other.rates.decode)
    return better and not worse


# ---- what is compared ---------------------------------------------------------------------------------------------


def default_candidates(request: ModelRequest, registry: Registry) -> list[Candidate]:
    """The recipes that come with torchchat, and every scheme that is installed, with its defaults."""
    schemes = sorted({info.scheme for info in registry.infos(QuantizerInfo)})
    return [candidate(name, request, registry) for name in (*recipe_names(), *schemes)]


def candidate(text: str, request: ModelRequest, registry: Registry) -> Candidate:
    """A recipe as `--quantize` takes it, or a folder that `torchchat quantize` wrote.

    The calibration text of `request` is left to recipes that look at one. Raises `TorchchatError` for what is neither.
    """
    if not is_json(text) and (expanded(text) / MANIFEST).is_file():
        return folder_candidate(text, request)
    parse_recipe(text, registry)
    asked = dataclasses.replace(request, quantize=text)
    if asked.calibration is not None and not looks_at_text(asked, registry):
        asked = dataclasses.replace(asked, calibration=None)
    return Candidate(name=text, request=asked)


def folder_candidate(folder: str, request: ModelRequest, name: str | None = None, device: str | None = None,
                     report: RecipeReport | None = None) -> Candidate:
    """A folder that `torchchat quantize` wrote; `device` is that of its recipe, where it matters."""
    opened = dataclasses.replace(request, model=folder, checkpoint_path=None, params_path=None, tokenizer_path=None,
                                 adapter=None, quantize=None, calibration=None)
    if device is not None and request.device in ("fast", "auto"):
        opened = dataclasses.replace(opened, device=device)
    return Candidate(name=name or folder, request=opened, report=report)


# ---- measuring ----------------------------------------------------------------------------------------------------


def compare(request: ModelRequest, candidates: Sequence[Candidate], registry: Registry, text: MeasuredText,
            window: int | None = None) -> Comparison:
    """Measures the model of the request as it is, and every candidate beside it.

    `window` None: `WINDOW` tokens, or as many as the model takes. A candidate that cannot run here becomes one of
    `refused`. Raises `TorchchatError` where the unquantised model cannot be measured, or is quantised already.
    """
    plain = dataclasses.replace(request, quantize=None, calibration=None)
    files = fetch_files(plain, registry)
    refuse_quantised(open_checkpoint(plain, files, registry), "there is nothing to compare it with")
    rows, refused = list[Row](), list[Refused]()
    with _measured_reference(plain, registry, text, window) as (first, measurement):
        rows.append(first)
        for each in candidates:
            try:
                rows.append(measurement.row(each, registry))
            except TorchchatError as error:
                refused.append(Refused(name=each.name, reason=error.message, fix=error.fix))
            except (MemoryError, RuntimeError) as error:  # torch's own way to say that memory is out
                refused.append(Refused(name=each.name, reason=f"{type(error).__name__}: {error}"))
    return Comparison(model=files.ref.text, text=text, window=measurement.window, rows=tuple(rows),
                      refused=tuple(refused), calibration=request.calibration)


@contextmanager
def _measured_reference(request: ModelRequest, registry: Registry, text: MeasuredText, window: int | None
                        ) -> Iterator[tuple[Row, _Measurement]]:
    """The row of the unquantised model, and what measures others against it while the block runs."""
    with ExitStack() as stack:
        with open_model(request, registry) as opened:  # gone before the block runs: its memory is needed there
            opened.executor.require("score")
            tokenizer = opened.text_format.tokenizer
            ids, size = encoded(text, tokenizer), window_size(window, opened.model.max_context)
            windows = text_windows(ids, tokenizer.bos_id, size)
            positions = sum(len(each.expected) for each in windows)
            reference = stack.enter_context(reference_file(positions, opened.model.vocab_size))
            blocks = scored_blocks(opened.model, windows, UNQUANTISED)
            perplexity = perplexity_of(reference.recorded(blocks))
            row = _row(UNQUANTISED, opened, ids, perplexity, Divergence(mean_kl=0.0, top_1=1.0, tokens=positions))
            vocab_size = opened.model.vocab_size
        yield row, _Measurement(ids=tuple(ids), windows=windows, window=size, reference=reference,
                                vocab_size=vocab_size, text=text)


@dataclass(frozen=True, kw_only=True)
class _Measurement:
    """What is the same for all candidates."""

    ids: tuple[int, ...]
    windows: Sequence[Window]
    window: int
    reference: Reference
    vocab_size: int
    text: MeasuredText

    def row(self, wanted: Candidate, registry: Registry) -> Row:
        """The measured candidate. Raises `TorchchatError` where it cannot run, or is another model."""
        with open_model(wanted.request, registry) as opened:
            opened.executor.require("score")
            self._refuse_another(opened)
            summed = DivergenceSum(self.reference)
            blocks = scored_blocks(opened.model, self.windows, shortened(wanted.name))
            perplexity = perplexity_of(summed.observed(blocks))
            return _row(wanted.name, opened, self.ids, perplexity, summed.result, wanted.report)

    def _refuse_another(self, opened: OpenedModel) -> None:
        if opened.model.vocab_size != self.vocab_size or \
                tuple(encoded(self.text, opened.text_format.tokenizer)) != self.ids:
            raise TorchchatError("it has another vocabulary, and was not made of this model")


def _row(name: str, opened: OpenedModel, ids: Sequence[int], perplexity: Perplexity, divergence: Divergence,
         report: RecipeReport | None = None) -> Row:
    return Row(name=name, executor=opened.executor.name, device=opened.model.device, dtype=opened.model.dtype,
               bytes=opened.weight_bytes, rates=measure_rates(opened.model, ids, shortened(name)),
               perplexity=perplexity, divergence=divergence, report=opened.quantisation or report,
               made_by=opened.recipe)


def shortened(name: str, length: int = NAME_LENGTH) -> str:
    """A name that fits on a line."""
    line = " ".join(name.split())
    return line if len(line) <= length else line[: length - 1] + "\u2026"
