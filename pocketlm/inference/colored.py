"""Text colored by the loss of its tokens, for terminals and as a page.

A span of less than half a step has no color; every further step of STEP nats has a darker one, the
last also for all above it.
"""

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pocketlm.inference.score import Span
from pocketlm.report.blocks import clean

if TYPE_CHECKING:
    from rich.text import Text

STEP = 1.0  # nats
COLORS = ("#ffffcc", "#ffeda0", "#fed976", "#feb24c", "#fd8d3c", "#fc4e2a", "#e31a1c", "#bd0026")
LEGEND: list[Span] = [(f" {n * STEP:g} ", n * STEP) for n in range(len(COLORS))]
LEGEND.append((f" {len(COLORS) * STEP:g} or more ", len(COLORS) * STEP))
END = "\u00b6"  # shown for the end of a document, which is scored, too
PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.6 system-ui, sans-serif; color: #222; background: #fff; max-width: 54rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere }}
{rules}
</style></head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<p>Nats per token: {legend}</p>
{documents}
</body>
</html>
"""


def level(nats: float) -> int:
    """The number of a span's color, from 1 on; 0 for none."""
    return min(int(nats / STEP + 0.5), len(COLORS))


def in_terminal(documents: Iterable[Sequence[Span]]) -> "Text":
    """Documents as paragraphs for rich, with a legend."""
    from rich.text import Text

    text = Text("nats per token: ")
    for spans in (LEGEND, *documents):
        for characters, nats in spans:
            color = f"black on {COLORS[level(nats) - 1]}" if level(nats) else ""
            text.append(clean(characters) or END, color)
        text.append("\n")
    return text


def as_page(documents: Iterable[Sequence[Span]], title: str, summary: str) -> str:
    """Documents as one HTML page that needs no other file."""
    last = len(COLORS)
    rules = [f".n{n} {{ background: {color} }}" for n, color in enumerate(COLORS, start=1)]
    rules.append(f".n{last - 1}, .n{last} {{ color: #fff }}")  # on the two darkest
    return PAGE.format(
        title=html.escape(clean(title)),
        summary=html.escape(clean(summary)),
        rules="\n".join(rules),
        legend="".join(map(_span, LEGEND)),
        documents="\n".join(f"<p>{''.join(map(_span, spans))}</p>" for spans in documents),
    )


def _span(span: Span) -> str:
    characters, nats = span
    shown = html.escape(clean(characters)) or END
    return f'<span class="n{level(nats)}" title="{nats:.2f} nats">{shown}</span>'
