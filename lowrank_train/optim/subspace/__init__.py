"""Where the small copy of a gradient lives, and when it moves: one file per choice."""
