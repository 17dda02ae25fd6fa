"""Batches through blocks."""
