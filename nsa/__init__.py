"""Native Sparse Attention (arXiv 2502.11089) in PyTorch: right, fast, and it says what it runs."""

from nsa.attention import nsa_attention, select_blocks
from nsa.backends import Resolution, resolve
from nsa.cache import NSACache
from nsa.config import KV, NSAConfig
from nsa.errors import (
    BackendUnavailable,
    CacheError,
    CheckpointError,
    ConfigError,
    DataError,
    MissingDependency,
    NSAError,
    SettingsError,
    ShapeError,
)
from nsa.module import NSAttention
from nsa.padding import Padding
from nsa.settings import Settings, use_settings

__version__ = "0.2.0"

__all__ = [
    "KV",
    "BackendUnavailable",
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "MissingDependency",
    "NSACache",
    "NSAConfig",
    "NSAError",
    "NSAttention",
    "Padding",
    "Resolution",
    "Settings",
    "SettingsError",
    "ShapeError",
    "nsa_attention",
    "resolve",
    "select_blocks",
    "use_settings",
]
