"""The vocabulary in a tokenizer.json, and that of Llama 3's ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tc_gguf.pre_tokenizers import PRE_TOKENIZERS, name_of
from tc_gguf.vocabulary import (
    BYTE,
    BYTE_LEVEL,
    CONTROL,
    NORMAL,
    SENTENCEPIECE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
)
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.specs import Tokenizer
from torchchat_core.tokenizers.hugging_face import byte_level_alphabet

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
NEVER_MERGED = -1e6  # the score of a token that no merge makes, below all others
CONVERTER = "use the converter of llama.cpp"


def is_byte_level(content: Mapping[str, Any]) -> bool:
    """Whether the tokens are of characters that stand for bytes."""
    decoder = content.get("decoder")
    steps = decoder.get("decoders") if isinstance(decoder, dict) and decoder.get("type") == "Sequence" else [decoder]
    return any(isinstance(step, dict) and step.get("type") == "ByteLevel" for step in steps or ())


def vocabulary_of_tokenizer_json(content: Mapping[str, Any], place: str) -> Vocabulary:
    """The vocabulary of a tokenizer.json of the kind BPE, byte-level or in the way of SentencePiece.

    Which tokens are BOS and EOS is left to others. NFC is left out, which Qwen's and other files ask for: readers of
    GGUF files do not normalise. Raises `TorchchatError` for other kinds, and for byte-level files that cut texts in
    a way that has no name.
    """
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise TorchchatError(f"{place} is of the kind {quoted(model.get('type'))}; BPE is written to GGUF files",
                             CONVERTER)
    tokens, types = _tokens(content, model, place)
    merges = [_merge(each, place) for each in model.get("merges", ())]
    if not is_byte_level(content):
        ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(merges)))}
        scores = [float(-ranks[text]) if text in ranks else NEVER_MERGED for text in tokens]
        return Vocabulary(kind=SENTENCEPIECE, tokens=tokens, types=types, scores=scores,
                          unknown_id=types.index(UNKNOWN) if UNKNOWN in types else None)
    if not merges:
        raise TorchchatError(f"{place} has no merges; readers of GGUF files reject such a byte-level vocabulary",
                             "export the model to another format: .pte or .pt2")
    pre = name_of(content.get("pre_tokenizer"), bool(model.get("ignore_merges")))
    normalizer = content.get("normalizer")
    if normalizer and (not isinstance(normalizer, dict) or normalizer.get("type") != "NFC"):
        raise TorchchatError(f"{place} changes texts by {quoted(normalizer)} before it encodes them, which readers of "
                             "GGUF files do not do", CONVERTER)
    if pre is None:
        raise TorchchatError(f"{place} cuts texts into words by {quoted(content.get('pre_tokenizer'))}, which has no "
                             f"name in GGUF files; those with a name are {', '.join(PRE_TOKENIZERS)}", CONVERTER)
    return Vocabulary(kind=BYTE_LEVEL, tokens=tokens, types=types, pre=pre,
                      merges=[f"{left} {right}" for left, right in merges])


def _tokens(content: Mapping[str, Any], model: Mapping[str, Any], place: str) -> tuple[list[str], list[int]]:
    """Texts and types by id. Ids without a token get names of their own, and are never used."""
    by_id = {token: text for text, token in model["vocab"].items()}
    added = {each["id"]: each for each in content.get("added_tokens", ())}
    by_id |= {token: each["content"] for token, each in added.items()}
    size = max(by_id, default=-1) + 1
    if size > 2 * len(by_id) + 1024:
        raise TorchchatError(f"{place} has {len(by_id)} tokens with ids up to {size - 1}, with too many gaps between",
                             "the file is damaged: download or copy the model again")
    fallback = bool(model.get("byte_fallback"))

    def kind(token: int, text: str) -> int:
        if text == model.get("unk_token"):
            return UNKNOWN
        if token in added:
            return CONTROL if added[token].get("special") else USER_DEFINED
        return BYTE if fallback and BYTE_TOKEN.fullmatch(text) else NORMAL

    texts = [by_id.get(token, f"[UNUSED_{token}]") for token in range(size)]
    return texts, [kind(token, text) if token in by_id else UNUSED for token, text in enumerate(texts)]


def _merge(declared: object, place: str) -> tuple[str, str]:
    parts = declared.split(" ") if isinstance(declared, str) else declared
    if not isinstance(parts, list) or len(parts) != 2 or any(" " in part for part in parts):
        raise TorchchatError(f"{place} holds the merge {quoted(declared)}; GGUF files have two texts without spaces",
                             CONVERTER)
    return parts[0], parts[1]


def vocabulary_of_ranks(tokenizer: Tokenizer) -> Vocabulary:
    """Llama 3's vocabulary, of which Meta's file has only the order in which tokens were made.

    A pair is merged where what it makes is a token; pairs that make the same come in the order of their parts.
    """
    first_control = min(tokenizer.special_tokens.values())
    ranks = {tokenizer.token_bytes(token): token for token in range(first_control)}
    characters = {byte: character for character, byte in byte_level_alphabet().items()}
    texts = ["".join(characters[byte] for byte in token) for token in ranks]
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    merges = [f"{texts[left]} {texts[right]}" for token in ranks for left, right in _splits(token, ranks)]
    controls = [names[token] for token in range(first_control, tokenizer.vocab_size)]
    return Vocabulary(kind=BYTE_LEVEL, tokens=texts + controls, types=[NORMAL] * len(texts) + [CONTROL] * len(controls),
                      merges=merges, pre="llama-bpe")


def _splits(token: bytes, ranks: Mapping[bytes, int]) -> Sequence[tuple[int, int]]:
    """The ways to make a token of two others, by their ids."""
    parts = ((ranks.get(token[:cut]), ranks.get(token[cut:])) for cut in range(1, len(token)))
    return sorted((left, right) for left, right in parts if left is not None and right is not None)
