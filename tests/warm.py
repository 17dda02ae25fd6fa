"""What the processes of forked.py find done: nothing of ours, and what a first use in each library takes long for."""

import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("llama")
gc.freeze()  # else each collection of each process looks at all that is imported here
