"""`prune-cli bench`: how fast a model is and what it takes, measured side by side with another.

`run.py` tells the story; each model lives in a process of its own (`child.py`, `whole_model.py`), so that its memory
and its load time are its own; `result.py` holds what comes out, `table.py` shows it.
"""
