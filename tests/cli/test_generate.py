"""`pocketlm generate`: the prompt, then text that options and seed decide; mistakes."""

from pathlib import Path

import pytest

from model.data.tokenizer import Tokenizer
from tests.cli.conftest import Call
from tests.helpers.corpora import small_tokenizer

ARTIFACT = "artifacts/quantize/seed0/model.pocket"
TOKENIZER = "artifacts/tokenize/tokens/tokenizer.model"


def test_a_prompt_is_continued_as_options_and_seed_say(place: Path, call: Call) -> None:
    def text(*words: object) -> str:
        done = call("generate", ARTIFACT, "--prompt", "Text  mi\nnu", *words)
        assert done.exit_code == 0, done.output
        return done.stdout

    prompt = Tokenizer(TOKENIZER).normalize("Text  mi\nnu")
    first = text("--tokens", 30)
    assert first.startswith(prompt)
    assert len(first) > len(prompt) + 20
    assert first == text("--tokens", 30, "--seed", 0) != text("--tokens", 30, "--seed", 1)
    assert first.startswith(text("--tokens", 3).rstrip("\n\ufffd"))
    coldest = {text("--tokens", 30, "--temperature", 0, "--seed", seed) for seed in (0, 1)}
    assert len(coldest) == 1


def test_text_begins_without_a_prompt_and_outside_of_the_checkout(
    place: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = call("generate", ARTIFACT).stdout
    monkeypatch.chdir(tmp_path)
    assert call("generate", place / ARTIFACT).stdout == here
    assert len(here) > 20


@pytest.mark.parametrize("temperature", ["-1", "nan", "inf", "1e-9", "1e9"])
def test_impossible_temperatures_are_refused(place: Path, call: Call, temperature: str) -> None:
    done = call("generate", ARTIFACT, "--temperature", temperature)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: --temperature: ")
    assert "repair: " in done.stderr


@pytest.mark.parametrize("command", ["generate", "score"])
def test_what_does_not_belong_together_is_refused(place: Path, call: Call, command: str) -> None:
    words = [] if command == "generate" else ["params.yaml"]

    def refusal(artifact: object, *options: object) -> str:
        done = call(command, artifact, *words, *options)
        assert done.exit_code == 1, done.output
        assert "\n  repair: " in done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr.removeprefix("error: ")

    other = place / "other.model"
    small_tokenizer(other, 300)
    assert refusal(ARTIFACT, "--tokenizer", other).startswith(f"{other}: 300 pieces, but")
    assert refusal(ARTIFACT, "--tokenizer", "absent").startswith("absent: no such file")
    assert refusal("absent.pocket").startswith("absent.pocket: no such artifact")
    content = bytearray(Path(ARTIFACT).read_bytes())
    content[len(content) // 2] ^= 1
    Path("damaged.pocket").write_bytes(content)
    assert refusal("damaged.pocket").startswith("damaged.pocket: corrupted or truncated")
    Path(TOKENIZER).unlink()
    assert "--tokenizer FILE" in refusal(ARTIFACT)
