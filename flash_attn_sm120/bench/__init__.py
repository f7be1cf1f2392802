"""Measurements on a GPU: dense prefill, paged prefill and decode beside other packages' kernels, and their pictures.

`flash-attn-sm120 bench` and benchmarks/*.py call the same functions. Nothing here is imported by a call of the package.
"""
