"""Byte-level BPE as a tokenizer.json, which a vocabulary becomes to be read by the tokenizers library."""

from __future__ import annotations

from typing import Any

from tc_gguf.pre_tokenizers import BYTES, as_tokenizer_json, pre_tokenizer
from tc_gguf.vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The content of a tokenizer.json.

    Text is not normalised, as in llama.cpp, even where the model's own tokenizer.json asks for NFC.
    """
    kind = pre_tokenizer(vocabulary.pre)
    ids = {text: token for token, text in enumerate(vocabulary.tokens)}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [_added(token, text, type_, token in vocabulary.strips_right)
                         for token, (text, type_) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
                         if type_ in (CONTROL, UNKNOWN, USER_DEFINED)],
        "normalizer": None,
        "pre_tokenizer": as_tokenizer_json(kind.expressions),
        "post_processor": _post_processor(vocabulary),
        "decoder": BYTES,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": kind.ignore_merges, "vocab": ids, "merges": list(vocabulary.merges)},
    }


def _added(token: int, text: str, kind: int, strips_right: bool) -> dict[str, Any]:
    return {"id": token, "content": text, "single_word": False, "lstrip": False, "rstrip": strips_right,
            "normalized": False, "special": kind != USER_DEFINED}


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """What puts BOS before a text and EOS behind it, where the vocabulary says so."""
    bos = vocabulary.name(vocabulary.bos_id) if vocabulary.adds_bos else None
    eos = vocabulary.name(vocabulary.eos_id) if vocabulary.adds_eos else None
    if bos is None and eos is None:
        return None
    special = {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in (
        (bos, vocabulary.bos_id), (eos, vocabulary.eos_id)) if name is not None}

    def around(text: str, number: int) -> list[dict[str, Any]]:
        parts = [("SpecialToken", bos), ("Sequence", text), ("SpecialToken", eos)]
        return [{kind: {"id": name, "type_id": number}} for kind, name in parts if name is not None]

    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": around("A", 0) + around("B", 1),
            "special_tokens": special}
