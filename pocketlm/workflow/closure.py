"""The code that a stage depends on, written into dvc.yaml by `python -m pocketlm.workflow.closure`.

It is what the stage's program imports, directly or not: at the top of a file or inside a function,
with the `__init__` of each package on the way, without what only type checkers see. Three things
that are no imports count besides: a module whose full name stands in the source as a text, a
template (`.j2`) beside the source that it names, and the kernels of `model.kernels.dispatch` that a
key of `ops` in the stage's `params` can choose.

Left out is the short list below, and files that hold nothing but a docstring; but the report, which
counts the bytes of the shipped code, depends on all of that. A folder is named in
place of its files where all of them count. A test fails as long as the `deps` in dvc.yaml differ
from this, be one missing or too wide.
"""

import ast
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from io import BytesIO
from pathlib import Path

from ruamel.yaml import YAML

from model.runtime.errors import InputError
from model.runtime.files import write_bytes
from pocketlm.workflow.stages import stages

PACKAGES = ("steps", "pocketlm", "model")

# What can change no result, with the reason; what these import does not count either.
NO_RESULT = {
    "pocketlm/params": "reads and checks params.yaml, whose values count key by key",
    "model/runtime/settings.py": "describes the sections of params.yaml and checks their values",
    "model/runtime/config.py": "says how a run is executed, on which no result depends",
    "model/runtime/errors.py": "shows messages",
    "model/runtime/files.py": "writes what it is given, atomically",
    "model/runtime/run_log.py": "writes the log",
    "model/runtime/provenance.py": "writes and compares hashes",
    "model/runtime/progress.py": "shows progress",
    "model/runtime/process.py": "measures memory and age, chooses caches",
    "model/runtime/lock.py": "lets runs of a stage take turns",
    "model/runtime/threads.py": "says how threads wait",
}
# Shipped beside an artifact (`pocketlm.submission.bundle`): the program that evaluates alone, and
# those of the stages from text to scores. Paths, as a dotted name would count as an import.
STANDALONE = "pocketlm/submission/standalone.py"
SHIPPED_PROGRAMS = (
    STANDALONE,
    *(f"steps/{stage}.py" for stage in ("tokenize", "train", "quantize", "evaluate", "ttt_eval")),
)
COUNTING = ("report", "audit")  # stages that count the bytes of what is shipped

TEMPLATE = ".j2"
NEVER_FOLDED = {Path("."), Path("steps")}  # programs are named one by one


def closure(stage: str) -> set[Path]:
    """The files whose content may change what `stage` makes; paths from the current directory."""
    ops = {key for key in stages()[stage]["params"] if key.split(".")[0] == "ops"}
    return _reached({Path(f"steps/{stage}.py")}, lambda file: filter(_counts, imports(file, ops)))


def shipped(programs: Iterable[str] = SHIPPED_PROGRAMS) -> list[Path]:
    """The files that programs import, directly or not, with all kernels; sorted.

    Raises InputError if the current directory is not that of the packages.
    """
    names = [program.removesuffix(".py").replace("/", ".") for program in programs]
    begin = {file for name in names for file in _files(name)}
    if not begin:
        raise InputError(f"{Path.cwd()}: the packages are not here", "run this where Snakefile is")
    return sorted(_reached(begin, lambda file: imports(file, {"ops"})))


def _reached(begin: set[Path], following: Callable[[Path], Iterable[Path]]) -> set[Path]:
    """The files of `begin`, those that follow from them, and so on."""
    found, waiting = set[Path](), set(begin)
    while waiting:
        file = waiting.pop()
        found.add(file)
        waiting |= set(following(file)) - found
    return found


def imports(file: Path, ops: Collection[str]) -> set[Path]:
    """The files of the project that one file imports; ops: keys that choose kernels, or `ops`."""
    if file.suffix == TEMPLATE:
        return set()
    named = _named(file.read_text(encoding="utf-8"), frozenset(ops))
    templates = {file.with_name(name) for name in named if name.endswith(TEMPLATE)}
    return {file for name in named for file in _files(name)} | set(filter(Path.is_file, templates))


@cache
def _named(source: str, ops: frozenset[str]) -> set[str]:
    """Dotted names of what a source imports, and those that its texts may mean."""
    names = set[str]()
    for node in _running(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"\w+(\.\w+)+", str(node.value)):
            names.add(str(node.value))
        elif isinstance(node, ast.Call) and len(row := _texts(node)) == 3:
            names |= _chosen_kernel(node, row, ops)
    return names


def code_deps(stage: str) -> list[str]:
    """What `deps` of a stage in dvc.yaml must list of the code: the program first, then by name."""
    program = f"steps/{stage}.py"
    folded = _folded(closure(stage).union(shipped() if stage in COUNTING else ()))
    order = sorted(folded, key=lambda dep: (PACKAGES.index(dep.split("/")[0]), dep))
    return [program, *(dep for dep in order if dep != program)]


def is_code(dep: str) -> bool:
    """Whether an entry of `deps` names code."""
    return dep.split("/")[0] in PACKAGES


def update(path: Path = Path("dvc.yaml")) -> list[str]:
    """Write the code of every stage into `deps`, keep all else; returns the stages that changed."""
    editor = YAML()
    editor.width = 1 << 16  # never break a line
    editor.indent(mapping=2, sequence=4, offset=2)
    pipeline = editor.load(path.read_text(encoding="utf-8"))
    changed = []
    for name, stage in pipeline["stages"].items():
        listed, code = stage["deps"], code_deps(name)
        if [dep for dep in listed if is_code(dep)] != code:
            for place in reversed(range(len(listed))):  # so that comments stay with their lines
                if is_code(listed[place]):
                    del listed[place]
            for dep in reversed(code):
                listed.insert(0, dep)
            changed.append(name)
    if changed:
        text = BytesIO()
        editor.dump(pipeline, text)
        write_bytes(path, text.getvalue())
    return changed


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """A node and those below it, without what stands under `if TYPE_CHECKING`."""
    yield node
    below: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name):
        below = node.orelse if node.test.id == "TYPE_CHECKING" else below
    for child in below:
        yield from _running(child)


def _texts(call: ast.Call) -> list[str]:
    return [str(part.value) for part in call.args if isinstance(part, ast.Constant)]


def _chosen_kernel(call: ast.Call, row: list[str], ops: Collection[str]) -> set[str]:
    """The module that a row `Kernel(key, module, function)` of the kernels' table names."""
    if not isinstance(call.func, ast.Name) or call.func.id != "Kernel":
        return set()
    key, module, _ = row
    return {f"model.kernels.{module}"} if {"ops", f"ops.{key}"} & set(ops) else set()


def _files(name: str) -> Iterator[Path]:
    """The files that importing a dotted name runs: packages on the way, and the module."""
    parts = name.split(".")
    if parts[0] not in PACKAGES:
        return
    for length in range(1, len(parts) + 1):
        place = Path(*parts[:length])
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                yield file


def _counts(file: Path) -> bool:
    """Whether a file may change a result."""
    places = [file, *file.parents]
    return not any(place.as_posix() in NO_RESULT for place in places) and not _is_docstring(file)


def _is_docstring(file: Path) -> bool:
    """Whether a file holds nothing but a docstring."""
    return file.suffix != TEMPLATE and all(
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for node in ast.parse(file.read_text(encoding="utf-8")).body
    )


def _folded(files: set[Path]) -> set[str]:
    """Names of the files, or of the outermost folders of which all files are among them."""
    whole = {
        folder
        for folder in {parent for file in files for parent in file.parents} - NEVER_FOLDED
        if all(file in files or _is_docstring(file) for file in folder.rglob("*.py"))
    }
    return {
        next((place for place in reversed(file.parents) if place in whole), file).as_posix()
        for file in files
    }


if __name__ == "__main__":
    print(f"dvc.yaml: {', '.join(update()) or 'nothing'} changed")
