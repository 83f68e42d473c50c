"""One Python file with all code that an artifact needs: `pocketlm.submission.standalone` in it.

The file holds the modules that the programs import, directly or not, less comments and docstrings,
as JSON compressed by LZMA in base 85, and an importer for them. Everything that is imported is
shipped, so that the file runs in an empty folder.

**What is counted.** The challenge counts all code, that of training included, plus the compressed
model. So the file has the programs of all stages, from text to scores, and its bytes are those that
count. `bundle` with the program `STANDALONE` alone makes the file that only evaluates, whose size
is said beside.
"""

import ast
import base64
import dataclasses
import json
import lzma
import tokenize
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from model.runtime.files import write_bytes
from pocketlm.params.params import Params
from pocketlm.workflow.closure import SHIPPED_PROGRAMS, STANDALONE, shipped

NAME = "bundle.py"
SECTIONS = ("evaluate", "ops", "ttt")  # the settings of evaluation
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

TEMPLATE = '''"""pocketlm: code and settings of one artifact. `python {name} --help`"""
import base64, importlib.abc, importlib.util, json, lzma, sys
FILES = json.loads(lzma.decompress(base64.b85decode("{files}")))
SETTINGS = json.loads({settings!r})
class Bundle(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    def find_spec(self, name, path, target=None):
        package = name.replace(".", "/") + "/__init__.py"
        file = package if package in FILES else name.replace(".", "/") + ".py"
        if file in FILES:
            spec = importlib.util.spec_from_loader
            return spec(name, self, origin=file, is_package=file == package)
    def get_source(self, name):
        return FILES[self.find_spec(name, None).origin]
    def is_package(self, name):
        return self.find_spec(name, None).origin.endswith("/__init__.py")
    def get_code(self, name):
        return compile(self.get_source(name), self.find_spec(name, None).origin, "exec")
sys.meta_path.insert(0, Bundle())
if __name__ == "__main__":
    from pocketlm.submission.standalone import main
    main(SETTINGS, sys.argv[1:])
else:
    def load():
        from pocketlm.submission.standalone import Scorer
        return Scorer.beside(__file__, SETTINGS)
'''


def bundle(settings: dict[str, Any], programs: tuple[str, ...] = SHIPPED_PROGRAMS) -> bytes:
    """The file's content; the same settings and code give the same bytes.

    settings: of evaluation, see `settings_of`; the current directory is that of the packages.
    """
    text = TEMPLATE.format(
        name=NAME, files=_packed(programs), settings=json.dumps(settings, sort_keys=True)
    )
    return text.encode()


@cache
def _packed(programs: tuple[str, ...]) -> str:
    files = {file.as_posix(): minified(file.read_text("utf-8")) for file in shipped(programs)}
    content = json.dumps(files, separators=(",", ":")).encode()
    preset = 9 | lzma.PRESET_EXTREME
    return base64.b85encode(lzma.compress(content, check=lzma.CHECK_NONE, preset=preset)).decode()


def settings_of(params: Params) -> dict[str, Any]:
    """The sections of the parameters that the standalone program reads, as plain values."""
    values = dataclasses.asdict(params)
    return {name: values[name] for name in SECTIONS}


def code_bytes(params: Params) -> tuple[int, int]:
    """Bytes of code that count, those of the bundle, and of the part that only evaluates."""
    settings = settings_of(params)
    return len(bundle(settings)), len(bundle(settings, (STANDALONE,)))


def write_bundle(path: Path, params: Params) -> None:
    """Write the bundle atomically."""
    write_bytes(path, bundle(settings_of(params)))


@cache
def minified(source: str) -> str:
    """Python source without comments, docstrings and empty lines, indented by single spaces.

    All else stays as it is written, so that the bundle is the same, byte for byte, whichever
    version of Python makes it; `ast.unparse` differs between versions.
    """
    lines = source.splitlines()
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    kept, dropped = set[int](), set[int]()  # rows, from 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant | ast.JoinedStr):
            kept.update(range(node.lineno, node.end_lineno or 0))  # text may go on in these rows
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            text = node.body[0]
            dropped.update(range(text.lineno - 1, text.end_lineno or 0))
            if len(node.body) == 1:
                lines[text.lineno - 1] = lines[text.lineno - 1][: text.col_offset] + "pass"
                dropped.remove(text.lineno - 1)
    rows = [row for row in range(len(lines)) if row not in dropped]
    shown = (lines[row] if row in kept else _narrowed(lines[row]) for row in rows)
    return "".join(f"{line}\n" for line in shown if line)


def _narrowed(line: str) -> str:
    """Four spaces of indentation become one; trailing ones go."""
    code = line.lstrip(" ")
    return " " * ((len(line) - len(code)) // 4) + code.rstrip() if code.strip() else ""
