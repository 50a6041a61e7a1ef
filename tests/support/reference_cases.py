"""Random problems for the tests that hold `nsa.reference` to the NumPy oracle."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from hypothesis import strategies as st

from nsa.config import NSAConfig
from nsa.testing.strategies import with_selection_options


def phi_shapes(config: NSAConfig, size: int) -> dict[str, tuple[int, ...]]:
    """The parameters of φ for heads of `size`."""
    flat = config.compress_block * size
    return {
        "mlp": {
            "position": (config.compress_block, size),
            "up.weight": (2 * size, flat),
            "up.bias": (2 * size,),
            "down.weight": (size, 2 * size),
            "down.bias": (size,),
        },
        "linear": {"proj.weight": (size, flat), "proj.bias": (size,)},
        "mean": {},
    }[config.compression]


@dataclass(frozen=True)
class Case:
    """Shapes of one problem; its arrays follow from `seed`, in float64."""

    config: NSAConfig
    lengths: tuple[int, ...]
    """Tokens of each packed sequence; of a regular batch, the one length."""
    batch: int
    packed: bool
    surplus: int
    """Rows of NaN after the last compressed block that is needed."""
    width: int
    """Columns of the given block list."""
    seed: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def blocks(self) -> int:
        return sum(self.config.num_compressed(length) for length in self.lengths)

    @property
    def cu_seqlens(self) -> torch.Tensor | None:
        bounds = np.cumsum([0, *self.lengths])
        return torch.tensor(bounds, dtype=torch.int32) if self.packed else None

    @cached_property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def normal(self, rows: int, heads: int, size: int) -> np.ndarray:
        return self.rng.normal(size=(self.batch, rows, heads, size))

    def query(self) -> np.ndarray:
        return self.normal(self.tokens, self.config.num_heads, self.config.head_dim)

    def gates(self) -> np.ndarray:
        return self.normal(self.tokens, self.config.num_heads, 3)

    def token_kv(self) -> tuple[np.ndarray, np.ndarray]:
        heads = self.config.num_kv_heads
        k = self.normal(self.tokens, heads, self.config.head_dim)
        return k, self.normal(self.tokens, heads, self.config.dv)

    def block_kv(self) -> tuple[np.ndarray, np.ndarray]:
        heads, rows = self.config.num_kv_heads, self.blocks + self.surplus
        k = self.normal(rows, heads, self.config.head_dim)
        v = self.normal(rows, heads, self.config.dv)
        k[:, self.blocks :] = np.nan
        v[:, self.blocks :] = np.nan
        return k, v

    def block_idx(self) -> np.ndarray:
        """Any ascending lists: past the query, past a short sequence, empty, without its block."""
        num_blocks = -(-max(self.lengths) // self.config.select_block)
        shape = (self.batch, self.tokens, self.config.num_kv_heads)
        lists = np.full((*shape, self.width), -1, dtype=np.int32)
        for row in np.ndindex(shape):
            count = self.rng.integers(0, min(self.width, num_blocks) + 1)
            lists[row][:count] = np.sort(self.rng.permutation(num_blocks)[:count])
        return lists

    def weights(self, size: int) -> dict[str, np.ndarray]:
        """Parameters of φ for heads of `size`."""
        shapes = phi_shapes(self.config, size).items()
        return {name: self.rng.normal(size=shape) for name, shape in shapes}


@st.composite
def cases(draw: st.DrawFn, kinds: tuple[str, ...] = ("regular", "packed")) -> Case:
    packed = draw(st.sampled_from(kinds)) == "packed"
    stride = draw(st.integers(1, 4), label="stride")
    block = stride * draw(st.integers(1, 3), label="strides in a compressed block")
    initial, local = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    kv_heads = draw(st.integers(1, 2))
    config = NSAConfig(
        num_heads=kv_heads * draw(st.sampled_from([1, 2, 3, 16]), label="group"),
        num_kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 4)),
        value_dim=draw(st.integers(1, 4)),
        compress_block=block,
        compress_stride=stride,
        select_block=block + stride * draw(st.integers(0, 3)),
        num_selected=max(1, initial + local + draw(st.integers(0, 3))),
        num_initial=initial,
        num_local=local,
        window=draw(st.integers(1, 20)),
        scale=draw(st.sampled_from([None, 0.7])),
        compression=draw(st.sampled_from(["mlp", "linear", "mean"])),
        rope_theta=None,
    )
    config = draw(st.just(config) | with_selection_options(config))
    if packed:
        lengths = draw(
            st.lists(st.just(0) | st.integers(1, 30), min_size=1, max_size=5).filter(any)
        )
    else:
        lengths = [draw(st.integers(1, 60))]
    return Case(
        config=config,
        lengths=tuple(lengths),
        batch=1 if packed else draw(st.integers(1, 2), label="batch"),
        packed=packed,
        surplus=draw(st.integers(0, 3)) if packed else 0,
        width=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
