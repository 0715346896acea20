"""Load an exported file that never ran on this machine in a child process first.

Its program runs as code, and a runtime that finds corrupted bytes may abort the whole process. Files that loaded are
recorded by their manifest, which holds the digests of all parts, so that later starts cost nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from torchchat_core import progress
from torchchat_core.artifacts import Artifact, has_manifest, open_artifact
from torchchat_core.errors import TorchchatError
from torchchat_core.own_process import ProcessEnded, in_own_process
from torchchat_core.plugins import Registry
from torchchat_core.private_cache import foreign_fault
from torchchat_core.small_files import cache_folder, make_folder
from torchchat_core.specs import ExecutorInfo, LoadRequest

FOLDER = "loaded"  # in the cache folder
TIMEOUT_SECONDS = 1800
SWITCH = "TORCHCHAT_FIRST_LOAD"  # set in the environment of the child process
TOKENS = 3  # positions of the test sequence


def try_first(artifact: Artifact, executor: str, registry: Registry) -> None:
    """Load a file in a child process if it never loaded here. Its digests must have been checked before.

    Raises `TorchchatError` if the child process crashes. Other errors are ignored: the actual load reports them.
    """
    if _is_remembered(artifact) or SWITCH in os.environ:
        return
    try:
        with progress.task("testing the file in a separate process, once"):
            in_own_process(f"{__name__}:load_once", {"path": str(artifact.path), "executor": executor}, registry,
                           timeout=TIMEOUT_SECONDS, environment={SWITCH: "1"})
    except ProcessEnded as error:
        raise TorchchatError(f"{artifact.path.name} cannot be loaded; it is damaged or was modified: {error.message}",
                             "export the model again, or copy the original file again") from None
    except TorchchatError:
        return


def remember(artifact: Artifact) -> None:
    """Record that a file loaded or was made here. Does nothing if the record cannot be written."""
    with contextlib.suppress(OSError, TorchchatError):
        record = _record(artifact)
        if not record.exists():
            make_folder(record.parent)
            record.touch(mode=0o600)


def remember_export(path: Path) -> None:
    """Record that a file was exported here. Files without a manifest are skipped, because they do not run as code."""
    if has_manifest(path):
        with contextlib.suppress(TorchchatError):
            remember(open_artifact(path))


def in_first_load() -> bool:
    """Return True in the child process, whose last line on standard error becomes the error message."""
    return SWITCH in os.environ


def load_once(registry: Registry, path: str, executor: str) -> dict[str, Any]:
    """Load the file and run a prompt and one token. This is the task of the child process."""
    artifact = open_artifact(Path(path))
    target = artifact.manifest.target
    model = registry.find(ExecutorInfo, executor).make().load(
        LoadRequest(device=target.device, dtype=artifact.manifest.dtype, artifact=artifact.path))
    try:
        session = model.session(min(TOKENS, artifact.manifest.max_seq_length))
        session.prefill([0])
        if artifact.manifest.max_seq_length > 1:
            session.decode(0)
    finally:
        model.close()
    return {}


def _is_remembered(artifact: Artifact) -> bool:
    record = _record(artifact)
    return record.exists() and foreign_fault(record) is None


def _record(artifact: Artifact) -> Path:
    """Return the path of the record for the file's content and the installed versions of the packages that made it."""
    versions = [[name, _installed_version(name)] for name in sorted(artifact.manifest.versions)]
    parts = json.dumps([artifact.content, versions], sort_keys=True)
    return cache_folder() / FOLDER / hashlib.sha256(parts.encode()).hexdigest()[:32]


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):  # ValueError: an invalid name
        return None
