"""Keys and values of a batch of sequences while they are decoded."""

from nsa.cache.cache import MAX_STEP, NSACache
from nsa.cache.layer import LayerCache

__all__ = ["MAX_STEP", "LayerCache", "NSACache"]
