"""The stages of the workflow, each a program started as a module (`python -m steps.train`).

tokenize   text             -> artifacts/tokenize/tokens: tokenizer.model, *.bin, manifest.json
train      tokens           -> artifacts/train/seed<n>: model.safetensors, curve.csv
quantize   tokens, model    -> artifacts/quantize/seed<n>: model.pocket, tensors.csv, sample.txt
evaluate   tokens, artifact -> artifacts/evaluate/seed<n>: losses.parquet, pieces.json
ttt_eval   tokens, artifact -> artifacts/ttt_eval/seed<n>: losses.parquet
report     all results      -> artifacts/report: report.md, report.html, headline.txt, figures

Each also writes metrics.json, details.json and provenance.json below artifacts/, and its log below
logs/.
"""

import os

# Threads that wait for each other spin for some microseconds, then sleep. libgomp spins for some
# milliseconds, which on cores that other programs use as well made an evaluation up to fifty times
# as long; sleeping at once makes two threads no faster than one (docs/lab-notes.md). OpenMP reads
# this once, when torch is imported, which is later than this line.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
