"""What can be asked of an answer. Standard library alone: `--help` is written from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.options import option, validate

if TYPE_CHECKING:
    from torchchat_core.tool_calls import ToolForm

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # that a model's makers may choose
MAXIMUM_SEED = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen. Raises `TorchchatError` for a value out of range."""

    temperature: float = option(0.8, "randomness; 0 always takes the likeliest token", minimum=0.0, maximum=100.0)
    top_k: int = option(0, "only the k likeliest tokens; 0: all", minimum=0)
    top_p: float = option(1.0, "only the likeliest tokens that together have this probability; 1: all",
                          above=0.0, maximum=1.0)
    min_p: float = option(0.0, "only tokens with at least this share of the likeliest one's probability; 0: all",
                          minimum=0.0, maximum=1.0)
    repetition_penalty: float = option(1.0, "above 1 makes every token that already occurred less likely; 1: off",
                                       minimum=0.01, maximum=100.0)
    presence_penalty: float = option(0.0, "taken off the logit of every token that the answer already has",
                                     minimum=-100.0, maximum=100.0)
    frequency_penalty: float = option(0.0, "taken off for each time that the answer already has the token",
                                      minimum=-100.0, maximum=100.0)
    seed: int | None = option(None, "the same seed gives the same text; 0 is a seed; without one, chance decides",
                              minimum=0, maximum=MAXIMUM_SEED)
    logit_bias: Mapping[int, float] = field(
        default_factory=dict, metadata=option({}, "token id -> what is added to its logit").metadata)

    def __post_init__(self) -> None:
        validate(self)
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or token < 0 or not -1e4 <= bias <= 1e4:
                raise TorchchatError(f"logit_bias has {quoted(token)}: {quoted(bias)}; it maps token ids to numbers "
                                     "from -10000 "
                                     "to 10000")


@dataclass(frozen=True)
class Grammar:
    """What an answer has to be like: of `kind` "json_schema" (a JSON text) or "lark" (a grammar of llguidance)."""

    kind: str
    source: str


@dataclass(frozen=True)
class CallGrammar:
    """A grammar for the function calls in an answer; other text is unconstrained."""

    form: ToolForm
    names: tuple[str, ...]  # the functions' names
    begins: str  # regular expression for the text after an opener that is the start of a call
    grammar: Grammar  # for the call, from the end of the opener
    thinking: str | None = None  # the tag at the end of the prompt that opens the model's thinking


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How long an answer may be, what ends it, what it has to be like, and how its tokens are chosen."""

    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    max_new_tokens: int | None = None  # None: until the model ends it or the context is full
    stop: tuple[str, ...] = ()
    grammar: Grammar | None = None
    calls: CallGrammar | None = None  # ignored if `grammar` is set
    logprobs: int | None = None  # of each token, and of so many of the likeliest ones beside it; None: of none
    shown: frozenset[int] = frozenset()  # control tokens whose names belong to the text, such as that of a tool call

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise TorchchatError(f"max_new_tokens is {self.max_new_tokens}; it has to be 1 or more")
        if any(not text for text in self.stop):
            raise TorchchatError("a stop string is empty; it would end every answer at once")
        if self.logprobs is not None and self.logprobs < 0:
            raise TorchchatError(f"logprobs is {self.logprobs}; it has to be 0 or more")
