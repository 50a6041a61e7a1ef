"""Malformed calls of everything public: an error of ours, or the right result; nothing else.

A number makes a call: ``attempt(number)`` repeats it. Python's own TypeError stands for a keyword
that is unknown or missing.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nsa import (
    KV,
    NSAConfig,
    NSAError,
    NSAttention,
    Settings,
    nsa_attention,
    resolve,
    select_blocks,
    use_settings,
)
from nsa.models import GenerationConfig, LanguageModel, ModelConfig, generate
from nsa.registry import names
from nsa.settings import FLAGS, current_settings
from nsa.testing import Inputs, make_inputs, random_blocks
from tests.support.entries import CONFIG, DIM

JUNK: tuple[Any, ...] = (
    *(None, True, 0, -1, 3, 2**31, 2**63, 10**30, 10**5000, -(10**400)),
    *(1.5, 0.0, float("nan"), float("-inf"), 1e-300, 1e300, 1j),
    *("", "sdpa", "reference", "mlp", "meta", "cuda:99", "x" * 10_000, "\0", b"sdpa"),
    *([], {}, (), set(), [1, 2], {"k": 1}, (None, None), object(), len, int, range(3)),
    *(torch.float32, torch.int8, torch.device("meta"), torch.strided),
    *(np.zeros(3), np.float64(0.5), np.int64(4), torch.zeros(()), torch.zeros(3), torch.zeros(0)),
    *(CONFIG, Settings(), ModelConfig.preset("tiny"), Ellipsis, NotImplemented, NSAConfig),
)
MODEL = ModelConfig(dim=DIM, num_layers=1, nsa=CONFIG, vocab_size=30)
GEOMETRY = tuple(field.name for field in fields(NSAConfig))


def _spoil(rng: random.Random, x: Tensor) -> Any:
    """A tensor that is another in one way."""
    changes: tuple[Callable[[Tensor], Any], ...] = (
        lambda x: x.to(rng.choice([torch.float64, torch.bfloat16, torch.int32, torch.bool])),
        lambda x: x.to(rng.choice([torch.complex64, torch.float8_e4m3fn, torch.uint8])),
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
        lambda x: x.float().to_mkldnn(),
        lambda x: torch.nested.nested_tensor([y.float() for y in x]),
        lambda x: torch.nested.nested_tensor([y.float() for y in x], layout=torch.jagged),
        lambda x: x[None],
        lambda x: x[0],
        lambda x: x[:0],
        lambda x: x[..., 1:],
        lambda x: torch.cat([x, x], rng.randrange(x.dim())),
        lambda x: x.transpose(0, -1),
        lambda x: x.mT.contiguous().mT,
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: [x],
        lambda x: x.detach().float().requires_grad_(),
        lambda x: x.flip(0),
        lambda x: x + 1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of prototypes
        try:
            return rng.choice(changes)(x)
        except (RuntimeError, IndexError, TypeError, ValueError):  # there is no such tensor
            return rng.choice(JUNK)


def _change(rng: random.Random, value: Any) -> Any:
    if isinstance(value, Tensor) and rng.random() < 0.7:
        return _spoil(rng, value)
    if isinstance(value, KV) and rng.random() < 0.7:
        k, v = value
        parts = [(k, _spoil(rng, v)), (_spoil(rng, k), v), (k,), (k, v, v), (v, k), [k, v], k]
        return rng.choice([*parts, KV(_spoil(rng, k), v), KV(k, rng.choice(JUNK))])
    if isinstance(value, NSAConfig) and rng.random() < 0.7:
        change = {rng.choice(GEOMETRY): rng.choice([0, 1, 2, 6, 12, 600, 2**31 - 2, -0.5, None])}
        try:
            return replace(value, **change)
        except NSAError:
            return value
    return rng.choice(JUNK)


def _malform(rng: random.Random, arguments: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Up to two arguments made other ones, and whether Python may refuse the call itself."""
    arguments = dict(arguments)
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        name = rng.choice([*arguments])
        arguments[name] = _change(rng, arguments[name])
    if rng.random() < 0.05:
        arguments.pop(rng.choice([*arguments]))
        return arguments, True
    if rng.random() < 0.05:
        return {**arguments, "unknown": 1}, True
    return arguments, False


def _problem(rng: random.Random) -> Inputs:
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    if rng.random() < 0.5:
        length = rng.choice([0, 1, 5, 11, 40])
        x = make_inputs(CONFIG, length=length, batch=rng.choice([1, 2]), dtype=dtype)
    else:
        x = make_inputs(CONFIG, lengths=rng.choice([(5, 0, 6), (0,), (30, 9)]), dtype=dtype)
    blocks = random_blocks(x, rng.choice([1, 3, 200])) if rng.random() < 0.4 else None
    if blocks is not None and rng.random() < 0.3:
        blocks = blocks.flip(-1)  # any order does
    x = x.with_leaves(tuple(y.detach() for y in x.leaves()))
    return replace(x, block_idx=blocks)


def _close(got: Any, want: Any) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert got.device == want.device
    if not got.is_meta:
        loose = {"rtol": 0.1, "atol": 0.1} if got.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(got, want, equal_nan=True, **loose)


def _backend(rng: random.Random) -> str | None:
    return rng.choice([None, "sdpa", "sdpa", *names()])


def attention(rng: random.Random) -> tuple[Callable[..., Any], dict[str, Any], Any]:
    x = _problem(rng)
    kvs = {"compressed": x.compressed, "selected": x.selected, "window": x.window}
    packing = {"cu_seqlens": x.cu_seqlens, "max_seqlen": x.max_seqlen}
    given = {"q": x.q, **kvs, "gates": x.gates, "config": x.config, **packing}
    given |= {"block_idx": x.block_idx, "backend": _backend(rng)}

    def right(out: Tensor, **called: Any) -> None:
        if out.is_meta:
            assert out.shape == (*called["q"].shape[:3], called["config"].dv)
        elif not (called["config"].num_selected > 10**6):  # the oracle walks over every slot
            _close(out, nsa_attention(**called | {"backend": "reference"}))

    return nsa_attention, given, right


def selection(rng: random.Random) -> tuple[Callable[..., Any], dict[str, Any], Any]:
    x = _problem(rng)
    given = {"q": x.q, "k_cmp": x.compressed.k, "config": x.config, "backend": _backend(rng)}
    given |= {"cu_seqlens": x.cu_seqlens, "max_seqlen": x.max_seqlen}

    def select(config: Any, **rest: Any) -> Tensor:
        if isinstance(config, NSAConfig) and config.num_selected > 10**6:
            config = replace(config, num_selected=10**3)  # lists are as wide as asked for
        return select_blocks(config=config, **rest)

    def right(blocks: Tensor, **called: Any) -> None:
        if not blocks.is_meta and called["q"].dtype != torch.bfloat16:
            _close(blocks, select(**called | {"backend": "reference"}))

    return select, given, right


def layer(rng: random.Random) -> tuple[Callable[..., Any], dict[str, Any], Any]:
    x = _problem(rng)
    module = NSAttention(DIM, CONFIG, backend=_backend(rng))
    given = {"x": torch.randn(*x.q.shape[:2], DIM)}
    given |= {"cu_seqlens": x.cu_seqlens, "max_seqlen": x.max_seqlen}

    def right(out: Tensor, **called: Any) -> None:
        module.backend = "reference"
        _close(out, module(**called))

    return module, given, right


def new_layer(rng: random.Random) -> tuple[Callable[..., Any], dict[str, Any], Any]:
    given = {"dim": DIM, "config": CONFIG, "backend": _backend(rng), "device": "meta"}

    def right(module: NSAttention, **called: Any) -> None:
        weight = module.q_proj.weight
        x = torch.zeros(1, 5, module.dim, dtype=weight.dtype, device=weight.device)
        try:
            assert module(x).shape == x.shape
        except NSAError:  # a backend that is none, or cannot
            assert called["backend"] is not None

    return NSAttention, given | {"dtype": torch.float32}, right


def config(rng: random.Random) -> tuple[Callable[..., Any], dict[str, Any], Any]:
    given = {name: getattr(CONFIG, name) for name in GEOMETRY}

    def right(made: NSAConfig, **called: Any) -> None:
        assert NSAConfig.from_key(made.key) == made
        x = torch.zeros(1, 5, DIM, device="meta")
        assert NSAttention(DIM, made, backend="sdpa", device="meta")(x).shape == x.shape

    if rng.random() < 0.3:
        return NSAConfig.preset, {"name": "tiny", rng.choice(GEOMETRY): 2}, right
    return NSAConfig, given, right


def settings(rng: random.Random) -> tuple[Callable[..., Any], dict[str, Any], Any]:
    given = {entry.name: entry.default for entry in fields(Settings)}
    if rng.random() < 0.5:
        return Settings, given, lambda made, **called: Settings.from_key(made.key)

    def use(**changes: Any) -> Settings:
        with use_settings(**changes) as chosen:
            assert current_settings() == chosen
        return chosen

    return use, {"settings": None, **given}, lambda made, **called: Settings.from_key(made.key)


def environment(rng: random.Random) -> tuple[Callable[..., Any], dict[str, Any], Any]:
    texts = ["", "0", "1", "-1", " 1", "1e3", "9" * 5000, "10" * 9, "sdpa", "fa2-dense", "\0", "²"]
    flags = [*FLAGS, "NSA_", "NSA_BAKEND", "NSA_" + "X" * 10_000, "HOME"]
    environ = {rng.choice(flags): rng.choice(texts) for _ in range(3)}
    if rng.random() < 0.1:
        environ[rng.choice(flags)] = rng.choice(JUNK)
    return Settings.from_environ, {"environ": environ}, lambda made, **called: hash(made)


def choice(rng: random.Random) -> tuple[Callable[..., Any], dict[str, Any], Any]:
    given = {"config": CONFIG, "device": "cpu", "dtype": torch.float32, "length": 10}
    given |= {"packed": False, "needs_grad": True, "backend": _backend(rng), "settings": None}
    return resolve, given, lambda made, **called: dict(made.per_branch)["select"]


def model(rng: random.Random) -> tuple[Callable[..., Any], dict[str, Any], Any]:
    kind = rng.choice(["config", "generation", "new", "forward", "loss", "generate"])
    if kind == "config":
        given = {entry.name: getattr(MODEL, entry.name) for entry in fields(ModelConfig)}
        return ModelConfig, given, lambda made, **called: made.to_dict()
    if kind == "generation":
        defaults = {entry.name: entry.default for entry in fields(GenerationConfig)}
        return GenerationConfig, defaults, lambda made, **called: hash(made)
    if kind == "new":
        given = {"config": MODEL, "backend": _backend(rng), "device": "meta", "dtype": None}
        return LanguageModel, given, lambda made, **called: made.num_parameters()
    made = LanguageModel(MODEL, backend="sdpa")
    tokens = torch.randint(0, 30, (1, 20))
    given = {"tokens": tokens, "cu_seqlens": torch.tensor([0, 8, 20], dtype=torch.int32)}
    given |= {"max_seqlen": 12}
    if kind == "forward":
        return made, given, lambda out, tokens, **called: _shape(out, (*tokens.shape, 30))
    if kind == "loss":
        given |= {"targets": tokens.roll(-1, 1)}
        return made.loss, given, lambda out, **called: _shape(out, ())
    few = GenerationConfig(max_new_tokens=2, temperature=rng.choice([0, 1e-300, 0.8]))
    given = {"prompt": [1, 2, 3], "config": few, "context": 8, "max_length": None}
    given |= {"stop": 0, "cache": rng.random() < 0.7, "chunk": 2, "graph": None}

    def write(**called: Any) -> list[int]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of texts longer than the context
            return list(generate(made, **called))

    return write, given, lambda out, **called: [made.embedding.weight[x] for x in out]


def _shape(x: Tensor, shape: tuple[int, ...]) -> None:
    assert x.shape == shape


DRAWS = (attention, attention, selection, layer, new_layer, config, settings, environment, choice)


def attempt(number: int) -> str | None:
    """Make the call of that number; what is wrong with its end, or None."""
    rng = random.Random(number)
    torch.manual_seed(number)
    call, given, right = rng.choice((*DRAWS, model))(rng)
    given, python_may_refuse = _malform(rng, given)
    options = {"check": rng.random() < 0.5, "fa2_provider": rng.choice(["auto", "math"])}
    try:
        with use_settings(**options):
            result = call(**given)
            right(result, **given)
    except NSAError as error:
        text = str(error)
        return None if len(text) < 1000 and "\n" not in text else f"a long text: {text[:80]!r}"
    except TypeError as error:
        if python_may_refuse and "argument" in str(error):
            return None
        return f"{call}: {type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what this looks for
        return f"{call}: {type(error).__name__}: {str(error)[:200]}"
    return None


def faults(numbers: range) -> str:
    found = {number: attempt(number) for number in numbers}
    return "\n".join(f"{number}: {fault}" for number, fault in found.items() if fault)


def test_malformed_calls() -> None:
    assert not faults(range(400))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_many_malformed_calls(part: int) -> None:
    assert not faults(range(400 + 1000 * part, 1400 + 1000 * part))
