"""`prune-cli soup`: the average of checkpoints that share a mask, which keeps their zeros.

Zimmer et al., "Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging" (arXiv:2306.16788). `survey.py`
compares the inputs, tensor by tensor, before anything is written; `average.py` has the arithmetic; `run.py` the story.
"""
