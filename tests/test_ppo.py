"""Chapter 5, and PPO's traps, by number: 1 KL is per token, inside the reward; 2 an answer without an end pays; 3 all
log-probs are of one forward; 4 the critic reads the state before a token, and is its own model; 5 returns come before
whitening; 6 the end is trained; 7 KL starts at 0; 8 passes change no gradient; 9 tokens are real; 10 passes differ."""

import inspect

import pytest
import torch
from conftest import (
    END, LETTERS, TOLERANCES, plain_distribution, plain_hidden, plain_logprobs, plain_score, spell, tiny, write,
)

import ppo
from model import GPT, UserError, generate, load_model, mixed_seed, pack
from ppo import advantages_and_returns, ppo_loss, roll_out, rollout_metrics, shaped_rewards, update, value_loss, whiten
from reward import RewardModel

LENGTHS = (5, 1, 9, 3, 12, 7, 2, 12)  # of the eight fixed answers below; those of 12 tokens did not end


def make_settings(**changes):
    return ppo.Settings(**{"max_new_tokens": 12, "kl_coefficient": 0.05, **changes})


reference = pytest.fixture(lambda: tiny(3))
critic = pytest.fixture(lambda: RewardModel(tiny(4)))


@pytest.fixture
def rollout(monkeypatch, documents, policy, reference, reward_model, critic):
    """Of eight fixed answers of many lengths, of which six end; in threes."""
    generator = torch.Generator().manual_seed(5)
    answers = [torch.randint(0, END, (length,), generator=generator) for length in LENGTHS]
    for answer in answers:
        if len(answer) < 12:
            answer[-1] = END
    monkeypatch.setattr(ppo, "generate", lambda *_: answers)
    prompts, minibatches = [prompt for prompt, *_ in documents[:8]], torch.arange(8).split(3)
    return roll_out(make_settings(), prompts, minibatches, END, 0, policy, reference, reward_model, critic)


def gradients(*models):
    """All gradients end to end; zeroes them."""
    parts = [p.grad.flatten().clone() for model in models for p in model.parameters() if p.grad is not None]
    for model in models:
        model.zero_grad()
    return torch.cat(parts)


def test_1_shaped_rewards_by_hand():
    """β = 0.5. First answer, 3 tokens, log-ratios 1, −2, 0: −0.5, 1, 0 + 10. Second, 1 token, log-ratio 4: −2 − 3. With
    α = 0.2 (log: −1.6) the reference's −1 alone has no say: 0.5 · 3. β = 0.3, α = 0.1 (−2.3), log π −1: 0.3, −0.6."""
    logprobs = torch.tensor([[-1.0, -3.0, -2.0], [-1.0, 0.0, 0.0]])
    reference_logprobs = torch.tensor([[-2.0, -1.0, -2.0], [-5.0, 0.0, 0.0]])
    given = logprobs, reference_logprobs, torch.tensor([10.0, -3.0]), torch.tensor([3, 1])
    assert shaped_rewards(*given, 0.5).tolist() == [[-0.5, 1.0, 10.0], [-5.0, 0.0, 0.0]]
    assert shaped_rewards(*given, 0.5, 0.2).tolist() == [[-0.5, 1.5, 10.0], [-5.0, 0.0, 0.0]]
    given = torch.tensor([[-1.0, -1.0, 0.0]]), torch.tensor([[-2.0, -3.0, 0.0]]), torch.zeros(1), torch.tensor([2])
    torch.testing.assert_close(shaped_rewards(*given, 0.3, 0.1), torch.tensor([[0.3, -0.6, 0.0]]))


def slow_gae(rewards, values, gamma, lam):
    """A_t = Σ_l (γλ)^l (r_{t+l} + γ V_{t+l+1} − V_{t+l}) of one answer, from lists of its own length."""
    values, steps = [*values, 0.0], range(len(rewards))
    deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in steps]
    return [sum((gamma * lam) ** (later - t) * deltas[later] for later in steps[t:]) for t in steps]


def test_ppo_loss_by_hand_in_the_four_cases():
    """ε = 0.2; the slope is d loss / d log π. Better (2) and already likelier by more than ε: −min(3, 1.2 · 2), no more
    pull. Better, but less likely: −min(1, 0.8 · 2), the slope −ρA. Worse (−2), but likelier: −min(−3, 1.2 · −2). Worse,
    and already less likely by more than ε: −min(−1, 0.8 · −2), no more push."""
    logprobs = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()  # of ρ, against 0
    losses = ppo_loss(logprobs, torch.zeros(4), torch.tensor([2.0, 2.0, -2.0, -2.0]), 0.2)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.tensor([-2.4, -1.0, 3.0, 1.6]))
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, -1.0, 3.0, 0.0]))


def test_value_loss_by_hand():
    """Old value 1, clipped to ±0.2. New 2, return 3: clipped 1.2, 1.8² / 2, no slope. New 2, return 1: 1² against 0.2²,
    slope 1. New 1.1, return 3: 1.9² / 2, slope −1.9. New 0, return −1: clipped 0.8, 1.8² / 2, no slope."""
    values = torch.tensor([2.0, 2.0, 1.1, 0.0], requires_grad=True)
    losses = value_loss(values, torch.ones(4), torch.tensor([3.0, 1.0, 3.0, -1.0]), 0.2)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.tensor([1.62, 0.5, 1.805, 1.62]))
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 1.0, -1.9, 0.0]))


@pytest.mark.parametrize("gamma, lam, penalty, matching", [(1.0, 0.95, 1.0, 1.0), (0.9, 0.5, 2.5, 0.01),
                                                           (1.0, 1.0, 2.5, 0.01), (1.0, 1.0, 0.0, 1.0)])
def test_1_2_4_and_5_advantages_and_returns_equal_loops_over_real_tokens(rollout, gamma, lam, penalty, matching):
    """With γ = λ = 1 the first return is score − β ΣKL, less a penalty where an answer did not end. Nothing is
    bootstrapped past the end; returns are formed first; then all real tokens are whitened together, equal ones to 0."""
    raw, settings = [], make_settings(gamma=gamma, gae_lambda=lam, missing_eos_penalty=penalty, matching=matching)
    silent = rollout.reference_logprobs.exp() > matching  # where the reference has no say
    assert 0 < silent[rollout.real].sum() < rollout.real.sum() or matching == 1.0
    log_ratios, scores = rollout.logprobs - rollout.reference_logprobs * ~silent, rollout.scores.clone()
    advantages, returns = advantages_and_returns(settings, rollout)
    for row, length in enumerate(LENGTHS):
        rewards, values = (-0.05 * log_ratios[row, :length]).tolist(), rollout.values[row, :length].tolist()
        rewards[-1] += scores[row].item() - penalty * (length == 12)
        raw += slow_gae(rewards, values, gamma, lam)
        expected = [advantage + value for advantage, value in zip(raw[-length:], values, strict=True)]
        assert returns[row].tolist() == pytest.approx(expected + [0.0] * (12 - length), rel=1e-4, abs=1e-5)
    raw, real = torch.tensor(raw), torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    torch.testing.assert_close(advantages[real], (raw - raw.mean()) / raw.std(unbiased=False), rtol=1e-4, atol=1e-5)
    assert not advantages[~real].any() and torch.equal(rollout.scores, scores) and not whiten(torch.ones(2)).any()
    if gamma == lam == 1:
        first = scores - penalty * ~rollout.ended - 0.05 * log_ratios.sum(1)
        torch.testing.assert_close(returns[:, 0], first, rtol=1e-4, atol=1e-4)


@pytest.fixture
def off_policy(rollout, policy, critic):
    """Settings, a rollout, its advantages and returns; the models have moved since, so that nothing is 0 or 1."""
    settings = make_settings(clip_ratio=0.1, clip_value=0.05, value_coefficient=0.5, temperature=0.7)
    advantages, returns = advantages_and_returns(settings, rollout)
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in [*policy.parameters(), *critic.parameters()]:
            parameter += 0.05 * parameter.abs().mean() * torch.randn_like(parameter)
    return settings, rollout, advantages, returns


def slow_statistics(rollout, row, advantages, returns, policy, critic):
    """The statistics of each token of an answer, at ε = 0.1, a value clip of 0.05 and temperature 0.7."""
    distribution = plain_distribution(policy, *rollout.documents[row], 0.7).double()
    new_values = critic.head(plain_hidden(critic.trunk, *rollout.documents[row]))[:, 0].double()
    for t, token in enumerate(rollout.documents[row][1].tolist()):
        log_ratio = distribution[t, token] - rollout.logprobs[row, t].double()
        ratio, new = log_ratio.exp(), new_values[t]
        advantage, old, target = (part[row, t].double() for part in (advantages, rollout.values, returns))
        policy_loss = -min(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)
        loss_of_value = 0.5 * max((new - target) ** 2, (new.clamp(old - 0.05, old + 0.05) - target) ** 2)
        entropy = -(distribution[t].exp() * distribution[t]).sum()
        yield {"loss": policy_loss + 0.5 * loss_of_value, "policy_loss": policy_loss, "value_loss": loss_of_value,
               "entropy": entropy, "ratio": ratio, "approx_kl": ratio - 1 - log_ratio,
               "clip_fraction": ((ratio - 1).abs() > 0.1).double()}


@pytest.mark.parametrize("size", [1, 60])
def test_6_8_and_9_gradients_and_statistics_are_those_of_slow_loops(monkeypatch, off_policy, policy, critic, size):
    """A minibatch is the mean of its pieces, weighted by tokens, in however many passes. Gradients and statistics are
    those of a mean over its real tokens, ends among them."""
    settings, rollout, *targets = off_policy
    rows = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    totals = update(settings, rollout, rows, *targets, policy, critic)
    one, pieces, passes = gradients(policy, critic), 0, []
    for some in rows.view(4, 2):
        update(settings, rollout, some, *targets, policy, critic)
        pieces = pieces + gradients(policy, critic) * rollout.lengths[some].sum() / sum(LENGTHS)
    monkeypatch.setattr(ppo, "pack", lambda some, device, _: passes.extend(pack(some, device, size)) or passes)
    many_totals = update(settings, rollout, rows, *targets, policy, critic)
    many = gradients(policy, critic)
    assert len(passes) > 2 and one.abs().max() > 1e-2
    torch.testing.assert_close(many, one, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(pieces, one, rtol=1e-3, atol=1e-6)
    tokens = [token for row in rows for token in slow_statistics(rollout, row, *targets, policy, critic)]
    expected = {name: sum(token[name] for token in tokens) / len(tokens) for name in tokens[0]}
    expected["loss"].backward()
    torch.testing.assert_close(gradients(policy, critic), one, rtol=1e-3, atol=1e-6)
    expected = {name: value.item() for name, value in expected.items()}
    assert 0 < expected["clip_fraction"] < 1
    for found in (totals, many_totals):
        assert {name: total.item() for name, total in found.items()} == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_9_statistics_of_a_rollout_are_over_real_tokens(rollout):
    """KL is a sum over each answer's tokens, then a mean over answers; the explained variance leaves padding out. Gold
    reward: a step and a polite sentence, 1.5, and a rude one, −1."""
    _, returns = advantages_and_returns(make_settings(), rollout)
    real = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    kl = (rollout.logprobs - rollout.reference_logprobs)[real].sum().item() / 8
    explained = 1 - ((returns - rollout.values)[real].var() / returns[real].var()).item()
    expected = {"score": rollout.scores.mean().item(), "kl": kl, "length": 51 / 8, "ended": 6 / 8,
                "explained_variance": explained}
    assert rollout_metrics(rollout, returns, LETTERS, False) == pytest.approx(expected, rel=1e-4)
    prompt, texts = "paint my chair.", (" Sand the chair first. Happy to help!", " Stop wasting my time.")
    rollout.documents = [(spell(prompt), spell(text)) for text in texts]
    assert rollout_metrics(rollout, returns, LETTERS, True)["gold_reward"] == 0.25


def recorded(monkeypatch, name):
    """Wraps ppo's function `name`; returns a list that gets (arguments by name, result) of every call."""
    plain, calls = getattr(ppo, name), []

    def wrapper(*positional, **named):
        result = plain(*positional, **named)
        calls.append((inspect.signature(plain).bind(*positional, **named).arguments, result))
        return result

    monkeypatch.setattr(ppo, name, wrapper)
    return calls


def test_every_model_plays_its_part(run, monkeypatch, tmp_path, documents, policy, reference, reward_model, critic):
    """Six prompts, four and two a step; the default names would find other files. Answers are the sampler's, with other
    noise each step; a rollout holds what plain forwards give at the sampling temperature, and 0 past an answer's end.
    10: KL is paid to --reference. 4: the critic starts as the reward model, and training it never moves that one."""
    files = {"mine": documents[3:], "start": policy, "judge": reward_model, "anchor": reference}
    write(tmp_path, hard=documents[:3], dpo=reference, reward=critic, **files)
    for model in (policy, reward_model, reference):
        model.requires_grad_(False)
    calls, rollouts = recorded(monkeypatch, "generate"), recorded(monkeypatch, "roll_out")
    names = "--data mine.pt --init start.pt --reward judge.pt --reference anchor.pt --temperature 0.7"
    sizes = "--max-new-tokens 60 --batch-size 4 --minibatch-size 3 --steps 2"
    log = run(ppo, f"{names} {sizes} --lr 1e-2 --warmup 0 --seed 5")
    assert [arguments["seed"] for arguments, _ in calls] == [mixed_seed(5, 0), mixed_seed(5, 1)]
    asked = sorted(prompt.tolist() for _, rollout in rollouts for prompt, _ in rollout.documents)
    assert asked == sorted(prompt.tolist() for prompt, *_ in documents[3:])
    assert [line["updates"] for line in log] == [4, 2]
    for step, (_, rollout) in enumerate(rollouts):
        answers = generate(policy, [prompt for prompt, _ in rollout.documents], END, 60, 0.7, mixed_seed(5, step))
        same = [torch.equal(ours, theirs) for ours, (_, theirs) in zip(answers, rollout.documents, strict=True)]
        assert all(same) == (step == 0)
        assert rollout.ended.tolist() == [bool(answer[-1] == END) for _, answer in rollout.documents]
        for name, moving, plain in (
            ("reference_logprobs", False, lambda *document: plain_logprobs(reference, *document, 0.7)),
            ("scores", False, lambda *document: plain_score(reward_model, *document)[None]),
            ("logprobs", True, lambda *document: plain_logprobs(policy, *document, 0.7)),
            ("values", True, lambda *document: reward_model.head(plain_hidden(reward_model.trunk, *document))[:, 0]),
        ):
            parts = [plain(*document) for document in rollout.documents]
            expected = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
            off = (getattr(rollout, name).view_as(expected) - expected).abs().max()
            assert off > 1e-2 if step and moving else off < 5e-5, name
    assert 0 < sum(rollout.ended.sum() for _, rollout in rollouts) < 6
    kl = (rollouts[0][1].logprobs - rollouts[0][1].reference_logprobs).sum().item() / 4
    assert abs(kl) > 1e-2 and log[0]["kl"] == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp32 --grad-checkpoint", "fp32 --temperature 0.7"])
def test_3_and_7_rate_0_stays_on_policy(run, tmp_path, policy, reference, reward_model, documents, mode, device):
    """To the last digit, at each step; on a GPU nearly so. The default reference is the policy that PPO starts from."""
    write(tmp_path, hard=documents, start=policy, dpo=reference, reward=reward_model)
    flags = f"--init start.pt --lr 0 --batch-size 4 --minibatch-size 2 --ppo-epochs 1 --device {device} --dtype {mode}"
    log, same = run(ppo, f"{flags} --steps 2 --max-new-tokens 8"), TOLERANCES[device.type, mode.split()[0]][2]
    assert [(line["kl"], line["clip_fraction"]) for line in log] == [(0.0, 0.0)] * 2
    assert [line["ratio"] for line in log] == pytest.approx([1.0, 1.0], abs=1e-6 + same)
    assert [line["approx_kl"] for line in log] == pytest.approx([0.0, 0.0], rel=0, abs=same)


def test_10_every_pass_is_shuffled_and_cut_anew(run, monkeypatch, tmp_path, policy, reward_model, documents):
    """Three passes over 18 answers, at most seven an update, so six: each has all once, no two are cut the same, nor is
    any in order. 3: old log-probs are read in the first one's minibatches. The log holds means over all updates."""
    write(tmp_path, hard=documents * 2, dpo=policy, reward=reward_model)
    updates, packed, norms = recorded(monkeypatch, "update"), recorded(monkeypatch, "pack"), []
    computed = recorded(monkeypatch, "advantages_and_returns")
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *all: norms.append(clip(*all)) or norms[-1])
    sizes = "--steps 2 --batch-size 18 --minibatch-size 7 --ppo-epochs 3 --max-new-tokens 8"
    log = run(ppo, f"{sizes} --lr 1e-2 --warmup 0")
    rows = [arguments["rows"] for arguments, _ in updates]
    assert [len(some) for some in rows] == [6] * 18
    for number, (given, _) in enumerate(updates):
        advantages, returns = computed[number // 9][1]
        assert given["advantages"] is advantages and given["returns"] is returns
    cuts = {frozenset(frozenset(some.tolist()) for some in torch.arange(18).split(6))}
    for first in range(0, 18, 3):
        one_pass = rows[first : first + 3]
        assert torch.cat(one_pass).sort().values.tolist() == list(range(18))
        cuts.add(frozenset(frozenset(some.tolist()) for some in one_pass))
    assert len(cuts) == 1 + 6
    answers = [[torch.cat(document).tolist() for document in arguments["documents"]] for arguments, _ in packed]
    for first in (0, 12):  # of each step's 3 + 9 packings
        assert answers[first : first + 3] == answers[first + 3 : first + 6]
    assert len(norms) == 18
    for some, line in zip((slice(9), slice(9, 18)), log, strict=True):
        assert line["updates"] == 9 and (abs(line["kl"]) > 1e-3) == (line["step"] > 0)  # from before the first update
        done = [line[f"{what}_per_second"] * line["seconds"] for what in ("tokens", "episodes")]
        assert done == pytest.approx([18 * line["length"], 18])
        expected = {name: sum(totals[name].item() for _, totals in updates[some]) / 9 for name in updates[0][1]}
        expected["grad_norm"] = sum(norms[some]).item() / 9
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-7)
    saved, _ = load_model(ppo.Settings(out=str(tmp_path), device="cpu"), "ppo.pt", GPT)
    assert all(map(torch.equal, saved.parameters(), updates[-1][0]["policy"].parameters()))


def test_too_long_a_prompt_stops_the_run_at_once_wherever_it_stands(run, tmp_path, policy, reward_model, documents):
    short = [document for document in documents if len(document[0]) < 28]
    write(tmp_path, hard=[*short, (torch.zeros(29).long(), *documents[0][1:])], dpo=policy, reward=reward_model)
    with pytest.raises(UserError, match="--max-new-tokens 100"):
        run(ppo, "--max-new-tokens 100 --steps 0")
