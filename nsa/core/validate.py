"""Checks of what users pass to the public functions: shapes, dtypes, devices, and index values.

Shapes, dtypes and devices are always checked. Values are read where that costs nothing (on a CPU)
and elsewhere only under ``NSA_CHECK=1``; inside a trace the latter become device-side assertions.

B batch, T query tokens, S key tokens, N compressed blocks, H query heads, K key/value heads,
D key size, V value size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nsa.config import KV, NSAConfig
from nsa.core.dtypes import autocast_dtype
from nsa.core.inputs import BRANCHES, AttentionInputs
from nsa.core.packing import block_offsets, packed_blocks
from nsa.errors import LINE, ConfigError, DataError, ShapeError, require, show

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, x: object) -> None:
    """x is a dense tensor; every tensor argument comes through here before it is looked at."""
    if not isinstance(x, Tensor):
        raise ShapeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise ShapeError(
            f"{name}: expected a dense tensor, got a {layout} one; use {name}.to_dense(), "
            "or pack sequences and pass cu_seqlens"
        )


def as_kv(name: str, pair: object) -> KV:
    """Keys and values, of a :class:`KV` or another pair."""
    if isinstance(pair, KV):
        return pair
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        return KV(*pair)
    length = f" of {len(pair)}" if isinstance(pair, (tuple, list)) else ""
    raise ShapeError(f"{name}: expected KV(k, v), got {type(pair).__name__}{length}")


def check_config(config: object) -> None:
    """config is one; a dictionary of values is none."""
    if not isinstance(config, NSAConfig):
        raise ConfigError(f"config: expected an NSAConfig, got {show(config)}")


def as_device(device: torch.device | str | int) -> torch.device:
    """What torch takes for a device; a GPU by number must be there, if any GPU is."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        told = str(error).partition("\n")[0][:LINE]
        raise ConfigError(
            f"device: expected a device such as 'cpu', got {show(device)}; torch says: {told}"
        ) from None
    if found.type == "cuda" and found.index and torch.cuda.is_available():
        last = torch.cuda.device_count() - 1
        require(found.index <= last, "device", f"cuda:0 … cuda:{last}", str(found))
    return found


def check_factory(device: torch.device | str | int | None, dtype: torch.dtype | None) -> None:
    """Parameters can be made there, in that dtype; None is torch's default."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in _DTYPES):
        names = "float16, bfloat16, float32 or float64 of torch, or None"
        raise ConfigError(f"dtype: expected {names}, got {show(dtype)}")
    if device is None:
        return
    try:
        torch.empty(0, device=as_device(device))
    except (RuntimeError, AssertionError) as error:
        told = str(error).partition("\n")[0][:LINE]
        raise ConfigError(
            f"device: expected one that this torch and machine have, got {show(device)}; "
            f"torch says: {told}"
        ) from None


def check_layer_input(x: Tensor, dim: int, weight: Tensor | None) -> None:
    """x is ``[B, T, dim]`` where the layer's weights are, if it has any, in a dtype that they can
    be used with."""
    check_tensor("x", x)
    if x.dim() != 3 or x.shape[-1] != dim:
        raise ShapeError(f"x: expected [B, T, {dim}], got {list(x.shape)}")
    if x.dtype not in _DTYPES:
        raise ShapeError(f"x: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if weight is None:
        return
    check_device("x", x, weight, "the layer's device")
    if x.dtype == weight.dtype or weight.dtype not in _DTYPES:  # quantised weights take any
        return
    if x.dtype == torch.float64 or autocast_dtype(x.device) is None:
        raise ShapeError(f"x: expected the layer's dtype {weight.dtype}, got {x.dtype}")


def check_angles(cos: Tensor, sin: Tensor, x: Tensor, config: NSAConfig) -> None:
    """Cosines and sines for every token of x ``[B, T, dim]``, a row or one for all."""
    one_row = (x.shape[1], 1, config.head_dim // 2)
    for name, given in (("cos", cos), ("sin", sin)):
        check_tensor(f"angles.{name}", given)
        if given.shape not in (one_row, (x.shape[0], *one_row)):
            raise ShapeError(
                f"angles.{name}: expected {list(one_row)} or {[x.shape[0], *one_row]}, "
                f"got {list(given.shape)}"
            )
        check_device(f"angles.{name}", given, x, "x's device")


def check_inputs(inputs: AttentionInputs, config: NSAConfig, *, check: bool) -> AttentionInputs:
    """Everything that is checked before a backend sees the inputs, which are returned."""
    q, cu_seqlens = inputs.q, inputs.cu_seqlens
    check_query(q, config)
    check = check and not q.is_meta
    max_seqlen = check_packing(q, cu_seqlens, inputs.max_seqlen, check=check)
    k_cmp, v_cmp = inputs.compressed
    check_compressed("compressed.k", k_cmp, q, config, cu_seqlens, check=check)
    check_compressed("compressed.v", v_cmp, q, config, cu_seqlens, check=check)
    if k_cmp.shape[1] != v_cmp.shape[1]:
        check_like_query("compressed.v", v_cmp, q, (1, k_cmp.shape[1], None, None))
    check_kv("selected", inputs.selected, q, config, inputs.q_start)
    check_kv("window", inputs.window, q, config, inputs.q_start)
    check_gates(inputs.gates, q)
    if inputs.block_idx is not None:
        check_block_idx(inputs.block_idx, q, config, cu_seqlens, check=check)
    if check:
        check_values(inputs, config)
    return inputs if max_seqlen is None else inputs._replace(max_seqlen=max_seqlen)


def check_values(inputs: AttentionInputs, config: NSAConfig) -> None:
    """Every input is finite (``NSA_CHECK=1`` only)."""
    named = {"q": inputs.q, "gates": inputs.gates}
    for branch in BRANCHES:
        for part, x in zip("kv", getattr(inputs, branch), strict=True):
            if branch == "compressed":
                x = without_surplus(x, config, inputs.cu_seqlens)  # noqa: PLW2901
            named[f"{branch}.{part}"] = x
    check_finite(named)


def check_query(q: Tensor, config: NSAConfig) -> None:
    """q is ``[B, T, H, D]`` in a float dtype."""
    check_config(config)
    check_tensor("q", q)
    if q.dim() != 4 or q.shape[2:] != (config.num_heads, config.head_dim):
        raise ShapeError(
            f"q: expected [B, T, {config.num_heads}, {config.head_dim}] "
            f"(B, T, num_heads, head_dim), got {list(q.shape)}"
        )
    if q.dtype not in _DTYPES:
        raise ShapeError(f"q: expected float16, bfloat16, float32 or float64, got {q.dtype}")


def check_like_query(name: str, x: Tensor, q: Tensor, shape: tuple[int | None, ...]) -> None:
    """x has q's device and dtype, and the shape given (None: any size)."""
    check_tensor(name, x)
    fits = x.dim() == len(shape) and all(
        want is None or want == got for want, got in zip(shape, x.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ShapeError(f"{name}: expected [{wanted}], got {list(x.shape)}")
    if x.dtype != q.dtype:
        raise ShapeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
    check_device(name, x, q)


def check_device(name: str, x: Tensor, q: Tensor, what: str = "q's device") -> None:
    """x is where q is."""
    if x.device != q.device:
        raise ShapeError(f"{name}: expected {what} {q.device}, got {x.device}")


def check_compressed(
    name: str, x: Tensor, q: Tensor, config: NSAConfig, cu_seqlens: Tensor | None, *, check: bool
) -> None:
    """φ's output: exactly N rows for a regular batch, enough of them for a packed one."""
    check_tensor(name, x)
    size = config.dv if name.endswith(".v") else config.head_dim
    if cu_seqlens is not None:
        check_like_query(name, x, q, (1, None, config.num_kv_heads, size))
        if x.shape[1] < q.shape[1] // config.compress_stride:  # which is always enough
            _check_compressed_rows(name, x, config, cu_seqlens, check=check)
        return
    rows = config.num_compressed(q.shape[1])
    if x.dim() == 4 and x.shape[1] != rows:
        raise ShapeError(
            f"{name}: expected {rows} compressed blocks for T={q.shape[1]} "
            f"(N = (T - {config.compress_block})//{config.compress_stride} + 1, 0 if T < "
            f"{config.compress_block}), got {x.shape[1]}"
        )
    check_like_query(name, x, q, (q.shape[0], rows, config.num_kv_heads, size))


def _check_compressed_rows(
    name: str, x: Tensor, config: NSAConfig, cu_seqlens: Tensor, *, check: bool
) -> None:
    if not (cu_seqlens.device.type == "cpu" or check):
        return
    needed = block_offsets(cu_seqlens, config)[-1]
    if torch.compiler.is_compiling():
        if check:
            torch._assert_async(needed <= x.shape[1])
    elif int(needed) > x.shape[1]:
        raise ShapeError(
            f"{name}: expected at least {int(needed)} compressed blocks for these sequences "
            f"(total // {config.compress_stride} are always enough), got {x.shape[1]}"
        )


def check_kv(name: str, kv: KV, q: Tensor, config: NSAConfig, q_start: int = 0) -> None:
    """Token keys and values, from position 0 up to q's last row."""
    lead = (q.shape[0], q_start + q.shape[1], config.num_kv_heads)
    check_like_query(f"{name}.k", kv.k, q, (*lead, config.head_dim))
    check_like_query(f"{name}.v", kv.v, q, (*lead, config.dv))


def check_gates(gates: Tensor, q: Tensor) -> None:
    """gates are ``[B, T, H, 3]`` in q's dtype or fp32."""
    check_tensor("gates", gates)
    expected = (*q.shape[:3], 3)
    if tuple(gates.shape) != expected:
        raise ShapeError(f"gates: expected {list(expected)}, got {list(gates.shape)}")
    if gates.dtype not in (q.dtype, torch.float32):
        raise ShapeError(f"gates: expected q's dtype {q.dtype} or float32, got {gates.dtype}")
    check_device("gates", gates, q)


def check_packing(
    x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, *, check: bool
) -> int | None:
    """``cu_seqlens`` is int32 ``[n_seq + 1]``, from 0 up to the total of x ``[1, total, …]``.

    Returns:
        the bound ``max_seqlen``, or the total if that is lower; None where no bound is given.
    """
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ShapeError(
                f"max_seqlen: expected None without cu_seqlens, got {show(max_seqlen)}; "
                "pass cu_seqlens as well, or neither"
            )
        return None
    check_tensor("cu_seqlens", cu_seqlens)
    if x.shape[0] != 1:
        raise ShapeError(
            f"cu_seqlens: expected packed input [1, total, ...], got batch size {x.shape[0]}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ShapeError(
            f"cu_seqlens: expected shape [n_seq + 1], n_seq >= 1, got {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.dtype != torch.int32:
        raise ShapeError(
            f"cu_seqlens: expected int32, got {cu_seqlens.dtype}; use cu_seqlens.to(torch.int32)"
        )
    check_device("cu_seqlens", cu_seqlens, x, "device")
    if max_seqlen is not None:
        if not isinstance(max_seqlen, (int, torch.SymInt)) or isinstance(max_seqlen, bool):
            raise ShapeError(
                f"max_seqlen: expected an int, got {type(max_seqlen).__name__}; a tensor would "
                "have to be read back from the device"
            )
        if max_seqlen < 0:
            raise ShapeError(f"max_seqlen: expected >= 0, got {show(max_seqlen)}")
    if cu_seqlens.device.type == "cpu" or check:
        _check_packing_values(x.shape[1], cu_seqlens, max_seqlen, check=check)
    # not torch.sym_min, which Dynamo of torch 2.11 does not take of two plain numbers
    return None if max_seqlen is None else min(max_seqlen, x.shape[1])


def _check_packing_values(
    total: int, cu_seqlens: Tensor, max_seqlen: int | None, *, check: bool
) -> None:
    lengths = cu_seqlens.diff()
    longest = total if max_seqlen is None else max_seqlen
    if torch.compiler.is_compiling():
        if check:
            torch._assert_async(cu_seqlens[0] == 0)
            torch._assert_async(cu_seqlens[-1] == total)
            torch._assert_async((lengths >= 0).all())
            torch._assert_async((lengths <= longest).all())
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0:
        raise ShapeError(f"cu_seqlens: expected the first value to be 0, got {first}")
    if bool((lengths < 0).any()):
        raise ShapeError(
            f"cu_seqlens: expected values that never decrease, got {_short(cu_seqlens)}"
        )
    if last != total:
        raise ShapeError(f"cu_seqlens: expected the last value to be the total {total}, got {last}")
    if int(lengths.max()) > longest:
        raise ShapeError(
            f"max_seqlen: expected at least the longest sequence, {int(lengths.max())}, "
            f"got {longest}"
        )


def check_block_idx(
    block_idx: Tensor, q: Tensor, config: NSAConfig, cu_seqlens: Tensor | None, *, check: bool
) -> None:
    """``block_idx`` is int32 ``[B, T, K, width]``, ascending, then −1."""
    check_tensor("block_idx", block_idx)
    expected = (q.shape[0], q.shape[1], config.num_kv_heads)
    if block_idx.dim() != 4 or tuple(block_idx.shape[:3]) != expected or block_idx.shape[3] < 1:
        raise ShapeError(
            f"block_idx: expected [{', '.join(map(str, expected))}, width >= 1], "
            f"got {list(block_idx.shape)}"
        )
    if block_idx.dtype != torch.int32:
        raise ShapeError(
            f"block_idx: expected int32, got {block_idx.dtype}; use block_idx.to(torch.int32)"
        )
    check_device("block_idx", block_idx, q)
    if not check:
        return
    blocks_T = _num_blocks_at(q, config, cu_seqlens)
    in_range = (block_idx >= -1) & (block_idx < blocks_T[:, None, None])
    before, after = block_idx[..., :-1], block_idx[..., 1:]
    in_order = (after == -1) | ((before >= 0) & (after > before))
    if torch.compiler.is_compiling():
        torch._assert_async(in_range.all())
        torch._assert_async(in_order.all())
        return
    if not bool(in_range.all()):
        b, t, h, slot = (~in_range).nonzero()[0].tolist()
        raise ShapeError(
            f"block_idx: expected -1 or a block of the sequence, 0 … {int(blocks_T[t]) - 1}, "
            f"got {int(block_idx[b, t, h, slot])} at [{b}, {t}, {h}, {slot}]"
        )
    if not bool(in_order.all()):
        b, t, h, _ = (~in_order).nonzero()[0].tolist()
        raise ShapeError(
            "block_idx: expected strictly ascending blocks, then -1, got "
            f"{block_idx[b, t, h].tolist()} at [{b}, {t}, {h}]"
        )


def _num_blocks_at(q: Tensor, config: NSAConfig, cu_seqlens: Tensor | None) -> Tensor:
    """``[T]``: how many selection blocks the sequence of each token has."""
    T = q.shape[1]
    if cu_seqlens is None:
        return torch.full((T,), -(-T // config.select_block), device=q.device)
    token = torch.arange(T, device=q.device)
    seq = torch.searchsorted(cu_seqlens[1:].long(), token, right=True)
    length = cu_seqlens.long().diff()[seq.clamp_max(cu_seqlens.numel() - 2)]
    return (length + config.select_block - 1) // config.select_block


def without_surplus(x: Tensor, config: NSAConfig, cu_seqlens: Tensor | None) -> Tensor:
    """φ's output with zeros in the rows past the last block, which may hold anything."""
    if cu_seqlens is None:
        return x
    real = packed_blocks(cu_seqlens, x.shape[1], config).seq_id < cu_seqlens.numel() - 1
    return x.where(real[:, None, None], 0.0)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """No NaN and no infinity anywhere (``NSA_CHECK=1`` only)."""
    for name, x in tensors.items():
        finite = torch.isfinite(x)
        if torch.compiler.is_compiling():
            torch._assert_async(finite.all())
        elif not bool(finite.all()):
            where = (~finite).nonzero()
            raise DataError(
                f"{name}: expected finite values, got {where.shape[0]} that are "
                f"NaN or infinite, the first at {where[0].tolist()}"
            )


def _short(x: Tensor) -> str:
    values = x.tolist()
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:12]))}, …]"
