"""`prune-cli check`: rules on a pruned model, decided by measuring it or, told so, by the figures of its report."""
