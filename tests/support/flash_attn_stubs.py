"""Stand-ins for the ``flash_attn`` package, put on disk as pip would put them.

They are imported by Python's own machinery and found by their distribution's metadata.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nsa import BackendUnavailable
from nsa.backends.fa2.providers import provider

RIGHT = '''
"""FlashAttention-2's private interface, with its signatures, on plain PyTorch."""

from nsa.backends.fa2.calls import Call
from nsa.backends.fa2.math_provider import Math

INF = float("inf")


def _call(softmax_scale, causal, left, right, cu_q, cu_k, max_q, max_k):
    assert right == (0 if causal else -1)
    window = None if left < 0 else left + 1
    packing = dict(cu_q=cu_q, cu_k=cu_k, max_q=max_q, max_k=max_k)
    return Call(scale=softmax_scale, causal=causal, window=window, **packing)


def _forward(q, k, v, call):
    out, lse = Math().forward(q, k, v, call)
    return out, lse.masked_fill(lse == -INF, INF).transpose(-1, -2).contiguous(), None, None


def _backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, call):
    lse = softmax_lse.transpose(-1, -2)
    lse = lse.masked_fill(lse == INF, -INF)
    grads = Math().backward(dout, q, k, v, out, lse, call)
    for to, grad in zip((dq, dk, dv), grads):
        to.copy_(grad)


def _flash_attn_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
    alibi_slopes, return_softmax,
):
    packing = (None, None, q.shape[1], k.shape[1])
    return _forward(
        q, k, v, _call(softmax_scale, causal, window_size_left, window_size_right, *packing)
    )


def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
    causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
    return_softmax=False,
):
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _forward(
        q, k, v, _call(softmax_scale, causal, window_size_left, window_size_right, *packing)
    )


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
    window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):
    packing = (None, None, q.shape[1], k.shape[1])
    call = _call(softmax_scale, causal, window_size_left, window_size_right, *packing)
    _backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, call)


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
    alibi_slopes, deterministic, rng_state=None,
):
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    call = _call(softmax_scale, causal, window_size_left, window_size_right, *packing)
    _backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, call)
'''


def _spoiled(name: str, result: str) -> str:
    """A right interface of which one function returns something else."""
    return f"{RIGHT}\n_right = {name}\ndef {name}(*args, **kw):\n    {result}\n"


WRONG_OUT = _spoiled(
    "_flash_attn_forward", "out, *rest = _right(*args, **kw); return out * 1.05, *rest"
)
NOT_A_NUMBER = _spoiled(
    "_flash_attn_forward", "out, *rest = _right(*args, **kw); return out * float('nan'), *rest"
)
WRONG_LSE = _spoiled(
    "_flash_attn_forward", "out, lse, *rest = _right(*args, **kw); return out, lse * 1.4427, *rest"
)
WRONG_PACKED = _spoiled(
    "_flash_attn_varlen_forward", "out, *rest = _right(*args, **kw); return out * INF, *rest"
)
WRONG_BACKWARD = _spoiled("_backward", "args[6].zero_()")
NO_KERNEL = _spoiled(
    "_flash_attn_forward", "raise RuntimeError('CUDA error: no kernel image is available')"
)
OLD_SIGNATURE = f"{RIGHT}\ndef _flash_attn_forward(q, k, v, dropout_p, window_size):\n    pass\n"
NOT_DETERMINISTIC = RIGHT.replace(" deterministic,", "")
IMPORT_ERROR = "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E')\n"
OS_ERROR = "raise OSError('libcudart.so.12: cannot open shared object file')\n"
RUNTIME_ERROR = "raise RuntimeError('no good,\\nreally')\n"


def put(
    folder: Path, interface: str | None, distribution: str | None, version: str = "2.8.3"
) -> None:
    """Writes a ``flash_attn`` folder with that interface, and the distribution's metadata."""
    package = folder / "flash_attn"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    if interface is not None:
        (package / "flash_attn_interface.py").write_text(interface)
    if distribution is not None:
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata)


def refusal(name: str = "flash_attn") -> str:
    """Why the provider of that name is refused on a CPU."""
    with pytest.raises(BackendUnavailable) as caught:
        provider(name, torch.device("cpu"))
    return str(caught.value)
