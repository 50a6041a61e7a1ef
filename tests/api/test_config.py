"""`NSAConfig`: every rule of the method, what its errors say, presets, derived values."""

import copy
import pickle
import re
from dataclasses import FrozenInstanceError, fields

import pytest

from nsa.config import MOST, PRESETS, NSAConfig
from nsa.errors import ConfigError, NSAError, nearest

INTS = [field.name for field in fields(NSAConfig) if field.type == "int"]


def refused(message: str):
    return pytest.raises(ConfigError, match=f"^{re.escape(message)}$")


def test_the_defaults_are_the_papers():
    config = NSAConfig()
    assert (config.compress_block, config.compress_stride, config.select_block) == (32, 16, 64)
    assert (config.num_selected, config.num_initial, config.num_local) == (16, 1, 2)
    assert (config.window, config.num_heads, config.num_kv_heads) == (512, 64, 4)
    assert (config.compression, config.gate, config.independent_kv) == ("mlp", "sigmoid", True)


@pytest.mark.parametrize("value", [1.0, "8", None, True])
@pytest.mark.parametrize("name", INTS)
def test_lengths_are_ints(name, value):
    with refused(f"{name}: expected an int, got {value!r} ({type(value).__name__})"):
        NSAConfig(**{name: value})


@pytest.mark.parametrize("name", INTS)
def test_lengths_have_a_least_value(name):
    least = 0 if name in ("num_initial", "num_local") else 1
    with refused(f"{name}: expected at least {least}, got {least - 1}"):
        NSAConfig(**{name: least - 1})


@pytest.mark.parametrize("name", [*INTS, "value_dim"])
def test_lengths_have_a_largest_value(name):
    """Beyond it nothing could count them; more digits than Python prints are no exception."""
    most = MOST.get(name, 2**31 - 1)
    hint = ", or None" if name == "value_dim" else ""
    with refused(f"{name}: expected at most {most}{hint}, got {most + 1}"):
        NSAConfig(**{name: most + 1})
    with refused(f"{name}: expected at most {most}{hint}, got int too long to print"):
        NSAConfig(**{name: 10**5000})


def test_every_block_may_be_forced():
    assert NSAConfig(num_initial=1, num_local=2, num_selected=3).num_selected == 3


def test_no_block_needs_to_be_forced():
    assert NSAConfig(num_initial=0, num_local=0, num_selected=1).num_selected == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value_dim": 0}, "value_dim: expected at least 1, or None, got 0"),
        ({"value_dim": 1.5}, "value_dim: expected an int, got 1.5 (float)"),
        (
            {"num_heads": 6, "num_kv_heads": 4},
            "num_heads: expected a multiple of num_kv_heads=4, got 6",
        ),
        (
            {"compress_block": 24},
            "compress_block: expected a multiple of compress_stride=16, got 24",
        ),
        (
            {"select_block": 72},
            "select_block: expected a multiple of compress_stride=16, got 72",
        ),
        (
            {"compress_block": 80},
            "compress_block: expected at most select_block=64, got 80",
        ),
        (
            {"num_initial": 1, "num_local": 2, "num_selected": 2},
            "num_initial + num_local: expected at most num_selected=2, got 3",
        ),
        ({"scale": float("nan")}, "scale: expected a finite number, or None, got nan"),
        ({"scale": "1"}, "scale: expected a finite number, or None, got '1'"),
        ({"scale": True}, "scale: expected a finite number, or None, got True"),
        ({"scale": 10**400}, f"scale: expected a finite number, or None, got 1{199 * '0'}…"),
        (
            {"scale": -1e-300},
            "scale: expected 0, or a number of a size between 1e-37 and 1e38, which float32 holds, "
            "or None, got -1e-300",
        ),
        (
            {"rope_theta": 1e300},
            "rope_theta: expected a number of a size between 1e-37 and 1e38, which float32 holds, "
            "or None, got 1e+300",
        ),
        (
            {"compression": "MLP"},
            "compression: expected one of the known names, got 'MLP'; "
            "did you mean 'mlp'? (known: mlp, linear, mean)",
        ),
        (
            {"compression": 3},
            "compression: expected one of the known names, got 3; (known: mlp, linear, mean)",
        ),
        (
            {"gate": "sigmod"},
            "gate: expected one of the known names, got 'sigmod'; "
            "did you mean 'sigmoid'? (known: sigmoid, softmax)",
        ),
        ({"independent_kv": 1}, "independent_kv: expected True or False, got 1"),
        ({"rope_theta": 0.0}, "rope_theta: expected a finite number > 0, or None, got 0.0"),
        (
            {"rope_theta": float("inf")},
            "rope_theta: expected a finite number > 0, or None, got inf",
        ),
        ({"rope_theta": "x"}, "rope_theta: expected a finite number > 0, or None, got 'x'"),
        ({"head_dim": 7}, "head_dim: expected even under RoPE (or rope_theta=None), got 7"),
        ({"select_share": 48}, "select_share: expected a divisor of select_block=64, got 48"),
        ({"select_share": 128}, "select_share: expected a divisor of select_block=64, got 128"),
        *(
            (
                {"select_schedule": schedule},
                f"select_schedule: expected {expected}, got {schedule!r}",
            )
            for schedule, expected in (
                (((512, 2),), "at least num_initial + num_local=3 blocks everywhere"),
                (((512, 17),), "at most num_selected=16 blocks everywhere"),
                (((512, 4), (512, 8)), "ascending positions"),
                (((2048, 4), (512, 8)), "ascending positions"),
                *(
                    (schedule, "pairs of ints >= 1, (position, blocks), or None")
                    for schedule in (
                        (),
                        (512, 4),
                        ((0, 4),),
                        ((512, 4.0),),
                        ((512, 4, 5),),
                        "512:4",
                    )
                ),
            )
        ),
        *(
            (
                {"select_mass": mass},
                f"select_mass: expected a number in (0, 1], or None, got {mass!r}",
            )
            for mass in (0, 0.0, -0.5, 1.5, float("nan"), "0.5", True)
        ),
        *(
            (
                {"select_regions": regions},
                "select_regions: expected two ints >= 1, (blocks, regions), or None, "
                f"got {regions!r}",
            )
            for regions in ((0, 4), (4, 0), (4,), (4, 2, 1), (4.0, 2), 4, "4,2")
        ),
        (
            {"score_dtype": "fp4"},
            "score_dtype: expected one of the known names, got 'fp4'; "
            "did you mean 'fp8'? (known: input, fp8)",
        ),
    ],
)
def test_a_broken_rule_is_named(changes, message):
    with refused(message):
        NSAConfig(**changes)


@pytest.mark.parametrize("scale", [-2.5, 0, 1e-37, 1e38])
def test_a_scale_may_have_any_sign(scale):
    assert NSAConfig(scale=scale).softmax_scale == scale


def test_an_odd_head_needs_no_rope():
    assert NSAConfig(head_dim=7, rope_theta=None).head_dim == 7


def test_mistakes_are_value_errors_and_nsa_errors():
    with pytest.raises(ValueError, match="head_dim"):
        NSAConfig(head_dim=0)
    with pytest.raises(NSAError, match="head_dim"):
        NSAConfig(head_dim=0)


def test_arguments_are_named():
    with pytest.raises(TypeError, match="positional"):
        NSAConfig(64)


def test_it_does_not_change():
    config = NSAConfig()
    with pytest.raises(FrozenInstanceError, match="window"):
        config.window = 3
    # Without __dict__ a misspelt field cannot be added; Python says so in more than one way.
    with pytest.raises((AttributeError, TypeError), match=r"windows|super"):
        config.windows = 3


def test_it_is_a_value():
    config = NSAConfig(window=7)
    assert config == NSAConfig(window=7) != NSAConfig()
    assert hash(config) == hash(NSAConfig(window=7))
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_derived_values():
    config = NSAConfig(num_heads=12, num_kv_heads=4, head_dim=64)
    assert config.group == 3
    assert config.dv == 64
    assert config.softmax_scale == 0.125
    config = NSAConfig(value_dim=32, scale=2)
    assert config.dv == 32
    assert config.softmax_scale == 2.0
    assert isinstance(config.softmax_scale, float)


@pytest.mark.parametrize(
    ("length", "blocks"), [(0, 0), (31, 0), (32, 1), (47, 1), (48, 2), (63, 2), (64, 3)]
)
def test_a_partial_tail_makes_no_compressed_block(length, blocks):
    assert NSAConfig().num_compressed(length) == blocks


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    assert NSAConfig.preset(name) == NSAConfig.preset(name)
    assert NSAConfig.preset(name, window=9).window == 9


def test_the_presets_sizes():
    paper = NSAConfig.preset("paper")
    assert paper == NSAConfig(head_dim=192, value_dim=128)
    small = NSAConfig.preset("small")
    assert (small.num_heads, small.num_kv_heads, small.head_dim) == (12, 2, 64)
    tiny = NSAConfig.preset("tiny")
    assert tiny.num_heads * tiny.head_dim <= 128  # a CPU trains it
    short = NSAConfig.preset("s2048")
    assert (short.select_block, short.num_selected, short.window) == (128, 12, 256)
    assert (short.num_kv_heads, short.compress_block, short.compress_stride) == (4, 32, 16)
    assert short.num_heads * short.head_dim == small.num_heads * small.head_dim
    long = NSAConfig.preset("long")
    assert long.select_share > 1
    assert long.select_regions is not None
    assert NSAConfig.preset("cpu").num_selected < NSAConfig().num_selected


def test_an_unknown_preset():
    with refused(
        "preset: expected one of the known names, got 'papr'; "
        "did you mean 'paper'? (known: paper, small, tiny, s2048, short, long, cpu)"
    ):
        NSAConfig.preset("papr")


def test_a_preset_with_an_unknown_change():
    with pytest.raises(ConfigError, match=r"got 'windw'; did you mean 'window'\?"):
        NSAConfig.preset("tiny", windw=3)


def test_a_preset_with_a_bad_change():
    with refused("window: expected at least 1, got 0"):
        NSAConfig.preset("tiny", window=0)


def test_changes_of_a_preset_are_checked_together():
    config = NSAConfig.preset("tiny", compress_stride=4, compress_block=4, select_block=4)
    assert config.select_block == 4


def test_nearest_without_anything_near():
    assert nearest("zzz", ("abc", "def")) == "(known: abc, def)"


def test_nearest_ignores_case():
    assert nearest("SDPA", ("sdpa", "auto")) == "did you mean 'sdpa'? (known: sdpa, auto)"
