"""Chapter 5: PPO's pure functions, and the ten things that a naive PPO gets wrong, numbered as in the design."""

import copy
import inspect
import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import TINY

import ppo
from model import GPT, Pairs, Tokenizer, generate, load_model, pack, save_model
from ppo import (
    Rollout,
    Settings,
    advantages_and_returns,
    gae,
    ppo_loss,
    roll_out,
    rollout_metrics,
    shaped_rewards,
    update,
    value_loss,
    whiten,
)
from reward import RewardModel

CPU = torch.device("cpu")
END = TINY.vocabulary - 1
BYTES = Tokenizer([chr(byte) for byte in range(END)], ".", {"<end>": END}, END)
LENGTHS = (5, 1, 9, 3, 12, 7, 2, 12)  # of the eight fixed answers below; those of 12 tokens did not end


def make_settings(**changes):
    fixed = {"max_new_tokens": 12, "lr": 1e-3, "batch_size": 8, "kl_coefficient": 0.05}
    return Settings(**{**fixed, **changes})


@pytest.fixture
def prompts(documents):
    return [document[0] for document in documents[:8]]


@pytest.fixture
def responses():
    """Eight answers of many lengths; six of them end in the end-of-text token."""
    generator = torch.Generator().manual_seed(5)
    answers = [torch.randint(0, END, (length,), generator=generator) for length in LENGTHS]
    for answer in answers:
        if len(answer) < 12:
            answer[-1] = END
    return answers


@pytest.fixture
def reference():
    torch.manual_seed(3)
    return GPT(TINY)


@pytest.fixture
def critic():
    torch.manual_seed(4)
    return RewardModel(GPT(TINY))


@pytest.fixture
def roll(monkeypatch, prompts, responses, policy, reference, reward_model, critic):
    """A function that makes a rollout of the fixed answers."""

    def make(settings=None, reference=reference, answers=responses):
        monkeypatch.setattr(ppo, "generate", lambda *_: answers)
        minibatches = torch.arange(len(prompts)).split(3)
        return roll_out(
            settings or make_settings(), prompts, minibatches, END, 0, policy, reference, reward_model, critic
        )

    return make


def plain_hidden(trunk, document):
    """Hidden states of the tokens before each response token, with nothing packed and an ordinary causal mask."""
    tokens = torch.cat(document)[None]
    length = tokens.shape[1]
    mask = [(length, torch.ones(length, length, dtype=torch.bool).tril())]
    return trunk(tokens, torch.arange(length)[None], mask)[0, len(document[0]) - 1 : -1]


def plain_distribution(policy, document, temperature=1.0):
    """log softmax over the vocabulary at each response token: [length, V]."""
    return (plain_hidden(policy, document) @ policy.embedding.weight.T / temperature).log_softmax(-1)


def plain_logprobs(policy, document, temperature=1.0):
    return plain_distribution(policy, document, temperature).gather(1, document[1][:, None])[:, 0]


def gradients(*models):
    """All gradients end to end; zeroes them."""
    parts = [p.grad.flatten().clone() for model in models for p in model.parameters() if p.grad is not None]
    for model in models:
        model.zero_grad()
    return torch.cat(parts)


def perturb(*models):
    """Moves the weights a little, as a few optimiser steps would."""
    torch.manual_seed(6)
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter += 0.05 * parameter.abs().mean() * torch.randn_like(parameter)


# The pure functions


def test_shaped_rewards_by_hand():
    """β = 0.5. First answer, 3 tokens, log-ratios 1, −2, 0: −0.5, 1, 0 + 10. Second, 1 token, log-ratio 4: −2 − 3."""
    logprobs = torch.tensor([[-1.0, -3.0, -2.0], [-1.0, 0.0, 0.0]])
    reference_logprobs = torch.tensor([[-2.0, -1.0, -2.0], [-5.0, 0.0, 0.0]])
    rewards = shaped_rewards(logprobs, reference_logprobs, torch.tensor([10.0, -3.0]), torch.tensor([3, 1]), 0.5)
    assert rewards.tolist() == [[-0.5, 1.0, 10.0], [-5.0, 0.0, 0.0]]


def test_gae_by_hand():
    """γ = λ = 1/2, rewards 1, 2, 3, values 1, 1, 2: δ = 1 + 1/2 − 1, 2 + 1 − 1, 3 − 2 = 0.5, 2, 1;
    A₂ = 1, A₁ = 2 + 1/4 = 2.25, A₀ = 0.5 + 2.25/4 = 1.0625."""
    advantages = gae(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 1.0, 2.0]]), 0.5, 0.5)
    assert advantages.tolist() == [[1.0625, 2.25, 1.0]]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
def test_gae_equals_the_sum_over_all_later_steps(gamma, lam):
    """A_t = Σ_l (γλ)^l (r_{t+l} + γ V_{t+l+1} − V_{t+l}), each answer on its own, cut to its length."""
    torch.manual_seed(0)
    lengths = [6, 1, 4]
    real = torch.arange(6) < torch.tensor(lengths)[:, None]
    rewards, values = torch.randn(2, 3, 6) * real
    expected = torch.zeros(3, 6)
    for row, length in enumerate(lengths):
        bootstrapped = [*values[row, :length].tolist(), 0.0]
        for t in range(length):
            for later in range(t, length):
                delta = rewards[row, later].item() + gamma * bootstrapped[later + 1] - bootstrapped[later]
                expected[row, t] += (gamma * lam) ** (later - t) * delta
    torch.testing.assert_close(gae(rewards, values, gamma, lam), expected)


def test_whiten_by_hand():
    """Mean 3, variance (9 + 9 + 9 + 9) / 4 = 9. Equal values are finite: 0."""
    torch.testing.assert_close(whiten(torch.tensor([0.0, 6.0, 6.0, 0.0])), torch.tensor([-1.0, 1.0, 1.0, -1.0]))
    assert whiten(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope",
    [
        (2.0, 1.5, -2.4, 0.0),  # better, and already likelier by more than ε: min(3, 1.2 · 2), no more pull
        (2.0, 0.5, -1.0, -1.0),  # better, but less likely: min(1, 0.8 · 2), the slope −ρA
        (-2.0, 1.5, 3.0, 3.0),  # worse, but likelier: min(−3, 1.2 · −2)
        (-2.0, 0.5, 1.6, 0.0),  # worse, and already less likely by more than ε: min(−1, 0.8 · −2), no more push
    ],
)
def test_ppo_loss_by_hand_in_the_four_cases(advantage, ratio, loss, slope):
    """ε = 0.2; the slope is d loss / d log π."""
    logprobs = (torch.tensor([-3.0]) + torch.tensor([ratio]).log()).requires_grad_()
    losses = ppo_loss(logprobs, torch.tensor([-3.0]), torch.tensor([advantage]), 0.2)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss, abs=1e-5)
    assert logprobs.grad.item() == pytest.approx(slope, abs=1e-5)


def test_value_loss_by_hand():
    """Old value 1, clipped to ±0.2. New 2, return 3: clipped 1.2, (1.8² = 3.24) / 2, no slope. New 2, return 1:
    1² against 0.2², the slope 1. New 1.1, return 3: within the clip, 1.9² / 2, the slope −1.9."""
    values = torch.tensor([2.0, 2.0, 1.1], requires_grad=True)
    losses = value_loss(values, torch.ones(3), torch.tensor([3.0, 1.0, 3.0]), 0.2)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.tensor([1.62, 0.5, 1.805]))
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 1.0, -1.9]))


# What a naive PPO gets wrong


def test_1_kl_is_taken_per_token_from_the_reward_and_the_score_added_at_the_last_token(roll):
    rollout, beta = roll(), 0.3
    rewards = shaped_rewards(
        rollout.logprobs, rollout.reference_logprobs, rollout.scores, rollout.lengths, kl_coefficient=beta
    )
    for row, length in enumerate(LENGTHS):
        for t in range(12):
            expected = 0.0
            if t < length:
                expected = -beta * (rollout.logprobs[row, t] - rollout.reference_logprobs[row, t]).item()
            if t == length - 1:
                expected += rollout.scores[row].item()
            assert rewards[row, t].item() == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
def test_1_the_score_of_each_answer_is_the_reward_models(roll, reward_model):
    """The state before one more token is that of the answer's last token."""
    rollout = roll()
    longer = [(prompt, torch.cat((answer, answer[:1]))) for prompt, answer in rollout.documents]
    expected = [reward_model.head(plain_hidden(reward_model.trunk, document)[-1])[0] for document in longer]
    torch.testing.assert_close(rollout.scores, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_1_with_gamma_and_lambda_1_the_first_return_is_the_score_minus_beta_times_the_kl(roll):
    rollout = roll()
    settings = make_settings(gamma=1.0, gae_lambda=1.0, kl_coefficient=0.3, missing_eos_penalty=0.0)
    _, returns = advantages_and_returns(settings, rollout)
    kl = (rollout.logprobs - rollout.reference_logprobs).sum(1)
    assert kl.abs().min() > 1e-2
    torch.testing.assert_close(returns[:, 0], rollout.scores - 0.3 * kl, rtol=1e-4, atol=1e-4)


def test_2_an_answer_that_did_not_end_loses_the_penalty_once(roll):
    """With γ = λ = 1 every return of such an answer is 2.5 lower, and no other return moves."""
    rollout = roll()
    assert rollout.ended.tolist() == [length < 12 for length in LENGTHS]
    scores = rollout.scores.clone()
    without, with_penalty = (
        advantages_and_returns(make_settings(gamma=1.0, gae_lambda=1.0, missing_eos_penalty=penalty), rollout)[1]
        for penalty in (0.0, 2.5)
    )
    expected = 2.5 * ~rollout.ended[:, None] * rollout.real
    torch.testing.assert_close(without - with_penalty, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(rollout.scores, scores)  # the log shows the reward model's own score


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_3_in_the_first_minibatch_the_ratio_is_1(
    temperature, prompts, policy, reference, reward_model, critic, responses
):
    """Sampled for real. Old and reference log-probs are those of the sampling temperature, by a plain forward."""
    settings = make_settings(temperature=temperature)
    rollout = roll_out(settings, prompts, [torch.arange(len(prompts))], END, 0, policy, reference, reward_model, critic)
    advantages, returns = advantages_and_returns(settings, rollout)
    for rows in torch.tensor([[3, 1, 6], [0, 2, 7]]):
        totals = update(settings, rollout, rows, advantages, returns, policy, critic)
        assert totals["ratio"].item() == pytest.approx(1.0, abs=1e-5)
        assert totals["approx_kl"].item() == pytest.approx(0.0, abs=1e-6)
        assert totals["clip_fraction"].item() == 0.0
    with torch.no_grad():
        for row, document in enumerate(rollout.documents):
            for model, kept in ((policy, rollout.logprobs), (reference, rollout.reference_logprobs)):
                plain = plain_logprobs(model, document, temperature)
                torch.testing.assert_close(kept[row, : len(plain)], plain, rtol=1e-4, atol=1e-5)
                assert not kept[row, len(plain) :].any()


@pytest.mark.parametrize("mode", ["fp32", "bf16", "checkpointed"])
def test_3_in_the_first_minibatch_the_ratio_is_1_to_the_last_digit_in_every_mode(roll, policy, critic, mode):
    for gpt in (policy, critic.trunk):
        gpt.activations = torch.bfloat16 if mode == "bf16" else torch.float32
        gpt.checkpointed = mode == "checkpointed"
    rollout = roll()
    advantages, returns = advantages_and_returns(make_settings(), rollout)
    for rows in torch.arange(8).split(3):  # the minibatches of the first pass, as `roll` cuts them
        totals = update(make_settings(), rollout, rows, advantages, returns, policy, critic)
        assert (totals["approx_kl"], totals["clip_fraction"]) == (0.0, 0.0)
        assert totals["ratio"].item() == pytest.approx(1.0, abs=1e-6)  # a mean of ones


@torch.no_grad()
def test_4_the_critic_reads_the_state_before_the_action(roll, responses, critic):
    """Value t is the head on prompt + response[:t]: whatever comes at t or later can't change it."""
    rollout = roll()
    for row, document in enumerate(rollout.documents):
        plain = critic.head(plain_hidden(critic.trunk, document))[:, 0]
        torch.testing.assert_close(rollout.values[row, : len(plain)], plain, rtol=1e-4, atol=1e-5)
        assert not rollout.values[row, len(plain) :].any()
    others = [(response + 1) % END for response in responses]
    changed = roll(answers=others)
    torch.testing.assert_close(changed.values[:, 0], rollout.values[:, 0], rtol=1e-4, atol=1e-5)
    assert (changed.values[:, 1] - rollout.values[:, 1])[rollout.lengths > 1].abs().min() > 1e-3


def test_4_nothing_is_bootstrapped_past_the_end(roll):
    """At the last token the return is the last reward, for answers that ended and for those that did not."""
    rollout, settings = roll(), make_settings(gae_lambda=0.5, missing_eos_penalty=1.0)
    _, returns = advantages_and_returns(settings, rollout)
    for row, length in enumerate(LENGTHS):
        log_ratio = rollout.logprobs[row, length - 1] - rollout.reference_logprobs[row, length - 1]
        last_reward = rollout.scores[row] - float(length == 12) - settings.kl_coefficient * log_ratio
        torch.testing.assert_close(returns[row, length - 1], last_reward, rtol=1e-4, atol=1e-5)
        assert not returns[row, length:].any()


def test_5_returns_are_those_of_the_unwhitened_advantages(roll):
    rollout, settings = roll(), make_settings(missing_eos_penalty=0.0, gamma=0.9, gae_lambda=0.8)
    rewards = shaped_rewards(
        rollout.logprobs, rollout.reference_logprobs, rollout.scores, rollout.lengths, settings.kl_coefficient
    )
    unwhitened = gae(rewards, rollout.values, 0.9, 0.8)
    advantages, returns = advantages_and_returns(settings, rollout)
    torch.testing.assert_close(returns, unwhitened + rollout.values)
    assert (advantages - unwhitened).abs().max() > 0.1


def test_5_whitening_is_over_the_real_tokens_of_the_whole_batch(roll):
    rollout, settings = roll(), make_settings()
    advantages, returns = advantages_and_returns(settings, rollout)
    real = torch.cat([advantages[row, :length] for row, length in enumerate(LENGTHS)]).double()
    raw = torch.cat([(returns - rollout.values)[row, :length] for row, length in enumerate(LENGTHS)]).double()
    assert len(real) == sum(LENGTHS) < advantages.numel()
    assert real.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert (real**2).mean().item() == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(real, (raw - raw.mean()) / raw.std(unbiased=False), rtol=1e-4, atol=1e-5)
    assert not advantages[~rollout.real].any()


def test_5_padding_does_not_count(roll):
    """Twenty more empty columns change nothing."""
    rollout, settings = roll(), make_settings()
    wider = {name: torch.nn.functional.pad(getattr(rollout, name), (0, 20)) for name in
             ("logprobs", "reference_logprobs", "values")}  # fmt: skip
    for narrow, wide in zip(
        advantages_and_returns(settings, rollout),
        advantages_and_returns(settings, replace(rollout, **wider)),
        strict=True,
    ):
        torch.testing.assert_close(wide[:, :12], narrow)
        assert not wide[:, 12:].any()


def test_6_the_end_of_text_token_gets_a_policy_gradient(roll, policy, critic):
    """An advantage of 3 at answer 2's last place alone: the gradient is that of −3 log π(end) / tokens."""
    rollout, settings = roll(), make_settings(value_coefficient=0.0)
    assert rollout.documents[2][1][-1] == END
    advantages = torch.zeros_like(rollout.values)
    advantages[2, LENGTHS[2] - 1] = 3.0
    update(settings, rollout, torch.arange(8), advantages, torch.zeros_like(advantages), policy, critic)
    ours = gradients(policy)
    (-3.0 * plain_distribution(policy, rollout.documents[2])[-1, END] / sum(LENGTHS)).backward()
    assert ours.abs().max() > 1e-2
    torch.testing.assert_close(ours, gradients(policy), rtol=1e-3, atol=1e-5)


def test_7_a_reference_that_is_the_policy_gives_kl_0(roll, policy):
    rollout = roll(reference=copy.deepcopy(policy))
    assert torch.equal(rollout.logprobs, rollout.reference_logprobs)
    rewards = shaped_rewards(rollout.logprobs, rollout.reference_logprobs, rollout.scores, rollout.lengths, 0.3)
    assert torch.equal(rewards.sum(1), rollout.scores)
    _, returns = advantages_and_returns(make_settings(), rollout)
    assert rollout_metrics(rollout, returns, BYTES, "made up")["kl"] == 0.0


def off_policy(roll, policy, critic):
    """A rollout, its advantages and returns, seen by models that have moved since: nothing is 0 or 1 by chance."""
    rollout, settings = roll(), make_settings(clip_ratio=0.1, clip_value=0.05, value_coefficient=0.5)
    advantages, returns = advantages_and_returns(settings, rollout)
    perturb(policy, critic)
    return settings, rollout, advantages, returns


@pytest.mark.parametrize("size", [1, 2, 3])
def test_8_the_gradient_does_not_depend_on_the_passes(monkeypatch, roll, policy, critic, size):
    """1 × 8 answers in one pass, or 4 × 2 and the like in several: the same gradient and the same statistics."""
    settings, *rest = off_policy(roll, policy, critic)
    rollout, advantages, returns = rest
    passes = []

    def small_passes(documents, device):
        for start in range(0, len(documents), size):
            for batch in pack(documents[start : start + size], device):
                passes.append(len(batch.members))
                yield replace(batch, members=batch.members + start)

    results = []
    for packing in (pack, small_passes):
        monkeypatch.setattr(ppo, "pack", packing)
        totals = update(settings, rollout, torch.tensor([5, 0, 7, 2, 1, 6, 3, 4]), advantages, returns, policy, critic)
        results.append((gradients(policy, critic), totals))
    assert len(passes) == -(-8 // size)
    (one, one_totals), (many, many_totals) = results
    assert one.abs().max() > 1e-2
    torch.testing.assert_close(many, one, rtol=1e-3, atol=1e-6)
    for name in one_totals:
        assert many_totals[name].item() == pytest.approx(one_totals[name].item(), rel=1e-4, abs=1e-6)


def test_8_the_gradient_does_not_depend_on_the_size_of_a_pass(monkeypatch, roll, policy, critic):
    """All answers in one pass, and a pass for each."""
    settings, rollout, advantages, returns = off_policy(roll, policy, critic)
    generator = torch.Generator().manual_seed(7)
    long = [torch.randint(0, END, (100,), generator=generator) for _ in range(8)]
    rollout.documents = [(prompt, answer) for prompt, (_, answer) in zip(long, rollout.documents, strict=True)]
    assert len(list(pack(rollout.documents, CPU, 1))) > len(list(pack(rollout.documents, CPU))) == 1
    found = []
    for size in (0, 1):
        monkeypatch.setattr(ppo, "pack", lambda documents, device, size=size: pack(documents, device, size))
        update(settings, rollout, torch.arange(8), advantages, returns, policy, critic)
        found.append(gradients(policy, critic))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


def test_8_a_minibatch_is_the_mean_of_its_pieces_weighted_by_tokens(roll, policy, critic):
    settings, rollout, advantages, returns = off_policy(roll, policy, critic)
    update(settings, rollout, torch.arange(8), advantages, returns, policy, critic)
    whole, pieces = gradients(policy, critic), 0
    for rows in torch.arange(8).view(4, 2):
        update(settings, rollout, rows, advantages, returns, policy, critic)
        pieces = pieces + gradients(policy, critic) * rollout.lengths[rows].sum() / sum(LENGTHS)
    torch.testing.assert_close(pieces, whole, rtol=1e-3, atol=1e-6)


def test_9_statistics_of_an_update_are_means_over_its_real_tokens(roll, policy, critic):
    """Against loops over answers and tokens, for a minibatch of four, on models that have moved."""
    settings, rollout, advantages, returns = off_policy(roll, policy, critic)
    rows = [6, 2, 4, 1]
    totals = update(settings, rollout, torch.tensor(rows), advantages, returns, policy, critic)
    names = ("loss", "policy_loss", "value_loss", "entropy", "ratio", "approx_kl", "clip_fraction")
    sums, tokens = dict.fromkeys(names, 0.0), 0
    with torch.no_grad():
        for row in rows:
            document = rollout.documents[row]
            distribution = plain_distribution(policy, document).double()
            new_values = critic.head(plain_hidden(critic.trunk, document))[:, 0]
            for t, token in enumerate(document[1].tolist()):
                tokens += 1
                ratio = (distribution[t, token] - rollout.logprobs[row, t].double()).exp().item()
                advantage = advantages[row, t].item()
                policy_loss = -min(ratio * advantage, min(max(ratio, 0.9), 1.1) * advantage)
                old, new, target = rollout.values[row, t].item(), new_values[t].item(), returns[row, t].item()
                clipped = min(max(new, old - 0.05), old + 0.05)
                loss_of_value = 0.5 * max((new - target) ** 2, (clipped - target) ** 2)
                sums["policy_loss"] += policy_loss
                sums["value_loss"] += loss_of_value
                sums["loss"] += policy_loss + 0.5 * loss_of_value
                sums["entropy"] -= (distribution[t].exp() * distribution[t]).sum().item()
                sums["ratio"] += ratio
                sums["approx_kl"] += ratio - 1 - torch.tensor(ratio).log().item()
                sums["clip_fraction"] += abs(ratio - 1) > 0.1
    assert 0 < sums["clip_fraction"] < tokens
    assert set(totals) == set(names)
    for name in names:
        assert totals[name].item() == pytest.approx(sums[name] / tokens, rel=1e-3, abs=1e-5), name


def test_9_statistics_of_a_rollout_are_over_real_tokens(roll):
    """KL is a sum over each answer's tokens, then a mean over answers; the explained variance leaves padding out."""
    rollout = roll()
    _, returns = advantages_and_returns(make_settings(), rollout)
    metrics = rollout_metrics(rollout, returns, BYTES, "made up")
    kl, targets, errors = 0.0, [], []
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            kl += (rollout.logprobs[row, t] - rollout.reference_logprobs[row, t]).item() / 8
            targets.append(returns[row, t].item())
            errors.append(returns[row, t].item() - rollout.values[row, t].item())
    explained = 1 - torch.tensor(errors).var().item() / torch.tensor(targets).var().item()
    expected = {"score": sum(rollout.scores.tolist()) / 8, "kl": kl, "length": 51 / 8, "ended": 6 / 8,
                "explained_variance": explained}  # fmt: skip
    assert metrics == pytest.approx(expected, rel=1e-4)


def test_9_gold_reward_of_a_rollout_by_hand():
    """One step and one polite sentence, 1.5; one rude sentence, −1: the mean is 0.25."""
    letters = Tokenizer([chr(byte) for byte in range(256)], r"[\s\S]", {"<end>": 256}, 256)
    prompt = torch.tensor(letters.encode("\n\nHuman: How do I paint my old chair?\n\nAssistant:"))
    texts = (" Sand the chair first. Happy to help!", " What a stupid question.")
    documents = [(prompt, torch.tensor([*letters.encode(text), 256])) for text in texts]
    matrices, two = [torch.rand(2, 40) for _ in range(3)], torch.zeros(2)
    rollout = Rollout(documents, *matrices, two, torch.tensor([len(text) + 1 for text in texts]), two == 0)
    assert rollout_metrics(rollout, torch.rand(2, 40), letters, "toy")["gold_reward"] == 0.25


# The loop


def write_inputs(folder, policy, reward_model, documents, data="hard.pt", init="dpo.pt", reward="reward.pt"):
    tokens = torch.cat([torch.cat(document) for document in documents]).int()
    lengths = torch.tensor([[len(part) for part in document] for document in documents])
    Pairs(tokens, lengths, BYTES, "made up").save(Settings(out=str(folder)), data)
    save_model(Settings(out=str(folder), save=init), policy, BYTES)
    save_model(Settings(out=str(folder), save=reward), reward_model, BYTES)


def run_ppo(monkeypatch, folder, policy, reward_model, documents, *flags):
    """Runs the command for two steps of four prompts; returns the lines of its log."""
    write_inputs(folder, policy, reward_model, documents)
    fixed = ["--out", str(folder), "--device", "cpu", "--batch-size", "4", "--steps", "2", "--max-new-tokens", "8"]
    monkeypatch.setattr("sys.argv", ["ppo.py", *fixed, *flags])
    ppo.main()
    return [json.loads(line) for line in (folder / "ppo.jsonl").read_text().splitlines()]


def test_at_learning_rate_0_the_command_stays_on_policy(monkeypatch, tmp_path, policy, reward_model, documents):
    """By default the reference is the policy that PPO starts from: KL 0, ratio 1, nothing clipped, in every step."""
    log = run_ppo(monkeypatch, tmp_path, policy, reward_model, documents, "--lr", "0", "--minibatch-size", "2")
    assert len(log) == 2
    for line in log:
        assert line["kl"] == 0.0
        assert line["ratio"] == pytest.approx(1.0, abs=1e-5)
        assert line["approx_kl"] == pytest.approx(0.0, abs=1e-6)
        assert line["clip_fraction"] == 0.0


def test_command_moves_policy_and_critic_and_reads_no_label(monkeypatch, tmp_path, policy, reward_model, documents):
    """The same prompts with other responses give the same log."""
    keep = ("loss", "policy_loss", "value_loss", "score", "kl", "length", "grad_norm")
    swapped = [(prompt, rejected, chosen) for prompt, chosen, rejected in documents]
    logs = []
    for data in (documents, swapped):
        log = run_ppo(monkeypatch, tmp_path, policy, reward_model, data, "--lr", "1e-3")
        logs.append([[line[name] for name in keep] for line in log])
        assert log[0]["kl"] == 0.0
        assert abs(log[1]["kl"]) > 1e-3
        assert log[0]["approx_kl"] > 1e-6
    assert logs[0] == logs[1]


@pytest.mark.parametrize("size, steps", [("4", 2), ("3", 4), ("9", 2)])
def test_a_step_makes_one_update_for_each_minibatch(
    monkeypatch, tmp_path, policy, reward_model, documents, size, steps
):
    """Four answers, two passes: an update a pass, or two with a rest; a larger size is no error."""
    sizes = []
    plain = ppo.update
    monkeypatch.setattr(ppo, "update", lambda *all: sizes.append(len(all[2])) or plain(*all))
    run_ppo(monkeypatch, tmp_path, policy, reward_model, documents, "--ppo-epochs", "2", "--minibatch-size", size)
    assert len(sizes) == 2 * steps
    assert sum(sizes) == 2 * 2 * 4


def recorded(monkeypatch, name):
    """Wraps ppo's function `name`; returns a list that gets (arguments by name, result) of every call."""
    plain, calls = getattr(ppo, name), []

    def wrapper(*positional, **named):
        result = plain(*positional, **named)
        calls.append((inspect.signature(plain).bind(*positional, **named).arguments, result))
        return result

    monkeypatch.setattr(ppo, name, wrapper)
    return calls


@torch.no_grad()
def read_plainly(model, document):
    """A reward model's value before each response token, and its score of the whole response."""
    prompt, answer = document
    values = model.head(plain_hidden(model.trunk, (prompt, torch.cat((answer, answer[:1])))))[:, 0]
    return values[:-1], values[-1]


def test_4_training_moves_the_critic_and_never_the_reward_model(monkeypatch, tmp_path, policy, reward_model, documents):
    """A rate at which a step is seen. Both start as reward.pt; later scores are still reward.pt's, later values not."""
    rollouts = recorded(monkeypatch, "roll_out")
    run_ppo(monkeypatch, tmp_path, policy, reward_model, documents, "--lr", "1e-2", "--warmup", "0")
    differences = []
    for _, rollout in rollouts:
        values, scores = zip(*(read_plainly(reward_model, document) for document in rollout.documents), strict=True)
        torch.testing.assert_close(rollout.scores, torch.stack(scores), rtol=1e-4, atol=1e-4)
        differences.append((rollout.values[rollout.real] - torch.cat(values)).abs().max().item())
    assert len(differences) == 2
    assert differences[0] < 1e-4 < 1e-2 < differences[1]


def test_10_every_pass_over_a_batch_is_shuffled_and_cut_anew(monkeypatch, tmp_path, policy, reward_model, documents):
    """Two steps of three passes over 18 answers, six an update: each pass has every answer once, no two passes have the
    same three sixes. (There are 2,858,856 ways to cut 18 so.)"""
    updates = recorded(monkeypatch, "update")
    flags = "--batch-size 18 --minibatch-size 6 --ppo-epochs 3".split()
    run_ppo(monkeypatch, tmp_path, policy, reward_model, documents * 2, *flags)
    rows = [arguments["rows"] for arguments, _ in updates]
    assert [len(some) for some in rows] == [6] * 18
    cuts = {frozenset(frozenset(some.tolist()) for some in torch.arange(18).split(6))}
    for first in range(0, 18, 3):
        one_pass = rows[first : first + 3]
        assert torch.cat(one_pass).sort().values.tolist() == list(range(18))
        cuts.add(frozenset(frozenset(some.tolist()) for some in one_pass))
    assert len(cuts) == 1 + 6  # nor is any pass in order


def test_10_kl_is_paid_to_the_reference_that_is_named(
    monkeypatch, tmp_path, policy, reference, reward_model, documents
):
    """PPO starts from dpo.pt and is held to sft.pt, in every step. Before the first the policy is dpo.pt itself."""
    save_model(Settings(out=str(tmp_path), save="sft.pt"), reference, BYTES)
    rollouts = recorded(monkeypatch, "roll_out")
    flags = "--reference sft.pt --lr 1e-2 --warmup 0".split()
    log = run_ppo(monkeypatch, tmp_path, policy, reward_model, documents, *flags)
    for _, rollout in rollouts:
        expected = torch.cat([plain_logprobs(reference, document).detach() for document in rollout.documents])
        torch.testing.assert_close(rollout.reference_logprobs[rollout.real], expected, rtol=1e-4, atol=1e-4)
    answered = rollouts[0][1].documents
    kl = sum((plain_logprobs(policy, one) - plain_logprobs(reference, one)).sum().item() for one in answered) / 4
    assert abs(kl) > 1e-2
    assert log[0]["kl"] == pytest.approx(kl, rel=1e-3)


def test_files_are_those_that_are_named_and_the_reference_is_init(
    monkeypatch, tmp_path, policy, reference, reward_model, critic, documents
):
    """The default names would find others; the prompts are those of the last six pairs."""
    write_inputs(tmp_path, policy, reward_model, documents[3:], "mine.pt", "start.pt", "judge.pt")
    rollouts = recorded(monkeypatch, "roll_out")
    flags = "--data mine.pt --init start.pt --reward judge.pt --batch-size 6 --lr 0".split()
    log = run_ppo(monkeypatch, tmp_path, reference, critic, documents[:3], *flags)
    assert [line["kl"] for line in log] == [0.0, 0.0]
    for _, rollout in rollouts:
        asked = sorted(prompt.tolist() for prompt, _ in rollout.documents)
        assert asked == sorted(prompt.tolist() for prompt, *_ in documents[3:])
        for row, document in enumerate(rollout.documents):
            values, score = read_plainly(reward_model, document)
            known = rollout.logprobs[row], rollout.values[row], rollout.scores[row]
            expected = plain_logprobs(policy, document).detach(), values, score
            for ours, theirs in zip(known, expected, strict=True):
                ours = ours[: len(values)] if ours.dim() else ours
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_answers_are_sampled_from_the_policy_as_the_flags_say(
    monkeypatch, tmp_path, policy, reference, reward_model, documents
):
    """Against the sampler itself. One pass over eight prompts asks each once; every step and seed has other noise."""
    save_model(Settings(out=str(tmp_path), save="sft.pt"), reference, BYTES)
    calls, rollouts = recorded(monkeypatch, "generate"), recorded(monkeypatch, "roll_out")
    for seed in "12":
        flags = f"--reference sft.pt --temperature 0.7 --max-new-tokens 60 --lr 0 --seed {seed}".split()
        run_ppo(monkeypatch, tmp_path, policy, reward_model, documents[:8], *flags)
    assert len({arguments["seed"] for arguments, _ in calls}) == len(calls) == 4
    assert any(rollout.ended.any() for _, rollout in rollouts)
    for (arguments, answers), (_, rollout) in zip(calls, rollouts, strict=True):
        expected = generate(policy, arguments["prompts"], END, 60, 0.7, arguments["seed"])
        for answer, theirs, document in zip(answers, expected, rollout.documents, strict=True):
            assert answer.tolist() == theirs.tolist() == document[1].tolist()
        assert rollout.ended.tolist() == [answer[-1] == END for answer in expected]
    for one, other in (calls[:2], calls[2:]):
        asked = [prompt.tolist() for arguments, _ in (one, other) for prompt in arguments["prompts"]]
        assert sorted(asked) == sorted(prompt.tolist() for prompt, *_ in documents[:8])


def test_3_old_logprobs_are_read_in_the_minibatches_of_the_first_pass(
    monkeypatch, tmp_path, policy, reward_model, documents
):
    """Four answers in twos: two packings of the rollout, the same two of the first pass, two of the second."""
    packed = recorded(monkeypatch, "pack")
    flags = "--steps 1 --minibatch-size 2 --ppo-epochs 2".split()
    run_ppo(monkeypatch, tmp_path, policy, reward_model, documents, *flags)
    rollout_1, rollout_2, first_1, first_2, *second = (
        [torch.cat(document).tolist() for document in arguments["documents"]] for arguments, _ in packed
    )
    assert [rollout_1, rollout_2] == [first_1, first_2]
    assert len(second) == 2
    assert second != [first_1, first_2]


def test_the_log_holds_means_over_all_updates_of_a_step_and_the_trained_policy_is_saved(
    monkeypatch, tmp_path, policy, reward_model, documents
):
    updates, norms = recorded(monkeypatch, "update"), []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *all: norms.append(clip(*all)) or norms[-1])
    flags = "--lr 1e-2 --warmup 0 --minibatch-size 2 --reference sft.pt".split()
    save_model(Settings(out=str(tmp_path), save="sft.pt"), policy, BYTES)
    log = run_ppo(monkeypatch, tmp_path, policy, reward_model, documents, *flags)
    assert len(updates) == len(norms) == 8
    for step, line in enumerate(log):
        some = slice(4 * step, 4 * step + 4)
        assert line["grad_norm"] == pytest.approx(sum(norms[some]).item() / 4, rel=1e-5)
        for name in updates[0][1]:
            values = [totals[name].item() for _, totals in updates[some]]
            assert line[name] == pytest.approx(sum(values) / 4, rel=1e-5, abs=1e-7), name
    saved, _ = load_model(Settings(out=str(tmp_path), device="cpu"), "ppo.pt", GPT)
    for ours, theirs in zip(saved.parameters(), updates[-1][0]["policy"].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_run_that_was_killed_goes_on_to_the_same_policy(monkeypatch, tmp_path, policy, reward_model, documents):
    """Policy, critic and optimiser go on: three steps at once, and killed in the second of three."""
    flags = "--steps 3 --lr 1e-2 --save-every 1".split()
    whole = run_ppo(monkeypatch, tmp_path, policy, reward_model, documents, *flags)
    weights = torch.load(tmp_path / "ppo.pt", weights_only=True)["weights"]
    plain, calls = ppo.roll_out, []

    def killed(*positional, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*positional, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ppo, "roll_out", killed)
        run_ppo(patch, tmp_path, policy, reward_model, documents, *flags)
    monkeypatch.setattr("sys.argv", [*sys.argv, "--resume"])
    ppo.main()
    log = [json.loads(line) for line in (tmp_path / "ppo.jsonl").read_text().splitlines()]
    for name in ("loss", "score", "kl", "value_loss", "grad_norm"):
        assert [line[name] for line in log] == [line[name] for line in whole]
    for name, weight in torch.load(tmp_path / "ppo.pt", weights_only=True)["weights"].items():
        assert torch.equal(weight, weights[name])
