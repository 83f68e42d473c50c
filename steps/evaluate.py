"""Score the quantized model on the validation documents without adaptation: plain and sliding.

What each token spells is written, too, for the report.
"""

import json
from collections.abc import Mapping
from typing import Any

from model.evaluation.losses import plain_losses, sliding_losses
from model.evaluation.score import WITHOUT_ADAPTATION, Score
from model.runtime.progress import ReportProgress
from steps.common import StageRun, run
from steps.token_losses import Evaluation, Losses

KEYS = ("evaluate", "ops.attention", "ops.residual_norm")


def main(stage: StageRun) -> None:
    """Score, and publish losses and metrics."""
    job = Evaluation(stage, KEYS)
    stride, tokens = stage.params.evaluate.sliding_stride, stage.params.execution.evaluation_tokens
    given = (job.model, job.documents)

    def plain(report: ReportProgress | None) -> Losses:
        return plain_losses(*given, tokens, stage.group, report)

    def sliding(report: ReportProgress | None) -> Losses:
        return sliding_losses(*given, stride, tokens, stage.group, report)

    for name, evaluate in zip(WITHOUT_ADAPTATION, (plain, sliding), strict=True):
        job.score(name, evaluate)
    pieces = [piece.hex() for piece in job.tokenizer.spelled]
    job.publish(metrics, {"pieces.json": json.dumps(pieces).encode()})


def metrics(scores: Mapping[str, Score]) -> dict[str, Any]:
    """Loss and bits per byte of each way of scoring."""
    return {name: {"loss": score.loss, "bpb": score.bpb} for name, score in scores.items()}


if __name__ == "__main__":
    run("evaluate", main)
