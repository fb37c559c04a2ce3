"""Seeds that depend on the run seed and a name alone, never on the order in which things are built."""

from __future__ import annotations

import hashlib


def seed_from_name(run_seed: int, name: str) -> int:
    """A 63-bit seed for a random generator."""
    digest = hashlib.sha256(f"{run_seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
