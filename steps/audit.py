"""Audit: checks of every seed's artifact and results, by experiment, recount and trace.

The stage succeeds when all checks have been made, whatever they found: the page shows it, and the
submission is what refuses. It runs in one process, and on a GPU if there is one.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from model.artifact.format import load_artifact
from model.data.loader import validation_documents
from model.data.shards import MANIFEST, SPLITS
from model.data.tokenizer import Tokenizer, check_vocabulary
from model.evaluation.score import TTT, WITHOUT_ADAPTATION
from model.kernels import dispatch
from model.runtime.files import SIDECAR, read_json, write_bytes, write_json
from model.runtime.process import use_compile_cache
from model.runtime.progress import progress
from pocketlm.audit import records, text
from pocketlm.audit.budgets import byte_budget, evaluation_clock, training_clock, training_data
from pocketlm.audit.checks import CHECKS, Check, failed
from pocketlm.audit.experiments import Experiments
from pocketlm.audit.isolation import TracedBundle, isolation
from pocketlm.audit.page import TITLE, page, summary
from pocketlm.audit.subject import Subject
from pocketlm.params.paths import COMPILE_CACHE, DETAILS, STEPS, TOKENS
from pocketlm.report.blocks import to_html, to_markdown
from pocketlm.submission.bundle import NAME, write_bundle
from steps.common import StageRun, load_tokens, run

KEYS = (
    "seeds",
    "model.sequence_length",
    "evaluate",
    "ops",
    "ttt",
    "report.train_budget_seconds",
    "report.evaluate_budget_seconds",
)


class Audit:
    """What all seeds share: tokens, tokenizer, documents, the bundle."""

    def __init__(self, stage: StageRun) -> None:
        self.stage, self.params = stage, stage.params
        use_compile_cache(COMPILE_CACHE)
        self.manifest, shards = load_tokens(*SPLITS)
        with stage.reading(shards):
            self.tokenizer = Tokenizer(self.manifest.tokenizer)
            evaluate = self.params.evaluate
            self.documents = validation_documents(
                self.manifest, evaluate.documents, evaluate.offset
            )
        self.tokenize_seconds = read_json(TOKENS.parent / DETAILS)["seconds"]
        self.text = text.Decoded.of(self.documents, self.manifest, self.tokenizer)
        dispatch.configure(device=stage.group.device, **stage.implementations(KEYS))
        self.bundle = stage.work / NAME
        write_bundle(self.bundle, self.params)

    def of_all(self) -> Iterator[Check]:
        """The checks of text and records that no seed has to itself."""
        yield text.byte_table(self.tokenizer)
        yield text.held_out(self.manifest, self.documents)
        yield records.environment(self.params.seeds)

    def of_seed(self, seed: int) -> Iterator[Check]:
        """The checks of one seed."""
        artifact = records.place("quantize", seed) / "model.pocket"
        model = load_artifact(artifact, self.stage.group.device)
        check_vocabulary(self.tokenizer, model.config.vocabulary, "train again with these tokens")
        subject = Subject(model, self.documents, self.params, self.stage.group)
        sample = [subject.cut(number) for number in subject.sample]
        # Traced beside the experiments, which use one core.
        with TracedBundle(self.bundle, artifact, self.manifest, sample, self.tokenizer) as traced:
            yield from self.records_of(seed, artifact)
            files = self.tables(seed)
            read = {file: text.read_table(file) for file in set(files.values())}
            tables = {way: read[file] for way, file in files.items()}
            yield text.counts(tables, self.text, self.manifest)
            experiments = Experiments(subject)
            self.stage.log.event("order", seed=seed, documents=experiments.order())
            yield from experiments.checks()
            yield experiments.stored_scores(tables)
            yield from isolation(traced, experiments.losses(TTT), subject.rounding)

    def tables(self, seed: int) -> dict[str, Path]:
        """The tables of losses by way of scoring."""
        evaluate, ttt = (
            records.place(stage, seed) / "losses.parquet" for stage in ("evaluate", "ttt_eval")
        )
        return {**dict.fromkeys(WITHOUT_ADAPTATION, evaluate), TTT: ttt}

    def records_of(self, seed: int, artifact: Path) -> Iterator[Check]:
        """Bytes, clocks, hashes and logs."""
        train, quantize, evaluate, ttt = (
            read_json(records.place(stage, seed) / DETAILS) for stage in STEPS
        )
        logs = {stage: records.log_of(stage, seed) for stage in STEPS}
        training = self.params.report.train_budget_seconds
        evaluation = self.params.report.evaluate_budget_seconds
        yield byte_budget(artifact, self.bundle, quantize)
        yield training_clock(train, quantize, self.tokenize_seconds, logs["train"], training)
        yield training_data(logs)
        yield evaluation_clock(ttt, evaluate, logs["ttt_eval"], evaluation)
        yield records.hashes(seed)
        yield records.logs(seed)

    def inputs(self) -> list[Path]:
        """What was read, but for the tokens, which manifest.json names."""
        files = [TOKENS / MANIFEST]
        for seed in self.params.seeds:
            files += [
                records.place(stage, seed) / name for stage in STEPS for name in (DETAILS, SIDECAR)
            ]
            files += [records.log_of(stage, seed) for stage in STEPS]
            files += [records.place("quantize", seed) / "model.pocket", *self.tables(seed).values()]
        return list(dict.fromkeys(files))


def main(stage: StageRun) -> None:
    """Make all checks; write page, audit.json and metrics, and say the verdict."""
    stage.open_log(KEYS)
    job, seeds = Audit(stage), stage.params.seeds
    checks = list[Check]()
    with progress("audit: checks", len(CHECKS) * len(seeds), stage.group.is_main) as bar:
        for seed in (None, *seeds):
            found = job.of_all() if seed is None else job.of_seed(seed)
            for check in found:
                checks.append(dataclasses.replace(check, seed=seed))
                stage.log.event("check", **checks[-1].to_json())
                if bar:
                    bar.advance(len(seeds) if seed is None else 1)
    output, blocks, names = stage.output, page(checks, seeds), failed(checks, seeds)
    texts = {"audit.md": to_markdown(blocks), "audit.html": to_html(blocks, TITLE, {})}
    for name, content in texts.items():
        write_bytes(output / name, content.encode())
    write_json(output / "audit.json", summary(checks, seeds))
    metrics = {"failed": sum(not check.passed for check in checks)}
    details = {
        "checks": len(checks),
        **metrics,
        "passed": {name: name not in names for name in CHECKS},
        "seconds": round(time.perf_counter() - stage.started, 2),
    }
    outputs = [output / name for name in (*texts, "audit.json")]
    stage.publish(metrics, details, KEYS, job.inputs(), outputs)
    for check in checks:
        if not check.passed:
            print(f"audit: {check.title}: {check.problems[0]}", file=sys.stderr)
    verdict = f"FAILED: {', '.join(names)}" if names else "all checks passed"
    print(f"audit: {verdict}; {output / 'audit.md'}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run("audit", main, seeded=False)
