"""`python -m torchchat_core.kernels`: compiles the kernels now, so that nobody waits for it later."""

from __future__ import annotations

import sys

from torchchat_core import kernels
from torchchat_core.kernels.build import library_path

reason = kernels.load()
sys.stdout.write(f"{library_path()}\n" if reason is None else "")
sys.stderr.write(f"error: {reason}\n" if reason is not None else "")
sys.exit(int(reason is not None))
