"""Numbers as people read them."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """1024-based with its unit: 22.8 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def format_count(count: float) -> str:
    """1000-based and short: 60.1M."""
    for unit in ("", "k", "M"):
        if abs(count) < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.2f}B"


def format_duration(seconds: float) -> str:
    """h:mm:ss, with days before them where there are any."""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86400)
    clock = f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock
