"""The measures, held to loops over plain lists and to the oracle's masks and probabilities."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from nsa import reference
from nsa.config import NSAConfig
from nsa.inspection import LayerCall, Recording, oracle_lists, random_lists, report
from nsa.inspection import dense as dense_module
from nsa.inspection import lists as of_lists
from nsa.inspection import scores as scores_module
from nsa.inspection.dense import dense_measures
from nsa.inspection.recording import SequenceRecord
from nsa.inspection.reports import briefs
from nsa.inspection.scores import score_measures
from nsa.inspection.sinks import sinks
from nsa.reference.masks import compressed_mask, selected_mask, window_mask
from nsa.reference.selection import selection_scores

CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    compress_block=4,
    compress_stride=2,
    select_block=6,
    num_selected=3,
    num_local=1,
    window=7,
)
T = 61
CONFIGS = {
    "plain": CONFIG,
    "shared": replace(CONFIG, select_share=3),
    "by mass": replace(CONFIG, select_mass=0.5),
    "scheduled": replace(CONFIG, select_schedule=((30, 2),)),
    "one group": replace(CONFIG, num_heads=3, num_kv_heads=1),
}


def make_record(config: NSAConfig, length: int = T, seed: int = 0) -> SequenceRecord:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    H, K, D = config.num_heads, config.num_kv_heads, config.head_dim
    q, k_compressed = draw(length, H, D) * 2, draw(config.num_compressed(length), K, D)
    return SequenceRecord(
        config=config,
        q=q,
        k_compressed=k_compressed,
        k_selected=draw(length, K, D),
        k_window=draw(length, K, D),
        gates=torch.rand(length, H, 3, generator=generator, dtype=torch.float64),
        block_idx=reference.select_blocks(q[None], k_compressed[None], config)[0],
    )


@pytest.fixture(params=CONFIGS, ids=str)
def record(request, monkeypatch):
    """One sequence, with chunks that are shorter than it."""
    for module in (scores_module, dense_module):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 4 * 20 * 24)
    return make_record(CONFIGS[request.param])


def sets(block_idx) -> list[list[set[int]]]:
    return [[{j for j in row if j >= 0} for row in groups] for groups in block_idx.tolist()]


def listed_of(record: SequenceRecord) -> torch.Tensor:
    return of_lists.listed_blocks(record.block_idx, math.ceil(len(record.q) / 6))


def forced(t: int) -> set[int]:
    return {0, t // 6}


def by_query(record, measure) -> torch.Tensor:
    """[T, K] of ``measure(t, k)``, NaN where it divides by nothing."""

    def value(t, k):
        try:
            return float(measure(t, k))
        except (ZeroDivisionError, LookupError):
            return math.nan

    groups = range(record.config.num_kv_heads)
    return torch.tensor([[value(t, k) for k in groups] for t in range(len(record.q))])


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), equal_nan=True, rtol=1e-6, atol=1e-6)


# Lists


def test_lists_against_sets(record):
    config, L, listed = record.config, sets(record.block_idx), listed_of(record)
    ranked = of_lists.ranked_blocks(listed, config)
    K, n_ranked = config.num_kv_heads, lambda t, k: L[t][k] - forced(t)

    def before(t):
        if t < 0:
            raise LookupError
        return L[t]

    def shared(a, b):
        return len(a & b) / len(a)

    same(
        of_lists.overlap_with_token_before(listed, listed),
        by_query(record, lambda t, k: shared(L[t][k], before(t - 1)[k])),
    )
    same(
        of_lists.overlap_with_token_before(ranked, listed),
        by_query(record, lambda t, k: shared(n_ranked(t, k), before(t - 1)[k])),
    )
    for mask, part in ((listed, lambda t, k: L[t][k]), (ranked, n_ranked)):
        same(
            of_lists.overlap_with_other_groups(mask, listed),
            by_query(
                record,
                lambda t, k, part=part: (
                    sum(shared(part(t, k), L[t][o]) for o in range(K) if o != k) / (K - 1)
                ),
            ),
        )
    same(
        of_lists.has_choice(listed, config),
        by_query(record, lambda t, k: t // 6 + 1 > len(L[t][k])),
    )
    same(
        of_lists.chance_of_block(listed, config),
        by_query(record, lambda t, k: len(n_ranked(t, k)) / (t // 6 + 1 - len(forced(t)))),
    )

    def later(t, k):
        if t // 6 + 1 < 2 * len(L[t][k]):
            raise LookupError
        return shared(n_ranked(t, k) & set(range((t - 6) // 6 + 1)), before(t - 6)[k])

    same(of_lists.same_a_block_later(listed, config), by_query(record, later))


@pytest.mark.parametrize("m", [1, 4, 10, 16, 61, 100])
def test_unions_against_sets(record, m):
    L = sets(record.block_idx)
    want = [
        [len(set().union(*(L[t][k] for t in range(i * m, i * m + m)))) for k in range(len(L[0]))]
        for i in range(T // m)
    ]
    assert of_lists.union_sizes(listed_of(record), m).tolist() == want


def test_lists_that_ignore_the_query_are_told_apart():
    """The first blocks and the own one, whatever the query."""
    config = replace(CONFIG, num_selected=4)
    fixed = torch.stack([torch.tensor([0, 1, 2, max(t // 6, 3)]) for t in range(120)])
    listed = of_lists.listed_blocks(fixed[:, None].expand(120, 2, 4), 20)
    known = of_lists.same_a_block_later(listed, config)
    assert known[60:].eq(1).all()
    generator = torch.Generator().manual_seed(0)
    drawn = of_lists.listed_blocks(random_lists(120, 2, config, generator), 20)
    assert of_lists.same_a_block_later(drawn, config)[60:].nanmean() < 0.5


def test_a_map_keeps_its_mass():
    listed = listed_of(make_record(CONFIG))
    whole = of_lists.block_map(listed, rows=100, columns=100)
    assert torch.equal(whole.transpose(0, 1).bool(), listed)
    small = of_lists.block_map(listed, rows=7, columns=4)
    assert small.shape == (2, 7, 4)
    row, column = torch.arange(T) * 7 // T, torch.arange(11) * 4 // 11
    for r, c in itertools.product(range(7), range(4)):
        tile = listed[row == r][:, :, column == c].float().mean((0, 2))
        torch.testing.assert_close(small[:, r, c], tile)


# Scores


def test_scores_against_the_oracle(record):
    config, listed = record.config, listed_of(record)
    found = score_measures(record, listed)
    scores = selection_scores(record.q[None], record.k_compressed[None], config)[0]
    share = scores / scores.sum(-1, keepdim=True)
    same(found.mass_kept, (share * listed).sum(-1))
    same(found.entropy, -(share * share.clamp_min(1e-300).log()).sum(-1))
    N = record.k_compressed.shape[0]
    mask = compressed_mask(T, N, config, 0, "cpu")[0, :, 0]
    p = probabilities(record.q, record.k_compressed, mask[:, None].expand(-1, 4, -1), config)
    same(found.sink, p[..., 0].masked_fill(~mask.any(-1)[:, None], math.nan))


def probabilities(q, k, mask, config):
    """[T, H, S] of masked attention, group by group."""
    k = k.repeat_interleave(config.group, 1)
    dots = torch.einsum("thd,shd->ths", q, k) * config.softmax_scale
    p = dots.masked_fill(~mask[:, : q.shape[1]], -math.inf).softmax(-1)
    return p.masked_fill(~mask[:, : q.shape[1]], 0.0)


def masks(record):
    """Causal, listed and window masks, [T, H, S]."""
    config = record.config
    t = torch.arange(T)
    causal = (t <= t[:, None])[:, None].expand(-1, config.num_heads, -1)
    listed = selected_mask(record.block_idx[None], T, config, 0)[0]
    window = window_mask(T, T, config, 0, "cpu")[0].expand_as(causal)
    return causal, listed.repeat_interleave(config.group, 1), window


def test_dense_mass_against_the_oracles_masks(record):
    config = record.config
    found = dense_measures(record, listed_of(record))
    causal, listed, window = masks(record)
    p = probabilities(record.q, record.k_selected, causal, config)
    same(found.in_list, (p * listed).sum(-1))
    same(found.read, (p * (listed | window)).sum(-1))
    same(found.sink, p[..., :4].sum(-1))
    inside = probabilities(record.q, record.k_selected, listed, config)
    same(found.sink_selected, inside[..., :4].sum(-1))


def test_no_chunk_is_larger_than_it_may_be(monkeypatch):
    monkeypatch.setattr(dense_module, "CHUNK_ELEMENTS", 4 * 30 * 60)
    monkeypatch.setattr(scores_module, "CHUNK_ELEMENTS", 4 * 30 * 60)
    record = make_record(CONFIG, 241)
    dense = list(dense_module.dense_probabilities(record.q, record.k_selected, CONFIG))
    scores = list(scores_module.compressed_probabilities(record))
    assert len(dense) > 5
    assert len(scores) > 5
    least = 4 * 6 * 241  # one block of rows, whatever the length
    assert all(p.numel() <= max(4 * 30 * 60, least) for _, p in dense + scores)
    for parts in (dense, scores):
        assert [row for rows, _ in parts for row in range(241)[rows]] == list(range(241))


def test_the_oracle_ranks_by_mass(record):
    """The best list has the most mass of all lists as long with the forced blocks, by trial."""
    config = replace(record.config, select_share=1, select_mass=None)
    record = replace(record, config=config)
    causal, _, _ = masks(record)
    p = probabilities(record.q, record.k_selected, causal, config)
    lists = sets(oracle_lists(record.q, record.k_selected, config))
    found = dense_measures(record, listed_of(record))
    mine = sets(record.block_idx)
    for t in range(0, T, 7):
        for k in range(config.num_kv_heads):
            heads = slice(k * config.group, (k + 1) * config.group)
            mass = [float(p[t, heads, 6 * j : 6 * j + 6].sum(-1).mean()) for j in range(t // 6 + 1)]
            free = sorted(set(range(t // 6 + 1)) - forced(t), key=lambda j: -mass[j])
            most = min([n for end, n in config.select_schedule or () if t < end] or [3])
            best = forced(t) | set(free[: most - len(forced(t))])
            assert lists[t][k] == best
            assert sum(mass[j] for j in best) == pytest.approx(float(found.best[t, heads].mean()))
            if best - forced(t):
                recall = len((best - forced(t)) & mine[t][k]) / len(best - forced(t))
                assert recall == pytest.approx(float(found.recall[t, k]))
            else:
                assert found.recall[t, k].isnan()
            choices = itertools.combinations(free, len(mine[t][k] - forced(t)))
            drawn = [sum(mass[j] for j in forced(t) | set(choice)) for choice in choices]
            if free:
                mean = sum(drawn) / len(drawn)
                assert mean == pytest.approx(float(found.random[t, heads].mean()))


def test_options_hold_for_oracle_and_random_lists(record):
    config = record.config
    generator = torch.Generator().manual_seed(0)
    made = {
        "oracle": oracle_lists(record.q, record.k_selected, config),
        "random": random_lists(T, config.num_kv_heads, config, generator),
    }
    for block_idx in made.values():
        lists = sets(block_idx)
        for t, groups in enumerate(lists):
            for k, blocks in enumerate(groups):
                assert blocks <= set(range(t // 6 + 1))
                assert forced(t) <= blocks
                assert len(blocks) <= 3
                if config.select_share > 1:
                    assert blocks == lists[t - t % config.select_share][k]
                if config.select_schedule:
                    assert t >= 30 or len(blocks) <= 2
    assert not torch.equal(made["oracle"], made["random"])


def test_sinks_against_the_oracles_masks(record):
    config, listed = record.config, listed_of(record)
    found = sinks(record, listed, score_measures(record, listed), dense_measures(record, listed))
    causal, inside, window = masks(record)
    N = record.k_compressed.shape[0]
    seen = compressed_mask(T, N, config, 0, "cpu")[0].expand(-1, config.num_heads, -1)
    late = slice(6, None)  # an earlier query sees nothing but first tokens
    for branch, k, mask, first in (
        ("compressed", record.k_compressed, seen, 1),
        ("selected", record.k_selected, inside, 4),
        ("window", record.k_window, window, 4),
        ("dense", record.k_selected, causal, 4),
    ):
        p = probabilities(record.q, k, mask, config)
        here = slice(6, 7) if branch == "window" else late
        same(found[branch].mass[here], p[here, :, :first].sum(-1))
        same(found[branch].uniform[here], mask[here, :, :first].sum(-1) / mask[here].sum(-1))
        assert found[branch].mass[:6].isnan().all()
    assert found["window"].mass[7:].isnan().all()


# The report


def recording_of(*records: SequenceRecord, layer: str = "0", packed: bool = False) -> Recording:
    names = ("q", "k_compressed", "k_selected", "k_window", "gates", "block_idx")
    if not packed:
        calls = [{name: getattr(x, name)[None] for name in names} for x in records]
        cu_seqlens = None
    else:
        calls = [{name: torch.cat([getattr(x, name) for x in records])[None] for name in names}]
        lengths = [len(x.q) for x in records]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Recording(
        [LayerCall(layer=layer, config=CONFIG, cu_seqlens=cu_seqlens, **call) for call in calls]
    )


def test_packed_sequences_count_like_those_alone():
    records = [make_record(CONFIG, length, seed=length) for length in (61, 3, 40)]
    alone, packed = report(recording_of(*records)), report(recording_of(*records, packed=True))
    assert alone == packed
    assert alone.sequences == (61, 3, 40)


def test_layers_are_compared_with_the_one_before():
    first, second = make_record(CONFIG), make_record(CONFIG, seed=1)
    both = Recording(recording_of(first).calls + recording_of(second, layer="1").calls)
    top, bottom = report(both).layers
    assert top.overlap_layer is None
    shares = [
        len(mine & other) / len(mine)
        for t, (groups, others) in enumerate(
            zip(sets(second.block_idx), sets(first.block_idx), strict=True)
        )
        for mine, other in zip(groups, others, strict=True)
        if t // 6 + 1 > len(mine)
    ]
    assert bottom.overlap_layer.all == pytest.approx(sum(shares) / len(shares))
    lengths = Recording(
        recording_of(first).calls + recording_of(make_record(CONFIG, 40), layer="1").calls
    )
    assert report(lengths).layers[1].overlap_layer is None


def test_gates_are_counted():
    record = make_record(CONFIG)
    (layer,) = report(recording_of(record)).layers
    for c, branch in enumerate(("compressed", "selected", "window")):
        gates = record.gates[..., c]
        assert layer.gates[branch].mean == pytest.approx(float(gates.mean()))
        assert layer.gates[branch].heads == pytest.approx(gates.mean(0).tolist())
        histogram = layer.gates[branch].histogram
        assert sum(histogram) == pytest.approx(1)
        in_third = float(((gates >= 0.1) & (gates < 0.15)).double().mean())
        assert histogram[2] == pytest.approx(in_third)


def test_what_only_a_choice_could_tell_is_none_without_one():
    (layer,) = report(recording_of(make_record(CONFIG, 14))).layers
    assert layer.choosing == 0
    assert layer.overlap_token is layer.recall is layer.unions is layer.mass_read is None
    assert 0 < layer.gates["window"].mean < 1


def test_the_brief_part_agrees_with_the_report():
    recording = recording_of(make_record(CONFIG), make_record(CONFIG, 50, seed=2))
    (whole,), (brief,) = report(recording).layers, briefs(recording)
    assert brief.overlap_token == whole.overlap_token.all
    assert brief.mass_kept == whole.mass_kept.mean
    assert brief.same_a_block_later == whole.same_a_block_later
    assert brief.gates == pytest.approx({name: gate.mean for name, gate in whole.gates.items()})
