"""What is asked of DVC, through its Python API (whose version is pinned).

`inspect` compares every stage with dvc.lock, by content, also while stages run. `start` notes what
a run reads, and may find its result in the run cache; `finish` writes down what it has made, and
refuses if the inputs are no longer those that it began with; `fetch` brings recorded outputs back.

DVC marks the files of running commands in `.dvc/tmp/rwlock` by the number of a process. That number
means nothing in another container or on another host: there the entry is dropped, or taken for
some other program's. So stages are run outside of it, and it is held for moments alone; a stage
that `dvc repro` has started puts back the entry of its `dvc` before it ends (`keep_lock_entries`).
"""

import hashlib
import json
import logging
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from model.runtime.errors import InputError
from model.runtime.files import write_bytes, write_json, writing
from model.runtime.lock import is_held
from pocketlm.params.params import flat
from pocketlm.workflow.preconditions import dvc_option
from pocketlm.workflow.stages import DVC_WAITS, RUN_LOCK, covers, is_among, node

if TYPE_CHECKING:
    from dvc.repo import Repo

RWLOCK = Path(".dvc/tmp/rwlock")
LOCK_FILE, LOCK_COPY = Path("dvc.lock"), Path(".dvc/tmp/dvc.lock")


@dataclass
class State:
    """How a stage differs from its record in dvc.lock.

    recorded: whether there is one; changes: of command, values and inputs, a text by key or path;
    modified, absent, uncached: outputs with other content, not here, not in the cache.
    """

    recorded: bool
    changes: dict[str, str] = field(default_factory=dict)
    modified: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    uncached: list[str] = field(default_factory=list)

    @property
    def is_fresh(self) -> bool:
        """Whether the results here are those of the inputs here."""
        return self.recorded and not (self.changes or self.modified or self.absent)


@contextmanager
def repository() -> "Iterator[Repo]":
    """DVC's view of this checkout; raises InputError for what DVC cannot do or read.

    Holds DVC's lock of the repository, which no command of a stage holds, as dvc.lock is written in
    place: who read it meanwhile would see half of it. What a killed DVC has left of it is mended.
    """
    from dvc.dirs import site_cache_dir
    from dvc.exceptions import DvcException
    from dvc.repo import Repo, lock_repo

    logging.getLogger("dvc").setLevel(logging.ERROR)
    try:
        with Repo(_wait_for_lock=True) as repo, lock_repo(repo):
            mend_records()
            repo.stage_cache._load_cache = partial(_load_entry, repo.stage_cache)
            try:
                yield repo
            finally:
                mend_records()
    except sqlite3.OperationalError:  # it is locked, or the disk is full
        raise
    except sqlite3.DatabaseError as error:
        place = site_cache_dir(dvc_option("core", "site_cache_dir"))
        raise InputError(
            f"{place}/repo: DVC's notes on files that it has hashed are damaged ({error})",
            f"`rm -r {place}/repo` and run again: DVC hashes the files anew",
        ) from error
    except OSError as error:
        with writing(error.filename or LOCK_COPY.parent):
            raise
    except DvcException as error:
        problem = ": ".join(str(cause) for cause in _chain(error) if str(cause))
        raise InputError(f"dvc: {problem}", "make `dvc status` work, then run again") from error


def mend_records() -> None:
    """Keep a copy of dvc.lock, or restore it from that copy if it is damaged; says so then.

    DVC writes dvc.lock in place, and leaves an empty or unfinished file if it is killed meanwhile.
    Raises InputError if there is no copy. Its list of files in use is emptied if it is damaged, as
    what ran when DVC was killed has ended with it.
    """
    if RWLOCK.exists() and not lock_entries():
        with _edit_lock_entries():  # which looks once more, while nobody writes it
            pass
    if not LOCK_FILE.exists():
        return
    content = LOCK_FILE.read_bytes()
    copy = LOCK_COPY.read_bytes() if LOCK_COPY.exists() else None
    if content == copy:
        return
    if all(b"\n" + mark in b"\n" + content for mark in (b"<<<<<<< ", b"=======\n", b">>>>>>> ")):
        raise InputError(
            f"{LOCK_FILE}: git has left a conflict in it",
            f"`git checkout --ours {LOCK_FILE}` or --theirs, then run again",
        )
    damage = _damage(content)
    if not damage:
        write_bytes(LOCK_COPY, content)
    elif copy is not None and not _damage(copy):
        write_bytes(LOCK_FILE, copy)
        print(f"{LOCK_FILE}: damaged ({damage}); restored from {LOCK_COPY}", file=sys.stderr)
    else:
        raise InputError(
            f"{LOCK_FILE}: damaged ({damage}), and there is no copy of it",
            f"`git checkout {LOCK_FILE}` if it was committed, else delete it: results that DVC's "
            "run cache knows are not computed again",
        )


def _damage(content: bytes) -> str:
    """What is wrong with the content of a dvc.lock; empty if it is whole."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    if not content.strip(b"\0\n"):
        return "it is empty"
    try:
        values = yaml.load(content.decode(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        COMPILED_LOCKFILE_SCHEMA(values)
    except (yaml.YAMLError, Invalid, ValueError, RecursionError):
        return "it is no file of DVC"
    return "" if content.endswith(b"\n") else "it is incomplete"


def inspect() -> dict[str, State]:
    """The state of every stage by target (`train@0`)."""
    from dvc.utils.serialize import load_path

    with repository() as repo:
        values = flat(load_path("params.yaml", repo.fs))
        states = {stage.addressing: _state(stage, values) for stage in repo.index.stages}
        _drop_changes_by_absence(repo.index.stages, states)
        return states


def _drop_changes_by_absence(stages: Sequence[Any], states: Mapping[str, State]) -> None:
    """Take those inputs out of `changes` that are as recorded once absent outputs are back."""
    absent = [path for state in states.values() for path in state.absent]
    outs = {str(out): out.hash_info for stage in stages for out in stage.outs}
    for stage in stages:
        changes = states[stage.addressing].changes
        for dep in stage.deps:
            path = str(dep)
            incomplete = path in changes and any(covers(path, gone) for gone in absent)
            if incomplete and _recorded_hash(path, outs) == dep.hash_info.value:
                del changes[path]


def _recorded_hash(path: str, outs: Mapping[str, Any]) -> str | None:
    """The hash that a file or folder of outputs has once all of them are brought back.

    outs: the recorded hashes. None if one is not recorded, or is a folder inside the folder.
    """
    from dvc_data.hashfile.tree import Tree

    if path in outs:
        return outs[path].value if outs[path] else None
    tree = Tree()
    for out, found in outs.items():
        if covers(path, out):
            if not found or found.isdir:
                return None
            tree.add(tuple(out.removeprefix(f"{path}/").split("/")), None, found)
    tree.digest()
    return str(tree.hash_info.value)


def _state(stage: Any, values: Mapping[str, Any]) -> State:
    recorded = any(out.hash_info for out in stage.outs)
    changes = {"command": "the command"} if recorded and stage.changed_stage() else {}
    for dep in stage.deps if recorded else ():
        changes |= _changes(dep, values)
    state = State(recorded, changes)
    for out in stage.outs if recorded else ():
        path = str(out)
        if not out.exists:
            state.absent.append(path)
        elif out.changed_checksum():
            state.modified.append(path)
        elif is_cut(out):  # DVC believes what it has brought here itself; so is its cached copy
            state.absent.append(path)
            state.uncached.append(path)
            continue
        if out.use_cache and out.changed_cache():
            state.uncached.append(path)
    return state


def is_cut(out: Any) -> bool:
    """Whether an output that DVC takes for the recorded one has fewer bytes.

    So looks what a push or a pull leaves that was interrupted.
    """
    if out.meta.size is None:
        return False
    path = Path(str(out))
    files = (one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    return sum(one.stat().st_size for one in files) < int(out.meta.size)


def _changes(dep: Any, values: Mapping[str, Any]) -> dict[str, str]:
    """How an input differs from the record: values by key, a file or folder by path.

    values: those of params.yaml, which DVC would read again for every stage.
    """
    from dvc.dependency import ParamsDependency

    path = str(dep)
    if isinstance(dep, ParamsDependency):
        now = {key: v for key, v in values.items() if is_among(key, dep.params)}
        return _changed_values(flat(dep.hash_info.value or {}), now)
    if not dep.exists:
        return {path: f"{path} is missing"}
    return {path: f"{path} changed"} if dep.changed_checksum() else {}


def _changed_values(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What has changed between flat values, a text by key."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return {key: f"{key} {_value(before, key)} → {_value(now, key)}" for key in keys}


def _value(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "absent"


@dataclass
class Start:
    """A stage before it runs: its state, and what it reads as dvc.lock would record it.

    restored: whether its result was found in the run cache, and recorded.
    """

    state: State
    inputs: dict[str, Any]
    restored: bool = False


def start(target: str, restore: bool) -> Start:
    """Look at a stage; restore: bring its result back if the run cache knows it.

    To restore, this process must hold the lock of the stage's runs; it waits until a `dvc` that
    has run this stage, or one before it, has recorded the result. Raises InputError if an input is
    missing.
    """
    from dvc.utils.serialize import load_path

    def look(repo: "Repo") -> Start:
        (stage,) = repo.stage.collect(target)
        if restore:
            require_free(stage)
        state = _state(stage, flat(load_path("params.yaml", repo.fs)))
        if missing := [str(dep) for dep in stage.deps if not dep.exists]:
            raise InputError(
                f"{target}: not here: {', '.join(missing)}",
                "`snakemake report --cores all` restores it or makes it again; or `dvc pull`",
            )
        restored = restore and not state.is_fresh and _restore(repo, stage, state.modified)
        stage.save_deps()
        return Start(state, _inputs(stage), restored)

    result: Start = when_free(target, look, holding=restore)
    return result


def _restore(repo: "Repo", stage: Any, modified: Sequence[str]) -> bool:
    """Bring a stage's result back from the run cache, and record it; whether it was known.

    The stage must be as it was read: DVC takes one whose inputs are saved for an unchanged one.
    modified: outputs of other content, which are removed as `dvc repro` does.
    """
    from dvc.stage.cache import RunCacheNotFoundError

    for out in stage.outs:
        if str(out) in modified:
            out.remove()
    try:
        repo.stage_cache.restore(stage)
    except RunCacheNotFoundError:
        return False
    stage.save(run_cache=False)
    if drop_damaged(stage.outs):
        return False
    _store(repo, stage)
    return True


def drop_damaged(outs: Sequence[Any]) -> list[str]:
    """Remove copies of outputs in DVC's cache that are damaged; returns the outputs concerned.

    A copy's name is the MD5 of its content. DVC believes it, and restores what is damaged; nor does
    it replace such a copy when a run has made the output again.
    """
    damaged = []
    for out in outs:
        if not out.use_cache or not out.hash_info:
            continue
        names = [out.hash_info.value]
        if _is_intact(out.cache, names[0]) and out.hash_info.isdir and (folder := out.get_obj()):
            names += [found.value for _, _, found in folder]
        if bad := [name for name in names if not _is_intact(out.cache, name)]:
            for name in bad:
                out.cache.delete(name)
            print(f"{out}: its copy in DVC's cache was damaged, and is dropped", file=sys.stderr)
            damaged.append(str(out))
    return damaged


def _is_intact(cache: Any, name: str) -> bool:
    """Whether the cached object of this name is absent, or has the content its MD5 says."""
    try:
        with open(cache.oid_to_path(name), "rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest() == name.removesuffix(".dir")
    except FileNotFoundError:
        return True


def _inputs(stage: Any) -> dict[str, Any]:
    """Command, values and hashes of what a stage reads, once its inputs are saved."""
    return {"command": stage.cmd, **{str(dep): dep.hash_info.value for dep in stage.deps}}


def _store(repo: "Repo", stage: Any) -> None:
    """Write a stage, as it was saved, into cache, run cache and dvc.lock."""
    stage.commit()
    repo.stage_cache.save(stage)
    stage.dump(update_pipeline=False)


def _load_entry(runs: Any, key: str, name: str) -> dict[str, Any] | None:
    """An entry of the run cache, whose name is the hash of its content; None if it is damaged.

    In place of DVC's own method, which believes all that has the form of an entry.
    """
    from dvc.stage.cache import StageCache, _get_cache_hash

    entry = StageCache._load_cache(runs, key, name)
    with suppress(LookupError, TypeError):
        if entry is None or _get_cache_hash(entry) == name:
            return entry
    path = Path(runs._get_cache_path(key, name))
    print(f"{path}: damaged, removed from DVC's run cache", file=sys.stderr)
    path.unlink()
    return None


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the inputs of `Start`, in words."""
    found: list[str] = []
    for path in sorted({**before, **now}):
        old, new = before.get(path), now.get(path)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _changed_values(flat(old), flat(new)).values()
        elif old != new:
            found.append(path)
    return found


def finish(
    target: str,
    before: dict[str, Any],
    record: bool,
    holding: bool = False,
    again: Callable[[], object] = lambda: None,
) -> None:
    """Compare what a stage reads with `before`; record: write its result into cache and dvc.lock.

    Raises InputError, with nothing recorded, if an input has changed. Waits while another command
    of DVC uses the stage's files. holding: as of `when_free`. again: brings back outputs that a
    `dvc repro` of this stage, which waits for this one, has removed at its start.
    """

    def save(repo: "Repo") -> None:
        (stage,) = repo.stage.collect(target)
        if record:
            if not all(out.exists for out in stage.outs):
                again()
            stage.save(run_cache=False)
        else:  # DVC records it
            stage.save_deps()
            for out in stage.outs:
                out.hash_info = out.get_hash()
        drop_damaged(stage.outs)
        if changes := differences(before, _inputs(stage)):
            raise InputError(
                f"{target}: changed while it ran: {', '.join(changes)}. The result is that of the "
                "inputs before; it was not recorded",
                "run again to compute it anew; or take the edit back and run again: then it is "
                "recorded",
            )
        if record:
            _store(repo, stage)

    when_free(target, save, holding)


def record_unseen(target: str) -> None:
    """Record the outputs that are here as the result of the inputs that are here."""
    finish(target, start(target, restore=False).inputs, record=True)


def refill(target: str) -> None:
    """Put the outputs that are here, as they were recorded, back into the cache."""

    def put(repo: "Repo") -> None:
        (stage,) = repo.stage.collect(target)
        stage.commit(allow_missing=True)
        drop_damaged(stage.outs)

    when_free(target, put)


def fetch(outputs: Mapping[str, str]) -> list[str]:
    """Bring recorded outputs here, from the cache or else the remote; returns those it cannot.

    outputs: the target of each path.
    """

    def bring(repo: "Repo") -> None:
        (out,) = repo.find_outs_by_path(path)
        if out.exists and is_cut(out):
            out.remove()
        drop_damaged([out])
        if repo.config["core"].get("remote"):
            repo.fetch(targets=[path])
            if drop_damaged([out]):
                remote = repo.cloud.get_remote_odb()
                place = remote.oid_to_path(out.hash_info.value)
                print(
                    f"{path}: so is the remote's, as a push that was interrupted leaves it: delete "
                    f"{place} and `dvc push` from where the result is whole",
                    file=sys.stderr,
                )
        repo.checkout(targets=[path])

    for path, target in outputs.items():
        try:
            when_free(target, bring)
        except Exception as error:  # whatever a remote's library raises
            print(f"{path}: cannot be restored: {error}", file=sys.stderr)
    return [path for path in outputs if not Path(path).exists()]


def download(paths: Sequence[str]) -> list[str]:
    """Bring recorded outputs here past DVC's list of files in use; returns those it cannot.

    For a stage that DVC has started, which holds its outputs.
    """
    from dvc.api import DVCFileSystem

    if not has_remote():
        return list(paths)
    files = DVCFileSystem(".")
    for path in paths:
        try:
            files.get(path, path, recursive=True)
        except Exception as error:  # whatever a remote's library raises
            print(f"{path}: cannot be fetched: {error}", file=sys.stderr)
    return [path for path in paths if not Path(path).exists()]


@cache
def has_remote() -> bool:
    """Whether a default remote is configured."""
    with repository() as repo:
        return bool(repo.config["core"].get("remote"))


# Locks


def require_free(stage: Any) -> None:
    """Raise DVC's LockError while another command of DVC makes what the stage reads or writes."""
    from dvc.stage.decorators import rwlocked

    rwlocked(read=["deps"], write=["outs"])(lambda stage: None)(stage)


def when_free(target: str, action: "Callable[[Repo], Any]", holding: bool = False) -> Any:
    """Do something with DVC's repository once no other command uses the target's files.

    Entries of processes that are other programs here are dropped, unless a run of the stage is
    going on somewhere. holding: this process holds the lock of the stage's runs itself; then those
    of a `dvc` whose run of the stage waits for that lock are dropped, too, for both would wait for
    ever.
    """
    from dvc.lock import LockError

    while True:
        try:
            with repository() as repo:
                return action(repo)
        except InputError as error:
            if not any(isinstance(cause, LockError) for cause in _chain(error)):
                raise
        one = node(target)
        if holding and is_held(one.work / DVC_WAITS):
            dropped = _drop_entries_of_writers(one.outs)
        else:
            is_running = not holding and is_held(one.work / RUN_LOCK)
            dropped = not is_running and _drop_false_entries()
        if not dropped:
            _say_once(f"{target}: another DVC command is using its files; waiting for it")
            time.sleep(1)


def _drop_false_entries() -> bool:
    """Drop entries whose number is that of another program here; whether there were any."""
    with _edit_lock_entries() as entries:
        dropped = _drop(entries, lambda path, entry: not _is_running(entry))
    for name in sorted({f"{entry['cmd']} (process {entry['pid']})" for entry in dropped}):
        print(f"{RWLOCK}: dropped {name}, which is not running here", file=sys.stderr)
    return bool(dropped)


def _drop_entries_of_writers(outs: Sequence[str]) -> bool:
    """Drop what a command that writes these outputs has marked of them; whether there was any."""
    paths = {str(Path(out).absolute()) for out in outs}
    with _edit_lock_entries() as entries:
        writers = [entry for path, entry in entries.get("write", {}).items() if path in paths]
        return bool(_drop(entries, lambda path, entry: path in paths and entry in writers))


def _drop(
    entries: dict[str, Any], is_dropped: Callable[[str, dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Take entries out of DVC's list of files in use; returns them."""
    dropped = []
    for path, entry in list(entries.get("write", {}).items()):
        if is_dropped(path, entry):
            dropped.append(entries["write"].pop(path))
    for path, readers in entries.get("read", {}).items():
        dropped += [entry for entry in readers if is_dropped(path, entry)]
        entries["read"][path] = [entry for entry in readers if not is_dropped(path, entry)]
    return dropped


def _is_running(entry: dict[str, Any]) -> bool:
    """Whether the process of an entry is the command that the entry names."""
    try:
        words = Path(f"/proc/{entry['pid']}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return not Path("/proc/self").exists()  # another system: DVC itself looks at the number
    return entry["cmd"] in " ".join(words)


def lock_entries() -> dict[str, Any]:
    """DVC's list of files in use by running commands; empty if it is damaged."""
    from dvc.rwlock import SCHEMA
    from voluptuous import Invalid

    try:
        return SCHEMA(json.loads(RWLOCK.read_text()))
    except (OSError, ValueError, RecursionError, Invalid):
        return {}


def keep_lock_entries(before: dict[str, Any], pid: int) -> None:
    """Put back those entries of process `pid` in `before` that somebody else has dropped."""
    with _edit_lock_entries() as now:
        writes, reads = now.setdefault("write", {}), now.setdefault("read", {})
        for path, entry in before.get("write", {}).items():
            if entry["pid"] == pid:
                writes.setdefault(path, entry)
        for path, entries in before.get("read", {}).items():
            mine = [entry for entry in entries if entry["pid"] == pid]
            known = reads.get(path, [])
            reads[path] = [*known, *(entry for entry in mine if entry not in known)]


@contextmanager
def _edit_lock_entries() -> Iterator[dict[str, Any]]:
    """DVC's list of files in use, written back if the block has changed it."""
    from dvc.lock import make_lock
    from dvc.rwlock import RWLOCK_LOCK

    with make_lock(str(RWLOCK.with_name(RWLOCK_LOCK)), tmp_dir=str(RWLOCK.parent)):
        entries = lock_entries()
        before = json.dumps(entries)
        yield entries
        entries["read"] = {
            path: readers for path, readers in entries.get("read", {}).items() if readers
        }
        if json.dumps(entries) != before:
            write_json(RWLOCK, entries)


@cache
def _say_once(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _chain(error: BaseException | None) -> list[BaseException]:
    found = []
    while error is not None:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
