"""tests/gpu/run.sh without a GPU, with a stand-in for Python: its report, its limits, a failure that stops nothing."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "gpu" / "run.sh"
PYTHON = """#!/bin/sh
case "$*" in
  *memcheck*) echo "7 skipped in 0.05s" ;;
  *test_gpu_kernels*) echo "one test failed"; exit 1 ;;
  *benchmarks/gpu.py*) echo "measured" ;;
  *test_gpu_dali*) sleep 60 ;;
esac
"""


def test_a_failure_stops_no_other_step_and_is_reported(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    script = tmp_path / "repository" / "tests" / "gpu" / "run.sh"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT.read_text().replace("step dali 120", "step dali 1"))
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(PYTHON)
    sanitizer.chmod(0o755)
    variables = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out")}
    variables["PATH"] = f"{tmp_path}:{variables['PATH']}"
    variables.pop("TENSORRT_ROOT", None)
    steps = ["kernels", "memcheck", "engine", "benchmark", "dali", "training"]
    result = subprocess.run(["bash", str(script), *steps], env=variables, capture_output=True, text=True, timeout=30)
    report = (tmp_path / "out" / "report.txt").read_text()
    lines = [" ".join(line.split()) for line in report.splitlines()]
    assert result.returncode == 1
    assert any(re.fullmatch(r"kernels \d+ s FAILED: exit status 1", line) for line in lines), report
    assert "one test failed" in lines
    assert any(re.fullmatch(r"memcheck \d+ s FAILED: every test was skipped", line) for line in lines), report
    assert any(line.startswith("engine left out: no TENSORRT_ROOT") for line in lines)
    assert any(re.fullmatch(r"benchmark \d+ s passed", line) for line in lines), report
    assert any(line.startswith("dali") and "over its limit of 1 s" in line for line in lines), report
    assert lines[-1].startswith("SOME STEPS FAILED")
    assert not any(line.startswith(("build", "racecheck")) for line in lines), "a step that was not asked for"
    passed = subprocess.run(["bash", str(script), "benchmark"], env=variables, capture_output=True, timeout=30)
    assert passed.returncode == 0
