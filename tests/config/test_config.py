"""The configuration: every file loads, every slip is named with its remedy."""

from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.config import MixConfig, TrainConfig, dump_config, load_config
from dist_vse.config.document import document
from tests.support.paths import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_fits_its_world_sizes(path: Path) -> None:
    config = load_config(path)
    for world_size in (1, 2, 4, 8):
        config.check_world_size(world_size, on_gpu=False)


def test_a_dumped_config_loads_as_the_same_config(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    mix = "data.mix=[{index: a}, {index: b, split: web, weight: 0.5}]"
    config = load_config(CONFIGS[0], ["loss.name=convse++", "optim.lr=3e-4", mix])
    assert config.data.train_sets()[1] == MixConfig("b", "web", 0.5)
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_overrides_replace_the_files_values(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("loss:\n  name: convse\n  margin: 0.3\noutput_dir: runs/${loss.name}\n")
    config = load_config(path, ["loss.name=convse++", "optim.lr=1e-3"])
    assert (config.loss.name, config.loss.margin, config.optim.lr) == ("convse++", 0.3, 1e-3)
    assert config.output_dir == "runs/convse++"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.nme=convse", "unknown key 'loss.nme'; did you mean 'loss.name'?"),
        ("lr=0.1", "unknown key 'lr'; did you mean 'optim.lr'?"),
        ("loss.name=convs", "loss.name='convs' is unknown; did you mean 'convse'?"),
        ("optim.lr=fast", "optim.lr: Value 'fast'"),
        ("chunk_size=0", r"chunk_size \(0\) must be at least 1"),
        ("loss.temperature=0", r"loss.temperature \(0.0\) must be above 0"),
        ("loss.temperature_end=0", r"loss.temperature_end \(0.0\) must be above 0"),
        ("engine.zero_stage=4", r"engine.zero_stage \(4\) must be 0, 1, 2 or 3"),
        ("data=x", "data must hold keys and values"),
        ("chunk_size=most", "chunk_size='most' must be a number or auto"),
        ("cache.keep_graphs=-1", r"cache.keep_graphs \(-1\) must be at least 0"),
        ("chunk_size", "'chunk_size' is no override; write key=value"),
        ("model.compile=grafs", "model.compile='grafs' must be true, false or graphs"),
        ("model.text.frozen=true", "would freeze random weights"),
        ("model.text.dropout=1.5", "model.text.dropout .* below 1"),
        ("data.mix=[{indx: a}]", "unknown key 'data.mix.indx'; did you mean 'data.mix.index'?"),
        ("data.mix=[{index: a, weight: 0}]", r"data.mix: weight \(0.0\) must be above 0"),
    ],
)
def test_a_wrong_setting_is_one_line_with_the_remedy(
    tmp_path: Path, override: str, message: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(UserError, match=message) as caught:
        load_config(path, [override])
    assert "\n" not in str(caught.value)


def test_texts_stay_texts_and_tildes_are_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    path = tmp_path / "c.yaml"
    path.write_text("output_dir: ~/runs/x\ndata: {mix: [{index: ~/a}]}\n")
    assert load_config(path).output_dir == "/home/me/runs/x"
    assert load_config(path).data.mix[0].index == "/home/me/a"
    assert load_config(path, ["output_dir=2024_11_28"]).output_dir == "2024_11_28"
    assert load_config(path, ["data.index=~/b", "model.pretrained=null"]).data.index == "/home/me/b"
    path.write_text("output_dir: 2024_11_28\n")
    with pytest.raises(UserError, match=r"output_dir: YAML reads 20241128 here, .* in quotes"):
        load_config(path)


@pytest.mark.parametrize(
    ("saved", "every", "fits"),
    [
        ("checkpoint_every=2", 4, True),
        ("checkpoint_every=2", 5, False),
        ("checkpoint_every=2", 0, False),
        ("checkpoint_samples=512", 2, True),
        ("checkpoint_samples=512", 5, False),
    ],
)
def test_keep_best_needs_a_step_that_is_evaluated_and_saved(
    saved: str, every: int, fits: bool
) -> None:
    overrides = ["keep_best=1", "total_steps=7", f"eval_every={every}", saved]
    if fits:
        assert load_config(None, overrides).keep_best == 1
        return
    with pytest.raises(UserError, match=r"keep_best \(1\) can keep none"):
        load_config(None, overrides)


def test_a_missing_config_names_those_that_exist(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"no such config; there are .*other\.yaml"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("content", ["", "just words", "- a\n- b\n", "a: [1\n"])
def test_a_file_that_is_no_mapping_is_refused_or_empty(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    if content == "":
        assert load_config(path) == TrainConfig()
        return
    with pytest.raises(UserError, match=r"c\.yaml"):
        load_config(path)


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["global_batch_size=100"], 2, r"global_batch_size \(100\) .* nearest: 96, 104"),
        (
            ["global_batch_size=96", "chunk_size=20"],
            2,
            r"world size \(2\) times chunk_size \(20\) = 40; nearest: 80, 120",
        ),
        (
            [],
            3,
            r"data.num_streams \(8\) must be a multiple of the world size \(3\).* nearest: 6, 9",
        ),
        (["data.num_workers=3"], 2, r"data.num_workers \(3\); nearest: 6, 12"),
    ],
)
def test_numbers_that_do_not_divide_name_the_nearest_that_do(
    tmp_path: Path, overrides: list[str], world_size: int, message: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(UserError, match=message):
        load_config(path, overrides).check_world_size(world_size, on_gpu=False)


def test_kept_graphs_that_zero_3_gets_wrong_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("engine: {zero_stage: 3, coalesce: false}\n")
    with pytest.raises(UserError, match=r"cache.keep_graphs \(2\) must be 0, 1 or auto") as caught:
        load_config(path, ["cache.keep_graphs=2"])
    assert "\n" not in str(caught.value)
    load_config(path, ["cache.keep_graphs=1"])
    load_config(path, ["cache.keep_graphs=auto"])
    load_config(path, ["cache.keep_graphs=2", "engine.zero_stage=2"])


def test_the_page_of_settings_is_up_to_date() -> None:
    page = ROOT / "docs" / "reference" / "config.md"
    assert page.read_text() == document(), (
        "run python -m dist_vse.config.document > docs/reference/config.md"
    )


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "x${oc.env:A,b}", "${oc.decode:${seed}}"])
def test_a_file_reads_no_variables(value: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for text in (f"output_dir: '{value}'\n", f"loss:\n  name: '{value}'\noutput_dir: x\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="a file may not read variables"):
            load_config(path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: " + b"[" * 100_000, b"x" * (1 << 21)])
def test_a_damaged_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.yaml"):
        load_config(tmp_path / "run.yaml")
