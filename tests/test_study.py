"""The study: its commands, how they are run (with stages that train nothing), its tables and its figures."""

import importlib
import json
import re
import signal
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import study
import torch
from conftest import make_pairs, plain_logprobs, plain_score, tiny, write
from study import BEST, GRID, STUDY, Run, lead_table, methods, saved_as, shift_table, study_table

from model import UserError, parse_settings, settle
from reward import RewardModel

# A stage that trains nothing: it notes how it was called, does what a file for it says, and writes what it is asked to.
FAKE_STAGE = """
import json, os, pathlib, signal, sys, time
script, arguments = pathlib.Path(sys.argv[0]).stem, sys.argv[1:]
out = pathlib.Path(arguments[arguments.index("--out") + 1])
print(script, *arguments, file=(out / "called.txt").open("a"))
exec((out / f"do_{script}").read_text() if (out / f"do_{script}").exists() else "")
save = (arguments[arguments.index("--save") + 1] if "--save" in arguments else script).removesuffix(".pt")
numbers = dict.fromkeys(("gold_reward", "reward", "win_rate_vs_sft", "kl", "length", "ended", "score"), 0.5)
numbers |= {"seconds": 2.0} | ({"updates": 16} if script == "ppo" else {})
if script == "evaluate":
    (out / save).write_text(json.dumps({name: numbers | {"kl": kl} for kl, name in enumerate(("sft", "dpo", "ppo"))}))
elif script != "split":
    changes = [{"step": n, "gold_reward": 0.5 + n // 4, "episodes_per_second": 4 - n, "tokens_per_second": 25 * n,
                "entropy": n} for n in range(5)]
    (out / f"{save}.jsonl").write_text("".join(json.dumps(numbers | change) + "\\n" for change in changes))
"""
SLEEP = """
def interrupted(*_):
    print(os.environ["OMP_NUM_THREADS"], os.getsid(0) == os.getpid(), file=(out / "reward.state.pt").open("a"))
    sys.exit(130)
signal.signal(signal.SIGINT, interrupted)
(out / "asleep").touch()
time.sleep(60)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A function that runs a study of few rows, with stages that train nothing; and the folders of both seeds."""
    for script in ("model", "reward", "split", "dpo", "ppo", "evaluate"):
        (tmp_path / f"{script}.py").write_text(FAKE_STAGE)
    rows = ["SFT", "MPO's DPO alone", "MPO"]
    best = {temperature: {"MPO": 0.1, "MPO, random split": 0.1, **BEST[2.0]} for temperature in (2.0, 0.0, 3.0)}
    few = {"ROOT": tmp_path, "STUDY": {row: STUDY[row] for row in rows}, "NOISE_ROWS": rows, "BEST": best, "SHIFT": (),
           "PPO_ROWS": rows[2:], "RIVALS": {rows[2]: rows[1]}, "shift_table": len, "wrong_labels": len}
    for name, value in few.items():  # len stands for what would read files
        monkeypatch.setattr(study, name, value)
    monkeypatch.chdir(tmp_path)
    folders = tmp_path / "out of it" / "seed7", tmp_path / "out of it" / "seed8"
    for folder in folders:
        folder.mkdir(parents=True)

    def call(flags=""):
        default = "--seed 7 --seeds 2 --noise-seeds 0 --parallel 2 --out".split()
        monkeypatch.setattr(sys, "argv", ["study.py", *default, "out of it", *flags.split()])
        study.main()

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield call, *folders
    for number, handler in handlers.items():
        signal.signal(number, handler)


def calls(folder: Path) -> list[str]:
    """What the fake stages in a folder were called with, without the flags that all of them get."""
    return re.sub(rf" --out .* --seed {folder.name[-1]}", "", (folder / "called.txt").read_text()).splitlines()


def expected(world: str = study.WORLD) -> list[str]:
    """A folder's commands as the fake stages note them."""
    return [command.replace(".py", "", 1) for command in Run(Path("none"), 7, study.STUDY, world).commands]


def test_commands_read_what_was_written_before_and_no_two_write_the_same_file(monkeypatch):
    """DPO on all, PPO and MPO differ in steps and prices alone, and the others in their settings or DPO's steps."""
    best = {row: 0.7 if study.stage(row) == "ppo.py" else (128, 0.4) for row in BEST[2.0]} | {"DPO on all": (256, 0.2)}
    makers, budgets = {}, set()
    for commands in (methods(best) | study.related(best)).values():
        written = {"pairs.pt", "test.pt", "sft.pt"}
        for command in commands:
            monkeypatch.setattr(sys, "argv", command.split())
            one = parse_settings(importlib.import_module(sys.argv[0].removesuffix(".py")).Settings, "")
            settle(one, pretrained=False)
            read = {getattr(one, name, None) for name in ("init", "reward", "reference", "policy", "extrapolate")}
            assert read | {*one.data.split("+")} - {"toy"} <= written | {None}
            saved = {one.easy, one.hard} if command.startswith("split.py") else {one.save, f"{saved_as([command])}.pt"}
            assert all(makers.setdefault(name, command) == command for name in saved)
            written |= saved
            if command.startswith("dpo.py"):
                budgets.add((one.steps, one.beta, one.batch_size, one.lr))
            if command.startswith("ppo.py"):
                budgets.add((one.steps, one.kl_coefficient, one.batch_size, one.ppo_epochs, one.lr))
    assert len({saved_as(commands) for commands in STUDY.values()}) == len(STUDY)
    assert all(len(set(commands)) == len(commands) for commands in STUDY.values())  # else it would be counted twice
    dpo = {(64, 0.1), (32, 0.1), (128, 0.1), (256, 0.2), (128, 0.4), (64, 0.4)}  # MPO's, two controls', others'
    assert budgets == {(*choice, 64, 5e-5) for choice in dpo} | {(32, 0.7, 128, 2, 3e-4)}


def test_tuning_tries_every_setting_once_and_each_temperature_has_its_own():
    """A row of BEST with a choice of GRID is that row with the choice, saved by another name."""
    rows = study.tuning(BEST[2.0])
    assert [row for row in rows if row.startswith("MPO: ")] == [f"MPO: {price}" for price in GRID["ppo.py"]]
    assert len({saved_as(commands) for commands in rows.values()}) == len(rows) == 1 + 4 * len(BEST[2.0])
    (run, *_) = study.plan(study.Settings(related=False))[2.0]
    assert run.rows == methods(BEST[2.0]) and run.commands[-1].startswith("split.py") and len(run.rows) < len(STUDY)
    plain = methods(BEST[2.0] | {"DPO on easy": (256, 0.1)})["DPO on easy"]
    assert rows["DPO on easy: (256, 0.1)"] == [*plain[:-1], plain[-1].replace("dpo_easy.pt", "dpo_easy_2.pt")]
    irft = rows["IRFT, 2 rounds: (256, 0.1)"]
    assert [saved_as([command]) for command in irft] == ["reward", "demos", "irft_first_2", "demos_irft_2", "irft_2"]
    assert "--policy irft_first_2.pt" in irft[3] and "--data demos_irft_2.pt --init irft_first_2.pt" in irft[4]
    for best in BEST.values():
        assert all(best[row] in GRID[study.stage(row)] for row in best)
        assert {row for row in study.NOISE_ROWS if row != "SFT"} <= best.keys()


def test_each_command_runs_once_in_order_and_never_again(fake, capsys):
    """Two seeds, two for each label temperature but the world's own; then one seed more. A policy's commands take 5
    steps each, PPO's with 16 updates; step n has 50 n tokens of entropy n (1 to 4: 30 / 10), the last no answers."""
    call, folder, _ = fake
    call("--noise-seeds 2")
    first = capsys.readouterr().out
    call("--noise-seeds 2")
    assert capsys.readouterr().out == first and all(text in first for text in ("against", "gold 0.50", "label temp"))
    call("--seeds 3 --noise-seeds 2")
    noise = {f"temperature{noise}": f" --label-temperature {noise}" for noise in (0, 3)}
    made = {path.parent.relative_to(folder.parent) for path in folder.parent.rglob("called.txt")}
    assert made == {Path(place, f"seed{seed}") for place in ("", *noise) for seed in (7, 8)} | {Path("seed9")}
    for place in made:
        assert calls(folder.parent / place) == expected(study.WORLD + noise.get(place.parts[0], ""))
        assert calls(folder.parent / place)[-1].startswith("evaluate --policies sft.pt dpo.pt ppo.pt ")
    record, keys = json.loads((folder / "commands.json").read_text()), ("updates", "tokens", "kl", "seconds", "entropy")
    seconds = sum(record[command]["seconds"] for command in STUDY["MPO"])
    policies = json.loads((folder.parent / "study.json").read_text())["policies"]
    assert [policies["MPO"][key][0] for key in keys] == [5 + 5 + 5 * 16, 5 * 100, 2, pytest.approx(seconds), 3]
    assert [policies["SFT"][key] for key in keys[:4]] == [[0] * 3] * 4
    *before, last = STUDY["MPO"]
    study.STUDY = study.STUDY | {"MPO": [*before, last.replace("0.2", "0.9")]}  # another price
    call()  # evaluates what is new
    assert [line.split()[0] for line in calls(folder)[-2:]] == ["ppo", "evaluate"]


def test_a_failure_is_named_and_stops_the_others_and_the_next_call_goes_on(fake):
    """seed7's reward model sleeps, seed8's fails as soon as it does. What the stopped attempt took is counted."""
    call, folder, other = fake
    (folder / "do_reward").write_text(SLEEP)
    wait = f"while not os.path.exists({str(folder / 'asleep')!r}): time.sleep(0.01)\n"
    (other / "do_reward").write_text(wait + "sys.exit('something to read\\nwhy it failed')")
    with pytest.raises(UserError, match=r"^reward\.py in .*seed8 ended with code 1: why it failed .*study\.log"):
        call()
    assert calls(folder) == calls(other) == ["model --save sft.pt", "reward"]
    record = json.loads((folder / "commands.json").read_text())
    record["reward.py"]["seconds"] += 1000
    (folder / "commands.json").write_text(json.dumps(record))
    (folder / "do_reward").unlink()
    (other / "do_reward").unlink()
    call()
    assert (calls(folder)[2:], calls(other)[2:]) == (["reward --resume", *expected()[2:]], expected()[1:])
    assert json.loads((folder / "commands.json").read_text())["reward.py"]["seconds"] > 1000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_or_sigterm_lets_a_command_save_its_state_once(fake, number):
    """The signal reaches the study alone; its command gets one interrupt; no other folder is begun."""
    call, folder, other = fake
    (folder / "do_reward").write_text(SLEEP.replace("time.sleep", f"os.kill(os.getppid(), {number:d})\ntime.sleep"))
    with pytest.raises(KeyboardInterrupt):
        call("--parallel 1")
    assert (folder / "reward.state.pt").read_text() == f"{study.CORES} True\n" and not (other / "study.log").exists()
    assert not json.loads((folder / "commands.json").read_text())["reward.py"]["done"]


def make_numbers(**golds):
    """Numbers of a study, with these gold rewards over seeds; all else is 0.5."""
    golds = {row: torch.tensor(gold).double() for row, gold in golds.items()}
    return {row: defaultdict(lambda gold=gold: 0 * gold + 0.5, gold_reward=gold) for row, gold in golds.items()}


def test_tables_by_hand():
    """Gold 1, 2, 3, 6: mean 3, error √(s² / 4) = √(14/3 / 4) = 1.08. MPO − SFT is 1, 3: 2 ± 1, being paired."""
    header, line = study_table(make_numbers(MPO=[1.0, 2.0, 3.0, 6.0])).splitlines()
    assert header.split()[:4] == ["policy", "gold", "reward", "reward"]
    assert line.startswith("MPO") and "3.00 ± 1.08" in line and "50% ± 0%" in line
    lines = lead_table({"SFT": torch.tensor([0.0, 10.0]), "MPO": torch.tensor([1.0, 13.0])}).splitlines()
    assert [re.split("  +", line) for line in lines] == [
        ["MPO against", "lead", "seeds won"], ["SFT", "+2.00 ± 1.00 (-10.71 to +14.71)", "100% (34% to 100%)"]]
    tried = make_numbers(**{f"MPO: {price}": [price, 3 * price] for price in GRID["ppo.py"]})
    header, line = study.tuning_table(tried, ["MPO"]).splitlines()[1:]
    assert header.split() == ["KL", "price", "0.05", "0.1", "0.2", "0.3"]
    assert re.split("  +", line) == ["MPO", "0.10 ± 0.05", "0.20 ± 0.10", "0.40 ± 0.20", "0.60 ± 0.30*"]
    golds = {row: [0.0, 10.0] for row in study.NOISE_ROWS}, {row: [0.0, 4.0] for row in study.NOISE_ROWS}
    noise = {0.0: make_numbers(**golds[0] | {"MPO": [1.0, 13.0]}), 3.0: make_numbers(**golds[1])}
    lines = [re.split("  +", line) for line in study.noise_table(noise, [0.0, 0.363]).splitlines()]
    assert lines[1:3] == [["wrong labels", "0%", "36%", ""], ["SFT", "5.00 ± 5.00", "2.00 ± 2.00", "3.00 ± 3.00"]]
    assert ["SFT", "+2.00 (-10.71 to +14.71)", "+0.00 (+0.00 to +0.00)"] in lines and len(lines) == 15
    gold = torch.tensor([[0.0, 1.0, 2.0, 3.0, 2.0], [0.0, 0.0, 1.0, 1.0, 1.0]]).double()  # from step 4, 5, … 8 on
    assert re.split("  +", study.ppo_table({"MPO": {"gold": gold}}, 2.0).splitlines()[1])[3:] == [
        "1.50 ± 0.50", "2.00 ± 1.00", "1.50 ± 0.50", "0.71", "0.50", "6.0 (1 of 2 seeds)"]


def test_accuracies_on_own_answers_by_the_plain_way_through_the_models(tmp_path, documents):
    """Of nine pairs eight differ in gold, six by 0.5 to 1; of two of these the rejected response is the better one."""
    gold = torch.tensor([[1, 0], [0, 0], [3, 0], [0, 1], [1, 0.5], [0.25, 0], [2, 1], [0, 0.5], [1.5, 1]])
    models = {name: tiny(seed) for seed, name in enumerate(("sft", *study.IMPLICIT.values()))}
    names = {f"shift_{name}": make_pairs(documents, gold=gold.flip(1)) for name in study.SHIFTED.values()}
    data = make_pairs(documents, gold=gold)
    write(tmp_path, reward=RewardModel(tiny(9)), test=data, pairs=data, **models, **names)
    assert study.wrong_labels([Run(tmp_path, 0, {})] * 2) == 2 / 8
    header, data, *others = (re.split("  +", line) for line in shift_table([Run(tmp_path, 0, {})] * 2).splitlines())
    assert header[:5] == ["responses of", "said again", "pairs", "gold gap", "reward model"]
    assert [study.said_again(text) for text in (" A b. C d! A b. A b.", "A b", " A b. A b", "")] == [2, 0, 0, 0]

    def share(score) -> str:
        right = [(score(prompt, sides[0]) > score(prompt, sides[1])) == (known[0] > known[1])
                 for (prompt, *sides), known in zip(documents, gold.tolist(), strict=True)
                 if 0.5 <= abs(known[0] - known[1]) <= 1]
        return f"{sum(right) / len(right):.1%} ± 0.0%"

    scores = [lambda *parts: plain_score(RewardModel(tiny(9)), *parts)]
    scores += [lambda *parts, dpo=models[name]: (
        plain_logprobs(dpo, *parts) - plain_logprobs(models["sft"], *parts)).sum() for name in study.IMPLICIT.values()]
    gap = f"{gold.diff(dim=1).abs().sum() / 8:.2f} ± 0.00"
    assert data == ["data", "0.00 ± 0.00", "6 ± 0", gap, *map(share, scores)]
    opposite = [f"{100 - float(cell.split('%')[0]):.1f}% ± 0.0%" for cell in data[4:]]
    assert [row[0] for row in others] == list(study.SHIFTED) and all(row[4:] == opposite for row in others)
