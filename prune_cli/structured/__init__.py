"""Outputs that are smaller dense models: whole units go, and config.json says so."""
