"""The report, its headline and the README's table, rendered from one summary."""

import json
from collections.abc import Sequence
from typing import Any

from model.evaluation.length_weights import BYTES_PER_TOKEN
from pocketlm.report.blocks import (
    Bar,
    Bars,
    Block,
    Documents,
    Figure,
    Fold,
    Heading,
    Paragraph,
    Quote,
    Table,
    clean,
    short_commit,
)
from pocketlm.report.excerpts import END, TOKENS, Excerpt
from pocketlm.report.power import MOST, WANTED
from pocketlm.report.significance import Sample
from pocketlm.report.summary import welch_result

SCORE_NAMES = {
    "pre_quant": "trained, averaged weights",
    "quantized": "quantized",
    "sliding": "quantized, sliding window",
    "ttt": "quantized, with TTT",
}
TITLE = "Results"
BUDGETS = {"train": "training clock", "ttt_eval": "evaluation with TTT"}  # of time, by step


def report(summary: dict[str, Any], excerpts: Sequence[Excerpt]) -> list[Block]:
    """The whole report; excerpts: documents of the first seed to browse."""
    return [
        Heading(1, TITLE),
        *_opening(summary),
        Heading(2, "Pipeline"),
        *_pipeline(summary),
        Heading(2, "Scores by seed"),
        *_scores(summary),
        Heading(2, "Significance"),
        *significance(summary),
        Heading(2, "Training"),
        _loss_figure(),
        Heading(2, "What test-time training gains, and where"),
        *_gain(summary),
        Heading(2, "Quantization"),
        *_quantization(summary),
        Heading(2, "Bytes"),
        *_bytes(summary),
        Heading(2, "Documents, token by token"),
        *_documents(summary, excerpts),
        Heading(2, "Text by the model"),
        *_sample(summary),
        Heading(2, "Parameters"),
        *_parameters(summary),
        Heading(2, "Provenance"),
        *_provenance(summary),
    ]


def headline(summary: dict[str, Any], report_path: str) -> str:
    """The result in a few lines of plain text, ending in a newline."""
    seeds = [f"seed {run['seed']}" for run in summary["runs"]]
    rows = [["bits per byte", *seeds, "mean ± std"]]
    for score, name in SCORE_NAMES.items():
        values = [f"{run[score]['bpb']:.4f}" for run in summary["runs"]]
        rows.append([name, *values, _mean_std(summary[score], "bpb")])
    rows.append(_fineweb_row(summary))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines += ["", _plain(_gain_sentence(summary)), _plain(_verdict(summary))]
    lines += [_plain(sentence) for sentence in (*_overruns(summary), *_too_few(summary))]
    return "\n".join([*lines, f"report: {report_path}"]) + "\n"


def _fineweb_row(summary: dict[str, Any], mean_first: bool = False) -> list[str]:
    """The row of the result weighted to FineWeb's lengths of documents."""
    lengths = summary["lengths"]
    values = [f"{run['ttt']['bpb']:.4f}" for run in lengths["runs"]]
    mean = _mean_std(lengths["ttt"], "bpb")
    cells = [mean, *values] if mean_first else [*values, mean]
    return ["the same, weighted to FineWeb's lengths", *cells]


def result_table(summary: dict[str, Any]) -> list[Block]:
    """The README's table: one row per stage of the system, and the verdict."""
    rows = [
        [name, _mean_std(summary[score], "loss"), _mean_std(summary[score], "bpb")]
        for score, name in SCORE_NAMES.items()
    ]
    size = summary["size"]
    seeds = len(summary["runs"])
    return [
        Table([f"mean ± std of {seeds} seed{'s' * (seeds > 1)}", "nats/token", "bits/byte"], rows),
        Paragraph(
            f"Model and code take {_count(size['total_bytes'])} of the "
            f"{_count(size['budget_bytes'])} bytes allowed. {_verdict(summary)}"
        ),
    ]


def _opening(summary: dict[str, Any]) -> list[Block]:
    """The first screen: what was run, the result, whether the budgets are kept."""
    over = _overruns(summary)
    return [
        Paragraph(_what_was_run(summary)),
        Paragraph(_result(summary)),
        _result_of_seeds(summary),
        _budgets(summary),
        Paragraph(" ".join(over) if over else "Every budget of bytes and time is kept."),
        Paragraph(f"{_verdict(summary)}{_dropped(summary['runs'])}"),
        *(Paragraph(sentence) for sentence in _too_few(summary)),
    ]


def _what_was_run(summary: dict[str, Any]) -> str:
    preset, origins = summary["preset"], summary["origins"]
    devices = dict.fromkeys(f"{o['device']}, {_number(o['processes'], 'process')}" for o in origins)
    commits = dict.fromkeys(f"`{short_commit(origin['commit'])}`" for origin in origins)
    finished = summary["finished"].replace("T", " ")[:16]
    return (
        f"{_preset_name(preset)}; {_number(len(summary['runs']), 'seed')}; finished {finished} UTC "
        f"on {'; '.join(devices)}; commit {', '.join(commits)}."
    )


def _preset_name(preset: dict[str, Any] | None) -> str:
    if preset is None:
        return "No preset"
    changes = len(preset["changes"])
    return f"Preset `{preset['name']}`" + (
        f" with {_number(changes, 'parameter')} changed" if changes else ""
    )


def _result(summary: dict[str, Any]) -> str:
    scored, gain = summary["scored"], summary["gain"]["over_sliding_loss"]
    models = _number(len(summary["runs"]), "model")
    return (
        f"With test-time training (TTT) the {models}, one per seed, reach "
        f"{_mean_std(summary['ttt'], 'bpb')} bits per byte on "
        f"{_number(scored['documents'], 'held-out document')} "
        f"({_count(scored['tokens'])} tokens, {_count(scored['bytes'])} bytes of text), "
        f"{abs(gain):.4f} nats per token {'better' if gain >= 0 else 'WORSE'} than without."
    )


def _result_of_seeds(summary: dict[str, Any]) -> Table:
    """The result, the mean first; p and interval, if a test was made on this text."""
    runs, test = summary["runs"], summary["test"]
    measures = [
        ("with TTT, bits per byte", "ttt", "bpb"),
        ("with TTT, nats per token", "ttt", "loss"),
        ("sliding window, nats per token", "sliding", "loss"),
    ]
    rows = [
        [name, _mean_std(summary[score], unit), *(f"{run[score][unit]:.4f}" for run in runs)]
        for name, score, unit in measures
    ]
    gains = [f"{run['sliding']['loss'] - run['ttt']['loss']:+.4f}" for run in runs]
    rows.insert(1, _fineweb_row(summary, mean_first=True))
    rows.append(
        ["TTT gain, nats per token", f"{summary['gain']['over_sliding_loss']:+.4f}", *gains]
    )
    if test is not None and _same_text(summary):
        of = "gain" if test["baseline"] == "no_ttt" else f"gain over `{test['baseline']}`"
        interval = f"[{test['low']:+.4f}, {test['high']:+.4f}]"
        empty = [""] * len(runs)
        rows.append([f"{100 * test['level']:g} % interval of the {of}", interval, *empty])
        rows.append(["p, one-sided Welch test", _probability(test["p"]), *empty])
    return Table(["", "mean ± std", *_seed_names(runs)], rows)


def _budgets(summary: dict[str, Any]) -> Bars:
    """Bytes, and the seconds of the slowest seed, against what is allowed."""
    size = summary["size"]
    used, allowed = size["total_bytes"], size["budget_bytes"]
    bars = [Bar("model and code", f"{_count(used)} of {_count(allowed)} bytes", used / allowed)]
    for stage in summary["stages"]:
        if (budget := stage["budget"]) is not None:
            took = max(stage["seconds"])
            text = f"{took:,.1f} of {budget:,g} s"
            bars.append(Bar(BUDGETS[stage["step"]], text, took / budget))
    return Bars(bars)


def _pipeline(summary: dict[str, Any]) -> list[Block]:
    """What each step costs, then its parts."""
    rows = [
        [
            step["step"],
            f"{step['seconds']:,.1f}",
            str(step["processes"]),
            _cost(step["device_seconds"], step["on_gpu"]),
            _memory(step["peak_memory_mib"]),
            _count(step["bytes"]),
        ]
        for step in summary["pipeline"]
    ]
    header = ["step", "seconds", "processes", "cost of all seeds", "peak MiB", "bytes written"]
    note = Paragraph(
        "Seconds and bytes are means over the seeds, memory is the most of any process. The cost "
        "is processes times seconds, one GPU or CPU process each, without `tokenize`, which all "
        "seeds share."
    )
    return [Table(header, rows), note, *_time(summary)]


def _cost(device_seconds: float, on_gpu: bool) -> str:
    return f"{device_seconds / 3600:,.3f} {'GPU' if on_gpu else 'CPU'}-hours"


def _dropped(runs: Sequence[dict[str, Any]]) -> str:
    """How many documents were left out of training, a sentence if there are any."""
    dropped = max(run["dropped_documents"] for run in runs)
    if not dropped:
        return ""
    return (
        f" {_count(dropped)} document{'s' * (dropped > 1)} of the training files stood among the "
        "held-out ones and were not trained on."
    )


def _scores(summary: dict[str, Any]) -> list[Block]:
    runs = summary["runs"]
    tables = []
    for unit, title in (("loss", "nats per token"), ("bpb", "bits per byte")):
        rows = [
            [name, *(f"{run[score][unit]:.4f}" for run in runs), _mean_std(summary[score], unit)]
            for score, name in SCORE_NAMES.items()
        ]
        tables.append(Table([title, *_seed_names(runs), "mean ± std"], rows))
    share = [f"{_percent(r['total_bytes'], summary['size']['budget_bytes'])} %" for r in runs]
    sizes = Table(
        ["", *_seed_names(runs)],
        [
            ["optimizer steps", *(_count(run["steps"]) for run in runs)],
            ["tokens trained on", *(_count(run["train_tokens"]) for run in runs)],
            ["artifact + code, bytes", *(_count(run["total_bytes"]) for run in runs)],
            ["share of the budget", *share],
        ],
    )
    length, stride = summary["context"]
    note = Paragraph(
        f"The first two rows are plain evaluations in segments of {length} tokens; the sliding "
        f"window of {length} moves by {stride}. std is that of a sample (divisor n-1)."
    )
    return [*tables, note, sizes]


def significance(summary: dict[str, Any]) -> list[Block]:
    """The test, its numbers, and how far it can be relied upon."""
    if summary["test"] is None:
        reason = "`report.baseline` is `none`: no test was asked for."
        if len(summary["runs"]) == 1:
            reason += " One seed would allow none: it says nothing about the spread between seeds."
        return [Paragraph(reason)]
    test = welch_result(summary["test"])
    interval = f"[{test.low:+.6f}, {test.high:+.6f}]"
    table = Table(
        ["one-sided Welch test", "baseline", "with TTT"],
        [
            ["losses, nats per token", _losses(test.baseline), _losses(test.new)],
            ["n", str(test.baseline.n), str(test.new.n)],
            ["mean", f"{test.baseline.mean:.6f}", f"{test.new.mean:.6f}"],
            ["std, divisor n-1", f"{test.baseline.sample_std:.6f}", f"{test.new.sample_std:.6f}"],
            [
                "std, divisor n",
                f"{test.baseline.population_std:.6f}",
                f"{test.new.population_std:.6f}",
            ],
        ],
    )
    numbers = Paragraph(
        f"Difference of the means (baseline minus new): {test.difference:+.6f} nats, "
        f"{100 * test.level:g} % confidence interval {interval}. "
        f"t = {test.t:.3f} with {test.degrees_of_freedom:.2f} degrees of freedom."
    )
    return [
        Paragraph(f"Hypothesis: {test.hypothesis}. {_baseline_sentence(summary)}"),
        table,
        numbers,
        Paragraph(_verdict(summary)),
        Paragraph(f"{_paired_sentence(summary)} {_power_sentence(summary)}".strip()),
    ]


def _paired_sentence(summary: dict[str, Any]) -> str:
    paired = summary["test"]["paired"]
    if paired is None:
        return ""
    return (
        f"Student's test of pairs, the same seeds without and with TTT: t = {paired['t']:.3f}, "
        f"p = {_probability(paired['p'])}."
    )


def _power_sentence(summary: dict[str, Any]) -> str:
    """What to expect of a repetition, and how many seeds it should have."""
    test, power = summary["test"], summary["test"]["power"]
    seeds = power["seeds"]
    needed = (
        f"more than {MOST} seeds are needed"
        if seeds is None and test["difference"] > test["margin"]
        else "no number of seeds is expected to show it"
        if seeds is None
        else f"{seeds} are needed"
    )
    return (
        "Power: were the difference and the spread seen here the true ones, as many seeds would "
        f"show it (p < {test['significance']:g}) with a probability of {power['power']:.2f}; "
        f"for {WANTED:g}, {needed}. As many seeds as here show a difference of "
        f"{power['detectable']:.4f} nats or more with that probability."
    )


def _too_few(summary: dict[str, Any]) -> list[str]:
    """A warning if so few seeds would probably not show the claim again."""
    test = summary["test"]
    if test is None or not _same_text(summary) or test["power"]["power"] >= WANTED:
        return []
    return [f"TOO FEW SEEDS or too small a gain. {_power_sentence(summary)}"]


def _baseline_sentence(summary: dict[str, Any]) -> str:
    test = summary["test"]
    if test["baseline"] == "no_ttt":
        return (
            "The baseline is this run's own quantized models without TTT: the sliding evaluation "
            "of the same tokens, in which, too, a token sees the text before it. Every seed thus "
            "stands on both sides; the two samples are treated as independent all the same, "
            "although seeds that are good without TTT are also good with it, which makes this "
            "test stricter than one of pairs would be."
        )
    tokens, text_bytes = test["baseline_scored"]
    scored = summary["scored"]
    return (
        f"The baseline is `{test['baseline']}`, scored on {_count(tokens)} tokens and "
        f"{_count(text_bytes)} bytes; this run was scored on {_count(scored['tokens'])} tokens and "
        f"{_count(scored['bytes'])} bytes. Nats per token can be compared only on the same text "
        "with the same tokenizer."
    )


def _same_text(summary: dict[str, Any]) -> bool:
    """Whether the baseline was scored on the same text, but for the tail that some drop."""
    scored, wanted = summary["test"]["baseline_scored"], summary["scored"]
    pairs = zip(scored, (wanted["tokens"], wanted["bytes"]), strict=False)
    return all(abs(theirs - ours) <= 0.001 * theirs for theirs, ours in pairs)


def _verdict(summary: dict[str, Any]) -> str:
    """The outcome of the test in one sentence."""
    if summary["test"] is None:
        return "No significance test (`report.baseline` is `none`)."
    test = welch_result(summary["test"])
    level = summary["test"]["significance"]
    claimed = test.p < level
    baseline = summary["test"]["baseline"]
    own = "the same models with a sliding window instead of TTT"
    shown = own if baseline == "no_ttt" else f"`{baseline}`"
    if not _same_text(summary):
        return (
            f"No claim: {shown} was scored on other text than this run (see Significance), and "
            "losses of different texts cannot be compared."
        )
    return (
        f"Claim: {test.hypothesis}. p = {_probability(test.p)} (one-sided Welch test, "
        f"{test.new.n} seeds against {test.baseline.n} of {shown}): "
        f"{'below' if claimed else 'not below'} {level:g}, so the claim "
        f"{'holds' if claimed else 'is not made'}."
    )


def _gain_sentence(summary: dict[str, Any]) -> str:
    gain = summary["gain"]
    return (
        f"TTT gain: {gain['over_sliding_loss']:+.4f} nats per token "
        f"({gain['over_sliding_bpb']:+.4f} bits per byte) over the sliding evaluation, "
        f"{gain['over_plain_loss']:+.4f} over the plain one."
    )


def _loss_figure() -> Figure:
    return Figure(
        "loss_curves.svg",
        "Training loss of all seeds",
        "Training loss of each seed (smoothed; dots: each logged batch) and, at the right end, "
        "the held-out loss of its averaged weights.",
    )


def _gain(summary: dict[str, Any]) -> list[Block]:
    sentences = [
        f"{100 * point['tokens']:.0f} % of the tokens lie beyond position "
        f"{_count(point['position'])} and give {100 * point['gain']:.0f} % of the gain."
        for point in summary["tail"]
    ]
    return [
        Paragraph(
            "The gain of a token is its loss in the sliding evaluation minus its loss with TTT: "
            "the former is the fairer comparison, because there, too, a token sees the text "
            "before it. " + (" ".join(sentences) or "There is no gain in sum to be shared out.")
        ),
        Figure(
            "ttt_gain.svg",
            "TTT gain by position in the document",
            "Top: share of all tokens, and of the total TTT gain, beyond each position. "
            "Bottom: mean gain per token by position; the band spans the seeds, and neighboring "
            "positions share a point where tokens are few.",
        ),
        Figure(
            "ttt_gain_by_length.svg",
            "TTT gain by length of the document",
            "Mean gain per token of each document (dots, mean over the seeds) and of all documents "
            "of similar length (line).",
        ),
        *_lengths(summary["lengths"]),
    ]


def _lengths(lengths: dict[str, Any]) -> list[Block]:
    """Bits per byte by length of document, and weighted to FineWeb's lengths."""
    names = ("plain", "sliding", "ttt")
    tokens = sum(row["tokens"] for row in lengths["rows"])
    rows = [
        [
            f"to {row['most']:,}" if row["most"] else "more",
            _count(row["documents"]),
            f"{row['tokens'] / tokens:.1%}",
            f"{row['fineweb_tokens']:.1%}",
            *(f"{row[name]:.4f}" for name in names),
            f"{row['sliding'] - row['ttt']:+.4f}",
        ]
        for row in lengths["rows"]
    ]
    gain = lengths["sliding"]["bpb"] - lengths["ttt"]["bpb"]
    means = (_mean_std(lengths[name], "bpb") for name in names)
    rows.append(["weighted", "", "", f"{lengths['covered']:.1%}", *means, f"{gain:+.4f}"])
    header = ["tokens of a document", "documents", "share of tokens", "of FineWeb's"]
    return [
        Table([*header, "plain, bits/byte", "sliding", "with TTT", "gain"], rows),
        Paragraph(
            "Weighted: the mean of the rows by FineWeb's shares, as what TTT gains grows with "
            f"length. A document's tokens are its bytes by {BYTES_PER_TOKEN:.2f}, as of a token of "
            "FineWeb's at 8,192 pieces; the gain is that over the sliding evaluation."
        ),
    ]


def _quantization(summary: dict[str, Any]) -> list[Block]:
    rows = [
        [
            f"`{tensor['tensor']}`",
            tensor["storage"],
            _count(tensor["parameters"]),
            f"{tensor['bits_per_weight']:.2f}",
            "" if tensor["relative_error"] is None else f"{tensor['relative_error']:.1e}",
            _count(tensor["bytes"]),
        ]
        for tensor in summary["tensors"]
    ]
    header = ["tensor", "storage", "weights", "bits/weight", "relative error", "bytes"]
    return [
        Paragraph(
            "The budget is spent where a bit lowers the loss most. The relative error is the mean "
            "squared error of a matrix's output over its mean square where GPTQ rounds (`gptq`), "
            "and that of the weights elsewhere. Tensors that share a compressed stream share its "
            "bytes by the entropy of their codes. Means over the seeds."
        ),
        Figure(
            "tensors.svg",
            "Bits per weight and relative error of each tensor and layer",
            "Bits per weight and relative error of each rounded tensor, by layer; the column to "
            "the left of the layers is of tensors that belong to none.",
        ),
        Fold("All tensors", [Table(header, rows)]),
    ]


def _documents(summary: dict[str, Any], excerpts: Sequence[Excerpt]) -> list[Block]:
    return [
        Paragraph(
            f"{_number(len(excerpts), 'document')} of {_count(summary['scored']['documents'])}, "
            f"drawn by a seeded rule, one from each group of similar length, shortest first; of "
            f"long ones the last {_count(TOKENS)} tokens. Colors are the loss of each token, of "
            f"seed {summary['runs'][0]['seed']}. Characters of several byte tokens have the sum "
            f"of their losses; {END} is the end of the document."
        ),
        Documents(excerpts),
    ]


def _sample(summary: dict[str, Any]) -> list[Block]:
    return [
        Paragraph(
            f"A document that the quantized model of seed {summary['sample']['seed']} wrote by "
            "itself, sampled from the beginning on with a fixed seed."
        ),
        Quote(summary["sample"]["text"]),
    ]


def _parameters(summary: dict[str, Any]) -> list[Block]:
    preset = summary["preset"]
    if preset is None:
        return [Paragraph("There is no preset in `conf/` to compare with.")]
    if not preset["changes"]:
        return [Paragraph(f"All are those of the preset `{preset['name']}`.")]
    rows = [
        [f"`{change['key']}`", *(_value(change[side]) for side in ("preset", "used"))]
        for change in preset["changes"]
    ]
    return [
        Paragraph(f"These differ from the preset `{preset['name']}`, the nearest one."),
        Table(["parameter", "preset", "used"], rows),
    ]


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _bytes(summary: dict[str, Any]) -> list[Block]:
    runs, size = summary["runs"], summary["size"]
    budget = size["budget_bytes"]
    rows = [
        [
            f"seed {run['seed']}",
            _count(run["artifact_bytes"]),
            _count(size["code_bytes"]),
            _count(run["total_bytes"]),
            f"{_percent(run['total_bytes'], budget)} %",
            f"{run['bits_per_weight']:.3f}",
            run["compressor"],
        ]
        for run in runs
    ]
    header = ["", "artifact", "code", "total", f"of {_count(budget)}", "bits/weight", "compressor"]
    figure = Figure(
        "artifact_bytes.svg",
        "Bytes of the submission by part",
        "Bytes of each part of the submission, mean over the seeds.",
    )
    code = Paragraph(
        f"The code is that of the checkout that made this report, training included, as one file: "
        f"{_count(size['code_bytes'])} bytes; what evaluates alone would be "
        f"{_count(size['scoring_code_bytes'])}. `quantize.code_reserve_bytes` left "
        f"{_count(size['code_reserve_bytes'])} for it when the artifact was made; a total above "
        "the budget fails."
    )
    return [Table(header, rows), code, figure]


def _time(summary: dict[str, Any]) -> list[Block]:
    runs = summary["runs"]
    rows = []
    for stage in summary["stages"]:
        budget = stage["budget"]
        state = "" if budget is None else f"{budget:g}"
        if budget is not None and max(stage["seconds"]) > budget:
            state += ", exceeded"
        seconds = [f"{value:.1f}" for value in stage["seconds"]]
        rows.append([f"{stage['step']}: {stage['stage']}", *seconds, state])
    speeds = Table(
        ["", *_seed_names(runs)],
        [
            ["training, tokens/s", *(f"{r['train_tokens_per_second']:,.0f}" for r in runs)],
            ["TTT, tokens/s", *(f"{r['ttt_tokens_per_second']:,.0f}" for r in runs)],
        ],
    )
    note = Paragraph(
        "The training clock leaves out warm-up and evaluation; the budget of evaluation is "
        "for TTT, which gives the result; the other two evaluations are for analysis. A whole "
        "step lasts from the start to the end of the process that finished it."
    )
    return [Table(["seconds", *_seed_names(runs), "budget"], rows), note, speeds]


def _overruns(summary: dict[str, Any]) -> list[str]:
    """A sentence per budget of time that is exceeded."""
    sentences = []
    for stage in summary["stages"]:
        worst = max(stage["seconds"])
        if stage["budget"] is not None and worst > stage["budget"]:
            sentences.append(
                f"OVER BUDGET: {stage['step']} ({stage['stage']}) took up to {worst:.1f} s; "
                f"{stage['budget']:g} s are allowed."
            )
    return sentences


def _provenance(summary: dict[str, Any]) -> list[Block]:
    origins = summary["origins"]
    rows = [
        [
            origin["step"],
            ", ".join(map(str, origin["seeds"])),
            f"`{short_commit(origin['commit'])}`",
            f"{origin['processes']} on {origin['device']}",
            f"Python {origin['python']}, torch {origin['versions'].get('torch')}",
        ]
        for origin in origins
    ]
    commits = {origin["commit"] for origin in origins}
    blocks: list[Block] = [Table(["step", "seeds", "commit", "processes", "versions"], rows)]
    if None in commits:
        nameless = ", ".join(dict.fromkeys(o["step"] for o in origins if o["commit"] is None))
        blocks.append(
            Paragraph(
                f"The provenance is incomplete: git named no commit when these ran: {nameless}. "
                "Which code made their results is not recorded."
            )
        )
    if len(commits) > 1:
        blocks.append(
            Paragraph(
                f"The results were made at {len(commits)} different commits. DVC runs a step again "
                "whenever the content of one of its inputs changes, code included, so commits "
                "that differ only elsewhere mix safely."
            )
        )
    return blocks


def _seed_names(runs: Sequence[dict[str, Any]]) -> list[str]:
    return [f"seed {run['seed']}" for run in runs]


def _mean_std(spread: dict[str, Any], unit: str) -> str:
    std = spread[f"{unit}_std"]
    return f"{spread[unit]:.4f}" + (f" ± {std:.4f}" if std is not None else "")


def _losses(sample: Sample) -> str:
    return ", ".join(f"{value:.6f}" for value in sample.values)


def _probability(p: float) -> str:
    return f"{p:.6f}" if p >= 1e-5 else f"{p:.1e}"


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _number(count: int, thing: str) -> str:
    """`1 seed`, `3 seeds`, `2 processes`."""
    plural = "es" if thing.endswith("s") else "s"
    return f"{_count(count)} {thing}{plural * (count != 1)}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}"


def _memory(mebibytes: float | None) -> str:
    return "not measured" if mebibytes is None else _count(mebibytes)


def _plain(text: str) -> str:
    """Text for a terminal, without the marks of code."""
    return clean(text.replace("`", ""))
