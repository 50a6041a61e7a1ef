"""What a generation took, in lines for a terminal."""

from __future__ import annotations

from nsa.backends import Resolution
from nsa.models import Generation


def summary(generation: Generation, resolution: Resolution | None) -> list[str]:
    """Speed of prefill and decode, and what was read beside what dense attention reads.

    Args:
        generation: has ended.
        resolution: what ran; None: dense attention.
    """
    done = generation.statistics
    lines = [
        f"backend {'dense attention' if resolution is None else resolution}",
        f"prefill {_speed(done.prompt_tokens, done.prefill_seconds)}; "
        f"decode {_speed(done.new_tokens, done.decode_seconds)}",
    ]
    if done.read is not None and done.new_tokens:
        read, dense = (x / done.new_tokens for x in (done.read, done.dense))
        lines.append(f"K/V tokens read for a token: {read:,.1f}; dense attention: {dense:,.1f}")
    if "max_length" in generation.ended:
        lines.append("ended at the longest text that is allowed; --max-length allows more")
    return lines


def _speed(tokens: int, seconds: float) -> str:
    speed = f" at {tokens / seconds:,.0f}/s" if tokens and seconds > 0 else ""
    return f"{tokens:,} tokens{speed}"
