"""Score-first test-time training (TTT): each document adapts the model to itself as it is read.

A document is read in chunks. Each chunk is first *scored* with the adapters trained on the
document's earlier chunks; then `ttt.steps` optimizer steps are taken on its mean loss. One forward
pass yields both the score and the first step's loss, since a score is the loss before the step. The
last chunk is scored only:

    document   [---- context ----|chunk|............]
                                  score, then train

    config.py                  the settings
    chunking.py                chunk boundaries, and the token range of the pass of each chunk
    document_adapters.py       what adapts: LoRA matrices and a hash embedding for each document
    per_document_optimizer.py  parameters with one copy per document, and their RMSProp
    reader.py                  protocol of the two modes, and their registry
    window_mode.py             mode `window`: each chunk recomputes its context
    cached_mode.py             mode `cached`: each chunk attends to a ring-buffer KV cache
    layouts.py                 batch descriptions kept at fixed addresses for CUDA graphs
    session_plan.py            passes, shapes, rows and optimizer scalars of a batch
    batching.py                which documents form a batch, and in which order batches start
    loop.py                    the loop over chunks, the same for both modes
    warmup.py                  compiles the Triton kernels of all this in advance
"""
