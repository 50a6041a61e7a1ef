"""A small Llama-style language model whose attention is NSA or, for comparison, dense."""

from nsa.models.config import ModelConfig
from nsa.models.dense import DenseAttention
from nsa.models.dense_cache import DenseCache
from nsa.models.generation import Generation, generate
from nsa.models.language_model import LanguageModel
from nsa.models.sampling import GenerationConfig

__all__ = [
    "DenseAttention",
    "DenseCache",
    "Generation",
    "GenerationConfig",
    "LanguageModel",
    "ModelConfig",
    "generate",
]
