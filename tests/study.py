"""Does MPO do what the paper says? Trains MPO, DPO, PPO, controls and related systems in the toy world, over seeds.

Tuning is equal: --tune tries the same four settings for DPO's methods and the same four prices for PPO's, on seeds 0 to
2 (MPO's split and DPO are fixed); BEST holds each method's best. The study itself runs on other seeds. Each seed has a
folder, where commands run one after the other, each once: what commands.json says is done is not run again (delete the
folder after a change of code). Folders run side by side. On Ctrl-C or SIGTERM the commands under way save their states;
the same call goes on from there.

    python tests/study.py --tune --out out/tuning                                   # the settings in BEST
    python tests/study.py --out out/study --figure                                  # pip install matplotlib
"""

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dpo import Settings as DPOSettings
from dpo import all_logprobs
from evaluate import aligned, summarise
from model import (
    GPT, TOY_TEMPERATURE, UserError, flag, load_model, load_pairs, parse_settings, read_log, run_command, write_file,
)
from reward import RewardModel, ranking_accuracy, score_pairs, wins

# Budgets: MPO's DPO takes 64 steps of 64 pairs, every PPO 32 steps of 128 prompts. A method that is DPO alone may
# choose 256 steps, which take about as long as that PPO.
WORLD, REWARD, SPLIT, START = "model.py --save sft.pt", "reward.py", "split.py", "dpo.py --steps 64"
GRID = {"dpo.py": [(64, 0.1), (64, 0.3), (256, 0.1), (256, 0.3)],  # steps, β
        "ppo.py": [0.05, 0.1, 0.2, 0.3]}  # KL price
BEST = {  # label temperature → tuned method → the choice of GRID that --tune found best
    2.0: {"DPO on all": (256, 0.1), "DPO on easy": (64, 0.3), "PPO from SFT, all": 0.1, "MPO": 0.2,
          "MPO, random split": 0.1, "PPO from SFT, hard": 0.1, "PPO from DPO on all": 0.1,
          "RLP, labels by gold": 0.1, "MPO, labels by gold": 0.2,
          "PPO, SFT answers by gold": 0.3, "MPO, SFT answers by gold": 0.2,
          "DPO on own answers": (64, 0.3), "DPO on own answers, 2 rounds": (64, 0.3), "SAIL-DP": (256, 0.3),
          "IRFT, 2 rounds": (64, 0.3), "SPIN, 2 rounds": (64, 0.3), "RFT": 0.3, "AIHF": 0.05, "RLP": 0.3,
          "PM-RLHF": 0.1, "MPO, DPO on own answers as PPO": (64, 0.3)},
    0.0: {"DPO on all": (256, 0.3), "DPO on easy": (64, 0.3), "PPO from SFT, all": 0.3, "MPO": 0.3,
          "MPO, random split": 0.3},
    1.0: {"DPO on all": (256, 0.3), "DPO on easy": (64, 0.1), "PPO from SFT, all": 0.2, "MPO": 0.3,
          "MPO, random split": 0.3},
    1.5: {"DPO on all": (256, 0.3), "DPO on easy": (64, 0.1), "PPO from SFT, all": 0.1, "MPO": 0.2,
          "MPO, random split": 0.3},
    3.0: {"DPO on all": (256, 0.1), "DPO on easy": (64, 0.3), "PPO from SFT, all": 0.1, "MPO": 0.2,
          "MPO, random split": 0.1},
}


def dpo(choice: tuple[int, float], rounds: int = 1) -> str:
    """DPO's command for one of GRID's choices, or for one of so many equal rounds."""
    return f"dpo.py --steps {choice[0] // rounds} --beta {choice[1]}"


def ppo(choice: float) -> str:
    """PPO's command for one of GRID's choices."""
    return f"ppo.py --steps 32 --kl-coefficient {choice}"


def own(policy: str, easy: str, flags: str = "--data pairs.pt") -> str:
    """The command that makes the pairs file `easy` of a policy's own answers."""
    return f"split.py --fraction 1 --policy {policy}.pt --easy {easy}.pt --hard {easy}_rest.pt {flags}"


def methods(best: dict) -> dict[str, list[str]]:
    """Row → the commands that make its policy, which the last of them saves. best: tuned row → its settings; for a
    row missing from it, the commands contain None."""
    parts, mpo, start_all = [REWARD, SPLIT], ppo(best["MPO"]), f"{START} --data pairs.pt --save start_all.pt"
    by_chance = [REWARD, "split.py --by random --easy easy_random.pt --hard hard_random.pt",
                 f"{START} --data easy_random.pt --save dpo_random.pt"]
    few = "split.py --by {0} --fraction 0.968 --easy rest_{0}.pt --hard few_{0}.pt"
    ppo_all = f"{ppo(best['PPO from SFT, all'])} --init sft.pt --data pairs.pt --save ppo_all.pt"
    shown = [ppo_all, own("ppo_all", "own_gold", "--data pairs.pt --chosen gold"),
             "reward.py --data pairs.pt+own_gold.pt --save reward_rlp_gold.pt"]
    more = [own("sft", "own_sft_gold", "--data pairs.pt --chosen gold"),
            "reward.py --data pairs.pt+own_sft_gold.pt --save reward_sft_gold.pt"]
    return {
        "SFT": [],
        "DPO on all": [f"{dpo(best['DPO on all'])} --data pairs.pt --save dpo_all.pt"],
        "DPO on easy": [*parts, f"{dpo(best['DPO on easy'])} --save dpo_easy.pt"],
        "DPO on hard": [*parts, f"{dpo(best['DPO on all'])} --data hard.pt --save dpo_hard.pt"],
        "PPO from SFT, all": [REWARD, ppo_all],
        "PPO from SFT, hard": [*parts, f"{ppo(best.get('PPO from SFT, hard'))} --init sft.pt --save ppo_hard.pt"],
        "PPO from DPO on all": [start_all, REWARD, f"{ppo(best.get('PPO from DPO on all'))} --init start_all.pt "
                                "--data pairs.pt --save ppo_dpo_all.pt"],
        "MPO's DPO alone": [*parts, START],
        "MPO": [*parts, START, f"{mpo} --save ppo.pt"],
        # Controls of MPO. The first is tuned; the others with PPO take MPO's KL price, but for "PPO from SFT, any 3%".
        "MPO, random split": [*by_chance, f"{ppo(best['MPO, random split'])} --init dpo_random.pt "
                              "--data hard_random.pt --save ppo_random.pt"],
        # Does the random split win because DPO goes less far on it than on easy pairs? So half and twice DPO's steps.
        "random split's DPO alone": by_chance,
        "MPO, 32 DPO steps": [*parts, "dpo.py --steps 32 --save dpo_32.pt",
                              f"{mpo} --init dpo_32.pt --save ppo_32.pt"],
        "random split, MPO's price": [*by_chance, f"{mpo} --init dpo_random.pt --data hard_random.pt "
                                      "--save ppo_random_price.pt"],
        "random split, 128 DPO steps": [
            *by_chance[:2], "dpo.py --steps 128 --data easy_random.pt --save dpo_random_128.pt",
            f"{mpo} --init dpo_random_128.pt --data hard_random.pt --save ppo_random_128.pt"],
        "MPO, parts swapped": [*parts, f"{START} --data hard.pt --save start_hard.pt",
                               f"{mpo} --init start_hard.pt --data easy.pt --save ppo_swapped.pt"],
        "MPO, PPO on all prompts": [*parts, START, f"{mpo} --data pairs.pt --save ppo_prompts.pt"],
        "MPO, reference SFT": [*parts, START, f"{mpo} --reference sft.pt --save ppo_reference.pt"],
        "MPO, absolute gap": [REWARD, "split.py --gap absolute --easy easy_absolute.pt --hard hard_absolute.pt",
                              f"{START} --data easy_absolute.pt --save dpo_absolute.pt",
                              f"{mpo} --init dpo_absolute.pt --data hard_absolute.pt --save ppo_absolute.pt"],
        "MPO, hard third": [REWARD, "split.py --fraction 0.667 --easy easy_third.pt --hard hard_third.pt",
                            f"{START} --data easy_third.pt --save dpo_third.pt",
                            f"{mpo} --init dpo_third.pt --data hard_third.pt --save ppo_third.pt"],
        # Few prompts: about 255, each answered 16 times.
        "MPO, hardest 3%": [*parts, START, few.format("reward"), f"{mpo} --data few_reward.pt --save ppo_few.pt"],
        "MPO, any 3%": [*parts, START, few.format("random"), f"{mpo} --data few_random.pt --save ppo_few_any.pt"],
        "PPO from SFT, any 3%": [REWARD, few.format("random"), f"{ppo(best['PPO from SFT, all'])} --init sft.pt "
                                 "--data few_random.pt --save ppo_few_sft.pt"],
        # Does MPO fall behind because its reward model never saw what policies do wrong? In these two rows the reward
        # model also learns from answers of PPO's policy, labelled by gold.
        "RLP, labels by gold": [REWARD, *shown, f"{ppo(best.get('RLP, labels by gold'))} --init sft.pt --data pairs.pt "
                                "--reward reward_rlp_gold.pt --save ppo_rlp_gold.pt"],
        "MPO, labels by gold": [*parts, START, *shown, f"{ppo(best.get('MPO, labels by gold'))} "
                                "--reward reward_rlp_gold.pt --save ppo_mpo_gold.pt"],
        # Or because that model has few pairs, and wrong labels? Here it learns from as many more, but of SFT's answers.
        "PPO, SFT answers by gold": [REWARD, *more, f"{ppo(best.get('PPO, SFT answers by gold'))} --init sft.pt "
                                     "--data pairs.pt --reward reward_sft_gold.pt --save ppo_sft_gold.pt"],
        "MPO, SFT answers by gold": [*parts, START, *more, f"{ppo(best.get('MPO, SFT answers by gold'))} "
                                     "--reward reward_sft_gold.pt --save ppo_mpo_sft_gold.pt"],
    }


def related(best: dict) -> dict[str, list[str]]:
    """The related systems, as methods gives its rows. Two rounds share the steps of their choice."""
    known, labelled = methods(best), "--data pairs.pt --chosen labelled --answers 1"
    own_sft, demos = own("sft", "own"), own("sft", "demos", labelled)

    def self_play(row: str, name: str, loss: str) -> list[str]:
        """Two rounds of labelled responses against the policy's own."""
        half = dpo(best[row], rounds=2)
        return [REWARD, demos, f"{half} --loss {loss} --data demos.pt --save {name}_first.pt",
                own(f"{name}_first", f"demos_{name}", labelled),
                f"{half} --loss {loss} --data demos_{name}.pt --init {name}_first.pt --save {name}.pt"]

    def rewarded(row: str, name: str, data: str, *before: str) -> list[str]:
        """PPO from SFT by a reward model that is trained on pairs of its own, made by the commands `before`."""
        return [REWARD, *before, f"reward.py --data {data} --save reward_{name}.pt",
                f"{ppo(best[row])} --init sft.pt --data pairs.pt --reward reward_{name}.pt --save ppo_{name}.pt"]

    half = dpo(best["DPO on own answers, 2 rounds"], rounds=2)
    rows = {
        "expert iteration": [REWARD, own_sft,
                             "model.py --steps 64 --batch-size 64 --init sft.pt --data own.pt --save ei.pt"],
        "DPO on own answers": [REWARD, own_sft, f"{dpo(best['DPO on own answers'])} --data own.pt --save dpo_own.pt"],
        "DPO on own answers, 2 rounds": [
            REWARD, own_sft, f"{half} --data own.pt --save dpo_own_first.pt", own("dpo_own_first", "own_2"),
            f"{half} --init dpo_own_first.pt --reference sft.pt --data own_2.pt --save dpo_own_2.pt"],
        "SAIL-DP": [f"{dpo(best['SAIL-DP'])} --data pairs.pt --self-weight 0.3 --save sail.pt"],
        "IRFT, 2 rounds": self_play("IRFT, 2 rounds", "irft", "linear"),
        "SPIN, 2 rounds": self_play("SPIN, 2 rounds", "spin", "sigmoid"),
        "RFT": rewarded("RFT", "rft", "demos.pt", demos),
        "AIHF": rewarded("AIHF", "aihf", "pairs.pt+demos.pt", demos),
        "RLP": rewarded("RLP", "rlp", "pairs.pt+own_ppo.pt", known["PPO from SFT, all"][-1], own("ppo_all", "own_ppo")),
        "PM-RLHF": [REWARD, f"{ppo(best['PM-RLHF'])} --init sft.pt --data pairs.pt --matching 0.1 "
                    "--save ppo_matching.pt"],
        "MPO, DPO on own answers as PPO": [
            *known["MPO's DPO alone"], own("dpo", "own_hard", "--data hard.pt"),
            f"{dpo(best['MPO, DPO on own answers as PPO'])} --init dpo.pt --data own_hard.pt --save mpo_own.pt"],
    }
    for part in (25, 50, 100):  # ExPO: α in hundredths
        for row, name in (("DPO on all", "dpo_all"), ("MPO", "ppo")):
            onward = f"model.py --init {name}.pt --extrapolate sft.pt --alpha {part / 100} --save expo_{name}_{part}.pt"
            rows[f"ExPO on {row}, α {part / 100}"] = [*known[row], onward]
    return rows


def tuning(best: dict) -> dict[str, list[str]]:
    """SFT, and each row of BEST with each of GRID's choices, as "row: choice"."""
    rows = {"SFT": []}
    for row in best:
        choices = GRID[stage(row)]
        make = methods if row in methods(best) else related
        known = [make(best | {row: choice})[row] for choice in choices]
        for number, choice in enumerate(choices):
            rows[f"{row}: {choice}"] = numbered(known[number], known[number - 1], number)
    return rows


def stage(row: str) -> str:
    """dpo.py or ppo.py: which of them a tuned row's settings are of."""
    return STUDY[row][-1].split()[0]


def numbered(commands: list[str], others: list[str], number: int) -> list[str]:
    """The commands of one choice. Where one differs from another choice's (`others`), or reads a file with a number in
    its name, what it saves gets the number too, so that no two choices write the same file."""
    result, names = [], set()  # names of files that differ from the others'
    for command, other in zip(commands, others, strict=True):
        if command != other or names & set(re.findall(r"(\w+)\.pt", command)):
            names |= set(re.findall(r"--(?:save|easy|hard) (\w+)", command))
        for name in names:
            command = re.sub(rf"\b{name}\.pt", f"{name}_{number}.pt", command)
        result.append(command)
    return result


STUDY = methods(BEST[TOY_TEMPERATURE]) | related(BEST[TOY_TEMPERATURE])
DRAWN = ["SFT", "DPO on all", "DPO on easy", "PPO from SFT, all", "PPO from SFT, hard", "PPO from DPO on all",
         "MPO, random split", "MPO"]
COLOURS = {"MPO": "#d55e00", "DPO on all": "#56b4e9", "DPO on easy": "#0072b2", "PPO from SFT, all": "#009e73",
           "PPO from DPO on all": "#cc79a7", "MPO, random split": "#e69f00"}  # others: grey
PPO_ROWS = ["PPO from SFT, all", "PPO from SFT, hard", "PPO from DPO on all", "MPO, reference SFT", "MPO"]
RIVALS = {"MPO, labels by gold": "RLP, labels by gold", "MPO, SFT answers by gold": "PPO, SFT answers by gold",
          "MPO, 32 DPO steps": "random split, MPO's price", "random split, MPO's price": "random split, 128 DPO steps"}
NOISE_ROWS = ["SFT", "DPO on all", "DPO on easy", "PPO from SFT, all", "MPO", "MPO, random split"]
SHIFTED = {"SFT": "sft", "DPO on all": "dpo_all", "DPO on easy": "dpo_easy", "PPO from SFT": "ppo_all", "MPO": "ppo"}
IMPLICIT = {row: SHIFTED[row] for row in ("DPO on all", "DPO on easy")}
SHIFT = tuple(own(name, f"shift_{name}", "--data test.pt --answers 2 --chosen gold") for name in SHIFTED.values())
SPREAD, ROUGH = "{:.2f} ± {:.2f}", "{:.1f} ± {:.1f}"  # mean and standard error
LEAD, WON = "{0:+.2f} ± {1:.2f} ({2:+.2f} to {3:+.2f})", "{4:.0%} ({6:.0%} to {7:.0%})"  # of summarise's numbers
COLUMNS = {"gold reward": ("gold_reward", SPREAD), "reward": ("reward", SPREAD),
           "wins vs SFT": ("win_rate_vs_sft", "{:.0%} ± {:.0%}"), "KL from SFT": ("kl", ROUGH),
           "length": ("length", ROUGH), "ended": ("ended", "{:.1%}"), "entropy": ("entropy", "{:.2f}"),
           **{name: (name, "{:,.0f}") for name in ("updates", "tokens", "seconds")}}
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
Numbers = dict[str, dict[str, torch.Tensor]]  # row → key → its value for each seed, [seeds]


@dataclass
class Settings:
    """Flags of the study. Raises UserError for values that no study can have."""

    out: str = flag("out/study", "folder for the seeds' folders, study.json and figures")
    seeds: int | None = flag(None, "how many seeds [5; --tune: 3]")
    seed: int | None = flag(None, "the first one; settings are chosen on seeds 0 to 2 [3; --tune: 0]")
    noise_seeds: int | None = flag(None, "how many of them at each other label temperature; 0: none [all]")
    related: bool = flag(True, "the related systems too")
    parallel: int | None = flag(None, "seeds side by side [one a core, or one on a GPU]")
    tune: bool = flag(False, "try GRID's settings instead, for each method that BEST has settings for")
    figure: bool = flag(False, "draw study.png, or with --tune tuning.png, too (needs matplotlib)")

    def __post_init__(self):
        self.seeds = (3 if self.tune else 5) if self.seeds is None else self.seeds
        self.seed = (0 if self.tune else 3) if self.seed is None else self.seed
        self.noise_seeds = self.seeds if self.noise_seeds is None else min(self.noise_seeds, self.seeds)
        side_by_side = 1 if self.parallel is None else self.parallel
        if self.seeds < 2 or self.noise_seeds < 0 or self.noise_seeds == 1 or side_by_side < 1:
            raise UserError("--seeds and --noise-seeds: at least 2, for a standard error; --parallel: at least 1")
        if self.figure and importlib.util.find_spec("matplotlib") is None:
            raise UserError("--figure: this needs one more package: pip install matplotlib")


def saved_as(commands: list[str]) -> str:
    """The name, without .pt, that the last of these commands, or else WORLD, saves its checkpoint, log and state by."""
    last = [WORLD, *commands][-1]
    return (re.search(r"--(?:save|easy) (\w+)", last) or re.match(r"(\w+)", last))[1]


class Run:
    """One folder, in which commands run one after the other and make the policies of `rows`, row → its commands.
    record is its commands.json: command → "seconds", those of stopped attempts included, and "done"."""

    def __init__(self, folder: Path, seed: int, rows: dict[str, list[str]], world: str = WORLD, last: tuple = ()):
        self.folder, self.seed, self.rows = folder, seed, rows
        training = [command for commands in rows.values() for command in commands]
        policies = " ".join(f"{saved_as(commands)}.pt" for commands in rows.values())
        evaluation = f"evaluate.py --policies {policies} --samples 0 --save study_evaluation.json"
        self.commands = list(dict.fromkeys([world, *training, evaluation, *last]))  # what several rows need: once
        path = folder / "commands.json"
        self.record = json.loads(path.read_text("utf-8")) if path.exists() else {}


def run_folder(run: Run, threads: int, stop: threading.Event, bar: tqdm) -> None:
    """Runs those of a folder's commands that are not done, each from its saved state if there is one. When `stop` is
    set, the one under way saves its state and the rest are left. Raises UserError if one fails."""
    run.folder.mkdir(parents=True, exist_ok=True)
    log, environment = run.folder / "study.log", os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    for command in run.commands:
        entry = run.record.setdefault(command, {"seconds": 0.0, "done": False})
        if not entry["done"] and not stop.is_set():
            resume = ["--resume"] * (run.folder / f"{saved_as([command])}.state.pt").exists()
            words = [*command.split(), "--out", str(run.folder), "--seed", str(run.seed), *resume]
            began = time.perf_counter()
            with log.open("a", encoding="utf-8") as file:
                print("$", *words, file=file, flush=True)
                # Out of reach of a terminal's Ctrl-C: at a second interrupt a stage ends before it has saved its state.
                process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, start_new_session=True,
                                           stdin=subprocess.DEVNULL, stdout=file, stderr=file)
            while process.poll() is None and not stop.wait(0.1):
                pass
            if stop.is_set():
                process.send_signal(signal.SIGINT)
            made = set(re.findall(r"--(?:save|easy|hard) (\S+)", command))
            for other, about in run.record.items():  # what others saved by these names, or made of them, is old now
                if other != command and made & set(re.split(r"[ +]", other)):
                    about.update(seconds=0.0, done=False)
            entry["done"] = process.wait() == 0
            entry["seconds"] += time.perf_counter() - began
            write_file(run.folder / "commands.json", json.dumps(run.record, indent=1) + "\n")
            if not entry["done"] and not stop.is_set():
                last = log.read_text("utf-8", "replace").splitlines()[-1]
                raise UserError(f"{command} in {run.folder} ended with code {process.returncode}: {last} (see {log})")
        bar.update(entry["done"])


def read_row(run: Run, row: str) -> dict[str, float]:
    """What evaluate.py measured of a row's policy, the entropy a token at the end of its PPO, and the updates, tokens
    generated by split.py and PPO, and seconds that it took."""
    evaluation, commands = json.loads((run.folder / "study_evaluation.json").read_text("utf-8")), run.rows[row]
    steps = [step for command in commands for step in read_log(run.folder / f"{saved_as([command])}.jsonl")]
    tokens = sum(step["generated"] if "generated" in step else step["tokens_per_second"] * step["seconds"]
                 for step in steps if "updates" in step)  # split.py's and PPO's steps
    last = [step for step in read_log(run.folder / f"{saved_as(commands)}.jsonl")[-4:] if "entropy" in step]
    answered = [step["tokens_per_second"] * step["seconds"] for step in last]  # tokens: the last step's may be few
    entropy = sum(step["entropy"] * count for step, count in zip(last, answered, strict=True))
    took = {"updates": sum(step.get("updates", 1) for step in steps), "tokens": tokens,
            "seconds": sum(run.record[command]["seconds"] for command in commands),
            "entropy": entropy / sum(answered) if last else math.nan}
    return evaluation[saved_as(commands)] | took


def read_numbers(runs: list[Run], rows: list[str]) -> Numbers:
    """The numbers of these rows of the runs."""
    numbers = {}
    for row in rows:
        seeds = [read_row(run, row) for run in runs]
        numbers[row] = {key: torch.tensor([seed[key] for seed in seeds]).double() for key, _ in COLUMNS.values()}
    return numbers


def mean_and_error(values: torch.Tensor) -> list[float]:
    """Mean of values [seeds] and its standard error."""
    return list(summarise({"reward": values}).values())[:2]


def study_table(numbers: Numbers) -> str:
    """A row a policy: means over seeds ± standard errors."""
    rows = [[row, *(form.format(*mean_and_error(values[key])).replace("nan", "–") for key, form in COLUMNS.values())]
            for row, values in numbers.items()]
    return aligned([["policy", *COLUMNS], *rows])


def lead_table(golds: dict[str, torch.Tensor], ahead: str = "MPO") -> str:
    """How far one row is above each other, [seeds] gold rewards each, paired by seed: mean ± standard error (95%
    interval), and the share of seeds that it won (Wilson's interval), a tie counting one half."""
    rows = [[f"{ahead} against", "lead", "seeds won"]]
    for row, theirs in golds.items():
        if row != ahead:
            numbers = summarise({"lead": golds[ahead] - theirs, "won": wins(golds[ahead], theirs)}).values()
            rows.append([row, LEAD.format(*numbers), WON.format(*numbers)])
    return aligned(rows)


def wrong_labels(runs: list[Run]) -> float:
    """Share of labels that gold contradicts, of those on training pairs that differ in gold, over all the runs."""
    pairs = [load_pairs(DPOSettings(out=str(run.folder)), "pairs.pt") for run in runs]
    gaps = torch.cat([part.gold[:, 0] - part.gold[:, 1] for part in pairs])
    return ((gaps < 0).sum() / (gaps != 0).sum()).item()


def noise_table(noise: dict[float, Numbers], wrong: list[float]) -> str:
    """Gold reward by policy and label temperature, of which `wrong` has the share of wrong labels; what the highest
    temperature costs; and how far MPO is ahead (95% interval), both paired by seed."""
    names = [f"{temperature:g}" for temperature in noise]
    rows, leads = [["label temperature", *names, f"{names[0]} less {names[-1]}"]], [["MPO against", *names]]
    rows.append(["wrong labels", *(f"{share:.0%}" for share in wrong), ""])
    mpo = [numbers["MPO"]["gold_reward"] for numbers in noise.values()]
    for row in NOISE_ROWS:
        golds = [numbers[row]["gold_reward"] for numbers in noise.values()]  # of each temperature: [seeds]
        rows.append([row, *(SPREAD.format(*mean_and_error(gold)) for gold in (*golds, golds[0] - golds[-1]))])
        if row != "MPO":
            found = [summarise({"lead": ours - theirs}).values() for ours, theirs in zip(mpo, golds, strict=True)]
            leads.append([row, *("{0:+.2f} ({2:+.2f} to {3:+.2f})".format(*numbers) for numbers in found)])
    return f"{aligned(rows)}\n\n{aligned(leads)}"


def five_places(count: int) -> list[int]:
    """Five of so many places in a row, the first and the last among them."""
    return torch.linspace(0, count - 1, 5).round().long().tolist()


def ppo_curves(runs: list[Run], row: str) -> dict[str, torch.Tensor]:
    """Gold and model reward of the answers that PPO trains on, means over those of any 4 successive steps (the last
    step's may be few): [runs, steps − 3]."""
    curves = {"gold": [], "reward model": []}
    for run in runs:
        log = read_log(run.folder / f"{saved_as(run.rows[row])}.jsonl")
        answers = torch.tensor([step["seconds"] * step["episodes_per_second"] for step in log]).double()
        answers = answers.unfold(0, 4, 1)  # [steps − 3, 4]
        for name, key in zip(curves, ("gold_reward", "score"), strict=True):
            rewards = torch.tensor([step[key] for step in log]).double().unfold(0, 4, 1)
            curves[name].append((answers * rewards).sum(1) / answers.sum(1))
    return {name: torch.stack(means) for name, means in curves.items()}


def ppo_table(curves: Numbers, level: float) -> str:
    """Those rewards on the way; the last one's standard deviation over runs; how far it is below the best of its own
    run; and the step at which gold first is at `level`, mean of the runs that get there. curves: row → ppo_curves."""
    places = five_places(curves["MPO"]["gold"].shape[1])
    rows = [["", *(f"steps {place + 1}–{place + 4}" for place in places), "deviation", "fall from best",
             f"steps to gold {level:.2f}"]]
    for row, known in curves.items():
        for name, values in known.items():
            cells = [SPREAD.format(*mean_and_error(values[:, place])) for place in places]
            cells += [f"{values[:, -1].std():.2f}", f"{(values.max(1).values - values[:, -1]).mean():.2f}", ""]
            there = values >= level
            if name == "gold" and there.any():
                first = there.int().argmax(1)[there.any(1)] + 4.0
                cells[-1] = f"{first.mean():.1f} ({len(first)} of {len(values)} seeds)"
            rows.append([f"{row}: gold" if name == "gold" else f"  {name}", *cells])
    return aligned(rows)


def tuning_table(numbers: Numbers, rows: list[str]) -> str:
    """Gold reward of these rows by setting; * is each one's best."""
    tables = []
    for script, choices in GRID.items():
        lines = [["steps, β" if script == "dpo.py" else "KL price", *map(str, choices)]]
        for row in rows:
            if stage(row) == script and f"{row}: {choices[0]}" in numbers:
                golds = [numbers[f"{row}: {choice}"]["gold_reward"] for choice in choices]
                best = max(gold.mean() for gold in golds)
                cells = [SPREAD.format(*mean_and_error(gold)) + " *"[gold.mean() == best] for gold in golds]
                lines.append([row, *cells])
        tables.append(aligned(lines))
    return "\n".join(tables)


def said_again(text: str) -> int:
    """How many sentences of an answer are not the first of their kind in it."""
    sentences = [sentence.strip() for sentence in re.findall(r"[^.!?]+[.!?]?", text) if sentence.strip()]
    return len(sentences) - len(set(sentences))


def measure_shift(run: Run, data: str) -> dict[str, float]:
    """How often the reward model, and the implicit reward log π − log π_SFT of either DPO policy, order two responses
    as gold does: of those pairs of a file whose gold rewards are 0.5 to 1 apart, so that no file's are far easier.
    Of all its pairs that differ in gold (own answers of equal gold make no pair), "gold gap" is the mean difference,
    and "said again" the mean count of repetitions in a response."""
    settings, device = DPOSettings(out=str(run.folder), device="cpu"), torch.device("cpu")
    pairs = load_pairs(settings, data)
    pairs = pairs.select((pairs.gold[:, 0] != pairs.gold[:, 1]).nonzero()[:, 0])
    distance = (pairs.gold[:, 0] - pairs.gold[:, 1]).abs()
    again = [said_again(pairs.tokenizer.decode(part)) for _, *sides in pairs for part in sides]
    pairs = pairs.select(((distance >= 0.5) & (distance <= 1)).nonzero()[:, 0])
    better = pairs.gold.argsort(dim=1, descending=True)  # (n, 2): the better side, then the other
    documents, logprobs = list(pairs), {}
    for name in ("sft", *IMPLICIT.values()):
        policy, _ = load_model(settings, f"{name}.pt", GPT)
        logprobs[name] = all_logprobs(settings, policy, documents, device)
    model, _ = load_model(settings, "reward.pt", RewardModel)
    rewards = {"reward model": score_pairs(model, pairs, device)}
    rewards |= {f"{row}, implicit": logprobs[name] - logprobs["sft"] for row, name in IMPLICIT.items()}
    accuracies = {name: ranking_accuracy(values.gather(1, better)) for name, values in rewards.items()}
    about = {"said again": sum(again) / len(again), "pairs": len(pairs), "gold gap": distance.mean().item()}
    return about | accuracies


def shift_table(runs: list[Run]) -> str:
    """measure_shift of the data's held-back pairs, and of two answers of each policy to each of their prompts."""
    rows = []
    for row, data in {"data": "test.pt", **{row: f"shift_{name}.pt" for row, name in SHIFTED.items()}}.items():
        found = [measure_shift(run, data) for run in runs]
        values = {name: torch.tensor([one[name] for one in found]).double() for name in found[0]}
        rows = rows or [["responses of", *values]]
        forms = {"said again": SPREAD, "pairs": "{:.0f} ± {:.0f}", "gold gap": SPREAD}
        cells = [forms.get(name, "{:.1%} ± {:.1%}").format(*mean_and_error(value)) for name, value in values.items()]
        rows.append([row, *cells])
    return aligned(rows)


def draw_lines(axis, lines: dict[str, torch.Tensor], places: list, label: str) -> None:
    """Draws a line a row, [seeds, places] each, with standard errors, MPO's the thickest; names at their ends."""
    last = sorted(lines, key=lambda row: lines[row][:, -1].mean().item())
    heights = torch.tensor([lines[row][:, -1].mean().item() for row in last])
    means = torch.stack([values.mean(0) for values in lines.values()])
    for place in range(1, len(last)):  # names do not lie on each other
        heights[place] = max(heights[place], heights[place - 1] + (means.max() - means.min()) / 14)
    for row, height in zip(last, heights.tolist(), strict=True):
        points = [mean_and_error(values) for values in lines[row].T]
        colour, wide = COLOURS.get(row, "#7f7f7f"), 3 if row == "MPO" else 1.5
        axis.errorbar(places, *torch.tensor(points).T, marker="o", color=colour, linewidth=wide, elinewidth=1.5,
                      capsize=3, zorder=wide)
        axis.annotate(row, (places[-1], height), xytext=(8, 0), textcoords="offset points", color=colour, va="center")
    axis.set(xlabel=label, xticks=places, ylabel="gold reward, mean ± standard error")
    axis.spines[["top", "right"]].set_visible(False)


def draw_study(folder: Path, golds: dict[str, torch.Tensor], curves: Numbers, noise: dict[float, Numbers],
               wrong: list[float]) -> None:
    """study.png: gold reward by policy, a dot a seed; while PPO trains; and by label temperature."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3 if len(noise) > 1 else 2, figsize=(16 if len(noise) > 1 else 11, 4.2),
                                   layout="constrained")
    rows = sorted(DRAWN, key=lambda row: (row == "MPO", golds[row].mean().item()))  # MPO at the top
    axes[0].axvline(golds["MPO"].mean(), color=COLOURS["MPO"], linewidth=0.8, linestyle=":")
    for place, row in enumerate(rows):
        colour, size = COLOURS.get(row, "#7f7f7f"), 90 if row == "MPO" else 40
        axes[0].scatter(golds[row], [place] * len(golds[row]), 12, color=colour, alpha=0.5)
        axes[0].scatter(golds[row].mean(), place, size, color=colour, zorder=3)
    axes[0].set(yticks=range(len(rows)), yticklabels=rows, xlabel="gold reward (small: each seed; large: their mean)")
    axes[0].spines[["top", "right"]].set_visible(False)
    places = five_places(curves["MPO"]["gold"].shape[1])  # ppo_table's, of the rows that have a colour
    drawn = {row: curves[row]["gold"][:, places] for row in PPO_ROWS if row in COLOURS}
    draw_lines(axes[1], drawn, [place + 4 for place in places], "PPO step, the last of the 4 averaged")
    home = f"label temperature {TOY_TEMPERATURE:g}"
    axes[0].set_title(f"{home}, at the end")
    axes[1].set(title=f"{home}, while PPO trains", ylabel="gold reward of PPO's answers ± standard error")
    if len(noise) > 1:
        lines = {row: torch.stack([one[row]["gold_reward"] for one in noise.values()], 1) for row in NOISE_ROWS[1:]}
        draw_lines(axes[2], lines, list(noise), "label temperature, and the share of wrong labels")
        axes[2].set_xticklabels([f"{place:g}\n{share:.0%}" for place, share in zip(noise, wrong, strict=True)])
        axes[2].set_title("at the end, by label noise")
    figure.savefig(folder / "study.png")


def draw_tuning(settings: Settings, numbers: Numbers) -> None:
    """tuning.png: gold reward by KL price."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(layout="constrained", figsize=(7, 4.2))
    prices = GRID["ppo.py"]
    rows = [row for row in BEST[TOY_TEMPERATURE] if row in COLOURS and stage(row) == "ppo.py"]
    lines = {row: torch.stack([numbers[f"{row}: {price}"]["gold_reward"] for price in prices], 1) for row in rows}
    seeds = f"seeds {settings.seed} to {settings.seed + settings.seeds - 1}"
    draw_lines(axis, lines, prices, f"KL price, in reward a nat (label temperature {TOY_TEMPERATURE:g}, {seeds})")
    figure.savefig(Path(settings.out) / "tuning.png")


def plan(settings: Settings) -> dict[float, list[Run]]:
    """Label temperature → a folder for each of its seeds."""
    runs, folder = {}, Path(settings.out).resolve()
    for temperature in BEST:
        best, at_home = BEST[temperature], temperature == TOY_TEMPERATURE
        known = methods(best)
        if settings.tune:
            rows = tuning({row: choice for row, choice in best.items() if settings.related or row in known})
        elif at_home:
            rows = STUDY if settings.related else known
        else:
            rows = {row: known[row] for row in NOISE_ROWS}
        place = folder if at_home else folder / f"temperature{temperature:g}"
        world = WORLD if at_home else f"{WORLD} --label-temperature {temperature:g}"
        seeds = range(settings.seed, settings.seed + (settings.seeds if at_home else settings.noise_seeds))
        last = SHIFT if at_home and not settings.tune else ()
        runs[temperature] = [Run(place / f"seed{seed}", seed, rows, world, last) for seed in seeds]
    return {temperature: group for temperature, group in runs.items() if group}


def execute(runs: list[Run], parallel: int) -> None:
    """Runs what is not done, folders side by side. When a command fails, or on Ctrl-C, the others save and end too."""
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: what a shell starts in the background ignores it
        signal.signal(number, signal.default_int_handler)
    stop, bar = threading.Event(), tqdm(total=sum(len(run.commands) for run in runs), unit="command")
    with bar, ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(run_folder, run, max(1, CORES // parallel), stop, bar) for run in runs]
        try:
            for future in as_completed(futures):
                future.result()  # raises what run_folder raised
        finally:
            stop.set()


def report_tuning(settings: Settings, runs: dict[float, list[Run]]) -> dict:
    """Prints how each method did with each of its settings. Returns the numbers."""
    numbers = {temperature: read_numbers(group, list(group[0].rows)) for temperature, group in runs.items()}
    for temperature, known in numbers.items():
        print(f"label temperature {temperature:g}: gold reward by setting, mean ± standard error over "
              f"{len(runs[temperature])} seeds; *: the method's best\n{tuning_table(known, list(BEST[temperature]))}\n")
    if settings.figure:
        draw_tuning(settings, numbers[TOY_TEMPERATURE])
    return numbers


def report_study(settings: Settings, runs: dict[float, list[Run]]) -> dict:
    """Prints every policy, and what MPO is ahead of each by; the course of PPO; the accuracy of rewards on own answers;
    label temperatures. Returns the numbers."""
    home = runs[TOY_TEMPERATURE]
    numbers, curves = read_numbers(home, list(home[0].rows)), {row: ppo_curves(home, row) for row in PPO_ROWS}
    golds = {row: values["gold_reward"] for row, values in numbers.items()}
    level = curves[PPO_ROWS[0]]["gold"][:, -1].mean().item()
    leads = "\n".join(lead_table({row: golds[row] for row in rows}, rows[0]) for rows in RIVALS.items())
    print(f"toy world, mean ± standard error over {len(home)} seeds. What a policy takes beyond SFT, its reward "
          "model included:\noptimiser updates, tokens generated by PPO and split.py, seconds beside another command"
          f"\n\n{study_table(numbers)}\n\npaired by seed, gold reward\n{lead_table(golds)}\n\n"
          f"{leads}\n\n"
          "reward of the answers that PPO trains on, 128 a step: mean ± standard error over seeds\n"
          f"{ppo_table(curves, level)}\n\nhow often rewards order two responses as gold does, "
          f'where gold differs by 0.5 to 1 ("pairs"; said again, gold gap: wherever it differs)\n{shift_table(home)}')
    noise = {temperature: read_numbers(runs[temperature][: settings.noise_seeds], NOISE_ROWS)
             for temperature in sorted(runs) if settings.noise_seeds}
    wrong = [wrong_labels(runs[temperature][: settings.noise_seeds]) for temperature in noise]
    if len(noise) > 1:
        print("\ngold reward by label temperature (at 0 no label is wrong), mean ± standard error "
              f"over {settings.noise_seeds} seeds\n{noise_table(noise, wrong)}")
    if settings.figure:
        draw_study(Path(settings.out), golds, curves, noise, wrong)
    return {"policies": numbers, "label_temperatures": noise}


def as_json(values: torch.Tensor) -> list[float | None]:
    """Numbers as JSON has them; None for what is not known."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def main() -> None:
    """Runs what the study lacks, prints its tables, and writes study.json and a figure."""
    settings = parse_settings(Settings, __doc__)
    runs = plan(settings)
    everything = [run for group in runs.values() for run in group]
    execute(everything, min(settings.parallel or (1 if torch.cuda.is_available() else CORES), len(everything)))
    numbers = (report_tuning if settings.tune else report_study)(settings, runs)
    write_file(Path(settings.out) / "study.json", json.dumps(numbers, indent=1, default=as_json) + "\n")


if __name__ == "__main__":
    run_command(main)
