"""Mixed Preference Optimization, chapter 6: what came of it.

Every policy answers the held-back prompts once, with the same seed. The table gives, for each,

    gold        the toy world's gold reward, where there is one     reward      the reward model's
    win rates   against the test set's chosen responses and against SFT's answers, by gold reward (without one:
                by the reward model's); a tie counts one half
    KL          from SFT: mean over answers of Σ log π(token) − log π_SFT(token), in nats an answer
    length      in tokens, with the end-of-text token
    ended       share of answers that ended by themselves

as mean ± standard error, win rates with their 95% interval. Then some prompts with the answers side by side. All
numbers also go to evaluation.json.

    python evaluate.py                                                  # sft.pt, dpo.pt, ppo.pt
    python evaluate.py --policies sft.pt dpo_all.pt ppo_all.pt ppo.pt   # with baselines
    python evaluate.py --prompt "How do I clean my old lamp?"           # every policy's answer to this
    python evaluate.py --prompt --model dpo.pt                          # talk to one policy, till Ctrl-D
"""

import dataclasses
import itertools
import json
import math
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from model import (
    GPT,
    TOY_BEST_REWARD,
    TURN,
    ByModel,
    CommonSettings,
    Count,
    MaybeText,
    Number,
    Pairs,
    Tokenizer,
    UserError,
    Whole,
    choose_device,
    generate,
    gold_reward,
    load_model,
    load_pairs,
    mixed_seed,
    pack,
    parse_settings,
    run_command,
    settle,
    summed,
    write_text,
)
from reward import RewardModel, score_pairs, wilson_interval

TITLES = {"sft": "SFT", "dpo": "DPO", "ppo": "MPO"}  # what the default checkpoints are called in the table


@dataclass
class Settings(CommonSettings):
    """Flags of this stage."""

    data: str = "test.pt"  # pairs whose prompts are answered
    policies: list[str] = dataclasses.field(default_factory=lambda: ["sft.pt", "dpo.pt", "ppo.pt"])  # checkpoints
    sft: str = "sft.pt"  # policy from which KL is measured and against which wins are counted
    reward: str = "reward.pt"  # reward model
    save: str = "evaluation.json"  # file for the numbers
    prompts: Count = 512  # distinct prompts answered, at most
    samples: Whole = 4  # prompts shown with all answers
    temperature: Number = 1.0  # of sampling
    max_new_tokens: Count = ByModel(scratch=96, pretrained=256)  # longest answer
    prompt: MaybeText | None = None  # only answer this; without a text, answer what is typed until end of input
    model: str = "ppo.pt"  # policy that answers what is typed


@dataclass
class Answers:
    """One policy's answers to n prompts, and per answer: gold and reward ([n]; gold None without a toy world), KL
    term, length, and whether it ended."""

    texts: list[str]
    gold: Tensor | None
    reward: Tensor
    kl: Tensor
    length: Tensor
    ended: Tensor

    @property
    def judged(self) -> Tensor:
        """What decides a win: gold reward where there is one, else the reward model's."""
        return self.reward if self.gold is None else self.gold


@torch.no_grad()
def answer(
    settings: Settings, prompts: list[Tensor], tokenizer: Tokenizer, source: str, policy: GPT, sft: GPT,
    reward: RewardModel,
) -> Answers:  # fmt: skip
    """Lets `policy` answer the prompts, and measures the answers."""
    device = policy.embedding.weight.device
    seed = mixed_seed(settings.seed, 500_000)  # far from the steps' numbers, so that no noise of training returns
    responses = generate(policy, prompts, tokenizer.end, settings.max_new_tokens, settings.temperature, seed)
    kl, rewards = torch.zeros(len(prompts)), torch.zeros(len(prompts))
    for batch in pack(list(zip(prompts, responses, strict=True)), device):
        # At temperature 1, whatever the answers were sampled at: the distributions that the models define.
        log_ratio = policy.logprobs(batch)[0] - sft.logprobs(batch)[0]
        kl[batch.members.cpu()] = torch.zeros(len(batch.last)).index_add(0, batch.sequence.cpu(), log_ratio.cpu())
        rewards[batch.members.cpu()] = reward.score(batch).cpu()
    kl, rewards = summed(kl), summed(rewards)
    texts = [tokenizer.decode(response.tolist()) for response in responses]
    gold = None
    if source == "toy":
        questions = [tokenizer.decode(prompt.tolist()) for prompt in prompts]
        gold = torch.tensor([gold_reward(*pair) for pair in zip(questions, texts, strict=True)])
    length = torch.tensor([len(response) for response in responses]).float()
    ended = torch.tensor([float(response[-1] == tokenizer.end) for response in responses])
    return Answers(texts, gold, rewards, kl, length, ended)


def wins(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 for each win, 0.5 for each tie, 0 for each loss. [n], [n] → [n]."""
    return (ours > theirs).float() + 0.5 * (ours == theirs).float()


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of values [n] and its standard error, s / √n."""
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(0.0)
    return values.mean().item(), error.item()


def summarise(answers: Answers, sft: Answers, chosen: Tensor) -> dict[str, float | None]:
    """The numbers of evaluation.json for one policy; `chosen`: what judges the test set's chosen responses, [n]."""
    columns = {
        "gold_reward": answers.gold,
        "reward": answers.reward,
        "win_rate_vs_chosen": wins(answers.judged, chosen),
        "win_rate_vs_sft": wins(answers.judged, sft.judged),
        "kl": answers.kl,
        "length": answers.length,
        "ended": answers.ended,
    }
    summary = {}
    for name, values in columns.items():
        summary[name], summary[f"{name}_se"] = (None, None) if values is None else mean_and_error(values)
    return summary


def table(summaries: dict[str, dict[str, float | None]], count: int) -> str:
    """The summaries, each of `count` answers, as a table with a row per policy."""
    header = f"{'policy':12s} {'gold reward':>14s} {'reward':>14s} {'win vs chosen':>17s} {'win vs SFT':>17s}"
    lines = [f"{header} {'KL from SFT':>14s} {'length':>13s} {'ended':>6s}"]
    for name, row in summaries.items():
        cells = [f"{TITLES.get(name, name):12s}"]
        for key, places, width in (("gold_reward", 2, 14), ("reward", 2, 14), ("win_rate_vs_chosen", 0, 17),
                                   ("win_rate_vs_sft", 0, 17), ("kl", 1, 14), ("length", 1, 13)):  # fmt: skip
            mean, error = row[key], row[f"{key}_se"]
            if mean is None:
                cell = "–"
            elif key.startswith("win"):
                low, high = wilson_interval(mean, count)
                cell = f"{mean:.0%} ({low:.0%} to {high:.0%})"
            else:
                cell = f"{mean:.{places}f} ± {error:.{places}f}"
            cells.append(f"{cell:>{width}s}")
        lines.append(" ".join([*cells, f"{row['ended']:6.1%}"]))
    return "\n".join(lines)


def side_by_side(pairs: Pairs, answers: dict[str, Answers], count: int) -> str:
    """The first prompts with every policy's answer, and its gold reward or reward in brackets."""
    lines = []
    for index in range(min(count, len(pairs))):
        lines.append(pairs.tokenizer.decode(pairs[index][0].tolist()).strip())
        for name, given in answers.items():
            title = f"  {TITLES.get(name, name)} [{given.judged[index]:+.2f}]"
            lines.append(textwrap.fill(given.texts[index].strip() or "(nothing)", 118, initial_indent=f"{title:16s} ",
                                       subsequent_indent=" " * 17))  # fmt: skip
        lines.append("")
    return "\n".join(lines)


def as_prompt(text: str, tokenizer: Tokenizer) -> Tensor:
    """Token ids of a question as the first turn of a dialogue, as in HH and the toy world; a text that already ends
    like a prompt of the data is one."""
    if not text.endswith((TURN, "TL;DR:")):
        text = f"\n\nHuman: {text}{TURN}"
    return torch.tensor(tokenizer.begin + tokenizer.encode(text))


def answer_prompt(settings: Settings, text: str) -> None:
    """Prints every policy's answer to `text`."""
    for name in settings.policies:
        policy, tokenizer = load_model(settings, name, GPT)
        settle(settings, policy.config.pretrained)
        prompt = as_prompt(text, tokenizer)
        (response,) = generate(
            policy, [prompt], tokenizer.end, settings.max_new_tokens, settings.temperature, settings.seed
        )
        title = TITLES.get(name.removesuffix(".pt"), name.removesuffix(".pt"))
        answer = tokenizer.decode(response.tolist()).strip() or "(nothing)"
        print(textwrap.fill(answer, 118, initial_indent=f"{title:12s} ", subsequent_indent=" " * 13))


def talk(settings: Settings) -> None:
    """Answers each line typed, as the answer comes; every question stands alone."""
    policy, tokenizer = load_model(settings, settings.model, GPT)
    settle(settings, policy.config.pretrained)
    ids, shown = [], ""

    def show(tokens: Tensor) -> None:
        nonlocal shown
        ids.append(tokens.item())
        text = tokenizer.decode(ids).lstrip()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character's first bytes wait for its last
            print(text[len(shown) :], end="", flush=True)
            shown = text

    for turn in itertools.count():
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            break
        if not text.strip():
            continue
        ids.clear()
        shown = ""
        seed = mixed_seed(settings.seed, turn)
        try:
            prompt = as_prompt(text, tokenizer)
            generate(policy, [prompt], tokenizer.end, settings.max_new_tokens, settings.temperature, seed, watch=show)
        except UserError as error:  # a question too long for the context
            print(error, file=sys.stderr)
        print(tokenizer.decode(ids).lstrip()[len(shown) :])


def main() -> None:
    """Lets every policy answer the test prompts, and compares."""
    # 1. Settings, test pairs, SFT and reward model.
    settings = parse_settings(Settings, __doc__)
    if settings.prompt is not None:
        return answer_prompt(settings, settings.prompt) if settings.prompt else talk(settings)
    device = choose_device(settings)
    pairs = load_pairs(settings, settings.data)
    firsts = {tuple(pairs[index][0].tolist()): index for index in reversed(range(len(pairs)))}
    pairs = pairs.select(torch.tensor(sorted(firsts.values())[: settings.prompts]))  # each prompt once
    sft, tokenizer = load_model(settings, settings.sft, GPT)
    reward, _ = load_model(settings, settings.reward, RewardModel)
    settle(settings, sft.config.pretrained)
    chosen = score_pairs(reward, pairs, device)[:, 0] if pairs.gold is None else pairs.gold[:, 0]

    # 2. Answers of each policy, and of SFT to compare them with.
    prompts = [pairs[index][0] for index in range(len(pairs))]
    for name in settings.policies:  # every file is checked before any work
        load_model(settings, name, GPT)
    answers = {}
    for name in tqdm(settings.policies, desc="answering", unit="policy"):
        policy, _ = load_model(settings, name, GPT)
        answers[name.removesuffix(".pt")] = answer(settings, prompts, tokenizer, pairs.source, policy, sft, reward)
    sft_answers = answers.get(settings.sft.removesuffix(".pt")) or answer(
        settings, prompts, tokenizer, pairs.source, sft, sft, reward
    )

    # 3. Table, samples, file.
    summaries = {name: summarise(given, sft_answers, chosen) for name, given in answers.items()}
    for name, row in summaries.items():
        if not all(math.isfinite(value) for value in row.values() if value is not None):
            raise UserError(f"--policies {name}.pt: not all of its rewards and log-probs are finite")
    best = "" if pairs.gold is None else f"; the best gold reward possible is {TOY_BEST_REWARD}"
    print(f"{len(pairs)} test prompts; mean ± standard error, wins with 95% interval{best}")
    print(table(summaries, len(pairs)))
    print("\n" + side_by_side(pairs, answers, settings.samples))
    path = Path(settings.out) / settings.save
    write_text(path, json.dumps(summaries, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    run_command(main)
