"""Damage to a file, drawn from a seed: a bit, a byte, a cut, garbage."""

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

GARBAGE = (b"\x00", b"\xff\xfe", b"[" * 5000, b"9" * 5000, b'"', b"\n", b"{}", b"\\ud800", b"NaN")


def damage(data: bytes, rng: random.Random) -> bytes:
    """Return other bytes than these."""
    place = rng.randrange(len(data) + 1)
    start, rest = data[:place], data[place:]
    kind = rng.choice(("bit", "bit", "byte", "cut", "insert", "zeros")) if rest else "insert"
    if kind == "bit":
        return start + bytes([rest[0] ^ 1 << rng.randrange(8)]) + rest[1:]
    if kind == "byte":
        return start + bytes([(rest[0] + rng.randrange(1, 256)) % 256]) + rest[1:]
    if kind == "cut":
        return start
    if kind == "zeros":
        return start + b"\0" * len(rest[:64]) + rest[64:] if rest.strip(b"\0") else start
    return start + rng.choice(GARBAGE) + rest


def damaged_copies(
    whole: Path, names: Sequence[str], folder: Path, *, seeds: range
) -> Iterator[tuple[str, Path]]:
    """Yield (what was done, copy) of a folder in which one of these files is damaged, in turn."""
    for seed in seeds:
        rng = random.Random(seed)
        name = names[seed % len(names)]
        copy = folder / str(seed)
        shutil.copytree(whole, copy)
        path = copy / name
        path.write_bytes(damage(path.read_bytes(), rng))
        yield f"seed {seed}: {name}", copy
