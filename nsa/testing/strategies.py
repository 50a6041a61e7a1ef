"""Hypothesis strategies over every shape the method allows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from nsa import reference
from nsa.config import NSAConfig
from nsa.testing.inputs import Inputs, make_inputs, random_blocks


@st.composite
def with_selection_options(draw: st.DrawFn, config: NSAConfig) -> NSAConfig:
    """Any of the options of selection, together as well."""
    least = max(1, config.num_initial + config.num_local)
    counts = st.integers(least, config.num_selected)
    schedule = draw(st.none() | st.dictionaries(st.integers(1, 60), counts, min_size=1, max_size=3))
    divisors = [m for m in range(1, config.select_block + 1) if config.select_block % m == 0]
    return replace(
        config,
        select_schedule=None if schedule is None else tuple(sorted(schedule.items())),
        select_mass=draw(st.none() | st.sampled_from([0.2, 0.5, 0.8, 1.0])),
        select_share=draw(st.sampled_from(divisors)),
        select_regions=draw(st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3))),
        score_dtype=draw(st.sampled_from(["input", "fp8"])),
    )


@st.composite
def configs(draw: st.DrawFn, *, max_group: int = 16) -> NSAConfig:
    """Small geometry; G from 1 to ``max_group``, Dk and Dv apart."""
    stride = draw(st.integers(1, 4), label="compress_stride")
    block = stride * draw(st.integers(1, 3))
    select = stride * draw(st.integers(block // stride, 5))
    selected = draw(st.integers(1, 5))
    initial = draw(st.integers(0, min(2, selected)))
    kv_heads = draw(st.integers(1, 3))
    group = draw(st.sampled_from([g for g in (1, 2, 3, 4, 8, 16) if g <= max_group]))
    return NSAConfig(
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 8)),
        value_dim=draw(st.none() | st.integers(1, 16)),
        compress_block=block,
        compress_stride=stride,
        select_block=select,
        num_selected=selected,
        num_initial=initial,
        num_local=draw(st.integers(0, min(3, selected - initial))),
        window=draw(st.integers(1, 40)),
        scale=draw(st.none() | st.floats(0.05, 2.0)),
        rope_theta=None,
    )


@dataclass(frozen=True, slots=True)
class Case:
    """The recipe of one problem; small and printable, so that a failure can be read."""

    config: NSAConfig
    length: int | None
    batch: int
    lengths: tuple[int, ...] | None
    width: int | None
    """Width of a random block list; None takes the list the oracle selects."""
    seed: int

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
        """The problem itself, its block list included."""
        inputs = make_inputs(
            self.config,
            length=self.length,
            batch=self.batch,
            lengths=self.lengths,
            dtype=dtype,
            device=device,
            seed=self.seed,
            surplus=self.lengths is not None,
        )
        if self.width is not None:
            return replace(inputs, block_idx=random_blocks(inputs, self.width, self.seed))
        q, k = inputs.q.detach(), inputs.compressed.k.detach()
        blocks = reference.select_blocks(q, k, self.config, inputs.cu_seqlens)
        return replace(inputs, block_idx=blocks)


@st.composite
def cases(
    draw: st.DrawFn, *, max_length: int = 100, max_group: int = 16, packed: bool | None = None
) -> Case:
    """Regular and packed problems, short ones and empty sequences included."""
    config = draw(configs(max_group=max_group))
    config = draw(st.just(config) | with_selection_options(config))
    is_packed = draw(st.booleans()) if packed is None else packed
    width = draw(st.none() | st.integers(1, 6))
    seed = draw(st.integers(0, 2**20))
    if not is_packed:
        length = draw(st.integers(1, max_length), label="T")
        batch = draw(st.integers(1, 3 if length <= max_length // 2 else 1))
        return Case(config, length, batch, None, width, seed)
    lengths = draw(st.lists(st.integers(0, max_length // 3), min_size=1, max_size=5))
    if sum(lengths) == 0:
        lengths[0] = 1
    return Case(config, None, 1, tuple(lengths), width, seed)
