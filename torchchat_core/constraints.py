"""Answers that have to be like a grammar: which tokens may come next. The grammars are llguidance's.

A constraint works on the bytes of tokens, and so holds for every tokenizer and every executor.
"""

from __future__ import annotations

import json
import re
import threading
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.generation_options import CallGrammar, Grammar
from torchchat_core.json_schemas import WHITE_SPACE, enforceable
from torchchat_core.sampling import numbers
from torchchat_core.specs import Tokenizer
from torchchat_core.text_format import TextFormat
from torchchat_core.tokenizers.stream import TextStream
from torchchat_core.tool_calls import ToolCallReader

# llguidance's message about a reference that it cannot resolve. It prefixes relative ones with its own base URI.
OUTSIDE_REFERENCE = re.compile(r"Resource '(?:json-schema:///)?(.*)' is not present in a registry", re.DOTALL)
OVERWORKED = re.compile(r"too (many|big|complex)|max is|TooComplex|fuel|limit", re.IGNORECASE)  # llguidance's messages
KEPT = 32  # compiled grammars of a vocabulary
_vocabularies: weakref.WeakKeyDictionary[Tokenizer, dict[frozenset[int], _Vocabulary]] = weakref.WeakKeyDictionary()


class GrammarError(TorchchatError):
    """What was asked for cannot be written: by this model, or within the work that a grammar may make."""


def schema_grammar(schema: object) -> Grammar:
    """The grammar of JSON texts that a JSON Schema (Draft 2020-12) describes.

    Raises `TorchchatError` where it is none, or uses what cannot be enforced while a text is being written.
    """
    if not isinstance(schema, dict | bool):
        raise TorchchatError(f"a JSON Schema is an object; this one is {json.dumps(schema)[:60]}")
    try:
        grammar = Grammar("json_schema", json.dumps(enforceable(schema)))
    except RecursionError:
        raise TorchchatError("the JSON Schema is nested too deeply") from None
    check_grammar(grammar)
    return grammar


def check_grammar(grammar: Grammar) -> None:
    """Raises `TorchchatError` for a grammar that is malformed, too large, or asks for what is not supported."""
    from llguidance import LLMatcher

    failed, messages = LLMatcher.validate_grammar_with_warnings(_compiled(grammar), limits=_limits())
    if failed:
        raise _refused(grammar, messages[0] if messages else "it is malformed")


def constraint_for(grammar: Grammar, text_format: TextFormat) -> Constraint:
    """A new constraint, at the start of an answer. Raises `GrammarError` for a grammar that takes too much work, which
    may be seen only after some of it: who cannot wait, asks for one before."""
    vocabulary = _vocabulary(text_format.tokenizer, text_format.end_ids)
    return Constraint(vocabulary.matcher(grammar).deep_copy())


class Constraint:
    """What one answer may go on with."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def apply(self, logits: Tensor) -> Tensor:
        """The logits [vocab], with -inf for every token that would break the grammar.

        Raises `TorchchatError` where no token is left, or where the grammar takes too much work.
        """
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        if self._matcher.is_error():
            raise _failure(self._matcher.get_error())
        row = numbers(logits).copy()
        permitted = bits[: len(row)].astype(bool)
        if not permitted.any():
            raise _unsayable()
        row[: len(permitted)][~permitted] = row[len(permitted) :] = -np.inf
        return torch.from_numpy(row)

    def accept(self, token: int) -> None:
        """Counts a token as said. Raises `TorchchatError` for one that breaks the grammar."""
        if not self._matcher.consume_token(token):
            raise _unsayable()

    @property
    def complete(self) -> bool:
        """Whether nothing more can follow."""
        return bool(self._matcher.is_stopped())


class CallConstraint:
    """Constrain the calls in an answer to a grammar; all other text is unconstrained."""

    def __init__(self, calls: CallGrammar, text_format: TextFormat) -> None:
        """Raises `GrammarError` for a grammar that takes too much work."""
        self._vocabulary = _vocabulary(text_format.tokenizer, text_format.end_ids)
        self._grammar = calls.grammar
        self._vocabulary.matcher(calls.grammar)
        self._reader = ToolCallReader(calls.form, dict.fromkeys(calls.names), calls.thinking)
        self._text = TextStream(text_format.tokenizer, at_start=False, shown=calls.form.marks(text_format.tokenizer))
        self._begins = re.compile(calls.begins)
        self._begun = 0  # number of the reader's candidate that was found to start like a call
        self._call: Constraint | None = None  # applies from there to the end of the call

    def apply(self, logits: Tensor) -> Tensor:
        """Return the logits [vocab]; inside a call, tokens that would break the grammar are -inf."""
        return logits if self._call is None else self._call.apply(logits)

    def accept(self, token: int) -> None:
        """Advance by one sampled token."""
        self._reader.push(self._text.push(token))
        opened = self._reader.opened
        if opened is not None and self._begun == self._reader.candidates:
            if self._call is not None:
                self._call.accept(token)
            return
        self._call = None
        if opened is not None and self._begins.match(opened):
            self._begun = self._reader.candidates
            self._call = self._after(opened)

    @property
    def complete(self) -> bool:
        """False, because text can always follow."""
        return False

    def _after(self, opened: str) -> Constraint | None:
        """Return the constraint after the text since the opener, or None if that text is not a call."""
        matcher = self._vocabulary.matcher(self._grammar).deep_copy()
        ids = self._vocabulary.ids(opened)
        return None if ids is None or not matcher.consume_tokens(ids) else Constraint(matcher)


def _compiled(grammar: Grammar) -> str:
    from llguidance import LLMatcher

    if grammar.kind == "json_schema":
        try:
            return LLMatcher.grammar_from_json_schema(grammar.source, overrides={"whitespace_pattern": WHITE_SPACE})
        except ValueError as error:
            raise _refused(grammar, str(error)) from None
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.source)
    raise TorchchatError(f"unknown kind of grammar {quoted(grammar.kind)}; known are json_schema and lark")


def _limits() -> Any:
    """Of the work that a stranger's grammar may make; llguidance's own, without details in its messages."""
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False)


def _refused(grammar: Grammar, reason: str) -> TorchchatError:
    if "coerce_one_of" in reason:
        reason = '"oneOf" with alternatives that can both match cannot be enforced; use "anyOf", or give each ' \
                 'alternative a required property with a different "const"'
    if outside := OUTSIDE_REFERENCE.match(reason):
        reason = f"$ref leads to another document, {quoted(outside[1])}; expected a reference within the schema, " \
                 'such as "#/$defs/NAME"'
    name = "JSON Schema" if grammar.kind == "json_schema" else "grammar"
    return TorchchatError(f"the {name} cannot be used: {_first_line(reason)}")


def _unsayable() -> GrammarError:
    return GrammarError("the model's vocabulary has no token for what the answer has to go on with",
                        "choose another model: this one cannot write such a text at all")


def _failure(reason: str) -> GrammarError:
    """Return the error for a grammar that failed during an answer. `reason` is llguidance's internal message."""
    if "NoExtension" in reason:
        return _unsayable()
    if OVERWORKED.search(reason):
        return GrammarError("the grammar of the answer needs too much work for one token", "simplify the schema")
    return GrammarError("the grammar of the answer failed", "simplify the schema")


def _first_line(message: str) -> str:
    return (message.strip().splitlines() or ["it failed"])[0][:300]


def _vocabulary(tokenizer: Tokenizer, end_ids: frozenset[int]) -> _Vocabulary:
    """Made once for each tokenizer: of 128 thousand tokens in half a second."""
    made = _vocabularies.setdefault(tokenizer, {})
    if end_ids not in made:
        made[end_ids] = _Vocabulary(tokenizer, end_ids)
    return made[end_ids]


class _Vocabulary:
    """The tokens as llguidance takes them, and the grammars that were compiled for them."""

    def __init__(self, tokenizer: Tokenizer, end_ids: frozenset[int]) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        self._by_text = _Tokens(tokenizer, end_ids)
        self._tokens = LLTokenizer(TokenizerWrapper(self._by_text),
                                   eos_token=sorted(end_ids) or [tokenizer.vocab_size])
        self._matchers: dict[Grammar, Any] = {}  # at their start; the one that was used last stands last
        self._lock = threading.Lock()  # of these

    def ids(self, text: str) -> list[int] | None:
        """Return tokens whose bytes are exactly the text, or None if the vocabulary has no such tokens."""
        ids = self._by_text(text)
        return ids if b"".join(self._by_text.tokens[token] for token in ids) == text.encode() else None

    def matcher(self, grammar: Grammar) -> Any:
        """Not to be changed: several threads may have it."""
        from llguidance import LLMatcher

        with self._lock:
            found = self._matchers.pop(grammar, None)
        if found is None:
            found = LLMatcher(self._tokens, _compiled(grammar), log_level=0, limits=_limits())
            if found.is_error():
                raise GrammarError(str(_refused(grammar, found.get_error())), "make it simpler")
        with self._lock:
            self._matchers[grammar] = found
            while len(self._matchers) > KEPT:
                del self._matchers[next(iter(self._matchers))]
        return found


class _Tokens:
    """The attributes that llguidance's wrapper reads."""

    def __init__(self, tokenizer: Tokenizer, end_ids: frozenset[int]) -> None:
        control = set(tokenizer.special_tokens.values()) | end_ids
        size = max([tokenizer.vocab_size, *(token + 1 for token in end_ids)])
        self.tokens = [tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b"<unknown>"
                       for token in range(size)]
        self.tokens.append(b"<end of text>")  # for tokenizers without an end
        self.special_token_ids = sorted({*control, *range(tokenizer.vocab_size, size + 1)})
        self.eos_token_id = min(end_ids, default=tokenizer.vocab_size)
        self.bos_token_id = tokenizer.bos_id
        self._tokenizer = weakref.ref(tokenizer)  # whose vocabulary this is: it must not keep its own key alive
        self._by_bytes = {data: token for token, data in reversed(list(enumerate(self.tokens))) if token not in control}
        self._longest = max(map(len, self._by_bytes), default=1)

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text in the middle of another one, whose bytes are the text's: no space comes before it."""
        wanted = text.encode()
        tokenizer = self._tokenizer()
        ids = tokenizer.encode(text) if tokenizer is not None else []
        return ids if b"".join(self.tokens[token] for token in ids) == wanted else self._greedy(wanted)

    def _greedy(self, data: bytes) -> list[int]:
        """The longest token that fits, again and again, up to the first byte without a token."""
        ids, start, size = [], 0, 1
        while start < len(data) and size:
            sizes = range(min(self._longest, len(data) - start), 0, -1)
            size = next((size for size in sizes if data[start : start + size] in self._by_bytes), 0)
            if size:
                ids.append(self._by_bytes[data[start : start + size]])
            start += size
        return ids
