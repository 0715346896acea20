"""Numbers as people read them."""

from __future__ import annotations


def bytes_text(count: int) -> str:
    """Bytes in units of a thousand, as hubs and disks give them: "999 B", "61 MB", "2.5 GB"."""
    size, unit = _in_largest_unit(count)
    return f"{size:.1f} {unit}" if unit in ("GB", "TB") and abs(size) < 99.95 else f"{size:.0f} {unit}"


def size_text(count: int) -> str:
    """Bytes with three digits, to tell sizes apart that lie close together: "999 B", "5.61 MB", "61.2 MB"."""
    size, unit = _in_largest_unit(count)
    digits = 0 if unit == "B" or abs(size) >= 99.95 else 1 if abs(size) >= 9.995 else 2
    return f"{size:.{digits}f} {unit}"


def _in_largest_unit(count: int) -> tuple[float, str]:
    """Below a thousand, once it is rounded."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(size) < 999.5:
            break
        size, unit = size / 1000, larger
    return size, unit


def seconds_text(seconds: float) -> str:
    """A duration: "0.4 s", "42 s", "3 min 05 s"."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s"
