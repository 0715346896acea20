"""How a conversation is answered: which model, run by what, told what, and how its tokens are chosen.

A configuration is kept with its conversation as JSON, and so may have been written by an older version or by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.generation_options import GenerationOptions, SamplingOptions
from torchchat_core.options import check_value

if TYPE_CHECKING:
    from torchchat_core.pipeline import ModelRequest

MOST_SAMPLES = 16
MOST_STOPS = 16
OPTIONAL: Mapping[str, tuple[type, ...]] = {  # fields that may be null
    **dict.fromkeys(("model", "executor", "quantize", "device", "dtype"), (str, type(None))),
    "max_new_tokens": (int, type(None))}
SAMPLING = {declared.name: declared for declared in fields(SamplingOptions)}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """Raises `TorchchatError` for values out of range."""

    model: str | None = None  # as MODEL of the command line; None: the one that the command was given
    executor: str | None = None  # likewise
    quantize: str | None = None  # "": as the model is; None: as the command says
    device: str | None = None  # as of --device; None: as the command says
    dtype: str | None = None  # as of --dtype; "": the checkpoint's; None: as the command says
    system: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)  # only what was chosen
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    num_samples: int = 1
    transcript: bool = False  # for a model without a chat template: a written dialogue, not the text continued

    def __post_init__(self) -> None:
        for name in self.sampling:
            if name not in SAMPLING:
                raise TorchchatError(f"there is no sampling option {quoted(name)}")
            check_value(SamplingOptions, SAMPLING[name], self.sampling[name])
        if not 1 <= self.num_samples <= MOST_SAMPLES:
            raise TorchchatError(f"num_samples is {self.num_samples}; it has to be 1 to {MOST_SAMPLES}")
        if len(self.stop) > MOST_STOPS:
            raise TorchchatError(f"there are {len(self.stop)} stop strings; {MOST_STOPS} are the most")
        self.options({})

    def options(self, defaults: Mapping[str, Any]) -> GenerationOptions:
        """What is asked of an answer, by a model whose makers recommend `defaults`."""
        return GenerationOptions(sampling=SamplingOptions(**{**defaults, **self.sampling}),
                                 max_new_tokens=self.max_new_tokens, stop=self.stop)

    def request(self, base: ModelRequest) -> ModelRequest:
        """The model to open: that of the command line with what was chosen in its place. Another model brings its own
        files."""
        changes: dict[str, Any] = {}
        if self.model is not None:
            changes |= {"model": self.model, "checkpoint_path": None, "params_path": None, "tokenizer_path": None,
                        "adapter": None}
        if self.executor is not None:
            changes["executor"] = self.executor
        if self.quantize is not None:
            changes["quantize"] = self.quantize or None
        if self.device is not None:
            changes["device"] = self.device
        if self.dtype is not None:
            changes["dtype"] = self.dtype or None
        return replace(base, **changes, defaults=base.defaults.difference(changes))

    def to_json(self) -> str:
        """As it is kept. Keys of logit_bias become texts."""
        return json.dumps({**asdict(self), "sampling": dict(self.sampling)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Configuration:
        """What `to_json` wrote; the defaults in place of what this version does not take."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return cls()
        if not isinstance(found, dict):
            return cls()
        made = cls()
        for name in (each.name for each in fields(cls) if each.name in found):
            try:
                made = replace(made, **{name: _read(name, found[name], getattr(cls(), name))})
            except (TorchchatError, TypeError, ValueError, AttributeError):
                continue
        return made


def _read(name: str, value: Any, default: Any) -> Any:
    """Raises `TypeError` or `ValueError` for a value of the wrong type."""
    if name == "sampling":
        sampling = dict(value)
        if "logit_bias" in sampling:
            sampling["logit_bias"] = {int(token): float(bias) for token, bias in sampling["logit_bias"].items()}
        return sampling
    if name == "stop":
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise TypeError(name)
        return tuple(value)
    wanted: tuple[type, ...] = OPTIONAL.get(name, (type(default),))
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise TypeError(name)
    return value
