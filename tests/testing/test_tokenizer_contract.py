"""The tokenizer contract finds each kind of fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from torchchat_core.testing import TokenizerContract
from torchchat_core.testing.models import TinyTokenizer


class Shouts(TinyTokenizer):
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return super().encode(text.upper(), special=special)


class LosesSpaces(TinyTokenizer):
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return super().encode(text.strip(), special=special)


class KnowsTooLittle(TinyTokenizer):
    vocab_size = 200


class GivesFloats(TinyTokenizer):
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return [float(token) for token in super().encode(text, special=special)]


class EndsOutside(TinyTokenizer):
    eos_id = 259


class BeginsWithNothing(TinyTokenizer):
    bos_id = None


class ObeysText(TinyTokenizer):
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return super().encode(text, special=True)


class BeginsByItself(TinyTokenizer):
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return [0, *super().encode(text, special=special)]


class IgnoresSpecial(TinyTokenizer):
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return super().encode(text)


class ShowsControlTokens(TinyTokenizer):
    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")


class NamesNoControlTokens(TinyTokenizer):
    def token_bytes(self, token: int) -> bytes:
        return super().token_bytes(token) if token > 2 else b""


class TokensWithoutSpaces(TinyTokenizer):
    def token_bytes(self, token: int) -> bytes:
        return super().token_bytes(token).strip()


class TokensAreText(TinyTokenizer):
    """Each token is decoded by itself: the bytes of a longer character are lost."""

    def token_bytes(self, token: int) -> bytes:
        return super().token_bytes(token).decode(errors="replace").encode()


class TakesTextBack(TinyTokenizer):
    """Further tokens change the text of those before them."""

    def decode(self, ids: Sequence[int]) -> str:
        text = super().decode(ids)
        return text.replace("ab", "ba")


class StaysSpecial(TinyTokenizer):
    def __init__(self) -> None:
        self._special = False

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        self._special |= special
        return super().encode(text, special=self._special)


class FailsOnSurrogates(TinyTokenizer):
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        text.encode()
        return super().encode(text, special=special)


class TestRight(TokenizerContract):
    @pytest.fixture
    def tokenizer(self) -> TinyTokenizer:
        return TinyTokenizer()


def contract(faulty: type[TinyTokenizer]) -> type[TokenizerContract]:
    """The contract of one of the tokenizers, as a test class of this module."""
    made = type(f"Contract{faulty.__name__}", (TokenizerContract,),
                {"tokenizer": pytest.fixture(lambda _: faulty()), "__module__": __name__})
    globals()[made.__name__] = made
    return made


FAULTS = [(contract(faulty), test, words) for faulty, test, words in [
    (Shouts, "test_difficult_texts_come_back", "comes back as '   THREE BEFORE"),
    (LosesSpaces, "test_difficult_texts_come_back", "' ' comes back as ''"),
    (KnowsTooLittle, "test_ids_are_whole_numbers_of_the_vocabulary", "with a vocabulary of 200"),
    (GivesFloats, "test_ids_are_whole_numbers_of_the_vocabulary", "encodes to [35.0]"),
    (EndsOutside, "test_control_tokens_are_of_the_vocabulary", "eos_id is 259"),
    (BeginsWithNothing, "test_control_tokens_are_of_the_vocabulary", "bos_id is None"),
    (ObeysText, "test_text_never_becomes_a_control_token", "'<s>' encodes to the control token 0"),
    (BeginsByItself, "test_text_never_becomes_a_control_token", "'' encodes to the control token 0"),
    (IgnoresSpecial, "test_control_tokens_come_when_asked_for", "without 0 for '<s>'"),
    (ShowsControlTokens, "test_decoding_leaves_control_tokens_out", "gives 'abc<s>'"),
    (NamesNoControlTokens, "test_decoding_leaves_control_tokens_out", "token_bytes(0) is b''"),
    (TokensWithoutSpaces, "test_the_bytes_of_tokens_are_the_text", "the bytes of [35] are ''"),
    (TokensAreText, "test_text_streams_out_whole", "the stream shows"),
    (TakesTextBack, "test_text_streams_out_whole", "the stream shows"),
    (StaysSpecial, "test_encoding_keeps_no_memory", "and then to"),
    (FailsOnSurrogates, "test_lone_surrogates_are_taken", "raises UnicodeEncodeError"),
]]


@pytest.mark.parametrize(("contract", "test", "words"), FAULTS)
def test_the_fault_is_found(contract: type, test: str, words: str, failures: Mapping[tuple[str, str], str]) -> None:
    assert words in failures[contract.__name__, test]
    assert "to mend it: " in failures[contract.__name__, test]


def test_every_demand_has_a_fault() -> None:
    assert {name for name in dir(TokenizerContract) if name.startswith("test_")} == {test for _, test, _ in FAULTS}
