"""Mixed Preference Optimization, chapter 2: the reward model.

A GPT trunk, started from the SFT policy, and a linear head that reads a response's score from its last token. Under
the Bradley-Terry model (1952; for language models Stiennon et al. 2020, arXiv 2009.01325) the chosen response wins with
probability σ(r_chosen − r_rejected). Training makes the labels likely:

    L_RM = − mean over pairs of log σ(r_chosen − r_rejected).

One pass over the data, since labels are noisy and a second pass learns them by heart. The loss fixes rewards only up to
a constant for each prompt; afterwards all are shifted by one number, so that the training responses' mean is 0.

    python reward.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import (
    GPT, Packed, Pairs, Training, TrainingSettings, UserError, choose_device, finish, flag, load_model, load_pairs,
    mixed_seed, pack, parse_settings, prepare_model, run_command, save_model, settle, summed,
)


@dataclass
class Settings(TrainingSettings):
    """Flags of this stage."""

    data: str = flag("pairs.pt", "training pairs")
    test: str = flag("test.pt", "held-back pairs to report on")
    init: str = flag("sft.pt", "policy whose weights the trunk starts from")
    save: str = flag("reward.pt", "checkpoint to write")
    epochs: float = flag(1.0, "passes over the training pairs", least=0)
    batch_size: int = flag(32, "pairs per optimiser step", least=1, pretrained=64)
    lr: float = flag(5e-4, "peak learning rate", least=0, pretrained=3e-6)


class RewardModel(nn.Module):
    """A GPT with a scalar head on its hidden states; `trunk` loses its own head. PPO's critic has the same form."""

    kind = "reward model"

    def __init__(self, trunk: GPT):
        super().__init__()
        trunk.head = None  # scores need no logits, and --resume fails on a weight that never had a gradient
        self.trunk, self.config, self.head = trunk, trunk.config, nn.Linear(trunk.config.dim, 1)
        # Huang et al. 2024 (arXiv 2403.17031) traced this start to the first RLHF code: first rewards of order 1.
        nn.init.normal_(self.head.weight, std=1 / (trunk.config.dim + 1) ** 0.5)
        nn.init.zeros_(self.head.bias)

    def value_at(self, batch: Packed, places: Tensor) -> Tensor:
        """The head's value, in fp32, at `places` of a packed batch: [len(places)]."""
        hidden = self.trunk(batch.tokens, batch.positions, batch.mask)[places]  # (len(places), dim)
        return hidden.float() @ self.head.weight[0] + self.head.bias

    def score(self, batch: Packed) -> Tensor:
        """The reward of each sequence, read at its last token: [sequences]."""
        return self.value_at(batch, batch.last)


def bradley_terry_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """−log σ(r_chosen − r_rejected) of each pair, in nats: [n], [n] → [n]. Stiennon et al. 2020, section 3.4."""
    return -nn.functional.logsigmoid(chosen_rewards - rejected_rewards)


@torch.no_grad()
def score_pairs(model: RewardModel, pairs: Pairs | list[tuple], device: torch.device, pass_tokens=None) -> Tensor:
    """Rewards [n, K], on the CPU, of n documents of K branches each (pairs: 2). UserError if some are not finite."""
    rewards = torch.zeros(len(pairs), len(pairs[0]) - 1)
    for batch in tqdm(pack(list(pairs), device, pass_tokens), desc="scoring", leave=False):
        rewards[batch.members.cpu()] = model.score(batch).view(-1, rewards.shape[1]).cpu()
    bad = (~summed(rewards).isfinite().all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise UserError(f"rewards of {len(bad)} pairs are not finite, the first {bad[:10]}; train with a lower --lr")
    return rewards


def wins(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 for each win, 0.5 for each tie, 0 for each loss. [n], [n] → [n]."""
    return (ours > theirs).float() + 0.5 * (ours == theirs).float()


def ranking_accuracy(rewards: Tensor) -> float:
    """Share of pairs [n, 2] whose chosen side has the higher reward; a tie counts one half."""
    return wins(*rewards.unbind(1)).double().mean().item()


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95% interval of a share observed in `count` trials (Wilson 1927)."""
    z, shrink = 1.96, 1 / (1 + 1.96**2 / count)
    centre, spread = share + z * z / (2 * count), (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    return max(0.0, (centre - z * spread) * shrink), min(1.0, (centre + z * spread) * shrink)


def calibration(rewards: Tensor) -> list[tuple[float, float, int]]:
    """In five bins by σ(|gap|), of pairs [n, 2]: (predicted, observed share where the higher side is chosen, pairs)."""
    predicted, observed = rewards.diff(dim=1)[:, 0].abs().sigmoid(), wins(*rewards.unbind(1)).double()
    found = [(10 * predicted - 5).long().clamp(0, 4) == number for number in range(5)]  # the members of each bin
    return [(predicted[one].mean().item(), observed[one].mean().item(), int(one.sum())) for one in found if one.any()]


def report(rewards: Tensor, gold: Tensor | None) -> None:
    """Prints accuracy on labelled pairs [n, 2], and calibration: predicted against observed preference."""
    low, high = wilson_interval(ranking_accuracy(rewards), len(rewards))
    print(f"test accuracy {ranking_accuracy(rewards):.1%} (95% interval {low:.1%} to {high:.1%}, {len(rewards)} pairs)")
    if gold is not None:
        print(f"the toy world's gold reward itself scores {ranking_accuracy(gold):.1%} on these labels (a tie is ½)")
    print("calibration: the side that the model ranks first is the chosen one …")
    for predicted, observed, count in calibration(rewards):
        low, high = wilson_interval(observed, count)
        print(f"  predicted {predicted:.0%}, observed {observed:.0%} ({low:.0%} to {high:.0%}, {count} pairs)")


def main() -> None:
    """Trains the reward model, shifts it, and reports on held-back pairs."""
    # 1. Settings, pairs, and the SFT policy as the trunk.
    settings = parse_settings(Settings, __doc__)
    device = choose_device(settings)
    pairs, test = load_pairs(settings, settings.data), load_pairs(settings, settings.test)
    policy, tokenizer = load_model(settings, settings.init, GPT, prepare=False)
    settle(settings, policy.config.pretrained)
    torch.manual_seed(mixed_seed(settings.seed, 0))
    model = prepare_model(RewardModel(policy), settings)

    # 2. Bradley-Terry loss; chosen and rejected lie side by side behind one shared prompt.
    training = Training(settings, len(pairs), model, ("loss", "accuracy"))
    for indices in training:
        documents = [pairs[index] for index in indices]
        loss, accuracy = torch.zeros(2, device=device)
        for batch in pack(documents, device, settings.pass_tokens):
            chosen_rewards, rejected_rewards = model.score(batch).view(-1, 2).unbind(1)
            batch_loss = bradley_terry_loss(chosen_rewards, rejected_rewards).sum() / len(documents)
            batch_loss.backward()
            loss += batch_loss.detach()
            accuracy += wins(chosen_rewards, rejected_rewards).sum() / len(documents)
        metrics = {"grad_norm": training.optimize(), "loss": summed(loss), "accuracy": summed(accuracy)}
        training.log("pairs", int(pairs.lengths[indices].sum()), **metrics)

    # 3. Shift: mean reward 0 over the training responses. Save, and report on held-back pairs.
    with torch.no_grad():
        model.head.bias -= score_pairs(model, pairs, device, settings.pass_tokens).mean().item()
    save_model(settings, model, tokenizer)
    report(score_pairs(model, test, device, settings.pass_tokens), test.gold)
    finish(settings, ["save"], "python split.py", "--init {} --easy EASY_NAME.pt --hard HARD_NAME.pt")


if __name__ == "__main__":
    run_command(main)
