"""What pruning cost is won back by training what is left, with one block in memory or the whole model."""
