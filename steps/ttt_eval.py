"""Score the quantized model on the validation documents with score-first test-time training."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from model.evaluation.score import TTT, Score
from model.runtime.process import seconds_since_start
from model.ttt.loop import ttt_losses
from model.ttt.warmup import warm_up_kernels
from steps.common import StageRun, run
from steps.token_losses import Evaluation

KEYS = ("evaluate.documents", "evaluate.offset", "ttt", "ops")


def main(stage: StageRun) -> None:
    """Score, and publish losses and metrics."""
    job = Evaluation(stage, KEYS)
    params, execution, group = stage.params.ttt, stage.params.execution, stage.group
    warm_up_kernels(job.model, job.documents, params, execution)
    stage.log.event("warm", startup_seconds=seconds_since_start(group.device))
    job.score(TTT, partial(ttt_losses, job.model, job.documents, params, execution, group))

    def metrics(scores: Mapping[str, Score]) -> dict[str, Any]:
        score = scores[TTT]
        rate = score.tokens / job.seconds[TTT]
        return {"loss": score.loss, "bpb": score.bpb, "tokens_per_second": rate}

    job.publish(metrics)


if __name__ == "__main__":
    run("ttt_eval", main)
