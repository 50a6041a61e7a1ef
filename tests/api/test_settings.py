"""The `NSA_…` flags: strict, read once at import, changed by `use_settings` alone."""

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nsa.errors import NSAError, SettingsError
from nsa.registry import names
from nsa.settings import (
    FLAGS,
    LOG_LEVELS,
    PROVIDERS,
    Settings,
    current_settings,
    environment_error,
    explain_settings,
    foreign_variable,
    read_environment,
    use_settings,
)

BOOLS = ("USE_FA2", "USE_FA2_WIN", "USE_FA2_CMP", "CHECK", "NVTX")
INTS = {
    "FA2_MIN_LEN_WIN": 1,
    "FA2_MIN_LEN_CMP": 1,
    "PREALLOC_VARLEN_N": 0,
    "PREALLOC_VARLEN_K": 0,
}
CHOICES = {"BACKEND": names(), "FA2_PROVIDER": PROVIDERS, "LOG": LOG_LEVELS}


@pytest.fixture
def environment():
    """Reads another environment for one test; yields the function that does it."""
    logger = logging.getLogger("nsa")
    level, handlers = logger.level, list(logger.handlers)
    yield read_environment
    read_environment()
    logger.setLevel(level)
    logger.handlers[:] = handlers


def field(flag: str) -> str:
    return flag.removeprefix("NSA_").lower()


def refused(message: str):
    return pytest.raises(SettingsError, match=f"^{re.escape(message)}$")


def parsed(flag: str, text: str):
    return getattr(Settings.from_environ({flag: text}), field(flag))


# Values


def test_every_flag_is_tested_here():
    assert {f"NSA_{name}" for name in (*BOOLS, *INTS, *CHOICES)} == set(FLAGS)


def test_nothing_set_means_the_defaults():
    assert Settings.from_environ({}) == Settings()
    assert Settings().backend == "auto"
    assert Settings().use_fa2 is None


def test_foreign_names_are_left_alone():
    assert Settings.from_environ({"PATH": "x", "MY_NSA_BACKEND": "x", "NSAX": "1"}) == Settings()


@pytest.mark.parametrize("flag", FLAGS)
def test_the_empty_string_means_unset(flag):
    assert Settings.from_environ({flag: ""}) == Settings()


def test_an_unknown_name_that_is_empty_is_unset_too():
    assert Settings.from_environ({"NSA_BAKEND": ""}) == Settings()


@pytest.mark.parametrize("name", BOOLS)
def test_switches(name):
    assert parsed(f"NSA_{name}", "1") is True
    assert parsed(f"NSA_{name}", "0") is False


@pytest.mark.parametrize("text", ["true", "2", "yes", " 1", "on"])
@pytest.mark.parametrize("name", BOOLS)
def test_a_switch_is_0_or_1(name, text):
    with refused(f"NSA_{name}: expected 0 or 1, got {text!r}"):
        parsed(f"NSA_{name}", text)


@pytest.mark.parametrize("name", INTS)
def test_integers(name):
    assert parsed(f"NSA_{name}", "4096") == 4096
    assert parsed(f"NSA_{name}", str(INTS[name])) == INTS[name]


@pytest.mark.parametrize("text", ["x", "1.0", "1e3", "0x10"])
@pytest.mark.parametrize("name", INTS)
def test_an_integer_parses(name, text):
    with refused(f"NSA_{name}: expected an integer, got {text!r}"):
        parsed(f"NSA_{name}", text)


@pytest.mark.parametrize("name", INTS)
def test_an_integer_is_in_range(name):
    with refused(f"NSA_{name}: expected an integer >= {INTS[name]}, got {INTS[name] - 1}"):
        parsed(f"NSA_{name}", str(INTS[name] - 1))


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in CHOICES.items() for v in vs])
def test_choices(name, value):
    assert parsed(f"NSA_{name}", value) == value


@pytest.mark.parametrize(
    ("flag", "text", "hint"),
    [
        ("NSA_BACKEND", "fa2-vrlen", "did you mean 'fa2-varlen'? "),
        ("NSA_BACKEND", "SDPA", "did you mean 'sdpa'? "),
        ("NSA_BACKEND", "xyz", ""),
        ("NSA_FA2_PROVIDER", "flash-attn", "did you mean 'flash_attn'? "),
        ("NSA_LOG", "warn", "did you mean 'warning'? "),
    ],
)
def test_an_unknown_choice_is_told_the_nearest(flag, text, hint):
    known = ", ".join(CHOICES[flag.removeprefix("NSA_")])
    with refused(f"{flag}: expected one of the known names, got {text!r}; {hint}(known: {known})"):
        parsed(flag, text)


def test_an_unknown_flag_is_told_the_nearest():
    with refused(
        "NSA_BAKEND: expected a known flag, got an unknown one; "
        f"did you mean 'NSA_BACKEND'? (known: {', '.join(FLAGS)})"
    ):
        Settings.from_environ({"NSA_BAKEND": "sdpa"})


def test_mistakes_are_value_errors_and_nsa_errors():
    with pytest.raises(ValueError, match="NSA_CHECK"):
        Settings(check=2)
    with pytest.raises(NSAError, match="NSA_CHECK"):
        Settings(check=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"check": None}, "NSA_CHECK: expected 0 or 1, got None"),
        ({"use_fa2": 1}, "NSA_USE_FA2: expected 0 or 1, got 1"),
        ({"prealloc_varlen_n": True}, "NSA_PREALLOC_VARLEN_N: expected an integer >= 0, got True"),
        ({"fa2_min_len_win": 0}, "NSA_FA2_MIN_LEN_WIN: expected an integer >= 1, got 0"),
        (
            {"log": "loud"},
            "NSA_LOG: expected one of the known names, got 'loud'; "
            "(known: debug, info, warning, error)",
        ),
    ],
)
def test_settings_made_by_hand_obey_the_same_rules(changes, message):
    with refused(message):
        Settings(**changes)


def test_settings_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError, match="check"):
        Settings().check = True


# Contradictions


@pytest.mark.parametrize("backend", ["reference", "sdpa", "compiled"])
def test_fa2_asked_for_beside_another_backend(backend):
    with refused(
        f"NSA_USE_FA2=1 contradicts NSA_BACKEND={backend}: expected NSA_BACKEND unset, auto, "
        "fa2-dense or fa2-varlen; unset one of the two"
    ):
        Settings.from_environ({"NSA_USE_FA2": "1", "NSA_BACKEND": backend})


@pytest.mark.parametrize("backend", ["fa2-dense", "fa2-varlen"])
def test_fa2_refused_beside_an_fa2_backend(backend):
    with refused(
        f"NSA_USE_FA2=0 contradicts NSA_BACKEND={backend}: expected a backend other than FA-2; "
        "unset one of the two"
    ):
        Settings.from_environ({"NSA_USE_FA2": "0", "NSA_BACKEND": backend})


@pytest.mark.parametrize(
    ("use_fa2", "backends"),
    [
        ("0", ("auto", "reference", "sdpa", "compiled")),
        ("1", ("auto", "fa2-dense", "fa2-varlen")),
        ("", names()),
    ],
)
def test_what_does_not_contradict(use_fa2, backends):
    for backend in backends:
        assert Settings.from_environ({"NSA_USE_FA2": use_fa2, "NSA_BACKEND": backend})


# The environment of the process


def test_the_environment_is_read_once(environment, monkeypatch):
    environment({"NSA_BACKEND": "sdpa"})
    monkeypatch.setenv("NSA_BACKEND", "reference")
    assert current_settings().backend == "sdpa"


def test_a_mistake_is_kept_and_raised_at_first_use(environment):
    environment({"NSA_CHECK": "yes"})  # does not raise
    message = "NSA_CHECK: expected 0 or 1, got 'yes'"
    assert environment_error() == message
    for _ in range(2):
        with refused(message):
            current_settings()
    with refused(message), use_settings(check=True):
        pass
    environment({})
    assert environment_error() is None
    assert current_settings() == Settings()


def test_whole_settings_get_past_a_bad_environment(environment):
    environment({"NSA_CHECK": "yes"})
    with use_settings(Settings(backend="sdpa")) as chosen:
        assert current_settings() is chosen


def test_the_log_flag_sets_the_level(environment):
    environment({"NSA_LOG": "debug"})
    logger = logging.getLogger("nsa")
    assert logger.level == logging.DEBUG
    environment({"NSA_LOG": "error"})
    assert logger.level == logging.ERROR
    assert len(logger.handlers) == 1


def in_a_fresh_process(code: str, **flags: str) -> str:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("NSA_")} | flags
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_process_environment_is_read_at_import():
    code = (
        "import os, nsa.settings as s\n"
        "os.environ['NSA_BACKEND'] = 'reference'\n"
        "print(s.current_settings().backend)"
    )
    assert in_a_fresh_process(code, NSA_BACKEND="sdpa").strip() == "sdpa"


def test_import_succeeds_in_a_bad_environment():
    code = (
        "import json, nsa, nsa.settings as s\n"
        "try: s.current_settings()\n"
        "except s.SettingsError as error: print(json.dumps(str(error)))"
    )
    assert "NSA_NVTX" in json.loads(in_a_fresh_process(code, NSA_NVTX="maybe"))


def test_foreign_variables(monkeypatch):
    monkeypatch.setenv("SOME_OTHER_LIBRARY", "x")
    assert foreign_variable("SOME_OTHER_LIBRARY") == "x"
    monkeypatch.setenv("SOME_OTHER_LIBRARY", "")
    assert foreign_variable("SOME_OTHER_LIBRARY") is None
    monkeypatch.delenv("SOME_OTHER_LIBRARY")
    assert foreign_variable("SOME_OTHER_LIBRARY") is None


# use_settings


def test_use_settings_nests():
    with use_settings(backend="sdpa"):
        with use_settings(check=True) as inner:
            assert (inner.backend, inner.check) == ("sdpa", True)
            assert current_settings() is inner
        assert current_settings() == Settings(backend="sdpa")
    assert current_settings() == Settings()


def test_use_settings_ends_with_an_error():
    with pytest.raises(KeyError), use_settings(backend="sdpa"):
        raise KeyError
    assert current_settings() == Settings()


def test_use_settings_holds_for_its_own_thread():
    seen = []
    with use_settings(backend="sdpa"):
        thread = threading.Thread(target=lambda: seen.append(current_settings().backend))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_use_settings_takes_whole_settings_and_changes():
    with use_settings(Settings(check=True), nvtx=True) as chosen:
        assert chosen == Settings(check=True, nvtx=True)


def test_use_settings_knows_its_fields():
    with (
        pytest.raises(
            SettingsError,
            match=r"^expected a field of Settings, got 'bakend'; did you mean 'backend'\?",
        ),
        use_settings(bakend="sdpa"),
    ):
        pass


@pytest.mark.parametrize("name", INTS)
def test_integers_have_a_largest_value(name):
    with refused(f"NSA_{name}: expected an integer <= 2147483647, got 10000000000000"):
        Settings(**{name.lower(): 10**13})
    with refused(f"NSA_{name}: expected an integer, got '{199 * '9'}…"):
        Settings.from_environ({f"NSA_{name}": "9" * 5000})


@pytest.mark.parametrize("value", [3, "debug", {"log": "debug"}])
def test_use_settings_takes_settings(value):
    with refused(f"settings: expected Settings, got {value!r}"), use_settings(value):
        pass


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (None, "environ: expected names and texts, got None"),
        ({"NSA_CHECK": 1}, "NSA_CHECK: expected text, got 1"),
    ],
)
def test_an_environment_is_text(environ, message):
    with refused(message):
        Settings.from_environ(environ)


def test_use_settings_checks_values():
    with refused("NSA_CHECK: expected 0 or 1, got 3"), use_settings(check=3):
        pass
    with (
        pytest.raises(SettingsError, match="contradicts"),
        use_settings(backend="sdpa", use_fa2=True),
    ):
        pass


@pytest.mark.parametrize("how", [{"log": "debug"}, {"settings": Settings(log="debug")}])
def test_use_settings_sets_the_log_level(how):
    logger = logging.getLogger("nsa")
    before = logger.level
    with use_settings(**how):
        assert logger.level == logging.DEBUG
    assert logger.level == before


@pytest.mark.parametrize("leaves_first", [0, 1])
def test_overlapping_blocks_leave_the_log_level_as_it_was(leaves_first):
    """Blocks of other threads, or generators: whichever is left first."""
    logger = logging.getLogger("nsa")
    before = logger.level
    blocks = [use_settings(log="debug"), use_settings(log="error")]
    threads = [ThreadPoolExecutor(1) for _ in blocks]
    for thread, block in zip(threads, blocks, strict=True):
        thread.submit(block.__enter__).result()
    assert logger.level == logging.ERROR
    threads[leaves_first].submit(blocks[leaves_first].__exit__, None, None, None).result()
    assert logger.level == (logging.ERROR if leaves_first == 0 else logging.DEBUG)
    other = 1 - leaves_first
    threads[other].submit(blocks[other].__exit__, None, None, None).result()
    assert logger.level == before


# explain_settings


def sources():
    return {row.flag: (row.value, row.source) for row in explain_settings()}


def test_explain_names_every_flag():
    rows = explain_settings()
    assert [row.flag for row in rows] == list(FLAGS)
    assert {row.source for row in rows} == {"default"}


def test_explain_names_the_source(environment):
    environment({"NSA_BACKEND": "sdpa", "NSA_FA2_MIN_LEN_WIN": "7", "NSA_LOG": ""})
    with use_settings(check=True, fa2_min_len_win=9):
        rows = sources()
    assert rows["NSA_BACKEND"] == ("sdpa", "environment")
    assert rows["NSA_FA2_MIN_LEN_WIN"] == (9, "use_settings")
    assert rows["NSA_CHECK"] == (True, "use_settings")
    assert rows["NSA_LOG"] == ("warning", "default")


def test_explain_shows_a_bad_environment_as_it_is(environment):
    environment({"NSA_CHECK": "yes", "NSA_BAKEND": "sdpa"})
    rows = sources()
    assert rows["NSA_CHECK"] == ("yes", "environment")
    assert rows["NSA_BAKEND"] == ("sdpa", "environment (unknown)")
    assert rows["NSA_NVTX"] == (False, "default")
