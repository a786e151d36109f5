"""What an import costs: the lower floors stay free of the frameworks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

FRAMEWORKS = ("transformers", "lightning", "pytorch_lightning", "trl", "peft", "datasets", "accelerate")

PROBE = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def exists(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@pytest.mark.parametrize(
    "module", ["nabla_rl", "nabla_rl.types", "nabla_rl.functional", "nabla_rl.dto", "nabla_rl.samplers"]
)
def test_imports_no_framework(module):
    if not exists(module):
        pytest.skip(f"{module} is not part of this version")
    done = subprocess.run([sys.executable, "-c", PROBE, module], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not set(FRAMEWORKS) & set(done.stdout.split())
