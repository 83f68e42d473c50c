"""`pocketlm score`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pocketlm.cli.generate import Artifact, TokenizerFile


def main(
    artifact: Artifact,
    file: Annotated[
        str, Argument(metavar="FILE", help="text, .jsonl, .jsonl.zst, .parquet; -: standard input")
    ],
    ttt: Annotated[bool, Option("--ttt", help="adapt to each document as it is read")] = False,
    html: Annotated[
        Path | None, Option(metavar="FILE", help="write the colored text as a page")
    ] = None,
    tokenizer: TokenizerFile = None,
) -> None:
    """Score a text: bits per byte, nats per token, colored by loss."""
    from rich.console import Console

    from model.runtime.distributed import process_group
    from model.runtime.files import write_bytes
    from pocketlm.inference.colored import as_page, in_terminal
    from pocketlm.inference.loading import load_pair, scoring_settings
    from pocketlm.inference.score import read_texts, score_texts

    texts, settings = read_texts(file), scoring_settings()
    with process_group() as group:
        pair = load_pair(artifact, tokenizer, group)
        scored = score_texts(*pair, texts, settings, ttt, group)
    score, count = scored.score, len(scored.texts)
    summary = (
        f"{score.bpb:.6f} bits/byte, {score.loss:.6f} nats/token: {score.tokens:,} tokens, "
        f"{score.bytes:,} bytes, {count:,} document{'s' * (count > 1)}, "
        f"{'test-time training' if ttt else 'sliding window'}"
    )
    console = Console()
    if console.is_terminal:
        console.print(in_terminal(scored.spans()))
    print(summary)
    if html:
        title = "standard input" if file == "-" else file
        write_bytes(html, as_page(scored.spans(), f"Losses of {title}", summary).encode())
