"""Mixed Preference Optimization, chapter 3: splitting the pairs into easy and hard.

The reward model scores both responses of every training pair. A pair is easy where the gap r_chosen − r_rejected is
at least γ, and hard otherwise, so that a pair which the model ranks against its label is hard (Gou and Nguyen 2024,
arXiv 2403.19443):

    easy = {pairs with r_chosen − r_rejected ≥ γ},   hard = the others.

Wrong labels gather in hard, whose labels the last stage does not use: PPO takes its prompts alone.

With --policy, pairs are made first: the best of that policy's own answers to each prompt is chosen, the worst rejected.

    python split.py                      # γ such that half the pairs are easy
    python split.py --threshold 1.0      # γ itself
    python split.py --by random          # the control: two random parts of the same sizes
    python split.py --policy sft.pt --fraction 1 --easy own.pt --hard none.pt    # own answers, not split
"""

import contextlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from model import (
    GPT, CommonSettings, DroppedRow, Pairs, UserError, choose_device, finish, flag, generate, gold_reward, load_model,
    load_pairs, mixed_seed, parse_settings, require_new, require_parts, run_command, settle, write_file,
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
    policy: str | None = flag(None, "policy whose own answers take the place of the responses [none]")
    answers: int = flag(4, "own answers to each prompt", least=1)
    chosen: Literal["best", "gold", "labelled"] = flag("best", "best own, by reward or gold, or data's; over worst own")
    temperature: float = flag(1.0, "of sampling own answers", above=0)
    max_new_tokens: int = flag(96, "longest own answer", least=1, pretrained=256)

    def __post_init__(self):
        super().__post_init__()
        for name in ("answers", "chosen", "temperature", "max_new_tokens"):
            if self.policy is None and getattr(self, name) != getattr(Settings, name):
                raise UserError(f"--{name.replace('_', '-')} is about own answers; leave it out, or name a --policy")
        if self.policy and self.answers == 1 and self.chosen != "labelled":
            raise UserError(f"--answers 1 --chosen {self.chosen}: a best and a worst need 2; or take --chosen labelled")


def reward_gaps(rewards: Tensor, kind: str) -> Tensor:
    """r_chosen − r_rejected, or its absolute value, of rewards [n, 2]: [n]."""
    gaps = rewards[:, 0] - rewards[:, 1]
    return gaps.abs() if kind == "absolute" else gaps


def easy_mask(gaps: Tensor, fraction: float, threshold: float | None) -> tuple[Tensor, float]:
    """Which gaps [n] are easy, and γ: easy is ≥ γ, the threshold, or what makes a `fraction` easy (ties: more)."""
    if threshold is None:
        count = round(fraction * len(gaps))
        threshold = gaps.sort(descending=True).values[count - 1].item() if count else float("inf")
    return gaps >= threshold, threshold


def answer_prompts(settings: Settings, pairs: Pairs, policy: GPT) -> list[tuple[Tensor, ...]]:
    """For each pair a document of 1 + K branches: its prompt, its chosen response, and the policy's K answers."""
    prompts = [prompt for prompt, _, _ in pairs]
    branches, end = [[chosen for _, chosen, _ in pairs]], pairs.tokenizer.end  # lists of n responses
    for number in tqdm(range(settings.answers), desc="answering", leave=False):
        seed = mixed_seed(settings.seed, 600_000 + number)  # far from the numbers of training steps and of evaluate.py
        branches.append(generate(policy, prompts, end, settings.max_new_tokens, settings.temperature, seed))
    return list(zip(prompts, *branches, strict=True))


def own_answers(settings: Settings, pairs: Pairs, policy: GPT, model: RewardModel, device: torch.device) -> Pairs:
    """Scored pairs of a policy's own answers, whose costs go to OUT/<easy>.jsonl. UserError if no prompt's answers make
    a pair by the rules for all pairs. Expert iteration (Havrilla et al. 2024, arXiv 2403.04642) trains on the best; RLP
    (Lang et al. 2024, arXiv 2403.19279, equation 1, λ = 0) adds the pairs to the reward model's."""
    documents = answer_prompts(settings, pairs, policy)
    decode, end = pairs.tokenizer.decode, pairs.tokenizer.end
    parts, known = [], []  # of each pair: prompt, chosen and rejected; [rewards of both sides, gold rewards of both]
    ordered = []  # rewards of any two answers that ended, of the one better by gold first
    generated, finished = 0, 0  # tokens; answers that ended
    for (prompt, *branches), rewards in zip(documents, score_pairs(model, documents, device).tolist(), strict=True):
        asked, *texts = (decode(part) for part in (prompt, *branches))
        golds = [0.0 if pairs.gold is None else gold_reward(asked, text) for text in texts]
        # Branch 0 is the data's response. If all that ended have one value, best and worst are the same: no pair.
        ended = [branch for branch in range(1, len(branches)) if branches[branch][-1] == end]
        values = golds if settings.chosen == "gold" else rewards
        best = 0 if settings.chosen == "labelled" else max(ended, key=values.__getitem__, default=0)
        worst = min(ended, key=values.__getitem__, default=0)
        with contextlib.suppress(DroppedRow):
            require_parts(asked.strip(), texts[best].strip(), texts[worst].strip())
            parts += prompt, branches[best], branches[worst]
            known.append([[rewards[best], rewards[worst]], [golds[best], golds[worst]]])
        ordered += [[rewards[a], rewards[b]] for a, b in itertools.permutations(ended, 2) if golds[a] > golds[b]]
        generated += sum(map(len, branches[1:]))
        finished += len(ended)

    log = {"step": 0, "updates": 0, "generated": generated, "ended": finished / (len(documents) * settings.answers)}
    if ordered:
        log["agreement"] = agreement = ranking_accuracy(torch.tensor(ordered))
        print(f"the reward model orders {agreement:.1%} of {len(ordered)} pairs of answers as gold does")
    print(f"own answers: {generated} tokens, {log['ended']:.1%} ended; {len(pairs) - len(known)} prompts make no pair")
    if not known:
        raise UserError(f"--policy {settings.policy}: no prompt's answers make a pair (see above how many ended)")
    write_file(Path(settings.out) / Path(settings.easy).with_suffix(".jsonl"), json.dumps(log) + "\n")
    lengths = torch.tensor([len(part) for part in parts]).view(-1, 3)
    rewards, gold = torch.tensor(known).unbind(1)  # (pairs, 2) each
    gold = None if pairs.gold is None else gold
    return Pairs(torch.cat(parts).int(), lengths, pairs.tokenizer, rewards, gold, pairs.form)


def histogram(gaps: Tensor, wrong: Tensor | None, threshold: float) -> str:
    """The gaps [n] as a text histogram, with the share of wrong labels in each bin where it is known; γ is marked."""
    low, high = gaps.min().item(), gaps.max().item()
    width = (high - low) / 16 or 1.0
    bins = ((gaps - low) / width).long().clamp(0, 15)
    marked = min(15, int((threshold - low) / width)) if low <= threshold <= high else None
    counts = bins.bincount(minlength=16)
    lines = []
    for index, count in enumerate(counts.tolist()):
        start = low + index * width
        bar = "█" * round(40 * count / counts.max().item()) + (" ← γ" if index == marked else "")
        share = "" if wrong is None or not count else f"{wrong[bins == index].double().mean():5.0%} wrong"
        lines.append(f"  {start:+6.2f} to {start + width:+6.2f} {count:6d} {share:11s} {bar}")
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
    """Scores the pairs, or a policy's own answers to their prompts, splits them, and reports on both parts."""
    # 1. Settings, pairs, reward model.
    settings = parse_settings(Settings, __doc__)
    device = choose_device(settings)
    pairs = load_pairs(settings, settings.data)
    model, _ = load_model(settings, settings.init, RewardModel)
    if settings.chosen == "gold" and pairs.gold is None:
        raise UserError(f"--chosen gold: {settings.data} has no gold rewards; only the toy world knows them")
    policy = load_model(settings, settings.policy, GPT)[0] if settings.policy else None
    require_new(settings, "easy", "hard")

    # 2. Score, and split by the gap.
    if policy:
        settle(settings, policy.config.pretrained)
        pairs = own_answers(settings, pairs, policy, model, device)
    else:
        pairs.rewards = score_pairs(model, pairs, device)
    gaps = reward_gaps(pairs.rewards, settings.gap)
    easy, threshold = easy_mask(gaps, settings.fraction, settings.threshold)
    if settings.by == "random":
        generator = torch.Generator().manual_seed(mixed_seed(settings.seed, 0))
        easy, threshold = easy[torch.randperm(len(pairs), generator=generator)], float("nan")
    parts = {"easy": pairs.select(easy.nonzero()[:, 0]), "hard": pairs.select((~easy).nonzero()[:, 0])}

    # 3. Write and report.
    for name, part in parts.items():
        part.save(settings, getattr(settings, name))
    wrong = None if pairs.gold is None else pairs.gold[:, 0] < pairs.gold[:, 1]
    cut = "split at random" if settings.by == "random" else f"γ = {threshold:.3f}"
    print(f"reward gaps of {len(pairs)} pairs, {cut}:\n{histogram(gaps, wrong, threshold)}")
    print(*(describe(name, part) for name, part in parts.items()), sep="\n")
    finish(settings, ["easy", "hard"], "python dpo.py", "--data {} --save DPO_NAME.pt")


if __name__ == "__main__":
    run_command(main)
