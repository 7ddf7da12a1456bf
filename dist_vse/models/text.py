"""The text trunks: the paper's GRU, a small transformer, or any transformers encoder.

A trunk maps tokens to one vector a caption, and padding never changes that vector (but for
rounding). Shape letters: b captions, l tokens, w the trunk's width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dist_vse.common.errors import UserError
from dist_vse.common.log import logger
from dist_vse.config import TextConfig
from dist_vse.models.encoder import (
    enable_checkpointing,
    encoder_dim,
    load_encoder,
    max_positions,
    read_pooling,
)
from dist_vse.models.entry import import_builder
from dist_vse.models.precision import at_least_float32, float32_rnn
from dist_vse.models.tokenizer import Vocabulary

HEAD_WIDTH = 64


class TextTrunk(nn.Module):
    """Maps captions, int64 tokens (b, l) padded on the right, to vectors (b, dim)."""

    dim: int
    pad_id: int


class GruTrunk(TextTrunk):
    """Word vectors and a GRU; the state after a caption's last token is its vector.

    The text encoder of VSE++ (https://arxiv.org/abs/1707.05612) and of ConVSE
    (https://arxiv.org/abs/2110.08872), with dropout on the word vectors and between layers.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        pad_id: int,
        word_dim: int,
        width: int,
        depth: int,
        dropout: float,
        grad_checkpointing: bool,
    ) -> None:
        """Build it with random weights; word vectors start uniform in +-0.1 as in VSE++."""
        super().__init__()
        self.dim = width
        self.pad_id = pad_id
        self.grad_checkpointing = grad_checkpointing
        self.words = nn.Embedding(vocab_size, word_dim)
        self.drop = nn.Dropout(dropout)
        between = dropout if depth > 1 else 0.0
        self.gru = nn.GRU(word_dim, width, depth, batch_first=True, dropout=between)
        nn.init.uniform_(self.words.weight, -0.1, 0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (b, w) for int64 tokens (b, l), padded on the right."""
        states = _maybe_checkpoint(self.grad_checkpointing, self._states, tokens)  # (b, l, w)
        last = (tokens != self.pad_id).sum(1) - 1  # (b,)
        return states[torch.arange(len(tokens), device=tokens.device), last]

    def _states(self, tokens: Tensor) -> Tensor:
        # The state at a token knows nothing of what follows, so no packing is needed.
        words = self.drop(self.words(tokens))
        with float32_rnn(words):
            states: Tensor = self.gru(words)[0]
        return states


class Block(nn.Module):
    """A pre-norm transformer block (https://arxiv.org/abs/2002.04745)."""

    def __init__(self, width: int, dropout: float) -> None:
        """Build it with heads of 64 and an MLP four times the width."""
        super().__init__()
        self.dropout = dropout
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return (b, l, w) for x (b, l, w); mask (b, 1, 1, l) is true at tokens."""
        b, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(b, length, 3, -1, HEAD_WIDTH)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (b, heads, l, 64) each
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        x = x + self.drop(self.proj(attended.transpose(1, 2).reshape(b, length, width)))
        output: Tensor = x + self.drop(self.mlp(self.norm_mlp(x)))
        return output


class TransformerTrunk(TextTrunk):
    """A small transformer from scratch: learned positions, pre-norm blocks, mean over tokens."""

    def __init__(
        self,
        *,
        vocab_size: int,
        pad_id: int,
        max_tokens: int,
        width: int,
        depth: int,
        dropout: float,
        grad_checkpointing: bool,
    ) -> None:
        """Build it with random weights: normal, 0.02, and 0.02 / sqrt(2 depth) into the residual.

        The scale of GPT-2, which keeps the residual stream's size from growing with depth.
        """
        super().__init__()
        self.dim = width
        self.pad_id = pad_id
        self.grad_checkpointing = grad_checkpointing
        self.words = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(max_tokens, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                into_residual = name.endswith(("proj.weight", "mlp.3.weight"))
                std = 0.02 / (2 * depth) ** 0.5 if into_residual else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (b, w) for int64 tokens (b, l), padded on the right."""
        valid = tokens != self.pad_id  # (b, l)
        positions = torch.arange(tokens.shape[1], device=tokens.device)  # (l,)
        x = self.drop(self.words(tokens) + self.positions(positions))  # (b, l, w)
        for block in self.blocks:
            x = _maybe_checkpoint(self.grad_checkpointing, block, x, valid[:, None, None])
        return masked_mean(self.norm(x), valid)


class PretrainedTrunk(TextTrunk):
    """A transformers encoder; the mean of its last hidden states is a caption's vector.

    The pooling of Sentence-BERT (https://arxiv.org/abs/1908.10084); `cls` takes the first one's.
    """

    def __init__(self, encoder: nn.Module, *, dim: int, pad_id: int, pooling: str = "mean") -> None:
        """Wrap an encoder whose last hidden states are (b, l, dim)."""
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.dim = dim
        self.pad_id = pad_id

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (b, w) for int64 tokens (b, l), padded on the right."""
        valid = tokens != self.pad_id  # (b, l)
        output = self.encoder(input_ids=tokens, attention_mask=valid.long())
        if self.pooling == "cls":
            return at_least_float32(output.last_hidden_state[:, 0])
        return masked_mean(output.last_hidden_state, valid)


def masked_mean(states: Tensor, valid: Tensor) -> Tensor:
    """Return the float32 mean (b, w) of the states (b, l, w) where valid (b, l) is true.

    States of float64 keep their precision.
    """
    states = at_least_float32(states)
    weights = valid.unsqueeze(-1).to(states.dtype)  # (b, l, 1)
    return (states * weights).sum(1) / weights.sum(1)


Builder = Callable[[TextConfig, Vocabulary, bool], TextTrunk]


def build_text_trunk(
    config: TextConfig, vocabulary: Vocabulary, *, grad_checkpointing: bool
) -> TextTrunk:
    """Build the trunk of `config.kind`; its features are (b, trunk.dim).

    A builder is given the config, the vocabulary, and whether to recompute activations in
    backward. Raises UserError if a pretrained model does not load or does not fit its tokenizer.
    """
    build: Builder = import_builder(config.spec.builder)
    return build(config, vocabulary, grad_checkpointing)


def build_gru(config: TextConfig, vocabulary: Vocabulary, grad_checkpointing: bool) -> GruTrunk:
    """Build the paper's text encoder with random weights."""
    return GruTrunk(
        vocab_size=vocabulary.vocab_size,
        pad_id=vocabulary.pad_id,
        word_dim=config.word_dim,
        width=config.width,
        depth=config.depth,
        dropout=config.dropout,
        grad_checkpointing=grad_checkpointing,
    )


def build_transformer(
    config: TextConfig, vocabulary: Vocabulary, grad_checkpointing: bool
) -> TransformerTrunk:
    """Build the small transformer with random weights."""
    return TransformerTrunk(
        vocab_size=vocabulary.vocab_size,
        pad_id=vocabulary.pad_id,
        max_tokens=config.max_tokens,
        width=config.width,
        depth=config.depth,
        dropout=config.dropout,
        grad_checkpointing=grad_checkpointing,
    )


def build_pretrained(
    config: TextConfig, vocabulary: Vocabulary, grad_checkpointing: bool
) -> PretrainedTrunk:
    """Load a transformers model from its folder.

    Raises UserError if it does not load or does not fit its tokenizer.
    """
    folder = str(config.weights)
    encoder = load_encoder(folder, config.dropout)
    pooling = read_pooling(folder)
    if pooling != "mean":
        logger.info("%s: its vectors are those of the first token, as 1_Pooling states", folder)
    for name, limit, needed, remedy in (
        (
            "number of positions",
            max_positions(encoder),
            config.max_tokens,
            "lower model.text.max_tokens",
        ),
        (
            "vocab_size",
            getattr(encoder.config, "vocab_size", None),
            vocabulary.vocab_size,
            "save the model together with its own tokenizer",
        ),
    ):
        if limit is not None and needed > limit:
            raise UserError(f"{folder}: its {name} is {limit}, but {needed} are needed; {remedy}")
    if grad_checkpointing:
        enable_checkpointing(encoder, folder)
    dim = encoder_dim(encoder, folder)
    return PretrainedTrunk(encoder, dim=dim, pad_id=vocabulary.pad_id, pooling=pooling)


def _maybe_checkpoint(enabled: bool, fn: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Call `fn`; when enabled, keep no activations and compute them again in backward."""
    if not (enabled and torch.is_grad_enabled()):
        return fn(*args)
    output: Tensor = checkpoint(fn, *args, use_reentrant=False)
    return output
