"""Run a Python file and write down what it opens, connects to and starts: a program by itself.

    python -I trace.py EVENTS bundle.py ARGUMENT …

It imports nothing but the standard library, so that the hook (`sys.addaudithook`) is there before
anything else is; it cannot be removed again. EVENTS gets one line of JSON per event, without
repetitions. Native code that calls the operating system itself is not seen: see docs/audit.md.
"""

import json
import os
import runpy
import sys
from typing import Any

STARTS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.spawn")


def main() -> None:
    """Install the hook and run the file as `__main__`."""
    file = open(sys.argv[1], "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    seen: set[str] = set()

    def write(kind: str, *values: str) -> None:
        line = json.dumps([kind, *values])
        if line not in seen:
            seen.add(line)
            file.write(line + "\n")

    def notice(event: str, values: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(values[0], str | bytes):
                path = os.path.abspath(os.fsdecode(values[0]))
                mode = values[1] if isinstance(values[1], str) else ""
                flags = values[2] if isinstance(values[2], int) else 0
                writes = any(c in mode for c in "wax+") or flags & (os.O_WRONLY | os.O_RDWR)
                write("write" if writes else "read", path)
        elif event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
            write("network", event, repr(values[1:])[:200])
        elif event.startswith(STARTS):
            write("start", repr(values[0])[:200])

    sys.addaudithook(notice)
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
