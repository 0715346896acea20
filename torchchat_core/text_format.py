"""Everything about a model that concerns text: tokenizer, chat template, what ends an answer, and its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchchat_core.chat_template import ChatTemplate, end_tokens, find_chat_template
from torchchat_core.control_tokens import unnamed_control_tokens
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.generation_options import SAMPLING_DEFAULTS, SamplingOptions
from torchchat_core.plugins import Registry
from torchchat_core.small_files import read_json
from torchchat_core.specs import ModelFiles, Tokenizer
from torchchat_core.tokenizers.declared import SETTINGS, merged_settings
from torchchat_core.tokenizers.loading import read_tokenizer


@dataclass(frozen=True)
class TextFormat:
    """How a model reads and writes text."""

    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: the model continues texts, and was not made for conversations
    end_ids: frozenset[int]  # each of them ends an answer
    defaults: Mapping[str, float | int]  # of SamplingOptions' fields, as the model's makers recommend
    # Text -> id of the control tokens that the model's files declare as ordinary text.
    unnamed_control: Mapping[str, int] = field(default_factory=dict)


def read_text_format(files: ModelFiles, registry: Registry, config_vocab_size: int) -> TextFormat:
    """Reads a model's tokenizer, template, generation_config.json and config.json.

    Added tokens that end answers, or that the template writes around messages, become control tokens even if the files
    declare them as ordinary text. An answer ends at every end token that any of the files names, and at BOS, with which
    a model starts another text. Raises `TorchchatError` if a file is damaged or has a value out of range, or if text
    can encode to ids that the model does not have.
    """
    tokenizer = read_tokenizer(files, registry)
    control_ids = set(tokenizer.special_tokens.values())  # a padding token that was added later does no harm
    if any(token not in control_ids for token in range(config_vocab_size, tokenizer.vocab_size)):
        raise TorchchatError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {config_vocab_size}: it "
                             "could be given tokens that it does not know",
                             "the tokenizer is another model's; pass the right one with --tokenizer-path")
    if tokenizer.adds_bos and (tokenizer.bos_id or 0) >= config_vocab_size:
        raise TorchchatError(f"the tokenizer's BOS token is {tokenizer.bos_id}, but the model has only "
                             f"{config_vocab_size} tokens", "pass the model's own tokenizer with --tokenizer-path")
    own_settings = read_json(files.tokenizer_config) if files.tokenizer_config else {}
    settings = merged_settings(files.root / SETTINGS, own_settings)
    template = find_chat_template(files, settings, tokenizer)
    end_ids = {token for token in (tokenizer.eos_id, tokenizer.bos_id) if token is not None} | tokenizer.end_ids
    if template is not None:
        end_ids |= end_tokens(template, tokenizer)
    defaults: dict[str, float | int] = {}
    for path in (files.config, files.generation_config):
        if path is None or path.suffix != ".json":
            continue
        values = read_json(path)
        end_ids |= _end_ids(path, values.get("eos_token_id"), config_vocab_size)
        if path == files.generation_config:
            greedy = values.get("do_sample") is False
            defaults = {"temperature": 0.0} if greedy else _defaults(path, values)
    end_ids = {token for token in end_ids if token < config_vocab_size}
    unnamed = unnamed_control_tokens(tokenizer, template, end_ids)
    if unnamed:
        tokenizer = read_tokenizer(files, registry, unnamed)
    return TextFormat(tokenizer, template, frozenset(end_ids), defaults, unnamed)


def _end_ids(path: Path, declared: object, vocab_size: int) -> set[int]:
    """The value of "eos_token_id": a token id, a list of them, or null."""
    if declared is None:
        return set()
    listed = declared if isinstance(declared, list) else [declared]
    for token in listed:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise TorchchatError(f"eos_token_id in {path} is {quoted(declared)}; token ids go from 0 to "
                                 f"{vocab_size - 1}",
                                 "mend the file, or download the model again")
    return set(listed)


def _defaults(path: Path, values: Mapping[str, Any]) -> dict[str, float | int]:
    defaults = {name: values[name] for name in SAMPLING_DEFAULTS if values.get(name) is not None}
    try:
        SamplingOptions(**defaults)
    except TorchchatError as error:
        raise TorchchatError(f"{error.message}, says {path}", "mend the file, or download the model again") from error
    return defaults
