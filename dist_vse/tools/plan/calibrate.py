"""Measures this machine for plans: products, copies, messages, and a model's chunks (gloo, CPU).

One process alone, as many together as there are cores, and twice as many, so that what they share
is in the numbers. The faster of two series counts: what else the machine does is not its speed.
"""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.common.files import atomic_output
from dist_vse.common.step_timer import OTHER, Clock, begin, listening
from dist_vse.common.units import GIB
from dist_vse.config import TrainConfig
from dist_vse.distributed.spawn import run_on_ranks
from dist_vse.engine.zero import ZeroEngine
from dist_vse.losses.global_loss import global_loss
from dist_vse.losses.options import LossOptions
from dist_vse.models.dual_encoder import DualEncoder, frozen_statistics, made_up_pairs
from dist_vse.models.precision import autocast
from dist_vse.tools.plan.count import build_for_plan, model_key
from dist_vse.tools.plan.hardware import ChunkSpeed, Hardware, LinkConfig

GB, TERA = 1e9, 1e12
SMALL, LARGE = 1 << 10, 1 << 24  # bytes of messages
LOSS_ROWS = 2048


def calibrate(config: TrainConfig, *, vocabulary: int, rounds: int) -> Hardware:
    """Measure and return this machine, with the speed of the config's model."""
    cores = len(os.sched_getaffinity(0))
    alone = run_on_ranks(_measure, 1, config, vocabulary, rounds)
    full = run_on_ranks(_measure, cores, config, vocabulary, rounds) if cores > 1 else alone
    crowded = run_on_ranks(_measure_chunks, 2 * cores, config, vocabulary, rounds)
    pair = run_on_ranks(measure_link, 2, rounds)
    return Hardware(
        name=f"{cores} cores of this machine",
        ranks_per_node=1 << 20,
        cores=cores,
        memory_gib=psutil.virtual_memory().total / GIB,
        process_gib=full["process_gib"],
        conv_tflops=full["fp32"],
        fp32_tflops=full["fp32"],
        bf16_tflops=full["bf16"],
        attained_encoders=min(1.0, max(0.01, full["attained_encoders"])),
        attained_loss=min(1.0, full["attained_loss"]),
        memory_gb_per_s=full["memory_gb_per_s"],
        launch_us=full["launch_us"],
        optimizer_ns=full["optimizer_ns"],
        inside=LinkConfig(**pair),
        between=LinkConfig(**pair),
        chunks=[ChunkSpeed(**speed) for speed in (*alone["chunks"], *full["chunks"], *crowded)],
    )


def save_hardware(hardware: Hardware, path: Path, measured: str) -> None:
    """Write the file that plans read; `measured` becomes its first line."""
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(OmegaConf.create(_rounded(asdict(hardware))))
    with atomic_output(path) as temporary:
        temporary.write_text(f"# {measured}\n{text}", encoding="utf-8")


def fastest(work: Callable[[], Any], rounds: int) -> float:
    """Return the seconds of a call, in the faster of two series; all ranks work at once."""
    taken = []
    work()  # warms up
    for _ in range(2):
        _finish_work()
        distributed.barrier()
        started = time.perf_counter()
        for _ in range(rounds):
            work()
        _finish_work()
        taken.append((time.perf_counter() - started) / rounds)
    return float(distributed.all_reduce_mean(torch.tensor([min(taken)])))


def _measure(config: TrainConfig, vocabulary: int, rounds: int) -> dict[str, Any]:
    model = build_for_plan(config, vocabulary, "cpu").train()
    process_gib = (psutil.Process().memory_info().rss - _weights(model)) / GIB
    width = config.model.embed_dim
    rate = _products(width, torch.float32, rounds)
    chunks = _chunks(config, model, rounds)
    return {
        "process_gib": process_gib,
        "fp32": rate,
        "bf16": _products(width, torch.bfloat16, rounds),
        "attained_loss": _loss_rate(width, rounds) / rate,
        "attained_encoders": 0.5,
        "memory_gb_per_s": _copies(rounds),
        "launch_us": _launches(rounds),
        "optimizer_ns": _adam(rounds),
        "chunks": _with_hooks(config, model, chunks, rounds),  # last: ZeRO 3 takes the model apart
    }


def _measure_chunks(config: TrainConfig, vocabulary: int, rounds: int) -> list[dict[str, Any]]:
    return _chunks(config, build_for_plan(config, vocabulary, "cpu").train(), rounds)


def _weights(model: DualEncoder) -> int:
    return sum(p.nbytes for p in model.parameters())


def _products(width: int, dtype: torch.dtype, rounds: int) -> float:
    """Return 10^12 operations a second of products as the loss's tiles have them."""
    side = 1024
    left, right = torch.randn(side, width).to(dtype), torch.randn(width, side).to(dtype)
    out = torch.empty(side, side, dtype=dtype)
    taken = fastest(lambda: [torch.mm(left, right, out=out) for _ in range(4)], rounds)
    return 4 * 2 * side * side * width / taken / TERA


def _loss_rate(width: int, rounds: int) -> float:
    """Return 10^12 operations a second of the whole loss's four products."""
    rows = LOSS_ROWS // distributed.world_size()
    made = torch.nn.functional.normalize(torch.randn(2, rows, width), dim=2)
    features = [x.clone().requires_grad_() for x in made]
    ten, zero = torch.full((1,), 10.0).log(), torch.zeros(1)

    def loss() -> None:
        total = global_loss(
            "info_nce", features[0], features[1], ten, zero, LossOptions(memory_gib=0)
        ).loss
        torch.autograd.grad(total, features)

    return 4 * 2 * rows * LOSS_ROWS * width / fastest(loss, rounds) / TERA


def _copies(rounds: int) -> float:
    here, there = torch.zeros(1 << 24), torch.zeros(1 << 24)
    return 2 * here.nbytes / fastest(lambda: there.copy_(here), rounds) / GB


def _launches(rounds: int) -> float:
    x = torch.zeros(1)
    return fastest(lambda: [x.add_(1) for _ in range(1000)], rounds) * 1000


def _adam(rounds: int) -> float:
    """Return nanoseconds an element of a flat AdamW."""
    parameter = torch.nn.Parameter(torch.zeros(1 << 22))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW([parameter])
    return fastest(optimizer.step, rounds) / len(parameter) * 1e9


def _finish_work() -> None:
    """Wait for what a GPU still has to do."""
    if distributed.device().type == "cuda":
        torch.cuda.synchronize()


def measure_link(rounds: int) -> dict[str, float]:
    """Return the `LinkConfig` of the link between all ranks, from small and large messages."""
    here, size = distributed.device(), distributed.world_size()

    def seconds(collective: Callable[[Tensor], Any], num_bytes: int) -> float:
        x = torch.zeros(num_bytes // 4, device=here)
        return fastest(lambda: collective(x), rounds)

    def exchange(x: Tensor) -> None:
        rank = distributed.rank()
        distributed.AsyncSendRecv(
            x, torch.empty_like(x), destination=(rank + 1) % size, source=(rank - 1) % size
        ).wait()

    small = seconds(distributed.gather_rows, SMALL)
    copied = seconds(distributed.gather_rows, LARGE) - small
    added = seconds(distributed.all_reduce_sum, LARGE) - small
    swapped = seconds(exchange, LARGE) - small
    return {  # what a rank sends in each, in rings; of two ranks the whole of its message
        "alpha_us": small * 1e6,
        "copy_gb_per_s": (size - 1) * LARGE / max(copied, 1e-9) / GB,
        "reduce_gb_per_s": 2 * (size - 1) / size * LARGE / max(added, 1e-9) / GB,
        "pair_gb_per_s": LARGE / max(swapped, 1e-9) / GB,
    }


def _chunks(config: TrainConfig, model: DualEncoder, rounds: int) -> list[dict[str, Any]]:
    """Time the model's chunks: the config's size and a fourth, or some small ones for auto."""
    size = config.asked_chunk_size(on_gpu=False) or 32
    size = min(size, max(1, config.global_batch_size // distributed.world_size()))
    return [_chunk(config, model, rows, rounds) for rows in sorted({max(2, size // 4), size})]


def _chunk(config: TrainConfig, model: DualEncoder, rows: int, rounds: int) -> dict[str, Any]:
    raw = _raw(config, model, rows)
    cpu, precision = torch.device("cpu"), config.engine.precision

    def prepare() -> dict[str, Tensor]:
        with autocast(cpu, precision):
            return model.prepare(**raw)

    inputs = prepare()

    def forward() -> Tensor:
        with autocast(cpu, precision):
            outputs: tuple[Tensor, ...] = model(**inputs)
        return torch.stack([output.sum() for output in outputs]).sum()

    with frozen_statistics(model):
        with torch.no_grad():
            plain = fastest(forward, rounds)
        graph = fastest(forward, rounds)
        both = fastest(lambda: forward().backward(), rounds)  # adds to gradients, as a step does
    frozen = any(all(x is not y for y in raw.values()) for x in inputs.values())
    speed = ChunkSpeed(
        model=model_key(config),
        rows=rows,
        together=distributed.world_size(),
        forward_s=plain,
        graph_s=graph,
        backward_s=both - graph,
        frozen_s=fastest(prepare, rounds) if frozen else 0.0,
    )
    return asdict(replace(speed, backward_s=max(0.0, speed.backward_s)))


def _with_hooks(
    config: TrainConfig, model: DualEncoder, chunks: list[dict[str, Any]], rounds: int
) -> list[dict[str, Any]]:
    """Return the chunks with what ZeRO 3 adds to the smallest of them besides its messages."""
    plain = chunks[0]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    rows, stage_3 = plain["rows"], replace(config.engine, zero_stage=3, coalesce=True)
    engine = ZeroEngine(model, optimizer, stage_3, rank_batch_size=rows)
    inputs = model.prepare(**_raw(config, model, rows))
    taken = []
    for _ in range(2 + rounds):  # in the first it learns the order of the modules
        watch = Clock(distributed.device())
        with listening(watch), engine.accumulation():
            begin("encode")
            total = torch.stack([output.sum() for output in engine(**inputs)]).sum()
            begin("second_pass")
            engine.backward(total, last=True)
            begin(OTHER)
        engine.step()
        seconds = watch.read()
        taken.append((seconds["encode"], seconds["second_pass"]))
    forward, backward = (min(series) for series in zip(*taken, strict=True))
    hooks = {
        "hooks_forward_s": max(0.0, forward - plain["graph_s"]),
        "hooks_backward_s": max(0.0, backward - plain["backward_s"]),
    }
    return [chunk | hooks for chunk in chunks]


def _raw(config: TrainConfig, model: DualEncoder, rows: int) -> dict[str, Tensor]:
    """Return made-up images and texts."""
    size, words = config.model.image.size, config.model.text.max_tokens
    pairs = made_up_pairs(
        model, rows, image_size=size, num_tokens=words, negatives=config.data.negatives
    )
    return pairs | {"images": torch.randint_like(pairs["images"], 0, 256)}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
