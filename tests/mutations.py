"""Do the tests notice? Breaks one line at a time and expects a test to turn red.

    python -m tests.mutations            # all of them
    python -m tests.mutations oracle     # those whose name contains a word

Each breakage is applied to a copy of the tree. Those of the oracle must be caught by the NumPy
oracle alone, so only ``tests/reference/test_parity.py`` runs for them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

NUMPY = ("tests/reference/test_parity.py",)
BACKENDS = ("tests/backends/test_parity.py", "tests/backends/test_properties.py")
PIECES = ("tests/core/test_compress_rope.py",)
LAYER = ("tests/api/test_module.py",)
OPERATORS = ("tests/core/test_operators.py",)
FUNC = ("tests/api/test_torch_func.py",)
FLOPS = ("tests/core/test_flops.py",)
DETERMINISTIC = ("tests/backends/test_deterministic.py",)


@dataclass(frozen=True, slots=True)
class Mutation:
    """One line that is made wrong."""

    name: str
    path: str
    old: str
    """Must occur exactly once in the file."""
    new: str
    tests: tuple[str, ...]


def inspection(name: str, file: str, old: str, new: str) -> Mutation:
    tests = ("tests/inspection/test_metrics.py", "tests/inspection/test_recording.py")
    return Mutation(f"inspection: {name}", f"nsa/{file}", old, new, tests)


def oracle(name: str, file: str, old: str, new: str) -> Mutation:
    return Mutation(f"oracle: {name}", f"nsa/reference/{file}", old, new, NUMPY)


def sdpa(name: str, file: str, old: str, new: str) -> Mutation:
    return Mutation(f"sdpa: {name}", f"nsa/backends/{file}", old, new, BACKENDS)


def fa2(name: str, file: str, old: str, new: str) -> Mutation:
    return Mutation(f"fa2: {name}", f"nsa/backends/{file}", old, new, BACKENDS)


def folder(name: str, file: str, old: str, new: str, tests: str) -> Mutation:
    tests = f"tests/training/test_{tests}.py"
    return Mutation(f"folder: {name}", f"nsa/training/{file}", old, new, (tests,))


def context(name: str, file: str, old: str, new: str) -> Mutation:
    paths = tuple(f"tests/distributed/context/test_{x}.py" for x in ("layout", "parity", "errors"))
    return Mutation(f"context: {name}", f"nsa/distributed/context/{file}", old, new, paths)


def mesh(name: str, file: str, old: str, new: str, tests: str = "training/test_mesh") -> Mutation:
    return Mutation(f"mesh: {name}", f"nsa/{file}", old, new, (f"tests/{tests}.py",))


def generation(name: str, file: str, old: str, new: str) -> Mutation:
    tests = ("generation", "sampling", "decode_graph")
    paths = tuple(f"tests/models/test_{test}.py" for test in tests)
    return Mutation(f"generation: {name}", f"nsa/{file}", old, new, paths)


def hf(name: str, file: str, old: str, new: str, tests: str) -> Mutation:
    path, tests = (
        f"nsa/integrations/transformers/{file}",
        f"tests/integrations/transformers/test_{tests}.py",
    )
    return Mutation(f"transformers: {name}", path, old, new, (tests,))


MUTATIONS = (
    oracle("window off by one", "masks.py", "t - config.window < s", "t - config.window <= s"),
    oracle("visibility < for <=", "masks.py", "(last_token <= t)", "(last_token < t)"),
    oracle("selected sees the future", "masks.py", "listed & (s <= t)", "listed"),
    oracle("empty rows have lse 0", "attend.py", "highest + total.log()", "highest + total.clamp_min(1e-300).log()"),
    oracle("scale forgotten", "attend.py", "scores = scale * ", "scores = "),
    oracle(
        "overlap weights 1,2,2,2,2",
        "selection.py",
        "end = min(i * config.compress_stride + config.compress_block, (j + 1) * config.select_block)",
        "end = i * config.compress_stride + config.compress_block if start < (j + 1) * config.select_block else 0",
    ),
    oracle(
        "initial blocks not forced",
        "selection.py",
        "((j < config.num_initial) | (j > own - config.num_local))",
        "(j > own - config.num_local)",
    ),
    oracle(
        "one local block too many",
        "selection.py",
        "(j > own - config.num_local)",
        "(j >= own - config.num_local)",
    ),
    oracle("the block in progress does not count", "selection.py", "candidate = j <= own", "candidate = j < own"),
    oracle("one head of the group decides", "selection.py", "p_BTKGN.sum(3)", "p_BTKGN[:, :, :, 0]"),
    oracle("ties to the higher index", "selection.py", "order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :n]", "order = (J - 1 - ranked.flip(-1).sort(dim=-1, descending=True, stable=True).indices)[..., :n]"),
    oracle("the schedule counts from the wrong end", "selection.py", "reversed(config.select_schedule or ())", "config.select_schedule or ()"),
    oracle("a list ends one block late", "selection.py", "before = mass.cumsum(-1) - mass", "before = mass.cumsum(-1) - 2 * mass"),
    oracle("a list of one's own", "selection.py", "// config.select_share * config.select_share - q_start", "- q_start"),
    oracle("forced regions count", "selection.py", "contends = whole & ~of_forced", "contends = whole"),
    oracle("young regions are not searched", "selection.py", "return (best & contends) | ~contends", "return (best & contends) | of_forced"),
    oracle("fp8 without a scale", "selection.py", "scale = largest.masked_fill(largest == 0, 1.0)", "scale = torch.ones_like(largest)"),
    oracle("gate order swapped", "__init__.py", "gates.unbind(-1)", "gates.flip(-1).unbind(-1)"),
    oracle("position embedding forgotten", "compression.py", "(blocks_BNHLD + weights[\"position\"])", "blocks_BNHLD"),
    oracle("rotation the other way", "compression.py", "turned = pairs * rotation", "turned = pairs * rotation.conj()"),
    oracle("packed positions run on", "compression.py", "t[start:end] -= start", "t[start:end] -= 0"),
    sdpa("window off by one", "sdpa/window.py", "(s <= r - window.width)", "(s < r - window.width)"),
    sdpa("sequences leak", "sdpa/window.py", "if window.row_seq is not None:", "if window.row_seq is None and False:"),
    sdpa("empty rows divide by zero", "sdpa/selected.py", "sums.masked_fill(sums == 0, 1.0)[..., None]", "sums[..., None]"),
    sdpa("delta forgotten in the window's backward", "sdpa/window.py", ".sub_(delta[:, rows])", ""),
    sdpa("dk without its scale", "sdpa/window.py", "ds = ds.mul_(p).mul_(scale).to(dtype)", "ds = ds.mul_(p).to(dtype)"),
    sdpa("fold off by one", "shared/fold_queries.py", "max(0, block - 1 - q_start)", "max(0, block - q_start)"),
    sdpa("surplus rows are read", "sdpa/steps.py", "k, v = k.where(real, 0.0), v.where(real, 0.0)", "pass"),
    sdpa("overlap weights 1,2,2,2,2", "../core/geometry.py", "tokens = min(start + block, config.select_block) - max(start, 0)", "tokens = min(block, start + block)"),
    sdpa("initial blocks not forced", "../selection/rules.py", "((j < config.num_initial) | (j > own - config.num_local))", "(j > own - config.num_local)"),
    sdpa("a schedule off by one", "../selection/rules.py", "most.where(position >= end, count)", "most.where(position > end, count)"),
    sdpa("a share of the score without the group", "../selection/rules.py", "config.select_mass * config.group * config.compress_block", "config.select_mass * config.compress_block"),
    sdpa("one region too few", "../selection/regions.py", "indices[..., :k]", "indices[..., : k - 1]"),
    sdpa("regions of forced blocks not searched", "../selection/regions.py", "scatter_(-1, best, True) | ~ranked", "scatter_(-1, best, True)"),
    sdpa("the last of those that share decides", "../selection/share.py", "row - position % config.select_share", "(row - position % config.select_share + 1).clamp_max(T - 1)"),
    sdpa("scores of the input dtype", "sdpa/select.py", 'if config.score_dtype == "fp8":', "if False:"),
    sdpa("ties to the higher index", "../selection/rules.py", "add_(_INDEX_LIMIT - j)", "add_(_INDEX_LIMIT - J + 1 + j)"),
    sdpa("own block read to its end", "shared/block_tiles.py", "seen.clamp_max_(blocks.size)", "seen.clamp_min_(0).mul_(blocks.size).clamp_max_(blocks.size)"),
    sdpa("merge without weights", "sdpa/selected.py", "parts.mul_(weight[..., None]).sum(1)", "parts.sum(1)"),
    sdpa("unlisted pairs counted", "shared/block_tiles.py", "row.masked_fill_(unused, count * m)", "pass"),
    sdpa("lse of empty rows", "sdpa/selected.py", "sums.log_().add_(peak[:, 0])", "sums.clamp_min_(1e-30).log_().add_(peak[:, 0])"),
    Mutation("φ: position embedding forgotten", "nsa/compression.py", "bias = self.up(position.flatten())", "bias = self.up.bias", PIECES),
    Mutation("φ: packed blocks one token late", "nsa/core/block_tokens/op.py", "first[:, None] + torch.arange(block", "first[:, None] + 1 + torch.arange(block", PIECES),
    Mutation("φ: tanh for erf", "nsa/compression.py", "self.down(F.gelu(hidden))", "self.down(F.gelu(hidden, approximate=\"tanh\"))", PIECES),
    Mutation("RoPE: rotation the other way", "nsa/core/rope.py", "low * cos_T1D - high * sin_T1D, high * cos_T1D + low * sin_T1D", "low * cos_T1D + high * sin_T1D, high * cos_T1D - low * sin_T1D", PIECES),
    Mutation("RoPE: wrong frequencies", "nsa/core/rope.py", "torch.arange(0, size, 2, device=positions.device, dtype=torch.float64) / size", "torch.arange(0, size, 2, device=positions.device, dtype=torch.float64) / (size + 2)", PIECES),
    Mutation("layer: RoPE on V", "nsa/module.py", "return KV(self._rotate(k, positions), v)", "return KV(self._rotate(k, positions), self._rotate(v, positions) if v.shape[-1] % 2 == 0 else v)", LAYER),
    Mutation("layer: positions do not restart", "nsa/module.py", "positions = packed_tokens(cu_seqlens, x.shape[1]).position", "positions = None", LAYER),
    Mutation("layer: gates branch-major", "nsa/module.py", "unflatten(-1, (config.num_heads, len(BRANCHES)))", "unflatten(-1, (len(BRANCHES), config.num_heads)).mT", LAYER),
    Mutation("layer: values keep the product of all projections", "nsa/module.py", "v = v.to(dtype).contiguous()", "v = v.to(dtype)", ("tests/api/test_memory.py",)),
    Mutation("recompute: lists selected again", "nsa/backends/shared/recompute.py", 'operator.name() == "nsa::select_blocks"', 'operator.name() == ""', ("tests/api/test_recompute.py",)),
    Mutation("layer: branches swapped", "nsa/module.py", "tokens, selected, window = self", "tokens, window, selected = self", LAYER),
    fa2("own block counted twice", "shared/block_tiles.py", "blocks.size if earlier_only else 0", "0"),
    fa2("own block not weighted", "fa2/selected.py", "(diag_lse[here] - whole).exp()[..., None]", "(diag_lse[here] * 0).exp()[..., None]"),
    fa2("surplus rows get gradients", "fa2/steps.py", "rows = rows.where(real[..., None], 0.0)", "pass"),
    fa2("tiles with another scale", "fa2/selected.py", "scale=config.softmax_scale, causal=False", "scale=1.0, causal=False"),
    fa2("window off by one", "fa2/steps.py", "window=config.window,", "window=config.window + 1,"),
    Mutation("fa2: another implementation goes unnoticed", "nsa/backends/fa2/providers.py", 'impl = active_impl() if source == "aten" else None', "impl = None", ("tests/backends/fa2/test_aten.py",)),
    Mutation("fa2: a resolution outlives the implementation", "nsa/backends/dispatch.py", "        fa2_providers.active_impl(),", "        None,", ("tests/backends/fa2/test_aten.py",)),
    Mutation("deterministic: the oracle is not refused", "nsa/reference/__init__.py", "strict = torch.are_deterministic_algorithms_enabled()", "strict = False", DETERMINISTIC),
    Mutation("deterministic: a resolution outlives the mode", "nsa/backends/dispatch.py", "        torch.are_deterministic_algorithms_enabled(),\n        torch.is_deterministic_algorithms_warn_only_enabled(),\n", "", DETERMINISTIC),
    Mutation("deterministic: flash_attn is not told", "nsa/backends/fa2/calls.py", '"deterministic": deterministic}', '"deterministic": False}', DETERMINISTIC),
    Mutation("workspace: a buffer for every call", "nsa/backends/shared/workspace.py", "buffer = self._buffers.get((name, dtype))", "buffer = None", ("tests/backends/fa2/test_workspace.py",)),
    Mutation("φ: a token's blocks are not summed", "nsa/core/block_tokens/op.py", "total[:, m * stride : (m + N) * stride] += tokens", "total[:, m * stride : (m + N) * stride] = tokens", LAYER),
    Mutation("combine: views of gates are saved", "nsa/attention.py", "gate.to(wide, copy=True)[..., None]", "gate.to(wide)[..., None]", ("tests/compile/test_saved_tensors.py",)),
    Mutation("combine: gate order swapped", "nsa/attention.py", "zip(gates.unbind(-1), outputs, strict=True)", "zip(gates.flip(-1).unbind(-1), outputs, strict=True)", BACKENDS),
    Mutation("operators: an empty lse of another dtype", "nsa/core/operators.py", "q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q)),", "q.new_empty(q.shape[:-1]),", OPERATORS),
    Mutation("operators: strides that are not the fake's", "nsa/backends/sdpa/selected.py", "from_blocks(dv[:, : blocks.size], blocks, v).contiguous(),", "from_blocks(dv[:, : blocks.size], blocks, v).mT.contiguous().mT,", OPERATORS),
    Mutation("operators: one returns a view of the other", "nsa/core/rope.py", "return angle_TD.cos().to(dtype), angle_TD.sin().to(dtype)", "return (lambda x: (x, x.view(x.shape)))(angle_TD.cos().to(dtype))", OPERATORS),
    Mutation("torch.func: refused", "nsa/core/operators.py", "torch.autograd.function._SingleLevelFunction):", "torch.autograd.Function):", FUNC),
    Mutation("torch.func: second derivatives are zero", "nsa/core/operators.py", "torch.set_grad_enabled(nested)", "torch.set_grad_enabled(False)", FUNC),
    Mutation("torch.func: tangents end at vmap", "nsa/core/operators.py", "forward_ad._set_fwd_grad_enabled(nested)", "forward_ad._set_fwd_grad_enabled(False)", FUNC),
    Mutation("torch.func: tangents are dropped", "nsa/core/operators.py", "if reverse or forward_ad._current_level >= 0:", "if reverse:", FUNC),
    Mutation("packing: kept past the call", "nsa/core/packing.py", "_KEPT.reset(token)", "pass", ("tests/core/test_packing.py",)),
    Mutation("packing: of other sequences", "nsa/core/packing.py", "key = function, id(cu_seqlens), args", "key = function, args", ("tests/core/test_packing.py",)),
    Mutation("packing: computed again", "nsa/core/packing.py", "if key not in kept:", "if True:", ("tests/core/test_packing.py",)),
    Mutation("packing: what a checkpoint runs again finds it kept", "nsa/module.py", "packing_kept(None if self.recompute else cu_seqlens)", "packing_kept(cu_seqlens)", ("tests/api/test_recompute.py",)),
    mesh("φ's gradients are not summed", "distributed/sums.py", "if placements[0].is_replicate():", "if False:", "distributed/test_shards"),
    mesh("gradients of the input are not summed", "distributed/sums.py", "return _sum(grad, ctx.group), None", "return grad, None", "distributed/test_shards"),
    mesh("outputs are not summed", "distributed/sums.py", "return _sum(parts, group)", "return parts.clone()", "distributed/test_shards"),
    mesh("a part is split off for each name of a weight", "distributed/tensor_parallel.py", "if parameter not in sharded:", "if True:", "distributed/test_tensor_parallel"),
    mesh("memory of the whole batch is required", "training/memory.py", 'train.batch_size // sizes["dp"]', "train.batch_size", "training/test_memory"),
    mesh("every process takes the same rows", "distributed/process_mesh.py", "first = min(count, part * self.dp.get_local_rank())", "first = 0"),
    mesh("the optimizer keeps parts of its own", "distributed/local_parameters.py", "nn.Parameter(local(parameter.detach()),", "nn.Parameter(local(parameter.detach()).clone(),"),
    mesh("gradients of the last step are kept", "distributed/local_parameters.py", "for parameter in self._whole.values():", "for parameter in ():"),
    mesh("the norm counts copies", "distributed/local_parameters.py", ".square() / n for", ".square() for"),
    mesh("the loss of one part", "distributed/process_mesh.py", "loss /= self.data.size()", "loss /= 1"),
    mesh("validation counts copies", "distributed/process_mesh.py", "float(sums) * self.dp.size() / self.ranks.size", "float(sums)"),
    mesh("all processes speak", "distributed/ranks.py", "return bool(self._store.add(_SPEAKER, 1) == 1)", "return True"),
    mesh("other commands are not noticed", "distributed/ranks.py", "if one != other:", "if False:"),
    mesh("a batch that does not divide", "training/on_mesh.py", "if train.batch_size % dp:", "if False:"),
    mesh("the optimizer's averages are not restored", "training/trainer.py", "self.mesh.spread(read, whole)", "empty.zero_()"),
    folder("a manifest that is not sealed", "checkpoint_format.py", "values = unsealed(manifest)", "values = {**manifest}", "flipped_bits"),
    folder("an old manifest of another folder", "checkpoint_format.py", "if without_seal and step_in(folder.name) not in (-1, step):", "if False:", "flipped_bits"),
    folder("a step of other data", "trainer.py", "if next_batch != checkpoint.step * self.config.train.accumulate:", "if False:", "flipped_bits"),
    folder("a configuration that is not sealed", "run.py", "to_json(sealed(self.config.to_dict()))", "to_json(self.config.to_dict())", "resume"),
    folder("numpy reads beyond its state", "trainer.py", "if not 0 <= position <= _NUMPY_WORDS:", "if False:", "resume"),
    folder("two trainers", "lock.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "run_folder"),
    folder("a lock on a folder that is gone", "lock.py", "return os.path.samestat(os.fstat(self._descriptor), os.lstat(self.path))", "return True", "run_folder"),
    folder("a run that went on", "run.py", "if _state_of(self.folder) != self._found:", "if False:", "run_folder"),
    folder("links are pruned", "checkpoint.py", "and complete and not path.is_symlink()", "and complete", "run_folder"),
    folder("folders of others are pruned", "checkpoint.py", "step_in(path.name) >= 0 and complete", "complete", "run_folder"),
    folder("a folder without a manifest is pruned", "checkpoint.py", "complete = os.path.isfile(path / MANIFEST)", "complete = path.is_dir()", "run_folder"),
    folder("a save that needs the last one", "checkpoint.py", "previous = self.newest()", "previous = self.latest()", "run_folder"),
    folder("metrics that nobody sees", "metrics.py", "self._stay_at_the_path()", "pass", "files"),
    folder("metrics through a link", "metrics.py", "if kept != lines or path.is_symlink():", "if kept != lines:", "files"),
    folder("permissions that widen", "files.py", "write_durably(temporary, data, mode=mode)", "write_durably(temporary, data)", "files"),
    folder("leftovers of who still writes", "files.py", "(here and not _is_running(int(match[2])))", "here", "files"),
    folder("a configuration that is lost", "run.py", "if not os.path.lexists(path):", "if False:", "run_folder"),
    Mutation("flops: D and V exchanged", "nsa/core/flops.py", "3 * D + 2 * V", "2 * D + 3 * V", FLOPS),
    Mutation("memory: shared lists indexed for each query", "nsa/memory.py", "-(-s.T // c.select_share)", "s.T", ("tests/api/test_memory.py",)),
    Mutation("flops: sdpa shares the search", "nsa/backends/shared/select_op.py", 'if x["backend"] == "sdpa":', 'if x["backend"] == "":', FLOPS),
    Mutation("flops: the first position forgotten", "nsa/core/flops.py", 'compressed_pairs(T, block, stride, x.get("q_start", 0))', "compressed_pairs(T, block, stride)", FLOPS),
    Mutation("flops: the gated backward without a branch", "nsa/backends/compiled/gated/op.py", "return _two(x) + flops.compressed(x)", "return _two(x)", FLOPS),
    Mutation("flops: counters that count already", "nsa/core/flops.py", "mode.counter.flop_registry.setdefault(packet,", "dict().setdefault(packet,", FLOPS),
    Mutation("flops: a counter imported later", "nsa/core/operators.py", "if count is not None and torch._C._len_torch_dispatch_stack():", "if False:", FLOPS),
    context("a row too few for the window", "plan.py", "start - self.config.window + 1)", "start - self.config.window + 2)"),
    context("a row too few for the last block", "plan.py", "first + position + self.config.compress_block)", "first + position + self.config.compress_block - 1)"),
    context("a block is compressed twice", "plan.py", "begun = -(-(row - self.layout.offsets[s]) // self.config.compress_stride)", "begun = (row - self.layout.offsets[s]) // self.config.compress_stride + 1"),
    context("gradients of rows sent away are lost", "transfers.py", "grad[:, rows] += half", "pass"),
    context("two parts of a halo are the same rows", "plan.py", "placed[holder] += count", "pass"),
    context("what is frozen is not compared", "agreement.py", '"gradients of": _trained(layer, projected)', '"gradients of": []'),
    context("gradients in the order of ranks", "transfers.py", "buffer[rank][:, rows, columns].copy_(flat[:, row:end])", "buffer[len(buffer) - 1 - rank][:, : end - row, columns].copy_(flat[:, row:end])"),
    context("positions of the rank's own rows", "layout.py", "torch.arange(max(a, first) - first, min(b, end) - first)", "torch.arange(0, min(b, end) - max(a, first))"),
    context("configurations are not compared", "agreement.py", "if theirs[name] != value:", "if False:"),
    context("a rank does without the exchange's backward", "attention.py", "if call.window_start == 0 and call.rows.start > 0:", "if call.window_start == 0:"),
    inspection("what a probe returns is dropped", "attention.py", "inputs = probe.given(inputs)", "probe.given(inputs)"),
    inspection("a probe stays", "inspection/recording.py", "del layers[name].probes ", "pass "),
    inspection("the other branches are shut", "inspection/interventions.py", "name != branch for name in BRANCHES", "name == branch for name in BRANCHES"),
    inspection("forced blocks count as ranked", "inspection/lists.py", "return listed & ~forced[:, None]", "return listed"),
    inspection("overlap is over both lists", "inspection/lists.py", "(listed & other).sum(-1) / listed.sum(-1)", "(listed & other).sum(-1) / (listed | other).sum(-1)"),
    inspection("dense mass sees the future", "inspection/dense.py", "scores.masked_fill_(later[:, None], NEG_INF).softmax(-1)", "scores.softmax(-1)"),
    inspection("the window is one longer", "inspection/dense.py", "> t - config.window)", ">= t - config.window)"),
    inspection("the oracle shares no list", "inspection/dense.py", "first = row - row % config.select_share - rows.start", "first = row - rows.start"),
    inspection("visibility < for <=", "inspection/scores.py", "(last > t[:, None])", "(last >= t[:, None])"),
    inspection("weights of scores", "inspection/scores.py", "alpha=weight", "alpha=1"),
    inspection("the own block counts whole", "inspection/sinks.py", "config.select_block - 1 - t % config.select_block", "0 * t"),
    generation("blocks that are not listed count", "models/tokens_read.py", ".masked_fill_(listed < 0, 0)", ""),
    generation("sequences share their draws", "models/sampling.py", "(seed + row) % 2**63", "seed"),
    generation("the chunk is each sequence's", "models/generation.py", "max(1, self._chunk // B)", "self._chunk"),
    generation("the shorter of two stops", "models/stopping.py", "held) - max(ended)", "held) - min(ended)"),
    generation("a dense query does not see itself", "models/dense_cache.py", "(token <= position[:, None])", "(token < position[:, None])"),
    generation("freed sequences go on in a graph", "cache/cache.py", "self.position.add_(self._present, alpha=step.uniform)", "self.position.add_(step.uniform)"),
    hf("norms of q and k left out", "attention.py", "norms = {\"q\": self.q_norm, \"k\": self.k_norm}", "norms = {}", "convert"),
    hf("branches share one copy", "attention.py", "copy.deepcopy(projection)", "projection", "convert"),
    hf("every row has the first row's angles", "attention.py", "part[0] if part.shape[0] == 1 else part", "part[0]", "generation"),
    hf("padding is taken for tokens", "batch.py", "        return Packed(padding.cu_seqlens, padding.max_seqlen, indices)", "        return None", "training"),
    hf("rows of a packed batch run on", "batch.py", "starts = sorted([b * T for b in range(B)] + ", "starts = sorted([0] + ", "training"),
    hf("positions count padding", "batch.py", "kwargs[\"position_ids\"] = _positions(x, batch, mask, cache)", "pass", "training"),
    hf("crop counts columns as tokens", "batch.py", "min(count, max(0, columns - first))", "min(count, columns)", "generation"),
    hf("rows move without their padding", "cache.py", "None if part is None else part.select(rows)", "part", "generation"),
    hf("a cache does not grow", "cache.py", "if needed > self._cache.max_length:", "if False:", "generation"),
    hf("crop removes nothing", "cache.py", "self._cache.crop(lengths)", "pass", "generation"),
    hf("the model's scale is dropped", "dense.py", "scale=None if scale == D**-0.5 else scale", "scale=None", "convert"),
    hf("any attention will do", "dense.py", "return bool(error <= ", "return True or bool(error <= ", "refusals"),
    hf("scores too small to matter", "dense.py", "x = x * (2 /", "x = 1e-3 * x * (2 /", "refusals"),
    hf("the plan for parallel tensors stays", "models.py", "            part.tp_plan = None", "            pass", "saving"),
    hf("what flash attention obeys is ignored", "batch.py", "for name in FLASH_ONLY:", "for name in ():", "refusals"),
    hf("φ of values is the mean at once", "starts.py", "nn.init.zeros_(last.weight)", "pass", "convert"),
    hf("φ is a sum", "starts.py", ".repeat(1, L) / L", ".repeat(1, L)", "convert"),
    hf("half of the GELU", "starts.py", "torch.cat([mean, -mean])", "torch.cat([mean, mean])", "convert"),
    hf("a dense checkpoint loads", "models.py", "        if lacks:", "        if False:", "saving"),
    hf("the types of layers are saved", "models.py", "if k != \"layer_types\"", "if k", "training"),
    hf("all is trained", "convert.py", "which == \"all\" or", "True or", "convert"),
    Mutation("cache: pages are left behind", "nsa/cache/cache.py", "self._copy_pages(layer.by_page(), target.by_page(), copies)", "pass", ("tests/cache/test_operations.py",)),
    Mutation("layer: given angles are not looked at", "nsa/module.py", "positions: Tensor | Angles | None = angles\n", "positions: Tensor | Angles | None = None\n", ("tests/api/test_angles.py",)),
    Mutation("layer: a state of a newer version loads", "nsa/module.py", "1 <= version <= self._version", "1 <= version", ("tests/api/test_module_state.py",)),
)  # fmt: skip


def caught(mutation: Mutation) -> tuple[bool, str]:
    """Whether a test turns red, and its last line of output."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("nsa", "tests", "pyproject.toml"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, tree / name)
        path = tree / mutation.path
        text = path.read_text()
        if text.count(mutation.old) != 1:
            return False, f"the line to break occurs {text.count(mutation.old)} times, expected 1"
        path.write_text(text.replace(mutation.old, mutation.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *mutation.tests],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        if done.returncode == 1 and failures:
            return True, failures[0].removeprefix("FAILED ")
        return False, (done.stdout.splitlines() or [done.stderr])[-1]


def main() -> int:
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    missed = 0
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for mutation, (red, line) in zip(chosen, pool.map(caught, chosen), strict=True):
            missed += not red
            print(f"{'caught' if red else 'MISSED'}  {mutation.name:45s} {line[:110]}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
