"""Native Sparse Attention (arXiv 2502.11089) in NumPy, float64, one Python loop per sentence.

A second oracle that shares nothing with the package: `nsa.reference` is held to it, and it is held
to cases worked by hand. It is written for the eye, not for speed. The functions ending in `_alone`
see one sequence without a batch dimension; the others cut batches and packed sequences into such
sequences and treat each alone.

Names carry their shape: B batch, T query tokens, S key tokens, N compressed blocks, J selection
blocks, H query heads, K key/value heads, D key size, V value size, L flattened block.
"""

import itertools
import math

import numpy as np

# -- cutting a batch into sequences -------------------------------------------------------------


def token_ranges(length, cu_seqlens):
    """Tokens of each sequence of a batch row: one range unless the row is packed."""
    if cu_seqlens is None:
        return [range(length)]
    bounds = [int(bound) for bound in cu_seqlens]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


def sequences(batch, length, config, cu_seqlens):
    """(batch row, slice of its tokens, slice of its compressed blocks) of every sequence."""
    for b in range(batch):
        first_block = 0
        for tokens in token_ranges(length, cu_seqlens):
            num_blocks = len(compressed_spans(len(tokens), config))
            yield (
                b,
                slice(tokens.start, tokens.stop),
                slice(first_block, first_block + num_blocks),
            )
            first_block += num_blocks


# -- geometry of one sequence -------------------------------------------------------------------


def compressed_spans(length, config):
    """Tokens of each compressed block: `l` of them, one block every `d`, none that is partial."""
    spans = []
    start = 0
    while start + config.compress_block <= length:
        spans.append(range(start, start + config.compress_block))
        start += config.compress_stride
    return spans


def selection_spans(length, config):
    """Tokens of each selection block: `l'` of them, the last one as far as the sequence goes."""
    starts = range(0, length, config.select_block)
    return [range(s, min(s + config.select_block, length)) for s in starts]


def overlaps(length, config):
    """Tokens that each compressed block and each selection block share, [N, J]."""
    num_selection = len(selection_spans(length, config))
    overlap_NJ = np.zeros((len(compressed_spans(length, config)), num_selection))
    for i, compressed in enumerate(compressed_spans(length, config)):
        for j, selection in enumerate(selection_spans(length, config)):
            overlap_NJ[i, j] = len(set(compressed) & set(selection))
    return overlap_NJ


# -- attention of one query to a list of keys ---------------------------------------------------


def attention_scale(config):
    return config.head_dim**-0.5 if config.scale is None else config.scale


def softmax(score_S):
    weight_S = np.exp(score_S - score_S.max())
    return weight_S / weight_S.sum()


def attend(q_D, k_SD, v_SV, scale):
    """Attention of one query to all the keys it is given; (0, -inf) if they are none."""
    if len(k_SD) == 0:
        return np.zeros(v_SV.shape[-1]), -math.inf
    score_S = scale * (k_SD @ q_D)
    lse = score_S.max() + math.log(np.exp(score_S - score_S.max()).sum())
    return softmax(score_S) @ v_SV, lse


def attend_rows(q_THD, k_SKD, v_SKV, config, visible):
    """Every query token and head attends to the keys `visible(t, key/value head)` lists."""
    T, H, _ = q_THD.shape
    group = config.num_heads // config.num_kv_heads
    out_THV = np.zeros((T, H, v_SKV.shape[-1]))
    lse_TH = np.zeros((T, H))
    for t in range(T):
        for h in range(H):
            kv_head = h // group
            keys = visible(t, kv_head)
            out_THV[t, h], lse_TH[t, h] = attend(
                q_THD[t, h], k_SKD[keys, kv_head], v_SKV[keys, kv_head], attention_scale(config)
            )
    return out_THV, lse_TH


# -- the steps, for one sequence ----------------------------------------------------------------


def compress_alone(x_TKD, weights, config):
    """φ: every block of `l` tokens becomes one, head by head."""
    _, heads, size = x_TKD.shape
    spans = compressed_spans(len(x_TKD), config)
    out_NKD = np.zeros((len(spans), heads, size))
    for i, span in enumerate(spans):
        for head in range(heads):
            block_lD = np.stack([x_TKD[s, head] for s in span])
            out_NKD[i, head] = compress_block(block_lD, weights, config)
    return out_NKD


def compress_block(block_lD, weights, config):
    if config.compression == "mean":
        return sum(block_lD) / len(block_lD)
    if config.compression == "linear":
        block_L = np.concatenate(list(block_lD))
        return weights["proj.weight"] @ block_L + weights["proj.bias"]
    assert config.compression == "mlp"
    block_L = np.concatenate(list(block_lD + weights["position"]))
    hidden = weights["up.weight"] @ block_L + weights["up.bias"]
    return weights["down.weight"] @ gelu(hidden) + weights["down.bias"]


def gelu(x):
    """x times the probability that a standard normal variable is below x."""
    return np.array([value * 0.5 * (1.0 + math.erf(value / math.sqrt(2.0))) for value in x])


def apply_rope_alone(x_THD, theta):
    """Entries c and c + D/2 form a pair, turned by position · theta^(-2c/D)."""
    T, heads, size = x_THD.shape
    half = size // 2
    out_THD = np.zeros_like(x_THD)
    for t in range(T):
        for head in range(heads):
            for c in range(half):
                angle = t * theta ** (-2.0 * c / size)
                x, y = x_THD[t, head, c], x_THD[t, head, c + half]
                out_THD[t, head, c] = x * math.cos(angle) - y * math.sin(angle)
                out_THD[t, head, c + half] = x * math.sin(angle) + y * math.cos(angle)
    return out_THD


def visible_compressed(t, length, config):
    """A compressed block is visible once its last token is."""
    return [i for i, span in enumerate(compressed_spans(length, config)) if span[-1] <= t]


def compressed_attention_alone(q_THD, k_NKD, v_NKV, config):
    def visible(t, kv_head):
        return visible_compressed(t, len(q_THD), config)

    return attend_rows(q_THD, k_NKD, v_NKV, config, visible)


def selection_scores_alone(q_THD, k_NKD, config):
    """p_slc summed over the heads of a group (Eq. 9 and 10), [T, K, J]."""
    T, H, _ = q_THD.shape
    group = config.num_heads // config.num_kv_heads
    overlap_NJ = overlaps(T, config)
    score_TKJ = np.zeros((T, config.num_kv_heads, overlap_NJ.shape[1]))
    for t in range(T):
        visible = visible_compressed(t, T, config)
        if not visible:
            continue
        for h in range(H):
            kv_head = h // group
            raw = attention_scale(config) * (k_NKD[visible, kv_head] @ q_THD[t, h])
            p_cmp = softmax(raw)
            if config.score_dtype == "fp8":
                lse = raw.max() + math.log(np.exp(raw - raw.max()).sum())
                keys = np.array([fp8(k_NKD[i, kv_head]) for i in visible])
                p_cmp = np.exp(attention_scale(config) * (keys @ fp8(q_THD[t, h])) - lse)
            for p, i in zip(p_cmp, visible, strict=True):
                score_TKJ[t, kv_head] += p * overlap_NJ[i] / config.compress_stride
    return score_TKJ


def fp8(x_D):
    """x rounded to e4m3, four significant bits and exponents from -6, with one scale."""
    scale = np.abs(x_D).max() / 448 or 1.0
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(x_D / scale), 1e-30))), -6)
    step = 2.0 ** (exponent - 3)
    return np.round(x_D / scale / step) * step * scale


def select_blocks_alone(q_THD, k_NKD, config):
    T = len(q_THD)
    score_TKJ = selection_scores_alone(q_THD, k_NKD, config)
    block_idx_TKn = np.full((T, config.num_kv_heads, config.num_selected), -1, dtype=np.int32)
    for t in range(T):
        first = t - t % config.select_share
        for kv_head in range(config.num_kv_heads):
            searched = searched_blocks(first, q_THD[first], k_NKD, kv_head, config)
            chosen = choose(first, score_TKJ[first, kv_head], searched, config)
            block_idx_TKn[t, kv_head, : len(chosen)] = chosen
    return block_idx_TKn


def choose(t, score_J, searched, config):
    """Ascending numbers of the blocks that the query at `t` reads: forced ones, then the best."""
    forced = forced_blocks(t, config)
    most = config.num_selected
    for end, count in config.select_schedule or ():
        if t < end:
            most = count
            break
    best_first = sorted(set(searched) - set(forced), key=lambda j: (-score_J[j], j))
    chosen, mass = list(forced), sum(score_J[j] for j in forced)
    group = config.num_heads // config.num_kv_heads
    everything = group * config.compress_block / config.compress_stride
    for j in best_first[: most - len(forced)]:
        if config.select_mass not in (None, 1) and mass >= config.select_mass * everything:
            break
        chosen.append(j)
        mass += score_J[j]
    return sorted(chosen)


def candidates_at(t, config):
    return [j for j in range(t + 1) if j * config.select_block <= t]


def forced_blocks(t, config):
    candidates = candidates_at(t, config)
    initial = candidates[: config.num_initial]
    local = list(reversed(candidates))[: config.num_local]
    return sorted(set(initial) | set(local))


def searched_blocks(t, q_HD, k_NKD, kv_head, config):
    """The candidates that are ranked: all, or those of the regions that are searched."""
    candidates = candidates_at(t, config)
    if config.select_regions is None:
        return candidates
    size, count = config.select_regions
    group = config.num_heads // config.num_kv_heads
    scale, heads = attention_scale(config), range(kv_head * group, (kv_head + 1) * group)
    visible = [
        i for i in range(len(k_NKD)) if i * config.compress_stride + config.compress_block - 1 <= t
    ]
    per_region = size * config.select_block // config.compress_stride
    score = {}
    for region in sorted({j // size for j in candidates}):
        begin = [
            i
            for i in visible
            if i * config.compress_stride // config.select_block // size == region
        ]
        is_forced = any(j // size == region for j in forced_blocks(t, config))
        if is_forced or len(begin) < per_region:
            continue
        key_D = sum(k_NKD[i, kv_head] for i in begin) / per_region
        score[region] = 0.0
        for h in heads:
            all_h = [scale * float(k_NKD[i, kv_head] @ q_HD[h]) for i in visible]
            lse = max(all_h) + math.log(sum(math.exp(x - max(all_h)) for x in all_h))
            score[region] += math.exp(scale * float(key_D @ q_HD[h]) - lse)
    best = sorted(score, key=lambda region: (-score[region], region))[:count]
    return [j for j in candidates if j // size in best or j // size not in score]


def selected_attention_alone(q_THD, k_SKD, v_SKV, block_idx_TKn, config):
    spans = selection_spans(len(q_THD), config)

    def visible(t, kv_head):
        listed = {int(j) for j in block_idx_TKn[t, kv_head] if j != -1}
        return [s for j, span in enumerate(spans) if j in listed for s in span if s <= t]

    return attend_rows(q_THD, k_SKD, v_SKV, config, visible)


def window_attention_alone(q_THD, k_SKD, v_SKV, config):
    def visible(t, kv_head):
        return [s for s in range(len(q_THD)) if t - config.window < s <= t]

    return attend_rows(q_THD, k_SKD, v_SKV, config, visible)


# -- the steps, for a batch ---------------------------------------------------------------------


def compress(x_BTKD, weights, config, cu_seqlens=None):
    """[B, N, K, D]; of packed sequences the blocks one after the other, without surplus rows."""
    rows = [[] for _ in x_BTKD]
    for b, tokens, _ in sequences(*x_BTKD.shape[:2], config, cu_seqlens):
        rows[b].extend(compress_alone(x_BTKD[b, tokens], weights, config))
    return np.array(rows).reshape(len(x_BTKD), -1, *x_BTKD.shape[2:])


def apply_rope(x_BTHD, theta, cu_seqlens=None):
    out_BTHD = np.zeros_like(x_BTHD)
    for b in range(len(x_BTHD)):
        for tokens in token_ranges(x_BTHD.shape[1], cu_seqlens):
            here = slice(tokens.start, tokens.stop)
            out_BTHD[b, here] = apply_rope_alone(x_BTHD[b, here], theta)
    return out_BTHD


def compressed_attention(q_BTHD, k_BNKD, v_BNKV, config, cu_seqlens=None):
    out_BTHV, lse_BTH = np.zeros((*q_BTHD.shape[:3], v_BNKV.shape[-1])), np.zeros(q_BTHD.shape[:3])
    for b, tokens, blocks in sequences(*q_BTHD.shape[:2], config, cu_seqlens):
        out_BTHV[b, tokens], lse_BTH[b, tokens] = compressed_attention_alone(
            q_BTHD[b, tokens], k_BNKD[b, blocks], v_BNKV[b, blocks], config
        )
    return out_BTHV, lse_BTH


def select_blocks(q_BTHD, k_BNKD, config, cu_seqlens=None):
    B, T = q_BTHD.shape[:2]
    block_idx_BTKn = np.zeros((B, T, config.num_kv_heads, config.num_selected), dtype=np.int32)
    for b, tokens, blocks in sequences(B, T, config, cu_seqlens):
        block_idx_BTKn[b, tokens] = select_blocks_alone(
            q_BTHD[b, tokens], k_BNKD[b, blocks], config
        )
    return block_idx_BTKn


def selected_attention(q_BTHD, k_BSKD, v_BSKV, block_idx_BTKn, config, cu_seqlens=None):
    out_BTHV, lse_BTH = np.zeros((*q_BTHD.shape[:3], v_BSKV.shape[-1])), np.zeros(q_BTHD.shape[:3])
    for b, tokens, _ in sequences(*q_BTHD.shape[:2], config, cu_seqlens):
        out_BTHV[b, tokens], lse_BTH[b, tokens] = selected_attention_alone(
            q_BTHD[b, tokens],
            k_BSKD[b, tokens],
            v_BSKV[b, tokens],
            block_idx_BTKn[b, tokens],
            config,
        )
    return out_BTHV, lse_BTH


def window_attention(q_BTHD, k_BSKD, v_BSKV, config, cu_seqlens=None):
    out_BTHV, lse_BTH = np.zeros((*q_BTHD.shape[:3], v_BSKV.shape[-1])), np.zeros(q_BTHD.shape[:3])
    for b, tokens, _ in sequences(*q_BTHD.shape[:2], config, cu_seqlens):
        out_BTHV[b, tokens], lse_BTH[b, tokens] = window_attention_alone(
            q_BTHD[b, tokens], k_BSKD[b, tokens], v_BSKV[b, tokens], config
        )
    return out_BTHV, lse_BTH


def nsa_attention(
    q_BTHD, compressed, selected, window, gates_BTH3, config, cu_seqlens=None, block_idx=None
):
    """The three branches, each a (k, v) pair, mixed by the gates (Eq. 5)."""
    if block_idx is None:
        block_idx = select_blocks(q_BTHD, compressed[0], config, cu_seqlens)
    branches = [
        compressed_attention(q_BTHD, *compressed, config, cu_seqlens),
        selected_attention(q_BTHD, *selected, block_idx, config, cu_seqlens),
        window_attention(q_BTHD, *window, config, cu_seqlens),
    ]
    return sum(gates_BTH3[..., c, None] * out_BTHV for c, (out_BTHV, _) in enumerate(branches))
