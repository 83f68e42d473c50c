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

from model.runtime.threads import limit_spinning

limit_spinning()  # here, as the stages' programs import torch
