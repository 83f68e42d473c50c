"""Score-first test-time training: each document adapts the model to itself while it is read.

A document is read in chunks. A chunk is first *scored* with the adapters that the document's
earlier chunks have trained, then `steps` optimizer steps are taken on its mean loss; the first one
and the score come from one forward pass, since the score is the loss before the step. The last
chunk is not trained on:

    document   [---- context ----|chunk|............]
                                  scored, then trained on

    adapters.py   what adapts: LoRAs and the hash embedding of each document
    window.py     mode `window`: every chunk reads its context again with the present adapters
    cached.py     mode `cached`: a chunk runs alone against keys and values kept from the context
    batches.py    which documents adapt side by side, and in which order batches are begun
    loop.py       the loop over chunks, the same for both modes
    rehearsal.py  the kernels of all this, compiled before it begins
"""
