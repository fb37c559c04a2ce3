"""Random bits that follow from a seed and a place alone, the same in plain torch and in a kernel's registers."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Salmon et al., 2011, table 2: Philox4x32
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def random_16_bits(seed: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """int32 (rows, columns), uniform in [0, 2^16): Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", SC 2011).

    The key is `seed`, 0 <= seed < 2^63; the counter (column / 8, row, 0, 0) yields four words, whose halves, the lower
    first, serve eight neighbouring columns.
    """
    octets = torch.arange(-(-columns // 8), dtype=torch.int64, device=device).expand(rows, -1)
    a, b = octets & WORD, torch.arange(rows, dtype=torch.int64, device=device)[:, None].expand_as(octets) & WORD
    c = d = torch.zeros_like(octets)
    key = [seed & WORD, seed >> 32]
    for _ in range(ROUNDS):
        first, second = (word * factor for word, factor in zip((a, c), MULTIPLIERS, strict=True))
        a, b = ((second >> 32) & WORD) ^ b ^ key[0], second & WORD  # the product overflows, yet its bits are right
        c, d = ((first >> 32) & WORD) ^ d ^ key[1], first & WORD
        key = [(part + step) & WORD for part, step in zip(key, WEYL, strict=True)]
    words = torch.stack((a, b, c, d), 2)
    halves = torch.stack((words & 0xFFFF, words >> 16), 3)
    return halves.view(rows, -1)[:, :columns].int()


def rounded_at_random(values: Tensor, seed: int) -> Tensor:
    """float32 -> bfloat16, up with a probability equal to the distance from the lower neighbour.

    A matrix draws by its rows and columns, any other tensor as one row.
    """
    rows = values.shape[0] if values.ndim == 2 else 1
    noise = random_16_bits(seed, rows, values.numel() // max(1, rows), values.device).view(values.shape)
    cut = (values.view(torch.int32) + noise) & -(1 << 16)  # of sign and magnitude: the carry may move up the exponent
    return torch.where(values.isnan(), values, cut.view(torch.float32)).to(torch.bfloat16)
