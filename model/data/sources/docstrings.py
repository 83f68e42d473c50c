"""The default source: the documentation strings of six packages that this project depends on.

One document per module: the docstrings of the module, its classes and its functions, in the order
of the source text. Modules are parsed with `ast`, never imported. They are visited in the order of
the hash of their names, which mixes packages and does not depend on the file system; a docstring
seen before is left out, and so are modules that cannot be parsed, which are templates and
deliberately invalid test files.

The text must be the same on every machine. So it comes from `PACKAGES` alone, whose versions
constraints.txt pins, and only from files that their installation records, whatever else lies beside
them. The standard library is left out because it differs from one Python to the next, and torch
because it differs between its builds and is what users replace first.
"""

import ast
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

# Rich in documentation, and the same Python files on every platform.
PACKAGES = ("matplotlib", "networkx", "numpy", "pandas", "scipy", "sympy")
# Tests are long and hardly documented; scripts lie outside of the packages; numpy.distutils comes
# with Python 3.11 alone.
SKIPPED = {"tests", "..", "distutils"}


class Docstrings:
    """Documentation of `modules`, up to `megabytes` of UTF-8.

    modules: files by the modules' full names; None: those of PACKAGES as they are installed.
    Memory holds the modules' names and 16 bytes per docstring that was seen.
    """

    def __init__(self, megabytes: float, modules: Mapping[str, Path] | None = None) -> None:
        self.megabytes = megabytes
        self.files: list[Path] = []  # packages are named by their versions
        self.repeated: list[Path] = []
        self._modules = installed_modules() if modules is None else modules

    def texts(self) -> Iterator[tuple[str, float]]:
        """Yield one document per module that has docstrings not seen before."""
        seen: set[bytes] = set()
        read = 0.0
        for name in sorted(self._modules, key=_digest):
            if read >= self.megabytes:
                return
            source = self._modules[name].read_bytes()
            new = [text for text in docstrings(source) if _is_new(text, seen)]
            document = "\n\n".join(new)
            if new and (len(new) == 1 or _is_new(document, seen)):
                read += len(document.encode()) / 1e6
                yield document, read


def installed_modules() -> dict[str, Path]:
    """Return the Python files of PACKAGES by the names of their modules, as pip recorded them."""
    found = {}
    for package in PACKAGES:
        for file in _recorded(package):
            if file.suffix == ".py" and SKIPPED.isdisjoint(file.parts):
                found[".".join(file.with_suffix("").parts)] = Path(str(file.locate()))
    return {name: path for name, path in found.items() if path.is_file()}


def unpinned_packages(constraints: Path) -> list[str]:
    """Say of each of PACKAGES that is not as `constraints` (lines `name==version`) pins it how so.

    An empty list means that the text is the one README's numbers were made with.
    """
    lines = constraints.read_text().splitlines() if constraints.is_file() else []
    pins = dict(line.split("==", 1) for line in lines if "==" in line and line[0] != "#")
    found = []
    for package in PACKAGES:
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed = "absent"
        if installed != (pinned := pins.get(package, "nothing")):
            found.append(f"{package} is {installed}, pinned is {pinned}")
    return found


def _recorded(package: str) -> list[metadata.PackagePath]:
    try:
        return metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return []


def docstrings(source: bytes) -> list[str]:
    """Return the non-empty docstrings of a module's source, [] if it is not valid Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escape sequences
        try:
            module = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return []
    texts = (ast.get_docstring(node) for node in (module, *_definitions(module)))
    # A literal may spell half a surrogate pair, which no UTF-8 text can contain.
    clean = (text.encode("utf-8", "ignore").decode().strip() for text in texts if text)
    return [text for text in clean if text]


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(node: ast.AST) -> Iterator[Definition]:
    """Yield classes and functions below `node`; expressions hold none and are not searched."""
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        children = getattr(node, block, None)
        for child in children if isinstance(children, list) else ():
            if isinstance(child, Definition):
                yield child
            yield from _definitions(child)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _is_new(text: str, seen: set[bytes]) -> bool:
    """Whether `text` is not in `seen` yet; puts it there."""
    digest = _digest(text)
    if digest in seen:
        return False
    seen.add(digest)
    return True
