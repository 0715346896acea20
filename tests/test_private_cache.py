"""Compiled code is loaded only if no other user could have written it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from torchchat_core import private_cache
from torchchat_core.errors import TorchchatError
from torchchat_core.kernels.build import library_path
from torchchat_core.private_cache import (
    check_compiler_cache,
    code_folder,
    foreign_fault,
    make_code_folder,
    private_path,
)
from torchchat_core.small_files import cache_folder, make_folder

STRANGER = 12345
Disown = Callable[[Path], None]

pytestmark = pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no numeric user ids")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    private_cache._warn_once.cache_clear()
    return tmp_path / "torchchat"


@pytest.fixture
def disown(monkeypatch: pytest.MonkeyPatch) -> Disown:
    """Give a file to another user; if the tests are not root, patch `lstat` instead."""

    def give_away(path: Path) -> None:
        if os.getuid() == 0:
            os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
            return
        plain = Path.lstat

        def lstat(self: Path) -> os.stat_result:
            found = plain(self)
            return os.stat_result((*found[:4], STRANGER, *found[5:])) if self == path else found

        monkeypatch.setattr(Path, "lstat", lstat)

    return give_away


def made(path: Path) -> Path:
    make_folder(path.parent)
    path.write_text("code")
    path.chmod(0o600)
    return path


def test_the_cache_folder_is_made_for_the_user_alone(cache: Path) -> None:
    before = os.umask(0)
    try:
        make_folder(cache / "kernels" / "key")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(each.stat().st_mode) for each in (cache, cache / "kernels", cache / "kernels" / "key")] == [
        0o700] * 3


def test_files_of_the_user_are_used(cache: Path) -> None:
    path = made(cache / "kernels" / "key" / "code.so")
    assert foreign_fault(path) is None
    assert code_folder("kernels", "key") == path.parent
    assert private_path("exported", "m.pte") == cache / "exported" / "m.pte"


@pytest.mark.parametrize("part", ["", "kernels", "kernels/key", "kernels/key/code.so"])
def test_code_in_files_or_folders_of_another_user_is_not_used(
        part: str, cache: Path, disown: Disown, caplog: pytest.LogCaptureFixture) -> None:
    made(cache / "kernels" / "key" / "code.so")
    disown(cache / part)
    folder = code_folder("kernels", "key")
    assert not folder.is_relative_to(cache)
    assert folder == code_folder("kernels", "key")
    assert stat.S_IMODE(folder.parents[1].stat().st_mode) == 0o700
    assert [str(cache / part) in line and "set XDG_CACHE_HOME" in line for line in caplog.messages] == [True]


@pytest.mark.parametrize("mode", [0o702, 0o777])
@pytest.mark.parametrize("part", ["", "exported", "exported/m.pte"])
def test_exported_models_that_everybody_can_write_are_refused(part: str, mode: int, cache: Path) -> None:
    made(cache / "exported" / "m.pte")
    (cache / part).chmod(mode)
    with pytest.raises(TorchchatError, match="everybody can write") as raised:
        private_path("exported", "m.pte")
    assert str(cache / part) in raised.value.message
    assert raised.value.fix is not None
    assert "XDG_CACHE_HOME" in raised.value.fix


def test_a_group_with_other_members_is_a_fault_and_a_private_group_is_not(
        cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(cache / "kernels" / "key" / "code.so")
    path.chmod(0o664)
    monkeypatch.setattr(private_cache, "_is_private_group", lambda _: False)
    assert foreign_fault(path) == f"its group can write {path}"
    monkeypatch.setattr(private_cache, "_is_private_group", lambda _: True)
    assert foreign_fault(path) is None


def test_links_are_followed_and_every_step_counts(tmp_path: Path, cache: Path, disown: Disown) -> None:
    path = made(tmp_path / "real" / "code.so")
    (tmp_path / "middle").symlink_to(tmp_path / "real")
    (tmp_path / "first").symlink_to(Path("middle"))
    through = tmp_path / "first" / ".." / "first" / "code.so"
    assert foreign_fault(through) is None
    disown(tmp_path / "middle")
    assert foreign_fault(through) is not None
    assert foreign_fault(path) is None


def test_links_in_a_ring_are_a_fault(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert foreign_fault(tmp_path / "a" / "code.so") is not None


def test_kernels_of_another_user_are_not_loaded(cache: Path, disown: Disown) -> None:
    theirs = made(library_path())
    assert theirs.is_relative_to(cache)
    disown(theirs)
    assert not library_path().exists()
    assert library_path().parent.name == theirs.parent.name


def test_a_compiler_cache_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      disown: Disown) -> None:
    theirs = tmp_path / "torchinductor"
    theirs.mkdir(mode=0o700)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(theirs))
    check_compiler_cache()
    disown(theirs)
    with pytest.raises(TorchchatError, match=r"PyTorch's compiler is not used: .* belongs to the user"):
        check_compiler_cache()


def test_records_of_checked_files_are_private_too(cache: Path) -> None:
    assert cache_folder() == cache
    record = made(cache / "checked" / "a.json")
    record.chmod(0o666)
    assert foreign_fault(record) == f"everybody can write {record}"


def test_a_folder_that_another_user_made_in_the_meantime_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch
                                                                      ) -> None:
    folder = code_folder("kernels", "key")

    def others_were_faster(path: Path) -> None:
        make_folder(path)
        cache.chmod(0o777)

    monkeypatch.setattr(private_cache, "make_folder", others_were_faster)
    with pytest.raises(TorchchatError, match="everybody can write"):
        make_code_folder(folder)
