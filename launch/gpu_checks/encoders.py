"""Checks 5 and 6: the second pass repeats the first, and nothing runs in float16 unasked."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.config import OptimConfig, TextConfig, TrainConfig
from dist_vse.config.sections import GRAPHS, PRECISIONS
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.engine.plain import PlainEngine
from dist_vse.launch.gpu_checks.finding import Finding, Task
from dist_vse.launch.gpu_checks.workload import build, made_up_batch, small_config
from dist_vse.models.precision import autocast
from dist_vse.training.chunks import make_chunks
from dist_vse.training.compile_warmup import replay_gap
from dist_vse.training.grad_cache import train_step
from dist_vse.training.replay_check import Replay, compare_passes
from dist_vse.training.step_loss import build_loss

KINDS = {
    "gru": TextConfig(kind="gru", width=64, depth=2, word_dim=32, max_tokens=8),
    "transformer": TextConfig(width=64, depth=2, max_tokens=8),
}
ON_CPU = (("fp32", False), ("bf16", True))  # precisions and checkpointing of gradients there
CHUNKS, ROWS = 4, 4  # of the step whose gradients are compared, and pairs a chunk
COMPILED_CLOSE = 1e-3  # relative: the passes have kernels of their own, which round differently
# Relative: GPUs add up in several orders.
GRADIENT_CLOSE = {"fp32": 1e-3, "tf32": 1e-3, "bf16": 1e-2}
LARGE_BATCHES = (32_768, 131_072)  # gradients are about one over these
MORE_ZEROS = 0.01  # share of a gradient's numbers that may vanish, beyond float32's


def check_replay(task: Task) -> Finding:
    """Encode chunks twice for every trunk kind, dropout, precision and checkpointing.

    Then a step whose chunks are all encoded twice, compared with one whose graphs are all kept.
    """
    errors: dict[str, float] = {}
    gradients: dict[str, float] = {}
    precisions = PRECISIONS if task.on_gpu else ("fp32", "bf16")
    for kind, dropout in itertools.product(KINDS, (0.0, 0.3)):
        config = _config(kind, dropout)
        for precision, checkpointing in itertools.product(precisions, (False, True)):
            name = f"{kind}, dropout {dropout}, {precision}{', checkpointing' * checkpointing}"
            errors[name] = _passes(config, precision, checkpointing=checkpointing).error
        of_gradients = itertools.product(GRADIENT_CLOSE, (False, True))
        for precision, checkpointing in of_gradients if task.on_gpu else ON_CPU:
            name = f"{kind}, dropout {dropout}, {precision}{', checkpointing' * checkpointing}"
            error = _gradient_error(_changed(config, precision, checkpointing=checkpointing))
            gradients[name] = error / GRADIENT_CLOSE[precision]
    compiled: dict[str, float] = task.warmed.get("compiled", {})
    wrong = [name for name, error in errors.items() if error != 0.0]
    wrong += [name for name, error in compiled.items() if not error < COMPILED_CLOSE]
    wrong += [f"gradient, {name}" for name, error in gradients.items() if not error < 1]
    figures = {"outputs": errors, "compiled": compiled, "gradients_of_tolerance": gradients}
    if wrong:
        return Finding(False, f"the passes differ: {'; '.join(wrong)}", figures)
    words = (
        f"the second pass differs by 0.0 in {len(errors)} cases; gradients of kept graphs and of "
        f"chunks encoded twice by {max(gradients.values()):.2g} of their tolerance"
    )
    return Finding(True, words, figures)


def _config(kind: str, dropout: float) -> TrainConfig:
    text = replace(KINDS[kind], dropout=dropout)
    return small_config(global_batch_size=CHUNKS * ROWS, chunk_size=ROWS, text=text)


def _changed(config: TrainConfig, precision: str, *, checkpointing: bool) -> TrainConfig:
    model = replace(config.model, grad_checkpointing=checkpointing)
    return replace(config, model=model, engine=replace(config.engine, precision=precision))


def _passes(config: TrainConfig, precision: str, *, checkpointing: bool) -> Replay:
    return compare_passes(
        build(_changed(config, precision, checkpointing=checkpointing)),
        image_size=config.model.image.size,
        num_tokens=config.model.text.max_tokens,
        precision=precision,
    )


def _gradient_error(config: TrainConfig) -> float:
    """Return by how much a step's gradient differs if its chunks are encoded twice."""
    kept, twice = (_gradient(config, keep_graphs=keep) for keep in (CHUNKS, 0))
    return float((kept - twice).norm() / kept.norm())


def _gradient(config: TrainConfig, *, keep_graphs: int) -> Tensor:
    """Return the movement of all parameters by a step of SGD, with equal draws in every call."""
    model = build(config)
    before = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(1)
    optim = OptimConfig(name="sgd", lr=1.0, weight_decay=0.0, momentum=0.0)
    precision = config.engine.precision
    engine = PlainEngine(model, build_optimizer(model, optim), precision=precision)
    batch = made_up_batch(config, CHUNKS * ROWS)
    chunks = make_chunks(model, batch, config)
    train_step(engine, build_loss(config, batch, 0), chunks, keep_graphs=keep_graphs)
    moved = zip(model.parameters(), before, strict=True)
    return torch.cat([(p.detach() - old).flatten() for p, old in moved])


def compile_trunks(task: Task) -> Finding:
    """Compile trunks, and compare their passes; check 5 judges what is found."""
    return Finding(True, "", {"compiled": _compiled_errors()})


def _compiled_errors() -> dict[str, float]:
    config = _config("transformer", 0.3)
    return {f"model.compile={how}": _compiled_error(config, how) for how in (True, GRAPHS)}


def _compiled_error(config: TrainConfig, how: bool | str) -> float:
    """Return how a compiled model's features with a graph differ from those without."""
    model = build(replace(config, model=replace(config.model, compile=how)))
    batch = made_up_batch(config, ROWS)
    here = distributed.device()
    inputs = {"images": batch.images.to(here), "tokens": batch.tokens.to(here)}

    def encode() -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = model(**model.prepare(**inputs))
        return outputs

    for _ in range(2):  # compiles, then records CUDA graphs
        replay_gap(model, encode)
    return replay_gap(model, encode)


def check_dtypes(task: Task) -> Finding:
    """Look for float16 under bfloat16, and for gradients that vanish in a large batch."""
    float16, vanished = {}, {}
    for kind in KINDS:
        config = _config(kind, 0.0)
        found = _passes(config, "bf16", checkpointing=False).in_float16
        if found is not None:
            float16[kind] = found
        for size in LARGE_BATCHES:
            plain, bf16 = (_zero_share(config, precision, size) for precision in ("fp32", "bf16"))
            vanished[f"{kind}, {size}"] = bf16 - plain
    worst = max(vanished.values())
    figures = {"float16": float16, "vanished": vanished}
    faults = [f"{name} runs in float16 under bf16" for name in float16.values()]
    if not worst < MORE_ZEROS:
        faults.append(f"{worst:.0%} of a gradient's numbers are 0 in bf16 that are not in fp32")
    words = (
        f"no float16 under bf16; in batches of up to {max(LARGE_BATCHES):,} pairs {worst:.1%} of "
        "gradients vanish beyond float32's"
    )
    return Finding(not faults, "; ".join(faults) or words, figures)


def _zero_share(config: TrainConfig, precision: str, global_batch: int) -> float:
    """Return the share of the text trunk's gradient that is 0 where features' is 1 / N."""
    model = build(config)
    here = distributed.device()
    batch = made_up_batch(config, CHUNKS * ROWS)
    with autocast(here, precision):
        features = model.encode_texts(batch.tokens.to(here))
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(features.shape, generator=generator).to(here) / global_batch
    weights = [p for p in _of_layers(model.text.trunk) if p.requires_grad]
    grads = torch.autograd.grad(features, weights, upstream, allow_unused=True)
    flat = torch.cat([grad.flatten() for grad in grads if grad is not None])
    return float((flat == 0).float().mean())


def _of_layers(trunk: torch.nn.Module) -> Iterator[Tensor]:
    """Yield weights but for embeddings, most of whose rows have no gradient."""
    for module in trunk.modules():
        if not isinstance(module, torch.nn.Embedding):
            yield from module.parameters(recurse=False)
