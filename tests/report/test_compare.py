"""Runs beside each other: what is equal, planted, on other text, by another tokenizer, recorded."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from model.data.shards import BOS
from model.data.tokenizer import Tokenizer
from model.runtime.errors import InputError
from model.runtime.files import sha256, write_json
from pocketlm.params.presets import render
from pocketlm.report.blocks import Block, Table, to_html, to_markdown
from pocketlm.report.compare import TITLE, comparison
from pocketlm.report.compare_figures import draw
from pocketlm.report.compare_runs import Run, same_text
from pocketlm.report.terminal import show
from pocketlm.workflow.runs import opened
from tests.helpers.corpora import sentences, small_tokenizer
from tests.helpers.presets import preset
from tests.helpers.report_inputs import seal, token_losses, write_seed
from tests.helpers.sidecars import write_sidecar

MANIFEST = "artifacts/tokenize/tokens/manifest.json"
Change = Callable[[pd.DataFrame], pd.DataFrame]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes the folder of a run: its name, a change of each seed's losses, tokenizer, seeds."""
    tokenizer = tmp_path / "tokenizer.model"
    small_tokenizer(tokenizer)

    def made(
        name: str,
        change: Change = lambda table: table,
        given: Path = tokenizer,
        seeds: tuple[int, ...] = (0, 1),
        **settings: Any,
    ) -> Path:
        place = tmp_path / name
        tokens = place / "artifacts/tokenize/tokens"
        tokens.mkdir(parents=True)
        (tokens / "tokenizer.model").write_bytes(given.read_bytes())
        write_json(tokens / "manifest.json", {"tokenizer": sha256(given)})
        write_sidecar(place, "tokenize", "tokens/tokenizer.model", "tokens/manifest.json")
        settings = {"report.baseline": "none", **settings}  # one seed allows no test
        chosen = [f"{key}={value}" for key, value in settings.items()]
        params = preset("demo", f"seeds={list(seeds)}", *chosen)
        (place / "params.yaml").write_text(render(params))
        monkeypatch.chdir(place)
        for seed in seeds:
            write_seed(Path("."), seed, change(token_losses(seed, documents=40, longest=600)))
            folder = Path(f"artifacts/evaluate/seed{seed}")
            inputs = json.loads((folder / "provenance.json").read_text())["inputs"]
            seal(folder, inputs={**inputs, MANIFEST: sha256(MANIFEST)})
        monkeypatch.chdir(tmp_path)
        return place

    return made


def better(table: pd.DataFrame, gain: float = 0.05) -> pd.DataFrame:
    """Less loss with TTT; other things equal."""
    return table.assign(ttt=(table["ttt"] - gain).astype("float32"))


def spelled_by(tokenizer: Tokenizer, count: int = 12, seed: int = 0) -> Change:
    """Documents of some sentences, tokens of `tokenizer`, whose losses depend on bytes alone."""

    def change(_: pd.DataFrame) -> pd.DataFrame:
        tables = []
        for number, tokens in enumerate(tokenizer.encode(list(sentences(count, seed)))):
            targets = np.append(tokens, BOS)
            sizes = tokenizer.sizes(targets)
            nats = (0.5 * sizes).astype("float32")
            columns = {"token": targets.astype("uint16"), "bytes": sizes.astype("int16")}
            columns |= {"plain": nats, "sliding": nats, "ttt": nats}
            position = np.arange(1, len(targets) + 1, dtype="int32")
            first = {"document": np.full(len(targets), number, "int32"), "position": position}
            tables.append(pd.DataFrame({**first, **columns}))
        return pd.concat(tables)

    return change


def compared(*names: str) -> tuple[list[Block], str, str]:
    """Blocks, Markdown and HTML of a comparison."""
    with opened(names) as runs:
        same = same_text(runs)
        blocks = comparison(runs, same)
        return blocks, to_markdown(blocks), to_html(blocks, TITLE, draw(runs, same))


def gains(blocks: list[Block], unit: str = "nats per token") -> list[list[list[str]]]:
    """The rows of all tables in a unit."""
    tables = [block for block in blocks if isinstance(block, Table)]
    return [[list(row) for row in table.rows] for table in tables if table.header[0] == unit]


def test_a_run_is_equal_to_itself(make: Callable[..., Path]) -> None:
    make("one"), make("two")
    blocks, text, page = compared("one", "two")
    paired, _ = gains(blocks)
    assert [row[3:] for row in paired] == [["+0.0000", "+0.0000 … +0.0000", "1.0000"]] * 3
    assert "which may be chance" in text
    assert "All parameters are the same." in text
    assert page.count("<svg") == 2


def test_a_planted_gain_is_found_where_it_is(make: Callable[..., Path]) -> None:
    make("one")
    make("two", better, **{"ttt.lr": 3e-4})
    blocks, text, _ = compared("one", "two")
    (plain, sliding, ttt), _ = gains(blocks)
    assert plain[3] == sliding[3] == "+0.0000"
    assert ttt[3] == "+0.0500"
    assert re.search(r"With TTT `two` loses 0.0500 nats per token less than `one` \(p = ", text)
    lengths, positions = (
        block.rows
        for block in blocks
        if isinstance(block, Table)
        and block.header[0] in ("tokens of a document", "position in it")
    )
    assert {row[2] for row in (*lengths, *positions)} == {"+0.0500"}
    (weighted,) = gains(blocks, "bits per byte, weighted to FineWeb's lengths")
    assert [row[3] for row in weighted[:2]] == ["+0.0000"] * 2
    per_byte = 0.05 / np.log(2) / 2.5  # token_losses has tokens of 1 to 4 bytes
    assert float(weighted[2][3]) == pytest.approx(per_byte, rel=0.05)
    low, high = map(float, weighted[2][4].split(" … "))
    assert low < per_byte < high
    assert "| `ttt.lr` | 0.006 | 0.0003 |" in text
    assert "`train.steps`" not in text


def test_the_first_run_is_what_all_others_are_compared_with(make: Callable[..., Path]) -> None:
    make("one"), make("two", better), make("three", lambda table: better(table, -0.1))
    blocks, text, page = compared("one", "two", "three")
    first, _, second, _ = gains(blocks)
    assert (first[2][3], second[2][3]) == ("+0.0500", "-0.1000")
    assert "three against one" in text
    assert page.count("<svg") == 3


def test_a_change_that_only_one_seed_has_is_a_matter_of_seeds(make: Callable[..., Path]) -> None:
    make("one", seeds=(0,)), make("two", better, seeds=(0,))
    blocks, text, _ = compared("one", "two")
    paired, seeds = gains(blocks)
    assert float(paired[2][5]) < 1e-4
    assert seeds[2][1:] == ["+0.0500", "-", "-"]
    assert "One seed says nothing about others" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.assign(token=t["token"] ^ np.uint16(1)), "40 of 40 documents differ, the fi"),
        (
            lambda t: t.assign(token=t["token"].where(t["document"] != 7, 5).astype("uint16")),
            "1 of 40 documents differ, the first is number 7",
        ),
        (lambda t: t[t["document"] < 39], "40 documents of .* and 39 documents of"),
    ],
    ids=["all documents", "one document", "fewer documents"],
)
def test_other_text_is_refused(make: Callable[..., Path], change: Change, words: str) -> None:
    make("one"), make("two", change, **{"evaluate.documents": 3})
    expected = f"different text: {words}.*; settings: evaluate.documents 24 and 3"
    with pytest.raises(InputError, match=expected) as refused:
        compared("one", "two")
    assert "evaluate.documents" in refused.value.repair


def test_other_tokens_of_the_same_text_are_compared_in_bits_per_byte(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    models = [tmp_path / f"{size}.model" for size in (300, 340)]
    for path in models:
        change = spelled_by(small_tokenizer(path, int(path.stem)))
        make(path.stem, change, path)
    blocks, text, page = compared("300", "340")
    paired, _ = gains(blocks, "bits per byte")
    assert {row[3] for row in paired} == {"+0.0000"}
    assert "WARNING: the runs have different tokens of the same text" in text
    assert not any(isinstance(b, Table) and b.header[0] == "position in it" for b in blocks)
    assert page.count("<svg") == 2
    make("other", spelled_by(Tokenizer(models[1]), seed=1), models[1])
    with pytest.raises(InputError, match="12 of 12 documents differ"):
        compared("300", "other")


def test_a_recorded_run_is_compared_by_its_seeds(make: Callable[..., Path], tmp_path: Path) -> None:
    make("one")
    with opened(["one", make("two").name]) as (one, _):
        record(one, tmp_path / "kept")
    blocks, text, _ = compared("one", "kept")
    (seeds,) = gains(blocks)
    assert seeds[2][1] == "+0.0000"
    assert "Parameters were not kept with: kept." in text
    make("short", lambda t: t[t["document"] < 20])
    with pytest.raises(InputError, match="different text: 20 documents"):
        compared("short", "kept")


def record(run: Run, folder: Path) -> None:
    """Keep what records/ keep of a run."""
    runs = [
        {
            "seed": seed,
            **{
                score: {unit: values[place] for unit, values in units.items()}
                for score, units in run.losses.items()
            },
        }
        for place, seed in enumerate(run.seeds)
    ]
    scored = dict(zip(("documents", "tokens", "bytes"), run.text, strict=True))
    write_json(folder / "summary.json", {"runs": runs, "scored": scored})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("artifacts/ttt_eval/seed1/losses.parquet", "content is not what ttt_eval@1 wrote"),
        ("artifacts/evaluate/seed0/details.json", "content is not what evaluate@0 wrote"),
        ("artifacts/tokenize/tokens/tokenizer.model", "content is not what tokenize wrote"),
    ],
)
def test_a_damaged_file_is_named(make: Callable[..., Path], spoil: str, words: str) -> None:
    make("one")
    path = make("two") / spoil
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(InputError, match=words):
        compared("one", "two")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("one",), "no two different runs"),
        (("one", "one"), "no two different runs"),
        (("one", "empty"), "neither a checkout with results nor a recorded run"),
        (("one", "nowhere"), "nowhere: no folder, git revision or experiment"),
    ],
)
def test_what_is_no_run_is_named(
    make: Callable[..., Path], tmp_path: Path, names: tuple[str, ...], words: str
) -> None:
    make("one")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=words):
        compared(*names)


def test_names_are_no_markup_in_a_terminal(make: Callable[..., Path]) -> None:
    make("[red]one"), make("two")
    blocks, *_ = compared("[red]one", "two")
    console = Console(width=120, record=True, file=io.StringIO())
    show(blocks, console)
    text = console.export_text()
    assert "two against [red]one" in text
    assert max(map(len, text.splitlines())) <= 120
