"""What memory this process uses."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_rss_bytes() -> int:
    """The most memory that this process has held, in bytes; 0 where the system does not say."""
    if sys.platform == "linux":  # getrusage would count what the parent held when it started this process
        _, _, rest = Path("/proc/self/status").read_bytes().partition(b"VmHWM:")
        if rest:
            return int(rest.split(maxsplit=1)[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
