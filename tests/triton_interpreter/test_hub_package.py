"""The package for the kernels hub, loaded from its folder with no nsa in sight.

B batch, T tokens, H query heads, K key/value heads, D head size, n listed blocks.
"""

import importlib.util
import re
import sys

import pytest
import torch

from nsa import DataError
from nsa.tools.hub.__main__ import main
from nsa.tools.hub.build import NAME, VARIANT, build, needed

BLOCK = 16


def load(folder, name):
    """As ``kernels`` does: a package from a path, by a name of its own."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    build(folder)
    for path in folder.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^ *(from|import) nsa\b", text, re.MULTILINE), path
    return folder / "build" / VARIANT


def problem(lengths):
    """Random q, k, v, dout, and for each query its own block and one before it."""
    made = torch.Generator().manual_seed(2)
    T, H, K, D = sum(lengths), 4, 2, 16
    q, k, v, dout = (torch.randn(1, T, heads, D, generator=made) for heads in (H, K, K, H))
    own = torch.cat([torch.arange(n) for n in lengths]) // BLOCK
    lists = torch.stack([torch.zeros_like(own), own], -1)
    lists = torch.where((own == 0)[:, None], torch.tensor([0, -1]), lists).to(torch.int32)
    return q, k, v, dout, lists[None, :, None].expand(1, T, K, 2).contiguous()


def by_hand(q, k, v, lists, lengths):
    """Softmax over a mask, in fp64."""
    q, k, v = (x[0].double().transpose(0, 1) for x in (q, k, v))
    G = len(q) // len(k)
    k, v = k.repeat_interleave(G, 0), v.repeat_interleave(G, 0)
    seq = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.cat([torch.arange(n) for n in lengths])
    listed = (lists[0, :, 0, :, None] == place // BLOCK).any(1)
    mask = listed & (seq[:, None] == seq) & (place[:, None] >= place)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)[None]


@pytest.mark.parametrize("lengths", [(50,), (20, 0, 37)], ids=["regular", "packed"])
def test_it_computes_selected_attention_and_its_gradients(package, lengths):
    selected_attention = load(package, "a_kernel_from_the_hub").selected_attention
    q, k, v, dout, lists = problem(lengths)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    packed = len(lengths) > 1
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32) if packed else None
    out, lse = selected_attention(*leaves, lists, select_block=BLOCK, cu_seqlens=cu_seqlens)
    want = by_hand(*leaves, lists, lengths)
    assert not lse.requires_grad
    grads = torch.autograd.grad(out, leaves, dout)
    for x, y in zip(
        (out, *grads), (want, *torch.autograd.grad(want, leaves, dout.double())), strict=True
    ):
        assert (x.double() - y).norm() <= 2e-6 * y.norm()


def test_it_is_not_the_library_and_two_may_be_loaded(package):
    first, second = (load(package, name) for name in ("kernel_one", "kernel_two"))
    assert first.selected_attention is not second.selected_attention
    assert first.selected_attention.__module__.startswith("kernel_one.")
    old = __import__(f"kernel_one.{NAME}", fromlist=["selected_attention"])
    assert old.selected_attention is first.selected_attention


def test_kernels_loads_it(package):
    kernels = pytest.importorskip("kernels")
    made = kernels.get_local_kernel(package.parents[1])
    assert callable(made.selected_attention)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("v", torch.zeros(1, 50, 1, 16), "v: expected a shape that fits k"),
        ("block_idx", torch.zeros(1, 50, 2, 2), "block_idx of int32"),
        ("cu_seqlens", torch.zeros(2, dtype=torch.int32), "cu_seqlens: expected B = 1, got 2"),
    ],
)
def test_what_does_not_fit_is_refused(package, name, value, text):
    module = load(package, "a_kernel_that_refuses")
    q, k, v, _, lists = problem((50,))
    given = {"q": q, "k": k, "v": v, "block_idx": lists}
    if name == "cu_seqlens":
        given = {key: x.expand(2, -1, -1, -1) for key, x in given.items()}
    with pytest.raises(ValueError, match=text):
        module.selected_attention(**{**given, name: value}, select_block=BLOCK)


def test_the_command_writes_a_new_folder_alone(tmp_path, capsys):
    assert main([str(tmp_path / "made")]) == 0
    assert "files in" in capsys.readouterr().out
    assert (tmp_path / "made" / "build" / VARIANT / "metadata.json").is_file()
    with pytest.raises(DataError, match="target: expected a new or empty folder"):
        build(tmp_path / "made")


def test_it_needs_no_operators_of_the_library():
    assert "nsa.backends.compiled.ops" not in needed()
