"""Whatever a cache refuses leaves it as it was, bit for bit; every refusal says what would do."""

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from nsa import CacheError, ConfigError, NSACache, NSAConfig, NSAError, NSAttention, ShapeError
from nsa.models import LanguageModel, ModelConfig
from tests.cache.test_layer import DIM, SMALL
from tests.cache.test_operations import unchanged


def make(config: NSAConfig = SMALL, **options: object) -> NSACache:
    given = {"num_layers": 1, "batch_size": 2, "max_length": 40, "dtype": torch.float32}
    return NSACache(config, **{**given, **options})


def call(cache: NSACache, x: torch.Tensor, **options: object) -> torch.Tensor:
    layer = NSAttention(DIM, SMALL, backend="sdpa", dtype=x.dtype)
    with torch.no_grad():
        return layer(x, cache=cache.layers[0], **options)


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, DIM, dtype=dtype)


REFUSED: dict[str, tuple[dict[str, object], Callable[[NSACache], object], str]] = {
    "another configuration": (
        {"config": replace(SMALL, window=8)},
        lambda c: call(c, x(2, 1)),
        "expected one of the layer's configuration",
    ),
    "another dtype": (
        {},
        lambda c: call(c, x(2, 1, dtype=torch.float64)),
        r"dtype torch.float32, got torch.float64",
    ),
    "another batch": ({}, lambda c: call(c, x(3, 1)), "as many sequences as it has, 2, got 3"),
    "the meta device": (
        {"device": "meta"},
        lambda c: call(c, x(2, 1)),
        "on the device as it has, meta, got cpu",
    ),
    "too long": ({}, lambda c: call(c, x(2, 41)), "at most max_length=40 tokens, got 41"),
    "a pool that runs out": (
        {"pages": 3},
        lambda c: call(c, x(2, 17)),
        r"expected 6 free pages of 8 tokens .*, got 3 of 3",
    ),
    "counts of another batch": (
        {},
        lambda c: call(c, x(2, 4), counts=[1]),
        "counts: expected 2 ints from 0 to 4",
    ),
    "counts above the input": (
        {},
        lambda c: call(c, x(2, 4), counts=[1, 5]),
        "counts: expected 2 ints from 0 to 4",
    ),
    "crop past the start": ({}, lambda c: c.crop(-1), "expected a length in 0 … 0, got -1"),
    "crop past the end": ({}, lambda c: c.crop([0, 1]), "expected a length in 0 … 0, got 1"),
    "crop of another batch": ({}, lambda c: c.crop([0]), "expected an int or 2 of them"),
    "a row that is not there": ({}, lambda c: c.select([0, 2]), "expected sequences from 0 to 1"),
    "no rows": ({}, lambda c: c.select([]), "expected one sequence or more"),
    "no cache": (
        {},
        lambda c: NSAttention(DIM, SMALL).forward(x(2, 1), cache=c),  # type: ignore[arg-type]
        r"expected a layer of an NSACache \(cache.layers\[i\]\), got NSACache",
    ),
    "gradients": (
        {},
        lambda c: NSAttention(DIM, SMALL).forward(x(2, 1), cache=c.layers[0]),
        "expected torch.no_grad",
    ),
    "counts without a cache": (
        {},
        lambda c: NSAttention(DIM, SMALL).forward(x(2, 1), counts=[1, 1]),
        "expected a layer of an NSACache",
    ),
    "packed input": (
        {},
        lambda c: call(c, x(1, 3), cu_seqlens=torch.tensor([0, 3], dtype=torch.int32)),
        "cu_seqlens: expected None with a cache",
    ),
    "a model of more layers": (
        {},
        lambda c: LanguageModel(ModelConfig.preset("tiny", num_layers=2))(
            torch.zeros(2, 1, dtype=torch.int64), cache=c
        ),
        "expected an NSACache of 2 layers, as the model has, got one of 1",
    ),
    "a snapshot of something else": (
        {},
        lambda c: NSACache.restore({"tensors": []}),
        "expected a snapshot of an NSACache, got another",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    options, act, message = REFUSED[case]
    cache = make(**options)
    before = cache.snapshot()
    with pytest.raises(NSAError, match=message) as caught:
        act(cache)
    assert isinstance(caught.value, (CacheError, ConfigError, ShapeError))
    if cache.device.type != "meta":
        assert unchanged(before, cache.snapshot())


@pytest.mark.parametrize("name", ["num_layers", "batch_size", "max_length", "page_size", "pages"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1"])
def test_what_a_cache_is_made_of(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected"):
        make(**{name: value})


def test_pages_hold_whole_blocks() -> None:
    with pytest.raises(ConfigError, match="page_size: expected a multiple of select_block=8"):
        make(page_size=12)


def test_e4m3_or_the_cache_dtype() -> None:
    with pytest.raises(ConfigError, match="selected_dtype: expected one of the known names"):
        make(selected_dtype="e5m2")


def test_a_freed_sequence() -> None:
    cache = make(pages=20)
    call(cache, x(2, 9))
    cache.free([0])
    for act in (
        lambda: cache.fork(0),
        lambda: cache.free([0]),
        lambda: cache.select([1, 0]),
        lambda: cache.crop([0, 3]),
        lambda: call(cache, x(2, 1), counts=[1, 1]),
    ):
        before = cache.snapshot()
        with pytest.raises(CacheError, match="sequence 0: expected one that was not freed"):
            act()
        assert unchanged(before, cache.snapshot())
    call(cache, x(2, 1))  # the other goes on
    assert cache.lengths == [None, 10]
    cache.free([1])
    with pytest.raises(CacheError, match="expected a sequence that was not freed, got none"):
        call(cache, x(2, 1))
    cache.reset()
    assert cache.lengths == [0, 0]


def test_crop_beyond_what_rings_hold() -> None:
    cache = make(max_length=100, max_crop=4)
    call(cache, x(2, 60))
    with pytest.raises(CacheError, match=r"sequence 0: expected at least 48 tokens to stay"):
        cache.crop(40)
    cache.crop(56)
    cache.crop([0, 56])
    assert cache.lengths == [0, 56]
    call(cache, x(2, 1))
    with pytest.raises(CacheError, match=r"sequence 1: expected at least 48 tokens to stay"):
        cache.crop([0, 47])


def test_a_call_that_failed_between_layers() -> None:
    """The tokens do not belong to any sequence, and what was overwritten is not read."""
    cache = make(num_layers=2, max_length=100)
    for layer in cache.layers:
        with torch.no_grad():
            NSAttention(DIM, SMALL, backend="sdpa")(x(2, 30), cache=layer)
    with torch.no_grad():
        NSAttention(DIM, SMALL, backend="sdpa")(x(2, 30), cache=cache.layers[0])
    assert cache.lengths == [30, 30]
    with pytest.raises(CacheError, match="a call that failed has overwritten"):
        call(cache, x(2, 1))
    cache.reset()
    call(cache, x(2, 1))


def test_a_snapshot_is_kept_as_plain_tensors() -> None:
    cache = make(pages=20)
    call(cache, x(2, 9))
    file = io.BytesIO()
    torch.save(cache.snapshot(), file)
    file.seek(0)
    again = NSACache.restore(torch.load(file, weights_only=True))
    assert unchanged(cache.snapshot(), again.snapshot())
    assert again.to("cpu").lengths == [9, 9]


def test_bytes_of_a_token() -> None:
    """Selected keys and values in full, compressed ones one in d; the rest does not grow."""
    sizes = [make(max_length=n, batch_size=1).nbytes for n in (800, 1600)]
    pair = SMALL.num_kv_heads * (SMALL.head_dim + SMALL.dv) * 4
    table = 4 / SMALL.select_block
    assert (sizes[1] - sizes[0]) / 800 == pair * (1 + 1 / SMALL.compress_stride) + table
    rings = SMALL.window + SMALL.compress_block + 2 * 16
    edges = pair * (rings + SMALL.select_block + 1 + SMALL.num_compressed(800) - 400)
    assert sizes[0] == 800 * pair * 1.5 + 800 * table + edges + 2 * 4  # position, there or freed
