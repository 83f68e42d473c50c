"""The order of the steps and their resources.

tokenize > train > quantize > evaluate, ttt_eval > report; of the two evaluations neither waits for
the other.

What a step runs, reads and writes is defined in dvc.yaml alone. A rule asks DVC to bring its stage
up to date, so a step whose inputs have the same content as before is restored instead of run.
"""

import os
import shlex
import sys
from pathlib import Path

from model.runtime.errors import InputError
from pocketlm.workflow.dvcstate import deps, flagged_outs, outs, sync
from pocketlm.params.load import load_params

try:
    PARAMS = load_params()
    if workflow.is_main_process:
        sync(PARAMS)
except InputError as error:
    sys.exit(f"error: {error}")

shell.prefix(f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; ")
SEEDS = PARAMS.seeds
REPRODUCE = "python -m pocketlm.workflow.reproduce " + ("--force " if config.get("force") else "")
IN_PROCESSES = REPRODUCE + f"--processes {PARAMS.execution.processes} "
# Slots of this machine (GPUs, or 1); a step takes one per process, and its share of the cores.
GPUS = workflow.global_resources["gpu"].value if "gpu" in workflow.global_resources else 1
CORES = workflow.resource_settings.cores or os.cpu_count()
THREADS = max(1, CORES * min(PARAMS.execution.processes, GPUS) // GPUS)


def embedded(path):
    """Mark what `snakemake --report` shows: the report itself and its figures, with captions."""
    caption = Path("docs/captions", Path(path).stem).with_suffix(".rst")
    shown = Path(path).suffix in (".html", ".svg")
    return report(path, caption=str(caption), category="Results") if shown else path


wildcard_constraints:
    seed=r"\d+",


rule tokenize:
    input:
        deps("tokenize", SEEDS),
    output:
        flagged_outs("tokenize"),
    threads: THREADS
    message:
        "tokenize"
    shell:
        REPRODUCE + "tokenize"


rule train:
    input:
        deps("train", SEEDS),
    output:
        outs("train"),
    threads: THREADS
    resources:
        gpu=PARAMS.execution.processes,
    message:
        "train, seed {wildcards.seed}"
    shell:
        IN_PROCESSES + "train@{wildcards.seed}"


rule quantize:
    input:
        deps("quantize", SEEDS),
    output:
        outs("quantize"),
    threads: THREADS
    resources:
        gpu=PARAMS.execution.processes,
    message:
        "quantize, seed {wildcards.seed}"
    shell:
        IN_PROCESSES + "quantize@{wildcards.seed}"


rule evaluate:
    input:
        deps("evaluate", SEEDS),
    output:
        outs("evaluate"),
    threads: THREADS
    resources:
        gpu=PARAMS.execution.processes,
    message:
        "evaluate, seed {wildcards.seed}"
    shell:
        IN_PROCESSES + "evaluate@{wildcards.seed}"


rule ttt_eval:
    input:
        deps("ttt_eval", SEEDS),
    output:
        outs("ttt_eval"),
    threads: THREADS
    resources:
        gpu=PARAMS.execution.processes,
    message:
        "ttt_eval, seed {wildcards.seed}"
    shell:
        IN_PROCESSES + "ttt_eval@{wildcards.seed}"


rule report:
    default_target: True
    input:
        deps("report", SEEDS),
    output:
        [embedded(out) for out in outs("report")],
    message:
        "report: artifacts/report/report.md, and in short headline.txt"
    shell:
        REPRODUCE + "report"
