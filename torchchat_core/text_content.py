"""The text side of a model as an exported file holds it, and back: by the readers that read a model's own files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchchat_core.chat_template import ChatTemplate
from torchchat_core.errors import TorchchatError
from torchchat_core.plugins import Registry
from torchchat_core.small_files import read_file, read_json
from torchchat_core.specs import ModelFiles, ModelRef, TextContent
from torchchat_core.text_format import TextFormat, read_text_format
from torchchat_core.tokenizers.declared import ADDED, NAMES, SETTINGS, with_control_tokens
from torchchat_core.tokenizers.loading import choose_tokenizer, read_tokenizer


def text_content(files: ModelFiles, registry: Registry, config_vocab_size: int) -> TextContent:
    """All of the text side of a model in files. Raises `TorchchatError` as `read_text_format` does."""
    text_format = read_text_format(files, registry, config_vocab_size)
    tokenizer, template = text_format.tokenizer, text_format.template
    found = _tokenizer_files(files, registry)
    with _on_disk(found) as there:
        info, reader, path = choose_tokenizer(there, registry)
        kind = info.name
        if hasattr(reader, "standalone"):  # readers without Python know none of the small files
            settings = read_json(there.tokenizer_config) if there.tokenizer_config else {}
            found = dict(reader.standalone(path, with_control_tokens(settings, text_format.unnamed_control)))
    return TextContent(
        tokenizer=found, tokenizer_kind=kind, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
        adds_bos=tokenizer.adds_bos, end_ids=tuple(sorted(text_format.end_ids)),
        chat_template=template.source if template else None, tool_template=template.tool_source if template else None,
        bos_token=template.bos_token if template else None, eos_token=template.eos_token if template else None,
        sampling=dict(text_format.defaults))


def text_format_of(content: TextContent, registry: Registry) -> TextFormat:
    """What `text_content` was made of. Raises `TorchchatError` where the tokenizer's files are damaged, or no
    installed reader knows them."""
    with _on_disk(dict(content.tokenizer)) as files:
        tokenizer = read_tokenizer(files, registry)
    template = None
    if content.chat_template is not None:
        template = ChatTemplate(content.chat_template, bos_token=content.bos_token, eos_token=content.eos_token,
                                tool_source=content.tool_template)
    return TextFormat(tokenizer, template, frozenset(content.end_ids), dict(content.sampling))


def _tokenizer_files(files: ModelFiles, registry: Registry) -> dict[str, bytes]:
    """Return the tokenizer's own file, or the one that its reader extracts from another format, and the small files."""
    _, reader, path = choose_tokenizer(files, registry)
    if hasattr(reader, "extract"):
        return dict(reader.extract(path))
    found = {name: read_file(path.parent / name) for name in (NAMES, ADDED) if (path.parent / name).is_file()}
    found[path.name] = read_file(path)
    return {**found, SETTINGS: read_file(files.tokenizer_config)} if files.tokenizer_config else found


@contextmanager
def _on_disk(found: dict[str, bytes]) -> Iterator[ModelFiles]:
    """The files of a tokenizer in a folder of their own: readers take paths."""
    with tempfile.TemporaryDirectory(prefix="torchchat-") as name:
        folder = Path(name)
        try:
            for file, data in found.items():
                (folder / file).write_bytes(data)
        except OSError as error:
            raise TorchchatError(f"the tokenizer cannot be put into {name}: {error.strerror or error}",
                                 "make room there, or set TMPDIR") from error
        settings = folder / SETTINGS
        yield ModelFiles(ref=ModelRef(text="the exported file", scheme="file", location=name), format="artifact",
                         root=folder, weights=(), tokenizer=tuple(folder / file for file in found
                                         if file not in (SETTINGS, NAMES, ADDED)),
                         tokenizer_config=settings if settings.is_file() else None)
