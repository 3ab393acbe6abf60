"""A new optimizer is what docs/adding.md says, and nothing more."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRACTS = "tests/optimizers", "tests/checkpoint/test_slots.py", "tests/rows"


def blocks():
    """The code of the guide, by the file that it belongs to."""
    text = (ROOT / "docs" / "adding.md").read_text()
    found = re.findall(r'```py title="([^"]+)"\n(.*?)```', text, re.DOTALL)
    return dict(found)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_toy_optimizer_passes_every_contract(tmp_path):
    for name in "monolith_optax", "tests", "benchmarks":
        ignored = shutil.ignore_patterns("__pycache__", "test_adding.py")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in "pyproject.toml", "conftest.py":
        shutil.copy(ROOT / name, tmp_path)
    code = blocks()
    registry = tmp_path / "tests" / "helpers" / "registry.py"
    for name, text in code.items():
        file = tmp_path / name
        if file == registry:
            before = file.read_text().replace(
                "import adamom", "import heavyball, adamom"
            )
            file.write_text(before.replace("ROWS = {\n", f"ROWS = {{\n{text}"))
        else:
            file.write_text((file.read_text() if file.exists() else "") + text)
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "--tb=short"]
    result = subprocess.run(
        [*command, "-m", "slow or not slow", "-k", "heavyball", *CONTRACTS],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stdout[-3000:])
    assert result.returncode == 0
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 100
