"""An evaluation from end to end: train the head of every seed, score what came out, write it down.

Training is an ordinary run of `trainer.start`, under any engine; it resumes, so an evaluation that was stopped goes on and one that had
ended is only scored again. Under a launcher all ranks train and the first one scores, one seed a launch.
"""

import logging
from collections.abc import Sequence

from trainer.config.run import RunConfig
from trainer.errors import ConfigError
from trainer.evaluation.planning import ChosenEncoder
from trainer.evaluation.protocol import PROTOCOLS, Mode, TaskName
from trainer.evaluation.report import Evaluation, SeedResult, write_evaluation
from trainer.evaluation.scoring import ScoredRun, score_run
from trainer.parallel.launch import Launch
from trainer.start import start
from trainer.store.open import open_store

log = logging.getLogger(__name__)


def evaluate(
    task: TaskName,
    chosen: ChosenEncoder,
    mode: Mode,
    configs: Sequence[RunConfig],
    launch: Launch,
    *,
    out: str,
    clips: int,
    job: str | None = None,
) -> Evaluation | None:
    """Train and score `configs`, which differ by their seeds; the answer is the first rank's alone."""
    if launch.world_size > 1 and len(configs) > 1:
        raise ConfigError(
            f"{len(configs)} seeds were asked for under a launcher, which joins its ranks once; train them one by one with --seed, "
            "then give the same command all seeds without a launcher: runs that have ended are only scored"
        )
    for config in configs:
        start(config, launch, resume=True, job=job)
    if not launch.is_main:
        return None
    scored = [score_run(config, task, clips=clips, device=launch.device) for config in configs]
    evaluation = _join(task, chosen, mode, configs, scored)
    write_evaluation(evaluation, open_store(out, configs[0].store))
    log.info("%s of %s is written to %s", task, chosen.name, out)
    return evaluation


def _join(
    task: TaskName, chosen: ChosenEncoder, mode: Mode, configs: Sequence[RunConfig], scored: Sequence[ScoredRun]
) -> Evaluation:
    results = [SeedResult(config.seed, config.run.uri, of_seed.figures) for config, of_seed in zip(configs, scored, strict=True)]
    return Evaluation(
        task=task,
        encoder=chosen.name,
        uri=chosen.uri,
        mode=mode,
        steps=configs[0].steps,
        global_batch=configs[0].global_batch,
        clips=scored[0].clips,
        trivial=PROTOCOLS[task].trivial,
        trivial_figures=scored[0].trivial,
        seeds=results,
    )
