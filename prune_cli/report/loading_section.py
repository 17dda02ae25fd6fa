"""How an output is loaded, as the section of a model card."""

from __future__ import annotations

from typing import Literal, get_args

# The files that a card is for; the last are sparse too, and have a loader beside them.
Form = Literal["dense", "sparse", "self-contained"]


_IMPORT_US = "import prune_cli  # its weights are stored as sparse safetensors, which this reads\n"


_TRUST = """\
# Its weights are stored as sparse safetensors. trust_remote_code lets sparse_loader.py, a short program beside them,
# decode them into a temporary folder; after `import prune_cli` it is not needed.
"""


# The class for language models that stand beside parts for images or sound.
_CAUSAL, _WRAPPED = "AutoModelForCausalLM", "AutoModelForMultimodalLM"


def loading_section(form: Form, architecture: str) -> str:
    """`architecture` is the name of the model's class."""
    auto = _WRAPPED if architecture.endswith("ForConditionalGeneration") else _CAUSAL
    return _loading(form).replace(_CAUSAL, auto)


def _loading(form: Form) -> str:
    trusting = form == "self-contained"
    return f"""## Load it

```python
{_IMPORT_US if form == "sparse" else ""}from transformers import AutoModelForCausalLM, AutoTokenizer

name = "."  # the id of this repository, or the folder that holds it
{_TRUST if trusting else ""}model = AutoModelForCausalLM.from_pretrained(name, dtype="auto"{
        ", trust_remote_code=True" if trusting else ""
    })
tokenizer = AutoTokenizer.from_pretrained(name)
```"""


def for_format(card: str, form: Form) -> str:
    """A card of ours for the same weights in other files, which load otherwise; any other card unchanged."""
    for auto in (_CAUSAL, _WRAPPED):
        for other in get_args(Form):
            card = card.replace(_loading(other).replace(_CAUSAL, auto), _loading(form).replace(_CAUSAL, auto))
    return card
