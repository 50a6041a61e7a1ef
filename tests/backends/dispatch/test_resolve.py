"""Which backend runs: a request is honoured or refused, only `auto` chooses, and it says so."""

from __future__ import annotations

import copy
import importlib
import logging
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nsa import (
    BackendUnavailable,
    ConfigError,
    NSAConfig,
    NSAttention,
    Resolution,
    Settings,
    SettingsError,
    nsa_attention,
    reference,
    registry,
    resolve,
    use_settings,
)
from nsa.backends import TABLE, dispatch, unavailable
from nsa.backends.protocol import STEPS, Problem
from nsa.testing import make_inputs
from tests.support.deterministic import deterministic
from tests.support.entries import CONFIG, DIM, REGULAR, Entry, attention, every_entry, refused

PROBLEM = Problem(
    config=CONFIG,
    device=torch.device("cpu"),
    dtype=torch.float32,
    length=11,
    packed=False,
    needs_grad=False,
)


@pytest.fixture(autouse=True)
def _fresh_caches() -> Iterator[None]:
    """Resolutions and the messages about them are kept for the life of a process."""
    resolve_once = dispatch._resolve
    resolve_once.cache_clear()
    dispatch._log_once.cache_clear()
    yield
    resolve_once.cache_clear()
    dispatch._log_once.cache_clear()


def resolved(
    backend: str | None = None,
    *,
    device: str = "cpu",
    packed: bool = False,
    config: NSAConfig = CONFIG,
    settings: Settings | None = None,
) -> Resolution:
    return resolve(
        config,
        device=device,
        dtype=torch.float32,
        length=11,
        packed=packed,
        needs_grad=True,
        backend=backend,
        settings=settings,
    )


def pretend(monkeypatch: pytest.MonkeyPatch, reasons: Mapping[str, str]) -> None:
    """Every backend of the table can run everything, but for the reasons given."""
    monkeypatch.setattr(dispatch, "unavailable", lambda name, *args, **kw: reasons.get(name))


# The answer


def test_a_resolution_names_the_backend_of_every_step() -> None:
    found = resolved("reference")
    assert (found.backend, found.reason) == ("reference", "backend='reference'")
    assert dict(found.per_branch) == dict.fromkeys(STEPS, "reference")
    assert str(found) == "reference (backend='reference')"


def test_a_resolution_does_not_change() -> None:
    found = resolved()
    with pytest.raises(AttributeError):
        found.backend = "reference"  # type: ignore[misc]
    with pytest.raises(TypeError):
        found.per_branch["window"] = "reference"  # type: ignore[index]


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_resolution_can_be_copied(copied: Entry) -> None:
    found = resolved()
    again = copied(found)
    assert (again.backend, again.reason) == (found.backend, found.reason)
    assert again.per_branch == found.per_branch
    with pytest.raises(TypeError):
        again.per_branch["window"] = "reference"


def test_auto_on_a_cpu_is_sdpa() -> None:
    assert resolved().backend == "sdpa"
    assert "auto on cpu" in resolved().reason
    assert resolved("auto") == resolved()


# Who decides


def test_the_environment_beats_the_default() -> None:
    with use_settings(backend="reference"):
        assert resolved().backend == "reference"
        assert resolved().reason == "NSA_BACKEND=reference"
    assert resolved().backend == "sdpa"


def test_the_argument_beats_the_environment() -> None:
    with use_settings(backend="reference"):
        assert resolved("sdpa").backend == "sdpa"
        assert resolved("sdpa").reason == "backend='sdpa'"
        assert resolved("auto").backend == "sdpa"
    with use_settings(use_fa2=True):
        assert resolved("reference").backend == "reference"


def test_settings_given_beat_those_in_force() -> None:
    with use_settings(backend="reference"):
        assert resolved(settings=Settings(backend="sdpa")).backend == "sdpa"


def test_every_backend_is_asked_under_the_settings_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in force have no FA-2 for a CPU; what does not select leaves that to what does."""
    monkeypatch.setattr(registry, "ranked", lambda device: ["compiled", "fa2-dense", "sdpa"])
    asked = set()

    def spy(name: str, problem: Problem, settings: Settings | None = None) -> str | None:
        asked.add(settings)
        return "no compiler" if name == "compiled" else unavailable(name, problem, settings)

    monkeypatch.setattr(dispatch, "unavailable", spy)
    given = Settings(fa2_provider="math")
    for name in (None, "fa2-dense"):
        found = resolved(name, settings=given)
        assert (found.backend, found.per_branch["select"]) == ("fa2-dense", "sdpa")
        if name is None:
            assert found.reason == "auto on cpu; no compiler"
    with pytest.raises(BackendUnavailable, match="that can: reference, sdpa, fa2-varlen$"):
        resolved("fa2-dense", packed=True, settings=given)
    assert asked == {given}


def test_what_cannot_run_is_asked_under_the_settings_given_or_in_force() -> None:
    given = Settings(fa2_provider="math")
    assert unavailable("fa2-dense", PROBLEM) is not None
    assert unavailable("fa2-dense", PROBLEM, given) is None
    with use_settings(given):
        assert unavailable("fa2-dense", PROBLEM) is None
        assert unavailable("fa2-dense", PROBLEM, Settings()) is not None


@pytest.mark.parametrize(("packed", "name"), [(False, "fa2-dense"), (True, "fa2-varlen")])
def test_fa2_asked_for_by_flag_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, packed: bool, name: str
) -> None:
    pretend(monkeypatch, {name: "no FA-2 for 8-bit turtles", "compiled": "no compiler"})
    others = ", ".join(row for row in TABLE if row not in (name, "compiled"))
    message = f"NSA_USE_FA2=1 asks for {name}, which cannot run this: no FA-2 for 8-bit turtles; "
    with (
        use_settings(use_fa2=True),
        refused(f"{message}backends that can: {others}", BackendUnavailable),
    ):
        resolved(packed=packed)


@pytest.mark.parametrize("packed", [False, True])
def test_fa2_asked_for_by_flag_is_taken(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    pretend(monkeypatch, {})
    with use_settings(use_fa2=True):
        found = resolved(packed=packed)
    assert found.backend == ("fa2-varlen" if packed else "fa2-dense")
    assert "NSA_USE_FA2=1" in found.reason


def test_fa2_on_a_cpu_is_refused_by_the_functions() -> None:
    """The real table: nothing but `math` runs FA-2 without a GPU, and only on request."""
    with (
        use_settings(use_fa2=True),
        refused("NSA_USE_FA2=1 asks for fa2-dense, which cannot run this: ", BackendUnavailable),
    ):
        attention(REGULAR)


# What auto may take


@pytest.mark.parametrize("packed", [False, True])
def test_auto_on_cuda_goes_down_its_list(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    reasons: dict[str, str] = {}
    pretend(monkeypatch, reasons)

    def found() -> Resolution:
        dispatch._resolve.cache_clear()
        return resolved(device="cuda", packed=packed)

    assert found().backend == "compiled"
    reasons["compiled"] = "no Triton here"
    assert found().backend.startswith("fa2-")
    assert "no Triton here" in found().reason
    reasons |= {"fa2-dense": "no FA-2 here", "fa2-varlen": "none here either"}
    assert found().backend == "sdpa"
    assert all(reason in found().reason for reason in reasons.values())


def test_auto_leaves_fa2_alone_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"compiled": "no Triton here"})
    with use_settings(use_fa2=False):
        found = resolved(device="cuda")
    assert found.backend == "sdpa"
    assert "NSA_USE_FA2=0" in found.reason


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_auto_never_takes_the_oracle(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    pretend(monkeypatch, {name: f"not {name}" for name in TABLE if name != "reference"})
    with refused("auto found no backend: ", BackendUnavailable):
        resolved(device=device)


# Refusals


@every_entry
def test_an_unknown_backend_is_told_the_nearest(entry: Entry) -> None:
    message = "backend: expected one of the known names, got 'spda'; did you mean 'sdpa'?"
    with refused(message, SettingsError):
        entry(REGULAR, backend="spda")


@every_entry
@pytest.mark.parametrize("name", TABLE)
def test_a_backend_that_cannot_run_this_is_refused(entry: Entry, name: str) -> None:
    """The real table."""
    reasons = {row: unavailable(row, PROBLEM) for row in TABLE}
    if reasons[name] is None:
        assert resolved(name).backend == name
        return
    able = ", ".join(row for row, reason in reasons.items() if reason is None)
    assert able.startswith("reference, sdpa")
    message = f"backend={name!r} asks for {name}, which cannot run this: {reasons[name]}; "
    with refused(f"{message}backends that can: {able}", BackendUnavailable):
        entry(REGULAR, backend=name)


@every_entry
def test_a_refusal_runs_nothing(monkeypatch: pytest.MonkeyPatch, entry: Entry) -> None:
    pretend(monkeypatch, {"sdpa": "on holiday"})
    ran: list[str] = []
    for module in ("nsa.attention", "nsa.module"):
        monkeypatch.setattr(f"{module}.run", lambda *args, **kw: ran.append("run"))
    monkeypatch.setattr("nsa.backends.dispatch.BOUND", {})
    monkeypatch.setattr("nsa.backends.dispatch.load", lambda *args: ran.append("load"))
    with refused("backend='sdpa' asks for sdpa", BackendUnavailable):
        entry(REGULAR, backend="sdpa")
    assert ran == []


# What it says


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "nsa"]


def test_auto_logs_its_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    with use_settings(log="info"), caplog.at_level(logging.INFO, logger="nsa"):
        for length in (7, 8, 9):
            inputs = make_inputs(CONFIG, length=length)
            nsa_attention(
                inputs.q,
                inputs.compressed,
                inputs.selected,
                inputs.window,
                inputs.gates,
                CONFIG,
            )
        resolved()
    assert told(caplog) == ["backend sdpa: auto on cpu"]
    assert caplog.records[0].levelno == logging.INFO


def test_a_request_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    with use_settings(backend="sdpa"), caplog.at_level(logging.INFO, logger="nsa"):
        attention(REGULAR)
        attention(REGULAR, backend="reference")
    assert told(caplog) == []


def test_a_layer_keeps_its_last_resolution() -> None:
    layer, x = NSAttention(DIM, CONFIG), torch.zeros(1, 11, DIM)
    assert layer.resolution is None
    layer(x)
    assert layer.resolution == resolved()
    layer.backend = "reference"
    layer(x)
    assert layer.resolution is not None
    assert str(layer.resolution) == "reference (backend='reference')"


def test_a_backend_of_regular_batches_names_one_of_packed_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = PROBLEM._replace(packed=True)
    expected = "fa2-dense takes regular batches, got cu_seqlens: use fa2-varlen"
    assert unavailable("fa2-dense", problem) == expected
    monkeypatch.setitem(TABLE, "mine", replace(TABLE["compiled"], packed=False))
    expected = "mine takes regular batches, got cu_seqlens: use sdpa"
    assert unavailable("mine", problem) == expected


def test_the_oracle_needs_the_values_of_cu_seqlens() -> None:
    meta = PROBLEM._replace(device=torch.device("meta"))
    expected = "reference reads cu_seqlens, which has no values on the meta device"
    assert unavailable("reference", meta._replace(packed=True)) == expected
    assert unavailable("reference", meta) is None
    assert unavailable("reference", PROBLEM._replace(packed=True)) is None


def test_backends_are_bound_to_the_settings_given_or_in_force(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module(TABLE["fa2-varlen"].module)
    monkeypatch.setattr(module, "bind", lambda settings: settings.fa2_provider)
    with use_settings(fa2_provider="math"):
        assert dispatch.load("fa2-varlen") == "math"
        assert dispatch.load("fa2-varlen", Settings(fa2_provider="aten")) == "aten"


def test_branches_run_at_once_where_one_backend_runs_all_and_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bound = {name: SimpleNamespace(gated_attention=None) for name in ("one", "other")}
    bound["none"] = SimpleNamespace()
    monkeypatch.setattr(dispatch, "BOUND", bound)
    for steps, can in (
        (("one",) * 4, True),
        (("one", "none", "one", "one"), True),  # whoever selects
        (("one", "one", "other", "one"), False),
        (("none",) * 4, False),
    ):
        gated = Resolution("one", "asked for", steps, steps).gated()
        assert gated is (bound["one"] if can else None)


@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize("name", ["sdpa", "compiled", "fa2-dense", "reference"])
def test_what_runs_a_step_of_decode(name: str, e4m3: bool) -> None:
    """The backend itself or ``sdpa``, which the reason says; None goes the way of the oracle."""
    if name == "compiled":
        pytest.importorskip("triton")
    chosen = Resolution(name, "asked for", (name,) * 4, (name,) * 4)
    problem = PROBLEM._replace(device=torch.device("cuda"))
    why = {
        "compiled": "no kernel for e4m3 keys and values" if e4m3 else None,
        "fa2-dense": "fa2-dense has none",
    }.get(name)
    found, decoder = dispatch.decoding(chosen, problem, e4m3=e4m3)
    reason = f"asked for; decode on sdpa: {why}" if why else "asked for"
    assert found == chosen._replace(reason=reason)
    if name == "reference":
        assert decoder is None
    else:
        assert decoder is dispatch.load("sdpa" if why else name)
        assert e4m3 or dispatch.no_decode(name, problem) == why


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "cuda"])
def test_a_trace_gets_the_same_plan(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """What a trace may ask: everything is a string, a number or a type."""
    pretend(monkeypatch, {"compiled": "no compiler"})
    problem = PROBLEM._replace(
        device=torch.device(device), packed=True, needs_grad=True, sharded=True
    )
    asked = []
    real = dispatch._plan

    def spy(*arguments: object) -> Resolution:
        asked.append(arguments)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(dispatch, "_plan", spy)
    settings = Settings(fa2_provider="math")
    with use_settings(backend="reference"):
        plan = dispatch._plan_by_key(
            CONFIG.key, problem.device.type, problem.device.index, torch.float32, 11, True, True,
            True, "sdpa", settings.key,
        )  # fmt: skip
        assert plan == tuple(real(problem, "sdpa", settings))
        assert asked == [(problem, "sdpa", settings)]
        assert dispatch._SETTINGS[dispatch._settings_key()].backend == "reference"


def test_what_a_resolution_is_asked_for_is_checked() -> None:
    known = {"device": "cpu", "dtype": torch.float32, "length": 0, "packed": False}
    assert resolve(CONFIG, needs_grad=False, **known).backend == "sdpa"  # type: ignore[arg-type]
    for name, text in (
        ("dtype", "dtype: expected a dtype of torch, got 'x'"),
        ("length", "length: expected an int >= 0, got 'x'"),
        ("packed", "packed: expected True or False, got 'x'"),
        ("needs_grad", "needs_grad: expected True or False, got 'x'"),
        ("sharded", "sharded: expected True or False, got 'x'"),
        ("settings", "settings: expected Settings, got 'x'"),
    ):
        with pytest.raises(ConfigError) as error:
            resolve(CONFIG, **{"needs_grad": False, **known, name: "x"})  # type: ignore[arg-type]
        assert str(error.value) == text
    with pytest.raises(ConfigError, match="length: expected an int >= 0, got -1"):
        resolve(CONFIG, needs_grad=False, **{**known, "length": -1})  # type: ignore[arg-type]


@pytest.mark.parametrize(("length", "known"), [(98, 99), (99, 99), (100, 2**31 - 1), (10**6, None)])
def test_a_trace_knows_a_length_by_what_it_is_compared_with(
    monkeypatch: pytest.MonkeyPatch, length: int, known: int | None
) -> None:
    """Lengths on one side of every limit share a graph."""
    asked = []

    def by_key(*key: object) -> tuple[object, ...]:
        asked.append(key)
        return "sdpa", "", (), ()

    monkeypatch.setattr(dispatch, "_plan_by_key", by_key)
    settings = Settings(fa2_min_len_win=100, fa2_min_len_cmp=50)
    problem = PROBLEM._replace(device=torch.device("cuda", 1), length=length)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    dispatch.plan(problem, "sdpa", settings)
    (key,) = asked
    where = (CONFIG.key, "cuda", 1, torch.float32, known or 2**31 - 1, False, False, False)
    assert key == (*where, "sdpa", settings.key)


def test_outside_a_trace_a_plan_is_bound_to_the_settings_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []
    found = Resolution("sdpa", "", ("sdpa",) * 4, ("a key of its own",) * 4)

    def resolved_as(*key: object) -> Resolution:
        asked.append(key)
        return found

    monkeypatch.setattr(dispatch, "_resolve", resolved_as)
    monkeypatch.setattr(dispatch, "load", lambda *given: asked.append(given))
    monkeypatch.setattr(dispatch.fa2_providers, "active_impl", lambda: "FA3")
    monkeypatch.setattr(dispatch, "BOUND", {})
    settings = Settings(fa2_min_len_win=100)
    assert dispatch.plan(PROBLEM, "sdpa", settings) is found
    state = ("FA3", False, False)
    assert asked == [(PROBLEM, "sdpa", settings, state), ("sdpa", settings)]


def test_what_is_no_name_is_shown() -> None:
    with pytest.raises(SettingsError, match="got 7"):
        dispatch.plan(PROBLEM, 7, Settings())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "mass", "mode", "runs"),
    [
        ("cuda", 0.8, "strict", False),
        ("cuda", 0.8, "warn", True),
        ("cuda", 0.8, "off", True),
        ("cuda", 1.0, "strict", True),
        ("cuda", None, "strict", True),
        ("cpu", 0.8, "strict", True),
    ],
)
def test_the_oracle_and_deterministic_mode(
    device: str, mass: float | None, mode: str, runs: bool
) -> None:
    """Its sum of scores has no deterministic kernel on CUDA."""
    config = replace(CONFIG, select_mass=mass)
    problem = PROBLEM._replace(config=config, device=torch.device(device))
    with deterministic(mode != "off", warn_only=mode == "warn"):
        refusal = reference.unavailable(problem, None)
    assert (refusal is None) == runs
    assert runs or str(refusal).startswith("reference needs torch.cumsum for select_mass")
