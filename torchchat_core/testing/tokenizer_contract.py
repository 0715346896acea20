"""The contract of a tokenizer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

from torchchat_core.specs import Tokenizer
from torchchat_core.testing.demands import demand
from torchchat_core.tokenizers.stream import TextStream

DIFFICULT_TEXTS: Sequence[str] = (
    "", " ", "  ", "   three before, two behind  ", "\n", "\n\n\n", "\r\n", "\t", " \n \t ", "a\u00a0b\u3000c\u200bd",
    "Hello, world!", "hello", " hello", "it's 3.14159 and 1000000", "x = [1, 2, 3]  # comment\n    return x\n",
    "na\u00efve caf\u00e9", "e\u0301 a\u0308\u0323 Z\u0351\u036b\u0343", "\u1e9e \u0130 \u01c5 \ufb01", "\u212b \u2126",
    "\N{GRINNING FACE}", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea",
    "\u4f60\u597d\uff0c\u4e16\u754c", "\u3053\u3093\u306b\u3061\u306f", "\uc548\ub155\ud558\uc138\uc694", "\U00020000",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd", "\u202eabc\u202c",
    "\u0928\u092e\u0938\u094d\u0924\u0947", "\ufffd",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\x00\x01\x07\x1b[0m\x7f", "\x85\u2028\u2029", "\ufeffbom", "\ue000",
    "\u2581", "a\u2581b", "\u0120\u010a", "<0x41>", "##ing", "a" * 3000, " " * 300, "\n" * 300, "ab \N{SNOWMAN}" * 500,
)
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TokenizerContract:
    """Any text comes back, control tokens come only when asked for, and text streams out whole.

        class TestTokenizer(TokenizerContract):
            @pytest.fixture
            def tokenizer(self):
                return MyReader().read(Path("tokenizer.mine"), {})
    """

    texts: Sequence[str] = DIFFICULT_TEXTS

    @pytest.fixture
    def tokenizer(self) -> Tokenizer:
        """The tokenizer to test."""
        raise NotImplementedError("override the fixture `tokenizer` in the subclass of TokenizerContract")

    def normalised(self, text: str) -> str:
        """What has to come back for `text`: override it where the tokenizer's own normaliser changes texts."""
        return text

    def test_difficult_texts_come_back(self, tokenizer: Tokenizer) -> None:
        """A model reads what a person wrote, whatever the script."""
        for text in self.texts:
            found, wanted = tokenizer.decode(tokenizer.encode(text)), self.normalised(text)
            demand(found == wanted, f"{_short(text)} comes back as {_short(found)}", "fall back to bytes for what the "
                   "vocabulary lacks; set `adds_prefix_space` where encoding puts a space in front; override "
                   "`normalised` where changing texts is what the tokenizer is meant to do")

    def test_ids_are_whole_numbers_of_the_vocabulary(self, tokenizer: Tokenizer) -> None:
        """An id outside would read beside the model's embedding."""
        for text in self.texts:
            ids = tokenizer.encode(text)
            wrong = [token for token in ids if type(token) is not int or not 0 <= token < tokenizer.vocab_size]
            demand(isinstance(ids, list) and not wrong, f"{_short(text)} encodes to {wrong or ids!s:.60}, with a "
                   f"vocabulary of {tokenizer.vocab_size}",
                   "return a list of Python's int, and let `vocab_size` be the largest id plus 1")

    def test_control_tokens_are_of_the_vocabulary(self, tokenizer: Tokenizer) -> None:
        """Core ends answers at them and puts them into prompts."""
        named = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, **tokenizer.special_tokens}
        for name, token in named.items():
            inside = token is None or (type(token) is int and 0 <= token < tokenizer.vocab_size)
            demand(inside, f"{name} is {token!r}, with a vocabulary of {tokenizer.vocab_size}",
                   "give ids from 0 to vocab_size - 1; bos_id and eos_id are None where there is none")
        outside = [token for token in tokenizer.end_ids if not 0 <= token < tokenizer.vocab_size]
        demand(not outside, f"end_ids has {outside}, with a vocabulary of {tokenizer.vocab_size}",
               "name only tokens of the vocabulary that end an answer; frozenset() where there are none besides eos_id")
        demand(tokenizer.bos_id is not None or not tokenizer.adds_bos, "adds_bos is true, and bos_id is None",
               "set `adds_bos` only where there is a BOS")

    def test_text_never_becomes_a_control_token(self, tokenizer: Tokenizer) -> None:
        """A person who types the name of a control token must not end the turn, nor begin another one's."""
        control = _control_ids(tokenizer)
        for text in (*self.texts, *_texts_with_control_names(tokenizer)):
            found = control & set(tokenizer.encode(text))
            demand(not found, f"{_short(text)} encodes to the control token {min(found, default=None)}",
                   "encode text as text unless `special` is set, and add neither BOS nor EOS")
        for name in tokenizer.special_tokens:
            found_text = tokenizer.decode(tokenizer.encode(name))
            demand(found_text == self.normalised(name), f"the text {name!r} comes back as {_short(found_text)}",
                   "encode the names of control tokens like any other text")

    def test_control_tokens_come_when_asked_for(self, tokenizer: Tokenizer) -> None:
        """Chat templates write control tokens by their names."""
        for name, token in tokenizer.special_tokens.items():
            for text in (name, f"a{name}b", f"{name}{name}"):
                ids = tokenizer.encode(text, special=True)
                demand(ids.count(token) == text.count(name), f"{text!r} encodes with special=True to {ids}, without "
                       f"{token} for {name!r}", "turn the names in `special_tokens` into their ids if `special` is set")

    def test_decoding_leaves_control_tokens_out(self, tokenizer: Tokenizer) -> None:
        """An answer shows text alone, and `token_bytes` shows a control token by its name."""
        ids = tokenizer.encode("abc")
        for name, token in tokenizer.special_tokens.items():
            found = tokenizer.decode([*ids, token])
            demand(found == tokenizer.decode(ids), f"decoding {name!r} behind \"abc\" gives {found!r}",
                   "leave the ids of `special_tokens` out of decoded text")
            demand(tokenizer.token_bytes(token) == name.encode(), f"token_bytes({token}) is "
                   f"{tokenizer.token_bytes(token)!r} for the control token {name!r}", "return the UTF-8 of its name")

    def test_the_bytes_of_tokens_are_the_text(self, tokenizer: Tokenizer) -> None:
        """Streaming, stop strings and constraints read single tokens; the whole must be what they read."""
        control = set(tokenizer.special_tokens.values())
        for ids in (*map(tokenizer.encode, self.texts), *_random_ids(tokenizer)):
            data = b"".join(tokenizer.token_bytes(token) for token in ids if token not in control)
            if tokenizer.adds_prefix_space:
                data = data.removeprefix(b" ")
            joined, whole = data.decode(errors="replace"), tokenizer.decode(ids)
            demand(joined == whole, f"the bytes of {ids!s:.80} are {_short(joined)}, decoded at once they are "
                   f"{_short(whole)}", "let token_bytes give what the token adds in the middle of a text, spaces "
                   "included, and decode join them")

    def test_text_streams_out_whole(self, tokenizer: Tokenizer) -> None:
        """What is shown while tokens come is never half a character, is never taken back, and adds up to the text."""
        for ids in (*(tokenizer.encode(text[:200]) for text in self.texts), *_random_ids(tokenizer)):
            stream, shown = TextStream(tokenizer, at_start=True), ""
            for count, token in enumerate(ids, 1):
                shown += stream.push(token)
                so_far = tokenizer.decode(ids[:count])
                demand(so_far.startswith(shown) and not so_far[len(shown) :].strip(REPLACEMENT),
                       f"after {count} tokens of {ids!s:.80} the stream shows {_short(shown)}, and the text is "
                       f"{_short(so_far)}", "let no token change the text of those before it, and let token_bytes give "
                       "the bytes of a part of a character as they are, not U+FFFD")
            shown += stream.finish()
            demand(shown == tokenizer.decode(ids), f"the stream of {ids!s:.80} shows {_short(shown)} instead of "
                   f"{_short(tokenizer.decode(ids))}", "let token_bytes give the same bytes as decode")

    def test_encoding_keeps_no_memory(self, tokenizer: Tokenizer) -> None:
        """The same text gives the same ids, whatever was encoded between."""
        text = "one " + " ".join(list(tokenizer.special_tokens)[:2]) + " two"
        plain, special = tokenizer.encode(text), tokenizer.encode(text, special=True)
        again = tokenizer.encode(text), tokenizer.encode(text, special=True)
        demand(again == (plain, special), f"{text!r} encodes to {plain} and {special}, and then to {again[0]} and "
               f"{again[1]}", "keep no state between calls, and give ties and dropout no chance")

    def test_lone_surrogates_are_taken(self, tokenizer: Tokenizer) -> None:
        """Terminals and JSON deliver them; no text of a person may raise an error."""
        try:
            tokenizer.encode("a\ud83db\udc00")
        except Exception as error:
            demand(False, f"encoding a lone surrogate raises {type(error).__name__}: {error}",
                   "replace it by U+FFFD, as torchchat_core.tokenizers.base.well_formed does")


def _control_ids(tokenizer: Tokenizer) -> set[int]:
    ids = {*tokenizer.special_tokens.values(), tokenizer.bos_id, tokenizer.eos_id}
    return {token for token in ids if token is not None}


def _texts_with_control_names(tokenizer: Tokenizer) -> Iterator[str]:
    for name in tokenizer.special_tokens:
        yield from (name, f" {name}", f"a{name}b", f"{name}{name}", name[:-1])


def _random_ids(tokenizer: Tokenizer) -> list[list[int]]:
    """Sequences that no text encodes to: parts of characters, control tokens anywhere."""
    chance = random.Random(0)
    small = [token for token in range(min(tokenizer.vocab_size, 600)) if len(tokenizer.token_bytes(token)) == 1]
    return [[chance.choice(small) if small and chance.random() < 0.5 else chance.randrange(tokenizer.vocab_size)
             for _ in range(chance.randrange(1, 30))] for _ in range(60)]


def _short(text: str) -> str:
    return repr(text) if len(text) <= 40 else f"{text[:20]!r}...{text[-10:]!r} ({len(text)} characters)"
