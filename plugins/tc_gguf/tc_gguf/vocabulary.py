"""A tokenizer as GGUF files have it: the tokens with their types, scores or merges, and which of them mean what.

The metadata keys and their defaults are those of llama.cpp (src/llama-vocab.cpp).
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any

from tc_gguf.file import MAXIMUM_KEYS, GgufFile
from tc_gguf.pre_tokenizers import pre_tokenizer
from torchchat_core.chat_template import LONGEST_SOURCE
from torchchat_core.errors import TorchchatError, quoted

log = logging.getLogger(__name__)
# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SENTENCEPIECE, BYTE_LEVEL = "llama", "gpt2"  # tokenizer.ggml.model
WITHOUT_TOKENS = frozenset({"none", "no_vocab"})
MAXIMUM_TOKENS = 1 << 20  # real vocabularies have at most 300 thousand; each token takes some 200 bytes of memory
MAXIMUM_MERGES = 1 << 22  # real ones have at most 600 thousand
LARGEST_SCORE = 3.4e38  # of float32
NONE = 0xFFFFFFFF  # an id that says that there is no such token
USUAL = {"unknown": 0, "bos": 1, "eos": 2}  # of SENTENCEPIECE, where the file does not name them
NAMED = ("bos", "eos", "unknown", "padding", "eot", "eom")  # tokenizer.ggml.NAME_token_id
# llama.cpp treats tokens with these names as control tokens, whatever type the file gives them: ends of texts, turns
# and messages, and the marks of fill-in-the-middle prompts.
CONTROL_NAMES = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<turn|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<eos>", "<|tool_response>",
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<PRE>", "\u2581<PRE>",
    "<|code_prefix|>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", "<SUF>",
    "\u2581<SUF>", "<|code_suffix|>", "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>",
    "<MID>", "\u2581<MID>", "<|code_middle|>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "<|fim_repo|>",
    "<fim-repo>", "<|repo_name|>", "<REPO>", "<reponame>", "<|file_sep|>"))
# If general.name contains one of these, special tokens strip the white space after them, with a few exceptions.
STRIPPING_NAMES, NOT_STRIPPING = ("phi-3", "phi3"), ("<unk>", "<s>", "<|endoftext|>")
FIX = "the file is damaged, or made by a faulty converter; pass the model's own tokenizer with --tokenizer-path"
ELSEWHERE = "pass the model's own tokenizer.json or tokenizer.model with --tokenizer-path"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer. Ids are places in `tokens`, which are all different and not empty."""

    kind: str  # SENTENCEPIECE: pairs are merged by the score of what they make; BYTE_LEVEL: by the list of merges
    tokens: Sequence[str]  # U+2581 stands for a space (SENTENCEPIECE), or a character for each byte (BYTE_LEVEL)
    types: Sequence[int]  # one for each token
    scores: Sequence[float] = ()  # one for each token, of SENTENCEPIECE
    merges: Sequence[str] = ()  # "left right", of BYTE_LEVEL
    pre: str = "default"  # of pre_tokenizers.PRE_TOKENIZERS, of BYTE_LEVEL
    bos_id: int | None = None
    eos_id: int | None = None
    unknown_id: int | None = None
    padding_id: int | None = None
    eot_id: int | None = None  # ends a turn
    eom_id: int | None = None  # ends a message, when tools answer next
    adds_bos: bool = False
    adds_eos: bool = False
    adds_space: bool = False  # in front of a text, of SENTENCEPIECE
    removes_extra_spaces: bool = False  # of SENTENCEPIECE
    strips_right: frozenset[int] = frozenset()  # tokens that strip the white space after them
    templates: Mapping[str, str] = field(default_factory=dict)  # Jinja; the usual one is called "default"

    @property
    def end_ids(self) -> frozenset[int]:
        """What ends an answer besides EOS."""
        return frozenset(token for token in (self.eot_id, self.eom_id) if token is not None)

    def name(self, token: int | None) -> str | None:
        """The text of a token; None for None."""
        return None if token is None else self.tokens[token]


def has_vocabulary(file: GgufFile) -> bool:
    """Whether there is a tokenizer in the file at all."""
    return file.text("tokenizer.ggml.model", "none") not in WITHOUT_TOKENS


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """The tokenizer in the file. Raises `TorchchatError` where there is none that is known here, or a damaged one.

    As in llama.cpp, a SentencePiece vocabulary of which the file does not say otherwise has its unknown token, BOS
    and EOS at 0, 1 and 2, and starts texts with BOS and a space; byte-level texts are cut as "default" says.
    """
    kind = file.text("tokenizer.ggml.model", "none")
    if kind not in (SENTENCEPIECE, BYTE_LEVEL):
        raise TorchchatError(f"the tokenizer in {file.path.name} is of the kind {quoted(kind)}; llama (SentencePiece) "
                             "and gpt2 (byte-level BPE) are read", ELSEWHERE)
    tokens = _tokens(file)
    types = _types(file, len(tokens))
    usual = USUAL if kind == SENTENCEPIECE else {}
    ids: dict[str, Any] = {f"{name}_id": _token(file, name, usual.get(name), types) for name in NAMED}
    for token in (ids[f"{name}_id"] for name in ("bos", "eos", "eot", "eom")):
        if token is not None and types[token] != UNKNOWN:
            types[token] = CONTROL  # whatever the converter took it for: it is never a part of a text
    for token, text in enumerate(tokens):
        if text in CONTROL_NAMES and types[token] != UNKNOWN:
            types[token] = CONTROL
    own = _sentencepiece_fields(file, len(tokens)) if kind == SENTENCEPIECE else _byte_level_fields(file, tokens)
    return Vocabulary(kind=kind, tokens=tokens, types=types, templates=_templates(file),
                      strips_right=_stripping(file, tokens, types),
                      adds_eos=file.boolean("tokenizer.ggml.add_eos_token", False), **ids, **own)


def _stripping(file: GgufFile, tokens: Sequence[str], types: Sequence[int]) -> frozenset[int]:
    """Return the tokens that strip the white space after them, which llama.cpp derives from the name of the model."""
    if not any(name in file.text("general.name", "").lower() for name in STRIPPING_NAMES):
        return frozenset()
    return frozenset(token for token, (text, kind) in enumerate(zip(tokens, types, strict=True))
                     if kind in (CONTROL, USER_DEFINED, UNKNOWN) and text not in NOT_STRIPPING)


def _sentencepiece_fields(file: GgufFile, size: int) -> dict[str, Any]:
    given = "tokenizer.ggml.scores" in file.metadata
    scores = file.numbers("tokenizer.ggml.scores") if given else array("f", [0.0]) * size
    _check_length(file, "tokenizer.ggml.scores", len(scores), size)
    wrong = next((score for score in scores if not abs(score) <= LARGEST_SCORE), None)
    if wrong is not None:
        raise TorchchatError(f"{file.path.name} holds the score {wrong} for a token; scores are finite", FIX)
    return {"scores": scores, "adds_bos": file.boolean("tokenizer.ggml.add_bos_token", True),
            "adds_space": file.boolean("tokenizer.ggml.add_space_prefix", True),
            "removes_extra_spaces": file.boolean("tokenizer.ggml.remove_extra_whitespaces", False)}


def _byte_level_fields(file: GgufFile, tokens: Sequence[str]) -> dict[str, Any]:
    pre = file.text("tokenizer.ggml.pre", "default") or "default"
    return {"merges": _merges(file, tokens), "pre": pre,
            "adds_bos": file.boolean("tokenizer.ggml.add_bos_token", pre_tokenizer(pre).adds_bos)}


def _merges(file: GgufFile, tokens: Sequence[str]) -> Sequence[str]:
    """No more of them than there are ways to make the tokens of two parts: one less than a token has characters."""
    merges = file.texts("tokenizer.ggml.merges")
    most = min(sum(map(len, tokens)) - len(tokens), MAXIMUM_MERGES)
    if len(merges) > most:
        raise TorchchatError(f"tokenizer.ggml.merges in {file.path.name} has {len(merges)} entries; the "
                             f"{len(tokens)} tokens can have {most}", FIX)
    return merges


def _tokens(file: GgufFile) -> list[str]:
    """The texts of the tokens; those that are empty get names of their own, as in llama.cpp."""
    texts = file.texts("tokenizer.ggml.tokens")
    _check_token_count(file, len(texts))
    tokens = [text or f"[EMPTY_{number}]" for number, text in enumerate(texts)]
    if len(set(tokens)) < len(tokens):
        seen: set[str] = set()
        twice = next(text for text in tokens if text in seen or seen.add(text))  # type: ignore[func-returns-value]
        raise TorchchatError(f"the vocabulary in {file.path.name} holds the token {quoted(twice)} twice", FIX)
    return tokens


def _check_token_count(file: GgufFile, count: int) -> None:
    """Models may have rows to spare, but no fewer than there are tokens."""
    if count == 0:
        raise TorchchatError(f"the vocabulary in {file.path.name} is empty", FIX)
    if count > MAXIMUM_TOKENS:
        raise TorchchatError(f"the vocabulary in {file.path.name} has {count} tokens; at most {MAXIMUM_TOKENS} are "
                             "read", FIX)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and count > embedding.shape[0]:
        raise TorchchatError(f"the vocabulary in {file.path.name} has {count} tokens; its token_embd.weight has rows "
                             f"for {embedding.shape[0]}", FIX)


def _types(file: GgufFile, size: int) -> MutableSequence[int]:
    if "tokenizer.ggml.token_type" not in file.metadata:
        return array("B", [NORMAL]) * size
    types = file.integers("tokenizer.ggml.token_type")
    _check_length(file, "tokenizer.ggml.token_type", len(types), size)
    wrong = next((kind for kind in types if not 0 <= kind <= BYTE), None)
    if wrong is not None:
        raise TorchchatError(f"{file.path.name} holds the token type {wrong}; types are 0 to {BYTE}", FIX)
    return array("B", (kind or NORMAL for kind in types))  # 0 is "undefined"


def _check_length(file: GgufFile, key: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise TorchchatError(f"{key} in {file.path.name} has {found} entries, for {wanted} tokens", FIX)


def _token(file: GgufFile, name: str, usual: int | None, types: Sequence[int]) -> int | None:
    """Return the id under tokenizer.ggml.NAME_token_id, or None if there is no such token.

    If the key is absent, or its id is out of range (some converters write the id of a token that has no row in the
    embedding), return the usual id, provided that this token is a control or unknown token.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    fits = usual is not None and usual < len(types) and types[usual] in (CONTROL, UNKNOWN)
    if not fits:
        usual = None
    if key not in file.metadata:
        return usual
    token = file.integer(key)
    if token in (-1, NONE):
        return None
    if not 0 <= token < len(types):
        log.warning("%s: %s is %s, but token ids go from 0 to %d; %s", file.path.name, key, quoted(token),
                    len(types) - 1, "ignored" if usual is None else f"using {usual}")
        return usual
    return token


def _templates(file: GgufFile) -> dict[str, str]:
    """The chat templates by name."""
    found = {"default": file.text("tokenizer.chat_template", "")}
    names = file.texts("tokenizer.chat_templates") if "tokenizer.chat_templates" in file.metadata else ()
    if len(names) > MAXIMUM_KEYS:  # each has a key of its own
        raise TorchchatError(f"tokenizer.chat_templates in {file.path.name} has {len(names)} entries; at most "
                             f"{MAXIMUM_KEYS} are read", FIX)
    for name in names:
        found[name] = file.text(f"tokenizer.chat_template.{name}", "")
    longest = max(map(len, found.values()))
    if longest > LONGEST_SOURCE:
        raise TorchchatError(f"a chat template in {file.path.name} has {longest} characters; {LONGEST_SOURCE} is the "
                             "most", FIX)
    return {name: template for name, template in found.items() if template}
