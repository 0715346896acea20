"""Read the tokens declared in tokenizer_config.json, special_tokens_map.json and added_tokens.json."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.small_files import read_json

SETTINGS, NAMES, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TOKEN_ID = re.compile(r"[0-9]{1,9}")
SURROGATE = re.compile("[\ud800-\udfff]")
LARGEST_ID = 10_000_000  # real vocabularies have at most 300 thousand tokens
MAX_TOKENS = 100_000  # per file; real files declare a few thousand
LONGEST_TOKEN = 1000  # characters
# In the order in which `transformers` adds tokens that the vocabulary lacks.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
FIX = "fix the file, or download the model again"


@dataclass(frozen=True)
class Declared:
    """A declaration of a token. `flags` has those of `FLAGS` that the file states."""

    content: str
    special: bool  # a control token
    token: int | None = None  # its id, if the file states one
    flags: Mapping[str, bool] = field(default_factory=dict)
    by_name_alone: bool = False  # declared only under a name such as "eos_token", not in a list


def token_name(settings: Mapping[str, Any], key: str) -> str | None:
    """Return the token text under `key` ("bos_token", ...), which is a string or an object with "content"; else None.
    """
    value = settings.get(key)
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def merged_settings(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` (tokenizer_config.json) merged with a special_tokens_map.json in the folder of `path`.

    As in `transformers`, a name in that file replaces one in `settings`, unless `settings` has added_tokens_decoder.
    Lists are joined. Raises `TorchchatError` if one of the two files is malformed.
    """
    _check_names(settings, SETTINGS)
    file = path.parent / NAMES
    if not file.is_file():
        return dict(settings)
    declared = read_json(file)
    _check_names(declared, str(file))
    replaces = "added_tokens_decoder" not in settings
    merged = dict(settings)
    for key, value in declared.items():
        if key in LISTS:
            listed = [*_entries(settings.get(key)), *_entries(value)]
            merged[key] = list({_text(entry): entry for entry in reversed(listed)}.values())[::-1]
        elif _is_name(key, value) and value and (replaces or not merged.get(key)):
            merged[key] = value
    return merged


def added_tokens(settings: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Return id -> (text, is control token) from added_tokens_decoder in tokenizer_config.json.

    Raises `TorchchatError` if an entry is malformed.
    """
    return {token: (entry["content"], bool(entry.get("special", False))) for token, entry in _decoder(settings).items()}


def legacy_added_tokens(path: Path) -> dict[int, str]:
    """Return id -> text from an added_tokens.json in the folder of `path`, which older models have.

    Raises `TorchchatError` if it is malformed.
    """
    file = path.parent / ADDED
    if not file.is_file():
        return {}
    found: dict[int, str] = {}
    content = read_json(file)
    _check_count(content, ADDED, str(file))
    for text, token in content.items():
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < LARGEST_ID:
            raise TorchchatError(f"{file} has {quoted(text)}: {quoted(token)}; it maps texts to token ids", FIX)
        _check_text(text, ADDED, str(file))
        if token in found:
            raise TorchchatError(f"{file} gives the id {token} to {quoted(found[token])} and to {quoted(text)}", FIX)
        found[token] = text
    return found


def declared_tokens(settings: Mapping[str, Any]) -> list[Declared]:
    """Return the tokens declared in `settings`, in the order in which `transformers` adds missing tokens.

    A token in added_tokens_decoder is a control token if its entry says so; tokens with a name ("eos_token") and tokens
    in lists always are. Raises `TorchchatError` if the settings are malformed.
    """
    _check_names(settings, SETTINGS)
    found = [Declared(entry["content"], bool(entry.get("special", False)), token, _flags(entry))
             for token, entry in sorted(_decoder(settings).items())]
    others = [key for key in settings if key not in NAMED]
    named = [(settings[key], True) for key in (*NAMED, *others)
             if settings.get(key) is not None and _is_name(key, settings[key])]
    listed = [(entry, False) for key in LISTS for entry in _entries(settings.get(key))]
    for value, by_name in (*named, *listed):
        if content := _text(value):
            found.append(Declared(content, True, None, _flags(value) if isinstance(value, Mapping) else {}, by_name))
    return found


def with_control_tokens(settings: Mapping[str, Any], tokens: Mapping[str, int]) -> dict[str, Any]:
    """Return `settings` with `tokens` (text -> id) added to added_tokens_decoder as control tokens."""
    if not tokens:
        return dict(settings)
    decoder = {str(token): entry for token, entry in _decoder(settings).items()}
    for content, token in tokens.items():
        decoder[str(token)] = {**decoder.get(str(token), {}), "content": content, "special": True}
    return {**settings, "added_tokens_decoder": decoder}


def _decoder(settings: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Return the entries of added_tokens_decoder by id, each checked."""
    declared = settings.get("added_tokens_decoder") or {}
    if not isinstance(declared, Mapping):
        raise TorchchatError(f"added_tokens_decoder in {SETTINGS} is {quoted(declared)}; expected an object", FIX)
    _check_count(declared, "added_tokens_decoder", SETTINGS)
    found = {}
    for key, value in declared.items():
        content = value.get("content") if isinstance(value, Mapping) else None
        if not TOKEN_ID.fullmatch(str(key)) or int(key) >= LARGEST_ID or not isinstance(content, str):
            raise TorchchatError(f"added_tokens_decoder in {SETTINGS} has {quoted(key)}: {quoted(value)}; it maps "
                                 "token ids to objects with \"content\"", FIX)
        _check_text(content, "added_tokens_decoder", SETTINGS)
        found[int(key)] = value
    return found


def _is_name(key: str, value: object) -> bool:
    """Return True for a field that names one token. Models can define their own names ("image_token")."""
    return key in NAMED or (key.endswith("_token") and isinstance(value, str | Mapping))


def _text(value: Any) -> Any:
    return value["content"] if isinstance(value, Mapping) else value


def _entries(value: Any) -> Iterator[Any]:
    """Return the tokens of one of `LISTS`, which may be an object that maps names to tokens."""
    return iter(value.values() if isinstance(value, Mapping) else value or ())


def _flags(entry: Mapping[str, Any]) -> dict[str, bool]:
    return {name: bool(entry[name]) for name in FLAGS if name in entry}


def _check_names(declared: Mapping[str, Any], place: str) -> None:
    """Raise `TorchchatError` if a name or a list in `declared` has values that are not tokens."""
    for key, value in declared.items():
        if key in LISTS:
            if value is not None and not isinstance(value, list | Mapping):
                raise TorchchatError(f"{key} in {place} is {quoted(value)}; expected a list of tokens", FIX)
            _check_count(value or (), key, place)
            for entry in _entries(value):
                _check_token(entry, key, place)
        elif _is_name(key, value) and value is not None:
            _check_token(value, key, place)


def _check_token(value: object, key: str, place: str) -> None:
    content = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(content, str):
        raise TorchchatError(f"{key} in {place} is {quoted(value)}; expected a token's text, or an object with "
                             "\"content\"", FIX)
    _check_text(content, key, place)


def _check_text(content: str, key: str, place: str) -> None:
    if len(content) > LONGEST_TOKEN:
        raise TorchchatError(f"{key} in {place} has a token of {len(content)} characters; {LONGEST_TOKEN} is the "
                             "maximum", FIX)
    if SURROGATE.search(content):
        raise TorchchatError(f"{key} in {place} has the token {quoted(content)}, which is not Unicode text", FIX)


def _check_count(entries: Any, key: str, place: str) -> None:
    if len(entries) > MAX_TOKENS:
        raise TorchchatError(f"{key} in {place} has {len(entries)} tokens; {MAX_TOKENS} is the maximum", FIX)
