"""`prune-cli sweep`: many ways of pruning measured side by side, in memory; no checkpoint is written."""
