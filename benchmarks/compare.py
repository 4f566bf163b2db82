#!/usr/bin/env python3
"""Compares benchmark results and prints what changed beyond noise.

    benchmarks/compare.py OLD NEW
        OLD, NEW: a results file, or a folder with several of them (one a run).
    benchmarks/compare.py --run OLD_REV NEW_REV [--rounds 3] [-- PYTEST_ARGUMENTS...]
        Checks both revisions out side by side, runs their benchmarks in turn (old, new, old, ...)
        and compares. "." as a revision is the working tree as it is. Only Python and Triton code is
        taken from the revision; the compiled extensions are those that are installed.

A performance change is judged by the second form: a machine drifts by more than most changes bring,
and runs that take turns see the same drift. A number counts as changed only where the middle halves
of the two distributions do not meet, and the medians differ by more than --threshold; a number with
fewer than five rounds on either side is not judged.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness.race import quartiles  # noqa: E402
from harness.results import load  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
BASELINES = ("dense compiled", "dense", "one linear", "eager", "argsort")
ENOUGH_ROUNDS = 5
Numbers = dict[str, list[float]]


def rounds_of(content: dict) -> Iterator[tuple[str, list[float]]]:
    """(name, rounds) of everything that was measured; a ratio to dense where there is one.

    Ratios within a round cancel the machine's drift, so they say more than seconds.
    """
    for section in ("stages", "layers", "blocks", "distillation", "host"):
        for row in content[section]:
            yield from _entry(f"{section}: {row['id']}", row["seconds"])
    for axis in content["scaling"]:
        for point in axis["points"]:
            yield from _entry(f"scaling: {axis['id']}={point['value']:g}", point["seconds"])
    for name, model in content["models"].items():
        for mode, entry in model.get("modes", {}).items():
            if "latency_ratio" in entry:
                yield f"models: {name}/{mode} / dense", entry["ratio_rounds"]
            elif "seconds" in entry:
                yield f"models: {name}/{mode}", entry["seconds"]["rounds"]


def _entry(label: str, seconds: dict) -> Iterator[tuple[str, list[float]]]:
    baseline = next((b for b in BASELINES if b in seconds), None)
    for contender, times in seconds.items():
        if contender == baseline and len(seconds) > 1:
            continue
        if baseline is None or baseline == contender:
            yield f"{label} [{contender}]", times["rounds"]
        else:
            pairs = zip(times["rounds"], seconds[baseline]["rounds"], strict=True)
            yield f"{label} [{contender} / {baseline}]", [a / b for a, b in pairs]


def collect(path: Path) -> Numbers:
    """Every number of a file, or of all files of a folder, with the rounds of all runs."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise SystemExit(f"{path}: no results file")
    numbers: Numbers = {}
    for file in files:
        for name, rounds in rounds_of(content_of(file)):
            numbers.setdefault(name, []).extend(rounds)
    return numbers


def content_of(file: Path) -> dict:
    """A results file, or one line of what is wrong with it."""
    try:
        return load(file)
    except OSError as error:
        raise SystemExit(
            f"cannot read {file}: {error.strerror or error}; expected a results file or a folder "
            "of them (revisions are compared with --run)"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SystemExit(f"{file} is no valid JSON: {error}") from None
    except ValueError as error:  # another schema
        raise SystemExit(str(error)) from None


def verdict(old: list[float], new: list[float], threshold: float) -> tuple[str, float]:
    """("slower" | "faster" | "same", change of the median)."""
    change = statistics.median(new) / statistics.median(old) - 1
    (old_q1, old_q3), (new_q1, new_q3) = quartiles(old), quartiles(new)
    if change > threshold and new_q1 > old_q3:
        return "slower", change
    if change < -threshold and new_q3 < old_q1:
        return "faster", change
    return "same", change


def compare(old: Numbers, new: Numbers, threshold: float) -> tuple[list[str], int]:
    """The report's lines, and how many numbers got slower."""
    lines, slower = [], 0
    both = [name for name in old if name in new]
    judged = [name for name in both if min(len(old[name]), len(new[name])) >= ENOUGH_ROUNDS]
    for kind in ("slower", "faster"):
        for name in judged:
            got, change = verdict(old[name], new[name], threshold)
            if got != kind:
                continue
            slower += kind == "slower"
            a, b = statistics.median(old[name]), statistics.median(new[name])
            lines.append(f"{kind}  {change:+7.1%}  {name}: {a:.5g} -> {b:.5g}"
                         f"  ({len(old[name])} and {len(new[name])} rounds)")  # fmt: skip
    changed = len(lines)
    lines.append(f"{len(both)} numbers in both, {changed} changed by more than {threshold:.0%} "
                 f"beyond noise, {slower} of them slower")  # fmt: skip
    if len(judged) < len(both):
        lines.append(f"{len(both) - len(judged)} numbers have too few rounds to be judged")
    for missing, where in ((old.keys() - new.keys(), "OLD"), (new.keys() - old.keys(), "NEW")):
        if missing:
            lines.append(f"only in {where}: {len(missing)} numbers")
    return lines, slower


def check_out(revision: str, tree: Path) -> None:
    """A work tree of `revision`, or one line of git's about why not."""
    command = ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), revision]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(f"--run needs git: {error}") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["git gave no reason"])[-1]
        raise SystemExit(
            f"cannot check out {revision!r}: {reason}; expected a branch, a tag, a commit, or "
            '"." for the working tree'
        )


def run_in_turn(old: str, new: str, rounds: int, arguments: list[str], out: Path) -> None:
    """Results of both revisions in out/old and out/new, one file a round, taken in turn."""
    trees = {}
    try:
        for side, revision in (("old", old), ("new", new)):
            trees[side] = ROOT
            if revision != ".":
                tree = out / f"{side}-tree"
                check_out(revision, tree)
                trees[side] = tree
        for round_ in range(rounds):
            # The side that goes first takes turns too.
            for side in ("old", "new") if round_ % 2 == 0 else ("new", "old"):
                file = out / side / f"{round_}.json"
                command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "-q",
                           "-p", "no:cacheprovider", f"--results={file}", *arguments]  # fmt: skip
                print(f"round {round_ + 1} of {rounds}, {side}", flush=True)
                done = subprocess.run(command, cwd=trees[side], capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{side}: the benchmarks failed\n{done.stdout[-3000:]}")
    finally:
        for tree in trees.values():
            if tree != ROOT:
                command = ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)]
                subprocess.run(command, capture_output=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW")
    parser.add_argument("--run", action="store_true", help="OLD and NEW are revisions to measure")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default: 3)")
    parser.add_argument("--keep", metavar="FOLDER", help="with --run: keep the results files there")
    parser.add_argument("--threshold", type=float, default=0.02, help="default: 0.02, that is 2%%")
    parser.add_argument("--fail", action="store_true", help="exit status 1 if anything got slower")
    own, arguments = sys.argv[1:], []
    if "--" in own:
        cut = own.index("--")
        own, arguments = own[:cut], own[cut + 1 :]
    args = parser.parse_args(own)
    old, new = Path(args.old), Path(args.new)
    with tempfile.TemporaryDirectory() as folder:
        if args.run:
            out = Path(folder)
            run_in_turn(args.old, args.new, args.rounds, arguments, out)
            old, new = out / "old", out / "new"
            if args.keep:
                for side in (old, new):
                    shutil.copytree(side, Path(args.keep) / side.name, dirs_exist_ok=True)
        lines, slower = compare(collect(old), collect(new), args.threshold)
    print("\n".join(lines))
    return 1 if args.fail and slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
