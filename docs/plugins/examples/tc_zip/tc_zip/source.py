"""Unpacks an archive once, into a folder of its own, and leaves the rest to core."""

import hashlib
import os
import shutil
import zipfile
from pathlib import Path

from torchchat_core.errors import TorchchatError
from torchchat_core.sources.local import files_of_folder
from torchchat_core.specs import ModelFiles, ModelRef


class ZipSource:
    def fetch(self, ref: ModelRef) -> ModelFiles:
        archive, folder = self._places(ref)
        try:
            with zipfile.ZipFile(archive) as opened:
                for member in opened.infolist():
                    target = folder / member.filename
                    if not (target.is_file() and target.stat().st_size == member.file_size):
                        opened.extract(member, folder)  # which keeps every member inside the folder
        except (OSError, zipfile.BadZipFile) as error:
            raise TorchchatError(f"cannot unpack {str(archive)!r}: {error}", "is it a .zip file?") from None
        return files_of_folder(ref, folder)

    def remove(self, ref: ModelRef) -> int:
        folder = self._places(ref)[1]
        freed = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shutil.rmtree(folder, ignore_errors=True)
        return freed

    def _places(self, ref: ModelRef) -> tuple[Path, Path]:
        """The archive, and the folder of its content, which depends on its time and size too."""
        archive = Path(ref.location).expanduser().resolve()
        if ref.scheme != "zip" or not archive.is_file():
            raise TorchchatError(f"there is no archive {ref.text!r}", "write zip:path/of/model.zip")
        seen = f"{archive} {archive.stat().st_mtime_ns} {archive.stat().st_size}"
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return archive, cache / "torchchat" / "zip" / hashlib.sha256(seen.encode()).hexdigest()[:16]
