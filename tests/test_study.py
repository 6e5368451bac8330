"""The study: its commands, how they are run (with stages that train nothing), its tables and its figures."""

import functools
import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import study
import torch
from study import STUDY, Run, noise_table, policy_of, ppo_curves, ppo_table, read_numbers, saved_as, study_table

from model import UserError, parse_settings, settle

# A stage that trains nothing: it notes how it was called and writes what it is asked to. Where a file says so it fails,
# once the file named there exists; or it sleeps, and at an interrupt it saves a state, as the real ones do.
FAKE_STAGE = """
import json, os, pathlib, signal, sys, time
script, arguments = pathlib.Path(sys.argv[0]).stem, sys.argv[1:]
out = pathlib.Path(arguments[arguments.index("--out") + 1])
with (out / "called.txt").open("a") as file:
    print(script, *arguments, file=file)
save = (arguments[arguments.index("--save") + 1] if "--save" in arguments else script).removesuffix(".pt")
if (out / f"fail_{script}").exists():
    while not (out / (out / f"fail_{script}").read_text()).exists():
        time.sleep(0.01)
    sys.exit("something to read\\nwhy it failed")
if (out / f"sleep_{script}").exists():
    def interrupted(*_):
        with (out / f"{save}.state.pt").open("a") as file:
            print(os.environ["OMP_NUM_THREADS"], os.getsid(0) == os.getpid(), file=file)
        sys.exit(130)
    signal.signal(signal.SIGINT, interrupted)
    (out / "asleep").touch()
    time.sleep(60)
if script == "evaluate":
    keys = "gold_reward", "reward", "win_rate_vs_sft", "kl", "length", "ended"
    (out / save).write_text(json.dumps({name: {key: 0.5 for key in keys} for name in ("sft", "dpo", "ppo")}))
else:
    row = {"step": 0, "tokens_per_second": 50.0, "seconds": 2.0, "gold_reward": 1.0, "score": 2.0}
    (out / f"{save}.jsonl").write_text("".join(json.dumps(row | {"step": step}) + "\\n" for step in range(5)))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A function that runs a study of few rows in tmp_path / "out of it", with stages that train nothing."""
    for script in ("model", "reward", "split", "dpo", "ppo", "evaluate"):
        (tmp_path / f"{script}.py").write_text(FAKE_STAGE)
    rows = ["SFT", "DPO on easy", "MPO"]
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "STUDY", {row: STUDY[row] for row in rows})
    monkeypatch.setattr(study, "NOISE", [0.0, 0.4])
    monkeypatch.setattr(study, "NOISE_ROWS", rows)
    monkeypatch.setattr(study, "PPO_ROWS", ["MPO"])

    def call(*flags):
        default = "--seed 7 --seeds 2 --noise-seeds 0 --parallel 2".split()
        monkeypatch.setattr(sys, "argv", ["study.py", "--out", str(tmp_path / "out of it"), *default, *flags])
        study.main()

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def calls(folder: Path) -> list[str]:
    """What the fake stages in a folder were called with, without the flags that all of them get."""
    lines = (folder / "called.txt").read_text().splitlines()
    return [line.partition(" --out")[0] + (" --resume" if "--resume" in line else "") for line in lines]


def expected(folder: Path, seed: int = 7, world: str = study.WORLD) -> list[str]:
    """A folder's commands as the fake stages note them."""
    return [command.replace(".py", "", 1) for command in Run(folder, seed, list(study.STUDY), world).commands]


@functools.cache
def stage_settings(command):
    """A command line as its own stage reads it."""
    script, *flags = command.split()
    with mock.patch.object(sys, "argv", [script, *flags]):
        settings = parse_settings(importlib.import_module(script.removesuffix(".py")).Settings, "")
    settle(settings, pretrained=False)
    return settings


def test_every_command_reads_what_was_written_before_and_no_two_write_the_same_file():
    makers = {}
    for row, commands in STUDY.items():
        written = {"pairs.pt", "test.pt", "sft.pt"}
        for command in commands:
            settings = stage_settings(command)
            read = {getattr(settings, name, None) for name in ("data", "init", "reward", "reference")} - {None}
            assert read <= written
            saved = {settings.easy, settings.hard} if command.startswith("split.py") else {settings.save}
            assert command.startswith("split.py") or saved == {f"{saved_as(command)}.pt"}
            assert all(makers.setdefault(name, command) == command for name in saved)
            written |= saved
        assert f"{policy_of(row)}.pt" in written
    assert len({policy_of(row) for row in STUDY}) == len(STUDY)


def test_equal_budgets_but_where_the_name_says_otherwise():
    for row, commands in STUDY.items():
        for settings in [stage_settings(command) for command in commands if command.startswith("dpo.py")]:
            steps = 256 if "256" in row else 64
            assert (settings.steps, settings.batch_size, settings.lr, settings.beta) == (steps, 64, 5e-5, 0.1)
        for settings in [stage_settings(command) for command in commands if command.startswith("ppo.py")]:
            assert (settings.steps, settings.batch_size, settings.ppo_epochs, settings.lr) == (32, 128, 2, 3e-4)
            assert settings.kl_coefficient == (0.05 if "KL price 0.05" in row else 0.3)
    assert STUDY["MPO"] == ["reward.py", "split.py", "dpo.py --steps 64", "ppo.py --steps 32"]  # no other flag


def test_each_command_runs_once_in_order_and_never_again(fake, tmp_path, capsys):
    """Two seeds, and two for each share of wrong labels; then one seed more."""
    folder = tmp_path / "out of it"
    fake("--noise-seeds", "2")
    first = capsys.readouterr().out
    worlds = {"seed": study.WORLD, "wrong0/seed": f"{study.WORLD} --wrong-labels 0.0",
              "wrong40/seed": f"{study.WORLD} --wrong-labels 0.4"}

    def check(place, seed):
        assert calls(folder / f"{place}{seed}") == expected(folder, seed, worlds[place])
        lines = (folder / f"{place}{seed}" / "called.txt").read_text().splitlines()
        assert all(line.endswith(f"--seed {seed}") for line in lines)
        assert lines[-1].startswith("evaluate --policies sft.pt dpo.pt ppo.pt ")

    fake("--noise-seeds", "2")
    assert capsys.readouterr().out == first
    fake("--seeds", "3", "--noise-seeds", "2")
    assert sorted(path.name for path in (folder / "wrong0").iterdir()) == ["seed7", "seed8"]
    for place in worlds:
        check(place, 7)
        check(place, 8)
    check("seed", 9)


def test_a_failure_is_named_and_stops_the_others_and_the_next_call_goes_on(fake, tmp_path):
    """seed7's reward model would sleep for a minute; seed8's fails as soon as that one is asleep."""
    folder, other = tmp_path / "out of it" / "seed7", tmp_path / "out of it" / "seed8"
    for path, text in ((folder / "sleep_reward", ""), (other / "fail_reward", str(folder / "asleep"))):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    with pytest.raises(UserError, match=r"^reward\.py in .*seed8 ended with code 1: why it failed .*study\.log"):
        fake()
    assert calls(folder) == calls(other) == ["model --save sft.pt", "reward"]
    for path in (folder / "sleep_reward", other / "fail_reward"):
        path.unlink()
    fake()
    assert calls(folder)[2:] == ["reward --resume", *expected(folder)[2:]]
    assert calls(other)[2:] == expected(other)[1:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_or_sigterm_lets_a_command_save_its_state_once_and_it_is_resumed(fake, tmp_path, number):
    """The signal reaches the study alone; its command gets one interrupt; no other folder is begun."""
    folder = tmp_path / "out of it" / "seed7"
    folder.mkdir(parents=True)
    (folder / "sleep_reward").touch()

    def interrupt():
        while not (folder / "asleep").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        fake("--parallel", "1")
    thread.join()
    assert (folder / "reward.state.pt").read_text() == f"{study.CORES} True\n"  # out of the terminal's reach
    assert not (folder.with_name("seed8") / "study.log").exists()
    record = json.loads((folder / "commands.json").read_text())
    assert not record["reward.py"]["done"]
    record["reward.py"]["seconds"] = 1000.0
    (folder / "commands.json").write_text(json.dumps(record))
    (folder / "sleep_reward").unlink()
    fake("--parallel", "1")
    assert calls(folder)[:4] == ["model --save sft.pt", "reward", "reward --resume", "split"]
    finished = json.loads((folder / "commands.json").read_text())["reward.py"]
    assert finished["done"] and finished["seconds"] > 1000  # what the stopped attempt took is counted


@pytest.mark.parametrize("flags", [["--seeds", "1"], ["--noise-seeds", "1"], ["--parallel", "-1"], ["--figure"]])
def test_what_makes_no_study_is_refused_before_any_work(fake, tmp_path, monkeypatch, flags):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib" if flags == ["--figure"] else "at least 2"):
        fake(*flags)
    assert not (tmp_path / "out of it").exists()


def make_numbers(**golds):
    """Numbers of a study, with these gold rewards over seeds."""
    others = dict.fromkeys((key for key, _ in study.COLUMNS.values()), 0.5)
    return {row: {key: torch.full((len(gold),), value).double() for key, value in others.items()}
            | {"gold_reward": torch.tensor(gold).double()} for row, gold in golds.items()}


def write_log(path, records):
    path.write_text("".join(json.dumps({"step": step, **record}) + "\n" for step, record in enumerate(records)))


def test_numbers_are_those_of_evaluate_and_of_all_commands_that_a_policy_needs(tmp_path):
    """Reward model 3 steps, DPO 2, PPO 2 steps of 16 updates: 37. Tokens: PPO's, 100 and 50 a second for 2 s each."""
    run = Run(tmp_path, 0, ["SFT", "MPO"])
    run.record = {command: {"seconds": float(2**n), "done": True} for n, command in enumerate(STUDY["MPO"])}
    other = {"tokens_per_second": 9.0, "seconds": 1.0}
    write_log(tmp_path / "reward.jsonl", [other] * 3)
    write_log(tmp_path / "dpo.jsonl", [other] * 2)
    write_log(tmp_path / "ppo.jsonl", [{"updates": 16, "tokens_per_second": s, "seconds": 2.0} for s in (100.0, 50.0)])
    keys = "gold_reward", "reward", "win_rate_vs_sft", "kl", "length", "ended"
    evaluation = {"sft": dict.fromkeys(keys, 0.25), "ppo": dict.fromkeys(keys, 0.5)}
    (tmp_path / "study_evaluation.json").write_text(json.dumps(evaluation))
    numbers = read_numbers([run, run])
    assert [numbers["MPO"][key].tolist() for key in ("updates", "tokens", "seconds")] == [[37] * 2, [300] * 2, [15] * 2]
    assert numbers["MPO"]["kl"].tolist() == [0.5, 0.5]
    assert [numbers["SFT"][key].tolist() for key in ("updates", "gold_reward")] == [[0] * 2, [0.25] * 2]


def test_study_table_by_hand():
    """Gold 1, 2, 3, 6: mean 3, error √(s² / 4) = √(14/3 / 4) = 1.08."""
    header, line = study_table(make_numbers(MPO=[1.0, 2.0, 3.0, 6.0])).splitlines()
    assert header.split()[:4] == ["policy", "gold", "reward", "reward"]
    assert line.startswith("MPO") and "3.00 ± 1.08" in line and "50% ± 0%" in line
    assert len(header) == len(line)


def test_noise_table_by_hand():
    """3 and 5 without wrong labels, 2 and 3 with most: lost 1 and 2, 1.5 ± 0.5."""
    none, most = (make_numbers(**dict.fromkeys(study.NOISE_ROWS, gold)) for gold in ((3.0, 5.0), (2.0, 3.0)))
    header, *lines = noise_table({0.0: none, 0.4: most}).splitlines()
    assert header.split() == ["wrong", "labels", "0%", "40%", "0%", "less", "40%"]
    for row, line in zip(study.NOISE_ROWS, lines, strict=True):
        assert line.removeprefix(row).split() == "4.00 ± 1.00 2.50 ± 0.50 1.50 ± 0.50".split()


def test_course_of_ppo_by_hand(tmp_path):
    """Two runs that rise to 2 and fall to 1, and to 0: at the end 0.5 ± 0.5, deviation √½, 1.5 below the best."""
    runs = [Run(tmp_path / name, 0, ["MPO"]) for name in "ab"]
    for run, end in zip(runs, (1.0, 0.0), strict=True):
        run.folder.mkdir()
        golds = [0.0] * 4 + [2.0] * 4 + [end] * 4
        write_log(run.folder / "ppo.jsonl", [{"gold_reward": gold, "score": 2 * gold} for gold in golds])
    curves = ppo_curves(runs, "MPO")
    assert curves["gold"][0].tolist() == [0, 0.5, 1, 1.5, 2, 1.75, 1.5, 1.25, 1]
    header, gold, score = ppo_table({"MPO": curves}).splitlines()
    assert "steps 1–4" in header and "steps 5–8" in header and "steps 9–12" in header
    assert gold.split()[:5] == ["MPO:", "gold", "0.00", "±", "0.00"]
    assert gold.split()[-5:] == ["0.50", "±", "0.50", "0.71", "1.50"]
    assert score.split()[-2:] == ["1.41", "3.00"]  # the score is twice as high


def test_figures_show_their_numbers(tmp_path):
    """Points and lines, read back from what matplotlib was given."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    numbers = make_numbers(SFT=[1.0, 3.0], MPO=[2.0, 6.0])
    curves = {"MPO": {"gold": torch.ones(2, 3), "reward model": torch.zeros(2, 3)}}
    same, worse = (make_numbers(**dict.fromkeys(study.NOISE_ROWS, gold)) for gold in ((4.0, 4.0), (3.0, 4.0)))
    study.draw_figures(tmp_path, numbers, curves, {0.0: same, 0.4: worse})
    rewards, ppo, noise = (pyplot.figure(number).axes[0] for number in pyplot.get_fignums()[-3:])
    assert [tuple(line.get_xydata()[0]) for line in rewards.lines if line.get_marker() == "o"] == [(0.5, 2), (0.5, 4)]
    assert [text.get_text() for text in ppo.texts] == ["gold", "reward model"]
    assert ppo.lines[0].get_xydata().tolist() == [[4, 1], [5, 1], [6, 1]]
    assert noise.get_legend_handles_labels()[1] == study.NOISE_ROWS
    assert noise.lines[0].get_xydata().tolist() == [[0, 4], [40, 3.5]]
    assert {path.name for path in tmp_path.glob("*.png")} == {"rewards.png", "ppo.png", "noise.png"}
