"""Do the tests notice a fault? Put one in at a time, and run the tests that should fail.

    python -m benchmarks.mutants               # all; the exit code is 1 if one survives
    python -m benchmarks.mutants safe join     # those whose names hold one of these words
    python -m benchmarks.mutants --check       # only: does every line to be changed still exist?

A fault is one line of losses, engine, stream, retrieval, checkpoints or shards, changed in a copy
of this checkout; `benchmarks/support/faults.py` lists them. Some ten seconds a fault.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.support.faults import MUTANTS, ROOT, Mutant

TIMEOUT_S = 600.0


def main(argv: Sequence[str] | None = None) -> int:
    """Try the faults; return 1 if one survives, or can't be put in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="of the names of the faults")
    parser.add_argument("--check", action="store_true", help="run no test")
    args = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if not args.words or any(word in m.name for word in args.words)]
    try:
        sources = [mutant.source() for mutant in chosen]
    except LookupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.check:
        return 0
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=_ignored)
        for mutant, source in zip(chosen, sources, strict=True):
            found = _is_found(mutant, source, copy)
            print(f"{mutant.name}: {'killed' if found else 'SURVIVES'}", flush=True)
            survivors += [] if found else [mutant.name]
    print(f"{len(chosen)} faults, {len(survivors)} survive: {' '.join(survivors)}".rstrip(": "))
    return 1 if survivors else 0


def _ignored(folder: str, names: list[str]) -> list[str]:
    """Return what of a folder is not copied: caches everywhere, data and `.venv` at the top."""
    top = (".git", ".venv", "runs") if Path(folder) == ROOT else ()
    return [name for name in names if name in top or name.endswith(("_cache", "__pycache__"))]


def _is_found(mutant: Mutant, source: str, copy: Path) -> bool:
    """Return whether the tests fail with the fault. Raises LookupError if none ran."""
    path = copy / mutant.path
    whole = path.read_text(encoding="utf-8")
    path.write_text(source, encoding="utf-8")
    words = ["-k", mutant.words] if mutant.words else []
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutant.tests]
    try:
        done = subprocess.run(
            [*command, *words, "-m", "not slow"],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return True  # a hang is seen too
    finally:
        path.write_text(whole, encoding="utf-8")
    if done.returncode > 1:
        raise LookupError(f"{mutant.name}: {done.stdout.decode()[-2000:]}")
    return done.returncode == 1


if __name__ == "__main__":
    sys.exit(main())
