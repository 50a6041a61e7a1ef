"""``python -m nsa.tools.hub``: selected attention in the layout of Hugging Face's kernels hub."""
