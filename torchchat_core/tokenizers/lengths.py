"""Bound the amount of text that one token stands for, so that texts that cannot fit are rejected without encoding."""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torchchat_core.tokenizers.faults import TokenizerError

LARGEST_GROWTH = 4096  # times that a text may grow by the replacements of a tokenizer.json; in use are up to 12
# Normalizers, and the maximum ratio of the bytes of a text to those of its normalized form. Others may drop text.
SHRINKING = {"Prepend": 1, "ByteLevel": 1, "NFC": 4, "NFD": 4, "NFKC": 4, "NFKD": 4, "Lowercase": 4}
KEEPING = frozenset({"ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "Split"})  # pre-tokenizers that drop nothing
BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def longest_token(content: Mapping[str, Any], pieces: Collection[str], alphabet: Collection[str]) -> int | None:
    """Return an upper bound on the text bytes that one token of a tokenizer.json stands for; None if there is none.

    `pieces` are the texts of all tokens, `alphabet` the characters that stand for bytes in byte-level vocabularies.
    """
    model, factor = content["model"], 1
    steps = list(_steps(content.get("normalizer"), "normalizers"))
    for step in steps:
        kind = str(step.get("type"))
        if kind == "Replace":
            pattern = step.get("pattern")
            replaced = pattern.get("String") if isinstance(pattern, Mapping) else None
            if not isinstance(replaced, str) or len(replaced.encode()) > len(str(step.get("content", "")).encode()):
                return None
        elif kind in SHRINKING:
            factor *= SHRINKING[kind]
        else:
            return None
    cuts = list(_steps(content.get("pre_tokenizer"), "pretokenizers"))
    if any(str(cut.get("type")) not in KEEPING or cut.get("behavior") == "Removed" for cut in cuts):
        return None
    if any(token.get("lstrip") or token.get("rstrip") for token in content.get("added_tokens") or []):
        return None
    by_bytes = any(step.get("type") == "ByteLevel" for step in (*steps, *cuts)) and all(
        letter in pieces for letter in alphabet)
    by_fallback = bool(model.get("byte_fallback")) and all(piece in pieces for piece in BYTE_PIECES)
    if model.get("type", "BPE") not in ("BPE", "Unigram") or not (by_fallback or (by_bytes and "merges" in model)):
        return None  # the unknown token can stand for any text
    return factor * max(len(piece.encode("utf-8", "replace")) for piece in pieces)


def check_growth(content: Mapping[str, Any], place: str) -> None:
    """Raise `TokenizerError` if the normalizer or the decoder of a tokenizer.json can fill the memory: one replaces a
    character by a long text, many double it, or a table says that it is longer than it is. `place` names the file."""
    for name, steps in (("normalizer", "normalizers"), ("decoder", "decoders")):
        growth = 1.0
        for step in _steps(content.get(name), steps):
            if _overstates_its_table(step):
                raise TokenizerError(f"the precompiled_charsmap in {place} is shorter than it says",
                                     "the file may be damaged: download or copy the model again")
            growth *= _growth(step)
            if growth > LARGEST_GROWTH:
                raise TokenizerError(f"the {name} in {place} can make a text more than {LARGEST_GROWTH} times as long",
                                     "choose another model; no tokenizer needs that")


def _growth(step: Mapping[str, Any]) -> float:
    """Return the maximum growth factor of a text in a step of any type."""
    pattern, inserted = step.get("pattern"), len(str(step.get("content", "")))
    replaced = pattern.get("String") if isinstance(pattern, Mapping) else None
    by_content = inserted / len(replaced) if isinstance(replaced, str) and replaced else inserted + 1
    return max(1.0, by_content) * (1 + len(str(step.get("prepend", ""))))


def _overstates_its_table(step: Mapping[str, Any]) -> bool:
    """Return True if a table in base64, which begins with its size in bytes, is smaller than that: the library asks for
    that much memory, and ends the process where there is none."""
    table = step.get("precompiled_charsmap")
    if not isinstance(table, str):
        return False
    try:
        size = int.from_bytes(base64.b64decode(table[:8])[:4], "little")
    except ValueError:  # the library says so
        return False
    return size > len(table) * 3 // 4


def _steps(part: Any, name: str) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a part, with sequences of them laid out."""
    parts = [part]
    while parts:
        step = parts.pop()
        if isinstance(step, Mapping) and isinstance(step.get(name), list):
            parts += reversed(step[name])
        elif isinstance(step, Mapping):
            yield step
