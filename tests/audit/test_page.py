"""The page and audit.json say the same, of whatever checks there are."""

from hypothesis import given
from hypothesis import strategies as st

from pocketlm.audit.checks import CHECKS, Check, failed
from pocketlm.audit.page import TITLE, page, summary
from pocketlm.report.blocks import to_html, to_markdown

SEEDS = [0, 7]
CHECK = st.builds(
    Check,
    name=st.sampled_from(list(CHECKS)),
    evidence=st.text(max_size=20),
    problems=st.lists(st.text(min_size=1, max_size=20), max_size=2).map(tuple),
    seed=st.sampled_from([None, *SEEDS]),
)


COMPLETE = [Check(name, "looked at", seed=seed) for name in CHECKS for seed in SEEDS]


@given(st.lists(CHECK, max_size=8), st.booleans())
def test_page_and_json_agree(checks: list[Check], complete: bool) -> None:
    checks = [*checks, *COMPLETE] if complete else checks
    found, blocks = summary(checks, SEEDS), page(checks, SEEDS)
    assert found["passed"] == (not found["failed"])
    assert found["failed"] == failed(checks, SEEDS)
    assert set(failed(checks)) == {check.name for check in checks if check.problems}
    if complete:
        assert found["failed"] == failed(checks)
    assert len(found["checks"]) == len(checks)
    text = to_markdown(blocks)
    verdict = f"{len(found['failed'])} of {len(CHECKS)} checks FAILED"
    assert (verdict in text) != found["passed"]
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(CHECKS)
    wrong = [row for row in rows if "FAILED" in row or "not run" in row]
    assert len(wrong) == len(found["failed"])
    assert to_html(blocks, TITLE, {}).endswith("</html>\n")


def test_what_was_not_run_has_not_passed() -> None:
    """For no seed, or not for all."""
    assert summary([], SEEDS)["failed"] == list(CHECKS)
    some = [check for check in COMPLETE if (check.name, check.seed) != ("causality", 7)]
    assert summary(some, SEEDS)["failed"] == ["causality"]
    shared = [Check(name, "looked at") for name in CHECKS]
    assert summary(shared, SEEDS)["passed"]
