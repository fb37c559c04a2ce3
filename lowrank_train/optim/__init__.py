"""The optimizer wing: update rules, subspaces, lifts, and the one optimizer that runs them."""
