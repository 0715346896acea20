"""Unpacks an archive once, into a folder of its own, and leaves the rest to core."""

import hashlib
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from torchchat_core.errors import TorchchatError
from torchchat_core.small_files import cache_folder
from torchchat_core.sources.local import files_of_folder
from torchchat_core.specs import KeptModel, ModelFiles, ModelRef


class ZipSource:
    def fetch(self, ref: ModelRef) -> ModelFiles:
        archive, folder = _places(ref)
        try:
            with zipfile.ZipFile(archive) as opened:
                for member in _missing(opened, folder):
                    opened.extract(member, folder)  # which keeps every member inside the folder
        except (OSError, zipfile.BadZipFile) as error:
            raise TorchchatError(f"cannot unpack {str(archive)!r}: {error}") from None
        files = files_of_folder(ref, folder)
        folder.with_suffix(".origin").write_text(str(archive))
        return files

    def locate(self, ref: ModelRef) -> ModelFiles | None:
        archive, folder = _places(ref)
        with zipfile.ZipFile(archive) as opened:
            return None if any(_missing(opened, folder)) else files_of_folder(ref, folder)

    def kept(self) -> Iterator[KeptModel]:
        for origin in sorted((cache_folder() / "zip").glob("*.origin")):
            with suppress(TorchchatError, OSError, ValueError, zipfile.BadZipFile):  # the archive is gone, say
                ref = ModelRef(text="", scheme="zip", location=origin.read_text())
                files = self.locate(ref)
                if files is not None and files.root == origin.with_suffix(""):
                    yield KeptModel(reference=f"zip:{ref.location}", path=files.root, bytes=_bytes(files.root))

    def remove(self, ref: ModelRef) -> int:
        folder = _places(ref)[1]
        freed = _bytes(folder)
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".origin").unlink(missing_ok=True)
        return freed


def _places(ref: ModelRef) -> tuple[Path, Path]:
    """The archive, and the folder of its content, which depends on its time and size too."""
    archive = Path(ref.location).expanduser().resolve()
    if ref.scheme != "zip" or not zipfile.is_zipfile(archive):
        raise TorchchatError(f"there is no .zip archive {ref.text!r}", "write zip:path/of/model.zip")
    seen = f"{archive} {archive.stat().st_mtime_ns} {archive.stat().st_size}"
    return archive, cache_folder() / "zip" / hashlib.sha256(seen.encode()).hexdigest()[:16]


def _missing(opened: zipfile.ZipFile, folder: Path) -> Iterator[zipfile.ZipInfo]:
    for member in opened.infolist():
        kept = folder / member.filename
        if not member.is_dir() and not (kept.is_file() and kept.stat().st_size == member.file_size):
            yield member


def _bytes(folder: Path) -> int:
    files = [folder.with_suffix(".origin"), *folder.rglob("*")]
    return sum(path.stat().st_size for path in files if path.is_file())
