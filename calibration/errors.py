"""What goes wrong with text."""


class CalibrationError(Exception):
    """The text cannot be used; the message is one sentence naming the source, what was expected and what to do."""


def no_tokenizer(given: str) -> CalibrationError:
    """Of a model whose folder has none, for the text `given`."""
    return CalibrationError(
        f"The model's folder has no tokenizer, which {given} needs: add its tokenizer files, or give a .safetensors "
        "file with input_ids."
    )
