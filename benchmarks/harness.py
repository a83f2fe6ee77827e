"""Times several variants of one piece of work in turns, each in a process of its own. Standard library only.

A variant is a command that calls `serve(step)`. `compare` asks each in turn for one step, round after round, so that
a noisy machine disturbs all alike; the peak memory is the process's own. The ratio is to the first variant, the peer.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def arguments(description: str | None, *, rounds: int, batch: int | None = None) -> argparse.ArgumentParser:
    """A parser with the flags that the benchmarks share: data and sizes where a `batch` is given, rounds, report."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if batch is not None:
        parser.add_argument("--annotations")
        parser.add_argument("--images", required=True)
        parser.add_argument("--batch", type=int, default=batch)
        parser.add_argument("--resize", type=int, default=240)
        parser.add_argument("--max-size", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--report", type=Path, help="JSON lines to append the rows to")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # which one a child is
    return parser


def again(variant: str) -> list[str]:
    """The command line of this very call, for a child that is to be `variant`."""
    return [sys.executable, *sys.argv, "--variant", variant]


def serve(step: Callable[[], int]) -> None:
    """Runs in the child: one `step` (returns how many images it handled) for each line on standard input."""
    out, sys.stdout = sys.stdout, sys.stderr  # what the work prints must not mix with the answers
    step()  # warm-up: allocations, code paths, prefetching
    print("ready", file=out, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        images = step()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        print(json.dumps({"seconds": seconds, "images": images, "peak": peak}), file=out, flush=True)


def compare(title: str, commands: dict[str, list[str]], *, rounds: int, report: Path | None = None) -> list[dict]:
    """Runs the variants in turns and prints a table: median and spread of seconds per image, ratio, peak memory.

    Args:
        commands: name → command line; the first is the peer.
        report: a file of JSON lines that the rows are appended to.
    """
    children = {
        name: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name, command in commands.items()
    }
    for name, child in children.items():
        assert child.stdout is not None
        if not any(line.strip() == "ready" for line in child.stdout):  # what the preparation prints comes before
            raise SystemExit(f"{title}: the variant '{name}' did not start; its message stands above.")
    answers: dict[str, list[dict]] = {name: [] for name in children}
    for _ in range(rounds):
        for name, child in children.items():
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write("step\n")
            child.stdin.flush()
            answers[name].append(json.loads(child.stdout.readline()))
    for child in children.values():
        child.communicate()

    rows: list[dict] = []
    print(f"\n{title}: {rounds} rounds in turns")
    print(f"{'variant':36} {'ms/image':>9} {'spread':>15} {'ratio':>6} {'peak MiB':>9}")
    for name, results in answers.items():
        times = [r["seconds"] / r["images"] * 1e3 for r in results]
        median, peak = statistics.median(times), results[-1]["peak"] / 2**20
        rows.append(
            {
                "benchmark": title,
                "variant": name,
                "ms_per_image": median,
                "min": min(times),
                "max": max(times),
                "ratio": median / (rows[0]["ms_per_image"] if rows else median),
                "peak_mib": peak,
            }
        )
        spread = f"{min(times):.1f}–{max(times):.1f}"
        print(f"{name:36} {median:9.1f} {spread:>15} {rows[-1]['ratio']:6.2f} {peak:9.0f}")
    if report:
        with report.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows
