"""Training: `accelerate launch -m dist_vse.train CONFIG [key=value ...]`.

The launcher only starts the processes; the engine is driven directly.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dist_vse.common.extras import needs_train, run_module

if __name__ == "__main__":  # before the imports below, which need the extra `train`
    sys.exit(run_module("dist_vse.train"))

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.common import signals, step_timer
from dist_vse.common.errors import UserError
from dist_vse.common.log import logger, setup_logging
from dist_vse.config import TrainConfig, flat_config, load_config
from dist_vse.config.evaluation import VAL_LOSS, score_of
from dist_vse.data.samples import Batch
from dist_vse.data.teacher import with_teacher
from dist_vse.distributed import watchdog
from dist_vse.evaluation.batches import build_eval_batches
from dist_vse.evaluation.evaluate import evaluate
from dist_vse.evaluation.examples import save_examples
from dist_vse.evaluation.sets import EvalSet, evaluate_sets, open_eval_sets
from dist_vse.evaluation.val_loss import validation_loss
from dist_vse.losses.global_loss import LossOutput
from dist_vse.models.dual_encoder import average_statistics
from dist_vse.models.image import set_training_input
from dist_vse.runs import checkpoint
from dist_vse.runs.checkpoint import Progress
from dist_vse.runs.environment import record_environment, shards_state, verify_shards
from dist_vse.runs.files import CHECKPOINTS, EXAMPLES_NAME, SKIPPED_NAME, TRACE_NAME
from dist_vse.runs.metrics import (
    Recorder,
    device_hint,
    log_line,
    peak_memory_gib,
    progress_bar,
)
from dist_vse.runs.saver import Saver
from dist_vse.runs.skipped import SkippedLog
from dist_vse.training.batch_report import reported_step
from dist_vse.training.batches import build_train_batches
from dist_vse.training.build_engine import launcher_conflicts
from dist_vse.training.chunks import make_chunks
from dist_vse.training.collapse import CollapseWatch
from dist_vse.training.early_stop import read_early_stop
from dist_vse.training.grad_cache import train_step
from dist_vse.training.kernel_check import compile_meanwhile
from dist_vse.training.profiler import profiled
from dist_vse.training.schedule import learning_rate
from dist_vse.training.setup import Run, set_up
from dist_vse.training.step_loss import build_loss

INTERRUPTED = 130
"""Exit code of a run that was asked to stop, saved a checkpoint, and can be continued."""


def run(config: TrainConfig) -> int:
    """Train from the newest checkpoint (or from nothing) to `total_steps`; return the exit code.

    Every rank of a process group calls this. Raises UserError alike on every rank, LostRankError
    where another rank has died.
    """
    try:
        return _run(config)
    except RuntimeError as error:
        if not distributed.is_lost_rank(error):
            raise
        found = checkpoint.steps(Path(config.output_dir) / CHECKPOINTS)
        step = int(found[-1].name.split("-")[1]) if found else 0
        raise distributed.LostRankError(
            f"another rank is gone or does not answer (its own log says why); start again: "
            f"{config.output_dir} continues at step {step}"
        ) from error


def _run(config: TrainConfig) -> int:
    signals.listen()
    torch.manual_seed(config.seed + 1000 * distributed.rank())  # dropout differs between ranks
    run = set_up(config)
    config = run.config  # with all that was left to be found
    with distributed.raise_on_all_ranks():
        sets = open_eval_sets(config)
    progress = checkpoint.load_latest(run.run_dir / CHECKPOINTS, run.engine)
    if progress is None:
        progress = Progress(0, 0, [])
    elif progress.step >= config.total_steps:
        logger.info("%s is complete: %d steps", run.run_dir, progress.step)
        return 0
    else:
        logger.info("resuming %s at step %d", run.run_dir, progress.step)
    indexes = (run.index, *(a_set.index for a_set in run.train_sets))
    data = {str(index.root): index.fingerprint() for index in indexes}
    with distributed.raise_on_all_ranks():
        for index in indexes if config.resume.verify_shards else ():
            verify_shards(index)
    shards = {str(index.root): shards_state(index) for index in indexes}
    with run.exclusive_write():
        loss = {"name": run.config.loss.name, "kernels": run.kernels, "reason": run.kernels_reason}
        allow = config.resume.allow
        record_environment(run.run_dir, progress.step, data, loss, shards=shards, allow=allow)
    trace = run.run_dir / TRACE_NAME if config.profile else None
    watching = watchdog.watching(watchdog.limit_s())
    with watching, step_timer.listening(run.meter.clock), profiled(trace) as traced:
        progress, ended = _train(run, sets, progress, traced)
    if ended or progress.step == config.total_steps:
        return 0
    logger.info("stopped at step %d and saved: the same command continues", progress.step)
    return INTERRUPTED


def _train(
    run: Run, sets: list[EvalSet], progress: Progress, traced: Callable[[], None]
) -> tuple[Progress, bool]:
    """Loop over the steps until the last one or any rank's wish to stop; each ends in `traced`.

    Return where the run stands, and whether its patience ended it.
    """
    config, engine, meter = run.config, run.engine, run.meter
    saver = Saver(
        run.run_dir / CHECKPOINTS,
        run.lease,
        keep_last=config.keep_checkpoints,
        keep_best=config.keep_best,
        minutes=config.checkpoint_minutes,
    )
    recorder = Recorder(
        run.run_dir,
        progress.step,
        trackers=config.trackers,
        project=config.project,
        settings=flat_config(config),
    )
    skipped_log = SkippedLog(
        run.run_dir / SKIPPED_NAME,
        progress.step,
        share=config.data.max_bad,
        per_epoch=sum(a_set.per_epoch for a_set in run.train_sets),
    )
    batches = build_train_batches(config, run.train_sets, run.tokenizer, progress)
    batches = with_teacher(batches, run.teacher)
    if run.kernels == "fused":
        batches = compile_meanwhile(batches, config)
    early_stop = read_early_stop(run.run_dir, config.best_metric, config.patience)
    collapse = CollapseWatch(config.loss, config.horizon)
    if progress.step == 0:
        early_stop.add(_evaluate(run, sets, progress, recorder))
    meter.reset()
    bar = progress_bar(config.total_steps, progress.step)
    stopped = False
    while progress.step < config.total_steps and not stopped and not early_stop.ends:
        step_timer.begin("data")
        with distributed.raise_on_all_ranks():
            batch = next(batches)
        step_timer.begin("encode")
        rate = learning_rate(progress.samples_seen, config.optim, total_samples=config.horizon)
        engine.set_learning_rate(rate)
        last = progress.step + 1 == config.total_steps
        log = last or (progress.step + 1) % config.log_every == 0
        if log:
            engine.norms.start()
        output, reported = _step(run, batch, progress, report=log and config.batch_report)

        progress = _advance(progress, batch, config.global_batch_size)
        engine.update_average(progress.samples_seen, config.global_batch_size)
        watchdog.progress()
        skipped_log.add(progress.step, batch.skipped)
        meter.add(config.global_batch_size, batch.num_negatives)
        traced()
        bar.update()
        flags = distributed.any_rank_each((signals.asked(), saver.writing, saver.overdue))
        stopped, writing, overdue = flags
        saver.settle(writing=writing)
        save = last or stopped or overdue or config.saves_after(progress.step)
        if save or log:
            _flush(run, skipped_log)
        if log:
            numbers: dict[str, Tensor | float] = {
                **output.stats,
                **engine.step_norms(),
                **reported,
                "loss": output.loss,
                "lr": rate,
            }
            _log(run, progress, numbers, recorder)
            if warning := collapse.look(numbers, progress.samples_seen):
                logger.warning(warning)
        score = None
        # Who was asked to stop saves first: the time that is left may be short.
        if last or (_due(progress.step, config.eval_every) and not stopped):
            score = _evaluate(run, sets, progress, recorder)
            early_stop.add(score)
            meter.reset()
        if save or early_stop.ends:
            _save(run, saver, progress, score)
            meter.reset()
    watchdog.progress()
    saver.finish()
    bar.close()
    recorder.close()
    if early_stop.ends:
        logger.info(
            "ended at step %d: %d evaluations without a better %s",
            *(progress.step, config.patience, config.best_metric),
        )
    return progress, early_stop.ends


def _step(
    run: Run, batch: Batch, progress: Progress, *, report: bool
) -> tuple[LossOutput, dict[str, float]]:
    """Take a batch's step; return its loss and, with `report`, what a larger batch is worth."""
    config, engine, image = run.config, run.engine, run.config.model.image
    if image.size_schedule or image.patch_drop:
        of_run = progress.samples_seen / config.horizon
        set_training_input(engine.module, *image.input_at(of_run))
    loss = build_loss(config, batch, progress.samples_seen)
    chunks = make_chunks(engine.module, batch, config, run.features)
    kept = run.keep_graphs
    if report:
        return reported_step(engine, loss, chunks, keep_graphs=kept, seed=progress.step)
    return train_step(engine, loss, chunks, keep_graphs=kept), {}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _advance(progress: Progress, batch: Batch, global_batch_size: int) -> Progress:
    for skipped in batch.skipped:
        logger.warning("skipped %s", skipped)
    samples_seen = progress.samples_seen + global_batch_size
    return Progress(progress.step + 1, samples_seen, batch.state.tolist())


def _save(run: Run, saver: Saver, progress: Progress, score: float | None) -> None:
    """Begin a checkpoint; the streams of all ranks, in order, are the data's position."""
    average_statistics(run.engine.module)
    watchdog.progress()
    streams = [
        stream for streams in distributed.all_gather_object(progress.streams) for stream in streams
    ]
    saver.start(run.engine, replace(progress, streams=streams), score=score)


def _flush(run: Run, skipped_log: SkippedLog) -> None:
    run.check_lease()
    skipped_log.flush()


def _log(
    run: Run, progress: Progress, statistics: dict[str, Tensor | float], recorder: Recorder
) -> None:
    values: dict[str, float | int | str] = {"samples_seen": progress.samples_seen}
    values |= {name: float(number) for name, number in statistics.items()}
    rates = run.meter.rates()
    values |= {**rates, "memory_gib": peak_memory_gib()}
    if not run.meter.hinted and (hint := device_hint(rates)):
        run.meter.hinted = True
        logger.info(hint)
    if (scale := run.engine.loss_scale) is not None:
        values |= {"loss_scale": scale.value, "skipped_steps": scale.skipped}
    with run.exclusive_write():
        recorder.write("train", progress.step, values)
    log_line(progress.step, run.config.total_steps, values)
    run.meter.reset()


def _evaluate(run: Run, sets: list[EvalSet], progress: Progress, recorder: Recorder) -> float:
    """Measure and record retrieval and the further sets; return the score.

    Of the averaged weights, if there are.
    """
    split = run.config.data.eval_split
    batches = build_eval_batches(run.config, run.index, run.tokenizer, split)
    average_statistics(run.engine.module)
    with run.engine.evaluation_weights() as model:
        evaluation = evaluate(
            model,
            watchdog.each(batches),
            distributed.device(),
            precision=run.config.engine.precision,
        )
        watchdog.progress()
        metrics = evaluation.metrics | evaluate_sets(model, sets, run.config, run.tokenizer)
        if run.config.eval_loss:
            loss = validation_loss(model, evaluation.split, run.config, progress.samples_seen)
            metrics[VAL_LOSS] = loss
    watchdog.progress()
    values: dict[str, float | int | str] = {"samples_seen": progress.samples_seen, "split": split}
    with run.exclusive_write():
        recorder.write("eval", progress.step, {**values, **metrics})
        save_examples(evaluation, run.run_dir / EXAMPLES_NAME, split=split)
    logger.info(
        "%s: image to text R@1 %.1f %%, text to image R@1 %.1f %%, rsum %.1f",
        f"step {progress.step}, {split}",
        metrics["i2t_r1"],
        metrics["t2i_r1"],
        metrics["rsum"],
    )
    score = score_of(run.config.best_metric, metrics)
    assert score is not None, run.config.best_metric
    return score


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and train; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # The deepspeed launcher adds this one; the environment says it too.
    arguments = [a for a in arguments if not a.startswith("--local_rank=")]
    setup_logging()
    if not arguments:
        logger.error("error: no config given: python -m dist_vse.train CONFIG.yaml [key=value ...]")
        return 2
    try:
        with distributed.process_group():
            return _run_alike(arguments[0], arguments[1:])
    except UserError as error:  # there is no group
        logger.error("error: %s", error)
        return 2
    except distributed.LostRankError as error:
        logger.error("error: %s", error)
        return 1


def _run_alike(config_path: str, overrides: Sequence[str]) -> int:
    """Train by a config that one rank or another may find wrong; all return the same code."""
    try:
        with distributed.raise_on_all_ranks(), needs_train("training"):
            config = load_config(config_path, overrides)
            contradictions = launcher_conflicts(config, os.environ)
        for contradiction in contradictions:
            logger.info(contradiction)
        with needs_train("training"):
            return run(config)
    except UserError as error:  # alike on every rank
        if distributed.is_main_process():
            logger.error("error: %s", error)
        # A launcher ends all ranks when the first one ends: let rank 0 speak before.
        distributed.barrier()
        return 2
