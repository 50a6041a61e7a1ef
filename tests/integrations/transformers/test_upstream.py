"""transformers' own tests of models and of generation pass on converted models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.24")


@pytest.mark.slow
def test_they_pass():
    source = os.environ.get("TRANSFORMERS_SOURCE")
    if source is None:
        pytest.skip(
            "transformers' tests are not in its wheel: git clone --depth 1 --branch v5.24.0 "
            "https://github.com/huggingface/transformers; pip install parameterized; "
            "TRANSFORMERS_SOURCE=transformers"
        )
    script = Path(__file__).with_name("upstream.py")
    done = subprocess.run(
        [sys.executable, script, source], capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
