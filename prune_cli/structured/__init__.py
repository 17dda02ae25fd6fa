"""Structured pruning of checkpoints: outputs that are smaller dense models."""
