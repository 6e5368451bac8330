"""The six commands as a user meets them: the chain and what it writes, stopping and going on, kills, full disks and
folders that are gone, mistakes, and --help."""

import contextlib
import importlib
import io
import itertools
import json
import os
import pkgutil
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import TOLERANCES

import model

REPOSITORY = Path(__file__).resolve().parent.parent
ROWS = "--limit 120 --context 320 --max-response 160"
CHAIN = {  # command: flags that make it quick
    "model": f"{ROWS} --vocabulary 300 --dim 32 --layers 1 --heads 2 --kv-heads 1 --steps 6 --batch-size 8 --lr 1e-2",
    "reward": "--steps 6 --batch-size 8", "split": "",
    "dpo": "--steps 6 --batch-size 8 --lr 1e-3",
    "ppo": "--steps 6 --batch-size 4 --minibatch-size 2 --max-new-tokens 8",
    "evaluate": "--prompts 6 --max-new-tokens 8 --samples 1",
}
SAVED = {"model": "sft", "reward": "reward", "dpo": "dpo", "ppo": "ppo"}  # training stage: its checkpoint's name
READS = """reward --data pairs.pt, reward --test test.pt, reward --init sft.pt, split --data pairs.pt,
split --init reward.pt, dpo --data easy.pt, dpo --init sft.pt, ppo --data hard.pt, ppo --init dpo.pt,
ppo --reference sft.pt, ppo --reward reward.pt, evaluate --data test.pt, evaluate --sft sft.pt,
evaluate --reward reward.pt, evaluate --policies ppo.pt"""
READS = [one.split() for one in READS.split(",")]  # command, a flag that names a file, a file that fits
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
CTRL_C, TERM, KILL = (partial(signal.raise_signal, number) for number in SIGNALS)


def run(command: str, out: Path, *flags, hooks: tuple = ()) -> SimpleNamespace:
    """Runs a command in this process, with its quick flags and then these: its exit code, and what it writes to a
    terminal that has no γ. A hook is (function, number, action): the action comes just before call `number`."""
    code, limit = 0, resource.getrlimit(resource.RLIMIT_FSIZE)
    screen, errors = (io.TextIOWrapper(io.BytesIO(), "latin-1") for _ in range(2))
    flags = [*CHAIN[command].split(), "--device", "cpu", "--out", out, *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{command}.py", *map(str, flags)])
        main = importlib.import_module(command).main
        for name, number, action in hooks:
            patch.setattr(name, before_call(pkgutil.resolve_name(name), number, action))
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(errors):
            try:
                model.run_command(main)
            except SystemExit as stop:
                code = stop.code
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    screen.seek(0), errors.seek(0)
    return SimpleNamespace(code=code, out=screen.read(), err=errors.read())


def before_call(function, number: int, action):
    """The function, but with `action` called just before call `number`, counted from 1."""
    calls = itertools.count(1)

    def hooked(*arguments, **named):
        if next(calls) == number:
            action()
        return function(*arguments, **named)

    return hooked


def succeed(command: str, out: Path, *flags) -> str:
    """What a command prints that must succeed."""
    result = run(command, out, *flags)
    assert not result.code, result.err
    return result.out


def complaint(result: SimpleNamespace) -> str:
    """The one line on stderr with which a command ended that could not go on; beside it are progress bars only."""
    assert result.code == 2, result
    lines = [line for line in re.split(r"[\r\n]+", result.err) if line.strip()]
    lines = [line for line in lines if not re.search(r"\d+%\||\[\d\d:\d\d.*\]$", line)]
    assert len(lines) == 1 and re.match(r"\w+\.py: ", lines[0]), lines
    return lines[0]


def refusal(command: str, out: Path, *flags) -> str:
    """The line with which a command refuses its flags; every file in `out` is as it was."""
    before = contents(out)
    line = complaint(run(command, out, *flags))
    assert contents(out) == before and line.startswith(f"{command}.py: ")
    return line


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def content(path: Path) -> dict:
    """What a .pt file holds."""
    return torch.load(path, weights_only=True)


def log(path: Path) -> list[dict]:
    """The records of a log, read as strict JSON, without those numbers that depend on the clock."""
    records = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    return [{name: value for name, value in record.items() if "second" not in name and "memory" not in name}
            for record in records]


def same_weights(first: Path, second: Path) -> bool:
    """To the last bit."""
    ours, theirs = content(first)["weights"], content(second)["weights"]
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> SimpleNamespace:
    """The whole chain on the toy world, run in an empty folder. Tests only read it."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "cwd").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "cwd")
        printed = {command: succeed(command, folder / "my out") for command in CHAIN}
    return SimpleNamespace(folder=folder, out=folder / "my out", printed=printed)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """The chain on pairs of the user's own, which have no gold reward."""
    folder = tmp_path_factory.mktemp("other")
    row = '{"prompt": "Is %s odd?", "chosen": " Yes, %s is.", "rejected": " No."}\n'
    (folder / "rows.jsonl").write_text("".join(row % (number, number) for number in range(60)))
    for command in CHAIN:
        succeed(command, folder / "out", *["--data", folder / "rows.jsonl"] * (command == "model"))
    return folder / "out"


@pytest.fixture
def out(toy, tmp_path) -> Path:
    """A copy of the finished toy chain, for the test alone."""
    return Path(shutil.copytree(toy.out, tmp_path / "out"))


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory, monkeypatch):
    """An empty working folder, and Ctrl-C as in a shell: what runs in the background inherits deaf ears."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def test_the_chain_writes_these_files_and_nothing_outside_its_folder_and_says_what_comes_next(toy, other):
    """Gold rewards where there are any, and numbers that strict JSON has."""
    names = [f"{name}.{ending}" for name in SAVED.values() for ending in ("pt", "jsonl")]
    names += ["pairs.pt", "test.pt", "easy.pt", "hard.pt", "evaluation.json"]
    assert sorted(contents(toy.folder)) == sorted(f"my out/{name}" for name in names)
    for command, following in itertools.pairwise(CHAIN):
        names = [f"{toy.out}/{name}.pt" for name in ([SAVED[command]] if command in SAVED else ["easy", "hard"])]
        expected = f"wrote {', '.join(names)}; next: python {following}.py --out '{toy.out}'"
        assert toy.printed[command].splitlines()[-1] == expected
    assert toy.printed["evaluate"].splitlines()[-1] == f"wrote {toy.out}/evaluation.json"
    for out, gold in ((toy.out, True), (other, False)):
        rows = json.loads((out / "evaluation.json").read_text(), parse_constant=pytest.fail)
        assert list(rows) == ["sft", "dpo", "ppo"] and ("gold_reward" in log(out / "ppo.jsonl")[0]) == gold
        assert rows["sft"]["win_rate_vs_sft"] == 0.5 and (rows["ppo"]["gold_reward_high"] is not None) == gold
    made = [content(path)["made"] for path in toy.out.glob("*.pt")]
    assert made[0]["data"] and all(one["data"] == made[0]["data"] for one in made)
    assert content(toy.out / "dpo.pt")["made"]["command"] == f"dpo.py {CHAIN['dpo']} --device cpu --out '{toy.out}'"


@pytest.mark.parametrize("command, name", [("model", "a.pt"), ("reward", "a.pt"), ("split", "my pairs.pt"),
                                           ("dpo", "dpo_0.5.pt"), ("ppo", "a.pt")])
def test_the_command_suggested_next_can_be_pasted_and_reads_what_was_written(out, monkeypatch, command, name):
    monkeypatch.chdir(out.parent)
    out, flag = Path(out.name), "--easy" if command == "split" else "--save"  # the default --out, which needs no flag
    written, _, following = succeed(command, out, flag, name).splitlines()[-1].rpartition("; next: python ")
    written = Path(re.match(r"wrote ([^,]*)", written)[1])
    following, *flags = shlex.split(following)
    assert written == out / name and name in flags and "--out" not in flags
    assert flag != "--save" or len(log(out / name.replace(".pt", ".jsonl"))) == 6
    succeed(following.removesuffix(".py"), out, *flags)


@pytest.mark.parametrize("command, name", SAVED.items())
def test_grad_checkpoint_leaves_the_weights_as_they_are_and_another_seed_does_not(toy, out, command, name):
    calls, few = [], ["--steps", 0] if command in ("model", "reward") else []  # what the seed alone decides there
    for *flags, seed in (["--grad-checkpoint", 0], ["--save", "one.pt", *few, 0], ["--save", "two.pt", *few, 10**18]):
        hooks = [("model.checkpoint", 1, lambda: calls.append(command))]
        assert not run(command, out, *flags, "--seed", seed, hooks=hooks).code and calls == [command]
    first, second = (dict(content(folder / f"{name}.pt")["weights"]) for folder in (toy.out, out))
    torch.testing.assert_close(second, first, rtol=0, atol=1e-6)
    one, two = (content(out / save)["weights"] for save in ("one.pt", "two.pt"))
    assert any((one[key] - two[key]).abs().max() > 1e-5 for key in one)


def test_baselines_live_beside_the_main_run(out, tmp_path, monkeypatch):
    before = contents(out)
    succeed("dpo", out, "--data", "pairs.pt", "--save", "dpo_all.pt", "--steps", 3, "--save-every", 0)
    succeed("ppo", out, "--data", "pairs.pt", "--init", "sft.pt", "--save", "ppo_all.pt", "--steps", 0)
    after = contents(out)
    assert after.keys() - before.keys() == {"dpo_all.pt", "dpo_all.jsonl", "ppo_all.pt", "ppo_all.jsonl"}
    assert after | before == after and same_weights(out / "ppo_all.pt", out / "sft.pt")
    monkeypatch.setitem(CHAIN, "model", f"{ROWS} --steps 2 --batch-size 8")
    succeed("model", out, "--init", "sft.pt", "--save", "sft2.pt")
    assert not same_weights(out / "sft2.pt", out / "sft.pt")
    succeed("dpo", out, "--init", "sft2.pt")  # the same data, made anew, goes with the files of before; fewer do not
    succeed("model", tmp_path / "fewer", "--init", out / "sft.pt", "--limit", 100)
    assert "goes back to other data" in refusal("dpo", out, "--init", tmp_path / "fewer" / "sft.pt")


def go_on(command: str, out: Path, whole: Path, *flags, near: float = 0.0) -> None:
    """--resume ends as if there had been no pause: weights and log to the last bit, or `near`; nothing is left over."""
    succeed(command, out, *flags, "--resume")
    name = SAVED[command]
    weights = [content(folder / f"{name}.pt")["weights"] for folder in (out, whole)]
    torch.testing.assert_close(*map(dict, weights), rtol=near, atol=near)
    for ours, theirs in zip(log(out / f"{name}.jsonl"), log(whole / f"{name}.jsonl"), strict=True):
        if near:  # what rounds otherwise may turn the sign of a margin of 0, as all are at the first step
            ours, theirs = ({**line, "accuracy": 0} for line in (ours, theirs))
        assert ours == pytest.approx(theirs, rel=near, abs=near)
    assert not [path for path in contents(out) if path.endswith((".state.pt", ".part"))]
    assert f"{out}/{name}.state.pt: no such file, so" in refusal(command, out, *flags, "--resume", "--seed", 3)


@pytest.mark.parametrize("command, stop", list(zip(SAVED, [TERM, CTRL_C] * 2, strict=True)))
def test_ctrl_c_and_sigterm_stop_after_the_step_and_resume_ends_the_same(out, toy, tmp_path, device, command, stop):
    flags, whole, near = ["--device", device, "--dtype", "fp32"], toy.out, TOLERANCES[device.type, "fp32"][2]
    if device.type != "cpu":
        whole = Path(shutil.copytree(out, tmp_path / "whole"))
        succeed(command, whole, *flags)
    name, handlers = SAVED[command], [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    (out / f"{name}.pt").unlink()
    result = run(command, out, *flags, hooks=[("model.Training.log", 3, stop)])
    assert result.code == 130 and "Traceback" not in result.err
    assert result.out.splitlines()[-1] == "stopped after step 3 of 6; the same command with --resume goes on"
    assert handlers == [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    assert len(log(out / f"{name}.jsonl")) == 3 and not (out / f"{name}.pt").exists()
    (group,) = content(out / f"{name}.state.pt")["optimizer"]["param_groups"]
    options = (1e-5 if command == "ppo" else 1e-8), (0.9, 0.95), 0.0  # PPO's ε as in OpenAI Baselines
    assert (group["eps"], group["betas"], group["weight_decay"]) == options
    assert f"{name}.state.pt: a run was stopped, or still runs; use --resume" in refusal(command, out, *flags)
    assert "--lr is not what the saved run had: 0.5 now" in refusal(command, out, *flags, "--resume", "--lr", 0.5)
    if command == "model":  # other data
        assert "--limit is not what the saved run had: 9 now" in refusal(command, out, *flags, "--resume", "--limit", 9)
    state = (out / f"{name}.state.pt").read_bytes()
    (out / f"{name}.state.pt").write_bytes(state[:9000])
    assert f"{name}.state.pt: damaged" in refusal(command, out, *flags, "--resume")
    (out / f"{name}.state.pt").write_bytes(state)
    go_on(command, out, whole, *flags, "--grad-checkpoint", near=near)  # as one does who ran out of memory


def test_a_second_run_at_the_same_time_is_refused_and_resume_on_a_file_made_anew(out, toy):
    log_step, said = "model.Training.log", []
    hooks = [(log_step, 1, lambda: said.append(run("dpo", out))), (log_step, 6, CTRL_C),
             (log_step, 4, lambda: said.append(run("dpo", out, "--resume")))]
    assert run("dpo", out, "--save-every", 2, hooks=hooks).code == 130
    assert [(one.code, f"{out}/dpo.jsonl: another run writes it" in one.err) for one in said] == [(2, True)] * 2
    assert log(out / "dpo.jsonl") == log(toy.out / "dpo.jsonl")
    succeed("split", out, "--fraction", 0.4)
    assert "easy.pt is not what the saved run had" in refusal("dpo", out, "--resume")
    succeed("split", out, "--seed", 9)  # another command, which writes what there was
    go_on("dpo", out, toy.out)


@pytest.mark.parametrize("command, prints, call, names", [
    ("model", "model.pack", 7, ["sft.pt"]), ("reward", "reward.report", 1, ["reward.pt"]),  # pack: after six steps
    ("split", "split.histogram", 1, ["easy.pt", "hard.pt"])])
def test_results_are_saved_before_they_are_printed(out, toy, command, prints, call, names):
    for name in names:
        (out / name).unlink()
    complaint(run(command, out, hooks=[(prints, call, Mock(side_effect=OSError))]))
    assert all(content(out / name)["kind"] for name in names)
    if command in SAVED:
        go_on(command, out, toy.out)


@pytest.mark.parametrize("action, remedy", [
    (lambda: torch.empty(2**60, device="cpu"), "out of memory; lower --pass-tokens"),
    (lambda: bytearray(2**60), "out of memory"), (Mock(side_effect=model.UserError("A: out of memory")), "A: out of"),
    (Mock(side_effect=RuntimeError("CUDA error: out of memory")), "out of memory"),
    (Mock(side_effect=RuntimeError("No working C++ compiler found in x")), "no C++ compiler; install one")])
def test_what_the_machine_lacks_is_said_in_one_line(out, action, remedy):
    for place in ("model.Config", "dpo.pack"):  # while a file is read, and in training
        assert remedy in complaint(run("dpo", out, hooks=[(place, 1, action)]))
    with pytest.raises(RuntimeError, match="our mistake"):
        run("dpo", out, hooks=[("dpo.pack", 1, Mock(side_effect=RuntimeError("our mistake")))])


@pytest.mark.parametrize("command, name, times", [
    ("model", "model.train_tokenizer", 1), ("reward", "reward.load_model", 1), ("dpo", "dpo.pair_logprobs", 1),
    ("ppo", "ppo.load_pairs", 1), ("dpo", "model.Training.log", 2)])
def test_ctrl_c_before_training_and_a_second_one_stop_at_once(out, command, name, times):
    before = contents(out)
    result = run(command, out, hooks=[(name, 1, stop) for stop in (TERM, CTRL_C)[-times:]])
    assert result.code == 130 and result.err.endswith("stopped\n") and "Traceback" not in result.err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert contents(out) | {"dpo.jsonl": b""} == before | {"dpo.jsonl": b""}


def test_ctrl_c_in_the_middle_of_a_write_is_no_failed_write(out, toy, monkeypatch):
    before, save = (out / "dpo.pt").read_bytes(), torch.save
    with monkeypatch.context() as patch:  # torch makes another error of what is raised in a write
        policy_file = SimpleNamespace(write=before_call(len, 2, CTRL_C))
        patch.setattr(torch, "save", lambda what, file: save(what, policy_file if what["kind"] == "policy" else file))
        result = run("dpo", out)
    assert result.code == 130 and result.err.endswith("stopped\n") and (out / "dpo.pt").read_bytes() == before
    go_on("dpo", out, toy.out)


def die_in_the_next_write() -> None:
    """SIGKILL comes when a file is written and on the disk, but not yet in its place."""
    replace = before_call(os.replace, 1, KILL)
    os.fsync = before_call(os.fsync, 1, lambda: setattr(os, "replace", replace))


KILLS = {  # when a run dies: a hook, steps logged by then, and the step of the state
    "in a step": ("model.Training.log", 4, KILL, 3, 2),
    "in a save": ("model.Training.save_state", 2, die_in_the_next_write, 4, 2),
    "in the last save": ("{}.save_model", 1, die_in_the_next_write, 6, 6),
}


@pytest.fixture(scope="module")
def killed(toy, tmp_path_factory) -> Path:
    """What the kills leave, which happen at the end of this file, in a process of its own."""
    folder, environment = tmp_path_factory.mktemp("killed"), {**os.environ, "OMP_NUM_THREADS": "1"}
    for command, when in itertools.product(SAVED, KILLS):
        shutil.copytree(toy.out, folder / command / when, ignore=shutil.ignore_patterns(f"{SAVED[command]}.*"))
    subprocess.run([sys.executable, __file__, folder], check=True, timeout=100, env=environment)
    return folder


@pytest.mark.parametrize("command, when", list(itertools.product(SAVED, KILLS)))
def test_a_killed_run_leaves_whole_files_and_goes_on_from_its_last_state(killed, toy, command, when):
    out, name, (*_, logged, step) = killed / command / when, SAVED[command], KILLS[when]
    assert content(out / f"{name}.state.pt")["step"] == step and len(log(out / f"{name}.jsonl")) == logged
    assert all(content(path)["kind"] for path in out.glob("*.pt")) and not (out / f"{name}.pt").exists()
    with (out / f"{name}.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "caf\xe9\0\0\n17\n[')  # as a power cut may leave it
    go_on(command, out, toy.out)


FULL = [(command, f"{name}.pt", f"{command}.save_model", 1, 10_000, 6) for command, name in SAVED.items()]
FULL += [("dpo", "dpo.state.pt", "model.Training.save_state", 2, size, 2) for size in (0, 20_000, 100_000)]
FULL += [("dpo", "dpo.jsonl", "model.Training.log", 4, 40, 2), ("model", "pairs.pt", "model.save", 1, 5000, None)]


@pytest.mark.parametrize("command, name, function, number, room, step", FULL)
def test_what_finds_no_room_is_named_and_nothing_is_lost(out, toy, command, name, function, number, room, step):
    def fill_disk() -> None:
        size = room + (out / name).stat().st_size if name.endswith(".jsonl") else room  # no file grows over this size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    (out / f"{SAVED[command]}.pt").write_bytes(b"the old one")
    before = contents(out)
    line = complaint(run(command, out, "--save-every", 2, hooks=[(function, number, fill_disk)]))
    assert f"{out / name}" in line and "File too large" in line
    after, changes = contents(out), {f"{SAVED[command]}.jsonl", f"{SAVED[command]}.state.pt"}
    changes |= {"pairs.pt", "test.pt"} if step and command == "model" else set()  # with another line on what made them
    assert {path for path in after | before if after.get(path) != before.get(path)} <= changes
    if step is not None:
        assert content(out / f"{SAVED[command]}.state.pt")["step"] == step
        go_on(command, out, toy.out)


def test_a_users_file_is_not_written_over_and_a_folder_that_is_a_file_or_vanishes_is_named_or_made_anew(out, toy):
    for text in (json.dumps({"chosen": "a", "rejected": "b"}), "5", "a diary"):
        (out / "mine.jsonl").write_text(text)
        assert "mine.jsonl: not a log" in refusal("dpo", out, "--save", "mine.pt")
        assert "choose another --easy" in refusal("split", out, "--easy", "mine.pt")
    (out / "own.state.pt").touch()
    assert "own.state.pt: a run was stopped" in refusal("split", out, "--easy", "own.pt")
    (out / "other.jsonl").mkdir()
    assert f"{out}/other.jsonl" in refusal("dpo", out, "--save", "other.pt")
    Path("blocked").write_text("I am a file")
    for command in CHAIN:
        files = [word for name, flag, file in READS if name == command for word in (flag, out / file)]
        assert "blocked" in complaint(run(command, Path("blocked"), *files))
    assert Path("blocked").read_text() == "I am a file"
    result = run("dpo", out, hooks=[("model.Training.log", 3, lambda: shutil.rmtree(out))])
    assert str(out / "dpo.jsonl") in complaint(result)
    shutil.copytree(toy.out, out)
    result = run("dpo", out, hooks=[("model.Training.save_state", 1, lambda: shutil.rmtree(out))])
    assert not result.code and same_weights(out / "dpo.pt", toy.out / "dpo.pt")


@pytest.mark.parametrize("command, flag, name", READS)
def test_a_file_of_another_run_or_kind_or_damaged_or_missing_is_refused(out, other, command, flag, name):
    line = refusal(command, out, flag, other / name)
    assert "goes back to other data than" in line and str(other / name) in line
    wrong = "reward.pt" if name in ("sft.pt", "dpo.pt", "ppo.pt") else "sft.pt"
    shutil.copy(out / wrong, out / "wrong.pt")
    assert f"{out}/wrong.pt: holds a {content(out / wrong)['kind']}" in refusal(command, out, flag, "wrong.pt")
    (out / "half.pt").write_bytes((out / name).read_bytes()[: (out / name).stat().st_size // 2])
    assert f"{out}/half.pt: damaged" in refusal(command, out, flag, "half.pt")
    assert f"{out}/my own.pt: no such file; run the stage" in refusal(command, out, flag, "my\nown.pt")


def test_a_bare_name_is_looked_up_in_out_then_here_and_one_with_a_slash_is_a_path(out):
    shutil.copy(out / "easy.pt", "mine.pt")
    succeed("dpo", out, "--data", "mine.pt")
    shutil.copy(out / "sft.pt", out / "mine.pt")
    assert f"{out}/mine.pt: holds a policy" in refusal("dpo", out, "--data", "mine.pt")
    for path in ("./mine.pt", f"../{Path.cwd().name}/mine.pt"):
        succeed("dpo", out, "--data", path)
    assert "--save dpo.pt: taken" in refusal("dpo", out, "--init", out / "dpo.pt")


@pytest.mark.parametrize("flags", [
    "model --save test.pt", "model --layers 0", "model --dim 34", "model --limit 0", "model --vocabulary 256",
    "model --kv-heads 3 --heads 4", "model --context 100 --max-response 100", "model --vocabulary 300 --init sft.pt",
    "model --label-temperature 1 --data hh", "model --save pairs.pt", "model --save a.pt --data easy.pt",
    "model --save a.pt --extrapolate dpo.pt", "model --alpha 0.4", "model --save sft.pt --data easy.pt --init dpo.pt",
    "model --limit 9 --save a.pt --data easy.pt --init sft.pt", "split --fraction 2", "split --hard a.pt --easy a.pt",
    "split --answers 3", "split --chosen labelled", "split --temperature 0.5", "split --max-new-tokens 9",
    "split --answers 1 --policy sft.pt", "split --easy mine", "split --easy sft.pt --policy sft.pt",
    "split --easy pairs.pt", "split --hard reward.pt", "dpo --lr -1", "dpo --device mps", "dpo --beta 0",
    "dpo --save mine", "dpo --label-smoothing 2", "dpo --label-smoothing 0.1 --loss ipo", "dpo --batch-size 0",
    "dpo --warmup 1.5", "dpo --clip 0", "dpo --save deeper/mine.pt", "dpo --self-weight 1 --loss linear",
    "dpo --save sft.pt", "ppo --temperature 0", "ppo --gamma 1.1", "ppo --max-new-tokens 0", "evaluate --save ppo.pt",
    "evaluate --policies", "evaluate --judge http://localhost", "evaluate --export sft.pt", "evaluate --judge-model m",
])
def test_a_wrong_flag_is_named(out, monkeypatch, flags):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    command, flag, *values = flags.split()
    assert flag in refusal(command, out, flag, *values)


@pytest.mark.parametrize("command", CHAIN)
def test_help_of_a_script_names_every_flag_with_a_text_and_its_default(monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [f"{command}.py", "--help"])
    screen = io.TextIOWrapper(io.BytesIO(), "latin-1")
    with pytest.raises(SystemExit, match="0"), contextlib.redirect_stdout(screen):
        runpy.run_path(REPOSITORY / f"{command}.py", run_name="__main__")
    screen.seek(0)
    printed = screen.read()
    assert f"python {command}.py" in printed
    entries = re.split(r"\n  (?=--)", printed.partition("\noptions:\n")[2])[1:]
    entries = {re.match(r"--[\w-]+", entry)[0]: " ".join(entry.split()) for entry in entries}
    for field in fields(importlib.import_module(command).Settings):
        entry, default = entries["--" + field.name.replace("_", "-")], field.metadata["default"]
        text = field.metadata["help"].encode("latin-1", "replace").decode("latin-1")
        assert text in entry and (default is None or f"[{default}" in entry), field.name
    assert command != "dpo" or entries["--lr"] == "--lr LR peak learning rate [5e-05, pretrained 5e-07]"


if __name__ == "__main__":  # what `killed` starts: each run in a fork, on the files in FOLDER/<stage>/<when>
    importlib.import_module("torch._dynamo")  # once, not in each fork
    for command, when in itertools.product(SAVED, KILLS):
        if os.fork() == 0:
            name, number, action, *_ = KILLS[when]
            folder = Path(sys.argv[1]) / command / when
            run(command, folder, "--save-every", 2, hooks=[(name.format(command), number, action)])
            os._exit(1)
        assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL, (command, when)
