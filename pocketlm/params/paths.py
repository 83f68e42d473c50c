"""Where files lie below the directory of an experiment; no step reads below `.work/` of another."""

from pathlib import Path

ARTIFACTS = Path("artifacts")  # outputs of steps
LOGS = Path("logs")
WORK = Path(".work")  # scratch: state for resuming, running logs
TOKENS = ARTIFACTS / "tokenize/tokens"  # what `tokenize` makes of the text
REPORT = ARTIFACTS / "report"
SWEEP = ARTIFACTS / "sweep"
COMPILE_CACHE = WORK / "compile-cache"

STEPS = ("train", "quantize", "evaluate", "ttt_eval")  # the stages that run for each seed

# Files that parameters name lie in folders that dvc.yaml knows, or changes would go unnoticed.
TOKENIZERS, BASELINES = Path("tokenizers"), Path("records")
