"""Other libraries' kernels that `bench` measures: what they are given, and what they refuse."""

import sys
import types
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from nsa import NSAConfig, reference
from nsa.tools.bench import peers
from nsa.tools.bench import run as bench_run
from nsa.tools.bench.baselines import Unsupported
from nsa.tools.bench.parity import baseline_parity
from nsa.tools.bench.peers import find_peer, fla_selected
from tests.support import benching
from tests.support.benching import CPU, TINY, problem, run_jsonl


@pytest.fixture
def quick(monkeypatch):
    benching.be_quick(monkeypatch)


class FlaLike:
    """Called as the peer's function is; computes by the oracle, and refuses what that refuses."""

    calls: ClassVar[list] = []

    @classmethod
    def apply(cls, q, k, v, lists, counts, block_size, scale, cu_seqlens):
        width = lists.shape[-1]
        assert width & (width - 1) == 0
        assert counts == width
        assert cu_seqlens is None or cu_seqlens.dtype == torch.int64
        assert (lists >= 0).any(-1).all()  # it divides by what a query sees
        cls.calls.append((width, cu_seqlens))
        H, K, D = q.shape[2], k.shape[2], q.shape[3]
        config = NSAConfig(
            num_heads=H,
            num_kv_heads=K,
            head_dim=D,
            value_dim=v.shape[3],
            select_block=block_size,
            scale=scale,
            rope_theta=None,
        )
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.int()
        return reference.selected_attention(q, k, v, lists, config, cu_seqlens)[0]


WIDE = NSAConfig(num_heads=16, num_kv_heads=1, head_dim=8, num_selected=5, scale=0.3)


@pytest.mark.parametrize("sequences", [0, 2])
def test_the_peer_is_given_what_it_takes(sequences):
    FlaLike.calls.clear()
    peer = fla_selected(types.ModuleType("fla"), FlaLike)
    assert baseline_parity(peer, problem(WIDE, sequences=sequences)).fault is None
    assert {width for width, _ in FlaLike.calls} == {8, 4}
    for _, cu_seqlens in FlaLike.calls:
        assert sequences == 0 or (cu_seqlens.diff() > 0).all()


def test_a_peer_that_is_wrong_is_not_timed(capsys, tmp_path, quick, monkeypatch):
    class Wrong:
        @staticmethod
        def apply(q, k, v, *given):
            return FlaLike.apply(q, k, v, *given) * 1.01

    monkeypatch.setattr(
        bench_run,
        "find_peer",
        lambda name, device: {"selected": fla_selected(types.ModuleType("fla"), Wrong)},
    )
    argv = ("--backends", "fla", "--branches", "selected", "--heads", "16/1:8")
    code, _, rows, _ = run_jsonl(capsys, tmp_path, *argv)
    assert code == 1
    assert rows[0]["backend"] == "fla"
    assert rows[0]["note"].startswith("fla: parity failed: out is")


def test_groups_that_the_peer_does_not_take():
    peer = fla_selected(types.ModuleType("fla"), FlaLike)
    for config in (TINY, replace(WIDE, num_heads=24)):
        with pytest.raises(Unsupported, match="16, 32, 64, … query heads on a key/value head, got"):
            baseline_parity(peer, problem(config))


def test_the_peer_tunes_anew():
    function = types.SimpleNamespace()
    tuner = types.SimpleNamespace(configs=[1, 2], cache={"key": 1}, fn=function)
    tuner.cache_results = True
    module = types.ModuleType("fla")
    module.kernel = types.SimpleNamespace(fn=tuner)
    fla_selected(module, FlaLike).tune()
    assert (tuner.cache, tuner.cache_results) == ({}, False)


def test_a_peer_that_is_not_there(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(peers, "version_of", lambda name: None)
    for name, distribution in (("fla", "fla-core"), ("cudnn-frontend", "nvidia-cudnn-frontend")):
        with pytest.raises(Unsupported, match=f"{name} is not .*: pip install {distribution}$"):
            find_peer(name, cuda)
    monkeypatch.setattr(peers, "version_of", {"fla-core": "0.6.0"}.get)
    with pytest.raises(Unsupported, match="fla-core 0.6.0 needs a CUDA device, got cpu"):
        find_peer("fla", CPU)
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(Unsupported, match="fla-core 0.6.0 does not import .ModuleNotFoundError: "):
        find_peer("fla", cuda)


def test_an_installed_peer_is_found(monkeypatch):
    monkeypatch.setattr(peers, "version_of", {"flash-linear-attention": "0.6.0"}.get)
    for name in ("fla", "fla.ops", "fla.ops.nsa", "fla.ops.nsa.parallel"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(Unsupported, match="does not import .AttributeError"):
        find_peer("fla", torch.device("cuda"))
    sys.modules["fla.ops.nsa.parallel"].ParallelNSAFunction = FlaLike
    assert find_peer("fla", torch.device("cuda"))["selected"].name == "fla"


def test_a_peer_needs_one_of_its_branches(capsys):
    for name, wanted in (("fla", "selected"), ("cudnn-frontend", "selected or window")):
        code, _, err = benching.run(capsys, "--backends", name, "--branches", "select")
        assert code == 2
        assert f"--backends {name}: expected {wanted} in --branches, got 'select'" in err


# cudnn-frontend


class SelectionLike:
    """Called as cudnn-frontend's SelectionAttention is; computes by the oracle."""

    def __init__(self, q, k, v, out, total, most, blocks, counts, cu_q, cu_k, **options):
        assert cu_q is cu_k
        assert {x.dtype for x in (blocks, counts, cu_q)} == {torch.int32}
        assert out.shape == (*q.shape[:2], v.shape[2])
        assert total.shape == most.shape == q.shape[:2]
        self.options = options

    def check_support(self):
        if self.options["block_size"] not in {16, 32, 64, 128}:
            raise ValueError("block_size must be 16, 32, 64, or 128")
        return True

    def compile(self):
        self.compiled = True

    def execute(self, q, k, v, out, total, most, blocks, counts, cu_q, cu_k):
        assert self.compiled
        assert self.options["is_causal"]
        assert not any(x.requires_grad for x in (q, k, v))  # DLPack refuses those
        assert self.options["max_s_q"] == self.options["max_s_k"] == int(cu_q.diff().max())
        listed = torch.arange(blocks.shape[-1]) < counts[..., None]
        config = replace(
            config_of(q, k, v, self.options["scale_softmax"]),
            select_block=self.options["block_size"],
        )
        lists = blocks.masked_fill(~listed, -1)[None]
        q, k, v = (x[None] for x in (q, k, v))
        out.copy_(reference.selected_attention(q, k, v, lists, config, cu_q)[0][0])


class WindowLike:
    """Called as cudnn-frontend's SlidingWindowAttention is: heads before tokens, or packed."""

    takes = True

    def __init__(self, q, k, v, out, *, cudnn_handle, left_bound, right_bound, **options):
        assert (cudnn_handle, right_bound) == ("handle", 0)
        self.window, self.scale, self.layout = left_bound, options["attn_scale"], q.ndim
        self.lengths = options.get("sample_seq_len_q")
        assert (self.lengths is None) == (q.ndim == 4)

    def check_support(self):
        return self.takes

    def compile(self):
        self.compiled = True

    def execute(self, q, k, v, out, **given):
        assert self.compiled
        cu_seqlens = None
        if self.layout == 3:
            cu_seqlens = F.pad(given["seq_len_q_tensor"].cumsum(0, dtype=torch.int32), (1, 0))
            for name, x in zip("qkvo", (q, k, v, out), strict=True):
                assert given[f"{name}_ragged_offset_tensor"].tolist() == [
                    n * x.stride(0) for n in cu_seqlens.tolist()
                ]
            q, k, v, out = (x[None] for x in (q, k, v, out))
        else:
            q, k, v, out = (x.transpose(1, 2) for x in (q, k, v, out))
        config = replace(config_of(q[0], k[0], v[0], self.scale), window=self.window)
        out.copy_(reference.window_attention(q, k, v, config, cu_seqlens)[0])


def config_of(q, k, v, scale):
    return NSAConfig(
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[2],
        value_dim=v.shape[2],
        scale=scale,
        rope_theta=None,
    )


@pytest.fixture
def cudnn(monkeypatch):
    """An installed cudnn-frontend, for a CPU."""
    monkeypatch.setattr(peers, "version_of", {"nvidia-cudnn-frontend": "1.32.0"}.get)
    module = types.ModuleType("cudnn.native_sparse_attention")
    module.SelectionAttention, module.SlidingWindowAttention = SelectionLike, WindowLike
    package = types.ModuleType("cudnn")
    package.create_handle = lambda: "handle"
    package.native_sparse_attention = module
    monkeypatch.setitem(sys.modules, "cudnn", package)
    monkeypatch.setitem(sys.modules, "cudnn.native_sparse_attention", module)
    return find_peer("cudnn-frontend", torch.device("cuda"))


GROUPED = NSAConfig(
    num_heads=6, num_kv_heads=2, head_dim=8, value_dim=4, select_block=32, window=40, scale=0.3
)


@pytest.mark.parametrize("many", [{"batch": 2}, {"sequences": 3}], ids=["batch", "packed"])
@pytest.mark.parametrize("branch", ["selected", "window"])
def test_cudnn_frontend_is_given_what_it_takes(cudnn, branch, many):
    assert baseline_parity(cudnn[branch], problem(GROUPED, **many)).fault is None


@pytest.mark.parametrize(("branch", "owner"), [("selected", SelectionLike), ("window", WindowLike)])
def test_a_wrong_forward_is_seen(cudnn, monkeypatch, branch, owner):
    right = owner.execute

    def wrong(self, q, k, v, out, *rest, **given):
        right(self, q, k, v, out, *rest, **given)
        out.mul_(1.01)

    monkeypatch.setattr(owner, "execute", wrong)
    found = baseline_parity(cudnn[branch], problem(GROUPED))
    assert found.fault is not None
    assert found.fault.startswith("parity failed: out is")


def test_what_cudnn_frontend_refuses_it_says_itself(cudnn, monkeypatch):
    odd = replace(GROUPED, select_block=48)
    with pytest.raises(Unsupported, match="cudnn-frontend: ValueError: block_size must be 16, 32"):
        baseline_parity(cudnn["selected"], problem(odd))
    monkeypatch.setattr(WindowLike, "takes", False)
    with pytest.raises(Unsupported, match="its graph does not take this"):
        baseline_parity(cudnn["window"], problem(GROUPED))


def test_a_forward_alone_has_no_time_for_both(capsys, tmp_path, quick, cudnn, monkeypatch):
    monkeypatch.setattr(bench_run, "find_peer", lambda name, device: cudnn)
    argv = ("--backends", "cudnn-frontend", "--branches", "selected,window")
    code, header, rows, out = run_jsonl(capsys, tmp_path, *argv)
    assert code == 0
    assert header["cudnn-frontend"] == "nvidia-cudnn-frontend 1.32.0"
    mine = [row for row in rows if row["backend"] == "cudnn-frontend"]
    assert [row["branch"] for row in mine] == ["selected", "window"]
    for row in mine:
        assert row["forward_ms"] > 0
        assert row["backward_ms"] is row["both_ms"] is None
    assert "cudnn-frontend" in out
