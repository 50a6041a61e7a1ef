"""Triton kernels, one file per step; imported lazily, since triton may be missing."""
