"""Text trunks: one vector a caption, whatever the padding."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import (
    AutoModel,
    BertConfig,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    T5Model,
    XLNetConfig,
    XLNetModel,
)

from dist_vse.common.errors import UserError
from dist_vse.config import TextConfig
from dist_vse.models.text import GruTrunk, PretrainedTrunk, TextTrunk, build_text_trunk
from dist_vse.models.tokenizer import AnyWords
from tests.support.tiny_models import write_tiny_bert

torch.set_num_threads(1)
TOKENS = torch.tensor([[2, 4, 5, 6, 3], [2, 7, 3, 0, 0], [2, 8, 9, 3, 0]])
KINDS = ("gru", "transformer", "pretrained")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("bert"))


def build(kind: str, bert: Path, *, checkpointing: bool = False, dropout: float = 0.0) -> TextTrunk:
    config = TextConfig(
        kind=kind,
        weights=str(bert) if kind == "pretrained" else None,
        max_tokens=16,
        width=64,
        word_dim=20,
        dropout=dropout,
    )
    torch.manual_seed(0)
    return build_text_trunk(config, AnyWords(11), grad_checkpointing=checkpointing)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: str, bert: Path) -> None:
    trunk = build(kind, bert).eval()
    features = trunk(TOKENS)
    assert features.shape == (3, trunk.dim)
    longer = trunk(torch.cat([TOKENS, torch.zeros(3, 7, dtype=torch.int64)], dim=1))
    torch.testing.assert_close(longer, features, rtol=1e-5, atol=1e-6)
    for row, length in enumerate((5, 3, 4)):
        alone = trunk(TOKENS[row : row + 1, :length])[0]
        torch.testing.assert_close(alone, features[row], rtol=1e-5, atol=1e-6)
    changed = TOKENS.clone()
    changed[1, 1] = 10
    assert (trunk(changed)[1] - features[1]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_padding_gets_no_gradient(kind: str, bert: Path) -> None:
    trunk = build(kind, bert)
    trunk(TOKENS).square().sum().backward()
    words = next(m for m in trunk.modules() if isinstance(m, nn.Embedding) and len(m.weight) == 11)
    assert words.weight.grad is not None
    assert words.weight.grad[0].abs().max() == 0
    assert words.weight.grad[4].abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_the_only_randomness(kind: str, bert: Path) -> None:
    trunk = build(kind, bert)
    assert all(module.training for module in trunk.modules())
    assert torch.equal(trunk(TOKENS), trunk(TOKENS))
    trunk = build(kind, bert, dropout=0.5)
    assert not torch.equal(trunk(TOKENS), trunk(TOKENS))
    assert torch.equal(trunk.eval()(TOKENS), trunk(TOKENS))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(kind: str, bert: Path) -> None:
    grads: list[list[Tensor | None]] = []
    for checkpointing in (False, True):
        trunk = build(kind, bert, checkpointing=checkpointing, dropout=0.3)
        torch.manual_seed(1)
        trunk(TOKENS).square().sum().backward()
        grads.append([p.grad for p in trunk.parameters() if p.requires_grad])
    for plain, recomputed in zip(*grads, strict=True):
        assert plain is not None and recomputed is not None
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_gru_is_the_last_state_of_a_packed_sequence(bert: Path) -> None:
    trunk = build("gru", bert)
    assert isinstance(trunk, GruTrunk)
    packed = pack_padded_sequence(
        trunk.words(TOKENS), torch.tensor([5, 3, 4]), batch_first=True, enforce_sorted=False
    )
    _, last = trunk.gru(packed)
    torch.testing.assert_close(trunk(TOKENS), last[-1], rtol=1e-5, atol=1e-6)


def test_pretrained_is_the_mean_of_the_last_hidden_states(bert: Path) -> None:
    trunk = build("pretrained", bert).eval()
    assert isinstance(trunk, PretrainedTrunk)
    model = AutoModel.from_pretrained(bert, local_files_only=True).eval()
    states = model(input_ids=TOKENS[1:2, :3]).last_hidden_state[0]
    torch.testing.assert_close(trunk(TOKENS)[1], states.mean(0), rtol=1e-5, atol=1e-6)
    untrained = [name for name, p in trunk.named_parameters() if not p.requires_grad]
    assert untrained == ["encoder.pooler.dense.weight", "encoder.pooler.dense.bias"]


def test_half_precision_weights_become_float32(bert: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(bert, local_files_only=True).bfloat16().save_pretrained(tmp_path)
    trunk = build("pretrained", tmp_path)
    assert {p.dtype for p in trunk.parameters()} == {torch.float32}


def load(folder: Path, *, max_tokens: int = 16, vocab_size: int = 11) -> TextTrunk:
    config = TextConfig(kind="pretrained", weights=str(folder), max_tokens=max_tokens)
    return build_text_trunk(config, AnyWords(vocab_size), grad_checkpointing=False)


def test_pretrained_errors(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="does not load as a transformers model"):
        load(tmp_path)
    with pytest.raises(
        UserError,
        match=r"number of positions is 16, but 17 are needed; lower model.text.max_tokens",
    ):
        load(bert, max_tokens=17)
    with pytest.raises(UserError, match="vocab_size is 11, but 12 are needed"):
        load(bert, vocab_size=12)


def test_half_of_t5_and_models_without_a_table_of_positions(tmp_path: Path) -> None:
    t5 = T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5Model(t5).save_pretrained(tmp_path / "t5")
    T5EncoderModel(t5).save_pretrained(tmp_path / "t5_half")
    XLNetModel(
        XLNetConfig(vocab_size=11, d_model=8, n_layer=1, n_head=2, d_inner=8)
    ).save_pretrained(tmp_path / "xlnet")
    for name in ("t5", "t5_half", "xlnet"):
        assert load(tmp_path / name)(TOKENS).shape == (len(TOKENS), 8)


def test_roberta_counts_positions_from_behind_the_padding(tmp_path: Path) -> None:
    width = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    RobertaModel(
        RobertaConfig(
            vocab_size=11, max_position_embeddings=6, pad_token_id=1, intermediate_size=8, **width
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="number of positions is 4, but 5 are needed"):
        load(tmp_path, max_tokens=5)
    assert load(tmp_path, max_tokens=4)(TOKENS[:, :4]).shape == (len(TOKENS), 8)


def test_pooling_is_the_folders(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "bge")
    (folder / "1_Pooling").mkdir()
    stated = folder / "1_Pooling" / "config.json"
    stated.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    trunk = load(folder).eval()
    assert isinstance(trunk, PretrainedTrunk)
    first = trunk.encoder(TOKENS, attention_mask=(TOKENS != 0).long()).last_hidden_state[:, 0]
    torch.testing.assert_close(trunk(TOKENS), first)
    stated.write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(UserError, match="states the pooling max_tokens; only the mean"):
        load(folder)
    stated.write_text("[")
    with pytest.raises(UserError, match="can't be read"):
        load(folder)


def test_dropout_of_gpt2_is_the_configs(tmp_path: Path) -> None:
    GPT2Model(
        GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    ).save_pretrained(tmp_path)
    trunk = load(tmp_path)
    assert {m.p for m in trunk.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_incomplete_weights_are_an_error(bert: Path, tmp_path: Path) -> None:
    GPT2Model(
        GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    ).save_pretrained(tmp_path)
    BertConfig.from_pretrained(bert).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"the weights lack \d+ tensors"):
        load(tmp_path)
