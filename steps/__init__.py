"""The stages of the workflow, each a program started as a module (`python -m steps.train`).

tokenize   text             -> artifacts/tokenize/tokens: tokenizer.model, *.bin, manifest.json
train      tokens           -> artifacts/train/seed<n>: model.safetensors, curve.csv
quantize   tokens, model    -> artifacts/quantize/seed<n>: model.pocket
evaluate   tokens, artifact -> artifacts/evaluate/seed<n>: losses.parquet
ttt_eval   tokens, artifact -> artifacts/ttt_eval/seed<n>: losses.parquet
report     all results      -> artifacts/report: report.md, report.html, headline.txt, figures

Each also writes metrics.json and provenance.json below artifacts/, and its log below logs/.
"""

import os

# Threads that wait for each other sleep instead of spinning for milliseconds. On cores that other
# programs use as well, spinning made an evaluation up to fifty times as long (docs/lab-notes.md).
# OpenMP reads this once, when torch is imported, which is later than this line.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
