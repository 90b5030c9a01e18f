"""Processes that die, disks that are full, and two processes at once: every reader sees the old or the new state, whole.

The crash points are enumerated. A process that dies at a call leaves the folder as it is before the call, and one that dies while
it writes a file leaves a part of it; so one run that looks at the folder before each writing call finds every state that a death
can leave. Further runs have one of these calls fail. Each state is read by every kind of reader, and the change is made again.
With `TOKENREC_ALL_CRASHES=1` all states and calls are visited, which takes an hour; without it, every few.
"""

import errno
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from tiny_repository import DIM, TINY_TRAINING, USERS, tiny_splits, write_tiny_repository
from tqdm.std import TqdmDefaultWriteLock
from transformers import AutoModel, AutoTokenizer

from tokenrec_hf import EmbeddingStore, NewVectors, Recipe, Recommender, Repository, train
from tokenrec_hf.models.modeling_collaborative import load_collaborative

ALL = "TOKENREC_ALL_CRASHES" in os.environ
CALLS = {f"os.{name}" for name in ("rename", "remove", "mkdir", "rmdir", "link", "chmod", "truncate", "fsync")}
_listener = None


def _hear(event, arguments):
    """Python reports its calls here; `os.replace` is reported as `os.rename`."""
    global _listener
    if _listener is None or not (event in CALLS or (event == "open" and _writes(*arguments))):
        return
    listener, _listener = _listener, None
    try:
        listener(event)
    finally:
        _listener = listener


def _writes(path, mode, flags):
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and str(path) != os.devnull


sys.addaudithook(_hear)


@contextmanager
def listening(listener):
    """Calls `listener` with the name of each writing call of this process before it happens."""
    global _listener
    # Python does not report this one.
    flush = os.fsync

    def fsync(handle):
        _hear("os.fsync", ())
        flush(handle)

    _listener, os.fsync = listener, fsync
    try:
        yield
    finally:
        _listener, os.fsync = None, flush


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """The folder before each change, and the one after a training. Shared: copy it before changing anything in it."""
    place = tmp_path_factory.mktemp("before")
    write_tiny_repository(place / "tiny")
    for path in (place / "tiny").rglob("*.py"):
        path.unlink()
    (place / "nothing").mkdir()
    make_training(place / "trained")
    return {**dict.fromkeys(CHANGES, place / "tiny"), "train": place / "nothing", "push": place / "trained"}


@pytest.fixture(autouse=True, scope="module")
def no_garbage():
    """Trainer collects garbage again and again, which takes longer than everything else here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def copy(folder, target):
    """A copy by hard links: nothing here changes a file in place."""
    return shutil.copytree(folder, target, copy_function=os.link)


def add(folder):
    pairs = {"user_id": ["new", "new", "u1"], "item_id": ["i1", "fresh", "fresh"]}
    Repository(folder).add(items=NewVectors(["fresh"], torch.ones(1, DIM)), interactions=Dataset.from_dict(pairs))


def add_is_seen(folder):
    """What each reader sees of `add`: true, if it has happened."""
    yield EmbeddingStore.open(folder).contains("user", ["new"])[0]
    yield EmbeddingStore.open(folder / "store").contains("item", ["fresh"])[0]
    yield "fresh" in EmbeddingStore.from_pretrained(folder).seen(["u1"])[0]
    yield "new" in AutoTokenizer.from_pretrained(folder).ids("user")
    yield Repository(folder).info()["counts"]["user"] == len(USERS) + 1
    yield Repository(folder).info()["additions"] is not None
    recommender = Recommender.from_pretrained(folder)
    yield recommender.store.contains("user", ["new"])[0]
    yield "fresh" in recommender.tokenizer.ids("item")


def remove(folder):
    Repository(folder).remove(users=["u2"], items=["i3"])


def remove_is_seen(folder):
    yield not EmbeddingStore.open(folder).contains("user", ["u2"])[0]
    yield EmbeddingStore.open(folder / "store").metadata(["i3"]) == [{"withdrawn": True}]
    for part in (folder, folder / "training" / "selection"):
        yield not EmbeddingStore.open(part).contains("user", ["u2"])[0]
        yield "u2" not in AutoTokenizer.from_pretrained(part).ids("user")
        yield "u2" not in load_collaborative(part / "collaborative")[1]["user"]
        yield AutoModel.from_pretrained(part / "collaborative").config.num_users == len(USERS) - 1
        yield AutoModel.from_pretrained(part, subfolder="collaborative").config.num_users == len(USERS) - 1
    for split in Repository(folder).splits().values():
        yield "u2" not in split["user_id"]
    yield "u2" not in Recommender.from_pretrained(folder).tokenizer.ids("user")


def save(folder):
    store = EmbeddingStore.open(folder)
    store.upsert("user", ["u1", "new"], torch.ones(2, DIM))
    store.upsert("item", ["fresh"], torch.ones(1, DIM))
    store.save_pretrained(folder / "store")


def save_is_seen(folder):
    store = EmbeddingStore.open(folder)
    yield store.contains("user", ["new"])[0]
    yield store.contains("item", ["fresh"])[0]
    yield torch.equal(store.get("user", ["u1"]), torch.ones(1, DIM))


def make_training(folder):
    train(tiny_splits(), Recipe.load("paper", overrides=TINY_TRAINING), folder)


def training_is_seen(folder):
    repository = Repository(folder)
    yield (folder / "training" / "run.json").is_file() and repository.info()["finished"]
    for read in (lambda: Recommender.from_pretrained(folder).recommend(["u1"]), repository.evaluate, repository.audit):
        try:
            read()
            yield True
        except FileNotFoundError as error:
            assert "training has not finished; run the same `tokenrec train` again to continue" in str(error) or (
                "it is no trained repository" in str(error) and not (folder / "training").exists()
            )
            yield False


def hub_name(folder):
    """The name of a folder on the Hub."""
    return f"tester/{folder.parent.name}-{folder.name}".replace("_", "-")


def push(folder):
    Repository(folder).push_to_hub(hub_name(folder))


def push_is_seen(folder):
    name, api = hub_name(folder), HfApi()
    files = api.list_repo_files(name) if api.repo_exists(name) else []
    # A repository on the Hub begins with one file.
    yield len(files) > 1
    for part in ("model.safetensors", "codes.safetensors", "store/store.json", "README.md") if files[1:] else ():
        yield part in files


CHANGES = {
    "add": (add, add_is_seen),
    "remove": (remove, remove_is_seen),
    "save": (save, save_is_seen),
    "train": (make_training, training_is_seen),
    "push": (push, push_is_seen),
}
# Those that change a repository and nothing else.
REPOSITORY_CHANGES = ("add", "remove", "save")
# The number of crash points, at least, and the step from one that is visited to the next.
POINTS = {"add": (80, 14), "remove": (300, 55), "save": (25, 1), "train": (400, 210), "push": (100, 50)}
changes = pytest.mark.parametrize("name", CHANGES)


def has_happened(name, folder):
    """Whether readers see the change; it is an error if they see different states."""
    [answer] = {bool(seen) for seen in CHANGES[name][1](folder)}
    return answer


def contents(folder):
    """All files of a folder, without the times in its records; the card has the name of the folder."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.name != ".update.lock"}
    return {
        name: path.is_dir() or (timeless(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes())
        for name, path in found.items()
        if name != "README.md"
    }


def timeless(record):
    """A JSON object without its times."""
    if not isinstance(record, dict):
        return record
    return {name: timeless(value) for name, value in record.items() if name != "seconds"}


def check_completes(name, folder, before):
    """The same change, made again, happens and leaves nothing else behind."""
    CHANGES[name][0](folder)
    assert not [path for path in folder.rglob(".*") if path.name != ".update.lock"]
    if name in ("train", "push"):
        # A resumed training ends with the same bytes, and a push changes nothing.
        assert contents(folder) == contents(before["push"])
    if name == "save":
        assert has_happened(name, folder)
    else:
        assert next(iter(CHANGES[name][1](folder)))
        assert [check.finding for check in Repository(folder).verify() if check.passed is not True] == []


def deaths(name, before, place, step, hub):
    """Every `step`th of the folders that a process can leave that dies in a change, without repetitions, and all its calls."""
    folder = copy(before[name], place / "watched")
    states, known, calls = [], [], []
    # Sizes by number: renaming does not change a file.
    sizes = {path.stat().st_ino: path.stat().st_size for path in folder.rglob("*")}

    def keep():
        state = place / f"state{len(states)}"
        states.append(state)
        if len(states) % step:
            return None
        if pushed := hub.repositories.get(("model", hub_name(folder))):
            hub.repositories["model", hub_name(state)] = deepcopy(pushed)
        return copy(folder, state)

    def look(call):
        calls.append(call)
        files = {path.relative_to(folder): path.stat() for path in folder.rglob("*") if path.name != ".update.lock"}
        for path, stat in files.items():
            if not (folder / path).is_dir() and sizes.get(stat.st_ino) != stat.st_size > 0:
                sizes[stat.st_ino] = stat.st_size
                if (state := keep()) is not None:
                    (state / path).unlink()
                    (state / path).write_bytes((folder / path).read_bytes()[: stat.st_size // 2])
        if (state := {path: stat.st_ino for path, stat in files.items()}) not in known:
            known.append(state)
            keep()

    with listening(look):
        CHANGES[name][0](folder)
    look("the end")
    assert has_happened(name, folder)
    return [state for state in states if state.is_dir()], calls


@changes
def test_wherever_a_process_dies_readers_see_one_state_and_the_change_can_be_made_again(before, hub, tmp_path, name):
    least, step = POINTS[name]
    states, calls = deaths(name, before, tmp_path, 1 if ALL else step, hub)
    assert len(calls) > least
    happened = []
    for state in states:
        happened.append(has_happened(name, state))
        check_completes(name, state, before)
    # The change becomes visible once.
    assert happened == sorted(happened)
    print(f"{name}: died at {len(calls)} calls, in {len(states)} different states, {sum(happened)} of them changed")


@changes
def test_whatever_call_fails_the_change_has_happened_or_not_and_says_so(before, hub, tmp_path, name):
    least, step = POINTS[name]
    counts = [0, 0]
    for number in range(0, sys.maxsize, 1 if ALL else 3 * step - 2):
        folder, calls = copy(before[name], tmp_path / str(number)), []

        def fail(call, number=number, calls=calls):
            calls.append(call)
            if len(calls) == number + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        try:
            with listening(fail):
                CHANGES[name][0](folder)
        except OSError as error:
            assert "no space left" in str(error).lower() and "\n" not in str(error)
            # The card is written when the training has finished.
            assert not has_happened(name, folder) or name == "train"
        else:
            assert has_happened(name, folder)
            counts[1] += 1
        check_completes(name, folder, before)
        shutil.rmtree(folder)
        if len(calls) <= number:
            break
        counts[0] += 1
    assert number > least
    print(f"{name}: {counts[0]} calls failed, {counts[1] - 1} times after the change had happened")


def in_a_child(work):
    """Runs `work` in a process of its own; returns its exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("name", [*REPOSITORY_CHANGES, "push"])
def test_a_limit_of_file_sizes_is_one_sentence_and_leaves_the_old_state(before, hub, tmp_path, name):
    folder = copy(before[name], tmp_path / "limited")

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))
        try:
            CHANGES[name][0](folder)
        except Exception as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            (tmp_path / "said").write_text(str(error))

    assert in_a_child(work) == 0
    said = (tmp_path / "said").read_text()
    assert "File too large" in said and "\n" not in said
    state = {"train": "finished stages are kept", "push": "nothing was uploaded"}.get(
        name, "the repository is as it was"
    )
    assert name == "save" or said.startswith(f"no space left for {folder}") and state in said
    assert not has_happened(name, folder)
    check_completes(name, folder, before)


@pytest.mark.parametrize("name", CHANGES if "TOKENREC_KILLS" in os.environ else ["save"])
def test_a_killed_process_can_be_followed_by_another(before, hub, tmp_path, name):
    """Real deaths, at any time: their number is in `TOKENREC_KILLS`."""
    folder, kills = copy(before[name], tmp_path / "killed"), int(os.environ.get("TOKENREC_KILLS", "1"))
    started = time.perf_counter()
    CHANGES[name][0](copy(before[name], tmp_path / "timed"))
    longest = 2 * (time.perf_counter() - started)
    happened = 0
    for number in range(kills):
        child = os.fork()
        if child == 0:
            # The lock of tqdm is shared with this process, which would wait for ever after a child that held it.
            TqdmDefaultWriteLock.acquire = TqdmDefaultWriteLock.release = lambda *_, **__: None
            CHANGES[name][0](folder)
            os._exit(0)
        time.sleep(longest * (number + 1) / (kills + 1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        happened += has_happened(name, folder)
        if has_happened(name, folder):
            check_completes(name, folder, before)
            shutil.rmtree(folder)
            copy(before[name], folder)
            hub.repositories.pop(("model", hub_name(folder)), None)
    check_completes(name, folder, before)
    print(f"{name}: killed {kills} times, {happened} times after the change had happened")


def test_a_process_with_other_hashes_of_strings_trains_the_same_bytes(before, tmp_path):
    """Weights, codes, vectors and measurements, with one seed and one thread; the order of sets differs between the two."""
    code = "import torch, test_crashes; torch.set_num_threads(1); test_crashes.make_training(test_crashes.Path(sys.argv[1]))"
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", f"import sys; {code}", tmp_path / "again"], env=environment, check=True)
    assert contents(tmp_path / "again") == contents(before["push"])
    asked = [Recommender.from_pretrained(folder).recommend(USERS) for folder in (tmp_path / "again", before["push"])]
    assert asked[0] == asked[1]


def add_to_store(folder, item):
    store = EmbeddingStore.open(folder)
    store.upsert("item", [item], torch.ones(1, DIM))
    store.save_pretrained(folder / "store")


def add_to_repository(folder, item):
    Repository(folder).add(items=NewVectors([item], torch.ones(1, DIM)))


@pytest.mark.parametrize("make_change", [add_to_store, add_to_repository])
def test_two_processes_at_once_lose_no_update_and_never_disturb_readers(before, tmp_path, make_change):
    """Each adds items, and repeats a change that is refused; their number is in `TOKENREC_INTERLEAVINGS`."""
    folder, rounds = copy(before["add"], tmp_path / "shared"), int(os.environ.get("TOKENREC_INTERLEAVINGS", "5"))
    read, write = os.pipe()

    def change(writer):
        for number in range(rounds):
            while True:
                try:
                    make_change(folder, f"{writer}{number}")
                    break
                except ValueError as error:
                    assert "by another process" in str(error)
                    os.write(write, b"-")
                    time.sleep(0.02)
        os.write(write, b".")

    children = []
    for writer in ("a", "b"):
        if (child := os.fork()) == 0:
            try:
                change(writer)
            except BaseException as error:
                os.write(write, f"{error!r}!".encode())
            os._exit(0)
        children.append(child)
    os.set_blocking(read, False)
    said, opened = "", 0
    while said.count(".") + said.count("!") < 2:
        if make_change is add_to_store:
            assert EmbeddingStore.open(folder).count("user") == len(USERS)
        else:
            recommender = Recommender.from_pretrained(folder)
            assert set(recommender.store.ids("item")) == set(recommender.tokenizer.ids("item"))
        opened += 1
        with suppress(BlockingIOError):
            said += os.read(read, 1 << 16).decode()
    for child in children:
        os.waitpid(child, 0)
    assert "!" not in said, said
    expected = {f"{writer}{number}" for writer in ("a", "b") for number in range(rounds)}
    assert expected <= set(EmbeddingStore.open(folder).ids("item"))
    print(f"{make_change.__name__}: {2 * rounds} changes, {said.count('-')} refused and repeated, {opened} readers")


def test_nothing_takes_its_name_before_its_content_is_on_the_disk(before, tmp_path):
    """Files that were not flushed may be empty after a power failure, although they have their names."""
    base = before["add"]
    known, flushed, unflushed = {path.stat().st_ino for path in base.rglob("*")}, set(), []
    flush, rename, replace = os.fsync, os.rename, os.replace

    def fsync(handle):
        flush(handle)
        flushed.add(os.fstat(handle).st_ino)

    def checked(original):
        def move(source, target, **options):
            for path in [Path(source), *Path(source).rglob("*")]:
                if path.stat().st_ino not in flushed | known and path.name != ".update.lock":
                    # What is given another temporary name, or one to be removed, may be lost.
                    unflushed.extend([path] * (Path(target).suffix != ".tmp" and Path(target).name != ".update"))
            original(source, target, **options)

        return move

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "rename", checked(rename))
        patch.setattr(os, "replace", checked(replace))
        for name in REPOSITORY_CHANGES:
            CHANGES[name][0](copy(base, tmp_path / name))
    assert flushed and not unflushed


def test_files_have_the_permissions_of_the_umask(before, tmp_path):
    folder = copy(before["add"], tmp_path / "shared")
    former = os.umask(0o027)
    try:
        for name in REPOSITORY_CHANGES:
            CHANGES[name][0](folder)
    finally:
        kept = os.umask(former)
    assert kept == 0o027
    changed = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_nlink == 1]
    assert {"codes.safetensors", "store.json", "model.safetensors", "train.parquet"} <= {path.name for path in changed}
    assert {f"{path.stat().st_mode & 0o777:o}" for path in changed} == {"640"}
