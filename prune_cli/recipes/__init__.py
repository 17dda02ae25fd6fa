"""Recipes: a request of `prune-cli prune` in a YAML file, read with places and written back. No torch here."""
