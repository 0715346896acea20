"""What the word that a user typed for a model means."""

from __future__ import annotations

import re
from pathlib import Path

from torchchat_core.errors import TorchchatError, did_you_mean, quoted, quoted_path
from torchchat_core.plugins import Registry
from torchchat_core.small_files import expanded
from torchchat_core.sources.hub_reference import parse_hub_url
from torchchat_core.specs import ModelRef, ModelSourceInfo

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?(:.+)?")
MODEL_SUFFIXES = {".gguf", ".safetensors", ".pt", ".pth", ".bin", ".pt2", ".so", ".pte", ".json"}


def resolve(text: str, registry: Registry) -> ModelRef:
    """The reference that `text` stands for: a path that exists, an alias, `scheme:rest`, a URL, or
    owner/name, with @revision and :file where they are meant.

    Raises `TorchchatError` for a path that does not exist, an unknown name (with near matches), or a scheme that
    no installed source fetches.
    """
    sources = registry.infos(ModelSourceInfo)
    schemes = {scheme for source in sources for scheme in source.schemes}
    aliases = {alias for source in sources for alias in source.aliases}
    if not text.strip():
        raise TorchchatError("the name of the model is empty", "torchchat list shows the names")
    path = expanded(text)
    if _exists(path):
        return ModelRef(text=text, scheme="file", location=str(path))
    owner = registry.claim("aliases", text)
    if owner is not None:
        target = owner.aliases[text]
        if target in aliases:
            raise TorchchatError(f"the name {quoted_path(text)} stands for another name, {quoted(target)}",
                                 f"the model source {quoted(owner.name)} has to give a full reference")
        meant = resolve(target, registry)
        return ModelRef(text=text, scheme=meant.scheme, location=meant.location)
    scheme, colon, rest = text.partition(":")
    on_hub = parse_hub_url(text) if scheme in ("https", "http") and "hf" in schemes else None
    if on_hub is not None:
        return ModelRef(text=text, scheme="hf", location=on_hub.location)
    if colon and scheme in schemes:
        return ModelRef(text=text, scheme=scheme, location=rest)
    if "://" in text and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        raise TorchchatError(f"no installed source fetches {quoted(scheme)} references such as {quoted_path(text)}; "
                             f"known URL schemes are {', '.join(sorted(schemes))}",
                             "give an https:// address, or download the file and give its path")
    is_file_on_hub = ":" in text and REPOSITORY.fullmatch(text) is not None
    if text.startswith((".", "/", "~")) or (path.suffix in MODEL_SUFFIXES and not is_file_on_hub):
        raise missing_file(path)
    if REPOSITORY.fullmatch(text):
        if "hf" in schemes:
            return ModelRef(text=text, scheme="hf", location=text)
        raise TorchchatError(f"there is no folder {quoted_path(text)}, and no installed source fetches models of a hub")
    if colon and re.fullmatch(r"[a-z][a-z0-9+]*", scheme):
        raise TorchchatError(f"no installed source fetches {quoted(scheme)} references such as {quoted_path(text)}",
                             f"sources here fetch: {', '.join(sorted(schemes))}")
    raise TorchchatError(f"there is no model {quoted_path(text)}", did_you_mean(text, [*aliases, *_neighbours(path)])
                         or "give a folder, a file, owner/name of a hub, or a name that torchchat list shows")


def missing_file(path: Path) -> TorchchatError:
    """The error for a file or folder that cannot be used, with what looks like it in the same folder."""
    if path.is_symlink() and not _exists(path):
        return TorchchatError(f"{quoted_path(str(path))} is a link to {quoted_path(str(path.readlink()))}, which does "
                              "not exist")
    if _exists(path):
        return TorchchatError(f"{quoted_path(str(path))} is neither a folder nor an ordinary file" if not path.is_dir()
                              else f"{quoted_path(str(path))} is a folder; a file is needed")
    if path.parent != path and not _exists(path.parent):
        return TorchchatError(f"there is no file or folder {quoted_path(str(path))}: {quoted_path(str(path.parent))} "
                              "does not exist")
    return TorchchatError(f"there is no file or folder {quoted_path(str(path))}",
                          did_you_mean(path.name, (Path(name).name for name in _neighbours(path))))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError as error:
        raise TorchchatError(f"{quoted_path(str(path))} cannot be looked at: {error.strerror}") from None
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False


def _neighbours(path: Path) -> list[str]:
    """Names beside `path`, as the user would have to type them."""
    try:
        return [str(path.parent / entry.name) for entry in path.parent.iterdir()
                if not entry.name.startswith(".") and entry.name != path.name]
    except (OSError, ValueError):
        return []
