"""Structured pruning: which units (channels, heads, blocks, experts) go, and how the rest makes up for them."""
