"""`pocketlm score`: the numbers of the evaluation's functions, of any file of text."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from model.artifact.format import load_artifact
from model.data.tokenizer import Tokenizer
from model.evaluation.losses import sliding_losses, targets_of
from model.evaluation.score import Score
from model.runtime.distributed import Group
from model.ttt.loop import ttt_losses
from pocketlm.params.load import load_params
from pocketlm.submission.standalone import as_document
from tests.cli.conftest import Call
from tests.cli.test_generate import ARTIFACT, TOKENIZER

TEXTS = ["Text lomi <b>nute</b> & grü 漢字 👍🏽 " * 12, "ra\n\nsi  do", "vepu " * 90]


def expected(texts: list[str], ttt: bool) -> Score:
    """What the functions of the stages make of these texts."""
    model, tokenizer, params = load_artifact(ARTIFACT), Tokenizer(TOKENIZER), load_params()
    documents, group = [as_document(tokenizer, t) for t in texts], Group(0, 1, model.device)
    execution = params.execution
    if ttt:
        losses = ttt_losses(model, documents, params.ttt, execution, group)
    else:
        stride, tokens = params.evaluate.sliding_stride, execution.evaluation_tokens
        losses = sliding_losses(model, documents, stride, tokens, group)
    assert sum(map(len, losses)) == sum(map(len, documents))
    score = Score.of(losses, [tokenizer.sizes(targets_of(document)) for document in documents])
    assert score.bytes == sum(len(tokenizer.normalize(text).encode()) for text in texts)
    return score


def shown(score: Score) -> str:
    return (
        f"{score.bpb:.6f} bits/byte, {score.loss:.6f} nats/token: {score.tokens:,} tokens, "
        f"{score.bytes:,} bytes"
    )


@pytest.mark.parametrize("ttt", [False, True])
@pytest.mark.parametrize("kind", ["text.md", "text.txt", "texts.jsonl", "-"])
def test_scores_are_those_of_the_stages(place: Path, call: Call, kind: str, ttt: bool) -> None:
    texts, file = TEXTS[:1], kind if kind != "-" else "stdin.bin"
    Path(file).write_text(texts[0])
    if kind == "texts.jsonl":
        texts = TEXTS
        lines = [json.dumps({"text": text}) for text in [*texts, "", " \n"]]
        Path(file).write_text("\n".join(lines))
    stdin = os.dup(0)
    with open(file, "rb") as opened:
        os.dup2(opened.fileno(), 0)
    try:
        done = call("score", ARTIFACT, kind, *(["--ttt"] if ttt else []))
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(shown(expected(texts, ttt)))
    assert f" {len(texts)} document" in done.stdout


def test_page_and_terminal_show_all_text_colored(
    place: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("text").write_text(TEXTS[0])
    normalized = Tokenizer(TOKENIZER).normalize(TEXTS[0])
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = call("score", ARTIFACT, "text", "--html", "page.html")
    assert done.exit_code == 0, done.output
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert normalized.replace(" ", "") in re.sub(r"\s", "", plain)
    assert "\x1b[" in done.stdout
    page = Path("page.html").read_text()
    assert not re.search(r"https?:|src=|<script|<b>", page)
    document = page.split("<p>")[-1]
    body = re.sub("<[^>]*>", "", document)
    for entity, character in {"&lt;": "<", "&gt;": ">", "&amp;": "&"}.items():
        body = body.replace(entity, character)
    assert body.strip() == normalized + "\u00b6"
    nats = [float(n) for n in re.findall(r'title="([\d.]+) nats"', document)]
    assert np.isclose(sum(nats), expected(TEXTS[:1], False).nats, atol=0.01 * len(nats))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "there is no text to score"),
        (b" \n", "there is no text to score"),
        (b"a\xff", "text: byte 1: not UTF-8"),
        (None, "text: no such file"),
    ],
)
def test_files_without_text_are_refused(
    place: Path, call: Call, content: bytes | None, problem: str
) -> None:
    if content is not None:
        Path("text").write_bytes(content)
    done = call("score", ARTIFACT, "text")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {problem}")


def test_settings_are_those_here_or_of_the_preset(
    place: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("text").write_text(TEXTS[0])
    params = Path("params.yaml").read_text()
    for wrong in ("", "[]", params.replace("  lr: ", "  lrr: ")):
        Path("params.yaml").write_text(wrong)
        done = call("score", ARTIFACT, "text")
        assert done.exit_code == 1
        assert done.stderr.startswith("error: params.yaml: ")
    Path("params.yaml").write_text(params.replace("sliding_stride: 32", "sliding_stride: 65"))
    done = call("score", ARTIFACT, "text")
    assert "evaluate.sliding_stride: 65 exceeds the artifact's sequence_length, 64" in done.stderr
    monkeypatch.chdir(tmp_path)
    done = call("score", place / ARTIFACT, place / "text", "--ttt")
    assert done.exit_code == 0, done.output
    assert "settings are those of record.yaml" in done.stderr
    assert "bits/byte" in done.stdout
