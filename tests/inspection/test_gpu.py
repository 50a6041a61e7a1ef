"""The recorder on a GPU: it changes no bit there either, and measures agree with the CPU's."""

from dataclasses import asdict, replace

import pytest
import torch

from nsa import NSAConfig, NSAttention
from nsa.inspection import Recording, record, report

pytestmark = pytest.mark.gpu


def moved(recording: Recording, device: str) -> Recording:
    """The same on another device."""
    tensors = ("q", "k_compressed", "k_selected", "k_window", "gates", "block_idx")
    return Recording(
        [
            replace(call, **{name: getattr(call, name).to(device) for name in tensors})
            for call in recording.calls
        ]
    )


@pytest.mark.parametrize("backend", ["compiled", "sdpa", "fa2-dense", "fa2-varlen"])
def test_a_recorder_changes_no_bit(backend):
    torch.manual_seed(0)
    config = NSAConfig.preset("small", num_selected=8)
    layer = NSAttention(256, config, backend=backend, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 1500, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    plain = layer(x)
    (grad,) = torch.autograd.grad(plain.float().square().sum(), x)
    with record(layer) as recording:
        out = layer(x)
    assert torch.equal(out, plain)
    (again,) = torch.autograd.grad(out.float().square().sum(), x)
    # a backward may add in any order, which changes an element by an ulp of what was added
    assert (again - grad).float().norm() <= 2**-8 * grad.float().norm()
    on_gpu, on_cpu = report(recording), report(moved(recording, "cpu"))
    for layer, same in zip(on_gpu.layers, on_cpu.layers, strict=True):
        mine, other = asdict(layer), asdict(same)
        for name in ("overlap_token", "overlap_groups", "unions", "listed"):
            assert mine[name] == pytest.approx(other[name])
        for name in ("mass_selected", "mass_read", "mass_best", "mass_kept"):
            assert mine[name]["mean"] == pytest.approx(other[name]["mean"], abs=1e-3)
        assert mine["recall"]["mean"] == pytest.approx(other["recall"]["mean"], abs=1e-2)
