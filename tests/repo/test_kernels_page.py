"""docs/kernels.md: the formulas give the figures beside them, and what bench counts."""

import re
from pathlib import Path

import pytest
import torch

from nsa import NSAConfig
from nsa.core.flops import branch_pairs, search_pairs
from nsa.tools.bench.work import work
from nsa.tools.common.problems import Trial

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
CONFIG = NSAConfig(num_heads=64, num_kv_heads=4, head_dim=128, rope_theta=None)
T = 65_536
PEAK = 731e12
H = CONFIG.num_heads
SYMBOLS = {
    "T": T,
    "H": H,
    "K": CONFIG.num_kv_heads,
    "D": CONFIG.head_dim,
    "V": CONFIG.dv,
    "N": CONFIG.num_compressed(T),
    "L": CONFIG.select_block,
    "l": CONFIG.compress_block,
    "n": CONFIG.num_selected,
    "w": CONFIG.window,
    "e": 2,
    "P_cmp": H * branch_pairs("compressed", CONFIG, [T]),
    "P_slc": H * branch_pairs("selected", CONFIG, [T]),
    "P_win": H * branch_pairs("window", CONFIG, [T]),
    "P_sel": H * search_pairs(CONFIG, T),
}


def table(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading."""
    text = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def value(formula: str) -> float:
    """Of a cell such as `2(D+V)·P_win`."""
    text = formula.strip("`").replace("·", "*")
    return eval(re.sub(r"(?<=[\d)])(?=[A-Za-z(])", "*", text), {}, SYMBOLS)


def agrees(cell: str, found: float) -> bool:
    """Whether a figure is what was found, to its last digit."""
    digits = len(cell.partition(".")[2])
    return cell == f"{found:.{digits}f}" or float(cell) == float(f"{found:.3g}")


@pytest.mark.parametrize("row", table("The sums"), ids=lambda row: row[0])
def test_sums(row: list[str]) -> None:
    _, flops, tflop, bytes_, gigabytes, ms, rate, share = row
    assert agrees(tflop, value(flops) / 1e12)
    assert agrees(gigabytes, value(bytes_) / 1e9)
    per_second = value(flops) / float(ms) * 1e3
    assert agrees(rate, per_second / 1e12)
    assert agrees(share.removesuffix("%"), 100 * per_second / PEAK)


@pytest.mark.parametrize(
    "row", [*table("What moves data"), *table("Through the L2 cache")], ids=lambda row: row[0]
)
def test_bytes(row: list[str]) -> None:
    assert agrees(row[2], value(row[1]) / 1e9)


def test_together_they_compute_what_bench_counts() -> None:
    """Forward the same; backward the scores and dp once more."""
    trial = Trial(
        config=CONFIG,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        lengths=(T,),
        packed=False,
    )
    forward, backward = (pass_.flops for pass_ in work("all+select", trial))
    counted = {row[0].split("`")[1]: value(row[1]) for row in table("The sums")}
    back = sum(flops for name, flops in counted.items() if "_bwd_" in name)
    assert sum(counted.values()) - back == forward
    pairs = sum(SYMBOLS[name] for name in ("P_cmp", "P_slc", "P_win"))
    assert back == backward + 2 * (CONFIG.head_dim + CONFIG.dv) * pairs


def test_every_kernel_is_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    source = "".join(x.read_text(encoding="utf-8") for x in (PAGE.parents[1] / "nsa").rglob("*.py"))
    kernels = set(re.findall(r"^@kernel\([^@]*?\)\ndef (nsa_\w+)\(", source, re.MULTILINE))
    assert len(kernels) > 15
    short = ("chunk_begins", "chunk_offsets", "scatter")
    missing = {x for x in kernels if x not in text and not x.endswith(short)}
    assert missing == set()
    assert all(f"`_{name}`" in text for name in short)
