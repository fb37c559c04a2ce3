"""Tests of lowrank_train.data."""
