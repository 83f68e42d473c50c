"""The folder of a submission: README.md, submission.json, logs, requirements, bundle and audit.

Every number in README.md and submission.json comes from the report's summary.json, which was made
from the stages' details.json, which the logs hold; so they cannot disagree. The keys of
submission.json are those that records of the challenge have in common.
"""

import json
import shutil
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.runtime.errors import InputError, reading
from model.runtime.files import write_bytes
from model.runtime.provenance import read_recorded
from pocketlm.params.params import Params
from pocketlm.params.paths import ARTIFACTS, CONSTRAINTS, LOGS, STEPS, SUMMARY
from pocketlm.report.blocks import Block, Heading, Paragraph, Table, to_markdown
from pocketlm.report.document import result_table, significance
from pocketlm.submission.bundle import NAME, bundle, settings_of

Json = dict[str, Any]

AUDIT, RECORDS = ARTIFACTS / "audit", Path("records")
RESTORE = "restore it: `git checkout pyproject.toml constraints.txt`"
SCORING = ("torch", "numpy", "sentencepiece", "constriction", "brotli", "zstandard")
RULE = (
    "Counted are the artifact and the bundle, which holds the code of all stages, training "
    "included, as the challenge counts it; the tokenizer and installed libraries are not. Code: "
)


def require_passed(audit: Json, despite: bool) -> None:
    """Raise InputError if a check has failed, unless told to go on `despite` that."""
    if audit["failed"] and not despite:
        raise InputError(
            f"audit: {', '.join(audit['failed'])}: failed",
            f"see {AUDIT / 'audit.md'}, mend that and run again; submission.despite_audit: true "
            "writes the folder all the same, and says so on top",
        )


def folder_name(params: Params, summary: Json) -> str:
    """`<date>_<name>`, the day of the last run of test-time training, UTC."""
    return f"{summary['finished'][:10]}_{params.submission.name}"


def submission_json(params: Params, summary: Json, audit: Json) -> dict[str, Any]:
    """The content of submission.json."""
    runs, size, submission = summary["runs"], summary["size"], params.submission
    seconds = {(one["step"], one["stage"]): one["seconds"] for one in summary["stages"]}
    training, adapting = seconds["train", "training clock"], seconds["ttt_eval", "ttt"]
    artifacts = [run["artifact_bytes"] for run in runs]
    passed = {name: name not in audit["failed"] for name in _checks(audit)}
    test = summary["test"]
    return {
        "author": submission.author,
        "github_id": submission.github_id,
        "name": submission.name,
        "blurb": submission.blurb,
        "date": summary["finished"][:10],
        "track": submission.track,
        "val_loss": summary["ttt"]["loss"],
        "val_loss_std": summary["ttt"]["loss_std"],
        "val_bpb": summary["ttt"]["bpb"],
        "val_bpb_std": summary["ttt"]["bpb_std"],
        "seeds": [run["seed"] for run in runs],
        "seed_results": {
            str(run["seed"]): {
                "val_loss": run["ttt"]["loss"],
                "val_bpb": run["ttt"]["bpb"],
                "artifact_bytes": run["artifact_bytes"],
                "steps": run["steps"],
                "train_seconds": training[number],
                "eval_seconds": adapting[number],
            }
            for number, run in enumerate(runs)
        },
        "baseline": test and test["baseline"],
        "delta_nats": test and test["difference"],
        "p_value": test and test["p"],
        "artifact_bytes_mean": statistics.fmean(artifacts),
        "artifact_bytes_max": max(artifacts),
        "bytes_code": size["code_bytes"],
        "bytes_code_scoring": size["scoring_code_bytes"],
        "bytes_total": size["total_bytes"],
        "train_steps_mean": statistics.fmean(run["steps"] for run in runs),
        "hardware": _hardware(summary),
        "pytorch_version": summary["origins"][0]["versions"]["torch"],
        "compliance": {
            "train_under_600s": max(training) <= 600,
            "artifact_under_16mb": size["total_bytes"] <= 16_000_000,
            "eval_under_600s": max(adapting) <= 600,
            "score_first_ttt": passed.get("score before update", False),
            "three_seeds": len(runs) >= 3,
            "audit": passed,
        },
    }


def readme(params: Params, summary: Json, audit: Json) -> str:
    """The content of README.md."""
    submission, failed, size = params.submission, audit["failed"], summary["size"]
    warning = f"THE AUDIT FAILS: {', '.join(failed)}. audit.md says what was found."
    name = submission.name.replace("_", " ")
    blocks: list[Block] = [
        Heading(1, name),
        *([Paragraph(warning)] if failed else []),
        *([Paragraph(submission.blurb)] if submission.blurb else []),
        *result_table(summary),
        Heading(2, "Seeds"),
        _seeds(summary),
        Paragraph(
            f"{RULE}{size['code_bytes']:,} bytes; without training "
            f"{size['scoring_code_bytes']:,} would do."
        ),
        Heading(2, "Significance"),
        *significance(summary),
        Heading(2, "Audit"),
        _audit(audit),
        Heading(2, "Run it"),
        Paragraph(
            f"`{NAME}` holds all code. In an empty folder, with what requirements.txt lists first: "
            f"`python {NAME} --artifact model.pocket --tokenizer tokenizer.model --text FILE`; "
            f"`python {NAME} --help` says more. The artifacts are not in this folder."
        ),
    ]
    return to_markdown(blocks)


def scoring_requirements(constraints: Path) -> str:
    """Lines of requirements.txt: what a bundle needs to score, pinned."""
    pins = _pins(constraints)
    return "".join(f"{name}=={pins[name]}\n" for name in SCORING)


def requirements(project: Path, constraints: Path) -> str:
    """requirements.txt: what the bundle needs to score, then what its other stages need, pinned."""
    with reading(project, RESTORE):
        needed = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    pins = _pins(constraints)
    names = [name for name in pins if any(_is_named(name, need) for need in needed)]
    others = "".join(f"{name}=={pins[name]}\n" for name in names if name not in SCORING)
    return f"# to score\n{scoring_requirements(constraints)}# the stages besides\n{others}"


def _pins(constraints: Path) -> dict[str, str]:
    """The version of each package that constraints.txt names."""
    with reading(constraints, RESTORE):
        lines = constraints.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def logs(seeds: Sequence[int]) -> dict[str, bytes]:
    """The logs of every seed by their names in the folder."""
    found = {}
    for seed in seeds:
        for stage in STEPS:
            path = LOGS / stage / f"seed{seed}.jsonl"
            with reading(path, f"run {stage}"):
                found[f"logs/seed{seed}_{stage}.jsonl"] = path.read_bytes()
    return found


def write_folder(params: Params) -> Path:
    """Write records/<date>_<name>/ from the report and the audit in force; returns its path.

    An older folder of the same name is replaced as a whole. Raises InputError if report or audit
    are absent or damaged, or are not of the code here, or if a check has failed.
    """
    summary, audit = read_recorded(SUMMARY, "report"), read_recorded(AUDIT / "audit.json", "audit")
    require_passed(audit, params.submission.despite_audit)
    code = bundle(settings_of(params))
    if len(code) != summary["size"]["code_bytes"]:
        raise InputError(
            f"{SUMMARY}: counts {summary['size']['code_bytes']} bytes of code, but "
            f"the bundle has {len(code)}",
            "`snakemake --cores all submission`, which makes the report anew before",
        )
    values = json.dumps(submission_json(params, summary, audit), indent=2, allow_nan=False)
    pins = requirements(Path("pyproject.toml"), CONSTRAINTS)
    contents = {
        "README.md": readme(params, summary, audit).encode(),
        "submission.json": f"{values}\n".encode(),
        "requirements.txt": pins.encode(),
        NAME: code,
        "params.yaml": Path("params.yaml").read_bytes(),
        **{name: (AUDIT / name).read_bytes() for name in ("audit.json", "audit.md")},
        **logs(params.seeds),
    }
    folder = RECORDS / folder_name(params, summary)
    _replace(folder, contents)
    return folder


def _replace(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write a folder whole: it appears under its name when all is in it."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for name, content in contents.items():
        write_bytes(part / name, content)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _is_named(name: str, requirement: str) -> bool:
    return requirement.startswith(name) and not requirement[len(name) : len(name) + 1].isalnum()


def _checks(audit: Json) -> list[str]:
    return list(dict.fromkeys(one["name"] for one in audit["checks"]))


def _hardware(summary: Json) -> str:
    trained = [one for one in summary["origins"] if one["step"] == "train"]
    return "; ".join(dict.fromkeys(f"{one['processes']} x {one['device']}" for one in trained))


def _seeds(summary: Json) -> Table:
    rows = [
        [
            str(run["seed"]),
            f"{run['ttt']['loss']:.8f}",
            f"{run['ttt']['bpb']:.8f}",
            f"{run['steps']:,}",
            f"{run['artifact_bytes']:,}",
            f"{run['total_bytes']:,}",
        ]
        for run in summary["runs"]
    ]
    return Table(["seed", "val_loss", "val_bpb", "steps", "artifact bytes", "with code"], rows)


def _audit(audit: Json) -> Table:
    rows = []
    for name in _checks(audit):
        found = [one for one in audit["checks"] if one["name"] == name]
        state = "passed" if all(one["passed"] for one in found) else "FAILED"
        rows.append([name, state, found[0]["evidence"]])
    return Table(["check", "", "evidence, of the first seed"], rows)
