"""A run deletes the leftovers of killed runs next to its output, and none of live runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchchat_core.artifacts import whole_file
from torchchat_core.errors import TorchchatError
from torchchat_core.unfinished import ABANDONED_SECONDS, remove_leftovers, unfinished

pytestmark = pytest.mark.skipif(os.name != "posix", reason="leftovers are found by flock")
HOLDER = ("import sys\nfrom pathlib import Path\nfrom torchchat_core.unfinished import unfinished\n"
          "with unfinished(Path(sys.argv[1])) as folder:\n"
          "    (folder / 'half').write_bytes(b'half')\n    print('made', flush=True)\n    sys.stdin.read()\n")


def holder(path: Path) -> subprocess.Popen[bytes]:
    """Start a process that is writing `path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"made\n"
    return process


def killed(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


@pytest.mark.parametrize("name", ["m.pte", "folder", "ä" * 120 + ".pte", "[*].gguf"])
def test_the_next_run_deletes_leftovers_of_a_killed_run(name: str, tmp_path: Path) -> None:
    killed(holder(tmp_path / name))
    assert len(names(tmp_path)) == 1
    with whole_file(tmp_path / name) as partial:
        partial.write_bytes(b"whole")
    assert names(tmp_path) == [name]


def test_output_of_a_live_run_is_kept(tmp_path: Path) -> None:
    process = holder(tmp_path / "m.pte")
    theirs = names(tmp_path)
    with whole_file(tmp_path / "m.pte") as partial:
        partial.write_bytes(b"whole")
    assert names(tmp_path) == sorted([*theirs, "m.pte"])
    killed(process)
    remove_leftovers(tmp_path / "m.pte")
    assert names(tmp_path) == ["m.pte"]


def test_leftovers_of_other_outputs_and_user_files_are_kept(tmp_path: Path) -> None:
    killed(holder(tmp_path / "other.pte"))
    (tmp_path / ".m.pte").write_text("mine")
    (tmp_path / ".m.pte.partial").mkdir()
    before = names(tmp_path)
    remove_leftovers(tmp_path / "m.pte")
    assert names(tmp_path) == before


def test_a_folder_without_a_lock_is_deleted_once_it_is_old(tmp_path: Path) -> None:
    with unfinished(tmp_path / "m.pte") as folder:
        name = folder.name
    (tmp_path / name).mkdir()
    remove_leftovers(tmp_path / "m.pte")
    assert names(tmp_path) == [name]
    long_ago = time.time() - ABANDONED_SECONDS - 60
    os.utime(tmp_path / name, (long_ago, long_ago))
    remove_leftovers(tmp_path / "m.pte")
    assert names(tmp_path) == []


def test_failed_writes_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "m.pte") as partial:
        partial.write_bytes(bytes(1 // 0))
    assert names(tmp_path) == []
    with pytest.raises(TorchchatError, match="cannot write"), whole_file(tmp_path / "none" / "m.pte"):
        pass
