"""Where files lie below the directory of an experiment; no step reads below `.work/` of another."""

from pathlib import Path

ARTIFACTS = Path("artifacts")  # outputs of steps
LOGS = Path("logs")
WORK = Path(".work")  # scratch: state for resuming, running logs
TOKENS = ARTIFACTS / "tokenize/tokens"  # what `tokenize` makes of the text
ARTIFACT, TOKENIZER = "model.pocket", "tokenizer.model"  # names of the files
REPORT = ARTIFACTS / "report"
SUMMARY = REPORT / "summary.json"  # every number of the report
SWEEP = ARTIFACTS / "sweep"
ABLATION = ARTIFACTS / "ablation"
COMPILE_CACHE = WORK / "compile-cache"

# Beside every stage's outputs: its few numbers that DVC shows, and all of them.
METRICS, DETAILS = "metrics.json", "details.json"

STEPS = ("train", "quantize", "evaluate", "ttt_eval")  # the stages that run for each seed

# Files that parameters name lie in folders that dvc.yaml knows, or changes would go unnoticed.
TOKENIZERS, BASELINES = Path("tokenizers"), Path("records")
CONSTRAINTS = Path("constraints.txt")  # what `make setup` pins, documentation to train on included
