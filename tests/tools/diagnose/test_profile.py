"""`diagnose --profile`: the kernels that ran, and whether FlashAttention-2's were among them."""

import json
from collections import Counter

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from nsa.attention import combine
from nsa.backends.sdpa import steps as sdpa
from nsa.config import NSAConfig
from nsa.tools.common import problems as trials
from nsa.tools.diagnose import __main__ as diagnose
from nsa.tools.diagnose import profile, report
from nsa.tools.diagnose.profile import short_name, summarise
from tests.support import flash_attn_stubs as stubs
from tests.support.diagnosing import run, run_json

FORWARD = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, (int)4>, false>(P)"
BACKWARD = "void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd<64>, true>(Params)"
FA3 = "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash_fwd<4>>>>(P)"
COPY = (
    "void at::native::(anonymous namespace)::indexSelectSmallIndex<float, unsigned int, 2>(int, T)"
)


def events(kernels):
    """The profiler's record of kernels, each a name and microseconds."""
    found = EventList(
        (
            FunctionEvent(
                id=i,
                name=name,
                thread=0,
                start_us=100.0 * i,
                end_us=100.0 * i + us,
                stack=[],
                device_type=DeviceType.CUDA,
                use_device="cuda",
            )
            for i, (name, us) in enumerate(kernels)
        ),
        use_device="cuda",
    )
    found._build_tree()
    return found


@pytest.fixture
def seen(monkeypatch, fresh_probes):
    """Profiles a CPU: what it sees by branch; every branch is really run, on short sequences."""
    config = NSAConfig.preset("tiny")
    monkeypatch.setattr(trials, "_dtypes", lambda device: (torch.bfloat16, torch.float32))
    monkeypatch.setattr(
        report, "typical_trials", lambda device: trials._trials(config, (40, 0, 30), device)
    )
    monkeypatch.setattr(report, "check_profile_device", lambda device: None)
    names = {"compressed": [FORWARD, BACKWARD], "select": [COPY]}
    names |= dict.fromkeys(("selected", "window"), names["compressed"])
    real, ran = profile._call, Counter()

    def call(steps, branch, inputs):
        once = real(steps, branch, inputs)

        def counted():
            ran[branch] += 1
            once()
            return branch

        return counted

    monkeypatch.setattr(profile, "_call", call)
    monkeypatch.setattr(
        profile, "kernels_of", lambda call, device: events((name, 2.5) for name in names[call()])
    )
    yield names
    assert all(count == ran["window"] for count in ran.values())


@pytest.fixture
def package(environment, install, fits, no_parity):
    """FA-2 from a stand-in of the package, and asked for."""
    install(stubs.RIGHT)
    environment({"NSA_USE_FA2": "1"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a device here")
@pytest.mark.parametrize("argv", [[], ["--device", "cpu"]])
def test_it_needs_a_gpu(capsys, argv):
    assert diagnose.main(["--profile", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: --profile: expected a CUDA device, got cpu, and torch sees none here\n"


def test_fa2_ran(capsys, seen, package):
    code, found = run_json(capsys, "--profile")
    assert found["problems"] == []
    assert code == 0
    assert [(row["kind"], row["branch"], row["fa2_ran"]) for row in found["profile"]] == [
        (kind, branch, "no" if branch == "select" else "yes")
        for kind in ("regular bfloat16", "packed bfloat16")
        for branch in ("compressed", "select", "selected", "window")
    ]
    window = found["profile"][3]
    assert (window["backend"], window["provider"]) == ("fa2-dense", "flash_attn 2.8.3")
    assert window["kernels"][0] == {
        "name": "pytorch_flash::flash_fwd_kernel",
        "calls": 1,
        "microseconds": 2.5,
        "fa2": True,
    }
    out = " ".join(run(capsys, "--profile")[1].split())
    assert "pytorch_flash::flash_fwd_kernel" in out
    assert (
        "FA-2 ran: yes, for regular bfloat16 (compressed, selected, window), packed bfloat16 "
        "(compressed, selected, window)" in out
    )


@pytest.mark.parametrize(
    ("kernels", "ran"),
    [([FORWARD, COPY], "forward only"), ([BACKWARD], "backward only"), ([FA3, FA3], "no")],
)
def test_fa2_claimed_and_not_run(capsys, seen, package, kernels, ran):
    seen["window"] = kernels
    code, found = run_json(capsys, "--profile")
    assert code == 1
    assert found["problems"] == [
        f"profile, {kind} bfloat16: window claims FlashAttention-2 ({backend}, flash_attn 2.8.3), "
        f"and its kernels ran: {ran}"
        for kind, backend in (("regular", "fa2-dense"), ("packed", "fa2-varlen"))
    ]


def test_nothing_claimed_nothing_wrong(capsys, seen, no_parity, environment):
    environment({"NSA_BACKEND": "sdpa"})
    seen["window"] = [COPY]
    code, found = run_json(capsys, "--profile")
    assert code == 0
    assert found["profile"][3]["fa2_ran"] == "no"
    assert found["profile"][3]["provider"] is None
    assert len(found["choices"]) == 4
    assert {row["kind"] for row in found["profile"]} == {"regular bfloat16", "packed bfloat16"}


def test_a_branch_that_a_flag_sends_elsewhere_claims_nothing(capsys, seen, package, environment):
    environment({"NSA_USE_FA2": "1", "NSA_USE_FA2_WIN": "0"})
    seen["window"] = [COPY]
    code, found = run_json(capsys, "--profile")
    assert code == 0
    assert (found["profile"][3]["backend"], found["profile"][3]["fa2_ran"]) == ("sdpa", "no")


def test_math_claims_nothing(capsys, seen, no_parity, environment):
    environment({"NSA_USE_FA2": "1", "NSA_FA2_PROVIDER": "math"})
    for branch in seen:
        seen[branch] = [COPY]
    code, found = run_json(capsys, "--profile")
    assert code == 0
    assert {row["fa2_ran"] for row in found["profile"]} == {"no"}
    assert "FA-2 ran: no" in run(capsys, "--profile")[1]


def test_a_profiler_that_sees_nothing(capsys, seen, package):
    seen["select"] = []
    code, found = run_json(capsys, "--profile")
    assert code == 1
    assert found["problems"][0].startswith(
        "profile, regular bfloat16: select showed no kernel at all"
    )


def test_a_branch_that_fails(capsys, seen, package, monkeypatch):
    def fail(call, device):
        raise RuntimeError("CUDA error:\nmisaligned address")

    monkeypatch.setattr(profile, "kernels_of", fail)
    code, found = run_json(capsys, "--profile")
    assert code == 1
    assert (
        "profile, packed bfloat16: window failed: RuntimeError: CUDA error: misaligned address"
        in found["problems"]
    )


def test_a_request_refused_is_not_profiled(capsys, seen, no_parity, environment):
    environment({"NSA_USE_FA2": "1"})
    code, found = run_json(capsys, "--profile")
    assert code == 1
    assert found["profile"] == []
    assert len(found["problems"]) == 1


@pytest.mark.parametrize(
    ("full", "name"),
    [
        (FORWARD, "pytorch_flash::flash_fwd_kernel"),
        (BACKWARD, "flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel"),
        (FA3, "cutlass::device_kernel"),
        (COPY, "at::native::indexSelectSmallIndex"),
        ("void at::native::<unnamed>::f<int>(int)", "at::native::f"),
        (
            "std::enable_if<!(false), void>::type internal::gemvx::kernel<int>(T)",
            "internal::gemvx::kernel",
        ),
        ("triton_poi_fused_add_0", "triton_poi_fused_add_0"),
        ("_ZN5flash16flash_fwd_kernelE", "_ZN5flash16flash_fwd_kernelE"),
        ("", ""),
    ],
)
def test_short_names(full, name):
    assert short_name(full) == name


def test_a_summary_of_kernels():
    other = FORWARD.replace("64", "128")
    copies = [("Memset (Device)", 50.0), ("Memcpy DtoD (Device -> Device)", 60.0)]
    kernels = [(FORWARD, 1.0), (COPY, 9.0), (other, 2.04), (FA3, 0.1)]
    first, second, third = summarise(events(kernels + copies))
    assert (first.name, first.calls, first.fa2) == ("at::native::indexSelectSmallIndex", 1, False)
    assert (second.calls, second.microseconds, second.fa2) == (2, 3.0, True)
    assert not third.fa2


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
@pytest.mark.parametrize("provider", ["auto", "aten"])
def test_on_a_gpu(capsys, environment, fresh_probes, provider):
    environment({"NSA_USE_FA2": "1", "NSA_FA2_PROVIDER": provider})
    code = diagnose.main(["--profile", "--json", "--device", "cuda"])
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert code == 0
    claimed = {
        (choice["kind"], row["branch"])
        for choice in found["choices"]
        for row in choice["branches"]
        if row["fa2"]
    }
    assert ("packed bfloat16", "selected") in claimed
    ran = {(row["kind"], row["branch"]) for row in found["profile"] if row["fa2_ran"] == "yes"}
    assert claimed <= ran


def test_the_gated_sum_has_a_row_where_a_backend_runs_it_at_once(capsys, seen, monkeypatch):
    """With a stand-in for ``sdpa``, which has no such way."""

    def at_once(inputs, out_cmp, lse, block_idx, config):
        q, packing = inputs.q, inputs.cu_seqlens
        outputs = (
            sdpa.compressed_attention(q, *inputs.compressed, config, packing),
            sdpa.selected_attention(q, *inputs.selected, block_idx, config, packing),
            sdpa.window_attention(q, *inputs.window, config, packing),
        )
        return combine(inputs.gates, *(out for out, _ in outputs))

    monkeypatch.setattr(sdpa, "gated_attention", at_once, raising=False)
    seen["gated sum"] = [COPY]
    _, found = run_json(capsys, "--profile")
    rows = [(row["branch"], row["backend"]) for row in found["profile"]]
    branches = ("compressed", "select", "selected", "window", "gated sum")
    assert rows == [(branch, "sdpa") for _ in range(2) for branch in branches]
