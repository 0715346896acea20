"""An exported file that never ran here is loaded in a process of its own first.

Its program runs as code, whatever its ending: a runtime that comes upon changed bytes may end the whole process. A file
that loaded is remembered by its manifest, which holds the digests of all its parts, so that later starts cost nothing.
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
SWITCH = "TORCHCHAT_FIRST_LOAD"  # set in the process of its own
TOKENS = 3  # positions of the sequence that is tried


def try_first(artifact: Artifact, executor: str, registry: Registry) -> None:
    """Load a file in a process of its own if it never loaded here. Its digests must have been compared before.

    Raises `TorchchatError` if that process is ended by the file; other errors are left to the load that follows.
    """
    if _is_remembered(artifact) or SWITCH in os.environ:
        return
    try:
        with progress.task("loading the file in a process of its own, once"):
            in_own_process(f"{__name__}:load_once", {"path": str(artifact.path), "executor": executor}, registry,
                           timeout=TIMEOUT_SECONDS, environment={SWITCH: "1"})
    except ProcessEnded as error:
        raise TorchchatError(f"{artifact.path.name} cannot be loaded, since it is damaged or was changed: "
                             f"{error.message}", "export the model again, or copy the file from where it was made"
                             ) from None
    except TorchchatError:
        return


def remember(artifact: Artifact) -> None:
    """Remember that a file loaded, or was made here. Nothing is raised where that cannot be written."""
    with contextlib.suppress(OSError, TorchchatError):
        record = _record(artifact)
        if not record.exists():
            make_folder(record.parent)
            record.touch(mode=0o600)


def remember_export(path: Path) -> None:
    """Remember that a file was exported here; one without a manifest does not run as code."""
    if has_manifest(path):
        with contextlib.suppress(TorchchatError):
            remember(open_artifact(path))


def in_first_load() -> bool:
    """Return True in the process of its own, which must write to standard error whatever may be its last words."""
    return SWITCH in os.environ


def load_once(registry: Registry, path: str, executor: str) -> dict[str, Any]:
    """Load the file, and run a prompt and a token: what the process of its own does."""
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
    """The record of all that decides whether a file loads: the file, and the packages that made it as they are now."""
    versions = [[name, _installed_version(name)] for name in sorted(artifact.manifest.versions)]
    parts = json.dumps([artifact.content, versions], sort_keys=True)
    return cache_folder() / FOLDER / hashlib.sha256(parts.encode()).hexdigest()[:32]


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):  # a name that is none
        return None
