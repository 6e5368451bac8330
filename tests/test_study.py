"""Chapter 6: the study (its commands, what it costs, its tables) and the figures."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import evaluate
from evaluate import (
    STUDY,
    Run,
    Settings,
    cost,
    differences,
    draw_calibration,
    draw_gaps,
    draw_noise,
    draw_ppo,
    draw_rewards,
    expected_seconds,
    noise_table,
    sample_table,
    smoothed,
    study,
    study_numbers,
    study_runs,
    study_table,
    work_through,
)
from model import Pairs, Tokenizer, UserError, parse_settings

BYTES = Tokenizer([chr(byte) for byte in range(256)], r"[\s\S]", {"<end>": 256}, 256)

# A stage that trains nothing: it notes its flags, writes what it is asked to save, and fails where it is told to.
FAKE_STAGE = """
import json, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2])) if "--policies" not in sys.argv else {}
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
script = pathlib.Path(sys.argv[0]).stem
with (out / "called.txt").open("a") as file:
    file.write(" ".join([script, *sys.argv[1:]]) + "\\n")
if (out / f"fail_{script}").exists():
    print("something to read")
    sys.exit(3)
for state in out.glob("*.state.pt"):
    state.unlink()
if script == "evaluate":
    names = [name.removesuffix(".pt") for name in sys.argv if name.endswith(".pt")]
    keys = "gold_reward", "reward", "win_rate_vs_sft", "kl", "length", "ended"
    (out / "evaluation.json").write_text(json.dumps({name: dict.fromkeys(keys, 0.5) for name in names}))
elif script != "split":
    save = flags.get("--save", script + ".pt").removesuffix(".pt")
    row = {"loss": 1.0, "tokens_per_second": 50.0, "seconds": 2.0, "gold_reward": 1.0, "score": 2.0}
    row |= {"updates": 16} if script == "ppo" else {}
    lines = [json.dumps({"step": step, **row}) + "\\n" for step in range(5)]
    (out / f"{save}.jsonl").write_text("".join(lines))
"""


@pytest.fixture
def fake_stages(tmp_path, monkeypatch):
    """Stages that train nothing, in the place of the real ones. Returns the --out folder."""
    for script in ("model", "reward", "split", "dpo", "ppo", "evaluate"):
        (tmp_path / f"{script}.py").write_text(FAKE_STAGE)
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "evaluate.py"))
    return tmp_path / "out"


def calls(folder: Path) -> list[str]:
    """What the fake stages in a folder were called with, without the flags that all of them get."""
    lines = (folder / "called.txt").read_text().splitlines()
    return [line.partition(" --out")[0] + (" --resume" if "--resume" in line else "") for line in lines]


def some_settings(out, **changes):
    return Settings(**{"out": str(out), "study": True, "seeds": 2, "noise_seeds": 1, "parallel": 2, **changes})


# ---- Its commands ----


@pytest.mark.parametrize("row", STUDY)
def test_every_command_has_flags_of_its_stage_and_reads_what_was_written_before(row, monkeypatch):
    """Each command line is parsed by its stage's own settings; every file it names is there by then."""
    checkpoint, commands = STUDY[row]
    written = {"pairs.pt", "test.pt", "sft.pt"}
    for command in commands:
        script, *flags = command.split()
        settings_class = importlib.import_module(script.removesuffix(".py")).Settings
        monkeypatch.setattr(sys, "argv", [script, *flags])
        settings = parse_settings(settings_class, "")
        read = {getattr(settings, name, None) for name in ("data", "init", "reward", "reference")} - {None}
        assert read <= written
        written |= {settings.easy, settings.hard} if script == "split.py" else {settings.save}
    assert checkpoint in written
    assert not commands or checkpoint == settings.save


def test_equal_budgets_but_where_the_name_says_otherwise(monkeypatch):
    """64 steps of DPO on 64 pairs and 32 of PPO on 128 prompts, everywhere."""
    for row, (_, commands) in STUDY.items():
        for command in commands:
            if command.startswith(("dpo.py", "ppo.py")):
                steps = "256" if "256" in row else "64" if command.startswith("dpo.py") else "32"
                assert f"--steps {steps}" in command
                assert "--batch-size" not in command and "--lr" not in command
                assert ("--kl-coefficient 0.05" in command) == ("β 0.05" in row and command.startswith("ppo.py"))


def test_mpo_is_what_the_six_scripts_make():
    """The row MPO is the default chain: no flag but the number of steps."""
    assert [command.partition(" --steps")[0] for command in STUDY["MPO"][1]] == [
        "reward.py",
        "split.py",
        "dpo.py",
        "ppo.py",
    ]


def test_folders_are_one_for_each_seed_and_share_of_wrong_labels(tmp_path):
    runs = study_runs(some_settings(tmp_path, seed=3, seeds=2, noise_seeds=1))
    assert [run.folder.relative_to(tmp_path).as_posix() for run in runs] == [
        "study/seed3", "study/seed4", "study/wrong0/seed3", "study/wrong15/seed3", "study/wrong25/seed3",
        "study/wrong40/seed3",
    ]  # fmt: skip
    assert [run.seed for run in runs] == [3, 4, 3, 3, 3, 3]
    assert runs[0].commands[0] == "model.py"
    assert [run.commands[0] for run in runs[2:]] == [f"model.py --wrong-labels {s}" for s in (0.0, 0.15, 0.25, 0.4)]
    for run in runs:
        assert len(set(run.commands)) == len(run.commands)
        assert run.commands[-1].startswith("evaluate.py --policies sft.pt ")


# ---- Running them ----


def test_each_command_runs_once_in_order_and_never_again(fake_stages, capsys):
    settings = some_settings(fake_stages)
    study(settings)
    first = capsys.readouterr().out
    assert "about" in first and "minutes" in first
    for run in study_runs(settings):
        assert calls(run.folder) == [command.replace(".py", "", 1) for command in run.commands]
        assert run.missing == []
        lines = (run.folder / "called.txt").read_text().splitlines()
        assert all(f"--seed {run.seed} --device auto" in line for line in lines)
    study(settings)
    second = capsys.readouterr().out
    assert "minutes" not in second
    assert all(calls(run.folder) == [c.replace(".py", "", 1) for c in run.commands] for run in study_runs(settings))
    # The same tables, without the time that is said up front.
    assert first.splitlines()[2:] == second.splitlines()


def test_a_command_that_fails_is_named_and_the_next_call_goes_on_from_it(fake_stages):
    settings = some_settings(fake_stages, seeds=1, noise_seeds=0)
    folder = fake_stages / "study" / "seed0"
    folder.mkdir(parents=True)
    (folder / "fail_split").touch()
    with pytest.raises(UserError, match=r"split\.py in .*seed0: ended with code 3; .*study\.log"):
        study(settings)
    assert calls(folder)[-1] == "split"
    assert "something to read" in (folder / "study.log").read_text()
    (folder / "fail_split").unlink()
    before = calls(folder)
    study(settings)
    assert calls(folder)[len(before) :][0] == "split"
    assert calls(folder).count("model") == calls(folder).count("reward") == 1


def test_a_stage_that_was_stopped_is_resumed(fake_stages):
    settings = some_settings(fake_stages, seeds=1, noise_seeds=0)
    folder = fake_stages / "study" / "seed0"
    folder.mkdir(parents=True)
    (folder / "sft.state.pt").touch()
    study(settings)
    assert calls(folder)[0] == "model --resume"
    assert not any("--resume" in call for call in calls(folder)[1:])


def test_half_a_line_of_the_record_is_a_command_to_run_again(tmp_path):
    run = Run(tmp_path, 0, ["SFT"])
    whole = json.dumps({"command": run.commands[0], "seconds": 3.0})
    (tmp_path / "study.jsonl").write_text(whole + "\n" + '{"command": "evalu')
    run = Run(tmp_path, 0, ["SFT"])
    assert run.finished == {"model.py": 3.0}
    assert run.missing == ["evaluate.py --policies sft.pt --samples 0"]


def test_the_time_said_up_front(fake_stages, capsys):
    """One folder done at 6 seconds a command: another takes as long; the four others, one after the other."""
    settings = some_settings(fake_stages, parallel=1)
    runs = study_runs(settings)
    for run in runs[1:]:
        run.finished = dict.fromkeys(run.commands, 60.0)
    assert expected_seconds("model.py", runs) == 60.0
    work_through(settings, runs)
    assert f"{len(runs[0].commands)} commands to run, 1 at a time" in (said := capsys.readouterr().out)
    assert f"about {len(runs[0].commands)} minutes" in said


# ---- Its numbers ----


def test_cost_is_that_of_all_commands_a_policy_needs(tmp_path):
    """Reward model 3 steps, DPO 2, PPO 2 steps of 16 updates: 37. Tokens: PPO's, 100 and 50 a second for 2 s each."""
    run = Run(tmp_path, 0, ["SFT", "MPO"], finished={"reward.py": 5.0, "split.py": 1.0, "dpo.py --steps 64": 2.0})
    run.finished["ppo.py --steps 32"] = 7.0
    ppo = [{"updates": 16, "tokens_per_second": speed, "seconds": 2.0} for speed in (100.0, 50.0)]
    rows = {"reward": [{}] * 3, "dpo": [{"tokens_per_second": 9.0, "seconds": 1.0}] * 2, "ppo": ppo}
    for name, records in rows.items():
        lines = [json.dumps({"step": step, **record}) for step, record in enumerate(records)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    assert cost(run, STUDY["MPO"][1]) == {"gradient_steps": 37, "generated_tokens": 300.0, "seconds": 15.0}
    assert cost(run, []) == {"gradient_steps": 0, "generated_tokens": 0, "seconds": 0}


def make_numbers(**golds):
    """Numbers of a study, with these gold rewards over seeds."""
    keys = [key for key, _ in evaluate.STUDY_COLUMNS.values()]
    return {row: {key: torch.tensor(gold if key == "gold_reward" else [0.5] * len(gold)) for key in keys}
            for row, gold in golds.items()}  # fmt: skip


def alike(gold):
    """Numbers at one share of wrong labels, the same for every row."""
    return make_numbers(**dict.fromkeys(evaluate.NOISE_ROWS, gold))


def test_numbers_are_what_evaluation_json_says(fake_stages):
    settings = some_settings(fake_stages, noise_seeds=0)
    study(settings)
    runs = study_runs(settings)
    (runs[0].folder / "evaluation.json").write_text(
        (runs[0].folder / "evaluation.json").read_text().replace("0.5", "0.25")
    )
    numbers = study_numbers(runs)
    assert list(numbers) == list(STUDY)
    assert numbers["MPO"]["gold_reward"].tolist() == [0.25, 0.5]
    assert numbers["MPO"]["gradient_steps"].tolist() == [5 + 5 + 5 * 16] * 2


def test_study_table_by_hand():
    """Gold 1, 2, 3, 6: mean 3, error √(7/6) = 1.08, as for one run's table."""
    lines = study_table(make_numbers(MPO=[1.0, 2.0, 3.0, 6.0])).splitlines()
    assert lines[0].split()[:3] == ["policy", "gold", "reward"]
    assert "MPO" in lines[1] and "3.00 ± 1.08" in lines[1] and "50% ± 0%" in lines[1]
    assert len({len(line) for line in lines}) == 1


def test_differences_are_paired():
    """Seeds differ by 10, the two methods by 1 and 2 in each: 1.5 ± 0.5. Of two values the interval is the two."""
    text = differences({"SFT": torch.tensor([0.0, 10.0]), "MPO": torch.tensor([1.0, 12.0])}, "MPO")
    assert text.split() == ["SFT", "+1.50", "±", "0.50", "+1.00", "to", "+2.00", "100%"]
    assert differences({"MPO": torch.zeros(2), "SFT": torch.zeros(2)}, "MPO").split()[-1] == "50%"


def test_noise_table_by_hand():
    """3 and 5 without wrong labels, 2 and 3 with most: lost 1 and 2, 1.5 ± 0.5."""
    lines = noise_table({0.0: alike([3.0, 5.0]), 0.4: alike([2.0, 3.0])}).splitlines()
    assert lines[0].split() == ["wrong", "labels", "0%", "40%", "lost", "in", "all"]
    for row, line in zip(evaluate.NOISE_ROWS, lines[1:], strict=True):
        assert line.removeprefix(row).split() == "4.00 ± 1.00 2.50 ± 0.50 1.50 ± 0.50".split()


def make_log(golds):
    return [{"step": step, "gold_reward": gold, "score": 2 * gold} for step, gold in enumerate(golds)]


def test_smoothed_by_hand():
    assert smoothed([make_log([1.0, 2.0, 3.0, 6.0, 9.0])], "gold_reward").tolist() == [[3.0, 5.0]]


def test_sample_table_by_hand():
    """Two runs that rise to 2 and fall to 1, and to 0: worst fall 2; at the end 0.5 ± √0.5."""
    first, second = [0.0] * 4 + [2.0] * 4 + [1.0] * 4, [0.0] * 4 + [2.0] * 4 + [0.0] * 4
    lines = sample_table({"MPO": [make_log(first), make_log(second)]}).splitlines()
    assert "steps 1–4" in lines[0] and "steps 9–12" in lines[0]
    assert lines[1].split()[0] == "MPO"
    assert lines[1].split()[1:4] == ["0.00", "±", "0.00"]
    assert lines[1].split()[-4:] == ["0.50", "±", "0.71", "2.00"]
    assert lines[2].split()[-1] == "4.00"  # the score is twice as high


def test_intervals_by_bootstrap():
    """Of a normal sample the bootstrap's interval is mean ± 1.96 standard errors, within a tenth."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 5
    low, high = evaluate.bootstrap_interval(values)
    mean, error = evaluate.mean_and_error(values)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert (low + high) / 2 == pytest.approx(mean, abs=0.2 * error)
    assert evaluate.bootstrap_interval(torch.ones(7)) == (1.0, 1.0)
    assert evaluate.bootstrap_interval(values) == (low, high)  # the same each time


# ---- Figures ----


def picture(path: Path) -> bytes:
    """The bytes of a PNG file that a figure was written to."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 5000
    return content


def some_pairs(count: int, source: str) -> Pairs:
    generator = torch.Generator().manual_seed(count)
    tokens = torch.tensor([65, 66, 256, 67, 256] * count, dtype=torch.int32)
    rewards = torch.randn(count, 2, generator=generator)
    gold = torch.randn(count, 2, generator=generator) if source == "toy" else None
    return Pairs(tokens, torch.tensor([[1, 2, 2]] * count), BYTES, source, rewards, gold)


def test_figures_show_their_numbers(tmp_path, monkeypatch):
    """What is handed to matplotlib, read back from the figure: heights of bars, points, lines, legends."""
    pytest.importorskip("matplotlib")
    drawn = {}
    original = evaluate.save_figure
    monkeypatch.setattr(
        evaluate, "save_figure", lambda fig, path: drawn.update({path.stem: fig}) or original(fig, path)
    )

    easy, hard = some_pairs(40, "toy"), some_pairs(30, "toy")
    picture(draw_gaps(tmp_path / "gaps.png", easy, hard))
    (axis,) = drawn["gaps"].axes
    assert sum(patch.get_height() for patch in axis.patches) == 70  # stacked: each bar holds its own count
    wrong = int((hard.gold[:, 0] < hard.gold[:, 1]).sum())
    assert f"hard, label wrong: {wrong} pairs" in [text.get_text() for text in axis.get_legend().get_texts()]

    gaps = torch.tensor([3.0, 3.0, 1 / 3, 3.0]).log()
    picture(draw_calibration(tmp_path / "calibration.png", torch.stack((gaps, torch.zeros(4)), 1)))
    assert [text.get_text() for text in drawn["calibration"].axes[0].texts] == ["4 pairs"]

    rows = {"SFT": {"kl": (0.0, 0.0), "gold_reward": (1.0, 0.1), "reward": (2.0, 0.1)},
            "MPO": {"kl": (3.0, 0.2), "gold_reward": (2.0, 0.1), "reward": (2.5, 0.1)}}  # fmt: skip
    picture(draw_rewards(tmp_path / "rewards.png", rows))
    left, right = drawn["rewards"].axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("gold reward", "reward model's reward")
    assert [tuple(line.get_xydata()[0]) for line in right.lines if line.get_marker() == "o"] == [(0, 2), (3, 2.5)]

    picture(draw_ppo(tmp_path / "ppo.png", {"MPO": [make_log([1.0] * 6)], "PPO": [make_log([2.0] * 6)]}))
    assert [axis.get_title() for axis in drawn["ppo"].axes] == ["MPO", "PPO"]
    assert {line.get_label() for line in drawn["ppo"].axes[1].lines} >= {"gold", "reward model"}
    assert drawn["ppo"].axes[1].lines[-1].get_ydata().tolist() == [2.0] * 3

    picture(draw_noise(tmp_path / "noise.png", {0.0: alike([3.0, 5.0]), 0.4: alike([2.0, 3.0])}))
    _, labels = drawn["noise"].axes[0].get_legend_handles_labels()
    assert labels == list(evaluate.NOISE_ROWS)


def test_figures_of_real_text_have_no_gold_reward(tmp_path):
    pytest.importorskip("matplotlib")
    picture(draw_gaps(tmp_path / "gaps.png", some_pairs(40, "hh"), some_pairs(30, "hh")))
    picture(draw_rewards(tmp_path / "rewards.png", {"sft": {"kl": (0.0, 0.0), "reward": (2.0, 0.1)}}))
    log = [{"step": step, "score": 1.0} for step in range(6)]
    picture(draw_ppo(tmp_path / "ppo.png", {"ppo": [log]}))


def test_without_matplotlib_the_pip_command_is_named_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        Settings(figure=True)


# ---- All of it, with real stages ----


def test_a_small_study_from_end_to_end(tmp_path, monkeypatch, capsys):
    """Two folders, six real commands each."""
    pytest.importorskip("matplotlib")
    small = "--steps 4 --batch-size 8"
    commands = [f"reward.py {small}", "split.py", f"dpo.py {small}", f"ppo.py {small} --max-new-tokens 8"]
    monkeypatch.setattr(evaluate, "STUDY", {"SFT": ("sft.pt", []), "MPO": ("ppo.pt", commands)})
    monkeypatch.setattr(evaluate, "WORLD", "model.py --limit 120 --steps 4 --dim 32 --layers 1")
    monkeypatch.setattr(evaluate, "NOISE", (0.4,))
    monkeypatch.setattr(evaluate, "NOISE_ROWS", ("SFT", "MPO"))
    monkeypatch.setattr(evaluate, "PPO_ROWS", ("MPO",))
    study(some_settings(tmp_path, seeds=1, figure=True))
    folder = tmp_path / "study"
    assert {path.name for path in folder.glob("*.png")} == {"rewards.png", "ppo.png", "noise.png"}
    written = json.loads((folder / "study.json").read_text())
    assert written["methods"]["MPO"]["gradient_steps"] == [4 + 4 + 4 * 2]
    assert written["methods"]["SFT"]["kl"] == [0.0]
    assert set(written["wrong_labels"]["0.4"]) == {"SFT", "MPO"}
    said = capsys.readouterr().out
    assert "MPO's gold reward above that of" in said and "lost in all" in said
    gold = torch.load(folder / "wrong40" / "seed0" / "pairs.pt", weights_only=True)["gold"]
    assert 0.25 < (gold[:, 0] < gold[:, 1]).double().mean() < 0.5
