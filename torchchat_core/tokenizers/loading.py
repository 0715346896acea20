"""Which tokenizer a model's files hold."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torchchat_core.errors import TorchchatError, quoted_path
from torchchat_core.plugins import Registry
from torchchat_core.small_files import read_file, read_json
from torchchat_core.specs import ModelFiles, Tokenizer, TokenizerInfo
from torchchat_core.tokenizers.declared import with_control_tokens


def read_tokenizer(files: ModelFiles, registry: Registry, control_tokens: Mapping[str, int] | None = None) -> Tokenizer:
    """The tokenizer of a model, read by the installed reader of lowest `order` that accepts one of its files.

    `control_tokens` (text -> id) become control tokens even if the files do not say so. Raises `TorchchatError` if the
    model has no tokenizer file that a reader supports, or if the file is damaged.
    """
    info, reader, path = choose_tokenizer(files, registry)
    settings = read_json(files.tokenizer_config) if files.tokenizer_config else {}
    return _read(reader, info, path, with_control_tokens(settings, control_tokens or {}))


def choose_tokenizer(files: ModelFiles, registry: Registry) -> tuple[TokenizerInfo, Any, Path]:
    """The reader of lowest `order` that accepts one of the model's files, and that file. Raises as `read_tokenizer`."""
    infos = sorted(registry.infos(TokenizerInfo), key=lambda info: (info.order, info.name))
    matched: list[Path] = []
    for info in infos:
        reader = None
        for path in sorted(files.tokenizer):
            if any(fnmatch(path.name, pattern) for pattern in info.files):
                reader = reader or info.make()
                matched.append(path)
                if _accepts(reader, path):
                    return info, reader, path
    for path in matched:
        read_file(path)  # says what is wrong with a file that is missing, empty or a pointer
    raise _none_found(files, infos, matched)


def _accepts(reader: Any, path: Path) -> bool:
    try:
        return bool(reader.accepts(path))
    except OSError as error:
        raise TorchchatError(f"{path} cannot be read: {error.strerror or error}") from error


def _read(reader: Any, info: TokenizerInfo, path: Path, settings: dict[str, Any]) -> Tokenizer:
    try:
        tokenizer: Tokenizer = reader.read(path, settings)
    except TorchchatError:
        raise
    except Exception as error:
        raise TorchchatError(f"{path} cannot be read as a {info.name} tokenizer: {type(error).__name__}: {error}",
                             "the file is damaged: download or copy the model again") from error
    return tokenizer


def _none_found(files: ModelFiles, infos: list[TokenizerInfo], matched: list[Path]) -> TorchchatError:
    patterns = ", ".join(dict.fromkeys(pattern for info in infos for pattern in info.files)) or "none"
    fix = "pass the file with --tokenizer-path"
    if matched:
        names = ", ".join(dict.fromkeys(str(path) for path in matched))
        readers = ", ".join(info.name for info in infos)
        return TorchchatError(f"{names} is damaged, or of no kind that an installed reader knows ({readers})", fix)
    named = [path for path in files.tokenizer if path not in files.weights]
    if named:
        return TorchchatError(f"{', '.join(map(str, named))} has no name that an installed tokenizer reader knows; "
                              f"known are {patterns}", "give the model's tokenizer.json or tokenizer.model with "
                                                       "--tokenizer-path")
    return TorchchatError(f"the model {quoted_path(files.ref.text)} has no tokenizer; looked for {patterns} in "
                          f"{files.root}", fix)
