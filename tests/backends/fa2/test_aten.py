"""PyTorch's own FlashAttention-2: when it is taken, and what may stand in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import attention

from nsa import BackendUnavailable, NSAConfig, Resolution, nsa_attention, resolve, use_settings
from nsa.backends.fa2 import providers as fa2_providers
from nsa.backends.fa2.math_provider import Math
from nsa.backends.fa2.providers import collect_reports, describe, provider
from nsa.testing import make_inputs
from tests.support import flash_attn_stubs as stubs
from tests.support.flash_attn_stubs import refusal

CPU = torch.device("cpu")
CONFIG = NSAConfig.preset("tiny")

torch_can_activate = pytest.mark.skipif(
    not hasattr(attention, "restore_flash_attention_impl"), reason="not in this version of torch"
)


class FakeAten(Math):
    """Right numbers under the name of torch's own kernels."""

    name = "aten"


@pytest.fixture
def aten_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(fa2_providers, "Aten", FakeAten)


@pytest.fixture
def activate() -> Iterator[Callable[[], None]]:
    """Puts an implementation called FA3 in place of torch's FA-2, by torch's own registry."""
    registry = attention._registry._FLASH_ATTENTION_IMPLS
    before = dict(registry)

    class Handle:
        def remove(self) -> None:
            pass

    attention.register_flash_attention_impl("FA3", register_fn=Handle)
    yield lambda: attention.activate_flash_attention_impl("FA3")
    attention.restore_flash_attention_impl(_raise_warn=False)
    registry.clear()
    registry.update(before)


def ask() -> Resolution:
    return resolve(
        CONFIG, device="cpu", dtype=torch.bfloat16, length=100, packed=False, needs_grad=True
    )


def test_auto_goes_past_a_broken_package(
    install: Callable[..., None], fits: None, aten_works: None
) -> None:
    install(stubs.IMPORT_ERROR)
    assert provider("auto", CPU).name == "aten"
    assert describe("auto", CPU) == f"aten (torch {torch.__version__})"
    assert [report.status for report in collect_reports(CPU)] == ["broken", "works"]
    assert "ImportError" in refusal("flash_attn")


def test_no_source_at_all_names_both(
    install: Callable[..., None], fits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(stubs.OS_ERROR)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    reports = collect_reports(CPU)
    assert [report.status for report in reports] == ["broken", "absent"]
    assert refusal("auto") == "; ".join(report.refusal for report in reports)
    assert refusal("aten") == (
        f"aten (torch {torch.__version__}): this build of torch has no FlashAttention kernels "
        "(fix: install a CUDA build of torch, see https://pytorch.org/get-started/locally)"
    )


def test_kernels_that_cannot_be_called(fits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ones have no code for a CPU."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert "a small call failed (NotImplementedError: " in refusal("aten")


@torch_can_activate
def test_another_implementation_in_place_of_torchs_own(
    fits: None, aten_works: None, activate: Callable[[], None]
) -> None:
    assert provider("aten", CPU).name == "aten"
    activate()
    assert refusal("aten") == (
        f"aten (torch {torch.__version__}): FA3 is active in place of torch's FlashAttention-2 "
        "kernels (fix: torch.nn.attention.restore_flash_attention_impl())"
    )
    assert (collect_reports(CPU)[1].status, collect_reports(CPU)[1].refusal) == (
        "not run",
        refusal("aten"),
    )
    attention.restore_flash_attention_impl()
    assert provider("aten", CPU).name == "aten"


@torch_can_activate
def test_a_package_is_not_replaced(
    install: Callable[..., None], fits: None, activate: Callable[[], None]
) -> None:
    install(stubs.RIGHT)
    activate()
    assert provider("auto", CPU).name == "flash_attn"


@torch_can_activate
def test_resolutions_notice_another_implementation(
    fits: None, aten_works: None, activate: Callable[[], None]
) -> None:
    with use_settings(use_fa2=True, fa2_provider="aten"):
        assert ask().backend == "fa2-dense"
        activate()
        with pytest.raises(BackendUnavailable, match="FA3 is active in place of"):
            ask()
        x = make_inputs(CONFIG, length=70, dtype=torch.bfloat16)
        with pytest.raises(BackendUnavailable, match="FA3 is active in place of"):
            nsa_attention(x.q, x.compressed, x.selected, x.window, x.gates, CONFIG)
        attention.restore_flash_attention_impl()
        assert ask().backend == "fa2-dense"


def test_a_torch_that_cannot_activate_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(attention, "current_flash_attention_impl", raising=False)
    assert fa2_providers.active_impl() is None


@pytest.mark.parametrize(("active", "found"), [(None, None), ("FA2", None), ("FA4", "FA4")])
def test_fa2_by_name_is_fa2(
    monkeypatch: pytest.MonkeyPatch, active: str | None, found: str | None
) -> None:
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: active, raising=False)
    assert fa2_providers.active_impl() == found
