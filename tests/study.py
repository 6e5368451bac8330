"""Does MPO do what the paper says? Trains MPO, DPO, PPO and controls in the toy world over seeds, and compares them.

STUDY lists the policies with the commands that make them. Each seed has a folder, where commands run one after the
other, each once: what commands.json says is done is not run again (delete the folder after a change of code). Seeds run
side by side. On Ctrl-C or SIGTERM the commands under way save their states; the same call goes on from there.

    python tests/study.py --seeds 5 --seed 3 --noise-seeds 3 --out out/study --figure       # pip install matplotlib
"""

import importlib.util
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluate import aligned, summarise
from model import TOY_TEMPERATURE, UserError, flag, parse_settings, read_log, run_command, write_file
from reward import wins

# Row: the commands that make its policy, which the last of them saves. Equal budgets: DPO takes 64 steps of 64 pairs,
# over all rounds of a method with rounds, and PPO 32 of 128 prompts, unless the name says otherwise.
WORLD, REWARD, SPLIT = "model.py --save sft.pt", "reward.py", "split.py"
DPO, PPO = "dpo.py --steps 64", "ppo.py --steps 32"
DPO_ALL, DPO_HARD = f"{DPO} --data pairs.pt --save dpo_all.pt", f"{DPO} --data hard.pt --save dpo_hard.pt"
PPO_ALL = f"{PPO} --init sft.pt --data pairs.pt"


def own(policy: str, easy: str, flags: str = "--data pairs.pt") -> str:
    """The command that makes the pairs file `easy` of a policy's own answers."""
    return f"split.py --fraction 1 --policy {policy}.pt --easy {easy}.pt --hard {easy}_rest.pt {flags}"


OWN, ALL_LABELLED = own("sft", "own"), "--data pairs.pt --chosen labelled --answers 1"
DEMOS = own("sft", "demos", ALL_LABELLED)


def self_play(name: str, loss: str) -> list[str]:
    """Two rounds of labelled responses against the policy's own."""
    half, more = f"dpo.py --steps 32 --loss {loss}", own(f"{name}_1", f"demos_{name}", ALL_LABELLED)
    return [REWARD, DEMOS, f"{half} --data demos.pt --save {name}_1.pt", more,
            f"{half} --data demos_{name}.pt --init {name}_1.pt --save {name}.pt"]


def rewarded(name: str, data: str, *before: str) -> list[str]:
    """PPO from SFT by a reward model that is trained on pairs of its own, made by the commands `before`."""
    return [REWARD, *before, f"reward.py --data {data} --save reward_{name}.pt",
            f"{PPO_ALL} --reward reward_{name}.pt --save ppo_{name}.pt"]


STUDY = {
    "SFT": [],
    "DPO on all": [DPO_ALL],
    "DPO on easy": [REWARD, SPLIT, DPO],
    "DPO on hard": [REWARD, SPLIT, DPO_HARD],
    "DPO on all, 256 steps": ["dpo.py --steps 256 --data pairs.pt --save dpo_all_256.pt"],
    "DPO on easy, 256 steps": [REWARD, SPLIT, "dpo.py --steps 256 --save dpo_256.pt"],
    "PPO from SFT, all": [REWARD, f"{PPO_ALL} --save ppo_all.pt"],
    "PPO from SFT, hard": [REWARD, SPLIT, f"{PPO} --init sft.pt --save ppo_hard.pt"],
    "PPO from DPO on all": [DPO_ALL, REWARD, f"{PPO} --init dpo_all.pt --data pairs.pt --save ppo_dpo_all.pt"],
    "MPO": [REWARD, SPLIT, DPO, PPO],
    "MPO, random split": [REWARD, "split.py --by random --easy easy_random.pt --hard hard_random.pt",
                          f"{DPO} --data easy_random.pt --save dpo_random.pt",
                          f"{PPO} --init dpo_random.pt --data hard_random.pt --save ppo_random.pt"],
    "MPO, parts swapped": [REWARD, SPLIT, DPO_HARD, f"{PPO} --init dpo_hard.pt --data easy.pt --save ppo_swapped.pt"],
    "MPO, reference SFT": [REWARD, SPLIT, DPO, f"{PPO} --reference sft.pt --save ppo_reference_sft.pt"],
    "PPO from SFT, KL price 0.05": [REWARD, SPLIT, f"{PPO} --init sft.pt --kl-coefficient 0.05 --save ppo_cheap2.pt"],
    "MPO, KL price 0.05": [REWARD, SPLIT, DPO, f"{PPO} --kl-coefficient 0.05 --save ppo_cheap.pt"],
    # The related systems.
    "expert iteration": [REWARD, OWN, "model.py --steps 64 --batch-size 64 --init sft.pt --data own.pt --save ei.pt"],
    "DPO on own answers": [REWARD, OWN, f"{DPO} --data own.pt --save dpo_own.pt"],
    "DPO on own answers, 2 rounds": [
        REWARD, OWN, "dpo.py --steps 32 --data own.pt --save dpo_own_1.pt", own("dpo_own_1", "own_2"),
        "dpo.py --steps 32 --init dpo_own_1.pt --reference sft.pt --data own_2.pt --save dpo_own_2.pt"],
    "SAIL-DP": [f"{DPO} --data pairs.pt --self-weight 0.3 --save sail.pt"],
    "IRFT, 2 rounds": self_play("irft", "linear"),
    "SPIN, 2 rounds": self_play("spin", "sigmoid"),
    "RFT": rewarded("rft", "demos.pt", DEMOS),
    "AIHF": rewarded("aihf", "pairs.pt+demos.pt", DEMOS),
    "RLP": rewarded("rlp", "pairs.pt+own_ppo.pt", f"{PPO_ALL} --save ppo_all.pt", own("ppo_all", "own_ppo")),
    "RLP, labels by gold": rewarded("rlp_gold", "pairs.pt+own_gold.pt", f"{PPO_ALL} --save ppo_all.pt",
                                    own("ppo_all", "own_gold", "--data pairs.pt --chosen gold")),
    "PM-RLHF": [REWARD, f"{PPO_ALL} --matching 0.1 --save ppo_matching.pt"],
    "MPO, DPO on own answers as PPO": [REWARD, SPLIT, DPO, own("dpo", "own_hard", "--data hard.pt"),
                                       f"{DPO} --init dpo.pt --data own_hard.pt --save mpo_own.pt"],
}
for part in (25, 50, 100):  # ExPO: α in hundredths
    for row, name in (("DPO on all", "dpo_all"), ("MPO", "ppo")):
        onward = f"model.py --init {name}.pt --extrapolate sft.pt --alpha {part / 100} --save expo_{name}_{part}.pt"
        STUDY[f"ExPO on {row}, α {part / 100}"] = [*STUDY[row], onward]
PPO_ROWS = ["PPO from SFT, hard", "MPO, reference SFT", "MPO", "PPO from SFT, KL price 0.05", "MPO, KL price 0.05"]
NOISE = [0.0, 1.0, 1.5, 2.0, 3.0]  # label temperatures
NOISE_ROWS = ["SFT", "DPO on all", "DPO on easy", "PPO from SFT, all", "MPO", "MPO, random split"]
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
    """Flags of the study. Raises UserError for values that make none."""

    out: str = flag("out/study", "folder for the seeds' folders, study.json and figures")
    seeds: int = flag(5, "how many seeds")
    seed: int = flag(3, "the first one; settings were chosen on seeds 0 to 2")
    noise_seeds: int = flag(3, "seeds for each label temperature; 0: none")
    parallel: int | None = flag(None, "seeds side by side [one a core, or one on a GPU]")
    figure: bool = flag(False, "draw rewards.png, ppo.png and noise.png too (needs matplotlib)")

    def __post_init__(self):
        if self.seeds < 2 or self.noise_seeds < 0 or self.noise_seeds == 1 or (self.parallel or 1) < 1:
            raise UserError("--seeds and --noise-seeds: at least 2, for a standard error; --parallel: at least 1")
        if self.figure and importlib.util.find_spec("matplotlib") is None:
            raise UserError("--figure: this needs one more package: pip install matplotlib")


def saved_as(commands: list[str]) -> str:
    """The name, without .pt, that the last of these commands, or else WORLD, saves its checkpoint, log and state by."""
    last = [WORLD, *commands][-1]
    return (re.search(r"--(?:save|easy) (\w+)", last) or re.match(r"(\w+)", last))[1]


class Run:
    """One folder, in which commands run one after the other and make the policies of `rows`. record is its
    commands.json: command → "seconds", those of stopped attempts included, and "done", whether it has finished."""

    def __init__(self, folder: Path, seed: int, rows: list[str], world: str = WORLD):
        self.folder, self.seed, self.rows = folder, seed, rows
        training = [command for row in rows for command in STUDY[row]]
        policies = " ".join(f"{saved_as(STUDY[row])}.pt" for row in rows)
        evaluation = f"evaluate.py --policies {policies} --samples 0 --save study_evaluation.json"
        self.commands = list(dict.fromkeys([world, *training, evaluation]))  # what several rows need is there once
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
    evaluation = json.loads((run.folder / "study_evaluation.json").read_text("utf-8"))
    steps = [step for command in STUDY[row] for step in read_log(run.folder / f"{saved_as([command])}.jsonl")]
    tokens = sum(step["generated"] if "generated" in step else step["tokens_per_second"] * step["seconds"]
                 for step in steps if "updates" in step)  # split.py's and PPO's steps
    last = read_log(run.folder / f"{saved_as(STUDY[row])}.jsonl")[-4:]
    entropies = [step["entropy"] for step in last if "entropy" in step] or [math.nan]
    took = {"updates": sum(step.get("updates", 1) for step in steps), "tokens": tokens,
            "seconds": sum(run.record[command]["seconds"] for command in STUDY[row]),
            "entropy": sum(entropies) / len(entropies)}
    return evaluation[saved_as(STUDY[row])] | took


def read_numbers(runs: list[Run]) -> Numbers:
    """The numbers of all rows of these runs, which have the same rows."""
    numbers = {}
    for row in runs[0].rows:
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


def lead_table(golds: dict[str, torch.Tensor]) -> str:
    """How far MPO is above each other row, [seeds] gold rewards each, paired by seed: mean ± standard error (95%
    interval), and the share of seeds that it won (Wilson's interval), a tie counting one half."""
    rows = [["MPO against", "lead", "seeds won"]]
    for row, theirs in golds.items():
        if row != "MPO":
            numbers = summarise({"lead": golds["MPO"] - theirs, "won": wins(golds["MPO"], theirs)}).values()
            rows.append([row, LEAD.format(*numbers), WON.format(*numbers)])
    return aligned(rows)


def noise_table(noise: dict[float, Numbers]) -> str:
    """Gold reward by policy and label temperature; last, what the highest temperature costs, paired by seed."""
    names = [f"{temperature:g}" for temperature in noise]
    rows = [["label temperature", *names, f"{names[0]} less {names[-1]}"]]
    for row in NOISE_ROWS:
        golds = [numbers[row]["gold_reward"] for numbers in noise.values()]  # of each temperature: [seeds]
        rows.append([row, *(SPREAD.format(*mean_and_error(gold)) for gold in (*golds, golds[0] - golds[-1]))])
    return aligned(rows)


def ppo_curves(runs: list[Run], row: str) -> dict[str, torch.Tensor]:
    """Gold and model reward of the answers that PPO trains on, means over any 4 successive steps: [runs, steps − 3]."""
    curves = {"gold": [], "reward model": []}
    for run in runs:
        log = read_log(run.folder / f"{saved_as(STUDY[row])}.jsonl")
        curves["gold"].append([step["gold_reward"] for step in log])
        curves["reward model"].append([step["score"] for step in log])
    return {name: torch.tensor(values).double().unfold(1, 4, 1).mean(2) for name, values in curves.items()}


def ppo_table(curves: Numbers) -> str:
    """Those rewards on the way; the last one's standard deviation over runs; and how far it is below the best of its
    own run. curves: row → what ppo_curves gives."""
    places = torch.linspace(0, curves["MPO"]["gold"].shape[1] - 1, 5).round().long().tolist()
    rows = [["", *(f"steps {place + 1}–{place + 4}" for place in places), "deviation", "fall from best"]]
    for row, known in curves.items():
        for name, values in known.items():
            cells = [SPREAD.format(*mean_and_error(values[:, place])) for place in places]
            cells += [f"{values[:, -1].std():.2f}", f"{(values.max(1).values - values[:, -1]).mean():.2f}"]
            rows.append([f"{row}: gold" if name == "gold" else f"  {name}", *cells])
    return aligned(rows)


def draw_figures(folder: Path, numbers: Numbers, curves: Numbers, noise: dict[float, Numbers]) -> None:
    """rewards.png: rewards against KL from SFT, a point a policy. ppo.png: rewards while PPO trains, a thin line a run,
    a thick one for their mean. noise.png: gold reward against label temperature."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    colours = defaultdict(lambda: "#cc79a7", SFT="#7f7f7f", DPO="#0072b2", PPO="#d55e00", MPO="#009e73")
    for axis, key, title in zip(axes, ("gold_reward", "reward"), ("gold reward", "reward model's reward"), strict=True):
        for (row, values), marker in zip(numbers.items(), itertools.cycle("osD^vPX*"), strict=False):
            (kl, kl_error), (reward, error) = mean_and_error(values["kl"]), mean_and_error(values[key])
            axis.errorbar(kl, reward, error, kl_error, marker, color=colours[row[:3]], label=row, capsize=2)
        axis.set_xscale("function", functions=(lambda kl: kl.clip(0) ** 0.5, lambda root: root**2))
        axis.set(xlabel="KL from SFT, nats an answer (root scale)", ylabel=title, xlim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(folder / "rewards.png")
    figure, axes = pyplot.subplots(1, len(curves), sharey=True, squeeze=False, layout="constrained", figsize=(15, 3))
    for axis, (row, known) in zip(axes[0], curves.items(), strict=True):
        for (name, values), colour in zip(known.items(), ("#0072b2", "#d55e00"), strict=True):
            steps = range(4, 4 + values.shape[1])
            axis.plot(steps, values.T, color=colour, linewidth=0.7, alpha=0.5)
            axis.plot(steps, values.mean(0), color=colour, linewidth=2)
            axis.text(steps[-1], values[:, -1].mean() + 0.05, name, color=colour, ha="right")
        axis.set(xlabel="PPO step", ylabel="reward, means of 4 steps", title=row)
    figure.savefig(folder / "ppo.png")
    if noise:
        figure, axis = pyplot.subplots(layout="constrained")
        for row in NOISE_ROWS:
            points = torch.tensor([mean_and_error(one[row]["gold_reward"]) for one in noise.values()])  # [n, 2]
            axis.errorbar(list(noise), *points.T, marker="o", capsize=3, label=row)
        axis.set(xlabel="label temperature", xticks=list(noise), ylabel="gold reward, mean ± standard error")
        axis.legend()
        figure.savefig(folder / "noise.png")


def main() -> None:
    """Runs what the study lacks, prints its tables, and writes study.json and the figures."""
    # 1. A folder for each seed, and one for each other label temperature and seed.
    settings = parse_settings(Settings, __doc__)
    folder, seeds, noisy = Path(settings.out).resolve(), range(settings.seed, settings.seed + settings.seeds), {}
    runs = [Run(folder / f"seed{seed}", seed, list(STUDY)) for seed in seeds]
    for temperature in NOISE if settings.noise_seeds else []:
        noisy[temperature] = runs[: settings.noise_seeds]
        if temperature != TOY_TEMPERATURE:
            at, world = folder / f"temperature{temperature}", f"{WORLD} --label-temperature {temperature}"
            noisy[temperature] = [Run(at / run.folder.name, run.seed, NOISE_ROWS, world) for run in noisy[temperature]]

    # 2. Run what is not done, folders side by side. When a command fails, or on Ctrl-C, the others save and end too.
    everything = list(dict.fromkeys(sum(noisy.values(), runs)))
    parallel = min(settings.parallel or (1 if torch.cuda.is_available() else CORES), len(everything))
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: what a shell starts in the background ignores it
        signal.signal(number, signal.default_int_handler)
    stop, bar = threading.Event(), tqdm(total=sum(len(run.commands) for run in everything), unit="command")
    with bar, ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(run_folder, run, max(1, CORES // parallel), stop, bar) for run in everything]
        try:
            for future in as_completed(futures):
                future.result()  # raises what run_folder raised
        finally:
            stop.set()

    # 3. Tables and figures: every policy, and what MPO is ahead of each by; the course of PPO; label temperatures.
    numbers, curves = read_numbers(runs), {row: ppo_curves(runs, row) for row in PPO_ROWS}
    noise = {temperature: read_numbers(group) for temperature, group in noisy.items()}
    golds = {row: values["gold_reward"] for row, values in numbers.items()}
    print(f"toy world, mean ± standard error over {settings.seeds} seeds. What a policy takes beyond SFT, its reward "
          "model included:\noptimiser updates, tokens that PPO generated, seconds with other commands beside it\n\n"
          f"{study_table(numbers)}\n\npaired by seed, gold reward\n{lead_table(golds)}\n\n"
          "reward of the answers that PPO trains on, 128 a step: mean ± standard error over seeds\n"
          f"{ppo_table(curves)}")
    if noise:
        print("\ngold reward by label temperature (at 0 no label is wrong), mean ± standard error "
              f"over {len(noisy[NOISE[0]])} seeds\n{noise_table(noise)}")
    content = {"seeds": list(seeds), "methods": numbers, "label_temperatures": noise}
    write_file(folder / "study.json", json.dumps(content, indent=1, default=torch.Tensor.tolist) + "\n")
    if settings.figure:
        draw_figures(folder, numbers, curves, noise)


if __name__ == "__main__":
    run_command(main)
