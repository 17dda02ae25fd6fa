"""Checkpoints whose weights are stored as low-bit codes with scales, read and written as they were published.

One idea carries all formats: a weight is a grid of codes, each of which stands for a number of a small fixed set, and
a coarser grid of scales (and perhaps zero points) that are shared by tiles of it. `w = (number - zero) * scale`.

- `codes.py`: a class per kind of code behind the protocol `Codes`: how codes lie in the stored tensor, which number
  each stands for, which one is nearest to a number.
- `scales.py`: what is stored as a scale, and which scale a weight has.
- `weight.py`: `PackedWeight`, one logical weight: its name, shape and dtype as a plain checkpoint would have them, the
  stored tensors that make it up, `decode` to values, `encode` of new values on its own scales. Where a value did not
  change its code stays as it is, bit by bit, so that encoding a pruned weight writes a mask into the codes.
- `block_fp8.py`, `gpt_oss.py`, `compressed_tensors.py`: a finder per scheme of `quantization_config`. It tells from the
  config and the headers alone which weights are packed and how; what disagrees is refused by the tensor's name.
- `detect.py`: which finder a config asks for; one that names a scheme not read here is refused with its name.
- `dequantised.py`: the checkpoint as if it were plain, decoded tensor by tensor when read.

Everything that can be told from headers is checked when a checkpoint is opened, the contents of scales and codes when
a weight is decoded. Values equal those of transformers' own dequantisation, which is done in the same arithmetic.
"""
