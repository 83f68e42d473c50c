"""The parameter schema: every mistake is named with its key, its reason and its repair."""

import ast
import contextlib
import dataclasses
import json
import re
import tempfile
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any, get_type_hints

import pytest
import yaml
from dvc.utils.hydra import apply_overrides
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.config import TEXT_SUFFIXES
from model.data.sources.files import READERS
from model.runtime.errors import InputError
from model.runtime.settings import Settings
from pocketlm.params.load import check_params, load_params
from pocketlm.params.params import Params
from pocketlm.params.paths import BASELINES, TOKENIZERS
from pocketlm.params.presets import compose, is_preset, presets, render
from pocketlm.params.renamed import RENAMED
from pocketlm.submission import bundle
from pocketlm.workflow.closure import COUNTING, closure
from tests.helpers.presets import preset

ROOT = Path(__file__).parents[2]
SECTIONS: dict[str, type[Settings]] = {
    name: kind
    for name, kind in get_type_hints(Params).items()
    if isinstance(kind, type) and issubclass(kind, Settings)
}

STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.fixture
def values() -> dict[str, Any]:
    """The demo preset as plain values."""
    return dataclasses.asdict(preset("demo"))


def changed(values: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """`values` with one key of the form section.name (or name) set."""
    place = values
    *path, name = key.split(".")
    for part in path:
        place = place[part]
    place[name] = value
    return values


def problem(values: Any) -> str:
    with pytest.raises(InputError) as caught:
        check_params(values, "params.yaml")
    return str(caught.value)


def test_committed_file_is_the_demo() -> None:
    assert (ROOT / "params.yaml").read_text() == render(compose("demo"))


@pytest.mark.parametrize("name", presets(ROOT / "conf"))
def test_presets_survive_the_file(name: str, tmp_path: Path) -> None:
    params = compose(name)
    path = tmp_path / "params.yaml"
    path.write_text(render(params))
    assert load_params(path) == params
    assert yaml.safe_load(path.read_text()) == dataclasses.asdict(params)  # YAML 1.1 reads the same


@pytest.mark.parametrize("name", ["h100", "best"])
@pytest.mark.parametrize("processes", [4, 8])
def test_presets_of_gpus_suit_one_host_of_any_size(name: str, processes: int) -> None:
    """The batch stays as it is, and what a process takes at once is no less than a context."""
    params = compose(name, [f"execution.processes={processes}"])
    span = params.train.microbatch(processes)
    assert params.train.tokens_per_step % (processes * span) == 0
    assert params.model.sequence_length <= span <= params.train.tokens_per_microbatch


def test_every_value_is_explained() -> None:
    above = ""
    for line in render(compose("demo")).splitlines():
        if re.match(r" *\w+:", line):  # and no item of a list
            assert "# " in line or above.strip().startswith("# "), line
        above = line


def test_overrides_and_their_mistakes() -> None:
    assert compose("demo", ["ttt.lr=3e-4"]).ttt.lr == 3e-4
    with pytest.raises(InputError, match="rl"):
        compose("demo", ["ttt.rl=3e-4"])
    with pytest.raises(InputError, match="choose one of best, demo, h100, record"):
        compose("laptop")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("ttt.rnak", "ttt.rank"),
        ("seed", "seeds"),
        ("trian", "train"),
        ("model.head", "model.heads"),
    ],
)
def test_misspelt_key_names_the_nearest(values: dict[str, Any], key: str, nearest: str) -> None:
    text = problem(changed(values, key, 1))
    assert f"params.yaml: {key}: unknown key" in text
    assert f"did you mean {nearest}?" in text


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_key_names_the_new_one(values: dict[str, Any], old: str, new: str) -> None:
    text = problem(changed(values, old, 1))
    assert f"params.yaml: {old}: was renamed to {new}" in text
    assert f"write {new} instead" in text


def test_renamed_keys_are_gone_and_the_new_ones_exist() -> None:
    keys = {f"{section}.{key}" for section, kind in SECTIONS.items() for key in fields(kind)}
    assert set(RENAMED.values()) <= keys
    assert not set(RENAMED) & (keys | set(fields(Params)))


def test_a_misspelt_old_name_leads_to_the_new_one(values: dict[str, Any]) -> None:
    assert "did you mean execution.log_every?" in problem(changed(values, "train.log_evry", 1))


def test_unknown_key_lists_the_known(values: dict[str, Any]) -> None:
    assert "known keys: attention" in problem(changed(values, "ops.zzzzzz", 1))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("model.layers", "4", "valid integer"),
        ("model.layers", 2.5, "valid integer"),
        ("model.smear_gate", 1, "valid boolean"),
        ("train.matrix_lr", "fast", "valid number"),
        ("train.matrix_lr", -0.1, "greater than 0"),
        ("train.ema_window", 1.5, "less than or equal to 1"),
        ("data.source", "internet", "'docstrings', 'files' or 'fineweb'"),
        ("seeds", [0, -1], "greater than or equal to 0"),
    ],
)
def test_wrong_values(values: dict[str, Any], key: str, value: object, reason: str) -> None:
    text = problem(changed(values, key, value))
    assert f"params.yaml: {key}" in text
    assert reason in text


def test_missing_key(values: dict[str, Any]) -> None:
    del values["ttt"]["lr"]
    assert "params.yaml: ttt.lr: missing" in problem(values)


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({"model.heads": 3}, "model.heads", "do not divide into 2 kv_heads"),
        ({"model.rope_width": 15}, "model.rope_width", "odd"),
        ({"model.rope_width": 64}, "model.rope_width", "larger than head_width"),
        ({"model.value_layers": [4]}, "model.value_layers", "not among 0..3"),
        ({"model.vocabulary": 512}, "model.vocabulary", "differs from tokenizer.vocabulary"),
        (
            {"model.vocabulary": 65537, "tokenizer.vocabulary": 65537},
            "tokenizer.vocabulary",
            "2 bytes per token",
        ),
        ({"quantize.budget_bytes": 300_000}, "quantize.budget_bytes", "cannot hold"),
        ({"quantize.code_reserve_bytes": 16_000_000}, "quantize.code_reserve_bytes", "no room"),
        ({"quantize.compressors": []}, "quantize.compressors", "is empty"),
        ({"execution.processes": 3}, "execution.processes", "do not divide train.tokens_per_step"),
        ({"train.tokens_per_microbatch": 3000}, "train.tokens_per_step", "not a multiple"),
        (
            {"train.tokens_per_microbatch": 128},
            "train.tokens_per_microbatch",
            "shorter than model.sequence_length",
        ),
        ({"train.cooldown": 0}, "train.qat_threshold", "never reached"),
        (
            {"train.cooldown": 0.003, "train.steps": 2000},
            "train.qat_threshold",
            "multiplier of the last step is 0.167",
        ),
        ({"train.min_lr": 0.15}, "train.qat_threshold", "multiplier of the last step is 0.15"),
        *(
            ({f"train.{key}": phases}, f"train.{key}", "is no pair [until, share]")
            for key in ("batch_schedule", "context_schedule")
            for phases in ([[0.5]], [[0.5, 0.0]], [[0.5, 1.1]], [[1, 0.5]], [[0.5, 0.5]] * 2)
        ),
        (
            {"train.batch_schedule": [[0.5, 0.4]], "train.tokens_per_microbatch": 256}
            | {"execution.processes": 4},
            "execution.processes",
            "would take 128 tokens of a step at once, fewer than model.sequence_length (256)",
        ),
        (
            {"train.batch_schedule": [[0.5, 0.4]], "train.tokens_per_microbatch": 256}
            | {"train.tokens_per_step": 1536, "execution.processes": 3},
            "execution.processes",
            "3 processes do not divide a batch of train.batch_schedule (512)",
        ),
        ({"evaluate.sliding_stride": 257}, "evaluate.sliding_stride", "skipped"),
        ({"ttt.context": 8}, "ttt.context", "shorter than largest_chunk"),
        ({"ttt.context": 16, "ttt.refresh": 2}, "ttt.refresh", "there are none"),
        ({"ttt.mode": "window", "ttt.bptt_chunks": 2}, "ttt.bptt_chunks", "mode window recomputes"),
        ({"ttt.sites": [], "ttt.hash_buckets": 0}, "ttt.sites", "nothing would adapt"),
        ({"data.source": "files"}, "data.files", "is empty"),
        ({"data.source": "files", "data.files": ["a/*", "a/*.csv"]}, "data.files", "*.csv names"),
        ({"data.source": "files", "data.files": ["a/README"]}, "data.files", "unknown kind"),
        ({"data.validation_files": ["v.json"]}, "data.validation_files", "v.json names files"),
        ({"data.validation_fraction": 0.0}, "data.validation_fraction", "nothing to evaluate on"),
        ({"data.validation_fraction": 1.0}, "data.validation_fraction", "nothing to train on"),
        ({"seeds": []}, "seeds", "is empty"),
        ({"seeds": [1, 1]}, "seeds", "twice"),
        ({"report.baseline": "records/none.json"}, "report.baseline", "no such file"),
        (
            {"report.baseline": "records/demo/summary.json"},
            "report.baseline",
            "not lie in records/",
        ),
        ({"tokenizer.model": "none.model"}, "tokenizer.model", "no such file"),
        ({"tokenizer.model": "README.md"}, "tokenizer.model", "not lie in tokenizers/"),
    ],
)
def test_impossible_combinations(
    values: dict[str, Any], changes: dict[str, object], key: str, reason: str
) -> None:
    for name, value in changes.items():
        changed(values, name, value)
    text = problem(values)
    assert f"params.yaml: {key}: " in text
    assert reason in text
    assert "\n  repair: " in text


@pytest.mark.parametrize(
    "name", ["a/*", "a/**", "a/b*", "a.d/*.zst", "a/*l", "[ab].txt", "b.jsonl.zst", "*.parquet"]
)
def test_globs_that_may_match_readable_files_are_accepted(
    values: dict[str, Any], name: str
) -> None:
    values["data"] |= {"source": "files", "files": [name]}
    assert check_params(values, "params.yaml").data.files == [name]


def test_a_share_that_is_not_used_may_be_any(values: dict[str, Any]) -> None:
    values["data"] |= {"validation_files": ["v.txt"], "validation_fraction": 0.0}
    assert check_params(values, "params.yaml").data.validation_fraction == 0.0


def test_kinds_of_files_are_those_that_can_be_read() -> None:
    assert tuple(READERS) == TEXT_SUFFIXES


def test_every_mistake_is_listed_at_once(values: dict[str, Any]) -> None:
    text = problem(changed(changed(values, "ttt.rnak", 1), "model.layers", "4"))
    assert "ttt.rnak" in text
    assert "model.layers" in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"seeds: [0, 1", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"", "not a mapping"),
        (b"seeds: [0]\nseeds: [1]\n", "duplicate key"),
    ],
)
def test_unreadable_files(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        load_params(path)


def test_absent_file_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pocketlm preset demo"):
        load_params(tmp_path / "params.yaml")


def test_number_without_a_point(tmp_path: Path) -> None:
    path, params = tmp_path / "params.yaml", compose("demo", ["ttt.lr=1e-3"])
    text = render(params)
    path.write_text(text.replace("  lr: 0.001 ", "  lr: 1e-3 "))
    assert path.read_text() != text
    assert load_params(path) == params


def test_matrix_values_of_the_record() -> None:
    assert compose("record").model.matrix_values == 25_952_256


# What the program reads of the parameters, found in its source: `params.train.steps` counts as
# train.steps, and so does `settings.steps` in a file where `settings` is annotated as TrainConfig
# or assigned from `params.train`.


def program_files() -> list[Path]:
    folders = ("model", "pocketlm", "steps")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return [file for file in files if not is_settings(file)]


def is_settings(file: Path) -> bool:
    """Whether a file declares or composes the parameters, which is no use of them."""
    return file.name == "config.py" or file.parent == ROOT / "pocketlm/params"


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def last_name(node: ast.AST | None) -> str | None:
    """`c` of the expressions `c`, `a.b.c` and of the annotation "C" (in quotes)."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Constant):
        return str(node.value)
    return node.id if isinstance(node, ast.Name) else None


def names_of_sections(module: ast.Module) -> dict[str, set[str]]:
    """Names in a file that stand for a section, with the sections they may stand for."""
    types = {model.__name__: section for section, model in SECTIONS.items() if model}
    names = {section: {section} for section in SECTIONS}

    def add(target: ast.AST, value: ast.AST | None) -> None:
        source = last_name(value) or ""
        section = types.get(source, source)
        if section in SECTIONS and (name := last_name(target)):
            names.setdefault(name, set()).add(section)

    for node in ast.walk(module):
        if isinstance(node, ast.arg):
            for part in ast.walk(node.annotation) if node.annotation else ():
                add(ast.Name(node.arg), part)
        elif isinstance(node, ast.AnnAssign):
            add(node.target, node.annotation)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                if both and any(isinstance(part, ast.Starred) for part in ast.walk(node.value)):
                    continue
                for one, value in (
                    zip(target.elts, node.value.elts, strict=True)  # type: ignore[attr-defined]
                    if both
                    else [(target, node.value)]
                ):
                    add(one, value)
    return names


def keys_read(file: Path) -> set[str]:
    """Keys `section.name` (or a top-level `name`) that a file reads."""
    module, keys = tree(file), set()
    names = names_of_sections(module)
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute):
            owner = last_name(node.value)
            keys |= {f"{section}.{node.attr}" for section in names.get(owner or "", ())}
            if owner in ("params", "PARAMS"):
                keys.add(node.attr)
        if isinstance(node, ast.keyword) and node.arg is None:  # f(**dataclasses.asdict(section))
            call = node.value
            if isinstance(call, ast.Call) and last_name(call.func) == "asdict":
                for section in names.get(last_name(call.args[0]) or "", ()):
                    keys |= {f"{section}.{key}" for key in fields(SECTIONS[section])}
    return keys


def keys_of_sections() -> set[str]:
    """Keys from which a section computes what it offers, e.g. `ModelConfig.executed_layers`."""
    found: set[str] = set()
    for section, kind in SECTIONS.items():
        for name, value in vars(kind).items():
            function = value.fget if isinstance(value, property) else value
            offered = isinstance(value, property) or not name.startswith("_")
            if offered and isinstance(function, FunctionType):
                found |= {f"{section}.{key}" for key in function.__code__.co_names}
    return found


def test_every_parameter_is_read() -> None:
    read = set().union(*map(keys_read, program_files())) | keys_of_sections()
    named = set().union(*(each_key(stage["params"]) for stage in STAGES.values()))
    read |= {key for key in named if key.startswith("ops.")}  # StageRun.implementations
    text = (ROOT / "dvc.yaml").read_text() + (ROOT / "Snakefile").read_text()
    declared = {f"{section}.{key}" for section, model in SECTIONS.items() for key in fields(model)}
    declared |= {key for key in fields(Params) if key not in SECTIONS}
    unread = {key for key in declared - read if f"${{{key}}}" not in text}
    assert not unread, f"declared but never read: {', '.join(sorted(unread))}"


def keys_taken(file: Path) -> set[str]:
    """What a file takes from the whole of the parameters: `section.key`, or `section` passed on."""
    module = tree(file)
    own = {  # nodes of functions whose argument `params` is one section
        id(node)
        for function in ast.walk(module)
        if isinstance(function, ast.FunctionDef)
        and any(
            arg.arg == "params" and last_name(arg.annotation) != "Params"
            for arg in function.args.args
        )
        for node in ast.walk(function)
    }
    taken = [
        node
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute) and id(node) not in own
        if last_name(node.value) == "params" and node.attr in fields(Params)
    ]
    inside = {
        id(node.value): node.attr
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute) and node.value in taken
    }
    return {f"{n.attr}.{inside[id(n)]}" if id(n) in inside else n.attr for n in taken}


def fields(section: type[Settings]) -> list[str]:
    return [field.name for field in dataclasses.fields(section)]


def each_key(keys: Iterable[str]) -> set[str]:
    """Sections as their keys, single keys as they are."""
    return {
        f"{key}.{name}" if key in SECTIONS else key
        for key in keys
        for name in (fields(SECTIONS[key]) if key in SECTIONS else [""])
    }


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_knows_what_a_stage_reads(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`KEYS` of a stage, and its `params` in dvc.yaml, are the parameters that its program takes.

    How a run is executed counts for nothing; of `ops`, the program can only take what `KEYS` names.
    """
    keys = import_module(f"steps.{stage}").KEYS
    assert list(keys) == STAGES[stage]["params"]
    monkeypatch.chdir(ROOT)
    files = [file for file in closure(stage) if file.suffix == ".py"]
    used = set().union(*map(keys_taken, files))
    if stage in COUNTING:  # the bundle holds these sections whole
        used |= set(bundle.SECTIONS)
    used = {key for key in each_key(used) if key.split(".")[0] not in ("execution", "ops")}
    declared = each_key(keys)
    assert used == {key for key in declared if not key.startswith("ops.")}
    computes = any(file.name == "dispatch.py" for file in files) or stage in COUNTING
    assert ("ops.attention" in declared) == computes


@pytest.mark.parametrize(("stage", "folder"), [("tokenize", TOKENIZERS), ("report", BASELINES)])
def test_dvc_watches_the_files_that_parameters_may_name(stage: str, folder: Path) -> None:
    assert (ROOT / folder).is_dir()
    assert str(folder) in STAGES[stage]["deps"]


def numbers(schema: Any, path: str = "") -> Iterable[tuple[str, dict[str, Any]]]:
    """The settings that are numbers, by path, with what the JSON Schema says of them."""
    for name, one in schema.get("properties", {}).items():
        key = f"{path}{name}"
        one = SCHEMA["$defs"][one["$ref"].split("/")[-1]] if "$ref" in one else one
        if one.get("type") == "object":
            yield from numbers(one, f"{key}.")
        for kind in (one, *one.get("anyOf", [])):
            if kind.get("type") in ("integer", "number"):
                yield key, kind


SCHEMA = json.loads((ROOT / "conf/params.schema.json").read_text())
NUMBERS = dict(numbers(SCHEMA))
HUGE = st.one_of(
    st.integers(1, 400).map(lambda digits: 10**digits),
    st.integers(1, 400).map(lambda digits: -(10**digits)),
    st.floats(),
    st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 2**70, 1e308, float("inf"), float("nan")]),
)


def bound(bounds: dict[str, Any], end: str) -> float:
    return float(bounds[end] if end in bounds else bounds[f"exclusive{end.capitalize()}"])


def test_every_number_has_bounds_on_both_sides() -> None:
    assert len(NUMBERS) > 70
    for key, bounds in NUMBERS.items():
        assert bound(bounds, "minimum") <= bound(bounds, "maximum"), key


@settings(deadline=None, max_examples=60)
@given(key=st.sampled_from([*NUMBERS, "seeds", "model.layer_order", "model.value_layers"]), n=HUGE)
def test_a_number_of_any_size_is_accepted_within_its_bounds_or_named(key: str, n: float) -> None:
    values = changed(dataclasses.asdict(DEMO), key, n if key in NUMBERS else [n])
    try:
        check_params(values, "params.yaml")
    except InputError as error:
        said = str(error)
    else:
        bounds = NUMBERS.get(key, {"minimum": 0, "maximum": 2**32})
        assert bound(bounds, "minimum") <= n <= bound(bounds, "maximum")
        return
    assert len(said) < 1000
    assert key.split(".")[-1] in said or key.split(".")[0] in said


DEMO = compose("demo")
TEXT = (ROOT / "params.yaml").read_text()
BAD = [
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
    "[" * 3000,
    "{" * 3000,
    "a: " + "9" * 5000,
    "{? [1, 2]: 3}",
    "a: 2020-99-99",
    "a: !!float z",
    "a: !!python/object:os.system x",
    "<<: 1",
    "%YAML 3.0\n---\na: 1",
    "\ud800",
]


@settings(max_examples=12)
@given(st.one_of(st.sampled_from(BAD), st.text(max_size=99)), st.integers(0, len(TEXT)))
def test_whatever_stands_in_the_file_is_read_or_named(text: str, place: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "params.yaml")
        for content in (text, TEXT[:place] + text + TEXT[place:]):
            file.write_bytes(content.encode(errors="surrogatepass"))
            with contextlib.suppress(InputError):
                assert load_params(file)


def test_aliases_are_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    (tmp_path / "params.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match="aliases are not read here; write the value"):
        load_params(tmp_path / "params.yaml")


def test_a_file_that_is_too_large_to_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("# comment\n" * 200_000)
    with pytest.raises(InputError, match="2000000 bytes are no file of settings"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("name", presets())
def test_an_experiment_of_dvc_changes_one_line(tmp_path: Path, name: str) -> None:
    """By `dvc exp run -S`, which writes the whole file; it may then be replaced as it is."""
    file, before = tmp_path / "params.yaml", render(compose(name))
    flat_values = {
        f"{section}.{key}": value
        for section, values in dataclasses.asdict(compose(name)).items()
        if isinstance(values, dict)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
        if "e-" not in repr(value)  # written 1.0e-8, and by DVC 1e-08
    }
    assert len(flat_values) > 60
    file.write_text(before)
    apply_overrides(str(file), [f"{key}={value}" for key, value in flat_values.items()])
    assert file.read_text() == before
    assert is_preset(file)
    for key in list(flat_values)[::9]:
        file.write_text(before)
        apply_overrides(str(file), [f"{key}=7"])
        lines = zip(before.splitlines(), file.read_text().splitlines(), strict=True)
        assert [old.split(":")[0].strip() for old, new in lines if old != new] in (
            [key.split(".")[1]],
            [],
        )


def test_a_preset_is_known_by_its_values(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    values = dataclasses.asdict(compose("demo"))
    file.write_text(yaml.safe_dump(values))
    assert is_preset(file)
    file.write_text(yaml.safe_dump(changed(values, "ttt.steps", 2)))
    assert not is_preset(file)
    file.write_text("damaged: [")
    assert not is_preset(file)
