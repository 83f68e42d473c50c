"""The default source: the documentation strings of this Python and of its installed packages.

One document per module: the docstrings of the module, its classes and its functions, in the order
of the source text. Modules are parsed with `ast`, never imported. They are visited in the order of
the hash of their names, which mixes packages and does not depend on the file system; a docstring
seen before is left out, and so are modules that cannot be parsed, which are templates and
deliberately broken test files.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

SITE = {"site-packages", "dist-packages"}


class Docstrings:
    """Documentation of the modules below `roots`, up to `megabytes` of UTF-8.

    roots: directories of top-level modules; None: the standard library and installed packages.
    Memory holds the modules' names and 16 bytes per docstring that was seen.
    """

    def __init__(self, megabytes: float, roots: Sequence[Path] | None = None) -> None:
        self.megabytes = megabytes
        self.files: list[Path] = []  # the interpreter and its packages, named by their versions
        self._roots = default_roots() if roots is None else roots

    def texts(self) -> Iterator[tuple[str, float]]:
        """Yield one document per module that has something new to say."""
        seen: set[bytes] = set()
        read = 0.0
        for path in _modules(self._roots):
            if read >= self.megabytes:
                return
            new = [text for text in docstrings(path.read_bytes()) if _is_new(text, seen)]
            document = "\n\n".join(new)
            if new and (len(new) == 1 or _is_new(document, seen)):
                read += len(document.encode()) / 1e6
                yield document, read


def default_roots() -> list[Path]:
    """Return the standard library's directory and those of installed packages."""
    paths = sysconfig.get_paths()
    return [
        Path(path) for path in dict.fromkeys(paths[k] for k in ("stdlib", "purelib", "platlib"))
    ]


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


def _modules(roots: Sequence[Path]) -> list[Path]:
    """Return the modules below `roots`, in the order of their names' hashes."""
    named = []
    for number, root in enumerate(roots):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if SITE.isdisjoint(parts) and path.is_file():
                name = ".".join(parts)
                named.append((_digest(name), name, number, path))
    return [path for *_, path in sorted(named)]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _is_new(text: str, seen: set[bytes]) -> bool:
    """Whether `text` is not in `seen` yet; puts it there."""
    digest = _digest(text)
    if digest in seen:
        return False
    seen.add(digest)
    return True
