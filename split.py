"""Mixed Preference Optimization, chapter 3: splitting the pairs into easy and hard.

The reward model scores both responses of every training pair. A pair is easy where the gap r_chosen − r_rejected is
at least γ, and hard otherwise, so that a pair which the model ranks against its label is hard (Gou and Nguyen 2024,
arXiv 2403.19443):

    easy = {pairs with r_chosen − r_rejected ≥ γ},   hard = the others.

Wrong labels gather in hard, whose labels the last stage does not use: PPO takes its prompts alone.

    python split.py                      # γ such that half the pairs are easy
    python split.py --threshold 1.0      # γ itself
    python split.py --by random          # the control: two random parts of the same sizes
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model import (
    CommonSettings, Pairs, UserError, choose_device, finish, flag, load_model, load_pairs, mixed_seed, parse_settings,
    run_command,
)
from reward import RewardModel, ranking_accuracy, score_pairs


@dataclass
class Settings(CommonSettings):
    """Flags of this stage."""

    data: str = flag("pairs.pt", "pairs to split")
    init: str = flag("reward.pt", "reward model to score them with")
    by: Literal["reward", "random"] = flag("reward", "random: the control, two parts of the same sizes")
    gap: Literal["signed", "absolute"] = flag("signed", "absolute: a pair ranked far against its label counts as easy")
    fraction: float = flag(0.5, "share of the pairs that is easy, unless --threshold is given", least=0, most=1)
    threshold: float | None = flag(None, "the γ from which a gap counts as easy")
    easy: str = flag("easy.pt", "file for the easy pairs")
    hard: str = flag("hard.pt", "file for the hard pairs")

    def __post_init__(self):
        super().__post_init__()
        if self.easy == self.hard or "/" in self.easy + self.hard:
            raise UserError(f"--easy {self.easy} --hard {self.hard}: two names are needed; their folder is --out")


def reward_gaps(rewards: Tensor, kind: str) -> Tensor:
    """r_chosen − r_rejected, or its absolute value, of rewards [n, 2]: [n]."""
    gaps = rewards[:, 0] - rewards[:, 1]
    return gaps.abs() if kind == "absolute" else gaps


def easy_mask(gaps: Tensor, fraction: float, threshold: float | None) -> tuple[Tensor, float]:
    """(which pairs are easy [n], γ): the gap is at least γ, which `threshold` gives, or else the share
    `fraction` (more, where gaps tie)."""
    if threshold is None:
        count = round(fraction * len(gaps))
        threshold = gaps.sort(descending=True).values[count - 1].item() if count else float("inf")
    return gaps >= threshold, threshold


def histogram(gaps: Tensor, wrong: Tensor | None, threshold: float) -> str:
    """A text histogram of the gaps [n]; where labels can be checked, the share of wrong ones per bin. The bin in
    which γ lies is marked."""
    low, high = gaps.min().item(), gaps.max().item()
    width = (high - low) / 16 or 1.0
    bins = ((gaps - low) / width).long().clamp(0, 15)
    marked = min(15, int((threshold - low) / width)) if low <= threshold <= high else None
    counts = bins.bincount(minlength=16)
    lines = []
    for index, count in enumerate(counts.tolist()):
        start = low + index * width
        bar = "█" * round(40 * count / counts.max().item())
        share = "" if wrong is None or not count else f"{wrong[bins == index].double().mean():5.0%} wrong"
        mark = " ← γ" if index == marked else ""
        lines.append(f"  {start:+6.2f} to {start + width:+6.2f} {count:6d} {share:11s} {bar}{mark}")
    return "\n".join(lines)


def describe(name: str, part: Pairs) -> str:
    """One line on a part: its size, how often the reward model agrees with its labels, and how many are wrong."""
    line = f"{name}: {len(part)} pairs"
    if len(part):
        line += f", the reward model agrees with {ranking_accuracy(part.rewards):.1%} of the labels"
        if part.gold is not None:
            line += f", {(part.gold[:, 0] < part.gold[:, 1]).double().mean():.1%} of the labels are wrong"
    return line


def main() -> None:
    """Scores the pairs, splits them, and reports on both parts."""
    # 1. Settings, pairs, reward model.
    settings = parse_settings(Settings, __doc__)
    device = choose_device(settings)
    pairs = load_pairs(settings, settings.data)
    model, _ = load_model(settings, settings.init, RewardModel)

    # 2. Score, and split by the gap.
    pairs.rewards = score_pairs(model, pairs, device)
    gaps = reward_gaps(pairs.rewards, settings.gap)
    easy, threshold = easy_mask(gaps, settings.fraction, settings.threshold)
    if settings.by == "random":
        generator = torch.Generator().manual_seed(mixed_seed(settings.seed, 0))
        easy = easy[torch.randperm(len(pairs), generator=generator)]
    parts = {"easy": pairs.select(easy.nonzero()[:, 0]), "hard": pairs.select((~easy).nonzero()[:, 0])}

    # 3. Write and report.
    for name, part in parts.items():
        part.save(settings, getattr(settings, name))
    wrong = None if pairs.gold is None else pairs.gold[:, 0] < pairs.gold[:, 1]
    print(f"reward gaps of {len(pairs)} pairs, γ = {threshold:.3f}:\n{histogram(gaps, wrong, threshold)}")
    for name, part in parts.items():
        print(describe(name, part))
    finish(settings, ["easy", "hard"], "python dpo.py", "--data {} --save NAME.pt")


if __name__ == "__main__":
    run_command(main)
