"""A small Llama-style language model whose attention is NSA or, for comparison, dense."""

from nsa.models.config import ModelConfig
from nsa.models.dense import DenseAttention
from nsa.models.generation import GenerationConfig, generate
from nsa.models.language_model import LanguageModel

__all__ = ["DenseAttention", "GenerationConfig", "LanguageModel", "ModelConfig", "generate"]
