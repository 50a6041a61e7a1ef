"""FlashAttention-2's sources: each that does not fit is recognised and named."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nsa import BackendUnavailable, NSAConfig, resolve, use_settings
from nsa.backends import fa2_providers
from nsa.backends.fa2_providers import Aten, Call, FlashAttn, Math, provider

CPU = torch.device("cpu")
INTERFACE = "flash_attn.flash_attn_interface"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that these distributions are installed, with this interface module."""

    def install(versions: dict[str, str], interface: object = None) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(importlib.metadata, "version", version)

        def load(name: str) -> object:
            assert name == INTERFACE
            if isinstance(interface, Exception):
                raise interface
            return interface

        monkeypatch.setattr(fa2_providers.importlib, "import_module", load)

    return install


def interface(forward: Callable[..., tuple[Tensor, ...]]) -> types.SimpleNamespace:
    """A ``flash_attn`` that computes with ``forward`` and whose backward is right."""

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        **options: object,
    ) -> None:
        lse = lse.transpose(1, 2)
        for to, grad in zip(
            (dq, dk, dv), Math().backward(dout, q, k, v, out, lse, call_of(q, options)), strict=True
        ):
            to.copy_(grad)

    return types.SimpleNamespace(_flash_attn_forward=forward, _flash_attn_backward=backward)


def call_of(q: Tensor, options: dict[str, object]) -> Call:
    left = options["window_size_left"]
    assert isinstance(left, int)
    return Call(
        scale=float(str(options["softmax_scale"])),
        causal=bool(options["causal"]),
        window=left + 1,
        max_q=q.shape[1],
        max_k=q.shape[1],
    )


def right(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    out, lse = Math().forward(q, k, v, call_of(q, options))
    return out, lse.transpose(1, 2)


def wrong(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    out, lse = right(q, k, v, **options)
    return out * 1.05, lse


def base_two(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    out, lse = right(q, k, v, **options)
    return out, lse * 1.4427


def test_a_right_package_is_accepted(installed: Callable[..., None]) -> None:
    installed({"flash-attn": "2.8.3"}, interface(right))
    found, why_not = fa2_providers._find_package()
    assert isinstance(found, FlashAttn)
    assert why_not is None
    assert fa2_providers._wrong(found, CPU) is None


@pytest.mark.parametrize(
    ("forward", "name"), [(wrong, "out: relative error 0.05"), (base_two, "lse")]
)
def test_wrong_numbers_are_named(
    installed: Callable[..., None], forward: Callable[..., tuple[Tensor, ...]], name: str
) -> None:
    installed({"flash-attn": "2.8.3"}, interface(forward))
    found, _ = fa2_providers._find_package()
    assert found is not None
    assert name in str(fa2_providers._wrong(found, CPU))
    assert "wrong numbers" in str(fa2_providers._wrong(found, CPU))


def test_a_call_that_fails_is_named() -> None:
    def fails(*tensors: Tensor, **options: object) -> tuple[Tensor, ...]:
        raise RuntimeError("no kernel image is available")

    reason = fa2_providers._wrong(FlashAttn(interface(fails)), CPU)
    assert reason == "a small call failed (RuntimeError: no kernel image is available)"


@pytest.mark.parametrize(
    "error",
    [
        ImportError("undefined symbol: _ZN3c105ErrorC2E"),
        OSError("libcudart.so.12: cannot open shared object file"),
    ],
    ids=["ImportError", "OSError"],
)
def test_a_package_that_does_not_import_is_named(
    installed: Callable[..., None], error: Exception
) -> None:
    installed({"flash-attn": "2.8.3"}, error)
    found, why_not = fa2_providers._find_package()
    assert found is None
    assert f"flash-attn 2.8.3 does not import ({type(error).__name__}: {error})" in str(why_not)
    assert "build it for torch" in str(why_not)


def test_flash_attn_4_alone_is_not_taken_for_2(installed: Callable[..., None]) -> None:
    installed({"flash-attn-4": "4.0.1"}, interface(right))
    found, why_not = fa2_providers._find_package()
    assert found is None
    assert "only flash-attn-4 4.0.1 is installed" in str(why_not)


def test_another_major_version_is_named(installed: Callable[..., None]) -> None:
    installed({"flash-attn": "3.0.0"}, interface(right))
    assert fa2_providers._find_package() == (None, "expected version 2 of flash-attn, got 3.0.0")


def test_no_package_names_the_fix(installed: Callable[..., None]) -> None:
    installed({})
    assert fa2_providers._find_package()[1] == (
        "the package is not installed: pip install flash-attn"
    )


@pytest.mark.parametrize("name", ["auto", "aten", "flash_attn"])
def test_a_cpu_is_refused(name: str) -> None:
    with pytest.raises(BackendUnavailable, match="needs a CUDA device, got cpu"):
        provider(name, CPU)


def test_math_comes_by_request_only() -> None:
    assert isinstance(provider("math", CPU), Math)
    assert Aten().name == "aten"


def ask(**changes: object) -> object:
    with use_settings(**changes):
        return resolve(
            NSAConfig.preset("tiny"),
            device="cpu",
            dtype=torch.float32,
            length=100,
            packed=False,
            needs_grad=True,
        )


def test_use_fa2_on_a_cpu_raises_with_the_reason() -> None:
    with pytest.raises(BackendUnavailable, match=r"NSA_USE_FA2=1 .* needs a CUDA device, got cpu"):
        ask(use_fa2=True)


def test_use_fa2_with_math_runs() -> None:
    resolution = ask(use_fa2=True, fa2_provider="math")
    assert resolution.backend == "fa2-dense"
    assert dict(resolution.per_branch) == {
        "compressed": "fa2-dense",
        "select": "sdpa",
        "selected": "fa2-dense",
        "window": "fa2-dense",
    }


@pytest.mark.parametrize(
    ("changes", "branch", "runs", "reason"),
    [
        ({"use_fa2_win": False}, "window", "sdpa", "NSA_USE_FA2_WIN=0"),
        ({"use_fa2_cmp": False}, "compressed", "sdpa", "NSA_USE_FA2_CMP=0"),
        ({"fa2_min_len_win": 101}, "window", "sdpa", "NSA_FA2_MIN_LEN_WIN=101"),
        ({"fa2_min_len_cmp": 101}, "compressed", "sdpa", "NSA_FA2_MIN_LEN_CMP=101"),
        ({"fa2_min_len_win": 100}, "window", "fa2-dense", ""),
        ({"fa2_min_len_win": 101, "use_fa2_win": True}, "window", "fa2-dense", ""),
    ],
)
def test_flags_send_a_branch_to_sdpa(
    changes: dict[str, object], branch: str, runs: str, reason: str
) -> None:
    resolution = ask(use_fa2=True, fa2_provider="math", **changes)
    assert resolution.per_branch[branch] == runs
    assert reason in resolution.reason
    assert sum(name == "sdpa" for name in resolution.per_branch.values()) == 1 + (runs == "sdpa")


def test_auto_never_takes_math() -> None:
    assert ask(fa2_provider="math").backend == "sdpa"


def test_nothing_of_flash_attn_is_imported_by_a_refusal() -> None:
    with pytest.raises(BackendUnavailable):
        provider("flash_attn", CPU)
    assert "flash_attn" not in sys.modules
