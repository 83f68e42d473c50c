"""A corpus to token shards: one process reads and writes, others encode."""

from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from model.data.encoding import Encoder
from model.data.shards import SPLITS, Shard, ShardWriter, Split
from model.data.shuffle import Shuffled
from model.data.sources import Corpus, HoldOut
from model.runtime.progress import progress
from model.runtime.worker_pool import map_in_order


def write_shards(
    corpus: Corpus,
    tokenizer: Path,
    directory: Path,
    shard_tokens: int,
    shuffle_seed: int | None,
    processes: int,
) -> tuple[dict[Split, list[Shard]], int]:
    """Write every document that is not empty as BOS and its pieces into shards in `directory`.

    tokenizer: its file; shuffle_seed: of the order of the training documents, None: as in the
    corpus. The shards do not depend on the number of processes. Returns them by split, and how many
    documents were left out of training as they are held out. Raises InputError if the tokens of a
    document do not stand for its bytes.
    """
    writers = {split: ShardWriter(directory, split, shard_tokens) for split in SPLITS}
    hold_out, read, dropped = HoldOut(corpus.fraction), 0.0, 0
    with ExitStack() as stack:
        bar = stack.enter_context(progress("encode: MB read", corpus.megabytes))
        for writer in writers.values():
            stack.enter_context(writer)
        shuffled = None
        if shuffle_seed is not None:
            shuffled = stack.enter_context(Shuffled(directory / "shuffle", shuffle_seed))
        build = partial(Encoder, tokenizer)
        blocks = stack.enter_context(closing(map_in_order(build, corpus.blocks(), processes)))
        for block in blocks:
            held, left_out = hold_out.assign(block.documents.hashes, block.given)
            dropped += int(left_out.sum())
            writers["validation"].write(*block.documents.select(held).pieces.T)
            train = block.documents.select(~held & ~left_out)
            if shuffled:
                shuffled.add(train)
            else:
                writers["train"].write(*train.pieces.T)
            if bar:
                bar.advance(block.read - read)
            read = block.read
        for pieces in shuffled.in_order() if shuffled else ():
            writers["train"].write(*pieces.T)
    return {split: writer.shards for split, writer in writers.items()}, dropped
