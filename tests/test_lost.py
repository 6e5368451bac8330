"""Nothing is lost: killed runs, full disks, read-only and vanishing folders, and signals at bad moments.

Every command runs in a process of its own, forked from a server that has imported the project already. What is done
to a run is done either from outside, by signals, or inside its process by a hook that is set before the command.

    python tests/test_lost.py    # not a test: a table of each stage's memory over 2,000 steps
"""

import contextlib
import errno
import functools
import gc
import importlib
import inspect
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import pytest
import torch

import model

STEPS = 20
SMALL = (
    "--limit 80 --vocabulary 300 --dim 16 --layers 1 --heads 2 --kv-heads 1 --context 256 --max-response 160".split()
)
FLAGS = {
    "model": [*SMALL, "--batch-size", "4"],
    "reward": ["--batch-size", "4"],
    "split": [],
    "dpo": ["--batch-size", "4", "--lr", "1e-3"],
    "ppo": "--batch-size 2 --minibatch-size 1 --ppo-epochs 1 --max-new-tokens 5".split(),
}
TRAINING = ["model", "reward", "dpo", "ppo"]
CHECKPOINT = {"model": "sft.pt", "reward": "reward.pt", "dpo": "dpo.pt", "ppo": "ppo.pt"}
PATIENCE = 120  # seconds until a process counts as hanging: far more than any needs
SERVER = multiprocessing.get_context("forkserver")


# ---- Processes ----


@pytest.fixture(scope="module", autouse=True)
def server():
    """Starts the server that forks the processes, with all that they need imported."""
    start_server()


def start_server() -> None:
    SERVER.set_forkserver_preload(["torch._dynamo", "model", "reward", "split", "dpo", "ppo", "test_lost"])
    with pytest.MonkeyPatch.context() as patch:  # this path, since some Python versions do not hand on sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()


STARTED = []


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    for process in STARTED:
        process.kill()
        process.join()
    STARTED.clear()


def child(command: str, flags: list[str], screens: tuple, hooks: list[tuple], sources: dict[type, str]) -> None:
    """What the process does: sets its hooks, each a function and its arguments, and runs the command."""
    for number, screen in enumerate(screens, 1):
        os.dup2(screen.fileno(), number)
        screen.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background inherit deaf ears
    torch.set_num_threads(1)
    sys.argv = [f"{command}.py", *flags]
    getsource = inspect.getsource
    inspect.getsource = lambda thing: sources.get(thing) or getsource(thing)
    module = importlib.import_module(command)
    for function, *arguments in hooks:
        function(*arguments)
    model.run_command(module.main)


@functools.cache
def settings_sources(command: str) -> dict[type, str]:
    """The source of a command's settings, which its flags are read from. Python parses a whole file to find a class:
    done here once, not in each of the processes, it halves the time of this file."""
    classes = importlib.import_module(command).Settings.__mro__[:-1]
    return {kind: inspect.getsource(kind) for kind in classes}


def start(command: str, out: Path, *flags, hooks: tuple = (), steps: int = STEPS) -> SimpleNamespace:
    """Starts a command. Its output comes through pipes, which no limit on files touches."""
    readers, writers = zip(SERVER.Pipe(False), SERVER.Pipe(False), strict=True)
    training = [] if command == "split" else ["--steps", steps]
    flags = [*FLAGS[command], "--device", "cpu", "--out", out, *training, *flags]
    arguments = command, list(map(str, flags)), writers, list(hooks), settings_sources(command)
    process = SERVER.Process(target=child, args=arguments)
    process.start()
    for writer in writers:
        writer.close()
    STARTED.append(process)
    return SimpleNamespace(process=process, pid=process.pid, readers=readers)


def end(running: SimpleNamespace) -> SimpleNamespace:
    """Waits for the end of a process: its exit code (minus the signal, if one killed it), stdout and stderr."""
    texts, deadline = dict.fromkeys(running.readers, b""), time.monotonic() + PATIENCE
    open_ones = set(texts)
    while open_ones:
        ready = wait(open_ones, max(0, deadline - time.monotonic()))
        assert ready, f"it hangs; its output: {texts.values()}"
        for reader in ready:
            piece = os.read(reader.fileno(), 65536)
            texts[reader] += piece
            if not piece:
                open_ones.remove(reader)
                reader.close()
    running.process.join(PATIENCE)
    out, err = (text.decode() for text in texts.values())
    return SimpleNamespace(code=running.process.exitcode, out=out, err=err)


def run(command: str, out: Path, *flags, hooks: tuple = (), steps: int = STEPS) -> SimpleNamespace:
    return end(start(command, out, *flags, hooks=hooks, steps=steps))


def succeed(command: str, out: Path, *flags, steps: int = STEPS) -> SimpleNamespace:
    result = run(command, out, *flags, steps=steps)
    assert result.code == 0, result.err
    return result


# ---- Hooks: what happens to a process from within ----


def on_call(module: str, name: str, number: int, action, *arguments) -> None:
    """Has `action` called just before call `number` (from 1) of a function, given as module and dotted name."""
    owner, calls = importlib.import_module(module), 0
    *owners, name = name.split(".")
    for part in owners:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    def count_and_call(*positional, **named):
        nonlocal calls
        calls += 1
        if calls == number:
            action(*arguments)
        return function(*positional, **named)

    setattr(owner, name, count_and_call)


def after_log(step: int, action, *arguments) -> None:
    """Has `action` called after the log line of a step, which is before its state is saved."""
    log = model.Training.log

    def log_and_act(self, *positional, **named):
        log(self, *positional, **named)
        if self.step == step:
            action(*arguments)

    model.Training.log = log_and_act


def on_write(name: str, number: int, late: bool, action, *arguments) -> None:
    """Has `action` called in write `number` (from 1) of the whole file `name`: before its first byte, or, if `late`,
    after the last one, when nothing has been put to the disk or renamed."""
    write_whole, writes = model.write_whole, 0

    def count_and_write(path, write):
        nonlocal writes
        writes += path.name == name
        if path.name != name or writes != number:
            return write_whole(path, write)

        def write_and_act(file):
            if not late:
                action(*arguments)
            write(file)
            if late:
                action(*arguments)

        return write_whole(path, write_and_act)

    model.write_whole = count_and_write


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def limit_files(size: int) -> None:
    """No file of this process can grow over `size` bytes from now on, as if the disk were full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit_growth(path: Path, more: int) -> None:
    limit_files(path.stat().st_size + more)


def fill_disk(path: Path) -> None:
    """Writes to `path` until its disk has no byte left."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def drop_root(user: int) -> None:
    os.setgid(user)
    os.setuid(user)


# ---- Files ----


def state_path(command: str, out: Path) -> Path:
    return (out / CHECKPOINT[command]).with_suffix(".state.pt")


def log_path(command: str, out: Path) -> Path:
    return (out / CHECKPOINT[command]).with_suffix(".jsonl")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def loads(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def whole_files(out: Path) -> None:
    """Every file under its final name can be loaded."""
    for path in out.glob("*.pt"):
        assert loads(path)["kind"], path


def same_weights(first: Path, second: Path) -> bool:
    ours, theirs = loads(first)["weights"], loads(second)["weights"]
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def complete_lines(path: Path) -> list[str]:
    """The lines of a log that have their end; a run that was killed may leave one that has not."""
    return re.findall(r".*\n", path.read_text()) if path.exists() else []


def figures(path: Path) -> list[dict]:
    """A log's records without what depends on the clock and the machine."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in record.items()
             if "second" not in name and name != "peak_memory_mb"} for record in records]  # fmt: skip


def one_line(result: SimpleNamespace, command: str) -> str:
    """The one line with which a command ends that can't go on; beside it stderr holds progress bars only."""
    assert result.code == 2, (result.code, result.err)
    assert "Traceback" not in result.err
    lines = [line for line in re.split(r"[\r\n]+", result.err) if line.strip()]
    lines = [line for line in lines if not re.search(r"\d+%\||\[\d\d:\d\d.*\]$", line)]
    assert len(lines) == 1 and lines[0].startswith(f"{command}.py: "), lines
    return lines[0]


# ---- A finished chain to compare with ----


def make_chain(out: Path) -> Path:
    for command in FLAGS:
        succeed(command, out)
    return out


@pytest.fixture(scope="module")
def chain(server, tmp_path_factory) -> Path:
    """All stages, each trained for STEPS steps without a pause. Tests only read it."""
    return make_chain(tmp_path_factory.mktemp("chain") / "out")


@pytest.fixture
def out(chain, tmp_path) -> Path:
    """A copy of the finished chain for the test alone."""
    return Path(shutil.copytree(chain, tmp_path / "out"))


def fresh(command: str, out: Path) -> None:
    """Takes away what the command writes, so that a file which is there was written in the test."""
    for path in (out / CHECKPOINT[command], log_path(command, out)):
        path.unlink()


def finished_like(command: str, out: Path, chain: Path) -> None:
    """The stage ended as the run without a pause did: weights and log are the same, and nothing is left over."""
    assert same_weights(out / CHECKPOINT[command], chain / CHECKPOINT[command])
    assert [record["step"] for record in figures(log_path(command, out))] == list(range(STEPS))
    assert figures(log_path(command, out)) == figures(log_path(command, chain))
    left = [path.name for path in out.iterdir() if path.name.endswith((".state.pt", ".part"))]
    assert not left, f"left over: {left}"


def go_on(command: str, out: Path, chain: Path, *flags) -> None:
    """Finishes a run that was cut: with --resume where there is a state, else from the start."""
    succeed(command, out, *flags, *["--resume"] * state_path(command, out).exists())
    finished_like(command, out, chain)


# ---- Killed ----


def wait_for(running: SimpleNamespace, happened, pause: float = 0.001) -> bool:
    """Waits until something happened, or the process ended. Returns whether it happened."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if not running.process.is_alive():
            return happened()
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(pause)
    return True


def freeze(running: SimpleNamespace) -> None:
    """Stops a process where it stands, and returns when it stands still or is no more."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(running.pid, signal.SIGSTOP)
    deadline, letter = time.monotonic() + PATIENCE, "R"
    while letter not in "TZX":
        assert time.monotonic() < deadline
        try:
            letter = Path(f"/proc/{running.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            letter = "X"


def thaw(running: SimpleNamespace) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(running.pid, signal.SIGCONT)


def written(path: Path) -> int:
    """When a file was last written to; 0 if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def kill_in_save(running: SimpleNamespace, part: Path, old: int, delay: float) -> None:
    """Kills the process while it writes `part`. It is frozen first, so that a save which was over by then is seen and
    the next one is waited for. What was last written at `old` an earlier kill left behind."""
    while wait_for(running, lambda: written(part) not in (0, old), pause=0) and running.process.is_alive():
        time.sleep(delay)
        freeze(running)
        if written(part) not in (0, old):
            return running.process.kill()
        thaw(running)


KILLS = ("in a step", "in a save", "early", "in a save", "in a step", "in the final save")


@pytest.mark.parametrize("command", TRAINING)
def test_a_run_killed_again_and_again_ends_as_if_it_never_was(command, out, chain):
    fresh(command, out)
    rng, kills, cuts = random.Random(command), [], []
    state, log = state_path(command, out), log_path(command, out)
    parts = {name: out / f"{path}.part" for name, path in (("state", state.name), ("final", CHECKPOINT[command]))}
    for number in range(40):
        how, resume, lines = KILLS[number % len(KILLS)], state.exists(), len(complete_lines(log))
        old = {name: written(part) for name, part in parts.items()}
        running = start(command, out, "--save-every", 1, *["--resume"] * resume)
        if how == "early":
            time.sleep(rng.uniform(0, 0.3))
        elif how == "in the final save":
            kill_in_save(running, parts["final"], old["final"], rng.uniform(0, 0.001))
        else:
            further = lines + rng.randint(2, 3)
            wait_for(running, lambda at=further: len(complete_lines(log)) >= at)
            if how == "in a step":
                time.sleep(rng.uniform(0, 0.03))
            else:
                kill_in_save(running, parts["state"], old["state"], rng.uniform(0, 0.001))
        running.process.kill()
        result = end(running)
        if result.code == 0:  # it was faster: an unhurt run more, and the next one begins from the start
            finished_like(command, out, chain)
            fresh(command, out)
            continue
        assert result.code == -signal.SIGKILL, result.err
        kills.append(how)
        cuts += [name for name, part in parts.items() if written(part) not in (0, old[name])]
        whole_after_a_kill(command, out)
        if resume and not state.exists():  # a state goes only when the checkpoint has come
            assert same_weights(out / CHECKPOINT[command], chain / CHECKPOINT[command])
        if len(kills) >= len(KILLS) and "state" in cuts:
            break
    assert len(kills) >= 5 and "state" in cuts
    print(f"{command}: {len(kills)} kills, {len(cuts)} of them cut a save: {', '.join(cuts)}")
    go_on(command, out, chain, "--save-every", 1)


def whole_after_a_kill(command: str, out: Path) -> None:
    """Every file can be loaded, and the log is in step with the state, line by line."""
    whole_files(out)
    steps = [json.loads(line)["step"] for line in complete_lines(log_path(command, out))]
    assert steps == list(range(len(steps)))
    if state_path(command, out).exists():
        assert loads(state_path(command, out))["step"] <= len(steps)


# ---- A full disk ----


def failed_write(command: str, out: Path, name: str, result: SimpleNamespace, before: dict[str, bytes]) -> None:
    """The command ended in one line that names the file; that file and the checkpoint are as they were."""
    assert name in one_line(result, command)
    after = contents(out)
    for kept in {name, CHECKPOINT[command], state_path(command, out).name} - {log_path(command, out).name}:
        assert after[kept] == before[kept], kept
    assert not [path for path in after if path.endswith(".part")]
    whole_files(out)


def keep_copy(out: Path, copy: Path) -> None:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(out, copy)


SHARES = {"model": (0.5,), "reward": (0.9,), "dpo": (0, 0.03, 0.4, 0.8, 0.9999), "ppo": (0.2,)}  # of the file, that fit


def no_room(out: Path, name: str, number: int, size: int) -> list[tuple]:
    """Hooks with which write `number` of the file `name` finds room for `size` bytes, after a copy of the folder."""
    copy = on_write, name, number, False, keep_copy, out, out.parent / "copy"
    return [copy, (on_write, name, number, False, limit_files, max(1, size))]


@pytest.mark.parametrize("command", TRAINING)
def test_a_state_that_finds_no_room_leaves_the_last_one(command, out, chain):
    state, resume = state_path(command, out), []
    for step, share in enumerate(SHARES[command], 3):
        size = int(share * 2.5 * (chain / CHECKPOINT[command]).stat().st_size)  # with the optimiser's two moments
        hooks = no_room(out, state.name, 2 if resume else 4, size)
        result = run(command, out, "--save-every", 1, *resume, hooks=hooks)
        before = contents(out.parent / "copy")
        failed_write(command, out, state.name, result, before)
        assert loads(state)["step"] == step and len(before[state.name]) > size
        resume = ["--resume"]
    go_on(command, out, chain)


@pytest.mark.parametrize("command", TRAINING)
def test_a_checkpoint_that_finds_no_room_leaves_the_old_one_and_the_state(command, out, chain):
    resume = []
    for share in SHARES[command]:
        size = int(share * (chain / CHECKPOINT[command]).stat().st_size)
        hooks = no_room(out, CHECKPOINT[command], 1, size)
        result = run(command, out, "--save-every", 6, *resume, hooks=hooks)
        failed_write(command, out, CHECKPOINT[command], result, contents(out.parent / "copy"))
        assert loads(state_path(command, out))["step"] >= 18
        resume = ["--resume"]
    go_on(command, out, chain)


@pytest.mark.parametrize("command", TRAINING)
def test_a_log_that_finds_no_room_is_named_and_resume_mends_it(command, out, chain, tmp_path):
    log, copy = log_path(command, out), tmp_path / "copy"
    hooks = (after_log, 6, keep_copy, out, copy), (after_log, 6, limit_growth, log, 40)
    result = run(command, out, "--save-every", 5, hooks=hooks)
    assert len(complete_lines(log)) == 7 and not log.read_bytes().endswith(b"\n"), "no line was cut"
    go_on(command, Path(shutil.copytree(out, tmp_path / "again" / "out")), chain)
    failed_write(command, out, log.name, result, contents(copy))


def test_pairs_that_find_no_room_leave_the_old_ones(out, chain):
    result = run("model", out, "--seed", 3, hooks=[(limit_files, 5000)])
    assert "pairs.pt" in one_line(result, "model")
    before, after = contents(chain), contents(out)
    assert {name for name in before if before[name] != after.get(name)} <= {"sft.jsonl"}


@pytest.mark.parametrize("size", [1000, 50_000], ids=["at its beginning", "in the middle"])
def test_a_file_that_finds_no_room_is_said_to_find_none(out, size):
    result = run("dpo", out, "--save-every", 1, hooks=no_room(out, "dpo.state.pt", 3, size))
    assert os.strerror(errno.EFBIG) in one_line(result, "dpo")


def test_a_disk_that_really_is_full(out, chain, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        out, filler = Path(shutil.copytree(out, disk / "out")), disk / "filler"
        for name in ("dpo.state.pt", "dpo.pt"):
            copy = on_write, name, 3 if "state" in name else 1, False, keep_copy, out, tmp_path / "copy"
            fill = on_write, name, 3 if "state" in name else 1, False, fill_disk, filler
            resume = ["--resume"] * (out / "dpo.state.pt").exists()
            result = run("dpo", out, "--save-every", 1, *resume, hooks=[copy, fill])
            failed_write("dpo", out, name, result, contents(tmp_path / "copy"))
            filler.unlink()
        go_on("dpo", out, chain)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# ---- A folder that can't be written to, or is gone ----


@pytest.fixture
def public_folder():
    """A folder that every user can reach, as those of the tests can't be."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    (folder / "out").chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "command, resume", [("model", False), ("reward", False), ("dpo", False), ("dpo", True), ("ppo", False)]
)
def test_a_folder_that_can_only_be_read_is_named_and_left_alone(command, chain, public_folder, resume):
    out = Path(shutil.copytree(chain, public_folder / "out"))
    if resume:
        assert run(command, out, hooks=[(after_log, 2, send, signal.SIGTERM)]).code == 130
    before = contents(out)
    for path in out.iterdir():
        path.chmod(0o444)
    out.chmod(0o555)
    hooks = [(drop_root, 65534)] if os.geteuid() == 0 else []  # root may write wherever it likes
    result = run(command, out, *["--resume"] * resume, hooks=hooks)
    assert str(out) in one_line(result, command)
    assert contents(out) == before


@pytest.mark.parametrize("command", TRAINING)
def test_a_folder_that_vanishes_under_a_run_stops_it(command, out):
    result = run(command, out, hooks=[(after_log, 5, shutil.rmtree, out)])
    assert log_path(command, out).name in one_line(result, command)


@pytest.mark.parametrize("step", [5, STEPS - 1], ids=["before a state is saved", "before the end"])
def test_a_folder_that_vanishes_before_a_save_is_named_or_made_anew(step, out, chain):
    result = run("dpo", out, "--save-every", 1, hooks=[(after_log, step, shutil.rmtree, out)])
    if result.code:
        assert str(out) in one_line(result, "dpo")
    else:
        assert "Traceback" not in result.err and same_weights(out / "dpo.pt", chain / "dpo.pt")


# ---- Signals ----

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])


def stopped_at_once(result: SimpleNamespace, number: int) -> None:
    """A signal ended the process, as a shell expects it to: Ctrl-C gives 130, and SIGTERM may do its own work."""
    assert result.code in ((130,) if number == signal.SIGINT else (130, 143, -signal.SIGTERM)), result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("command", TRAINING)
def test_sigterm_stops_after_the_step_and_resume_ends_the_same(command, out, chain):
    fresh(command, out)
    result = run(command, out, hooks=[(after_log, 4, send, signal.SIGTERM)])
    assert result.code == 130 and "Traceback" not in result.err
    assert "stopped after step 5" in result.out and "--resume" in result.out
    assert len(figures(log_path(command, out))) == 5 and not (out / CHECKPOINT[command]).exists()
    go_on(command, out, chain)


@SIGNALS
def test_a_signal_while_the_state_is_saved_lets_it_finish(out, chain, number):
    result = run("dpo", out, "--save-every", 1, hooks=[(on_write, "dpo.state.pt", 4, True, send, number)])
    assert result.code == 130 and "--resume" in result.out
    said = re.search(r"stopped after step (\d+) of 20", result.out)
    assert loads(out / "dpo.state.pt")["step"] == int(said[1]) in (4, 5)
    go_on("dpo", out, chain)


@SIGNALS
def test_a_second_signal_while_the_state_is_saved_leaves_the_one_before(out, chain, number):
    hooks = (after_log, 3, send, number), (on_write, "dpo.state.pt", 4, True, send, number)
    result = run("dpo", out, "--save-every", 1, hooks=hooks)
    stopped_at_once(result, number)
    assert loads(out / "dpo.state.pt")["step"] == 3 and not list(out.glob("*.part"))
    go_on("dpo", out, chain)


@pytest.mark.parametrize(
    "command, number", [*((command, signal.SIGINT) for command in TRAINING), ("dpo", signal.SIGTERM)]
)
def test_a_signal_in_the_final_save_leaves_the_old_checkpoint_and_the_state(command, out, chain, number):
    before = contents(out)
    hooks = [(on_write, CHECKPOINT[command], 1, True, send, number)]
    stopped_at_once(run(command, out, "--save-every", 6, hooks=hooks), number)
    assert (out / CHECKPOINT[command]).read_bytes() == before[CHECKPOINT[command]]
    assert loads(state_path(command, out))["step"] >= 18
    go_on(command, out, chain)


class Interrupted(io.BufferedWriter):
    """A file that sends a signal to its process in one of its writes: on the way to the disk Python looks for signals,
    also when torch called it, and then the handler runs inside of the write."""

    def write(self, data):
        self.writes = getattr(self, "writes", 0) + 1
        if self.writes == 20:
            send(self.number)
        return super().write(data)


def signal_in_write(name: str, number: int) -> None:
    """Has `number` sent in the middle of writing the file `name`."""
    opened = Path.open

    def open_path(self, mode="r", **options):
        if self.name != f"{name}.part":
            return opened(self, mode, **options)
        file = Interrupted(io.FileIO(self, mode))
        file.number = number
        return file

    Path.open = open_path


@SIGNALS
def test_a_signal_in_the_middle_of_a_write_is_no_failed_write(out, chain, number):
    before = (out / "dpo.pt").read_bytes()
    stopped_at_once(run("dpo", out, "--save-every", 6, hooks=[(signal_in_write, "dpo.pt", number)]), number)
    assert (out / "dpo.pt").read_bytes() == before
    go_on("dpo", out, chain)


BEFORE = [
    ("model", "model", "PairsBuilder.add", 30),
    ("model", "model", "train_tokenizer", 1),
    ("reward", "model", "load_file", 2),
    ("dpo", "dpo", "pair_logprobs", 1),
    ("ppo", "model", "load_file", 4),
]


@SIGNALS
@pytest.mark.parametrize("command, module, name, call", BEFORE, ids=[f"{row[0]} {row[2]}" for row in BEFORE])
def test_a_signal_before_training_stops_at_once_and_touches_nothing(command, module, name, call, out, number):
    before = contents(out)
    result = run(command, out, hooks=[(on_call, module, name, call, send, number)])
    stopped_at_once(result, number)
    assert contents(out) == before


@SIGNALS
@pytest.mark.parametrize("call", [1, 2])
def test_a_signal_while_the_trained_reward_model_is_tried_out_leaves_the_state(out, chain, number, call):
    result = run("reward", out, "--save-every", 6, hooks=[(on_call, "reward", "score_pairs", call, send, number)])
    stopped_at_once(result, number)
    assert loads(out / "reward.state.pt")["step"] >= 18
    go_on("reward", out, chain)


def test_ctrl_c_while_the_trained_reward_model_is_tried_out_loses_no_step(out, chain):
    hooks = [(on_call, "reward", "score_pairs", 1, send, signal.SIGINT)]  # long before the first state is due
    stopped_at_once(run("reward", out, hooks=hooks), signal.SIGINT)
    assert (out / "reward.state.pt").exists(), "all steps are lost"
    go_on("reward", out, chain)


@SIGNALS
def test_a_signal_while_the_processes_agree_whether_to_stop_is_not_lost(out, chain, number):
    # With several processes this is where the fast ones spend their time: they wait for the slowest.
    result = run("dpo", out, hooks=[(on_call, "model", "summed", 5, send, number)])
    assert result.code == 130, "the signal was lost"
    go_on("dpo", out, chain)


@SIGNALS
def test_a_signal_just_after_the_last_step_loses_no_work(out, chain, number):
    # Two handlers are set before the first step and taken back after the last one, which is where this comes.
    result = run("dpo", out, hooks=[(on_call, "signal", "signal", 3, send, number)])
    assert "Traceback" not in result.err
    if result.code == 0:
        return finished_like("dpo", out, chain)
    assert result.code == 130
    assert "--resume" not in result.out or (out / "dpo.state.pt").exists(), "--resume has nothing to go on from"
    go_on("dpo", out, chain)


def test_a_signal_at_any_moment_leaves_whole_files(out, chain, tmp_path):
    rng, codes = random.Random(0), []
    began = time.monotonic()
    succeed("reward", out, "--save-every", 1)
    usual = time.monotonic() - began
    for number in [signal.SIGINT, signal.SIGTERM] * 3:
        fresh("reward", out)
        ready = tmp_path / f"ready{len(codes)}"
        hooks = [(on_call, "reward", "parse_settings", 1, Path.touch, ready)]
        running = start("reward", out, "--save-every", 1, hooks=hooks)
        wait_for(running, ready.exists)
        time.sleep(rng.uniform(0, usual))
        if running.process.is_alive():
            os.kill(running.pid, number)
        result = end(running)
        codes.append(result.code)
        assert result.code in (0, 130, -signal.SIGTERM) and "Traceback" not in result.err, result.err
        whole_files(out)
        if result.code:
            go_on("reward", out, chain)
        else:
            finished_like("reward", out, chain)
    print(f"exit codes: {codes}")


# ---- What lies about ----


def count_tensors(path: Path) -> None:
    """Notes how many tensors are alive."""
    gc.collect()
    with path.open("a") as file:
        print(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()), file=file)


@pytest.fixture(scope="module", params=TRAINING)
def thirty(request, chain, tmp_path_factory) -> SimpleNamespace:
    """Thirty steps with a state after each: what lay in the folder at any time, and the tensors alive in two steps."""
    command, folder = request.param, tmp_path_factory.mktemp("thirty")
    out = Path(shutil.copytree(chain, folder / "out"))
    hooks = [(after_log, step, count_tensors, folder / "tensors") for step in (9, 29)]
    running, listings = start(command, out, "--save-every", 1, hooks=hooks, steps=30), set()
    while running.process.is_alive():
        listings.add(tuple(sorted(os.listdir(out))))
    result = end(running)
    assert result.code == 0, result.err
    tensors = [int(line) for line in (folder / "tensors").read_text().split()]
    return SimpleNamespace(command=command, out=out, listings=listings, tensors=tensors)


def test_there_is_one_state_at_most_and_none_in_the_end(thirty):
    states, parts = ([[name for name in listing if name.endswith(end)] for listing in thirty.listings]
                     for end in (".state.pt", ".part"))  # fmt: skip
    assert max(map(len, states)) == 1 and {name for one in states for name in one} == {
        state_path(thirty.command, thirty.out).name
    }
    assert max(map(len, parts)) <= 1
    assert not [path for path in thirty.out.iterdir() if path.name.endswith((".state.pt", ".part"))]


def test_no_step_leaves_a_tensor_behind(thirty):
    early, late = thirty.tensors
    assert late - early < 10, "a tensor a step would be twenty"


def test_a_finished_run_takes_away_what_a_killed_one_left_half_written(out):
    (out / "dpo.state.pt.part").write_bytes(b"half a state")
    succeed("dpo", out)
    assert not list(out.glob("*.part"))


def test_a_new_run_does_not_throw_away_a_saved_state_unasked(out, chain):
    assert run("dpo", out, hooks=[(after_log, 9, send, signal.SIGTERM)]).code == 130
    before = contents(out)
    result = run("dpo", out)
    if result.code:
        line = one_line(result, "dpo")
        assert "dpo.state.pt" in line and "--resume" in line
        assert contents(out) == before
    else:
        assert "dpo.state.pt" in result.out + result.err, "ten steps were thrown away without a word"
        finished_like("dpo", out, chain)


# ---- Memory, by hand ----


def note_memory(path: Path) -> None:
    """Notes the resident memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    with path.open("a") as file:
        print(pages * resource.getpagesize() / 2**20, file=file)


def print_memory() -> None:
    """Prints each stage's resident memory in the course of 2,000 steps, in MB."""
    steps = (200, 1000, 2000)
    start_server()
    with tempfile.TemporaryDirectory() as folder:
        out = make_chain(Path(folder) / "out")
        print("stage " + "".join(f"{f'step {step}':>12}" for step in steps))
        for command in TRAINING:
            notes = Path(folder) / command
            hooks = [(after_log, step - 1, note_memory, notes) for step in steps]
            result = run(command, out, hooks=hooks, steps=steps[-1])
            assert result.code == 0, result.err
            print(f"{command:6}" + "".join(f"{float(line):12.1f}" for line in notes.read_text().split()))


if __name__ == "__main__":
    import test_lost

    test_lost.print_memory()
