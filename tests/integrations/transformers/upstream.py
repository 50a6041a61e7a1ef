"""transformers' own tests of models and of generation, on converted models; prints a table.

    git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers
    pip install parameterized
    python tests/integrations/transformers/upstream.py transformers

The clone is to be of the version that is installed. The archive on PyPI, unpacked, will do, too
(``pip download --no-deps --no-binary :all: transformers==5.24.0``), but has no
``GenerationTesterMixin``.

Nothing of transformers' code is here: their classes are found in the folder, and given tiny models.
"""

import importlib
import json
import os
import re
import sys
import types
import unittest
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers

from nsa import NSAConfig
from nsa.integrations.transformers import models

KINDS = ("Llama", "Qwen3", "Mistral")
LAYER = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    compress_block=4,
    compress_stride=4,
    select_block=4,
    num_selected=3,
    num_local=1,
    window=4,
)
MODEL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": LAYER.num_heads,
    "num_key_value_heads": LAYER.num_kv_heads,
    "head_dim": LAYER.head_dim,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
INAPPLICABLE = {
    "attention is NSA's own: other implementations are refused": (
        "test_can_set_attention_dynamically",
        "test_retain_grad_hidden_states_attentions",
    ),
    "output_attentions is refused: there is no matrix of attention": (
        "test_capture_outputs_decorator",
    ),
    "a checkpoint without NSA's weights is refused": (
        "test_model_weights_reload_no_missing_tied_weights",
    ),
    "quantized caches are not offered": ("test_generate_with_quant_cache",),
    "GenerationMixin is a base of the dense model's class": ("test_inherits_generation_mixin",),
}
"""Tests of what this library refuses, by the reason; each refusal has a test of its own here."""
PADDED = ("test_left_padding_compatibility",)
"""Those that ask for ``has_attentions`` where they mean padding."""
STATIC = ("test_generate_with_static_cache", "test_generate_from_inputs_embeds_with_static_cache")
"""Those that ask for ``_can_compile_fullgraph`` where they mean a static cache."""
WITHOUT_GRADIENTS = ("test_bc_cache_name_forward",)
"""Those that use a cache where gradients are on, which is refused."""
OURS = r"(<class '[\w.]*)?NSA(Llama|Qwen3|Mistral)\w*('>)?( class)?"
"""How their reasons name a converted model."""
MIXINS = {
    "ModelTesterMixin": "test_modeling_common",
    "GenerationTesterMixin": "generation.test_utils",
    "ExportTesterMixin": "exporters.test_export",
}


def load(source: Path) -> dict[str, Any]:
    """Their mixins, by name; empty ones where their files are not in the folder."""
    text = (source / "src/transformers/__init__.py").read_text()
    version = re.search(r'__version__ = "(.*?)"', text)
    installed = transformers.__version__
    if version is None or version[1] != installed:
        got = "none" if version is None else version[1]
        sys.exit(f"{source}: expected transformers {installed}, which is installed, got {got}")
    package = types.ModuleType("tests")
    package.__path__ = [str(source / "tests")]
    sys.modules["tests"] = package  # theirs has the name of ours
    for name, module in MIXINS.items():
        if not (source / "tests" / f"{module.replace('.', '/')}.py").exists():
            made = sys.modules[f"tests.{module}"] = types.ModuleType(module)
            sys.modules[f"tests.{module.partition('.')[0]}"] = made
            setattr(made, name, type(name, (), {}))
    return {
        name: getattr(importlib.import_module(f"tests.{module}"), name)
        for name, module in MIXINS.items()
    }


class Tester:
    """What the mixins ask for a model and a batch."""

    batch_size, seq_length, is_training = 3, 19, True
    num_hidden_layers, hidden_size = MODEL["num_hidden_layers"], MODEL["hidden_size"]
    num_attention_heads = MODEL["num_attention_heads"]

    def __init__(self, config: Any) -> None:
        self.config = config

    def get_config(self) -> Any:
        return self.config(**MODEL, nsa_config=json.loads(LAYER.key))

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = torch.randint(3, MODEL["vocab_size"], (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Converted:
    """Before their mixins: what is special about converted models."""

    has_attentions = False
    kind: str

    def setUp(self) -> None:
        test: Any = self
        for reason, names in INAPPLICABLE.items():
            if test._testMethodName in names:
                test.skipTest(reason)
        test.has_attentions = test._testMethodName in PADDED
        test.model_tester = Tester(models.config_class(getattr(transformers, f"{self.kind}Config")))
        classes = {
            names: getattr(models, f"NSA{self.kind}{part}")
            for names, part in (
                ("MODEL_MAPPING_NAMES", "Model"),
                ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "ForCausalLM"),
            )
        }
        test.all_model_classes = tuple(classes.values())
        for names, kind in classes.items():  # they tell classes apart by these
            known = getattr(transformers.models.auto.modeling_auto, names)
            test.enterContext(patch.dict(known, {"nsa": kind.__name__}))
            if test._testMethodName in STATIC:
                test.enterContext(patch.object(kind, "_can_compile_fullgraph", True))
        if test._testMethodName in WITHOUT_GRADIENTS:
            test.enterContext(torch.no_grad())

    def _check_caches_are_equal(self, a: Any, b: Any) -> None:
        """Of layers that have no keys and values of transformers' shape."""
        for one, other in zip(a.layers, b.layers, strict=True):
            assert one.lengths == other.lengths
            torch.testing.assert_close(*(x.nsa_cache.snapshot()["tensors"] for x in (one, other)))

    def _check_past_key_values_for_generate(
        self, batch_size: int, cache: Any, seq_length: int, config: Any
    ) -> None:
        for layer in cache.layers:
            assert layer.batch_size == batch_size
            assert layer.lengths == [seq_length] * batch_size


class Result(unittest.TestResult):
    """Also which tests passed."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: set[str] = set()

    def addSuccess(self, test: Any) -> None:
        self.passed.add(test._testMethodName)


def run(source: Path, only: str = "") -> dict[str, Result]:
    """The tests whose names have a part, of every kind of model."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    mixins = load(source)
    results = {}
    for kind in KINDS:
        bases = (Converted, mixins["GenerationTesterMixin"], mixins["ModelTesterMixin"])
        case = type(f"NSA{kind}Test", (*bases, unittest.TestCase), {"kind": kind})
        names = unittest.defaultTestLoader.getTestCaseNames(case)
        results[kind] = Result()
        unittest.TestSuite(case(name) for name in names if only in name).run(results[kind])
    return results


def name_of(test: Any) -> str:
    """Of a test or a part of one."""
    return getattr(test, "test_case", test)._testMethodName


def table(results: dict[str, Result]) -> str:
    """Markdown: how many passed, and why others were skipped."""
    rows = [f"| | {' | '.join(results)} |", "|---|" + "---|" * len(results)]
    reasons: dict[str, set[str]] = defaultdict(set)
    counts = defaultdict(list)
    for result in results.values():
        failed = {name_of(test) for test, _ in (*result.failures, *result.errors)}
        skipped = {name_of(test) for test, _ in result.skipped} - failed
        for test, reason in result.skipped:
            reasons[re.sub(OURS, "the model", reason)].add(name_of(test))
        counts["passed"].append(len(result.passed - failed - skipped))
        counts["skipped"].append(len(skipped))
        counts["failed"].append(len(failed))
    rows += [f"| {name} | {' | '.join(map(str, found))} |" for name, found in counts.items()]
    rows += ["", "| skipped, since | tests |", "|---|---|"]
    for why, names in sorted(reasons.items()):
        several = Counter(re.sub(r"(?<!attn)_\d+_\w+$", "", name) for name in names)
        listed = (f"{name} ({n})" if n > 1 else name for name, n in sorted(several.items()))
        rows.append(f"| {why} | {', '.join(listed)} |")
    return "\n".join(rows)


def main(source: str, only: str = "") -> None:
    results = run(Path(source), only)
    failures = [pair for found in results.values() for pair in (*found.failures, *found.errors)]
    for test, text in failures:
        print(f"{test}\n{text}", file=sys.stderr)
    print(table(results))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main(*sys.argv[1:])
