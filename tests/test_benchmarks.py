"""The benchmark of a GPU goes through on a processor, so that it does not fail there for a typing error."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def test_the_benchmark_of_a_gpu_fills_its_table(tiny_base, tmp_path):
    words = ["--base", str(tiny_base), "--work", str(tmp_path), "--steps", "4"]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if line.startswith("failed: ")], done.stderr
    assert "not measured" not in done.stdout
    for contender in ("bare forward", "minilora", "base", "merged", "live"):
        assert f"| {contender} |" in done.stdout
