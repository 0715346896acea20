"""The reader of the tokenizers in GGUF files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tc_gguf.byte_level import tokenizer_json
from tc_gguf.file import GgufFile, read_gguf
from tc_gguf.sentencepiece_model import model_file
from tc_gguf.vocabulary import CONTROL, SENTENCEPIECE, UNUSED, USER_DEFINED, Vocabulary, has_vocabulary, read_vocabulary
from torchchat_core.specs import Tokenizer
from torchchat_core.tokenizers.base import ByteTokenizer
from torchchat_core.tokenizers.declared import added_tokens
from torchchat_core.tokenizers.hugging_face import hugging_face_tokenizer
from torchchat_core.tokenizers.sentencepiece_file import sentencepiece_tokenizer


class GgufTokenizerReader:
    """A `specs.EmbeddedTokenizerReader`.

    A SentencePiece vocabulary that adds a space at the start of a text also adds one after each control and
    user-defined token, as in llama.cpp.
    """

    def __init__(self) -> None:
        self._last: GgufFile | None = None  # what `accepts` read is not read again

    def accepts(self, path: Path) -> bool:
        """Whether it is a GGUF file with a tokenizer. Raises `TorchchatError` where it is a damaged one."""
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                return False
        self._last = read_gguf(path)
        return has_vocabulary(self._last)

    def read(self, path: Path, settings: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer in the file, with its end tokens and its chat template.

        Of `settings`, only the control tokens that the file has under the same ids are used. Raises `TorchchatError`
        if the file has no tokenizer of a known kind, or a damaged one.
        """
        vocabulary = self._vocabulary(path)
        control = {token for token, (text, special) in added_tokens(settings).items()
                   if special and token < len(vocabulary.tokens) and vocabulary.tokens[token] == text}
        types = [CONTROL if token in control else kind for token, kind in enumerate(vocabulary.types)]
        return tokenizer_of(dataclasses.replace(vocabulary, types=types) if control else vocabulary, str(path))

    def extract(self, path: Path) -> Mapping[str, bytes]:
        """tokenizer.json or tokenizer.model, and tokenizer_config.json. Raises `TorchchatError` as `read` does."""
        return files_of(self._vocabulary(path), str(path))

    def _vocabulary(self, path: Path) -> Vocabulary:
        kept, self._last = self._last, None
        return read_vocabulary(kept if kept is not None and kept.path == path else read_gguf(path))


def tokenizer_of(vocabulary: Vocabulary, place: str) -> ByteTokenizer:
    """The vocabulary, made to run; `place` says in messages where it is from. Raises `TorchchatError`."""
    settings = {**_names(vocabulary), "add_bos_token": vocabulary.adds_bos}
    tokenizer: ByteTokenizer
    if vocabulary.kind == SENTENCEPIECE:
        settings |= {"legacy": True, "added_tokens_decoder": _added(vocabulary)}
        unseen = [UNUSED if kind == USER_DEFINED else kind for kind in vocabulary.types]  # they are split off before
        content = model_file(dataclasses.replace(vocabulary, types=unseen), place)
        tokenizer = sentencepiece_tokenizer(content, place, added_tokens(settings), settings)
    else:
        tokenizer = hugging_face_tokenizer(tokenizer_json(vocabulary), place, settings)
    tokenizer.end_ids = vocabulary.end_ids
    tokenizer.chat_template = _templates(vocabulary)
    return tokenizer


def _added(vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """Return the tokens that tokenizer.model alone does not describe, as added_tokens_decoder."""
    flags = {"lstrip": False, "normalized": False, "single_word": False}
    return {str(token): {"content": text, "special": kind == CONTROL, "rstrip": token in vocabulary.strips_right,
                         **flags}
            for token, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
            if kind == USER_DEFINED or token in vocabulary.strips_right}


def _templates(vocabulary: Vocabulary) -> str | list[dict[str, str]] | None:
    """The one template, or all of them by name, as tokenizer_config.json has them; None without one for all cases."""
    templates = vocabulary.templates
    if "default" not in templates or len(templates) == 1:
        return templates.get("default")
    return [{"name": name, "template": template} for name, template in templates.items()]


def files_of(vocabulary: Vocabulary, place: str) -> Mapping[str, bytes]:
    """The vocabulary as files of its own, by name. Raises `TorchchatError` as `tokenizer_of` does."""
    tokenizer_of(vocabulary, place)  # what could not be read back is not written
    settings: dict[str, Any] = {**_names(vocabulary), "add_bos_token": vocabulary.adds_bos,
                                "add_eos_token": vocabulary.adds_eos, "clean_up_tokenization_spaces": False}
    if "default" in vocabulary.templates:
        settings["chat_template"] = _templates(vocabulary)
    if vocabulary.kind == SENTENCEPIECE:
        files = {"tokenizer.model": model_file(vocabulary, place)}
        settings |= {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_prefix_space": vocabulary.adds_space}
        if added := _added(vocabulary):
            settings["added_tokens_decoder"] = added
    else:
        files = {"tokenizer.json": _json(tokenizer_json(vocabulary))}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {**files, "tokenizer_config.json": _json(settings)}


def _names(vocabulary: Vocabulary) -> dict[str, str]:
    named = {"bos_token": vocabulary.bos_id, "eos_token": vocabulary.eos_id, "unk_token": vocabulary.unknown_id,
             "pad_token": vocabulary.padding_id}
    return {key: vocabulary.tokens[token] for key, token in named.items() if token is not None}


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=1).encode()
