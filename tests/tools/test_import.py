"""`dist-vse import`: a checkpoint of the authors' layout becomes a run that eval measures."""

import argparse
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence
from torchvision import models

from dist_vse import cli
from dist_vse.common.arguments import parse_arguments
from dist_vse.common.errors import UserError
from dist_vse.config import LossConfig
from dist_vse.models.build import build_model
from dist_vse.models.tokenizer import AnyWords, WordTokenizer
from dist_vse.runs.checkpoint import load_latest
from dist_vse.runs.trained import open_trained
from dist_vse.tools.convse.names import model_shape, renamed
from dist_vse.tools.convse.vocabulary import read_vocabulary
from tests.support.datasets import write_dataset

WORDS = ["a", "red", "square", "blue", "on", "'s"]


def _states(*, mlp: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draw weights by the authors' names; BatchNorm's statistics too."""
    torch.manual_seed(0)
    trunk = models.resnet18(weights=None)
    trunk.fc = nn.Identity()
    image = {f"cnn.module.{name}": value for name, value in trunk.state_dict().items()}
    layers: dict[str, nn.Module] = {"fc": nn.Linear(512, 24)}
    texts: dict[str, nn.Module] = {"embed": nn.Embedding(len(WORDS) + 4, 8), "rnn": nn.GRU(8, 24)}
    if mlp:
        for part, name in ((layers, "g_I"), (texts, "g_T")):
            part[name] = nn.Sequential(nn.Linear(24, 32, bias=False), nn.ReLU(), nn.Linear(32, 16))
    for part, state in ((layers, image), (texts, text := {})):
        for name, layer in part.items():
            state |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    return image, text


def _write(folder: Path, *, mlp: bool = True, **changes: Any) -> tuple[Path, Path]:
    """Write a checkpoint and a pickled vocabulary as their code does."""
    options: dict[str, Any] = {
        "cnn_type": "resnet18", "loss_fn": "ConVSE++" if mlp else "triplet", "temp": 0.1,
        "margin": 0.2, "use_abs": False, "no_imgnorm": False, "measure": "cosine",
        "max_violation": True, "learning_rate": 2e-4, "grad_clip": 2.0,
    }  # fmt: skip
    content = {
        "epoch": 3, "model": [*_states(mlp=mlp)], "best_rsum": 123.5, "Eiters": 7,
        "opt": argparse.Namespace(**(options | changes)),
    }  # fmt: skip
    torch.save(content, folder / "model_best.pth.tar")
    module = types.ModuleType("vocab")

    class Vocabulary:
        pass

    Vocabulary.__module__, Vocabulary.__qualname__ = "vocab", "Vocabulary"
    module.Vocabulary = Vocabulary  # type: ignore[attr-defined]
    vocabulary: Any = Vocabulary()
    vocabulary.word2idx = {
        w: i for i, w in enumerate(["<pad>", "<start>", "<end>", "<unk>", *WORDS])
    }
    sys.modules["vocab"] = module
    try:
        (folder / "v.pkl").write_bytes(pickle.dumps(vocabulary))
    finally:
        del sys.modules["vocab"]
    return folder / "model_best.pth.tar", folder / "v.pkl"


@pytest.mark.slow
@pytest.mark.parametrize(
    "mlp", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["convse", "vsepp"]
)
def test_an_imported_run_has_their_features_and_is_evaluated(tmp_path: Path, mlp: bool) -> None:
    checkpoint, vocabulary = _write(tmp_path, mlp=mlp)
    write_dataset(tmp_path / "shards", {"train": 8, "test": 12})
    out, data = tmp_path / "run", str(tmp_path / "shards")
    arguments = ["import", "convse", str(checkpoint), str(out), "--vocabulary", str(vocabulary)]
    assert cli.main([*arguments, "--data", data]) == 0
    trained = open_trained(out)
    assert trained.config.loss.name == ("convse++" if mlp else "vse++")
    model, (image, text) = trained.model.eval(), _states(mlp=mlp)

    pixels = torch.randn(3, 3, 32, 32)
    trunk = models.resnet18(weights=None)
    trunk.fc = nn.Identity()
    trunk.load_state_dict(
        {n.removeprefix("cnn.module."): v for n, v in image.items() if "cnn" in n}
    )
    hidden = functional.normalize(trunk.eval()(pixels), dim=1)
    hidden = functional.linear(hidden, image["fc.weight"], image["fc.bias"])
    gru = nn.GRU(8, 24, batch_first=True)
    gru.load_state_dict({n.removeprefix("rnn."): v for n, v in text.items() if "rnn" in n})
    tokens = trained.tokenizer(["a red square's", "blue"])
    lengths = (tokens != 0).sum(1)
    words = functional.embedding(tokens, text["embed.weight"])
    state = gru(pack_padded_sequence(words, lengths, batch_first=True))[1][0]
    if mlp:
        for name, g, x in (("g_I", image, "hidden"), ("g_T", text, "state")):
            value = hidden if x == "hidden" else state
            value = functional.linear(functional.linear(value, g[f"{name}.0.weight"]).relu(),
                                      g[f"{name}.2.weight"], g[f"{name}.2.bias"])  # fmt: skip
            hidden, state = (value, state) if x == "hidden" else (hidden, value)
    with torch.no_grad():
        assert torch.allclose(
            model.encode_images(pixels), functional.normalize(hidden, dim=1), atol=1e-6
        )
        assert torch.allclose(
            model.encode_texts(tokens), functional.normalize(state, dim=1), atol=1e-6
        )
    assert cli.main(["eval", str(out), "--split", "test"]) in (0, 2)  # 2: random weights collapse
    with pytest.raises(UserError, match=r"weights alone.*start a run from it by model\.from_run"):
        load_latest(out / "checkpoints", None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="holds a run already"):
        cli.COMMANDS["import"].run(parse_arguments(cli._parser(), arguments))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_abs": True}, "--use_abs has no counterpart"),
        ({"measure": "order"}, "--measure order"),
        ({"cnn_type": "vgg19"}, "vgg19; only ResNets"),
        ({"cnn_type": "resnet34"}, "its trunk is no resnet34"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    checkpoint, vocabulary = _write(tmp_path, **changes)
    out = tmp_path / "run"
    words = ["--vocabulary", str(vocabulary)]
    assert cli.main(["import", "convse", str(checkpoint), str(out), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()


def test_a_model_of_precomputed_features_has_theirs(tmp_path: Path) -> None:
    image, text = _states(mlp=False)
    image = {"fc.weight": torch.randn(24, 7), "fc.bias": torch.randn(24)}
    shape = model_shape(image, text, "")
    assert shape.image.kind == "vectors" and shape.image.size == 7
    model = build_model(shape, LossConfig(), AnyWords(len(WORDS) + 4)).eval()
    given = model.load_state_dict(renamed(image, text), strict=False)
    assert {*given.missing_keys} == {"log_scale", "bias"} and not given.unexpected_keys
    vectors = torch.randn(5, 7)
    hidden = functional.linear(vectors, image["fc.weight"], image["fc.bias"])
    with torch.no_grad():
        ours = model.encode_images(vectors)
    assert torch.allclose(ours, functional.normalize(hidden, dim=1), atol=1e-6)


class _Evil:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_no_code_of_a_file_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, vocabulary = _write(tmp_path)
    evil = tmp_path / "evil.pkl"
    evil.write_bytes(pickle.dumps(_Evil()))
    torch.save({"model": [{}, {}], "opt": _Evil()}, tmp_path / "evil.tar")
    for first, second in ((tmp_path / "evil.tar", vocabulary), (checkpoint, evil)):
        arguments = ["convse", str(first), str(tmp_path / "run"), "--vocabulary", str(second)]
        assert cli.main(["import", *arguments]) == 2
    captured = capsys.readouterr()
    assert "code ran" not in captured.out and "not a" in captured.err


def test_a_vocabulary_becomes_json(tmp_path: Path) -> None:
    _, vocabulary = _write(tmp_path)
    assert cli.main(["import", "vocabulary", str(vocabulary), str(tmp_path / "v.json")]) == 0
    tokenizer = WordTokenizer.load(tmp_path / "v.json")
    assert tokenizer.rule == "treebank" and tokenizer.vocabulary == WORDS
    assert tokenizer(["a dog's"]).tolist() == [[1, 4, 3, 9, 2]]
    assert read_vocabulary(tmp_path / "v.json") == WORDS
