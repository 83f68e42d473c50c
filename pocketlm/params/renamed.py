"""Keys of params.yaml that were renamed: the old full key and the new one.

Whoever renames a key adds a row: an old file is then told the new name.
"""

RENAMED = {
    "evaluate.tokens_per_batch": "execution.evaluation_tokens",
    "ops.mix": "ops.residual_norm",
    "ops.ring": "ops.cached_attention",
    "processes": "execution.processes",
    "quantize.cuda_graphs": "execution.cuda_graphs",
    "train.compile": "execution.compile",
    "train.cooldown_steps": "train.cooldown",
    "train.ema_decay": "train.ema_window",
    "train.log_every": "execution.log_every",
    "train.muon_momentum_steps": "train.muon_momentum_warmup",
    "train.save_every_seconds": "execution.save_every_seconds",
    "ttt.batch": "execution.ttt_documents",
    "ttt.cuda_graphs": "execution.cuda_graphs",
    "ttt.reach": "ttt.bptt_chunks",
    "ttt.tokens_per_batch": "execution.ttt_tokens",
}
