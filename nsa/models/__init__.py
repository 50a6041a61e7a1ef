"""A small Llama-style language model whose attention is NSA or, for comparison, dense."""

from nsa.models.config import ModelConfig
from nsa.models.dense import DenseAttention
from nsa.models.language_model import LanguageModel

__all__ = ["DenseAttention", "LanguageModel", "ModelConfig"]
