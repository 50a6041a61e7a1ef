"""Shapes, dtypes and devices are checked always, and the message says what was expected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa import (
    BackendUnavailable,
    ConfigError,
    NSAttention,
    Resolution,
    SettingsError,
    resolve,
    use_settings,
)
from nsa.testing import Inputs
from tests.support.entries import (
    CONFIG,
    DIM,
    PACKED,
    REGULAR,
    attention,
    changed,
    refused,
    selection,
)


def longer(x: Tensor, dim: int) -> Tensor:
    return torch.cat([x, x.narrow(dim, 0, 1)], dim)


# Shapes


@pytest.mark.parametrize(
    ("name", "dim"),
    [(name, dim) for name in Inputs.NAMES for dim in range(4) if (name, dim // 2) != ("q", 0)],
)
@pytest.mark.parametrize("inputs", [REGULAR, PACKED], ids=["regular", "packed"])
def test_every_size_of_every_argument(inputs: Inputs, name: str, dim: int) -> None:
    """B and T of q are free: there the others no longer fit."""
    bad = changed(inputs, name, lambda x: longer(x, dim))
    if inputs is PACKED and dim == 1 and name.startswith("compressed"):
        other = "compressed.v: expected [1, "  # rows may be surplus, but k and v have as many
        with refused(other):
            attention(bad)
    else:
        with refused(f"{name}: expected "):
            attention(bad)


@pytest.mark.parametrize("dim", [0, 1])
def test_q_of_another_batch_or_length(dim: int) -> None:
    with refused("compressed.k: expected "):
        attention(changed(REGULAR, "q", lambda x: x.narrow(dim, 0, 1)))


@pytest.mark.parametrize("name", Inputs.NAMES)
def test_a_missing_dimension(name: str) -> None:
    with refused(f"{name}: expected ["):
        attention(changed(REGULAR, name, lambda x: x[0]))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[..., :7], "[B, T, 4, 8] (B, T, num_heads, head_dim), got [2, 11, 4, 7]"),
        (
            "compressed.k",
            lambda x: x[:, 1:],
            "4 compressed blocks for T=11 (N = (T - 4)//2 + 1, 0 if T < 4), got 3",
        ),
        ("compressed.v", lambda x: x[..., 1:], "[2, 4, 2, 6], got [2, 4, 2, 5]"),
        ("selected.k", lambda x: x[:, 1:], "[2, 11, 2, 8], got [2, 10, 2, 8]"),
        ("window.v", lambda x: x.repeat(1, 1, 2, 1), "[2, 11, 2, 6], got [2, 11, 4, 6]"),
        ("gates", lambda x: x[..., :2], "[2, 11, 4, 3], got [2, 11, 4, 2]"),
    ],
)
def test_the_shape_expected_is_told(
    name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    with refused(f"{name}: expected {message}"):
        attention(changed(REGULAR, name, change))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[:, :, 1:], "q: expected [B, T, 4, 8]"),
        ("compressed.k", lambda x: x[:, 1:], "k_cmp: expected 4 compressed blocks for T=11"),
        ("compressed.k", lambda x: x[..., 1:], "k_cmp: expected [2, 4, 2, 8], got [2, 4, 2, 7]"),
        ("compressed.k", lambda x: x.double(), "k_cmp: expected q's dtype torch.float32"),
        ("compressed.k", lambda x: x.to("meta"), "k_cmp: expected q's device cpu, got meta"),
    ],
)
def test_select_blocks_checks_both_arguments(
    name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    with refused(message):
        selection(changed(REGULAR, name, change))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 11, 13), "[B, T, 12], got [2, 11, 13]"),
        (torch.zeros(11, 12), "[B, T, 12], got [11, 12]"),
        (torch.zeros(1, 2, 11, 12), "[B, T, 12], got [1, 2, 11, 12]"),
        (torch.zeros(2, 11, 12, device="meta"), "the layer's device cpu, got meta"),
        (torch.zeros(2, 11, 12).double(), "the layer's dtype torch.float32, got torch.float64"),
        (torch.zeros(2, 11, 12).bfloat16(), "the layer's dtype torch.float32, got torch.bfloat16"),
        (torch.zeros(2, 11, 12).int(), "float16, bfloat16, float32 or float64, got torch.int32"),
    ],
)
def test_the_layer_checks_its_input(x: Tensor, message: str) -> None:
    with refused(f"x: expected {message}"):
        NSAttention(DIM, CONFIG)(x)


def test_autocast_takes_what_it_can_lower() -> None:
    module, x = NSAttention(DIM, CONFIG), torch.zeros(2, 11, DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert module(x.to(dtype)).dtype == torch.bfloat16
        with refused("x: expected the layer's dtype torch.float32, got torch.float64"):
            module(x.double())


# Types and devices


@pytest.mark.parametrize("name", Inputs.NAMES[1:-1])
def test_keys_and_values_have_the_dtype_of_q(name: str) -> None:
    with refused(f"{name}: expected q's dtype torch.float32, got torch.bfloat16"):
        attention(changed(REGULAR, name, lambda x: x.bfloat16()))


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_q_is_a_float(dtype: torch.dtype) -> None:
    with refused(f"q: expected float16, bfloat16, float32 or float64, got {dtype}"):
        attention(changed(REGULAR, "q", lambda x: x.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gates_have_the_dtype_of_q_or_fp32(dtype: torch.dtype) -> None:
    inputs = REGULAR.cast(dtype)
    for gates in (dtype, torch.float32):
        assert attention(changed(inputs, "gates", lambda x: x.to(gates))).dtype == dtype  # noqa: B023
    other = torch.bfloat16 if dtype != torch.bfloat16 else torch.float16
    with refused(f"gates: expected q's dtype {dtype} or float32, got {other}"):
        attention(changed(inputs, "gates", lambda x: x.to(other)))


@pytest.mark.parametrize("name", Inputs.NAMES[1:])
def test_everything_is_where_q_is(name: str) -> None:
    with refused(f"{name}: expected q's device cpu, got meta"):
        attention(changed(REGULAR, name, lambda x: x.to("meta")))


def test_q_alone_is_elsewhere() -> None:
    with refused("compressed.k: expected q's device meta, got cpu"):
        attention(changed(REGULAR, "q", lambda x: x.to("meta")))


# What is no tensor, no pair, no configuration


@pytest.mark.parametrize("name", Inputs.NAMES)
def test_every_argument_is_a_tensor(name: str) -> None:
    for value in (None, 3, REGULAR.q.tolist()):
        with refused(f"{name}: expected a tensor, got {type(value).__name__}"):
            attention(changed(REGULAR, name, lambda x: value))  # noqa: B023


@pytest.mark.parametrize("name", ["cu_seqlens", "block_idx"])
def test_every_optional_argument_is_a_tensor(name: str) -> None:
    with refused(f"{name}: expected a tensor, got list"):
        attention(replace(PACKED, **{name: [0, 5, 5, 11]}))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: x.to_sparse(), "sparse_coo"),
        (lambda x: x.to_mkldnn(), "_mkldnn"),
        (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), "nested"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_every_tensor_is_dense(change: Callable[[Tensor], Tensor], told: str) -> None:
    for name in Inputs.NAMES:
        message = f"{name}: expected a dense tensor, got a {told} one; use {name}.to_dense()"
        with refused(message):
            attention(changed(REGULAR, name, change))
    with refused(f"x: expected a dense tensor, got a {told} one"):
        NSAttention(DIM, CONFIG)(change(torch.zeros(2, 11, DIM)))


@pytest.mark.parametrize("name", ["compressed", "selected", "window"])
def test_keys_and_values_are_a_pair(name: str) -> None:
    kv = getattr(REGULAR, name)
    for value, told in ((None, "NoneType"), (kv.k, "Tensor"), ((*kv, kv.k), "tuple of 3")):
        with refused(f"{name}: expected KV(k, v), got {told}"):
            attention(replace(REGULAR, **{name: value}))


@pytest.mark.parametrize("value", [None, {"num_heads": 4}])
def test_a_configuration_is_one(value: object) -> None:
    message = f"config: expected an NSAConfig, got {value}"
    with refused(message, ConfigError):
        attention(replace(REGULAR, config=value))
    with refused(message, ConfigError):
        selection(replace(REGULAR, config=value))
    with refused(message, ConfigError):
        NSAttention(DIM, value)
    with refused(message, ConfigError):
        resolved(config=value)


def resolved(**changes: object) -> Resolution:
    given = {"config": CONFIG, "device": "cpu", "dtype": torch.float32, "length": 9}
    return resolve(**{**given, "packed": False, "needs_grad": False, **changes})


@pytest.mark.parametrize("value", [[], {}, 3, torch.zeros(2)])
def test_a_backend_is_a_name(value: object) -> None:
    message = "backend: expected one of the known names, got "
    for entry in (attention, selection):
        with refused(message, SettingsError):
            entry(REGULAR, backend=value)
    with refused(message, SettingsError):
        resolved(backend=value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "gpu"}, "device: expected a device such as 'cpu', got 'gpu'; torch says: "),
        ({"dtype": "fp32"}, "dtype: expected a dtype of torch, got 'fp32'"),
        ({"length": -1}, "length: expected an int >= 0, got -1"),
        ({"packed": None}, "packed: expected True or False, got None"),
        ({"needs_grad": 1}, "needs_grad: expected True or False, got 1"),
        ({"settings": {}}, "settings: expected Settings, got {}"),
    ],
)
def test_resolve_checks_its_arguments(changes: dict[str, object], message: str) -> None:
    with refused(message, ConfigError):
        resolved(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "gpu"}, "device: expected a device such as 'cpu', got 'gpu'; torch says: "),
        ({"device": "xla:7"}, "device: expected one that this torch and machine have, got 'xla:7'"),
        ({"dtype": torch.int32}, "dtype: expected float16, bfloat16, float32 or float64 of torch"),
        ({"dim": 2**24 + 1}, "dim: expected at most 16777216, got 16777217"),
    ],
)
def test_the_layer_checks_where_its_parameters_go(changes: dict[str, object], message: str) -> None:
    with refused(message, ConfigError):
        NSAttention(**{"dim": DIM, "config": CONFIG, **changes})


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("inputs", [REGULAR, PACKED], ids=["regular", "packed"])
def test_shapes_come_from_the_meta_device(inputs: Inputs, check: bool) -> None:
    """Forward and backward, and lists; there are no values to check."""
    leaves = tuple(x.detach().to("meta").requires_grad_() for x in inputs.leaves())
    cu_seqlens = None if inputs.cu_seqlens is None else inputs.cu_seqlens.to("meta")
    meta = replace(inputs.with_leaves(leaves), cu_seqlens=cu_seqlens)
    with use_settings(check=check):
        out, blocks = attention(meta), selection(meta)
        layer = NSAttention(DIM, CONFIG, device="meta")
    assert (out.device.type, out.shape) == ("meta", attention(inputs).shape)
    assert (blocks.device.type, blocks.shape) == ("meta", selection(inputs).shape)
    for x, dx in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert x.shape == dx.shape
    x = torch.zeros(*inputs.q.shape[:2], DIM, device="meta")
    assert layer(x, cu_seqlens=cu_seqlens).shape == x.shape


def test_the_oracle_reads_packed_sequences() -> None:
    leaves = tuple(x.detach().to("meta") for x in PACKED.leaves())
    meta = replace(PACKED.with_leaves(leaves), cu_seqlens=PACKED.cu_seqlens.to("meta"))
    with pytest.raises(BackendUnavailable, match="reads cu_seqlens, which has no values on the"):
        attention(meta, "reference")
