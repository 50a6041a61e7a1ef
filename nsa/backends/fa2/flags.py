"""What decides, of both FlashAttention-2 backends: what they can run, and what flags delegate."""

from __future__ import annotations

import torch

from nsa.backends.fa2.providers import provider
from nsa.backends.protocol import Problem
from nsa.errors import BackendUnavailable
from nsa.settings import Settings

MAX_HEAD = 256


def unavailable(problem: Problem, settings: Settings) -> str | None:
    """Why FlashAttention-2 cannot run the problem, or None."""
    config = problem.config
    size = max(config.head_dim, config.dv)
    if size > MAX_HEAD:
        return f"FlashAttention-2 takes head sizes up to {MAX_HEAD}, got {size}"
    if config.softmax_scale <= 0:
        return f"FlashAttention-2 takes a scale > 0, got {config.softmax_scale}"
    try:
        provider(settings.fa2_provider, problem.device)
    except BackendUnavailable as error:
        return str(error)
    math = settings.fa2_provider == "math"
    if not math and problem.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention-2 takes float16 and bfloat16, got {problem.dtype}"
    return None


def delegated(problem: Problem, settings: Settings) -> dict[str, str]:
    """The branches that ``sdpa`` runs, and the flag that says so."""
    found = {}
    branches = (
        ("window", "WIN", settings.use_fa2_win, settings.fa2_min_len_win),
        ("compressed", "CMP", settings.use_fa2_cmp, settings.fa2_min_len_cmp),
    )
    for branch, flag, use, least in branches:
        if use is False:
            found[branch] = f"NSA_USE_FA2_{flag}=0"
        elif use is None and problem.length < least:
            found[branch] = f"shorter than NSA_FA2_MIN_LEN_{flag}={least}"
    return found
