"""What is done to sequences leaves each as if it had been decoded by itself."""

from dataclasses import replace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nsa import CacheError, NSACache, NSAConfig, NSAttention

DIM, LONGEST, MOST = 8, 70, 4
CONFIG = NSAConfig(
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    compress_block=4,
    compress_stride=2,
    select_block=8,
    num_selected=3,
    num_local=1,
    window=9,
)
ROWS = st.integers(0, MOST - 1)


class Decoding(RuleBasedStateMachine):
    """Each sequence's tokens are kept; a forward over all of them says what the next must give."""

    @initialize(
        pages=st.sampled_from([None, 12, 30]),
        size=st.sampled_from([8, 16]),
        share=st.sampled_from([1, 4]),
        selected_dtype=st.sampled_from([None, "e4m3"]),
        seed=st.integers(0, 9),
    )
    def start(
        self, pages: int | None, size: int, share: int, selected_dtype: str | None, seed: int
    ) -> None:
        torch.manual_seed(seed)
        config = replace(CONFIG, select_share=share)
        self.layer = NSAttention(DIM, config, backend="sdpa", dtype=torch.float64)
        self.cache = NSACache(
            config,
            num_layers=1,
            batch_size=2,
            max_length=LONGEST,
            dtype=torch.float64,
            pages=pages,
            page_size=size,
            max_crop=5,
            selected_dtype=selected_dtype,
        )
        self.tokens: list[torch.Tensor | None] = [torch.zeros(0, DIM, dtype=torch.float64)] * 2
        self.highest = [0, 0]

    def alone(self, tokens: torch.Tensor) -> torch.Tensor:
        """A fresh prefill; that it is one forward is test_layer's to show."""
        fresh = NSACache(
            self.layer.config,
            num_layers=1,
            batch_size=1,
            max_length=self.cache.max_length,
            dtype=tokens.dtype,
            selected_dtype=self.cache.selected_dtype,
        )
        with torch.no_grad():
            return self.layer(tokens[None], cache=fresh.layers[0])[0]

    @property
    def B(self) -> int:
        return len(self.tokens)

    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        uniform = data.draw(st.booleans())
        most = data.draw(st.sampled_from([1, 3, 8, 25]))
        alive = [x is not None for x in self.tokens]
        counts = [most if uniform else data.draw(st.integers(0, most)) for _ in alive]
        if not uniform:
            counts = [count if there else 0 for count, there in zip(counts, alive, strict=True)]
        x = torch.randn(self.B, most, DIM, dtype=torch.float64)
        before = self.cache.snapshot()
        try:
            with torch.no_grad():
                out = self.layer(x, cache=self.cache.layers[0], counts=None if uniform else counts)
        except CacheError:
            assert unchanged(before, self.cache.snapshot())
            return
        for b, count in enumerate(counts):
            tokens = self.tokens[b]
            if tokens is None or not count:
                continue
            self.tokens[b] = torch.cat([tokens, x[b, :count]])
            self.highest[b] = max(self.highest[b], len(self.tokens[b]))
            whole = self.alone(self.tokens[b])[-count:]
            torch.testing.assert_close(out[b, :count], whole, rtol=0, atol=1e-11)

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        lengths = [0 if x is None else len(x) for x in self.tokens]
        if None in [None if x is None else 0 for x in self.tokens]:
            return
        wanted = [
            data.draw(st.integers(max(0, length - 6), length) | st.just(0)) for length in lengths
        ]
        before = self.cache.snapshot()
        try:
            self.cache.crop(wanted)
        except CacheError:
            assert unchanged(before, self.cache.snapshot())
            back = [h - want for h, want in zip(self.highest, wanted, strict=True)]
            assert max(back) > 5  # max_crop always holds
            return
        for b, want in enumerate(wanted):
            self.tokens[b] = self.tokens[b][:want]
            if want == 0:
                self.highest[b] = 0

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        alive = [b for b, x in enumerate(self.tokens) if x is not None]
        if not alive:
            return
        rows = data.draw(st.lists(st.sampled_from(alive), min_size=1, max_size=MOST))
        self.cache.select(rows)
        self.tokens = [self.tokens[b] for b in rows]
        self.highest = [self.highest[b] for b in rows]

    @precondition(lambda self: self.B < MOST)
    @rule(row=ROWS)
    def fork(self, row: int) -> None:
        before = self.cache.snapshot()
        if row >= self.B or self.tokens[row] is None:
            try:
                self.cache.fork(row)
            except CacheError:
                assert unchanged(before, self.cache.snapshot())
                return
            raise AssertionError("a sequence that is not there was forked")
        assert self.cache.fork(row) == self.B
        self.tokens.append(self.tokens[row])
        self.highest.append(self.highest[row])

    @rule(row=ROWS)
    def free(self, row: int) -> None:
        if row < self.B and self.tokens[row] is not None:
            self.cache.free([row])
            self.tokens[row] = None

    @rule(row=ROWS)
    def reset(self, row: int) -> None:
        if row < self.B:
            self.cache.reset([row])
            self.tokens[row] = torch.zeros(0, DIM, dtype=torch.float64)
            self.highest[row] = 0

    @precondition(lambda self: self.cache.max_length < 2 * LONGEST)
    @rule(by=st.sampled_from([0, 1, 30]))
    def extend(self, by: int) -> None:
        room = self.cache.max_length + by
        self.cache.extend(room)
        assert self.cache.max_length == room

    @rule()
    def save_and_load(self) -> None:
        self.cache = NSACache.restore(self.cache.snapshot())

    @invariant()
    def pages_are_accounted_for(self) -> None:
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        lengths = [None if x is None else len(x) for x in self.tokens]
        assert cache.lengths == lengths
        assert cache.position.tolist() == [length or 0 for length in lengths]
        if cache.pages.fixed:
            return
        pages, used = cache.pages, [page for row in cache.pages.rows for page in row]
        for row, length in zip(pages.rows, lengths, strict=True):
            assert len(row) == -(-(length or 0) // pages.size)
        assert pages.free + len(set(used)) == pages.count
        assert pages._uses == [used.count(page) for page in range(pages.count)]
        for row, entries in zip(pages.rows, pages.table.tolist(), strict=True):
            assert entries == row + [pages.count] * (pages.per_sequence - len(row))


def unchanged(before: dict[str, object], after: dict[str, object]) -> bool:
    """Bit for bit."""
    kept, new = before.pop("tensors"), after.pop("tensors")
    same = all(
        torch.equal(x, y)
        for one, other in zip(kept, new, strict=True)
        for x, y in zip(one, other, strict=True)
    )
    return same and before == after


TestDecoding = Decoding.TestCase
TestDecoding.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
