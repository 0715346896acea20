"""How much text a token can stand for, so that a text without any chance to fit is refused before it is encoded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

# Normalizers, and how many times as long as their result a text can be at most, in bytes. Other ones may drop text.
SHRINKING = {"Prepend": 1, "ByteLevel": 1, "NFC": 4, "NFD": 4, "NFKC": 4, "NFKD": 4, "Lowercase": 4}
KEEPING = frozenset({"ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "Split"})  # pre-tokenizers that drop nothing
BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def longest_token(content: Mapping[str, Any], pieces: Collection[str], alphabet: Collection[str]) -> int | None:
    """Return the most bytes of a text that a token of a tokenizer.json stands for; None where that has no bound.

    `pieces` are the texts of all tokens, `alphabet` the characters that stand for bytes in byte-level vocabularies. The
    result may be too large, and is never too small.
    """
    model, factor = content["model"], 1
    steps = list(_steps(content.get("normalizer"), "normalizers"))
    for step in steps:
        kind = step.get("type")
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
    if any(cut.get("type") not in KEEPING or cut.get("behavior") == "Removed" for cut in cuts):
        return None
    if any(token.get("lstrip") or token.get("rstrip") for token in content.get("added_tokens") or []):
        return None
    by_bytes = any(step.get("type") == "ByteLevel" for step in (*steps, *cuts)) and all(
        letter in pieces for letter in alphabet)
    by_fallback = bool(model.get("byte_fallback")) and all(piece in pieces for piece in BYTE_PIECES)
    if model.get("type", "BPE") not in ("BPE", "Unigram") or not (by_fallback or (by_bytes and "merges" in model)):
        return None  # an unknown token may stand for any text
    return factor * max(len(piece.encode("utf-8", "replace")) for piece in pieces)


def _steps(part: Any, name: str) -> Iterator[Mapping[str, Any]]:
    if isinstance(part, Mapping):
        if part.get("type") == "Sequence":
            for inner in part.get(name) or ():
                yield from _steps(inner, name)
        else:
            yield part
