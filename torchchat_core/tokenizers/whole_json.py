"""Merge tokenizer.json with the small files next to it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.small_files import read_json
from torchchat_core.tokenizers.declared import (
    ADDED,
    FIX,
    SETTINGS,
    Declared,
    declared_tokens,
    legacy_added_tokens,
    merged_settings,
    token_name,
)
from torchchat_core.tokenizers.faults import captured_panics
from torchchat_core.tokenizers.library import Library

TOKEN_NAMES = ("bos_token", "eos_token")


def whole_content(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of tokenizer.json with every token that the small files declare, and the merged settings.

    Raises `TorchchatError` if one of the files is damaged.
    """
    content, merged = read_json(path), merged_settings(path, settings)
    return with_declared_tokens(content, merged, legacy_added_tokens(path), path)


def with_declared_tokens(content: dict[str, Any], settings: dict[str, Any], legacy: Mapping[int, str], path: Path
                         ) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `content` (tokenizer.json) with the tokens of `settings` and `legacy` in "added_tokens", and the settings.

    They are added as in `transformers`: a token that the vocabulary lacks gets the next id. There are three
    differences: a token is special if any file says so; a token with only a name ("pad_token") stays ordinary if
    ordinary text encodes to it; and a name is dropped if no vocabulary or list has its token. Raises `TorchchatError`
    if a file states another id than the vocabulary.
    """
    listed, model = content.get("added_tokens") or [], content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list) or not isinstance(listed, list) \
            or not all(isinstance(entry, dict) and isinstance(entry.get("content"), str) for entry in listed):
        return content, settings  # damaged; the reader reports it
    table = _AddedTable(content, path)
    declared = declared_tokens(settings)
    special = {each.content for each in declared if each.special}
    for token, text in sorted(legacy.items()):
        if text and text not in table.entries:
            table.add(Declared(text, text in special, token, {"normalized": text not in special}), ADDED)
    for each in declared:
        if each.content:
            table.add(each, SETTINGS)
    names = {key: None for key in TOKEN_NAMES if token_name(settings, key) in table.without_row}
    while table.entries and next(reversed(table.entries)) in table.without_row:
        table.entries.popitem()  # only needed if later tokens follow it
    return {**content, "added_tokens": list(table.entries.values())}, {**settings, **names}


class _AddedTable:
    """The list "added_tokens" of a tokenizer.json, to which tokens are added."""

    def __init__(self, content: dict[str, Any], path: Path) -> None:
        self._content, self._path = content, path
        self.entries = {entry["content"]: dict(entry) for entry in content.get("added_tokens") or ()}
        self.without_row: set[str] = set()  # new tokens that have only a name
        self._named: set[str] = set()  # new tokens without a stated id; a later declaration replaces their flags

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        """The model's vocabulary, text -> id."""
        vocab = self._content["model"]["vocab"]
        if isinstance(vocab, dict):
            return vocab
        return {entry[0]: token for token, entry in enumerate(vocab) if isinstance(entry, list) and entry}

    @functools.cached_property
    def _library(self) -> Library:
        with captured_panics():
            return Library(self._content, str(self._path))

    def add(self, declared: Declared, file: str) -> None:
        """Add a token, or update its entry with the declaration in `file`. Raises `TorchchatError` for another id."""
        entry = self.entries.get(declared.content)
        if entry is None:
            token = self._ids.get(declared.content)
            if declared.by_name_alone and token is not None and self._is_ordinary(declared.content, token):
                return
            if declared.by_name_alone and token is None:
                self.without_row.add(declared.content)
            token = self._next_id if token is None else token
            self._next_id = max(self._next_id, token + 1)
            if declared.token not in (None, token):
                raise TorchchatError(f"{file} next to {self._path} gives the token {quoted(declared.content)} the id "
                                     f"{declared.token}; {self._path.name} gives it {token}", FIX)
            entry = {"id": token, "content": declared.content, **self._flags(declared)}
            self.entries[declared.content] = entry
            if declared.token is None:
                self._named.add(declared.content)
        elif declared.token is not None:
            entry.update(declared.flags)
        elif declared.content in self._named:
            entry.update(self._flags(declared))
        if not declared.by_name_alone:
            self.without_row.discard(declared.content)
        entry["special"] = bool(entry.get("special")) or declared.special

    @staticmethod
    def _flags(declared: Declared) -> dict[str, bool]:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not declared.special}
        return {**flags, **declared.flags}

    @functools.cached_property
    def _next_id(self) -> int:
        taken = [entry["id"] for entry in self.entries.values() if isinstance(entry.get("id"), int)]
        return int(max([len(self._ids) - 1, *taken])) + 1

    def _is_ordinary(self, text: str, token: int) -> bool:
        """Return True if ordinary text encodes to the token, so that making it special would hide it in answers."""
        return self._library.encode(text, special=False) == [token]
