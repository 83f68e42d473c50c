"""The steps of the workflow, each a program started as a module (`python -m steps.train`).

tokenize   text           -> artifacts/tokenize/tokens: tokenizer.model, *.bin, manifest.json
train      tokens         -> artifacts/train/seed<n>: model.safetensors, metrics.json
quantize   model          -> artifacts/quantize/seed<n>: model.pocket, metrics.json
ttt_eval   model.pocket   -> artifacts/ttt_eval/seed<n>: losses.parquet, metrics.json
report     all metrics    -> artifacts/report: report.md, figures, metrics.json
"""
