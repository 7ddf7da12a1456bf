"""Do the tests notice a fault? Put one in at a time, and run the tests that should fail.

    python -m benchmarks.mutants               # all; the exit code is 1 if one survives
    python -m benchmarks.mutants safe join     # those whose names hold one of these words
    python -m benchmarks.mutants --check       # only: does every line to be changed still exist?

A fault is one line of losses, engine, stream, retrieval, checkpoints or shards, changed in a copy
of this checkout. A new test of such code comes with its fault here. Some ten seconds a fault.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Mutant:
    """One fault, and the tests (a file, or a file and words of `pytest -k`) that should see it."""

    name: str
    path: str
    line: str
    faulty: str
    tests: str
    words: str = ""

    def source(self) -> str:
        """Return the faulty file. Raises LookupError unless the line is there exactly once."""
        text = (ROOT / self.path).read_text(encoding="utf-8")
        if text.count(self.line) != 1:
            raise LookupError(f"{self.path}: {self.line!r} is there {text.count(self.line)} times")
        return text.replace(self.line, self.faulty)


LOSSES, TESTS = "dist_vse/losses", "tests/losses"
MUTANTS = (
    Mutant(
        "ema-in-samples",
        "dist_vse/engine/weight_average.py",
        "-math.expm1(-batch / self._samples)",
        "batch / self._samples",
        "tests/engine/test_weight_average.py",
        "exponential",
    ),
    Mutant(
        "softmax-safe",
        f"{LOSSES}/softmax.py",
        "SAFE = 86.0",
        "SAFE = 126.0",
        f"{TESTS}/test_global_loss.py",
        "powers",
    ),
    Mutant(
        "softmax-low-rows",
        f"{LOSSES}/softmax.py",
        "if smallest_own - shift >= -SAFE else",
        "if smallest_own - shift >= -2 * SAFE else",
        f"{TESTS}/test_global_loss.py",
        "powers",
    ),
    Mutant(
        "softmax-own-columns",
        f"{LOSSES}/softmax.py",
        "column_sums[layout.own].log2() + self.shift,",
        "column_sums[layout.own].log2(),",
        f"{TESTS}/test_global_loss.py",
        "low_temperatures or powers or float32",
    ),
    Mutant(
        "preflight-norms",
        f"{LOSSES}/preflight.py",
        "max(row_norms) * max(column_norms)",
        "row_norms[0] * column_norms[0]",
        f"{TESTS}/test_global_loss_distributed.py",
        "without_rows",
    ),
    Mutant(
        "preflight-close",
        f"{LOSSES}/preflight.py",
        "CLOSE = 1e-6",
        "CLOSE = 1e-2",
        f"{TESTS}/test_preflight.py",
        "every_rank",
    ),
    Mutant(
        "hardest-join",
        f"{LOSSES}/hardest.py",
        "self.indices.masked_fill_(self.values < largest - self.tolerance, nowhere)",
        "self.indices.masked_fill_(self.values < largest, nowhere)",
        f"{TESTS}/test_global_loss_distributed.py",
        "nearly",
    ),
    Mutant(
        "kinds-of-ids",
        f"{LOSSES}/global_loss.py",
        '" and ".join(self._kinds_of_ids)',
        "str(len(self._kinds_of_ids))",
        f"{TESTS}/test_preflight.py",
        "every_rank",
    ),
    Mutant(
        "second-derivative",
        f"{LOSSES}/global_loss.py",
        "if torch.is_grad_enabled():  # alike",
        "if False:  # alike",
        f"{TESTS}/test_preflight.py",
        "second",
    ),
    Mutant(
        "fused-mask",
        f"{LOSSES}/fused_kernels.py",
        "if duplicates == MASK:",
        "if duplicates == MASK + 9:",
        f"{TESTS}/test_fused.py",
        "either_kind",
    ),
    Mutant(
        "fused-own-pair",
        f"{LOSSES}/fused_kernels.py",
        's = tl.where((i + own)[:, None] == j[None, :], float("-inf"), s)',
        's = tl.where((i + own)[:, None] == j[None, :] + 1, float("-inf"), s)',
        f"{TESTS}/test_fused.py",
        "ragged",
    ),
    Mutant(
        "fused-index",
        f"{LOSSES}/fused_kernels.py",
        "(start + j)[None, :], NOWHERE), 1)",
        "j[None, :], NOWHERE), 1)",
        f"{TESTS}/test_fused.py",
        "strips",
    ),
    Mutant(
        "fused-lost-maximum",
        f"{LOSSES}/fused.py",
        "sums.mul_((maximum - raised).exp2_())",
        "sums.mul_((raised - raised).exp2_())",
        f"{TESTS}/test_fused.py",
        "strips",
    ),
    Mutant(
        "fused-join-order",
        f"{LOSSES}/fused.py",
        "best.tolerance, nowhere).amin(0)",
        "best.tolerance, -1).amax(0)",
        f"{TESTS}/test_fused.py",
        "copies",
    ),
    Mutant(
        "graphs-output",
        "dist_vse/models/dual_encoder.py",
        "output = output.clone()",
        "pass",
        "tests/training/test_compile_warmup.py",
        "writes_over",
    ),
    Mutant(
        "near-columns",
        f"{LOSSES}/near_pairs.py",
        "torch.minimum(self.rows[tile.rows].unsqueeze(1), self.columns[tile.columns])",
        "self.rows[tile.rows].unsqueeze(1)",
        f"{TESTS}/test_near_pairs.py",
        "no_negatives",
    ),
    Mutant(
        "near-positives",
        f"{LOSSES}/near_pairs.py",
        "near[tile.duplicates] = False",
        "pass",
        f"{TESTS}/test_near_pairs.py",
        "positives_stay",
    ),
    Mutant(
        "distilled-columns",
        f"{LOSSES}/distillation.py",
        ".sub_((y - of_columns[1]).exp_())",
        "",
        f"{TESTS}/test_distillation.py",
        "dense_formula",
    ),
    Mutant(
        "mined-own-captions",
        "dist_vse/tools/search/mine.py",
        "more[own_row[here], own_column[here] - start] = -torch.inf",
        "pass",
        "tests/tools/test_mine.py",
        "dense_search",
    ),
    Mutant(
        "beta2",
        "dist_vse/config/optimizers.py",
        '"betas": (optim.beta1, optim.beta2)',
        '"betas": (optim.beta1, 0.999)',
        "tests/engine/test_optimizer.py",
        "setting",
    ),
    Mutant(
        "seed-of-other-ranks",
        "dist_vse/runs/checkpoint.py",
        'torch.initial_seed() + 7919 * manifest["step"]',
        "torch.initial_seed()",
        "tests/runs/test_checkpoint.py",
        "nobody_drew",
    ),
    Mutant(
        "manifest-checksum",
        "dist_vse/runs/checkpoint.py",
        'manifest.pop("checksum", None) != _checksum(manifest)',
        'manifest.pop("checksum", None) is None',
        "tests/runs/test_damaged_files.py",
    ),
    Mutant(
        "tar-room",
        "dist_vse/shards/build/tar_writer.py",
        "if needed + _PAGE_BYTES > CHUNK_BYTES:",
        "if needed > CHUNK_BYTES:",
        "tests/shards/test_tar_writer.py",
        "room",
    ),
    Mutant(
        "shard-bytes",
        "dist_vse/shards/build/plan.py",
        "num_bytes + size > options.shard_bytes",
        "num_bytes + size >= options.shard_bytes",
        "tests/shards/test_plan.py",
        "exactly",
    ),
    Mutant(
        "pipe-consent",
        "dist_vse/data/index.py",
        "if may_run_code(location) and not allow_pipe:",
        "if False:",
        "tests/data/test_consent.py",
    ),
    Mutant(
        "secrets",
        "dist_vse/shards/manifest.py",
        "fields[name] = without_secrets(fields[name])",
        "pass",
        "tests/shards/test_secrets.py",
    ),
    Mutant(
        "scoring-bound-above",
        "dist_vse/evaluation/retrieval/scoring.py",
        "above = scores > (bar + doubt).float()[:, None]",
        "above = scores > bar.float()[:, None]",
        "tests/evaluation/retrieval/test_scoring.py",
        "float64",
    ),
    Mutant(
        "scoring-bound-below",
        "dist_vse/evaluation/retrieval/scoring.py",
        "open_ = (scores >= (bar - doubt).float()[:, None]) ^ above",
        "open_ = (scores >= bar.float()[:, None]) ^ above",
        "tests/evaluation/retrieval/test_scoring.py",
        "float64",
    ),
    Mutant(
        "scoring-bound-others",
        "dist_vse/evaluation/retrieval/scoring.py",
        "(some >= (bars.bar[stop - 1] - doubt).float()[:, None])",
        "(some >= bars.bar[stop - 1].float()[:, None])",
        "tests/evaluation/retrieval/test_scoring.py",
        "float64 or ties_with",
    ),
    Mutant(
        "scoring-rounding",
        "dist_vse/evaluation/retrieval/scoring.py",
        "return 1.1 * (min(width, SUMMED) + width // SUMMED + 8) * ROUNDOFF",
        "return 0.1 * ROUNDOFF",
        "tests/evaluation/retrieval/test_scoring.py",
        "bound or float64",
    ),
    Mutant(
        "scoring-parts",
        "dist_vse/evaluation/retrieval/scoring.py",
        "width // SUMMED + 8",
        "8 - width // SUMMED",
        "tests/evaluation/retrieval/test_scoring.py",
        "bound",
    ),
    Mutant(
        "scoring-precision",
        "dist_vse/evaluation/retrieval/scoring.py",
        'torch.set_float32_matmul_precision("highest")',
        "pass",
        "tests/evaluation/retrieval/test_scoring.py",
        "precision",
    ),
    Mutant(
        "warm-up-start",
        "dist_vse/training/schedule.py",
        "return optim.lr * (samples_seen + 1) / (warmup + 1)",
        "return optim.lr * samples_seen / (warmup + 1)",
        "tests/training/test_schedule.py",
        "rises",
    ),
    Mutant(
        "warm-up-peak",
        "dist_vse/training/schedule.py",
        "return optim.lr * (samples_seen + 1) / (warmup + 1)",
        "return optim.lr * (samples_seen + 1) / (warmup + 2)",
        "tests/training/test_schedule.py",
        "rises",
    ),
    Mutant(
        "warm-up-floor",
        "dist_vse/training/schedule.py",
        "return optim.lr * (samples_seen + 1) / (warmup + 1)",
        "return optim.min_lr + (optim.lr - optim.min_lr) * (samples_seen + 1) / (warmup + 1)",
        "tests/training/test_schedule.py",
        "rises",
    ),
    Mutant(
        "after-warm-up",
        "dist_vse/training/schedule.py",
        "progress = (samples_seen - warmup) / max(1, total_samples - warmup)",
        "progress = samples_seen / max(1, total_samples)",
        "tests/training/test_schedule.py",
        "rises",
    ),
    Mutant(
        "stream-leftovers",
        "dist_vse/data/order.py",
        "((np.arange(streams) - taken) % streams < longer)",
        "(np.arange(streams) % streams < longer)",
        "tests/data/test_order.py",
        "step",
    ),
    Mutant(
        "stream-offset",
        "dist_vse/data/order.py",
        "(ring.offset + place) % items if ring.order is None",
        "place if ring.order is None",
        "tests/data/test_order.py",
        "cut_at or never",
    ),
    Mutant(
        "stream-seed",
        "dist_vse/data/order.py",
        "seed = (self._seed, self._epoch, 2, stream, number)",
        "seed = (self._seed, self._epoch, 2, 0, number)",
        "tests/data/test_order.py",
        "never",
    ),
    Mutant(
        "stream-shares",
        "dist_vse/data/order.py",
        "left, total = left - share, total - count",
        "left, total = left, total - count",
        "tests/data/test_order.py",
        "shares or evenly",
    ),
    Mutant(
        "plan-empty-shard",
        "dist_vse/shards/build/plan.py",
        "if part and num_bytes + size > options.shard_bytes:",
        "if num_bytes + size > options.shard_bytes:",
        "tests/shards/test_plan.py",
        "bytes",
    ),
    Mutant(
        "plan-sum",
        "dist_vse/shards/build/plan.py",
        "part, num_bytes = [], 0\n        part.append(record)",
        "part, num_bytes = [], size\n        part.append(record)",
        "tests/shards/test_plan.py",
        "bytes",
    ),
    Mutant(
        "plan-last-shard",
        "dist_vse/shards/build/plan.py",
        "        num_bytes += size\n    yield part\n",
        "        num_bytes += size\n    yield part[:1]\n",
        "tests/shards/test_plan.py",
        "bytes",
    ),
    Mutant(
        "plan-samples",
        "dist_vse/shards/build/plan.py",
        "range(0, len(members), options.shard_size)",
        "range(0, len(members) - 1, options.shard_size)",
        "tests/shards/test_plan.py",
    ),
    Mutant(
        "tar-padding-room",
        "dist_vse/shards/build/tar_writer.py",
        "needed = _BLOCK + num_bytes + _BLOCK",
        "needed = num_bytes",
        "tests/shards/test_tar_writer.py",
    ),
    Mutant(
        "tar-carried",
        "dist_vse/shards/build/tar_writer.py",
        "rest = bytes(self._buffer[count : self._filled])",
        "rest = bytes(self._buffer[:keep])",
        "tests/shards/test_tar_writer.py",
    ),
    Mutant(
        "tar-count",
        "dist_vse/shards/build/tar_writer.py",
        "self._filled, self._flushed = keep, self._flushed + count",
        "self._filled, self._flushed = keep, self._flushed",
        "tests/shards/test_tar_writer.py",
    ),
    Mutant(
        "tar-partial-write",
        "dist_vse/shards/build/tar_writer.py",
        "            while rest:\n",
        "            if rest:\n",
        "tests/shards/test_tar_writer.py",
    ),
    Mutant(
        "tar-old-padding",
        "dist_vse/shards/build/tar_writer.py",
        "self._buffer[end : end + len(padding)] = padding",
        "pass",
        "tests/shards/test_tar_writer.py",
    ),
    Mutant(
        "report-means",
        "dist_vse/tools/report/lines.py",
        "total = sum(line[name] * w for line, w in zip(having, weights, strict=True))",
        "total = sum(line[name] for line in having) * weights[0]",
        "tests/tools/report/test_lines.py",
        "mean or curve",
    ),
    Mutant(
        "runs-from-the-end",
        "dist_vse/common/reading.py",
        "yield from reversed(lines[1:])",
        "yield from lines[1:]",
        "tests/common/test_reading.py",
        "end",
    ),
)


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
