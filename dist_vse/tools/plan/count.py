"""Looks at a config's real model without computing anything: operations, activations, parameters.

The model runs on tensors that have shapes and no memory (PyTorch's FakeTensorMode), so the largest
model takes seconds. What is counted there is what the CPU's operators would do and hold; the
operations are those of any device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from dist_vse.common.memory import TensorMemoryTracker
from dist_vse.config import LoraConfig, TrainConfig
from dist_vse.engine.gradient_reduction import BUCKET
from dist_vse.engine.zero import PERSISTENT
from dist_vse.models.build import build_model
from dist_vse.models.dual_encoder import DualEncoder, made_up_images, made_up_pairs
from dist_vse.models.lora import add_adapters
from dist_vse.models.precision import autocast
from dist_vse.models.tokenizer import AnyWords, build_tokenizer
from dist_vse.tools.plan.work import FP32, Line, Ops, Work

FEW, MORE = 4, 12  # pairs; what grows between them grows with every pair
CPU = torch.device("cpu")


def model_key(config: TrainConfig) -> str:
    """Name all that the speed of the encoders depends on."""
    model = config.model
    image, text = model.image, model.text
    parts = [
        f"vectors {image.size}" if image.reads_vectors else f"{image.name} {image.size} px",
        f"{text.weights or f'{text.kind} {text.width} x {text.depth}'} {text.max_tokens} tokens",
        f"{model.embed_dim} dimensions",
        f"head {model.head_hidden}" if model.head_hidden else "",
        _frozen("image", image.frozen, image.unlocked),
        _frozen("text", text.frozen, text.unlocked),
        f"adapters {model.lora.rank}" if model.lora.rank else "",
        "checkpointing" if model.grad_checkpointing else "",
        "compiled" if model.compile else "",
        f"{config.data.negatives} negatives" if config.data.negatives else "",
        config.engine.precision,
    ]
    return ", ".join(part for part in parts if part)


def _frozen(tower: str, frozen: bool, unlocked: int) -> str:
    return f"{tower} frozen{f' but {unlocked}' if unlocked else ''}" if frozen else ""


def build_for_plan(config: TrainConfig, vocabulary: int, device: str) -> DualEncoder:
    """Build the config's model with random weights (a pretrained text encoder with its own)."""
    text, pad = config.model.text, 0
    if text.spec.tokenizer:
        tokenizer = build_tokenizer(text, list, None)
        vocabulary, pad, device = tokenizer.vocab_size, tokenizer.pad_id, "cpu"
    image = replace(config.model.image, weights=None)
    shape = replace(config.model, image=image, compile=False, lora=LoraConfig())
    with torch.device(device):
        model = build_model(shape, config.loss, AnyWords(vocabulary, pad), seed=config.seed)
        if config.model.lora.rank:
            add_adapters(model, config.model, seed=config.seed)
    return model


def count_work(config: TrainConfig, *, vocabulary: int) -> Work:
    """Return what a pair asks of the config's model, with all negatives that it may bring.

    `vocabulary` is the number of words where the text encoder starts from scratch. Raises
    UserError for a model that cannot be built.
    """
    model = build_for_plan(config, vocabulary, "meta")
    shape = config.model.image.size, config.model.text.max_tokens, config.data.negatives
    precision = config.engine.precision
    trained = [p for p in model.parameters() if p.requires_grad]
    whole, learns = [p.numel() for p in model.parameters()], [p.numel() for p in trained]
    with FakeTensorMode() as fake:
        _make_fake(model, fake)
        few, more = (_run(model, rows, shape, precision=precision) for rows in (FEW, MORE))
    ends = few.ops, more.ops
    trainable = sum(learns)
    frozen, forward, backward = (_per_pair(a, b) for a, b in zip(*ends, strict=True))
    lines = [_line(a, b) for a, b in zip(few.peaks, more.peaks, strict=True)]
    held, forward_peak, graph_peak, backward_peak = lines
    return Work(
        model=model_key(config),
        precision=config.engine.precision,
        embed_dim=config.model.embed_dim,
        trainable=trainable,
        frozen=sum(whole) - trainable,
        persistent=sum(n for n in whole if n < PERSISTENT),
        lowered=sum(p.numel() for p in _lowered(model)),
        gathers=sum(n >= PERSISTENT for n in whole),
        largest=max(learns, default=0),
        last=min(trainable, max(BUCKET, learns[0] if learns else 0)),
        buckets=sum(n >= BUCKET for n in learns)
        + -(-sum(n for n in learns if n < BUCKET) // BUCKET),
        forward=forward,
        backward=backward,
        frozen_forward=frozen,
        held=held,
        forward_peak=forward_peak,
        graph_peak=graph_peak,
        backward_peak=replace(
            backward_peak, fixed=max(0.0, backward_peak.fixed - FP32 * trainable)
        ),
        input_bytes=made_up_images(model.image.trunk, 1, shape[0]).nbytes
        + 8 * shape[1] * (1 + shape[2]),
        hidden_bytes=(more.hidden - few.hidden) / (MORE - FEW),
    )


class _Counted(NamedTuple):
    ops: tuple[Ops, Ops, Ops]  # of frozen trunks, forward, backward; of all pairs together
    peaks: tuple[int, int, int, int]  # bytes; see Work
    hidden: int


def _run(model: DualEncoder, rows: int, shape: tuple[int, int, int], *, precision: str) -> _Counted:
    """Run pairs of this shape: pixels, tokens, negatives."""
    size, length, negatives = shape
    raw = made_up_pairs(model, rows, image_size=size, num_tokens=length, negatives=negatives)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def outputs(inputs: dict[str, Tensor]) -> Tensor:
        with autocast(CPU, precision):
            made: tuple[Tensor, ...] = model(**inputs)
        return torch.stack([output.sum() for output in made]).sum()

    with _counting() as (frozen, prepared), autocast(CPU, precision):
        inputs = model.prepare(**raw)
    hidden = sum(x.nbytes for x in inputs.values() if x.is_floating_point())  # no pixels, tokens
    with torch.no_grad(), _counting() as (_, plain):
        outputs(inputs)
    with _counting() as (forward, graph):
        total = outputs(inputs)
    held = graph.held
    with _counting() as (backward, gradients):
        torch.autograd.grad(total, parameters, allow_unused=True)
    del prepared
    ops = frozen.ops(), forward.ops(), backward.ops()
    return _Counted(ops, (held, plain.peak, graph.peak, gradients.peak), hidden)


class _Tally(TorchDispatchMode):
    """Counts operators, and the bytes that those read and write which are no products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0
        self.moved = 0
        self.flops = FlopCounterMode(display=False)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_iter(result) if isinstance(x, Tensor)]
        seen = {x.untyped_storage()._cdata for x in given}
        views = all(x.untyped_storage()._cdata in seen for x in made)
        if made and (not views or func._schema.is_mutable):
            self.calls += 1
            if func._overloadpacket not in self.flops.flop_registry:
                self.moved += sum(x.numel() * x.element_size() for x in (*given, *made))
        return result

    def ops(self) -> Ops:
        """Return what was counted, of all pairs together."""
        counts = self.flops.get_flop_counts().get("Global", {})
        conv = sum(n for op, n in counts.items() if "convolution" in str(op))
        return Ops(sum(counts.values()) - conv, conv, self.moved, self.calls)


@contextmanager
def _counting() -> Iterator[tuple[_Tally, TensorMemoryTracker]]:
    tally = _Tally()
    with TensorMemoryTracker() as storages, tally.flops, tally:
        yield tally, storages


def _per_pair(few: Ops, more: Ops) -> Ops:
    pairs = MORE - FEW
    return Ops(
        (more.matmul_flops - few.matmul_flops) / pairs,
        (more.conv_flops - few.conv_flops) / pairs,
        (more.moved_bytes - few.moved_bytes) / pairs,
        more.calls,
    )


def _line(few: float, more: float) -> Line:
    slope = (more - few) / (MORE - FEW)
    return Line(max(0.0, few - slope * FEW), slope)


def _lowered(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield what DeepSpeed's autocast turns into bfloat16 to send it."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            yield from (p for p in module.parameters(recurse=False) if p.requires_grad)


def _make_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    """Give every parameter and buffer the CPU's shape of itself, without memory."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = _empty_like(parameter)
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, _empty_like(buffer))


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="cpu")
