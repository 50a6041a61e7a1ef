"""What the tools share: flags made from a dataclass."""

import argparse
from dataclasses import dataclass
from typing import Literal

import pytest

from nsa.errors import UsageError
from nsa.tools.common.cli import Parser, add_fields


@dataclass
class Example:
    """Not the help of any flag."""

    a_number: int
    """Number of ``things``,
    100 % of them."""
    share: float | None = None
    """Share."""
    seed: int = 0
    """NSA seed."""
    loud: bool = False
    """Whether to shout."""
    kind: Literal["one", "two"] | None = None
    """Kind."""
    hidden: str = "x"
    """Has no flag."""


@dataclass
class Silent:
    number: int
    other: int


def parser_of(config: type, **options: object) -> Parser:
    parser = Parser(prog="x", description="y", argument_default=argparse.SUPPRESS)
    add_fields(parser, config, **options)
    return parser


def test_flags_of_a_dataclass():
    parser = parser_of(Example, leave_out=("hidden",))
    assert vars(parser.parse_strictly([])) == {}
    argv = ["--a-number", "3", "--share", "0.5", "--loud", "--kind", "two"]
    given = {"a_number": 3, "share": 0.5, "loud": True, "kind": "two"}
    assert vars(parser.parse_strictly(argv)) == given
    for wrong, text in (
        (["--kind", "three"], "invalid choice: 'three'"),
        (["--seed", "x"], "argument --seed: expected an integer, got 'x'"),
        (["--share", "x"], "argument --share: expected a number, got 'x'"),
        (["--hidden", "x"], "expected a known flag, got --hidden"),
    ):
        with pytest.raises(UsageError, match=text):
            parser.parse_strictly(wrong)


def test_the_help_is_the_docstring_of_the_field():
    text = parser_of(Example, show_defaults=True, hidden={"metavar": "H"}).format_help()
    assert [" ".join(line.split()) for line in text.splitlines()[-6:]] == [
        "--a-number N number of things, 100 % of them",
        "--share X share",
        "--seed N NSA seed (default: 0)",
        "--loud whether to shout",
        "--kind {one,two} kind",
        "--hidden H has no flag (default: x)",
    ]
    assert "default" not in parser_of(Example).format_help()


def test_a_field_without_a_docstring_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match=r"Silent\.number has no docstring"):
        parser_of(Silent)


@dataclass
class Pairs:
    regions: tuple[int, int] | None = None
    """One pair."""
    schedule: tuple[tuple[int, int], ...] | None = None
    """Several."""


def test_pairs_of_integers():
    parser = Parser(prog="x")
    add_fields(parser, Pairs)
    given = parser.parse_strictly(["--regions", "8,16", "--schedule", "512:4,2048:8"])
    assert given.regions == (8, 16)
    assert given.schedule == ((512, 4), (2048, 8))
    with pytest.raises(UsageError, match="expected two integers, such as 8,16, got '8;16'"):
        parser.parse_strictly(["--regions", "8;16"])
