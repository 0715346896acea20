"""Exported files that stand alone: a runtime's own file, and behind or in it our entries, as docs/artifacts.md says.

`write_artifact` puts them there, `open_artifact` reads them. A file is a stranger's until its manifest, its digests and
the machine that it was made for have been looked at; every such file is a program all the same, and runs as one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchchat_core import __version__
from torchchat_core.archive import DAMAGED, Archive, ArchiveWriter, pieces_of
from torchchat_core.errors import TorchchatError, quoted, quoted_path
from torchchat_core.generation_options import SAMPLING_DEFAULTS, SamplingOptions
from torchchat_core.manifest_fields import Fields, config_from_json
from torchchat_core.models.config import ModelConfig
from torchchat_core.specs import DEVICES, DTYPES, ExportRequest, ModelFiles, TextContent
from torchchat_core.unfinished import unfinished

FORMAT, FORMAT_VERSION = "torchchat", 1
FOLDER = "torchchat/"  # where our entries are, below the root folder of an archive that has one
MANIFEST, PROGRAM, TOKENIZER, WEIGHTS = "manifest.json", "program", "tokenizer/", "weights/"
MAXIMUM_MANIFEST = 16 << 20  # bytes
MAXIMUM_TOKENIZER = 256 << 20  # bytes of all its files
MAXIMUM_TOKENIZER_FILES = 16
MAXIMUM_NAMES = 1 << 17  # entries with a digest
ENDINGS = {"aoti-package": ".pt2", "aoti-dso": ".so", "executorch": ".pte"}  # that a file of each kind has
FILE_NAME = re.compile(r"[^\x00-\x1f/\\<>:\"|?*]{1,150}")
ARTIFACT = "artifact"  # the format of exported files without a known ending, as `ModelFiles` has it
MACHINES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}  # other names of the same
AGAIN = "export the model again"


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a file was made for. None: whatever there is."""

    device: str  # of DEVICES
    system: str | None = None  # a value of sys.platform
    machine: str | None = None  # "x86_64", "aarch64"
    instructions: str | None = None  # that its code needs, as `torch.backends.cpu.get_cpu_capability` calls them


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an exported file says of itself."""

    kind: str  # of the runtime: "aoti-package", "aoti-dso", "executorch"
    model: str  # what the user called it
    config: ModelConfig
    dtype: str  # of DTYPES
    max_seq_length: int  # tokens that a sequence may have
    target: Target
    recipe: Mapping[str, Any] | None = None  # that the model was quantised with, as it was written
    schemes: tuple[str, ...] = ()  # of its quantised layers
    text: TextContent | None = None  # without the tokenizer's files, which are entries
    weight_bytes: int = 0  # of all weights; those that layers share count once
    program: str | None = None  # the entry of the runtime's code; None: the first `program_bytes` of the file
    program_bytes: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)  # of the packages that made it
    digests: Mapping[str, str] = field(default_factory=dict)  # entry below "torchchat/", or "program" -> SHA-256
    runtime: Mapping[str, Any] = field(default_factory=dict)  # what only that runtime needs

    def described(self) -> str:
        """What it is, for people."""
        quantised = f", quantised ({', '.join(self.schemes)})" if self.schemes else ""
        return f"{self.model} as {self.kind} for {self.target.device} in {self.dtype}{quantised}"


def new_manifest(request: ExportRequest, kind: str, target: Target, *, versions: Mapping[str, str], weight_bytes: int,
                 runtime: Mapping[str, Any], max_seq_length: int | None = None) -> Manifest:
    """The manifest of a file that is about to be written; `write_artifact` adds the digests.

    `max_seq_length` is the runtime's own limit; None: that of the request, or the model's.
    """
    config: ModelConfig = request.module.config
    return Manifest(kind=kind, model=request.name, config=config, dtype=request.dtype, target=target,
                    max_seq_length=max_seq_length or request.max_seq_length or config.max_context,
                    recipe=request.recipe, schemes=request.schemes, text=request.text, weight_bytes=weight_bytes,
                    versions={"torchchat-core": __version__, **versions}, runtime=runtime)


# ---- writing ------------------------------------------------------------------------------------------------------


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: what is there at the end of the block takes the place of `path`.

    Where anything fails, nothing is left of it, and a file that was there before stays. Raises `TorchchatError` where
    it cannot be written.
    """
    try:
        with unfinished(path) as folder:
            partial = folder / path.name  # the same name, because runtimes look at the extension
            yield partial
            os.replace(partial, path)  # noqa: PTH105 - the exporter contract patches os.replace
    except OSError as error:
        raise TorchchatError(f"cannot write {quoted_path(str(path))}: {error.strerror or error}") from error


@dataclass(frozen=True)
class Content:
    """One entry to be written, made piece by piece so that nothing large stands in memory twice."""

    name: str  # below "torchchat/"
    size: int  # bytes
    pieces: Callable[[], Iterable[bytes | memoryview]]

    @classmethod
    def of(cls, name: str, data: bytes) -> Content:
        return cls(name, len(data), lambda: (data,))


def write_artifact(path: Path, manifest: Manifest, contents: Iterable[Content] = (), *, program: str | None = None,
                   root: str = "") -> None:
    """Adds manifest, tokenizer and `contents` to the runtime's file `path`, which becomes an artifact.

    Where the file is an archive itself, `program` is the entry that holds its code, and `root` the folder, with its
    slash, that all its entries stand in. `path` is a temporary file: see `whole_file`.
    """
    program_bytes = path.stat().st_size
    digests = {}
    if program is None:
        digests[PROGRAM] = _digest(path, 0, program_bytes)
    else:
        start, program_bytes = Archive(path).place(program)
        digests[PROGRAM] = _digest(path, start, program_bytes)
    files = {} if manifest.text is None else manifest.text.tokenizer
    texts = [Content.of(TOKENIZER + name, data) for name, data in _clean_names(files).items()]
    with ArchiveWriter(path) as archive:
        for content in (*texts, *contents):
            digests[content.name] = archive.add(root + FOLDER + content.name, content.pieces(), content.size)
        whole = manifest_to_json(manifest, digests, program, program_bytes)
        data = json.dumps(whole, ensure_ascii=False, indent=1, allow_nan=False).encode()
        archive.add(root + FOLDER + MANIFEST, (data,), len(data))


def manifest_to_json(manifest: Manifest, digests: Mapping[str, str], program: str | None, program_bytes: int
                     ) -> dict[str, Any]:
    """The content of manifest.json."""
    text = manifest.text
    return {
        "format": FORMAT, "format_version": FORMAT_VERSION, "kind": manifest.kind, "model": manifest.model,
        "dtype": manifest.dtype, "max_seq_length": manifest.max_seq_length,
        "vocab_size": manifest.config.vocab_size, "config": asdict(manifest.config),
        "recipe": manifest.recipe, "schemes": list(manifest.schemes), "weight_bytes": manifest.weight_bytes,
        "tokenizer": None if text is None else {
            "kind": text.tokenizer_kind, "files": [TOKENIZER + name for name in _clean_names(text.tokenizer)]},
        **({} if text is None else {name: getattr(text, name) for name in TEXT_FIELDS}),
        "chat_pieces": None if text is None else _chat_pieces(text),
        "target": asdict(manifest.target), "versions": dict(manifest.versions),
        "program": {"entry": program, "bytes": program_bytes}, "digests": dict(digests),
        "runtime": dict(manifest.runtime),
    }


TEXT_FIELDS = ("chat_template", "tool_template", "bos_token", "eos_token", "bos_id", "eos_id", "adds_bos", "end_ids",
               "sampling")


def _chat_pieces(text: TextContent) -> dict[str, Any] | None:
    """The template for runtimes that have no Python."""
    if text.chat_template is None:
        return None
    from torchchat_core.chat_pieces import chat_pieces
    from torchchat_core.chat_template import ChatTemplate

    return chat_pieces(ChatTemplate(text.chat_template, bos_token=text.bos_token, eos_token=text.eos_token))


def _clean_names(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """With names that a file can have everywhere."""
    return {re.sub(r"[\x00-\x1f/\\<>:\"|?*]", "_", name)[-150:]: data for name, data in files.items()}


def _digest(path: Path, start: int, size: int) -> str:
    digest = hashlib.sha256()
    for piece in pieces_of(path, start, size):
        digest.update(piece)
    return digest.hexdigest()


# ---- reading ------------------------------------------------------------------------------------------------------


class Artifact:
    """An exported file that was opened: its manifest, and where its entries lie."""

    def __init__(self, path: Path, archive: Archive, root: str, content: Mapping[str, Any]) -> None:
        self.path, self.content = path, content
        self._archive, self._root = archive, root
        self.manifest = _manifest(content, path, self)

    def place(self, name: str) -> tuple[int, int]:
        """Where an entry below "torchchat/", or "program", begins in the file, and its bytes.

        Raises `TorchchatError` where it does not lie inside the file.
        """
        if name != PROGRAM:
            return self._archive.place(self._root + FOLDER + name)
        manifest = self.manifest
        if manifest.program is not None:
            return self._archive.place(manifest.program)
        if manifest.program_bytes > self._archive.file_bytes:
            raise TorchchatError(f"the program in {self.path} is not whole", DAMAGED)
        return 0, manifest.program_bytes

    def read(self, name: str, limit: int) -> bytes:
        """The data of an entry, compared with its digest. Raises `TorchchatError` where it is not that."""
        data = self._archive.read(self._root + FOLDER + name, limit)
        if hashlib.sha256(data).hexdigest() != self.content["digests"].get(name):
            raise _changed(self.path, name)
        return data

    def check(self, names: Iterable[str] | None = None) -> None:
        """Raises `TorchchatError` where an entry is not the one that the manifest was written for; `names`: of those to
        compare, None: all."""
        def check_one(name: str) -> None:
            if _digest(self.path, *self.place(name)) != self.manifest.digests[name]:
                raise _changed(self.path, name)

        with ThreadPoolExecutor(max_workers=4) as pool:  # hashing lets other threads run
            for _ in pool.map(check_one, self.manifest.digests if names is None else names):
                pass  # raises what it raised

    def check_target(self) -> None:
        """Raises `TorchchatError` where the file was made for another kind of machine."""
        target, machine = self.manifest.target, _machine()
        wrong = [f"{wanted} and this is {found}" for wanted, found in
                 ((target.machine, machine), (target.system, sys.platform)) if wanted is not None and wanted != found]
        if wrong:
            raise TorchchatError(f"{self.path.name} was made for {wrong[0]}", f"{AGAIN} on such a machine")


def has_manifest(path: Path) -> bool:
    """Whether the file is one that `torchchat export` wrote, in whatever state it is now."""
    try:
        return _manifest_entry(Archive(path)) is not None
    except TorchchatError:
        return False


def exported_file(files: ModelFiles) -> Path | None:
    """The file, where the model has the ending of an exported one, or is one without an ending; else None.

    Checkpoints are never looked into: a program that hides behind other weights must not run.
    """
    path = files.weights[0] if len(files.weights) == 1 else None
    if path is None or not (path.suffix.lower() in ENDINGS.values() or files.format == ARTIFACT):
        return None
    return path


def open_artifact(path: Path) -> Artifact:
    """The exported file, its manifest checked; digests and target are not yet.

    Raises `TorchchatError` for a file that something else made, that is damaged, of a later format, or of a kind that
    its ending does not announce.
    """
    try:
        archive = Archive(path)
        entry = _manifest_entry(archive)
    except TorchchatError as error:
        raise TorchchatError(f"{path.name} is no file that torchchat can run: {error.message}",
                             "export the model with torchchat export, or copy the file again") from error
    if entry is None:
        raise TorchchatError(f"{path.name} has no manifest of torchchat: something else wrote it",
                             "export the model with torchchat export")
    data = archive.read(entry, MAXIMUM_MANIFEST)
    try:
        content = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise TorchchatError(f"the manifest of {path.name} is no JSON: {error}", DAMAGED) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise TorchchatError(f"the manifest of {path.name} is not torchchat's", DAMAGED)
    version = content.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise TorchchatError(f"{path.name} is of format version {quoted(version)}; this torchchat reads version "
                             f"{FORMAT_VERSION}", "use a newer torchchat, or export the model again")
    kind, suffix = content.get("kind"), path.suffix.lower()
    if suffix and isinstance(kind, str) and ENDINGS.get(kind, suffix) != suffix:  # machine code in the guise of data
        raise TorchchatError(f"{path.name} ends in {suffix}, and holds a program of the kind {quoted(kind)}, whose "
                             "files end "
                             f"in {ENDINGS[kind]}", "do not run it, unless you know who renamed it")
    return Artifact(path, archive, entry.removesuffix(FOLDER + MANIFEST), content)


def _manifest_entry(archive: Archive) -> str | None:
    """The name of the manifest's entry: "torchchat/manifest.json", below at most one folder."""
    wanted = FOLDER + MANIFEST
    return next((name for name in archive.entries if name == wanted
                 or (name.endswith("/" + wanted) and name.count("/") == wanted.count("/") + 1)), None)


def _manifest(content: Mapping[str, Any], path: Path, artifact: Artifact) -> Manifest:
    fields = Fields(content, f"the manifest of {path.name}")
    program, target = fields.inner("program"), fields.inner("target")
    config = config_from_json(fields.mapping("config"), fields.where)
    digests = {name: fields.digest(name, value) for name, value in fields.mapping("digests").items()}
    if len(digests) > MAXIMUM_NAMES or PROGRAM not in digests:
        raise TorchchatError(f"{fields.where} has {len(digests)} digests, or none of the program", DAMAGED)
    return Manifest(
        kind=fields.text("kind"), model=fields.text("model"), config=config, dtype=fields.one_of("dtype", DTYPES),
        max_seq_length=fields.number("max_seq_length", 1, config.max_context),
        target=Target(device=target.one_of("device", DEVICES), system=target.optional_text("system"),
                      machine=target.optional_text("machine"), instructions=target.optional_text("instructions")),
        recipe=fields.optional_mapping("recipe"), schemes=fields.texts("schemes"),
        text=_text(fields, artifact, config.vocab_size), weight_bytes=fields.number("weight_bytes", 0, 1 << 60),
        program=program.optional_text("entry"), program_bytes=program.number("bytes", 0, 1 << 60),
        versions={name: fields.checked_text("versions", value) for name, value in fields.mapping("versions").items()},
        digests=digests, runtime=fields.mapping("runtime"),
    )


def _text(fields: Fields, artifact: Artifact, vocab_size: int) -> TextContent | None:
    described = fields.optional_mapping("tokenizer")
    if described is None:
        return None
    tokenizer = Fields(described, f"the tokenizer in {fields.where}")
    names = tokenizer.texts("files")
    for name in names:
        base = name.removeprefix(TOKENIZER)
        if not name.startswith(TOKENIZER) or not FILE_NAME.fullmatch(base) or base.startswith("."):
            raise TorchchatError(f"{fields.where} names {quoted(name)}, which is no file of a tokenizer", DAMAGED)
    _check_tokenizer_size(names, artifact, fields.where)
    sampling = fields.mapping("sampling")
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in sampling.values()):
        raise TorchchatError(f"the sampling in {fields.where} is not of numbers", DAMAGED)
    unknown = next((name for name in sampling if name not in SAMPLING_DEFAULTS), None)
    if unknown is not None:
        raise TorchchatError(f"the sampling in {fields.where} names {quoted(unknown)}, which is no such option",
                             DAMAGED)
    try:
        SamplingOptions(**sampling)
    except (TorchchatError, OverflowError) as error:
        raise TorchchatError(f"the sampling in {fields.where} has a value out of range: {error!s:.200}",
                             DAMAGED) from None
    ids = {name: fields.optional_number(name, 0, vocab_size - 1) for name in ("bos_id", "eos_id")}
    texts = {name: fields.optional_text(name) for name in ("chat_template", "tool_template", "bos_token", "eos_token")}
    return TextContent(
        tokenizer=Entries(artifact, names), tokenizer_kind=tokenizer.text("kind"), adds_bos=fields.boolean("adds_bos"),
        end_ids=fields.numbers("end_ids", 0, vocab_size - 1), sampling=dict(sampling), **ids, **texts)  # type: ignore[arg-type]


def _check_tokenizer_size(names: Sequence[str], artifact: Artifact, where: str) -> None:
    """Raises `TorchchatError` for more files, or more bytes of them, than a tokenizer has."""
    if len(names) > MAXIMUM_TOKENIZER_FILES or len(set(names)) < len(names):
        raise TorchchatError(f"{where} names {len(names)} files of the tokenizer; {MAXIMUM_TOKENIZER_FILES} different "
                             "ones are the most", DAMAGED)
    size = sum(artifact.place(name)[1] for name in names)
    if size > MAXIMUM_TOKENIZER:
        raise TorchchatError(f"the tokenizer's files in {where} have {size} bytes; {MAXIMUM_TOKENIZER} are the most",
                             DAMAGED)


class Entries(Mapping[str, bytes]):
    """Files of the tokenizer by their own names, read and compared with their digests when they are asked for."""

    def __init__(self, artifact: Artifact, names: Iterable[str]) -> None:
        self._artifact = artifact
        self._names = {name.removeprefix(TOKENIZER): name for name in names}

    def __getitem__(self, name: str) -> bytes:
        return self._artifact.read(self._names[name], MAXIMUM_TOKENIZER)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _changed(path: Path, name: str) -> TorchchatError:
    return TorchchatError(f"{path.name} was changed after it was written: {quoted(name)} is not what its digest says",
                          "copy or export it again")


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


@functools.cache
def _machine() -> str:
    machine = platform.machine().lower()
    return MACHINES.get(machine, machine)


def this_machine() -> Target:
    """The CPU here, as the target of code that runs on such machines alone."""
    return Target(device="cpu", system=sys.platform, machine=_machine())
