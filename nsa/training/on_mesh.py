"""What a training run asks of its mesh, and a mesh of the run."""

from __future__ import annotations

from collections.abc import Mapping

from nsa.errors import ConfigError
from nsa.training.config import RunConfig, TrainConfig

_TRIED = 2**16
"""The largest batch that an error looks at to find what would fit."""


def require_mesh(config: RunConfig, sizes: Mapping[str, int], compile_cache: str | None) -> None:
    """Refuse what does not run on a mesh of so many processes.

    Raises:
        ConfigError: with what would fit.
    """
    train, dp, cp, tp = config.train, sizes["dp"], sizes["cp"], sizes["tp"]
    if dp * cp * tp == 1:
        return
    if train.batch_size % dp:
        raise ConfigError(
            f"--batch-size: expected a multiple of --dp {dp}, got {train.batch_size}; "
            f"{_batches(train, dp)}"
        )
    model, nsa = config.model, config.model.nsa
    heads, hidden = nsa.num_kv_heads, model.hidden_dim
    assert hidden is not None  # resolved by ModelConfig
    fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
    _refuse(heads % tp > 0, "--tp", f"a divisor of --num-kv-heads {heads} ({fits})", tp)
    _refuse(hidden % tp > 0, "--tp", f"a divisor of --hidden-dim {hidden}", tp)
    text = f"none with --tp {tp} (--activation-checkpointing computes again, too)"
    _refuse(train.recompute and tp > 1, "--recompute", text, train.recompute)
    dense, length = model.attention == "dense", train.seq_len
    _refuse(cp > 1 and dense, "--cp", "1 with --attention dense", cp)
    least = 2 * cp * nsa.select_share  # as many tokens on every process, cut where lists are shared
    text = f"a multiple of {least} with --cp {cp}"
    _refuse(cp > 1 and length % least > 0, "--seq-len", text, length)
    every = train.log_attention_every
    some = every is not None and cp * tp > 1  # of what one process sees
    _refuse(some, "--log-attention-every", "none with --cp or --tp", every)
    blocks = train.compile == "blocks" and cp > 1
    _refuse(blocks, "--compile", "none with --cp, which is no part of a graph", train.compile)
    whole = train.compile == "model"
    _refuse(whole, "--compile", "none or blocks on several processes", train.compile)
    cache = compile_cache is not None
    _refuse(cache, "--compile-cache", "none on several processes", compile_cache)


def _refuse(wrong: bool, flag: str, expected: str, got: object) -> None:
    if wrong:
        raise ConfigError(f"{flag}: expected {expected}, got {got}")


def _batches(train: TrainConfig, dp: int) -> str:
    """Which batches fit, and what fits the batch that was requested."""
    batch, step = train.batch_size, train.batch_size * train.accumulate
    sizes = [size for size in range(dp, min(step, _TRIED) + 1, dp) if step % size == 0]
    above = -(-batch // dp) * dp
    fits = [f"--batch-size {size}" for size in (above - dp, above) if size]
    if sizes:
        size = min(sizes, key=lambda size: abs(size - batch))
        fits = [f"--batch-size {size} --accumulate {step // size} (as many sequences in a step)"]
    divisors = [str(n) for n in range(1, min(batch, _TRIED) + 1) if batch % n == 0]
    return f"{' or '.join(fits)} would fit, or --dp {', '.join(divisors[-8:])}"
