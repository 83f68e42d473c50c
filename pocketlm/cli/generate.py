"""`pocketlm generate`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option, echo, style

Artifact = Annotated[
    Path, Argument(metavar="ARTIFACT", help="e.g. artifacts/quantize/seed0/model.pocket")
]
TokenizerFile = Annotated[
    Path | None, Option("--tokenizer", help="default: the one beside it, or of its checkout")
]


def main(
    artifact: Artifact,
    prompt: Annotated[str, Option(help="text to continue")] = "",
    tokens: Annotated[int, Option(min=1, help="at most; the document may end before")] = 200,
    temperature: Annotated[float, Option(help="0: the most probable token each time")] = 0.8,
    seed: Annotated[int, Option(min=0, max=2**32 - 1, help="of the random numbers")] = 0,
    tokenizer: TokenizerFile = None,
) -> None:
    """Continue a prompt; text appears as the model makes it."""
    from model.runtime.distributed import process_group
    from pocketlm.inference.generate import generate
    from pocketlm.inference.loading import load_pair

    with process_group() as group:
        model, pieces = load_pair(artifact, tokenizer, group)
        text = generate(model, pieces, prompt, tokens, temperature, seed)
        echo(style(next(text), bold=True), nl=False)
        for characters in text:
            echo(characters, nl=False)
        echo()
