"""Files are compared with their digests once; what was compared by one of both languages is noted for the other."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from probing import Probe, ProbeError

from torchchat_core import artifact_checks
from torchchat_core.artifact_checks import check_all, check_once
from torchchat_core.artifacts import Content, Manifest, Target, open_artifact, write_artifact
from torchchat_core.errors import TorchchatError
from torchchat_core.specs import TextContent
from torchchat_core.testing.models import tiny_config

STRANGER = 12345  # the id of a user and group
SETTLED = 2.1  # seconds after which a file that was written is noted


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/torchchat/checked"


@pytest.fixture
def fresh(caches: Path, sanitized: Path) -> Iterator[Probe]:
    """With a cache folder of the test's own."""
    found = Probe(sanitized / "torchchat-probe")
    yield found
    found.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """With weights, in a folder whose name is not plain; written some time ago."""
    path = tmp_path / "b\u00fccher \U0001f600" / "m.pte"
    path.parent.mkdir()
    path.write_bytes(b"a program " * 30)
    text = TextContent(tokenizer={"b\u00fccher.model": b"a few letters"}, tokenizer_kind="sentencepiece", bos_id=1,
                       eos_id=2, adds_bos=True, end_ids=(1, 2))
    write_artifact(path, Manifest(kind="executorch", model="m", config=tiny_config(), dtype="fp32", max_seq_length=5,
                                  target=Target(device="cpu"), text=text), [Content.of("weights/all", b"w" * 99)])
    return path


def change_bytes(path: Path, before: bytes, after: bytes) -> None:
    data = path.read_bytes()
    assert data.count(before) == 1
    path.write_bytes(data.replace(before, after))


def note_of(path: Path) -> None:
    """As if all of the file had been compared as it is now."""
    artifact = open_artifact(path)
    artifact_checks._record(artifact).parent.mkdir(parents=True, exist_ok=True)
    artifact_checks._record(artifact).write_text(json.dumps(artifact_checks._identity(artifact)), "utf-8")


def test_python_takes_the_note_that_cpp_writes(file: Path, caches: Path, fresh: Probe) -> None:
    time.sleep(SETTLED)
    fresh.ask("artifact", path=str(file))
    assert artifact_checks._remembered(open_artifact(file))
    assert len(list(caches.iterdir())) == 1
    link = file.with_name("link.pte")
    link.symlink_to(file)
    fresh.ask("artifact", path=str(link))
    assert len(list(caches.iterdir())) == 1  # of the file that a link leads to


def test_weights_that_a_note_speaks_of_are_not_compared(file: Path, caches: Path, fresh: Probe,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    change_bytes(file, b"w" * 99, b"v" * 99)
    with pytest.raises(ProbeError, match="'weights/all' is not what its digest says"):
        fresh.ask("artifact", path=str(file))
    note_of(file)
    check_once(open_artifact(file))
    fresh.ask("artifact", path=str(file))
    os.utime(file, ns=(0, 0))  # another time
    with pytest.raises(ProbeError, match="'weights/all' is not what its digest says"):
        fresh.ask("artifact", path=str(file))


def test_what_is_small_is_compared_all_the_same(file: Path, caches: Path, fresh: Probe,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    change_bytes(file, b"a few letters", b"a few lettres")
    note_of(file)
    with pytest.raises(TorchchatError, match="is not what its digest says"):
        check_once(open_artifact(file))
    with pytest.raises(ProbeError, match="is not what its digest says"):
        fresh.ask("artifact", path=str(file))


def test_a_file_that_was_written_just_now_is_not_noted(file: Path, caches: Path, fresh: Probe) -> None:
    os.utime(file)
    fresh.ask("artifact", path=str(file))
    assert not caches.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"size": 1}', b"\xff", b"null", b"[" * 100_000])
def test_a_damaged_note_is_none(content: bytes, file: Path, caches: Path, fresh: Probe,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_checks, "SETTLED_NS", 0)
    check_all(open_artifact(file))
    next(caches.iterdir()).write_bytes(content)
    change_bytes(file, b"w" * 99, b"v" * 99)
    with pytest.raises(ProbeError, match="'weights/all' is not what its digest says"):
        fresh.ask("artifact", path=str(file))


def hand_over(path: Path, user: int = STRANGER) -> None:
    """Give a file to another group, and to another user unless `user` is -1."""
    if os.getuid() != 0:
        pytest.skip("only root can give a file to another user")
    os.chown(path, user, STRANGER, follow_symlinks=False)


FOREIGN = {
    "note of another user": lambda note: hand_over(note),
    "folder of another user": lambda note: hand_over(note.parent),
    "cache folder of another user": lambda note: hand_over(note.parents[1]),
    "note that everybody can write": lambda note: note.chmod(0o666),
    "folder that everybody can write": lambda note: note.parent.chmod(0o777),
    "folder that a group can write": lambda note: (hand_over(note.parent, -1), note.parent.chmod(0o770)),
    "link of another user": lambda note: hand_over(linked(note.parent)),
    "link to a folder of another user": lambda note: hand_over(linked(note.parent).readlink()),
}


def linked(folder: Path) -> Path:
    """Move a folder, leave a link in its place, and return the link."""
    moved = folder.rename(folder.parents[2] / "moved")
    folder.symlink_to(moved)
    return folder


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no numeric user ids")
@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_notes_that_another_user_could_have_written_are_ignored(change: Callable[[Path], object], file: Path,
                                                                caches: Path, fresh: Probe) -> None:
    change_bytes(file, b"w" * 99, b"v" * 99)
    note_of(file)
    fresh.ask("artifact", path=str(file))
    change(next(caches.iterdir()))
    with pytest.raises(TorchchatError, match="is not what its digest says"):
        check_once(open_artifact(file))
    with pytest.raises(ProbeError, match="'weights/all' is not what its digest says"):
        fresh.ask("artifact", path=str(file))


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no numeric user ids")
def test_notes_of_a_link_to_a_private_folder_count(file: Path, caches: Path, fresh: Probe) -> None:
    change_bytes(file, b"w" * 99, b"v" * 99)
    note_of(file)
    linked(caches)
    check_once(open_artifact(file))
    fresh.ask("artifact", path=str(file))


def test_notes_and_their_folders_are_for_the_user_alone(file: Path, caches: Path, fresh: Probe) -> None:
    time.sleep(SETTLED)
    fresh.ask("artifact", path=str(file))
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (caches.parent, caches, *caches.iterdir())]
    assert modes == [0o700, 0o700, 0o600]


def test_a_cache_folder_that_cannot_be_made_does_no_harm(file: Path, caches: Path, fresh: Probe) -> None:
    caches.parents[1].write_text("no folder", "utf-8")
    time.sleep(SETTLED)
    assert fresh.ask("artifact", path=str(file))["kind"] == "executorch"
