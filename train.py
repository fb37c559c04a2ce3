"""`python train.py [VERB] [KEY=VALUE ...]`: the same program as `lowrank`; without a verb it trains."""

from __future__ import annotations

import sys

from lowrank_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
