"""Chapter 2: the reward model's loss, where it reads the score, the numbers of its report, and the command."""

import math
import re

import pytest
import torch
from conftest import CPU, TINY, TOLERANCES, make_pairs, plain_rewards, write

import reward
from model import GPT, Config, UserError, load_model, pack
from reward import RewardModel, bradley_terry_loss, calibration, score_pairs, wilson_interval


def test_bradley_terry_loss_and_its_slope_by_hand():
    """Gap 0: −ln σ(0) = ln 2. Gap ln 3: σ = 1 / (1 + 1/3) = 3/4, so ln 4/3; gap −ln 3: σ = 1/4, so ln 4. At a gap of
    −10000, where log(sigmoid) would be −inf, it is the gap itself. The slope is σ − 1."""
    gaps = torch.tensor([0.0, math.log(3), -math.log(3), 1e4, -1e4], requires_grad=True)
    losses = bradley_terry_loss(gaps + 5, torch.full((5,), 5.0))
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.tensor([math.log(2), math.log(4 / 3), math.log(4), 0, 1e4]))
    torch.testing.assert_close(gaps.grad, torch.tensor([-0.5, -0.25, -0.75, 0, -1]))


@torch.no_grad()
def test_score_is_the_same_among_strangers_alone_and_with_its_sibling(reward_model, documents, device):
    """And is the head, its bias too, on the response's last token. score_pairs gives the pairs' own order back."""
    reward_model.head.bias += 3.0
    expected, near = plain_rewards(reward_model, documents), TOLERANCES[device.type, "fp32"][0]
    reward_model.to(device)
    (batch,) = pack(documents, device)
    assert batch.members.tolist() != list(range(9))  # packing has reordered them: there is something to put back
    swapped = [(prompt, rejected, chosen) for prompt, chosen, rejected in documents]
    alone = [(prompt, side) for prompt, *sides in documents for side in sides]
    alone = torch.cat([reward_model.score(batch) for one in alone for batch in pack([one], device)]).view(9, 2)
    more = [(*document, document[1]) for document in documents]  # any number of branches
    scored = [score_pairs(reward_model, some, device) for some in (more, make_pairs(documents), make_pairs(swapped))]
    for scores in (scored[0][:, :2], scored[0][:, [2, 1]], scored[1], scored[2].flip(1), alone):
        torch.testing.assert_close(scores.cpu(), expected, rtol=10 * near, atol=near)


def test_rewards_that_are_not_finite_are_refused_with_the_first_pairs_numbers(reward_model, documents):
    """An infinite embedding of a token that pairs 1 and 2 alone hold."""
    tokens = [set(torch.cat(document).tolist()) for document in documents]
    (only, *_) = (tokens[1] & tokens[2]).difference(*tokens[:1], *tokens[3:])
    with torch.no_grad():
        reward_model.trunk.embedding.weight[only] = math.inf
    with pytest.raises(UserError, match=r"of 12 pairs .* \[1, 2(, \d+){8}\]"):
        score_pairs(reward_model, make_pairs(documents * 6), CPU)


def test_initial_head_has_standard_deviation_one_over_root_dim_plus_one():
    """At dim 3 that is 0.5, well away from 1/√3 = 0.577; 1800 weights tell it to 1.7%."""
    torch.manual_seed(0)
    heads = [RewardModel(GPT(Config(2, 3, 0, 1, 1, 1, 8))).head for _ in range(600)]
    weights = torch.cat([head.weight.detach().flatten() for head in heads])
    assert weights.std().item() == pytest.approx(0.5, rel=0.06) and abs(weights.mean().item()) < 0.05
    assert all(head.bias.item() == 0 for head in heads)


def test_wilson_interval_by_hand():
    """8 of 10, z = 1.96, z² = 3.8416: centre (0.8 + 0.19208) / 1.38416 = 0.71674,
    half 1.96 / 1.38416 · √(0.016 + 0.009604) = 0.22658: from 0.490 to 0.943. None of 10: 0 to z² / (10 + z²)."""
    assert wilson_interval(0.8, 10) == pytest.approx((0.49016, 0.94332), abs=2e-5)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 3.8416 / 13.8416), abs=1e-12)
    assert wilson_interval(0.0, 1)[0] == 0.0 and wilson_interval(1.0, 5)[1] == 1.0  # not −0%, not above


@pytest.mark.parametrize("odds, table", [
    ([3.0, 3.0, 1 / 3, 3.0, 9.001], [(0.75, 0.75, 4), (0.9, 1.0, 1)]),  # at 3 to 1 three of four are right
    ([1.0, 1.0], [(0.5, 0.5, 2)]),  # a tie counts one half
    ([math.exp(30), 17 / 3, math.exp(-30)], [(0.85, 1.0, 1), (1.0, 0.5, 2)]),  # 1 in fp32 belongs to the last bin
])
def test_calibration_by_hand(odds, table):
    gaps = torch.tensor(odds).log()
    for line, expected in zip(calibration(torch.stack((gaps, 0 * gaps), 1)), table, strict=True):
        assert line == pytest.approx(expected, abs=1e-4)


def test_report_by_hand(capsys):
    """Three of four right; gold is right on one, wrong on two, and does not know the fourth."""
    reward.report(torch.tensor([[1.0, 0]] * 3 + [[0, 1.0]]), torch.tensor([[1.0, 0], [0, 0], [0, 1], [0, 1]]))
    said = capsys.readouterr().out
    assert "75.0% (95% interval 30.1% to 95.4%, 4 pairs)" in said and "itself scores 37.5% on" in said
    assert "predicted 73%, observed 75% (30% to 95%, 4 pairs)" in said


def test_the_command_equals_a_plain_loop(run, tmp_path, capsys, policy, documents):
    """Three steps on all nine pairs, less than a batch, each in several passes, from the weights that a run at rate 0
    shows: the log, the model that is saved, its mean and accuracy. The files of the default names are others."""
    prompt, chosen, rejected = documents[0]
    held = [(prompt, rejected, chosen), *documents[1:4]]  # the first with its label the wrong way round
    start = GPT(Config(**vars(TINY) | {"tied": False}))  # its head takes no part in rewards, and does not stay
    start.load_state_dict(policy.state_dict(), strict=False)
    files = {"mine": documents[:3], "more": documents[3:], "held": held, "start": start}  # AIHF: both in one loss
    write(tmp_path, pairs=documents[:4], test=documents[:4], sft=GPT(TINY), **files)
    assert len(list(pack(documents, CPU, 150))) > 1
    flags = "--data mine.pt+more.pt --test held.pt --init start.pt --batch-size 12 --warmup 0 --decay constant "
    flags, settings = flags + "--pass-tokens 150 ", reward.Settings(out=str(tmp_path), device="cpu")
    run(reward, flags + "--lr 0 --steps 1")
    model, _ = load_model(settings, "reward.pt", RewardModel)
    for ours, theirs in zip(model.trunk.parameters(), policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    log = run(reward, flags + "--lr 1e-3 --steps 3")
    printed = capsys.readouterr().out
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    assert len(log) == 3
    for line in log:
        gaps = plain_rewards(model, documents) @ torch.tensor([1.0, -1.0])
        loss = -gaps.sigmoid().log().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        expected = {"loss": loss.item(), "accuracy": (gaps > 0).float().mean().item(), "grad_norm": norm.item()}
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)
        done = [line[f"{what}_per_second"] * line["seconds"] for what in ("tokens", "pairs")]
        assert done == pytest.approx([len(make_pairs(documents).tokens), 9])
        optimizer.step()
        optimizer.zero_grad()
    assert log[0]["accuracy"] not in (0.0, 0.5, 1.0)
    rewards = plain_rewards(model, documents).detach()
    found = score_pairs(load_model(settings, "reward.pt", RewardModel)[0], make_pairs(documents), CPU)
    assert found.mean().item() == pytest.approx(0.0, abs=1e-4)
    torch.testing.assert_close(found, rewards - rewards.mean(), rtol=1e-2, atol=1e-2)
    assert (found[:4, 0] > found[:4, 1]).all()
    assert re.findall(r"test accuracy (.*?)% .*, (\d+) pairs", printed)[-1] == ("75.0", "4")
