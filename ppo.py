"""Mixed Preference Optimization, chapter 5: Proximal Policy Optimization (PPO) on the prompts of the hard pairs.

The policy answers prompts; the reward model scores the answers; the policy is moved towards what scored better than
the critic expected, and held near the reference, which in MPO is the DPO policy that it starts from (Gou and Nguyen
2024, arXiv 2403.19443). The labels of the hard pairs are never read. Per response token t (Ouyang et al. 2022, arXiv
2203.02155; Schulman et al. 2017, arXiv 1707.06347; 2016, arXiv 1506.02438):

    reward      r_t = −β (log π_old(a_t) − log π_ref(a_t)), plus the score of the whole response at its last token
    advantage   A_t = δ_t + γλ A_{t+1},  δ_t = r_t + γ V_{t+1} − V_t
    loss        − min(ρ_t Â_t, clip(ρ_t, 1 ± ε) Â_t) + c (V_t − R_t)²/2,  ρ_t = π/π_old, with the value's move clipped
                as well; Â_t: A_t whitened, that is to mean 0 and variance 1 over the batch; R_t = A_t + V_t with the
                V_t from before the updates

The critic V is a reward model of its own, started from reward.pt. A step answers one batch of prompts and
makes several passes over the answers.

    python ppo.py                                                       # the MPO policy, ppo.pt
    python ppo.py --init sft.pt --data pairs.pt --steps 32 --kl-coefficient 0.1 --save ppo_all.pt    # PPO from SFT
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import (
    GPT, Tokenizer, Training, TrainingSettings, finish, flag, generate, gold_reward, load_model, load_pairs, mixed_seed,
    pack, parse_settings, require_room, run_command, save_model, settle, summed,
)
from reward import RewardModel


@dataclass
class Settings(TrainingSettings):
    """Flags of this stage."""

    data: str = flag("hard.pt", "pairs whose prompts are answered; their responses are not used")
    init: str = flag("dpo.pt", "policy to start from")
    reference: str | None = flag(None, "policy to stay near [--init]")
    reward: str = flag("reward.pt", "reward model, and the critic's start")
    save: str = flag("ppo.pt", "checkpoint to write")
    epochs: float = flag(1.0, "passes over the prompts", least=0)
    batch_size: int = flag(128, "prompts answered per step", least=1, pretrained=64)
    ppo_epochs: int = flag(2, "passes over each batch of answers", least=1, pretrained=4)
    minibatch_size: int = flag(16, "answers per optimiser step, at most", least=1, pretrained=64)
    lr: float = flag(3e-4, "peak learning rate", least=0, pretrained=3e-6)
    kl_coefficient: float = flag(0.3, "β: price of a nat of log-ratio to the reference", least=0, pretrained=0.05)
    matching: float = flag(1.0, "α: the reference has no say on tokens it gives more than α (PM-RLHF)", above=0, most=1)
    gamma: float = flag(1.0, "γ: discount per token", least=0, most=1)
    gae_lambda: float = flag(0.95, "λ of generalised advantage estimation", least=0, most=1)
    temperature: float = flag(1.0, "of sampling, and of all log-probs", above=0)
    max_new_tokens: int = flag(96, "longest answer", least=1, pretrained=256)
    missing_eos_penalty: float = flag(1.0, "taken off the score (not in the log) where an answer did not end", least=0)
    clip_ratio: float = flag(0.2, "ε: the probability ratio is clipped to 1 ± this", least=0)
    clip_value: float = flag(0.2, "the critic's new value is clipped to its old one ± this", least=0)
    value_coefficient: float = flag(0.1, "weight c of the value loss", least=0)


def shaped_rewards(
    logprobs: Tensor, reference_logprobs: Tensor, scores: Tensor, lengths: Tensor, kl_coefficient: float,
    matching: float = 1.0,
) -> Tensor:
    """Per-token rewards: −β (log π_old − log π_ref), plus the score at the response's last token.

    logprobs, reference_logprobs: [B, T], 0 past each response's end; scores, lengths: [B]. Returns [B, T]. Ouyang et
    al. 2022 (arXiv 2203.02155), equation 2, with the KL term spread over the tokens where it arises.

    Where the reference gives a token more than α = matching, it has no say: the reward is −β log π_old, which pays
    for entropy alone. Conditional PM-RLHF, Xiao et al. 2024 (arXiv 2405.16455). At α = 1 nothing changes.
    """
    anchors = reference_logprobs.masked_fill(reference_logprobs > math.log(matching), 0.0)
    rewards = -kl_coefficient * (logprobs - anchors)
    return rewards.scatter_add(1, lengths[:, None] - 1, scores[:, None])


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation, Schulman et al. 2016 (arXiv 1506.02438), equation 16. All shapes [B, T].

    values[:, t] is the critic's value of the state before action t. Past a response's end both inputs are 0, so the
    value bootstrapped from there is 0, as it must be: the episode is over.
    """
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * lam * next_advantage
        next_advantage, next_value = advantages[:, t], values[:, t]
    return advantages


def whiten(x: Tensor) -> Tensor:
    """Shifts and scales x [N], of real tokens only, to mean 0 and variance 1."""
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-8).sqrt()


def ppo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_ratio: float) -> Tensor:
    """Clipped policy loss of each token, Schulman et al. 2017 (arXiv 1707.06347), equation 7, negated. [N] each."""
    ratio = (logprobs - old_logprobs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_value: float) -> Tensor:
    """Half the squared error of each token's value, the worse of clipped and not. [N] each.

    As in OpenAI Baselines' ppo2: a value may not gain by moving more than clip_value from where it was.
    """
    clipped = old_values + (values - old_values).clamp(-clip_value, clip_value)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


@dataclass
class Rollout:
    """A batch of B answers and what is known of them before the first update. Matrices are [B, T], T the longest
    answer's length, and 0 past each answer's end; scores, lengths, ended are [B]."""

    documents: list[tuple[Tensor, Tensor]]
    logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    scores: Tensor
    lengths: Tensor
    ended: Tensor

    @property
    def real(self) -> Tensor:
        """Which entries of the matrices are tokens: [B, T] bool."""
        return torch.arange(self.logprobs.shape[1], device=self.lengths.device) < self.lengths[:, None]


@torch.no_grad()
def roll_out(
    settings: Settings, prompts: list[Tensor], minibatches: list[Tensor], end: int, seed: int, policy: GPT,
    reference: GPT, reward: RewardModel, critic: RewardModel,
) -> Rollout:
    """Answers the prompts and scores the answers. Log-probs come from the packed forward of the updates, in the first
    pass's `minibatches` (indices of prompts), so that the first ratio is 1: on a CPU to the last digit, in bf16
    too. Not from generation, whose arithmetic differs."""
    device = policy.embedding.weight.device
    responses = generate(policy, prompts, end, settings.max_new_tokens, settings.temperature, seed)
    documents = list(zip(prompts, responses, strict=True))
    lengths = torch.tensor([len(response) for response in responses], device=device)
    ended = torch.tensor([bool(response[-1] == end) for response in responses], device=device)
    logprobs, reference_logprobs, values = torch.zeros(3, len(prompts), int(lengths.max()), device=device)
    scores = torch.zeros(len(prompts), device=device)
    for rows in minibatches:
        for batch in pack([documents[row] for row in rows.tolist()], device, settings.pass_tokens):
            members = rows.to(device)[batch.members]
            at = members[batch.sequence], batch.offset
            logprobs[at] = policy.logprobs(batch, settings.temperature)[0]
            reference_logprobs[at] = reference.logprobs(batch, settings.temperature)[0]
            values[at] = critic.value_at(batch, batch.source)  # V before the token: at `source`, which has not seen it
            scores[members] = reward.score(batch)
    known = (summed(part) for part in (logprobs, reference_logprobs, values, scores))
    return Rollout(documents, *known, lengths, ended)


def advantages_and_returns(settings: Settings, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Whitened advantages and returns, both [B, T]. Returns are formed first: the critic learns unwhitened ones."""
    scores = rollout.scores - settings.missing_eos_penalty * ~rollout.ended
    options = settings.kl_coefficient, settings.matching
    rewards = shaped_rewards(rollout.logprobs, rollout.reference_logprobs, scores, rollout.lengths, *options)
    advantages = gae(rewards, rollout.values, settings.gamma, settings.gae_lambda)
    returns = advantages + rollout.values
    advantages[rollout.real] = whiten(advantages[rollout.real])
    return advantages, returns


def update(
    settings: Settings, rollout: Rollout, rows: Tensor, advantages: Tensor, returns: Tensor, policy: GPT,
    critic: RewardModel,
) -> dict[str, Tensor]:
    """Adds the gradients of a minibatch, the answers `rows` (Training.optimize takes the step). Returns token means.

    Losses are sums over tokens divided by the whole minibatch's token count, so the gradient does not depend on how
    the answers are packed into passes.
    """
    device = policy.embedding.weight.device
    tokens = rollout.lengths[rows].sum()
    totals = {}
    for batch in pack([rollout.documents[row] for row in rows.tolist()], device, settings.pass_tokens):
        at = rows.to(device)[batch.members][batch.sequence], batch.offset
        logprobs, entropies = policy.logprobs(batch, settings.temperature)
        values = critic.value_at(batch, batch.source)
        old_logprobs = rollout.logprobs[at]
        policy_losses = ppo_loss(logprobs, old_logprobs, advantages[at], settings.clip_ratio)
        value_losses = value_loss(values, rollout.values[at], returns[at], settings.clip_value)
        losses = policy_losses + settings.value_coefficient * value_losses
        (losses.sum() / tokens).backward()
        log_ratio = (logprobs - old_logprobs).detach()
        ratio = log_ratio.exp()
        sums = {"loss": losses, "policy_loss": policy_losses, "value_loss": value_losses, "entropy": entropies,
                "ratio": ratio, "approx_kl": ratio - 1 - log_ratio,
                "clip_fraction": ((ratio - 1).abs() > settings.clip_ratio).float()}
        for name, value in sums.items():
            totals[name] = totals.get(name, 0) + value.detach().sum() / tokens
    return {name: summed(total) for name, total in totals.items()}


def rollout_metrics(rollout: Rollout, returns: Tensor, tokenizer: Tokenizer, toy: bool) -> dict[str, Tensor | float]:
    """What a step's answers were like, for the log; in the toy world also their gold reward."""
    log_ratio = rollout.logprobs - rollout.reference_logprobs
    returns, values = returns[rollout.real], rollout.values[rollout.real]
    unexplained = (returns - values).var(unbiased=False) / (returns.var(unbiased=False) + 1e-8)
    metrics = {"score": rollout.scores.mean(), "kl": log_ratio.sum(1).mean(), "length": rollout.lengths.float().mean(),
               "ended": rollout.ended.float().mean(), "explained_variance": 1 - unexplained}
    if toy:
        golds = [gold_reward(*map(tokenizer.decode, document)) for document in rollout.documents]
        metrics["gold_reward"] = sum(golds) / len(golds)
    return metrics


def main() -> None:
    """Trains the policy by PPO."""
    # 1. Settings, prompts, and four models: policy, reference, reward model, critic.
    settings = parse_settings(Settings, __doc__)
    pairs = load_pairs(settings, settings.data)
    policy, tokenizer = load_model(settings, settings.init, GPT)
    reference, _ = load_model(settings, settings.reference or settings.init, GPT)
    reward, _ = load_model(settings, settings.reward, RewardModel)
    critic, _ = load_model(settings, settings.reward, RewardModel)
    settle(settings, policy.config.pretrained)
    require_room(policy.config, (prompt for prompt, _, _ in pairs), settings.max_new_tokens)

    # 2. One optimiser for policy and critic: they share no weights, only the clipped gradient norm.
    both = nn.ModuleDict({"policy": policy, "critic": critic})
    training = Training(settings, len(pairs), both, ("score", "kl", "length", "ended"), eps=1e-5)
    for indices in training:
        # 3. Sample and score one batch of answers. Several passes will go over it, each shuffled and cut anew.
        prompts, seed = [pairs[index][0] for index in indices], mixed_seed(settings.seed, training.step)
        shuffle = torch.Generator().manual_seed(seed)
        cuts = math.ceil(len(prompts) / settings.minibatch_size)  # of like size: each takes a whole step
        passes = [
            torch.randperm(len(prompts), generator=shuffle).tensor_split(cuts) for _ in range(settings.ppo_epochs)
        ]
        rollout = roll_out(settings, prompts, passes[0], tokenizer.end, seed, policy, reference, reward, critic)
        advantages, returns = advantages_and_returns(settings, rollout)

        # 4. An update for each minibatch of each pass.
        history, grad_norms = [], []
        for rows in itertools.chain(*passes):
            history.append(update(settings, rollout, rows, advantages, returns, policy, critic))
            grad_norms.append(training.optimize())

        metrics = {"updates": len(history), "grad_norm": torch.stack(grad_norms).mean()}
        for name in history[0]:
            metrics[name] = torch.stack([one[name] for one in history]).mean()
        metrics |= rollout_metrics(rollout, returns, tokenizer, pairs.gold is not None)
        training.log("episodes", int(rollout.lengths.sum()), **metrics)

    # 5. Save.
    save_model(settings, policy, tokenizer)
    finish(settings, ["save"], "python evaluate.py", "--policies sft.pt {}")


if __name__ == "__main__":
    run_command(main)
