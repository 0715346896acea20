"""Exported files are compared with their digests once, and again when they are no longer the same files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from torchchat_core import artifact_checks, artifacts
from torchchat_core.artifact_checks import check_all, check_once
from torchchat_core.artifacts import Artifact, Content, Manifest, Target, open_artifact, write_artifact
from torchchat_core.errors import TorchchatError
from torchchat_core.testing.models import tiny_config

Hashed = list[int]  # bytes of entries that were compared


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and a clock whose ticks nobody has to wait for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(artifact_checks, "SETTLED_NS", 0)
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Hashed:
    sizes: Hashed = []
    digest = artifacts._digest

    def counted(path: Path, start: int, size: int) -> str:
        sizes.append(size)
        return digest(path, start, size)

    monkeypatch.setattr(artifacts, "_digest", counted)
    return sizes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """With 1000 bytes of program, 100 of something, and 5000 of weights."""
    path = tmp_path / "m.pte"
    path.write_bytes(bytes(1000))
    manifest = Manifest(kind="executorch", model="m", config=tiny_config(), dtype="fp32", max_seq_length=16,
                        target=Target(device="cpu"))
    write_artifact(path, manifest, [Content.of("small", b"x" * 100), Content.of("weights/all", b"w" * 5000)])
    return path


def opened(path: Path) -> Artifact:
    return open_artifact(path)


def changed(path: Path, name: str, keep_time: bool = False) -> None:
    """Turns one bit of an entry, in place."""
    before, (start, size) = path.stat(), opened(path).place(name)
    with path.open("r+b") as handle:
        handle.seek(start + size // 2)
        byte = handle.read(1)[0]
        handle.seek(start + size // 2)
        handle.write(bytes([byte ^ 1]))
    times = before.st_mtime_ns if keep_time else before.st_mtime_ns + 1
    os.utime(path, ns=(before.st_atime_ns, times))


def test_weights_are_compared_once(file: Path, hashed: Hashed) -> None:
    check_once(opened(file))
    assert sorted(hashed) == [100, 1000, 5000]
    hashed.clear()
    check_once(opened(file))
    assert sorted(hashed) == [100, 1000]


def test_programs_that_hold_weights_are_compared_once(file: Path, hashed: Hashed, monkeypatch: pytest.MonkeyPatch
                                                      ) -> None:
    monkeypatch.setattr(artifact_checks, "LARGE", 1000)
    check_once(opened(file))
    hashed.clear()
    check_once(opened(file))
    assert hashed == [100]


@pytest.mark.parametrize("keep_time", [False, True])
@pytest.mark.parametrize("name", ["weights/all", "program", "small"])
def test_damage_is_found_in_files_that_were_compared(file: Path, name: str, keep_time: bool) -> None:
    check_once(opened(file))
    changed(file, name, keep_time)
    for _ in range(2):  # and is not forgotten
        with pytest.raises(TorchchatError, match=f"m.pte was changed after it was written: '{name}' is not what its"):
            check_once(opened(file))


def test_a_copy_is_another_file(file: Path, hashed: Hashed, tmp_path: Path) -> None:
    check_once(opened(file))
    hashed.clear()
    check_once(opened(Path(shutil.copy2(file, tmp_path / "copy.pte"))))
    assert 5000 in hashed


def test_a_file_in_the_place_of_another_is_compared(file: Path, tmp_path: Path, hashed: Hashed) -> None:
    check_once(opened(file))
    other = Path(shutil.copy2(file, tmp_path / "other.pte"))
    other.replace(file)
    hashed.clear()
    check_once(opened(file))
    assert 5000 in hashed


def test_a_file_that_was_written_just_now_is_not_remembered(file: Path, hashed: Hashed,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be written again before the file system's clock ticks."""
    monkeypatch.setattr(artifact_checks, "SETTLED_NS", 1 << 62)
    check_once(opened(file))
    check_once(opened(file))
    assert hashed.count(5000) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"size": 1}', b"\xff"])
def test_a_damaged_record_counts_for_nothing(file: Path, hashed: Hashed, caches: Path, content: bytes) -> None:
    check_once(opened(file))
    (record,) = (caches / "torchchat/checked").iterdir()
    record.write_bytes(content)
    hashed.clear()
    check_once(opened(file))
    assert 5000 in hashed


def test_a_cache_that_cannot_be_written_is_done_without(file: Path, caches: Path, hashed: Hashed) -> None:
    caches.write_text("no folder")
    check_once(opened(file))
    check_once(opened(file))
    assert hashed.count(5000) == 2


def test_everything_is_compared_where_that_is_asked_for(file: Path, hashed: Hashed) -> None:
    check_all(opened(file))
    check_all(opened(file))
    assert hashed.count(5000) == 2
