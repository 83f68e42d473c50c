"""Values that grow in phases: the batch of a step, and the context of its documents.

A schedule lists pairs [u, s]: until the share u of the run a value is s times its full one, the
first pair with p < u counts at progress p, and after the last the value is full.

    batch    tokens_per_step·s, in whole microbatches; all learning rates times s^batch_lr_power
    context  model.sequence_length·s: documents are cut there

Early in a run gradients are large against their noise, so that two steps of half a batch gain more
than one of a whole batch (McCandlish et al. 2018); modded-nanogpt trains by thirds of its run with
1/3, 2/3 and 3/3 of the tokens and 1, 1.52 and 1.73 times the learning rates, nearly the root of the
batch (pull request 163). Short contexts first make attention cheaper while what lies far back is of
no use yet (parameter-golf, pull request 2014). Neither changes the shape of a microbatch: a batch
is a number of microbatches, and documents are packed into as many tokens, so that nothing is
compiled again.
"""

from collections.abc import Sequence

Phases = Sequence[Sequence[float]]


def share_at(phases: Phases, progress: float) -> float:
    """The share of its full value that a schedule gives at `progress`."""
    return next((share for until, share in phases if progress < until), 1.0)
