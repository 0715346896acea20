"""The vocabulary of a model that is exported, from whichever files it has its tokenizer in."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from tc_gguf.file import read_gguf
from tc_gguf.reader import GgufTokenizerReader, tokenizer_of
from tc_gguf.sentencepiece_model import vocabulary_of_model_file
from tc_gguf.tokenizer_json import is_byte_level, vocabulary_of_ranks, vocabulary_of_tokenizer_json
from tc_gguf.vocabulary import CONTROL, SENTENCEPIECE, UNUSED, USER_DEFINED, Vocabulary, read_vocabulary
from torchchat_core.chat_template import TURN_ENDS, ChatTemplate, end_tokens, find_chat_template
from torchchat_core.control_tokens import unnamed_control_tokens
from torchchat_core.conversation import render
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.small_files import read_file, read_json
from torchchat_core.specs import ModelFiles, Tokenizer
from torchchat_core.text_format import TextFormat
from torchchat_core.tokenizers.base import UNKNOWN as UNKNOWN_BYTES
from torchchat_core.tokenizers.declared import SETTINGS, merged_settings, with_control_tokens
from torchchat_core.tokenizers.hugging_face import HuggingFaceReader
from torchchat_core.tokenizers.sentencepiece_file import SentencePieceReader
from torchchat_core.tokenizers.tiktoken_file import TiktokenReader
from torchchat_core.tokenizers.whole_json import whole_content

log = logging.getLogger(__name__)

MESSAGE_END = "<|eom_id|>"
# What a vocabulary has to encode as the model's own tokenizer does before it is written.
SAMPLES = (
    "Hello, world!", " two  spaces ", "it's 3.14159, 1000000 and 42", "x = [1, 2]\n    return x\n\n\t# done",
    "na\u00efve caf\u00e9 \u00dcber", "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627", "\N{GRINNING FACE}",
    "camelCase HTTPServer don't I'LL",
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine.",
)
FIX = "use the converter of llama.cpp"


def vocabulary_of_model(files: ModelFiles, size: int) -> Vocabulary:
    """The vocabulary of the model's tokenizer, with `size` tokens, and its chat template.

    Raises `TorchchatError` where the model has no tokenizer, where GGUF has no words for it, or where it would encode
    texts differently there. Logs a warning if only conversations are tokenized differently.
    """
    own_settings = read_json(files.tokenizer_config) if files.tokenizer_config else {}
    settings = merged_settings(files.root / SETTINGS, own_settings)
    vocabulary, tokenizer, path = _read(files, settings)
    template = find_chat_template(files, settings, tokenizer)
    ends = _end_ids(files, tokenizer, template)
    if unnamed := unnamed_control_tokens(tokenizer, template, ends):
        vocabulary, tokenizer, path = _read(files, with_control_tokens(settings, unnamed))
    vocabulary = _of_size(_as_tokenizer_has_it(vocabulary, tokenizer), size, path)
    _check(vocabulary, tokenizer, path, template)
    templates = vocabulary.templates or ({} if template is None else _by_name(template))
    return dataclasses.replace(vocabulary, templates=templates, **_turn_ends(vocabulary, ends, tokenizer))


def _read(files: ModelFiles, settings: Mapping[str, Any]) -> tuple[Vocabulary, Tokenizer, Path]:
    """The vocabulary, and the tokenizer that torchchat itself reads, which decides.

    Where SentencePiece's file is beside a tokenizer.json that was made of it, the vocabulary is from that: its scores
    say more than the merges.
    """
    readers: list[Any] = [GgufTokenizerReader(), HuggingFaceReader(), SentencePieceReader(), TiktokenReader()]
    of_kind = {type(reader): path for reader in readers for path in sorted(files.tokenizer, reverse=True)
               if (path.name == "tokenizer.json") == isinstance(reader, HuggingFaceReader) and reader.accepts(path)}
    chosen = next(((reader, of_kind[type(reader)]) for reader in readers if type(reader) in of_kind), None)
    if chosen is None:
        raise TorchchatError(f"the model {quoted(files.ref.text)} has no tokenizer that can be written to a GGUF file",
                             "pass the file with --tokenizer-path")
    reader, path = chosen
    tokenizer = reader.read(path, settings)
    if isinstance(reader, GgufTokenizerReader):
        return read_vocabulary(read_gguf(path)), tokenizer, path
    if isinstance(reader, TiktokenReader):
        return vocabulary_of_ranks(tokenizer), tokenizer, path
    content = whole_content(path, settings)[0] if isinstance(reader, HuggingFaceReader) else None
    pieces = of_kind.get(SentencePieceReader)
    if pieces is not None and (content is None or not is_byte_level(content)):
        return vocabulary_of_model_file(read_file(pieces), str(pieces)), tokenizer, path
    return vocabulary_of_tokenizer_json(content or {}, str(path)), tokenizer, path


def _as_tokenizer_has_it(vocabulary: Vocabulary, tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary with the tokens that were added to it, and with what the tokenizer takes for control tokens."""
    tokens, types, scores = list(vocabulary.tokens), list(vocabulary.types), list(vocabulary.scores)
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    for token in range(len(tokens), tokenizer.vocab_size):
        text = names.get(token) or tokenizer.token_bytes(token).decode()
        gap = token not in names and text.encode() == UNKNOWN_BYTES
        tokens.append(f"[UNUSED_{token}]" if gap else text)
        types.append(UNUSED if gap else USER_DEFINED)
    for token in names:
        types[token] = CONTROL
    if vocabulary.kind == SENTENCEPIECE:
        scores += [0.0] * (len(tokens) - len(scores))
    return dataclasses.replace(
        vocabulary, tokens=tokens, types=types, scores=scores, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
        adds_bos=tokenizer.adds_bos, adds_space=vocabulary.kind == SENTENCEPIECE and tokenizer.adds_prefix_space)


def _of_size(vocabulary: Vocabulary, size: int, path: Path) -> Vocabulary:
    """As many tokens as the model has rows: those that it has no row for are left out, where no text needs them."""
    beyond = next((token for token in range(size, len(vocabulary.tokens))
                   if vocabulary.types[token] not in (CONTROL, UNUSED)), None)
    if beyond is not None:
        raise TorchchatError(f"the tokenizer {path.name} has {len(vocabulary.tokens)} tokens, the model only {size}",
                             "the tokenizer is another model's; pass the right one with --tokenizer-path")
    more = range(len(vocabulary.tokens), size)
    named = ("bos_id", "eos_id", "unknown_id", "padding_id", "eot_id", "eom_id")
    kept: dict[str, Any] = {name: None for name in named if (getattr(vocabulary, name) or 0) >= size}
    scores = [*vocabulary.scores, *(0.0 for _ in more)] if vocabulary.kind == SENTENCEPIECE else []
    return dataclasses.replace(vocabulary, tokens=[*vocabulary.tokens, *(f"[PAD{token}]" for token in more)][:size],
                               types=[*vocabulary.types, *(UNUSED for _ in more)][:size], scores=scores[:size], **kept)


def _check(vocabulary: Vocabulary, tokenizer: Tokenizer, path: Path, template: ChatTemplate | None) -> None:
    """Raise `TorchchatError` if the vocabulary does not encode samples as the model's own tokenizer does.

    Logs a warning if it encodes a conversation differently, as readers of GGUF files put a space after control tokens.
    """
    written = tokenizer_of(vocabulary, str(path))
    for text in SAMPLES:
        if written.encode(text) != tokenizer.encode(text):
            raise TorchchatError(f"the tokenizer {path.name} cannot be written to a GGUF file: {quoted(text)} would "
                                 f"become {written.encode(text)!s:.60} instead of {tokenizer.encode(text)!s:.60}", FIX)
    if template is None:
        return
    here, there = (_conversation(each, template) for each in (tokenizer, written))
    if here != there:
        log.warning("conversations have other tokens with the GGUF file than with the model's own files (%d instead of "
                    "%d for a short one): readers of GGUF files put a space after each control token, and %s does not",
                    len(there), len(here), path.name)


def _conversation(tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """Return the tokens of a short conversation; an empty list if the template rejects it."""
    turns = (("user", "Hi"), ("assistant", "Hello"), ("user", "?"))
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        text, encode = render(TextFormat(tokenizer, template, frozenset(), {}), messages)
    except TorchchatError:
        return []
    return encode(text)


def _by_name(template: ChatTemplate) -> Mapping[str, str]:
    more = {} if template.tool_source is None else {"tool_use": template.tool_source}
    return {"default": template.source, **more}


def _end_ids(files: ModelFiles, tokenizer: Tokenizer, template: ChatTemplate | None) -> set[int]:
    """Return the tokens that end an answer, besides BOS and EOS."""
    found = set(tokenizer.end_ids) | (set(end_tokens(template, tokenizer)) if template is not None else set())
    for path in (files.config, files.generation_config):
        declared = read_json(path).get("eos_token_id") if path is not None and path.suffix == ".json" else None
        found |= {token for token in (declared if isinstance(declared, list) else [declared])
                  if isinstance(token, int) and not isinstance(token, bool)}
    return found


def _turn_ends(vocabulary: Vocabulary, ends: Set[int], tokenizer: Tokenizer) -> Mapping[str, Any]:
    """Return the tokens besides EOS that end a turn and a message: a GGUF file names one of each."""
    names = {vocabulary.tokens[token]: token for token in sorted(ends - {tokenizer.eos_id, tokenizer.bos_id})
             if 0 <= token < len(vocabulary.tokens)}
    eom = names.pop(MESSAGE_END, None)
    in_order = [name for name in TURN_ENDS if name in names] or list(names)
    return {"eot_id": names[in_order[0]] if in_order else None, "eom_id": eom}
