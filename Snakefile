"""The order of the stages and their resources.

tokenize > train > quantize > evaluate, ttt_eval > report, audit > submission; of the two evaluations
neither waits for the other. Only `snakemake audit` and `snakemake submission` ask for the audit.

What a stage runs, reads and writes is defined in dvc.yaml alone, and DVC decides by content what is
stale. The rules' inputs and outputs are markers without content (pocketlm/workflow/plan.py): one is
there if its stage is up to date, and each rule brings a stage up to date. A stage that runs for each
seed has a rule for one, and one of its own name that asks for all.
"""

import os
import shlex
import sys
from pathlib import Path

from model.runtime.errors import InputError
from pocketlm.workflow.scheduler import (
    GOALS,
    begin,
    is_elsewhere,
    is_forced,
    is_shown,
    marker,
    markers_before,
    markers_of,
    shares,
)
from pocketlm.workflow.stages import outs

try:
    PARAMS = begin(workflow)
except InputError as error:
    sys.exit(f"error: {error}")

shell.prefix(f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; ")
SEEDS = PARAMS.seeds
EXECUTION = PARAMS.execution
# Slots of this machine (GPUs, or 1); a stage takes one per process, and its share of the cores. On a
# cluster the profile says how many cores each job takes.
GPUS = workflow.global_resources["gpu"].value if "gpu" in workflow.global_resources else 1
CORES = workflow.resource_settings.cores or os.cpu_count()
THREADS = 1 if is_elsewhere() else max(1, CORES * min(EXECUTION.processes, GPUS) // GPUS)
SHARE = shares(EXECUTION.processes, EXECUTION.nodes, EXECUTION.device)


report: "docs/captions/result.rst"


HEADLINE = Path("artifacts/report/headline.txt")  # with which the page of `--report` opens
config["headline"] = HEADLINE.read_text(encoding="utf-8") if HEADLINE.exists() else ""


def reproduce(stage, seeded=True, processes=0):
    """The command of a rule; processes: how many GPUs a stage without seeds may take."""
    target = f"{stage}@{{wildcards.seed}}" if seeded else stage
    options = f"--processes {EXECUTION.processes if seeded else processes} "
    options += f"--nodes {EXECUTION.nodes} " if seeded else ""
    options += "--force " if is_forced(stage) else ""
    return f"exec python -m pocketlm.workflow.reproduce {options}{target}"


def embedded(path):
    """Mark what `snakemake --report` shows: the report itself and its figures, with captions."""
    caption = Path("docs/captions", Path(path).stem).with_suffix(".rst")
    shown = Path(path).suffix in (".html", ".svg")
    return report(path, caption=str(caption), category="Results") if shown else path


wildcard_constraints:
    seed=r"\d+",


rule report:
    default_target: True
    input:
        markers_before("report", SEEDS),
    output:
        touch(marker("report")),
        [embedded(out) for out in outs("report")] if is_shown() else [],
    message:
        "report: artifacts/report/report.md, and in short headline.txt"
    shell:
        reproduce("report", seeded=False)


rule tokenize:
    output:
        touch(marker("tokenize")),
    threads: CORES
    message:
        "tokenize"
    shell:
        reproduce("tokenize", seeded=False)


rule train:
    input:
        markers_of("train", SEEDS),


rule train_seed:
    input:
        markers_before("train", SEEDS),
    output:
        touch(marker("train@{seed}")),
    threads: THREADS
    resources:
        **SHARE,
    message:
        "train, seed {wildcards.seed}"
    shell:
        reproduce("train")


rule quantize:
    input:
        markers_of("quantize", SEEDS),


rule quantize_seed:
    input:
        markers_before("quantize", SEEDS),
    output:
        touch(marker("quantize@{seed}")),
    threads: THREADS
    resources:
        **SHARE,
    message:
        "quantize, seed {wildcards.seed}"
    shell:
        reproduce("quantize")


rule evaluate:
    input:
        markers_of("evaluate", SEEDS),


rule evaluate_seed:
    input:
        markers_before("evaluate", SEEDS),
    output:
        touch(marker("evaluate@{seed}")),
    threads: THREADS
    resources:
        **SHARE,
    message:
        "evaluate, seed {wildcards.seed}"
    shell:
        reproduce("evaluate")


rule ttt_eval:
    input:
        markers_of("ttt_eval", SEEDS),


rule ttt_eval_seed:
    input:
        markers_before("ttt_eval", SEEDS),
    output:
        touch(marker("ttt_eval@{seed}")),
    threads: THREADS
    resources:
        **SHARE,
    message:
        "ttt_eval, seed {wildcards.seed}"
    shell:
        reproduce("ttt_eval")


rule audit:
    input:
        markers_before("audit", SEEDS),
    output:
        touch(marker("audit")),
    threads: THREADS
    resources:
        **shares(1, 1, EXECUTION.device),
    message:
        "audit: artifacts/audit/audit.md"
    shell:
        reproduce("audit", seeded=False, processes=1)


rule submission:
    input:
        [markers_of(stage, SEEDS) for stage in GOALS["submission"]],
    message:
        "submission: a folder below records/"
    shell:
        "python -m pocketlm submission"
