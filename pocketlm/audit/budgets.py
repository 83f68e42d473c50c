"""Bytes and clocks of one seed against the budgets, recounted from files and from logs."""

from pathlib import Path
from typing import Any

from model.evaluation.score import TTT, WITHOUT_ADAPTATION
from model.runtime.run_log import read_log
from pocketlm.audit.checks import Check


def byte_budget(artifact: Path, bundle: Path, metrics: dict[str, Any]) -> Check:
    """Artifact and bundle as they lie on disk; metrics: those of quantize."""
    model, code = artifact.stat().st_size, bundle.stat().st_size
    budget, reserve = metrics["budget_bytes"], metrics["code_reserve_bytes"]
    problems = []
    if model + code > budget:
        problems.append(f"{model + code - budget:,} bytes above the budget")
    if code > reserve:
        problems.append(f"the bundle is {code - reserve:,} bytes larger than what is reserved")
    if model != metrics["artifact_bytes"]:
        problems.append(f"details.json says {metrics['artifact_bytes']:,} bytes of the artifact")
    evidence = (
        f"{artifact.name} {model:,} + {bundle.name} {code:,} = {model + code:,} of {budget:,} "
        f"bytes; quantize.code_reserve_bytes is {reserve:,}"
    )
    return Check("bytes", evidence, tuple(problems))


def training_clock(
    train: dict[str, Any], quantize: dict[str, Any], tokenize: float, log: Path, limit: float
) -> Check:
    """The clock of the log, its budget, and the seconds outside of it by name.

    train, quantize: metrics of the stages; tokenize: seconds.
    """
    seconds = train["seconds"]
    losses, stopped = read_log(log, "loss"), read_log(log, "stopped")
    problems = []
    if seconds > limit:
        problems.append(f"{seconds - limit:.1f} s above the budget")
    clocks = [line["clock"] for line in losses]
    if clocks != sorted(clocks) or [line["step"] for line in losses][-1:] != [train["steps"]]:
        problems.append("the clock of the log runs back, or its last step is not the last one")
    if [line["clock"] for line in stopped] != [seconds]:
        problems.append("the log does not say that the clock stopped then")
    parts = quantize["seconds"]
    warm, stop, end = (
        lines[-1]["seconds"] if (lines := read_log(log, event)) else 0.0
        for event in ("warm", "stopped", "end")
    )
    evidence = (
        f"{seconds:.1f} of {limit:g} s for {train['steps']:,} optimizer steps. Outside of it: "
        f"before, text to tokens, with the tokenizer's training {tokenize:.1f} s, start and "
        f"warm-up {train['startup_seconds']:.1f} s (steps that are undone), pauses to save the "
        f"state {max(0.0, stop - warm - seconds):.1f} s (of the last process, if it was resumed); "
        f"after, averaging and validation {end - stop:.1f} s, quantization {parts['total']:.1f} s, "
        f"whose calibration text ({parts['calibration']:.1f} s) the model writes itself"
    )
    return Check("training clock", evidence, tuple(problems))


def training_data(logs: dict[str, Path]) -> Check:
    """When training text was last read, and which stages opened its files; logs: by stage."""
    problems = []
    stopped, read = (read_log(logs["train"], event)[-1:] for event in ("stopped", "data"))
    if not stopped or not read:
        problems.append("the log of train does not say when its text was last read")
        after = ""
    else:
        late = read[0]["last_read"] - stopped[0]["seconds"]
        after = f"last read {-late:.2f} s before the clock stopped"
        if late > 0:
            problems.append(f"training text was read {late:.2f} s after the clock had stopped")
    for stage, log in logs.items():
        lines = read_log(log, "opened")
        names = [name for line in lines for name in line["tokens"] if name.startswith("train")]
        if not lines:
            problems.append(f"the log of {stage} does not say which files it opened")
        elif names and stage != "train":
            problems.append(f"{stage} opened {', '.join(names[:3])}")
    others = ", ".join(stage for stage in logs if stage != "train")
    evidence = f"{after or 'train: no record'}; token files that {others} opened: none of training"
    if problems:
        evidence = f"{after or 'train: no record'}; files opened are in the logs, event `opened`"
    return Check("training data", evidence, tuple(problems))


def evaluation_clock(
    ttt: dict[str, Any], evaluate: dict[str, Any], log: Path, limit: float
) -> Check:
    """TTT's seconds, alone and with start, compilation and everything; log: of ttt_eval."""
    scoring = ttt["seconds"][TTT]
    warm = read_log(log, "warm")
    start = warm[-1]["startup_seconds"] if warm else float("nan")
    before = warm[-1]["seconds"] if warm else 0.0  # of the start, what the stage's own clock counts
    whole = ttt["seconds"]["total"] + max(0.0, start - before)
    problems = [
        f"{what} takes {seconds - limit:.1f} s more than the budget"
        for what, seconds in (("scoring", scoring), ("the whole stage", whole))
        if not seconds <= limit
    ]
    others = ", ".join(f"{name} {evaluate['seconds'][name]:.1f} s" for name in WITHOUT_ADAPTATION)
    evidence = (
        f"scoring with TTT {scoring:.1f} s; with start, loading and compilation ({start:.1f} s) "
        f"and all else {whole:.1f} s, of {limit:g} s; processes: {ttt['world_size']}; not needed "
        f"for the score and not counted: {others}"
    )
    return Check("evaluation clock", evidence, tuple(problems))
