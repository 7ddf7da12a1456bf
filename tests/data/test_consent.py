"""A command that a file names runs only with the user's consent, never by what a file says."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_vse.cli import main
from dist_vse.common.errors import UserError
from dist_vse.config import DataConfig, dump_config, load_config
from dist_vse.data.eval_stream import captions
from dist_vse.data.index import check_consent, may_run_code, read_index
from dist_vse.data.streams import open_train_sets
from dist_vse.runs.folder import open_run
from dist_vse.tools.report.images import names_commands
from dist_vse.tools.search.embed import open_data
from tests.support.datasets import write_dataset
from tests.support.shards import run_shard, write_img2dataset

WORKERS = ("--workers", "1")
REFUSED = "may run a command; .* --allow-pipe, in training with data.allow_pipe=true"


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, Path]:
    """Return somebody else's data set, and the file that its command would make."""
    folder, mark = tmp_path / "data", tmp_path / "PWNED"
    write_dataset(folder, {"train": [2], "val": [2]})
    index = folder / "index.json"
    for name in ("train", "val"):
        tar = f"{name}-00000.tar"
        command = f"pipe:touch {mark}; cat {folder / tar}"
        index.write_text(index.read_text().replace(f'"{tar}"', json.dumps(command)))
        side = folder / f"{name}-00000.npy"
        side.rename(folder / f"{Path(command).name.removesuffix('.tar')}.npy")
    return folder, mark


def test_the_index_alone_runs_nothing(
    planted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, mark = planted
    monkeypatch.setenv("DIST_VSE_CACHE", str(tmp_path / "cache"))
    asked: list[Callable[[], object]] = [
        lambda: run_shard("stats", folder, *WORKERS),
        lambda: run_shard("verify", folder, *WORKERS),
        lambda: run_shard("stats", folder, "--workers", "2"),
        lambda: list(captions(read_index(folder), "train")),
        lambda: open_train_sets(DataConfig(index=str(folder))),
    ]
    for ask in asked:
        with pytest.raises(UserError, match=REFUSED):
            ask()
        assert not mark.exists()
    assert names_commands(read_index(folder))  # a report then shows keys

    open_train_sets(DataConfig(index=str(folder), allow_pipe=True))
    assert len(list(captions(read_index(folder, allow_pipe=True), "train"))) == 4
    mark.unlink()
    assert run_shard("stats", folder, *WORKERS, "--allow-pipe") == 0
    mark.unlink()
    assert run_shard("verify", folder, *WORKERS, "--allow-pipe") == 0
    assert mark.exists()


@pytest.mark.parametrize("brace", [False, True])
def test_repair_runs_no_command_of_the_log(tmp_path: Path, brace: bool) -> None:
    first, second = write_img2dataset(tmp_path / "far")
    out, mark = tmp_path / "out", tmp_path / "PWNED"
    command = f"touch {mark}; cat {second}"
    assert run_shard("index", first, f"pipe:{command}", "--out", out, *WORKERS) == 0
    mark.unlink()  # the user had typed that one
    (out / "train.00001.npy").unlink()
    log = out / "commands.jsonl"
    line = json.loads(log.read_text())
    line["options"]["allow_pipe"] = True  # the log's consent is none
    if brace:
        line["options"]["tars"] = ["{" + "pipe,pipe" + "}:" + command]
    log.write_text(json.dumps(line) + "\n")
    (out / "receipts.jsonl").unlink()
    with pytest.raises(UserError, match=REFUSED):
        run_shard("repair", out, *WORKERS)
    assert not mark.exists()
    if not brace:
        assert run_shard("repair", out, *WORKERS, "--allow-pipe") == 0
        assert mark.exists()


def test_repair_runs_no_command_of_the_manifest(tmp_path: Path) -> None:
    tars = write_img2dataset(tmp_path / "far")
    out, mark = tmp_path / "out", tmp_path / "PWNED"
    assert run_shard("index", *tars, "--out", out, *WORKERS) == 0
    receipts = out / "receipts.jsonl"
    command = json.dumps(f"pipe:touch {mark}; cat {tars[0]}")
    receipts.write_text(receipts.read_text().replace(json.dumps(str(tars[0])), command))
    assert "PWNED" in receipts.read_text()
    with pytest.raises(UserError, match=REFUSED):
        run_shard("repair", out, *WORKERS)
    assert not mark.exists()


@pytest.fixture
def planted_run(planted: tuple[Path, Path], tmp_path: Path) -> Path:
    """Return somebody else's run, whose config allows the data set's command."""
    folder, _ = planted
    config = load_config("configs/debug_cpu.yaml", [f"data.index={folder}"])
    allowed = dataclasses.replace(config.data, allow_pipe=True)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(dataclasses.replace(config, data=allowed)))
    return run


def test_a_runs_own_config_is_no_consent(planted_run: Path) -> None:
    assert not open_run(planted_run).data.allow_pipe
    with pytest.raises(UserError, match=REFUSED):
        open_data(planted_run, None).split("val")
    assert open_data(planted_run, None, allow_pipe=True).split("val").num_samples == 2


@pytest.mark.slow
def test_commands_on_a_run_ask_for_consent(
    planted: tuple[Path, Path],
    planted_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, (_, mark) = planted_run, planted
    assert main(["eval", str(run), "--split", "val"]) == 2
    assert main(["embed", str(run), str(tmp_path / "x.npy"), "--split", "val"]) == 2
    assert capsys.readouterr().err.count("may run a command") == 2
    assert not mark.exists()


@pytest.mark.parametrize(
    ("location", "risky"),
    [
        ("https://host/a.tar?x=1", False),
        ("http://[2001:db8::1]/a.tar", False),
        ("s3://bucket/a.tar", False),
        ("gs://bucket/a.tar", False),
        ("file:///a.tar", False),
        ("./a::b.tar", False),
        ("/abs/pipe:x.tar", False),
        ("pipe:cat a.tar", True),
        ("PIPE:cat a.tar", True),
        ("reference::https://host/a.json", True),
        ("simplecache::s3://bucket/a.tar", True),
        ("s3://a::reference://b", True),
        ("git://repo@host:x", True),
    ],
)
def test_what_may_run_code(location: str, risky: bool) -> None:
    assert may_run_code(location) is risky
    if risky:
        with pytest.raises(UserError, match=REFUSED):
            check_consent(location, allow_pipe=False)
    check_consent(location, allow_pipe=True)
