"""What to compute: the frozen, validated configuration of Native Sparse Attention."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from torch import Tensor

from nsa.errors import ConfigError, is_finite, is_int, require, require_fields, require_known, show

if TYPE_CHECKING:
    from typing_extensions import Self

Compression = Literal["mlp", "linear", "mean"]
Gate = Literal["sigmoid", "softmax"]
ScoreDtype = Literal["input", "fp8"]


MOST = {
    **dict.fromkeys(("num_heads", "num_kv_heads", "head_dim", "value_dim"), 2**16),
    "compress_block": 2**20,
    "dim": 2**24,
}
"""The largest values of some fields, and of a layer's width: its weights then have no more bytes
than an int64 counts."""
MOST_TOKENS = 2**31 - 1
"""The largest values of all others: kernels count tokens in int32."""


class KV(NamedTuple):
    """Keys and values of one branch."""

    k: Tensor
    """``[B, S, Hkv, Dk]``"""
    v: Tensor
    """``[B, S, Hkv, Dv]``"""


class Keyed:
    """A frozen dataclass that carries itself as text: a trace takes text for a constant, and no
    object or float of a user's."""

    __slots__ = ("key",)
    key: str
    """The fields as JSON."""

    def _make_key(self) -> None:
        object.__setattr__(self, "key", json.dumps(self._values()))

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_key(cls, key: str) -> Self:
        """The inverse of :attr:`key`."""
        return cls(**json.loads(key))

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self._values()), ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NSAConfig(Keyed):
    """Geometry and options of one NSA layer (arXiv 2502.11089, §3); lengths are in tokens.

    Raises :class:`nsa.ConfigError` when a rule of the method is broken.
    """

    num_heads: int = 64
    """Query heads, Hq."""
    num_kv_heads: int = 4
    """Key/value heads, Hkv; the group is G = Hq / Hkv."""
    head_dim: int = 128
    """Size of a query and key head, Dk."""
    value_dim: int | None = None
    """Size of a value head, Dv; None means ``head_dim``. Read it as :attr:`dv`."""
    compress_block: int = 32
    """Tokens in one compressed block, l."""
    compress_stride: int = 16
    """Tokens between the starts of compressed blocks, d."""
    select_block: int = 64
    """Tokens in one selection block, l'."""
    num_selected: int = 16
    """Selection blocks each query reads, n, the forced ones included."""
    num_initial: int = 1
    """Blocks at the start of the sequence that are always read."""
    num_local: int = 2
    """Blocks up to the query's own that are always read."""
    window: int = 512
    """Tokens of the sliding window, w, the query's own included."""
    scale: float | None = None
    """Softmax scale of every branch, of any sign; None means ``head_dim ** -0.5``. Read it as
    :attr:`softmax_scale`."""
    compression: Compression = "mlp"
    """How φ turns a block into one key or value."""
    gate: Gate = "sigmoid"
    """Activation of the layer's branch gates."""
    independent_kv: bool = True
    """Whether every branch has key/value projections of its own (§3.3.3)."""
    rope_theta: float | None = 10_000.0
    """Base of the rotary embedding; None means no rotary embedding."""
    select_schedule: tuple[tuple[int, int], ...] | None = None
    """Fewer blocks for early queries, pairs (p, n): below position p at most n are read."""
    select_mass: float | None = None
    """Share of the score, in (0, 1], at which a query's list ends; None lists num_selected."""
    select_share: int = 1
    """Consecutive queries m that read the list of the first of them; divides select_block."""
    select_regions: tuple[int, int] | None = None
    """Blocks of a region r and regions searched k: only the k best regions are ranked by block."""
    score_dtype: ScoreDtype = "input"
    """What selection scores are computed from: "input", or "fp8", which is queries and compressed
    keys rounded to e4m3 (on a GPU sm89 and later)."""

    def __post_init__(self) -> None:
        for name in ("select_schedule", "select_regions"):  # JSON has no tuples
            object.__setattr__(self, name, _as_tuples(getattr(self, name)))
        self._check()
        self._check_selection()
        self._make_key()

    def _check(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" or (field.name == "value_dim" and value is not None):
                if not is_int(value):
                    got = f"{show(value)} ({type(value).__name__})"
                    raise ConfigError(f"{field.name}: expected an int, got {got}")
                least = 0 if field.name in ("num_initial", "num_local") else 1
                most = MOST.get(field.name, MOST_TOKENS)
                hint = ", or None" if field.name == "value_dim" else ""
                require(value >= least, field.name, f"at least {least}{hint}", value)
                require(value <= most, field.name, f"at most {most}{hint}", value)
        d, forced = self.compress_stride, self.num_initial + self.num_local
        K, theta, l_max = self.num_kv_heads, self.rope_theta, self.select_block
        positive = theta is None or (is_finite(theta) and theta > 0)
        for name, good, expected in (
            ("num_heads", self.num_heads % K == 0, f"a multiple of num_kv_heads={K}"),
            ("compress_block", self.compress_block % d == 0, f"a multiple of compress_stride={d}"),
            ("select_block", self.select_block % d == 0, f"a multiple of compress_stride={d}"),
            ("compress_block", self.compress_block <= l_max, f"at most select_block={l_max}"),
            ("scale", self.scale is None or is_finite(self.scale), "a finite number, or None"),
            ("scale", _is_float32(self.scale), f"0, or a number of {_FLOAT32}, or None"),
            ("independent_kv", isinstance(self.independent_kv, bool), "True or False"),
            ("rope_theta", positive, "a finite number > 0, or None"),
            ("rope_theta", _is_float32(theta), f"a number of {_FLOAT32}, or None"),
            (
                "head_dim",
                theta is None or self.head_dim % 2 == 0,
                "even under RoPE (or rope_theta=None)",
            ),
        ):
            require(good, name, expected, getattr(self, name))
        limit = f"at most num_selected={self.num_selected}"
        require(forced <= self.num_selected, "num_initial + num_local", limit, forced)
        for name, kind in (("compression", Compression), ("gate", Gate)):
            require_known(name, getattr(self, name), get_args(kind))

    def _check_selection(self) -> None:
        """The options of selection, and that none contradicts another."""
        forced, share = self.num_initial + self.num_local, self.select_share
        good = self.select_block % share == 0
        require(good, "select_share", f"a divisor of select_block={self.select_block}", share)
        mass = self.select_mass
        good = mass is None or (is_finite(mass) and 0 < mass <= 1)
        require(good, "select_mass", "a number in (0, 1], or None", mass)
        require_known("score_dtype", self.score_dtype, get_args(ScoreDtype))
        regions, schedule = self.select_regions, self.select_schedule
        good = regions is None or (_are_ints(regions) and len(regions) == 2)
        require(good, "select_regions", "two ints >= 1, (blocks, regions), or None", regions)
        if schedule is None:
            return
        name = "select_schedule"
        good = isinstance(schedule, tuple) and bool(schedule)
        good = good and all(
            isinstance(pair, tuple) and len(pair) == 2 and _are_ints(pair) for pair in schedule
        )
        require(good, name, "pairs of ints >= 1, (position, blocks), or None", schedule)
        ends, counts = [end for end, _ in schedule], [count for _, count in schedule]
        require(ends == sorted(set(ends)), name, "ascending positions", schedule)
        limit = f"at least num_initial + num_local={forced} blocks everywhere"
        require(min(counts) >= forced, name, limit, schedule)
        limit = f"at most num_selected={self.num_selected} blocks everywhere"
        require(max(counts) <= self.num_selected, name, limit, schedule)

    @property
    def group(self) -> int:
        """Query heads per key/value head, G."""
        return self.num_heads // self.num_kv_heads

    @property
    def dv(self) -> int:
        """Size of a value head, Dv."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def softmax_scale(self) -> float:
        """The factor on every q·k."""
        return self.head_dim**-0.5 if self.scale is None else float(self.scale)

    def num_compressed(self, length: int) -> int:
        """Compressed blocks N of a sequence of ``length`` tokens; a partial tail makes none."""
        if length < self.compress_block:
            return 0
        return (length - self.compress_block) // self.compress_stride + 1

    @classmethod
    def preset(cls, name: str, **changes: Any) -> NSAConfig:
        """A named configuration of :data:`PRESETS`, with ``changes`` applied."""
        require_known("preset", name, tuple(PRESETS))
        require_fields(cls, changes)
        return replace(cls(**PRESETS[name].fields), **changes)


_FLOAT32 = "a size between 1e-37 and 1e38, which float32 holds"


def _is_float32(value: float | None) -> bool:
    """Of what is a finite number."""
    return not is_finite(value) or value == 0 or 1e-37 <= abs(value) <= 1e38  # type: ignore[arg-type]


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def _are_ints(values: Any) -> bool:
    return isinstance(values, tuple) and all(is_int(x) and x >= 1 for x in values)


class Preset(NamedTuple):
    """A configuration by name, and the environment that goes with it."""

    fields: Mapping[str, Any]
    """Of :class:`NSAConfig`, where they are not its defaults."""
    environment: Mapping[str, str]
    """Variables to set before Python starts, where nothing speaks against them."""
    summary: str


_GPU = {"NSA_BACKEND": "compiled", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
_CPU = {"NSA_BACKEND": "sdpa", "GOMP_SPINCOUNT": "1000"}

PRESETS: Mapping[str, Preset] = {
    "paper": Preset({"head_dim": 192, "value_dim": 128}, _GPU, "the paper's heads, 64/4:192/128"),
    "small": Preset(
        {"num_heads": 12, "num_kv_heads": 2, "head_dim": 64}, _GPU, "a model of GPT-2's size"
    ),
    "tiny": Preset(
        {
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 32,
            "compress_block": 16,
            "compress_stride": 8,
            "select_block": 32,
            "num_selected": 4,
            "num_initial": 1,
            "num_local": 1,
            "window": 64,
        },
        _CPU,
        "for tests and a first look",
    ),
    # compress_block and compress_stride are the defaults, 32 and 16
    "s2048": Preset(
        {
            "num_heads": 12,
            "num_kv_heads": 4,
            "head_dim": 64,
            "select_block": 128,
            "num_selected": 12,
            "window": 256,
        },
        _GPU,
        "sequences of about 2,048 tokens: long blocks, a short window, small groups",
    ),
    "short": Preset(
        {
            "num_heads": 12,
            "num_kv_heads": 2,
            "head_dim": 64,
            "compress_stride": 32,
            "num_selected": 5,
            "num_local": 1,
            "window": 128,
            "select_share": 4,
        },
        _GPU,
        "the least time at about 2,048 tokens: few blocks for four queries at once, a short window",
    ),
    "long": Preset(
        {"select_share": 4, "select_regions": (4, 16)},
        _GPU,
        "65,536 tokens and more: four queries share a list, of the best regions' blocks",
    ),
    "cpu": Preset(
        {
            "num_heads": 8,
            "num_kv_heads": 2,
            "head_dim": 64,
            "num_selected": 8,
            "window": 256,
        },
        _CPU,
        "for a CPU: half the blocks and half the window of the default",
    ),
}
"""By the name that :meth:`NSAConfig.preset` takes."""
