"""Meta's Llama 3 `tokenizer.model`: lines of a token in base64 and its rank, read by the tiktoken library."""

from __future__ import annotations

import base64
import binascii
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.small_files import read_file
from torchchat_core.tokenizers.base import UNKNOWN, ByteTokenizer, well_formed
from torchchat_core.tokenizers.declared import added_tokens, merged_settings, token_name
from torchchat_core.tokenizers.faults import named_faults
from torchchat_core.tokenizers.words import Words

LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]{1,9}\r?\n")
LLAMA3_RANKS = 128_000
SPECIAL_TOKENS = 256

# How Llama 3 cuts text before merging bytes: contractions, words with the character before them, up to three
# digits, other characters with their line ends, and white space.
SPLIT_PATTERN = "|".join([
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])

# The library's regular expressions overflow their stack on a run of a million spaces. The model's own reference
# cuts text and runs of this many characters; the same cuts give the same ids.
LONGEST_TEXT = 400_000
LONGEST_RUN = 25_000
RUNS = re.compile(r"\s+|\S+")


class TiktokenReader:
    """A `specs.TokenizerReader`."""

    def accepts(self, path: Path) -> bool:
        """Whether the file begins with a line of base64 and a number, which no SentencePiece model does."""
        with path.open("rb") as file:
            return LINE.match(file.read(4096)) is not None

    def read(self, path: Path, settings: Mapping[str, Any]) -> TiktokenTokenizer:
        """The tokenizer of the file. Raises `TorchchatError` where the file is damaged or is not Llama 3's kind."""
        settings = merged_settings(path, settings)
        ranks = _parse_ranks(path, read_file(path))
        names = {LLAMA3_RANKS + index: name for index, name in enumerate(llama3_special_tokens())}
        names.update((token, text) for token, (text, _) in added_tokens(settings).items() if token in names)
        special_tokens = {text: token for token, text in names.items()}
        return TiktokenTokenizer(ranks, special_tokens, settings, str(path))


class TiktokenTokenizer(ByteTokenizer):
    """Byte-level merges by rank; the control tokens follow the ranks."""

    def __init__(self, ranks: Mapping[bytes, int], special_tokens: Mapping[str, int],
                 settings: Mapping[str, Any], place: str) -> None:
        self._problem = f"the tokenizer in {place} fails"
        bos = token_name(settings, "bos_token") or "<|begin_of_text|>"
        eos = token_name(settings, "eos_token") or "<|end_of_text|>"
        adds_bos = settings.get("add_bos_token")
        super().__init__(vocab_size=max(special_tokens.values()) + 1, special_tokens=special_tokens,
                         bos_id=special_tokens.get(bos), eos_id=special_tokens.get(eos),
                         adds_bos=True if adds_bos is None else bool(adds_bos))
        self._first_control = len(ranks)
        self.longest_token = max(map(len, (*ranks, *special_tokens)))
        self._names = {token: text.encode() for text, token in special_tokens.items()}
        self._splitter = Words(special_tokens)
        # Control tokens stay out of the library: it is never to find one in ordinary text.
        self._library = tiktoken.Encoding("llama3", pat_str=SPLIT_PATTERN, mergeable_ranks=dict(ranks),
                                          special_tokens={})

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return list(itertools.chain.from_iterable(self.encode_slices(text, special=special)))

    def encode_slices(self, text: str | Sequence[str | int], *, special: bool = False) -> Iterator[Sequence[int]]:
        parts: Iterable[str | int] = [text] if isinstance(text, str) else text
        if special and isinstance(text, str):
            parts = (self.special_tokens[part] if is_control else part
                     for part, is_control in self._splitter.parts(text))
        for part in parts:
            if isinstance(part, int):
                yield [part]
            else:
                for piece in _bounded_pieces(well_formed(part)):
                    with named_faults(self._problem):
                        ids = self._library.encode_ordinary(piece)
                    yield ids

    def token_bytes(self, token: int) -> bytes:
        self._check(token)
        if token < self._first_control:
            return self._library.decode_single_token_bytes(token)
        return self._names.get(token, UNKNOWN)


def llama3_special_tokens() -> list[str]:
    """The texts of Llama 3's 256 control tokens, in order of their ids."""
    named = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
             "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
             "<|eot_id|>", "<|python_tag|>", "<|image|>"]
    reserved = SPECIAL_TOKENS - len(named)
    return named + [f"<|reserved_special_token_{2 + index}|>" for index in range(reserved)]


def _parse_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TorchchatError(f"line {number} of {path} is {quoted(line)}; it has to be a token in base64 and a "
                                 "rank",
                                 "the file is damaged: download or copy the model again") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TorchchatError(f"the ranks in {path} are not 0 to {len(ranks) - 1}, each once",
                             "the file is damaged: download or copy the model again")
    if len(ranks) != LLAMA3_RANKS:  # the ids of control tokens follow, so a short file would give wrong ones
        raise TorchchatError(f"{path} has {len(ranks)} tokens; Llama 3's has {LLAMA3_RANKS}",
                             "download or copy the model again; for another model use its tokenizer.json")
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:  # the library would abort on a text with that byte
        raise TorchchatError(f"{path} has no token for the byte {missing:#04x}",
                             "the file is damaged: download or copy the model again")
    return ranks


def _bounded_pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at most `LONGEST_TEXT` characters, none with a longer run than `LONGEST_RUN`."""
    for start in range(0, len(text), LONGEST_TEXT):
        window = text[start:start + LONGEST_TEXT]
        begin = 0
        for run in RUNS.finditer(window) if len(window) > LONGEST_RUN else ():
            for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
                yield window[begin:cut]
                begin = cut
        yield window[begin:]
