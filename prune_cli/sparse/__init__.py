"""Sparse safetensors: the coding, the files, conversion, loading and verification. See docs/sparse-safetensors.md."""
