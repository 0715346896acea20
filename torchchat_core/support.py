"""Which combinations of executor, quantisation scheme, device, dtype and export format work, from declarations alone.

The matrix that `torchchat plugins --matrix` prints, and every refusal of a combination, come from `refusal`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.plugins import Registry
from torchchat_core.specs import ANY_SCHEME, DEVICES, DTYPES, ExecutorInfo, ExporterInfo, QuantizerInfo

IN_MEMORY = "module"  # what an executor reads when nothing was exported


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One way to run a model. `scheme` None: not quantised; `format` "module": not exported.

    With `stored`, the model's files hold the quantised layers, in core's own form: no quantizer is needed, and they
    compute on every device in every dtype that the executor has. An exported file that is there needs no exporter.
    """

    executor: str  # qualified name
    device: str
    dtype: str
    scheme: str | None = None
    format: str = IN_MEMORY
    stored: bool = False

    def __str__(self) -> str:
        quantised = f" with {self.scheme}" if self.scheme else ""
        exported = f" from {self.format} files" if self.format != IN_MEMORY else ""
        return f"{self.executor} on {self.device} in {self.dtype}{quantised}{exported}"


def refusal(wanted: Combination, registry: Registry, platform: str = sys.platform) -> str | None:
    """Why the combination does not work, as one sentence; None where it does."""
    info = registry.find(ExecutorInfo, wanted.executor)
    named = f"executor {quoted(wanted.executor)}"
    if info.platforms and platform not in info.platforms:
        return f"{named} does not run on {platform}; it runs on {_listed(info.platforms)}"
    if wanted.format not in info.reads:
        return f"{named} does not run {_what(wanted.format)}; it runs {_listed(map(_what, info.reads))}"
    if wanted.device not in info.devices:
        return f"{named} does not run on {wanted.device}; it runs on {_listed(info.devices)}"
    if wanted.dtype not in info.dtypes:
        return f"{named} does not compute in {wanted.dtype}; it computes in {_listed(info.dtypes)}"
    if wanted.scheme is None:
        return None if wanted.stored else _export_refusal(wanted, registry)
    if wanted.scheme not in info.schemes and ANY_SCHEME not in info.schemes:
        return f"{named} does not run {wanted.scheme}; it runs {_listed(info.schemes) or 'no quantised layers'}"
    return None if wanted.stored else _quantizer_refusal(wanted, registry) or _export_refusal(wanted, registry)


def _quantizer_refusal(wanted: Combination, registry: Registry) -> str | None:
    quantizers = [each for each in registry.infos(QuantizerInfo) if wanted.scheme == each.scheme]
    if not quantizers:
        return f"no installed quantizer makes {wanted.scheme}"
    there = [each for each in quantizers if wanted.device in each.devices]
    if not there:
        devices = {device for each in quantizers for device in each.devices}
        return f"{wanted.scheme} is not made for {wanted.device}; it is for {_listed(devices)}"
    if not any(wanted.dtype in each.dtypes for each in there):
        dtypes = {dtype for each in there for dtype in each.dtypes}
        return f"{wanted.scheme} does not compute in {wanted.dtype}; on {wanted.device} it does in {_listed(dtypes)}"
    return None


def _export_refusal(wanted: Combination, registry: Registry) -> str | None:
    if wanted.format == IN_MEMORY:
        return None
    exporters = [each for each in registry.infos(ExporterInfo) if each.writes == wanted.format]
    if not exporters:
        return f"no installed exporter writes {wanted.format} files"
    fitting = [each for each in exporters if wanted.device in each.devices and wanted.dtype in each.dtypes]
    if not fitting:
        return f"no installed exporter writes {wanted.format} files for {wanted.device} in {wanted.dtype}"
    if wanted.scheme is not None and not any(wanted.scheme in each.schemes for each in fitting):
        return f"no installed exporter writes {wanted.format} files with {wanted.scheme}"
    return None


def require_export(exporter: ExporterInfo, device: str, dtype: str, schemes: Sequence[str], registry: Registry,
                   stored: bool = False) -> None:
    """Raises `TorchchatError` where the exporter does not write such a model; `stored` as in `Combination`."""
    named = f"exporter {quoted(exporter.name)}"
    if device not in exporter.devices:
        raise TorchchatError(f"{named} does not write models for {device}",
                             f"use --device {_listed(exporter.devices)}")
    if dtype not in exporter.dtypes:
        raise TorchchatError(f"{named} does not write models in {dtype}", f"use --dtype {_listed(exporter.dtypes)}")
    unknown = [scheme for scheme in schemes if scheme not in exporter.schemes]
    if unknown:
        known = _listed(exporter.schemes) or "no quantised layers"
        layers = f"the model's layers of {unknown[0]}" if stored else unknown[0]
        instead = "export the model that it was made of" if stored else "leave --quantize out"
        others = [f"{info.name} ({info.suffix})" for info in registry.infos(ExporterInfo)
                  if info.schemes.issuperset(schemes) and device in info.devices and dtype in info.dtypes]
        raise TorchchatError(f"{named} does not write {layers}; it writes {known}",
                             f"use the exporter {' or '.join(others)}, or {instead}" if others else instead)


def all_combinations(registry: Registry) -> Iterator[Combination]:
    """Every combination of what is installed, whether it works or not."""
    schemes: list[str | None] = [None, *sorted({each.scheme for each in registry.infos(QuantizerInfo)})]
    formats = [IN_MEMORY, *sorted({each.writes for each in registry.infos(ExporterInfo)})]
    for executor, _ in registry.offers(ExecutorInfo):
        for written in formats:
            for scheme in schemes:
                for device in DEVICES:
                    for dtype in DTYPES:
                        yield Combination(executor=executor, device=device, dtype=dtype, scheme=scheme, format=written)


def nearest(wanted: Combination, registry: Registry) -> Combination | None:
    """The working combination that differs least: in dtype before executor, device, scheme and format."""
    weights = {"dtype": 1, "executor": 2, "device": 4, "scheme": 8, "format": 16}
    wanted = replace(wanted, executor=_qualified(wanted.executor, registry))

    def distance(other: Combination) -> int:
        return sum(weight for name, weight in weights.items() if getattr(other, name) != getattr(wanted, name))

    others = list(all_combinations(registry))
    if wanted.stored:  # its scheme needs no quantizer, and so is perhaps not among them
        others = [replace(each, scheme=scheme, stored=scheme is not None) for each in others if each.scheme is None
                  for scheme in (None, wanted.scheme)]
    if wanted.stored and wanted.format != IN_MEMORY:  # an exported file is what it is
        others = [replace(each, stored=True) for each in others if each.format == wanted.format]
    working = [each for each in others if refusal(each, registry) is None]
    return min(working, key=distance, default=None)


def _qualified(name: str, registry: Registry) -> str:
    """The full name of the executor that `name` means; `name` itself where there is none."""
    return next((qualified for qualified, each in registry.settled(ExecutorInfo) if each.name == name), name)


def require(wanted: Combination, registry: Registry) -> None:
    """Raises `TorchchatError` with the matrix's sentence and the nearest combination that works."""
    reason = refusal(wanted, registry)
    if reason is None:
        return
    instead = nearest(wanted, registry)
    raise TorchchatError(reason, f"what works is {instead}" if instead else registry.how_to_get("reads", wanted.format))


def choose_executor(name: str, device: str, dtype: str, schemes: Sequence[str], registry: Registry,
                    stored: bool = False, format: str = IN_MEMORY) -> ExecutorInfo:
    """The executor of that name, for a model with layers of all the schemes; for "auto", the first fitting.

    `stored` and `format` as in `Combination`.

    The first by order, those with a name of their own before contested ones; one that cannot be imported is passed
    over.

    Raises `TorchchatError` where none fits, or the named one does not.
    """

    wanted_schemes: Sequence[str | None] = schemes or [None]

    def combinations(executor: str) -> list[Combination]:
        return [Combination(executor=executor, device=device, dtype=dtype, scheme=scheme, stored=stored, format=format)
                for scheme in wanted_schemes]

    if name != "auto":
        for wanted in combinations(name):
            require(wanted, registry)
        return registry.find(ExecutorInfo, name)
    fitting = [info for executor, info in registry.settled(ExecutorInfo)
               if all(refusal(wanted, registry) is None for wanted in combinations(executor))]
    faults = []
    for info in sorted(fitting, key=lambda info: (registry.contested(ExecutorInfo, info.name), info.order)):
        try:
            info.make()
        except TorchchatError as error:
            faults.append(error)
            continue
        return info
    if faults:
        raise faults[0]
    instead = nearest(combinations(name)[0], registry)
    hint = f"what works is {instead}" if instead else registry.how_to_get("reads", format)
    reasons = {reason for executor, info in registry.settled(ExecutorInfo) if format in info.reads
               for wanted in combinations(executor) if (reason := refusal(wanted, registry)) is not None}
    if len(reasons) == 1:
        raise TorchchatError(reasons.pop(), hint)
    quantised = f" with {' and '.join(schemes)}" if schemes else ""
    raise TorchchatError(f"no installed executor runs {_what(format)} on {device} in {dtype}{quantised}",
                         hint)


def readers(read: str, registry: Registry) -> tuple[str, ...]:
    """Names of the executors that load what is in memory, or such files, in the order in which "auto" tries them;
    qualified where a bare name would be ambiguous."""
    found = [(info.order, qualified if registry.contested(ExecutorInfo, info.name) else info.name)
             for qualified, info in registry.settled(ExecutorInfo) if read in info.reads]
    return tuple(name for _, name in sorted(found))


def _what(read: str) -> str:
    return "models in memory" if read == IN_MEMORY else f"{read} files"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
