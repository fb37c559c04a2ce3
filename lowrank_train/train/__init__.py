"""Training: one run from its configuration to its result card, stopped and resumed at will."""
