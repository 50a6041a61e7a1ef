"""What the tests of ``diagnose`` share; their fixtures are in ``conftest.py``."""

import json

import pytest

from nsa.tools.diagnose import __main__ as diagnose


def run(capsys, *argv):
    """Exit code, output and errors of the command, on a CPU."""
    code = diagnose.main([*argv, "--device", "cpu"])
    out, err = capsys.readouterr()
    return code, out, err


def run_json(capsys, *argv):
    """Exit code and what ``--json`` prints."""
    code, out, _ = run(capsys, *argv, "--json")
    return code, json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
