"""An address where a folder to write is wanted: one line, and nothing is written."""

from pathlib import Path

import pytest

from dist_vse import cli
from dist_vse.common.errors import UserError
from dist_vse.common.files import check_output
from dist_vse.common.local_path import require_local

S3 = "s3://bucket/run"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "demo", f"output_dir={S3}"],
        ["features", "demo", f"output_dir={S3}"],
        ["submit", "demo", f"output_dir={S3}", "--dry-run"],
        ["doctor", "demo", f"output_dir={S3}"],
        ["plan", "demo", f"output_dir={S3}"],
        ["plan", "demo", "--out", S3],
        ["plan", "demo", "--calibrate", S3],
        ["bench", "scale", "--page", S3],
        ["bench", "million", "--out", S3],
        ["doctor", "--gpu", "--json", S3],
        ["shard", "jsonl", "pairs.jsonl", S3],
        ["shard", "index", "tars", "--out", S3],
        ["config", "copy", "demo", S3],
        ["eval", S3],
        ["report", "run", "--out", S3],
        ["export", "run", S3],
        ["embed", "run", S3],
        ["search", "run", "--text", "a cat", "--sheet", S3],
    ],
    ids=lambda words: " ".join(words),
)
def test_an_address_is_refused_by_every_command_that_writes(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert f"{S3}: s3:// is no local path; give a folder of this machine" in error
    assert error.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_what_is_a_path_stays_one() -> None:
    for path in ("", "run", "a:b", "C:/run", "runs/s3:/x", Path("x.y"), "/s3:"):
        require_local(path)
    for path in (Path(S3), "gs://b", "hf://x/y", "https://x/y", "s3:/b"):
        with pytest.raises(UserError, match="is no local path"):
            require_local(path)
    with pytest.raises(UserError, match=r"s3://bucket/run: s3:// is no local path"):
        check_output(Path(S3))
