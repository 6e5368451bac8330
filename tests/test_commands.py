"""The six commands as a user meets them: the whole chain, baselines, stopping and going on, mistakes, and --help."""

import contextlib
import dataclasses
import gzip
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model
import ppo
from model import GPT, CommonSettings, generate, load_model

REPOSITORY = Path(model.__file__).parent
SMALL = "--limit 300 --steps 20 --vocabulary 400 --dim 32 --layers 1 --heads 2 --kv-heads 1 --batch-size 16 --lr 1e-2"
CHAIN = {  # command: flags that make it quick
    "model": SMALL.split(),
    "reward": "--steps 4 --batch-size 8".split(),
    "split": [],
    "dpo": "--steps 4 --batch-size 8".split(),
    "ppo": "--steps 2 --batch-size 4 --ppo-epochs 2 --max-new-tokens 12".split(),
    "evaluate": "--prompts 6 --max-new-tokens 12 --samples 1".split(),
}
TRAINING = ["model", "reward", "dpo", "ppo"]
CHECKPOINT = {"model": "sft.pt", "reward": "reward.pt", "dpo": "dpo.pt", "ppo": "ppo.pt"}
MEASURES = ["gold_reward", "reward", "win_rate_vs_chosen", "win_rate_vs_sft", "kl", "length", "ended"]


# ---- Helpers ----


def run(command: str, *flags) -> SimpleNamespace:
    """Runs a command in this process. A traceback of the command is a traceback here."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{command}.py", *map(str, flags)])
        try:
            model.run_command(importlib.import_module(command).main)
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def train(command: str, out: Path, *flags) -> SimpleNamespace:
    """Runs a command of the chain that must succeed, with its quick flags, on the CPU."""
    result = run(command, *CHAIN[command], "--device", "cpu", "--out", out, *flags)
    assert not result.code, result.err
    return result


def shell(command: str, *flags, cwd: Path) -> subprocess.Popen:
    """Starts a command in a process of its own."""
    script = cwd / f"{command}.py" if (cwd / f"{command}.py").exists() else REPOSITORY / f"{command}.py"
    return subprocess.Popen([sys.executable, script, *map(str, flags)], cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})  # fmt: skip


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def complaint(command: str, out: Path, *flags) -> str:
    """The one line with which a command refuses its flags, and leaves the files in `out` as they were."""
    before = contents(out)
    result = run(command, *CHAIN[command], "--out", out, *flags)
    assert result.code == 2
    assert contents(out) == before, "a command that failed wrote files"
    assert result.err.count("\n") == 1 and result.err.endswith("\n"), f"not one line: {result.err!r}"
    line = result.err[:-1].rpartition("\r")[2]  # before it, at most a progress bar that was wiped away
    assert line.startswith(f"{command}.py: ")
    return line


def log_of(path: Path) -> list[dict]:
    """The lines of a log, read as strict JSON: NaN and Infinity are errors."""

    def refuse(text):
        raise ValueError(f"{text} in {path}")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["weights"]


def same_weights(first: Path, second: Path) -> bool:
    ours, theirs = weights(first), weights(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def run_chain(folder: Path, **more: list) -> SimpleNamespace:
    """All six commands, in folder/out, from an empty working directory folder/cwd."""
    (folder / "cwd").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "cwd")
        results = {name: train(name, folder / "out", *more.get(name, [])) for name in CHAIN}
    evaluation = json.loads((folder / "out" / "evaluation.json").read_text())
    return SimpleNamespace(folder=folder, out=folder / "out", results=results, evaluation=evaluation)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> SimpleNamespace:
    """The whole chain on the toy world. Tests only read it."""
    return run_chain(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Another toy run: a tokenizer of the same size with other merges."""
    out = tmp_path_factory.mktemp("other")
    train("model", out, "--seed", 1, "--limit", 100, "--steps", 0)
    train("reward", out, "--steps", 0)
    return out


@pytest.fixture
def out(toy, tmp_path) -> Path:
    """A copy of the finished toy chain, for the test alone."""
    return Path(shutil.copytree(toy.out, tmp_path / "out"))


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path_factory, monkeypatch):
    """So that no file which lies about in the checkout is found by its bare name."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


# ---- The whole chain ----


def test_the_chain_writes_every_file_and_leaves_no_rubbish(toy):
    made = {path.name for path in toy.out.iterdir()}
    logs = {"sft.jsonl", "reward.jsonl", "dpo.jsonl", "ppo.jsonl"}
    assert made >= {"pairs.pt", "test.pt", "easy.pt", "hard.pt", "evaluation.json", *CHECKPOINT.values()} | logs
    assert not [name for name in made if name.endswith((".part", ".state.pt"))]


def test_nothing_is_written_outside_the_out_folder(toy):
    assert sorted(path.name for path in toy.folder.iterdir()) == ["cwd", "out"]
    assert not list((toy.folder / "cwd").iterdir())


@pytest.mark.parametrize(
    "command, written, following",
    [
        ("model", ["sft.pt"], "reward.py"),
        ("reward", ["reward.pt"], "split.py"),
        ("split", ["easy.pt", "hard.pt"], "dpo.py"),
        ("dpo", ["dpo.pt"], "ppo.py"),
        ("ppo", ["ppo.pt"], "evaluate.py"),
        ("evaluate", ["evaluation.json"], None),
    ],
)
def test_the_last_line_says_what_was_written_and_what_comes_next(toy, command, written, following):
    last = toy.results[command].out.rstrip("\n").splitlines()[-1]
    for name in written:
        assert str(toy.out / name) in last
    assert following is None or re.search(rf"python {following} .*--out {re.escape(str(toy.out))}", last)


@pytest.mark.parametrize("command", TRAINING)
def test_every_line_of_a_log_is_an_object_with_the_common_metrics(toy, command):
    log = log_of((toy.out / CHECKPOINT[command]).with_suffix(".jsonl"))
    steps = int(CHAIN[command][CHAIN[command].index("--steps") + 1])
    assert [record["step"] for record in log] == list(range(steps))
    rate = "episodes_per_second" if command == "ppo" else "pairs_per_second"
    for name in ("loss", "lr", "grad_norm", "seconds", "tokens_per_second", "peak_memory_mb", rate):
        assert all(math.isfinite(record[name]) for record in log), name
    for name in ("lr", "seconds", "tokens_per_second", "peak_memory_mb", rate):
        assert all(record[name] > 0 for record in log), name


def test_the_evaluation_has_every_measure_of_every_policy_with_its_error(toy):
    assert list(toy.evaluation) == ["sft", "dpo", "ppo"]
    for summary in toy.evaluation.values():
        for name in MEASURES:
            assert math.isfinite(summary[name]) and summary[f"{name}_se"] >= 0
        for name in ("win_rate_vs_chosen", "win_rate_vs_sft", "ended"):
            assert 0 <= summary[name] <= 1
        assert 1 <= summary["length"] <= 12


def test_dpo_starts_at_ln_2_and_ppo_and_sft_at_kl_0(toy):
    assert abs(log_of(toy.out / "dpo.jsonl")[0]["loss"] - math.log(2)) < 1e-6
    assert abs(log_of(toy.out / "ppo.jsonl")[0]["kl"]) < 1e-4
    assert abs(toy.evaluation["sft"]["kl"]) < 1e-4
    assert toy.evaluation["sft"]["win_rate_vs_sft"] == 0.5


def test_training_lowers_the_loss_and_the_split_parts_add_up(toy):
    losses = [record["loss"] for record in log_of(toy.out / "sft.jsonl")]
    assert losses[-1] < losses[0] - 0.5
    sizes = {name: len(torch.load(toy.out / f"{name}.pt", weights_only=True)["lengths"])
             for name in ("pairs", "easy", "hard")}  # fmt: skip
    assert sizes["easy"] + sizes["hard"] == sizes["pairs"] and abs(sizes["easy"] - sizes["hard"]) <= 1


def test_a_log_stays_json_when_the_only_answer_is_one_token(out):
    train("ppo", out, "--batch-size", 1, "--max-new-tokens", 1)
    assert [record["length"] for record in log_of(out / "ppo.jsonl")] == [1, 1]


@pytest.mark.parametrize(
    "command, flags, following",
    [
        ("reward", ["--save", "mine.pt"], "python split.py --init mine.pt --easy EASY_NAME.pt --hard HARD_NAME.pt"),
        ("split", ["--easy", "mine.pt"], "python dpo.py --data mine.pt --save NAME.pt"),
        ("dpo", ["--save", "mine.pt"], "python ppo.py --init mine.pt --save NAME.pt"),
        ("ppo", ["--save", "mine.pt"], "python evaluate.py --policies sft.pt mine.pt"),
        ("split", ["--hard", "mine.pt"], "python dpo.py"),
    ],
)
def test_the_command_that_comes_next_reads_what_was_written(out, command, flags, following):
    last = train(command, out, *flags).out.splitlines()[-1]
    assert "mine.pt" in last.split("; next: ")[0] and last.endswith(f"; next: {following} --out {out}")


def test_a_command_typed_in_the_checkout_works_and_writes_only_to_out(toy, tmp_path):
    for source in REPOSITORY.glob("*.py"):
        shutil.copy(source, tmp_path)
    shutil.copytree(toy.out, tmp_path / "mine")
    before = contents(tmp_path)
    flags = ["--data", "easy.pt", "--out", "mine", "--save", "typed.pt", "--steps", 2, "--batch-size", 8]
    process = shell("dpo", *flags, cwd=tmp_path)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert (
        printed.splitlines()[-1] == "wrote mine/typed.pt; next: python ppo.py --init typed.pt --save NAME.pt --out mine"
    )
    after = contents(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in after.keys() - before.keys()} == {
        "mine/typed.pt",
        "mine/typed.jsonl",
    }
    assert all(after[path] == old for path, old in before.items())


@pytest.mark.parametrize("command", TRAINING)
def test_checkpointed_gradients_are_the_same(toy, out, command):
    train(command, out, "--grad-checkpoint")
    for name, tensor in weights(out / CHECKPOINT[command]).items():
        torch.testing.assert_close(tensor, weights(toy.out / CHECKPOINT[command])[name], rtol=0, atol=1e-6)


def test_a_bare_name_is_looked_up_in_out_first_and_then_as_a_path(out):
    shutil.move(out / "easy.pt", "mine.pt")
    train("dpo", out, "--data", "mine.pt")
    shutil.copy(out / "sft.pt", "mine.pt")
    shutil.copy(out / "hard.pt", out / "mine.pt")
    train("dpo", out, "--data", "mine.pt")


# ---- Data of the user's own, in the layout of HH ----


def hh_rows() -> list[dict]:
    """Dialogues of one to three turns, and rows with every fault that a row may have."""
    places = "river wood hill lake town garden market bridge harbour field".split()
    rows = []
    for number in range(48):
        place, talk = places[number % 10], ""
        for turn in range(number % 3):
            talk += f"\n\nHuman: Question {turn}, how far is the {place}?\n\nAssistant: It is {number} miles away."
        talk += f"\n\nHuman: What can I see at the {place} on day {number}?\n\nAssistant:"
        rows.append({"chosen": f"{talk} The {place} is best in the morning.", "rejected": f"{talk} Nothing much."})
    talk = "\n\nHuman: Is it warm today?\n\nAssistant:"
    rows += 3 * [{"chosen": f"{talk} Yes.", "rejected": f"{talk} Yes."}]
    rows += 2 * [{"chosen": "It is warm.", "rejected": "It is cold."}]
    rows += 4 * [{"chosen": f"{talk} Yes, it is.", "rejected": talk}]
    rows += [{"chosen": f"{talk} Yes.", "rejected": f"{talk.replace('warm', 'cold')} Yes, a little."}]
    rows += 2 * [{"chosen": f"{talk} {'Very warm indeed. ' * 40}", "rejected": f"{talk} No."}]
    long_talk = "\n\nHuman: Tell me more.\n\nAssistant: There is not more to tell." * 20
    rows += [{"chosen": f"{long_talk}{talk} Warm, yes.", "rejected": f"{long_talk}{talk} Cold, no."}]
    rows += [{"chosen": f"{talk} Café ☀ <|endoftext|> \ud83d \x00.", "rejected": f"{talk} 🙂"}]
    return rows


@pytest.fixture(scope="module")
def hh(tmp_path_factory) -> SimpleNamespace:
    """The whole chain on the dialogues above."""
    folder = tmp_path_factory.mktemp("hh")
    path = tmp_path_factory.mktemp("data") / "talks.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in hh_rows())
    return run_chain(folder, model=["--data", path, "--steps", 3, "--context", 160, "--max-response", 60])


def test_dropped_rows_are_counted_on_the_screen(hh):
    screen = hh.results["model"].out
    assert "62 rows read" in screen
    for what, count in [("identical", 3), ("Assistant", 2), ("empty response", 4), ("prompts differ", 1),
                        ("response over 60 tokens", 2), ("cut at its beginning", 1)]:  # fmt: skip
        assert re.search(rf"{what}.*: {count}$", screen, re.MULTILINE), what
    train_pairs, test_pairs = map(int, re.search(r"(\d+) training pairs, (\d+) test pairs", screen).groups())
    assert train_pairs + test_pairs == 62 - 3 - 2 - 4 - 1 - 2 and test_pairs > 0


def test_without_gold_reward_it_is_null_and_the_rest_is_there(hh):
    assert list(hh.evaluation) == ["sft", "dpo", "ppo"]
    for summary in hh.evaluation.values():
        assert summary["gold_reward"] is None and summary["gold_reward_se"] is None
        assert all(math.isfinite(summary[name]) for name in MEASURES if name != "gold_reward")
    assert re.search(r"^SFT +– ", hh.results["evaluate"].out, re.MULTILINE)
    assert "gold_reward" not in log_of(hh.out / "ppo.jsonl")[0]


# ---- Baselines ----


@pytest.mark.parametrize("name", ["dpo_all", "dpo_beta_0.5"])
def test_a_baseline_lives_beside_the_main_run(out, name):
    before = contents(out)
    train("dpo", out, "--data", "pairs.pt", "--save", f"{name}.pt", "--steps", 3)
    after = contents(out)
    assert {path.name for path in after.keys() - before.keys()} == {f"{name}.pt", f"{name}.jsonl"}
    assert all(after[path] == old for path, old in before.items())
    assert len(log_of(out / f"{name}.jsonl")) == 3
    train("evaluate", out, "--policies", "dpo.pt", f"{name}.pt")
    assert list(json.loads((out / "evaluation.json").read_text())) == ["dpo", name]


def test_a_checkpoint_in_a_folder_of_its_own_leaves_the_main_run_alone(out):
    before = contents(out)
    result = run("dpo", *CHAIN["dpo"], "--out", out, "--device", "cpu", "--save", "run2/dpo.pt")
    assert result.code == 2 or (out / "run2" / "dpo.pt").exists()
    after = contents(out)
    assert [path.name for path, old in before.items() if after[path] != old] == []


def test_two_policies_of_one_name_are_not_taken_for_one_another(out):
    train("dpo", out, "--save", "away.pt", "--lr", 1e-2, "--warmup", 0)
    (out / "run2").mkdir()
    shutil.copy(out / "away.pt", out / "run2" / "sft.pt")
    train("evaluate", out, "--policies", "away.pt", "--save", "expected.json")
    (expected,) = json.loads((out / "expected.json").read_text()).values()
    assert expected["kl"] > 0.01 and expected["win_rate_vs_sft_se"] > 0  # it answers otherwise than sft.pt does
    train("evaluate", out, "--policies", "run2/sft.pt", "--save", "one.json")
    (one,) = json.loads((out / "one.json").read_text()).values()
    assert one == expected
    both = run("evaluate", *CHAIN["evaluate"], "--out", out, "--policies", "sft.pt", "run2/sft.pt", "--save", "2.json")
    assert both.code == 2 or len(json.loads((out / "2.json").read_text())) == 2


@pytest.mark.parametrize("command, init", [("dpo", "sft.pt"), ("ppo", "dpo.pt")])
def test_no_steps_leave_the_weights_as_they_were(out, command, init):
    train(command, out, "--steps", 0, "--save", "same.pt")
    assert same_weights(out / "same.pt", out / init)
    assert log_of(out / "same.jsonl") == []


@pytest.mark.parametrize("command", TRAINING)
def test_the_seed_alone_decides_the_weights(toy, out, command):
    train(command, out, "--save", "again.pt")
    train(command, out, "--save", "else.pt", "--seed", 7)
    assert same_weights(out / "again.pt", toy.out / CHECKPOINT[command])
    assert not same_weights(out / "else.pt", toy.out / CHECKPOINT[command])


# ---- Stopping and going on ----


def at_step(monkeypatch, number: int, action) -> None:
    """Has `action` called at the end of step `number` of the next training loop."""
    log = model.Training.log

    def log_and_act(self, *arguments, **metrics):
        log(self, *arguments, **metrics)
        if self.step == number:
            action()

    monkeypatch.setattr(model.Training, "log", log_and_act)


@pytest.mark.parametrize("command", TRAINING)
def test_a_stopped_run_goes_on_as_if_it_never_stopped(out, monkeypatch, command):
    flags = [*CHAIN[command], "--device", "cpu", "--steps", 6]
    train(command, out, "--steps", 6, "--save", "whole.pt")
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        stopped = run(command, *flags, "--out", out, "--save", "cut.pt")
    assert stopped.code == 130
    assert "--resume" in stopped.out + stopped.err
    assert not (out / "cut.pt").exists() and len(log_of(out / "cut.jsonl")) == 3
    train(command, out, "--steps", 6, "--save", "cut.pt", "--resume")
    assert same_weights(out / "cut.pt", out / "whole.pt")
    whole, cut = log_of(out / "whole.jsonl"), log_of(out / "cut.jsonl")
    assert [record["step"] for record in cut] == [0, 1, 2, 3, 4, 5]
    assert [record["loss"] for record in cut] == [record["loss"] for record in whole]
    assert not list(out.glob("*.state.pt"))


def test_a_killed_run_goes_on_from_its_last_saved_state(out, monkeypatch):
    def crash():
        raise RuntimeError("power cut")

    train("dpo", out, "--steps", 8, "--save", "whole.pt")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        at_step(patch, 5, crash)
        train("dpo", out, "--steps", 8, "--save", "cut.pt", "--save-every", 2)
    assert len(log_of(out / "cut.jsonl")) == 6  # two steps more than the saved state
    train("dpo", out, "--steps", 8, "--save", "cut.pt", "--resume")
    assert same_weights(out / "cut.pt", out / "whole.pt")
    assert [record["step"] for record in log_of(out / "cut.jsonl")] == list(range(8))


def test_a_second_ctrl_c_stops_at_once_and_leaves_the_checkpoint(out, monkeypatch):
    before, handler = (out / "dpo.pt").read_bytes(), signal.getsignal(signal.SIGINT)

    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # the handler runs between two lines of Python

    at_step(monkeypatch, 1, twice)
    result = run("dpo", *CHAIN["dpo"], "--device", "cpu", "--out", out)
    assert result.code == 130 and result.err.endswith("stopped\n")
    assert (out / "dpo.pt").read_bytes() == before
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_stops_a_real_process_with_130_and_no_traceback(out):
    process = shell("dpo", "--out", out, "--save", "long.pt", "--steps", 100000, "--batch-size", 2, cwd=out)
    log, began = out / "long.jsonl", time.monotonic()
    try:
        while not (log.exists() and log.read_text().count("\n") >= 3) and process.poll() is None:
            assert time.monotonic() - began < 100, "no step was logged"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "--resume" in printed + errors and "Traceback" not in errors
    assert (out / "long.state.pt").exists() and not (out / "long.pt").exists()


@pytest.mark.parametrize("command", TRAINING)
def test_resume_without_a_saved_state_is_refused(out, command):
    assert "--resume" in complaint(
        command, out, "--resume", "--seed", 3
    )  # the seed: model.py must keep its old pairs.pt


def test_resume_of_another_model_is_refused(out, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run("model", *CHAIN["model"], "--out", out, "--device", "cpu").code == 130
    line = complaint("model", out, "--resume", "--dim", 64)
    assert "--resume" in line or "sft.state.pt" in line


def test_resume_from_a_damaged_state_is_refused(out):
    (out / "dpo.state.pt").write_bytes(b"no state at all")
    assert "dpo.state.pt" in complaint("dpo", out, "--resume")


def test_a_loss_that_is_not_finite_names_the_step_and_saves_nothing(out):
    before = (out / "dpo.pt").read_bytes()
    result = run("dpo", *CHAIN["dpo"], "--out", out, "--device", "cpu", "--lr", 1e30, "--warmup", 0)
    assert result.code == 2
    line = result.err.splitlines()[-1].rpartition("\r")[2]
    found = re.match(r"dpo\.py: step ([123]): the \w+ is not finite, on pairs ([\d ]+) of --data easy.pt", line)
    assert sorted(map(int, found[2].split())) == sorted(
        model.batch_indices(pair_count(out / "easy.pt"), 8, int(found[1]), 0)
    )
    assert (out / "dpo.pt").read_bytes() == before


def pair_count(path):
    return len(torch.load(path, weights_only=True)["lengths"])


def broken_reward(out, value):
    """Saves a reward model whose rewards are all `value`, though its weights are finite."""
    content = torch.load(out / "reward.pt", weights_only=True)
    content["weights"]["head.weight"] *= 0
    content["weights"]["head.weight"][0, 0] = value
    torch.save(content, out / "broken.pt")


def test_a_reward_that_is_not_finite_stops_before_anything_is_written(out):
    broken_reward(out, 3e38)  # times a hidden state beyond 1 this overflows
    assert "the rewards of pairs" in complaint("split", out, "--init", "broken.pt", "--device", "cpu")
    before = (out / "ppo.pt").read_bytes()
    result = run("ppo", *CHAIN["ppo"], "--out", out, "--device", "cpu", "--reward", "broken.pt")
    assert result.code == 2 and "step 0: the reward is not finite, on pairs " in result.err
    assert (out / "ppo.pt").read_bytes() == before


@pytest.mark.parametrize("command, name", [("reward", "sft.pt"), ("ppo", "reward.pt"), ("evaluate", "ppo.pt")])
def test_weights_that_are_not_finite_are_refused(out, command, name):
    content = torch.load(out / name, weights_only=True)
    content["weights"]["trunk.norm.weight" if name == "reward.pt" else "norm.weight"][3] = math.nan
    torch.save(content, out / name)
    assert f"{name}: holds weights that are not finite" in complaint(command, out)


# ---- Mistakes: one line on stderr, exit code 2, no file touched ----


@pytest.mark.parametrize(
    "command, name, maker",
    [
        ("reward", "pairs.pt", "model.py"),
        ("reward", "test.pt", "model.py"),
        ("reward", "sft.pt", "model.py"),
        ("split", "reward.pt", "reward.py"),
        ("dpo", "easy.pt", "split.py"),
        ("dpo", "sft.pt", "model.py"),
        ("ppo", "hard.pt", "split.py"),
        ("ppo", "dpo.pt", "dpo.py"),
        ("ppo", "reward.pt", "reward.py"),
        ("evaluate", "test.pt", "model.py"),
        ("evaluate", "ppo.pt", "ppo.py"),
    ],
)
def test_a_missing_file_names_the_command_that_makes_it(out, command, name, maker):
    (out / name).unlink()
    line = complaint(command, out)
    assert name in line and f"python {maker}" in line


def test_a_missing_file_of_ones_own_name_does_not_send_to_the_wrong_command(out):
    line = complaint("ppo", out, "--init", "dpo_all.pt")
    assert "dpo_all.pt" in line and "python model.py" not in line


@pytest.mark.parametrize(
    "command, flag, name",
    [
        ("reward", "--init", "reward.pt"),
        ("reward", "--test", "dpo.pt"),
        ("split", "--init", "sft.pt"),
        ("split", "--data", "sft.pt"),
        ("dpo", "--init", "reward.pt"),
        ("dpo", "--init", "pairs.pt"),
        ("dpo", "--data", "sft.pt"),
        ("ppo", "--reward", "sft.pt"),
        ("ppo", "--reference", "reward.pt"),
        ("ppo", "--data", "dpo.pt"),
        ("evaluate", "--policies", "reward.pt"),
        ("evaluate", "--reward", "dpo.pt"),
    ],
)
def test_a_file_of_the_wrong_kind_is_refused(out, command, flag, name):
    assert name in complaint(command, out, flag, name)


def half_of(path: Path) -> bytes:
    return path.read_bytes()[: path.stat().st_size // 2]


def saved(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: b"",
        lambda out: b"hello, I am text\n",
        lambda out: half_of(out / "sft.pt"),
        lambda out: saved([1, 2, 3]),
        lambda out: saved({"weights": torch.zeros(3)}),
        lambda out: saved({"kind": "policy"}),
        lambda out: saved({"kind": "policy", "version": 99}),
        lambda out: saved({"kind": "policy", "version": 1}),
    ],
    ids=["empty", "text", "half", "a list", "other weights", "no version", "later version", "nothing inside"],
)
def test_a_damaged_or_foreign_checkpoint_is_refused(out, damage):
    (out / "mine.pt").write_bytes(damage(out))
    assert "mine.pt" in complaint("dpo", out, "--init", "mine.pt")


def test_a_damaged_pairs_file_is_refused(out):
    (out / "easy.pt").write_bytes(half_of(out / "easy.pt"))
    assert "easy.pt" in complaint("dpo", out)
    (out / "hard.pt").write_bytes(saved({"kind": "pairs", "version": 1}))
    assert "hard.pt" in complaint("ppo", out)


GOOD_ROW = b'{"prompt": "Hello?", "chosen": " Yes.", "rejected": " No."}\n'


BAD_DATA = [  # file name, bytes, what the message says beside the file's name
    ("empty.jsonl", b"", ""),
    ("blank.jsonl", b"\n\n", ""),
    ("empty.json", b"", ""),
    ("no_rows.json", b"[]", ""),
    ("number.json", b"3", ""),
    ("object.json", b'{"chosen": "a", "rejected": "b"}', ""),
    ("text.jsonl", GOOD_ROW + b"once upon a time\n", "row 2"),
    ("half.jsonl", GOOD_ROW + GOOD_ROW[:20], "row 2"),
    ("field.jsonl", GOOD_ROW + b'{"prompt": "Hello?", "chosen": " Yes."}\n', "row 2.*rejected"),
    ("null_field.jsonl", GOOD_ROW + b'{"chosen": null, "rejected": "b"}\n', "row 2.*chosen"),
    ("null.jsonl", GOOD_ROW + b"null\n", "row 2"),
    ("number.jsonl", GOOD_ROW + b"17\n", "row 2"),
    ("list.jsonl", GOOD_ROW + b'["prompt", "chosen", "rejected"]\n', "row 2"),
    ("string.jsonl", GOOD_ROW + b'"prompt"\n', "row 2"),
    ("deep.jsonl", GOOD_ROW + b"[" * 100000 + b"\n", "row 2"),
    ("latin1.jsonl", GOOD_ROW + GOOD_ROW.replace(b"Yes", b"\xe9t\xe9"), "row 2"),
    ("not_packed.jsonl.gz", GOOD_ROW, ""),
    ("half.jsonl.gz", gzip.compress(GOOD_ROW)[:-20], ""),
    ("damaged.jsonl.gz", gzip.compress(GOOD_ROW)[:10] + b"\xff" * 60, ""),
    ("text.parquet", GOOD_ROW, ""),
    ("unknown.csv", b"chosen,rejected\na,b\n", ""),
    ("all_same.jsonl", b'{"prompt": "Hello?", "chosen": "a", "rejected": "a"}\n' * 5, ""),
    ("one.jsonl", GOOD_ROW, ""),
]


@pytest.mark.parametrize("name, data, says", BAD_DATA, ids=[row[0] for row in BAD_DATA])
def test_data_that_can_not_be_read_names_the_file_and_the_row(tmp_path, name, data, says):
    path, empty = tmp_path / name, tmp_path / "out"
    path.write_bytes(data)
    line = complaint("model", empty, "--data", path)
    assert str(path) in line and re.search(says, line)


def test_prompt_prints_every_policys_answer_and_writes_nothing(toy):
    before = contents(toy.out)
    flags = ["--out", toy.out, "--policies", "sft.pt", "ppo.pt", "--max-new-tokens", 12, "--temperature", 0]
    result = run("evaluate", *flags, "--prompt", "How do I clean my lamp?")
    assert not result.code, result.err
    lines = result.out.splitlines()
    assert lines[0].startswith("SFT ") and any(line.startswith("MPO ") for line in lines[1:])
    policy, tokenizer = load_model(CommonSettings(out=str(toy.out)), "sft.pt", GPT)
    prompt = torch.tensor(tokenizer.encode("\n\nHuman: How do I clean my lamp?\n\nAssistant:"))
    (answer,) = generate(policy, [prompt], tokenizer.end, 12, temperature=0)
    assert lines[0].split()[1:] == tokenizer.decode(answer.tolist()).split()
    assert run("evaluate", *flags, "--prompt", "\n\nHuman: How do I clean my lamp?\n\nAssistant:").out == result.out
    assert contents(toy.out) == before


def test_prompt_without_a_text_answers_what_is_typed_until_end_of_input(toy, monkeypatch):
    flags = ["--out", toy.out, "--max-new-tokens", 12, "--temperature", 0]
    typed = "How do I clean my lamp?\n\n" + "x" * 5000 + "\nSell this \N{OWL}?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    result = run("evaluate", *flags, "--prompt", "--model", "sft.pt")
    assert not result.code
    assert "leaves room for" in result.err and result.err.count("\n") == 1  # the third line is too long; it goes on
    answers = result.out.splitlines()
    assert len(answers) == 3 and answers[1] == ""
    for question, answer in (("How do I clean my lamp?", answers[0]), ("Sell this \N{OWL}?", answers[2])):
        whole = run("evaluate", *flags, "--policies", "sft.pt", "--prompt", question).out
        assert whole.split()[1:] == (answer.split() or ["(nothing)"])


def test_a_data_file_or_folder_that_is_not_there_is_refused(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("no data")
    assert str(folder) in complaint("model", tmp_path / "out", "--data", folder)
    assert "nothing.jsonl" in complaint("model", tmp_path / "out", "--data", "nothing.jsonl")


def test_a_data_set_that_can_not_be_loaded_is_refused(tmp_path, monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("no route to host\nand a second line")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for source in ("hh", "tldr"):
        line = complaint("model", tmp_path / "out", "--data", source)
        assert f"--data {source}" in line and "no route to host" in line


def test_a_part_without_pairs_is_refused_by_the_next_command(out):
    train("split", out, "--fraction", 1)
    assert "hard.pt" in complaint("ppo", out)
    train("split", out, "--fraction", 0)
    assert "easy.pt" in complaint("dpo", out)


@pytest.mark.parametrize(
    "command, flags",
    [
        ("dpo", "--bogus 3"),
        ("dpo", "stray"),
        ("dpo", "--lr"),
        ("evaluate", "--policies"),
        ("dpo", "--device gpu"),
        ("dpo", "--dtype fp8"),
        ("dpo", "--decay cosine"),
        ("dpo", "--loss hinge"),
        ("split", "--by luck"),
        ("split", "--gap both"),
        ("dpo", "--steps ten"),
        ("dpo", "--steps 1.5"),
        ("dpo", "--lr fast"),
        ("dpo", "--lr nan"),
        ("dpo", "--lr inf"),
        ("dpo", "--lr -1"),
        ("dpo", "--beta 0"),
        ("dpo", "--label-smoothing 2"),
        ("dpo", "--loss ipo --label-smoothing 0.1"),
        ("dpo", "--steps -1"),
        ("dpo", "--batch-size 0"),
        ("dpo", "--epochs -1"),
        ("dpo", "--warmup 1.5"),
        ("dpo", "--clip 0"),
        ("dpo", "--seed -1"),
        ("dpo", "--save-every -1"),
        ("model", "--test-share 2"),
        ("model", "--limit 0"),
        ("model", "--layers 0"),
        ("ppo", "--temperature 0"),
        ("ppo", "--kl-coefficient -1"),
        ("ppo", "--max-new-tokens 0"),
        ("ppo", "--minibatch-size 0"),
        ("split", "--fraction 2"),
        ("split", "--threshold nan"),
        ("evaluate", "--prompts 0"),
        ("model", "--dim 32 --heads 3 --kv-heads 1"),
        ("model", "--heads 4 --kv-heads 3"),
        ("model", "--dim 30 --heads 2 --kv-heads 1"),
        ("model", "--context 100 --max-response 100"),
        ("model", "--context 100 --max-response 128"),
        ("model", "--test-share 0"),
        ("model", "--test-share 1"),
    ],
)
def test_a_wrong_flag_is_named(out, command, flags):
    line = complaint(command, out, *flags.split())
    named = [flag for flag in flags.split() if flag.startswith("--")] or ["stray"]
    if flags.startswith("--test-share") and "2" not in flags:
        named = ["--data", "--test-share"]  # either says what is the matter: a part is empty
    assert any(flag in line for flag in named)


def test_ppo_refuses_answers_that_outgrow_the_context_before_it_generates_any(out, monkeypatch):
    pairs = model.load_pairs(CommonSettings(out=str(out)), "hard.pt")
    room = 512 - int(pairs.lengths[:, 0].max())
    monkeypatch.setattr(ppo, "generate", None)
    assert f"leaves room for {room} in" in complaint("ppo", out, "--max-new-tokens", room + 1)


@pytest.mark.parametrize("command", ["model", "dpo"])
def test_a_seed_as_large_as_a_time_in_nanoseconds_works_or_is_refused(out, command):
    result = run(command, *CHAIN[command], "--out", out, "--device", "cpu", "--steps", 1, "--seed", 1763822805123456789)
    assert result.code == 0 or (result.code == 2 and "--seed" in result.err)


@pytest.mark.parametrize("command", CHAIN)
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(out, monkeypatch, command, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert f"--device {device}" in complaint(command, out, "--device", device)


@pytest.mark.parametrize(
    "command, flag, names",
    [
        ("reward", "--init", ["sft.pt"]),
        ("reward", "--data", ["pairs.pt"]),
        ("reward", "--test", ["test.pt"]),
        ("split", "--data", ["pairs.pt"]),
        ("split", "--init", ["reward.pt"]),
        ("dpo", "--data", ["pairs.pt"]),
        ("dpo", "--init", ["sft.pt"]),
        ("ppo", "--data", ["pairs.pt"]),
        ("ppo", "--init", ["sft.pt"]),
        ("ppo", "--reference", ["sft.pt"]),
        ("ppo", "--reward", ["reward.pt"]),
        ("evaluate", "--data", ["test.pt"]),
        ("evaluate", "--sft", ["sft.pt"]),
        ("evaluate", "--reward", ["reward.pt"]),
        ("evaluate", "--policies", ["sft.pt"]),
    ],
)
def test_files_of_two_runs_with_different_tokenizers_do_not_mix(out, other, command, flag, names):
    line = complaint(command, out, flag, *(other / name for name in names))
    assert "goes with another tokenizer" in line and str(other / names[0]) in line


@pytest.mark.parametrize("command, flag, name", [
    ("reward", "--test", "test.pt"), ("split", "--init", "reward.pt"), ("dpo", "--init", "sft.pt"),
    ("ppo", "--reference", "sft.pt"), ("evaluate", "--reward", "reward.pt"),
])  # fmt: skip
def test_files_of_two_runs_on_different_data_do_not_mix(out, tmp_path, command, flag, name):
    others = tmp_path / "other"  # the same tokenizer, since the model goes on from the first run's
    assert not run("model", "--init", out / "sft.pt", "--steps", 0, "--limit", 200, "--out", others).code
    train("reward", others, "--steps", 0)
    line = complaint(command, out, flag, others / name)
    assert "goes with another data" in line and str(others / name) in line


def test_every_file_says_what_made_it(toy):
    made = {path.name: torch.load(path, weights_only=True)["made"] for path in toy.out.glob("*.pt")}
    assert len({one["data"] for one in made.values()}) == 1 and all(made["ppo.pt"]["data"])
    parents = {name: set(one["parents"]) for name, one in made.items()}
    assert parents == {"pairs.pt": {"toy"}, "test.pt": {"toy"}, "sft.pt": {"toy"},
                       "reward.pt": {"pairs.pt", "test.pt", "sft.pt"}, "easy.pt": {"pairs.pt", "reward.pt"},
                       "hard.pt": {"pairs.pt", "reward.pt"}, "dpo.pt": {"easy.pt", "sft.pt"},
                       "ppo.pt": {"hard.pt", "dpo.pt", "reward.pt"}}  # fmt: skip
    assert made["dpo.pt"]["settings"]["steps"] == 4 and made["dpo.pt"]["settings"]["seed"] == 0
    assert made["dpo.pt"]["versions"]["torch"] == torch.__version__
    assert made["ppo.pt"]["parents"]["dpo.pt"]["made"] == model.fingerprint(made["dpo.pt"])


def test_resume_after_a_parent_was_made_anew_is_refused(out, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run("dpo", *CHAIN["dpo"], "--out", out, "--device", "cpu").code == 130
    train("split", out, "--fraction", 0.4)
    assert "easy.pt is not the file that the saved run read" in complaint("dpo", out, "--resume", "--device", "cpu")


def test_a_vocabulary_of_another_size_does_not_mix_either(out, tmp_path):
    train("model", tmp_path / "larger", "--vocabulary", 420, "--steps", 0, "--limit", 60)
    assert "tokenizer" in complaint("dpo", out, "--init", tmp_path / "larger" / "sft.pt")


@pytest.mark.parametrize("command", CHAIN)
def test_an_out_folder_that_is_a_file_is_refused(out, tmp_path, command):
    blocked = tmp_path / "blocked"
    blocked.write_text("I am a file")
    files = {
        "reward": ["--data", "pairs.pt", "--test", "test.pt", "--init", "sft.pt"],
        "split": ["--data", "pairs.pt", "--init", "reward.pt"],
        "dpo": ["--data", "easy.pt", "--init", "sft.pt"],
        "ppo": ["--data", "hard.pt", "--init", "dpo.pt", "--reward", "reward.pt"],
        "evaluate": ["--data", "test.pt", "--policies", "sft.pt", "--sft", "sft.pt", "--reward", "reward.pt"],
    }
    flags = [out / word if word.endswith(".pt") else word for word in files.get(command, [])]
    result = run(command, *CHAIN[command], "--out", blocked, *flags)
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith(f"{command}.py: ") and str(blocked) in result.err.splitlines()[-1]
    assert blocked.read_text() == "I am a file"


def test_a_mistake_in_a_real_process_is_one_line_and_exit_code_2(out):
    process = shell("dpo", "--out", out, "--init", "nothing.pt", cwd=out)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and printed == ""
    assert errors.count("\n") == 1 and errors.startswith("dpo.py: ") and "nothing.pt" in errors


# ---- Help ----


@pytest.mark.parametrize("command", CHAIN)
def test_help_names_every_setting_with_a_text(monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "200")
    result = run(command, "--help")
    assert result.code == 0 and result.err == ""
    options = result.out.partition("\noptions:\n")[2]
    entries = {re.match(r"--[\w-]+", entry)[0]: entry for entry in re.split(r"\n  (?=--)", options)[1:]}
    for field in (field for field in dataclasses.fields(importlib.import_module(command).Settings) if field.init):
        _, text = re.split(r"\s{2,}", entries["--" + field.name.replace("_", "-")], maxsplit=1)
        assert re.search("[a-z]{2,}", text.partition("[")[0]), f"{field.name} has no help"
