"""Chapter 2: the reward model's loss, where it reads the score, and the numbers of its report."""

import math
import re

import pytest
import torch

from model import GPT, Config, Pairs, pack
from reward import RewardModel, bradley_terry_loss, ranking_accuracy, report, score_pairs, wilson_interval

CPU = torch.device("cpu")


def plain_score(model, *parts):
    """The head on the last hidden state of one sequence, with nothing packed and an ordinary causal mask."""
    tokens = torch.cat(parts)[None]
    length = tokens.shape[1]
    mask = [(length, torch.ones(length, length, dtype=torch.bool).tril())]
    return model.head(model.trunk(tokens, torch.arange(length)[None], mask)[0, -1])[0]


def packed_scores(model, documents):
    """Scores [documents, branches] in the order of the documents."""
    scores = torch.empty(len(documents), len(documents[0]) - 1)
    for batch in pack(documents, CPU):
        scores[batch.members] = model.score(batch).view(-1, scores.shape[1])
    return scores


def make_pairs(documents):
    tokens = torch.cat([torch.cat(document) for document in documents]).int()
    lengths = torch.tensor([[len(part) for part in document] for document in documents])
    return Pairs(tokens, lengths, None, "made up")


def test_bradley_terry_loss_by_hand():
    """Gap 0: −ln σ(0) = ln 2. Gap ln 3: σ = 1 / (1 + 1/3) = 3/4, so ln 4/3; gap −ln 3: σ = 1/4, so ln 4."""
    chosen = torch.tensor([5.0, 1.0 + math.log(3), 1.0])
    rejected = torch.tensor([5.0, 1.0, 1.0 + math.log(3)])
    expected = torch.tensor([math.log(2), math.log(4 / 3), math.log(4)])
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected), expected)


def test_bradley_terry_loss_is_finite_at_large_gaps():
    """The naive log(sigmoid) would be −inf at a gap of −10000; the loss there is the gap itself, its slope −1."""
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    losses = bradley_terry_loss(chosen, torch.zeros(2))
    assert losses.tolist() == [0.0, 1e4]
    losses.sum().backward()
    assert chosen.grad.tolist() == [0.0, -1.0]


def test_bradley_terry_loss_and_gradient_equal_the_formula_in_float64():
    torch.manual_seed(0)
    rewards = torch.randn(50, 2) * 4
    ours, exact = rewards.clone().requires_grad_(), rewards.double().requires_grad_()
    losses = bradley_terry_loss(ours[:, 0], ours[:, 1])
    expected = -(1 / (1 + (-(exact[:, 0] - exact[:, 1])).exp())).log()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    losses.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_score_is_read_at_the_last_token_of_each_response(reward_model, documents):
    expected = [[plain_score(reward_model, prompt, side) for side in sides] for prompt, *sides in documents]
    torch.testing.assert_close(packed_scores(reward_model, documents), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_score_is_the_same_among_strangers_alone_and_with_its_sibling(reward_model, documents):
    among_strangers = packed_scores(reward_model, documents)
    for index, (prompt, chosen, rejected) in enumerate(documents):
        with_sibling = packed_scores(reward_model, [(prompt, chosen, rejected)])[0]
        swapped = packed_scores(reward_model, [(prompt, rejected, chosen)])[0].flip(0)
        alone = torch.cat([packed_scores(reward_model, [(prompt, side)])[0] for side in (chosen, rejected)])
        for scores in (with_sibling, swapped, alone):
            torch.testing.assert_close(scores, among_strangers[index], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_constant_shift_of_the_rewards_changes_no_loss(reward_model, documents):
    before = packed_scores(reward_model, documents)
    reward_model.head.bias += 3.0
    after = packed_scores(reward_model, documents)
    torch.testing.assert_close(after, before + 3.0)
    torch.testing.assert_close(bradley_terry_loss(*after.T), bradley_terry_loss(*before.T), rtol=1e-4, atol=1e-5)


def test_loss_gradient_does_not_depend_on_the_packing(reward_model, documents):
    gradients = []
    for groups in ([documents], [[document] for document in documents]):
        reward_model.zero_grad()
        for group in groups:
            for batch in pack(group, CPU):
                scores = reward_model.score(batch).view(-1, 2)
                (bradley_terry_loss(*scores.T).sum() / len(documents)).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in reward_model.parameters()]))
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_score_pairs_puts_the_rewards_back_in_the_pairs_order(reward_model, documents):
    (batch,) = pack(documents, CPU)
    assert batch.members.tolist() != list(range(9))  # packing has reordered them: there is something to put back
    expected = [[plain_score(reward_model, prompt, side) for side in sides] for prompt, *sides in documents]
    rewards = score_pairs(reward_model, make_pairs(documents), CPU)
    torch.testing.assert_close(rewards, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_ranking_accuracy_counts_a_tie_one_half():
    """Right, wrong, tie, right: (1 + 0 + 0.5 + 1) / 4."""
    rewards = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0], [0.0, -1.0]])
    assert ranking_accuracy(rewards) == 0.625


def test_wilson_interval_by_hand():
    """8 of 10, z = 1.96, z² = 3.8416: centre (0.8 + 0.19208) / 1.38416 = 0.71674,
    half 1.96 / 1.38416 · √(0.016 + 0.009604) = 0.22658: from 0.490 to 0.943. None of 10: 0 to z² / (10 + z²)."""
    assert wilson_interval(0.8, 10) == pytest.approx((0.49016, 0.94332), abs=2e-5)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 3.8416 / 13.8416), abs=1e-12)
    assert wilson_interval(0.0, 1)[0] == 0.0 and wilson_interval(1.0, 5)[1] == 1.0  # not −0%, not above


def test_initial_head_has_standard_deviation_one_over_root_dim_plus_one():
    """At dim 3 that is 0.5, well away from 1/√3 = 0.577; 1800 weights tell it to 1.7%."""
    torch.manual_seed(0)
    heads = [RewardModel(GPT(Config(2, 3, 0, 1, 1, 1, 8))).head for _ in range(600)]
    weights = torch.cat([head.weight.detach().flatten() for head in heads])
    assert weights.std().item() == pytest.approx(0.5, rel=0.06)
    assert abs(weights.mean().item()) < 0.05
    assert all(head.bias.item() == 0 for head in heads)


def calibration_lines(rewards, capsys):
    """(predicted %, observed %, pairs) of each line of the calibration table."""
    report(rewards, None)
    found = re.findall(r"predicted (\d+)%, observed (\d+)% .*?(\d+) pairs", capsys.readouterr().out)
    return [tuple(map(int, line)) for line in found]


def test_calibration_by_hand(capsys):
    """Gaps ±ln 3: the first side is predicted with 3/4, and three of four are right. Gap ln 9: 9/10, one of one."""
    gaps = torch.tensor([3.0, 3.0, 1 / 3, 3.0, 9.001]).log()
    assert calibration_lines(torch.stack((gaps, torch.zeros(5)), 1), capsys) == [(75, 75, 4), (90, 100, 1)]


def test_calibration_counts_every_pair(capsys):
    """A gap of 30 is a probability of 1 in fp32, and belongs to the last bin."""
    gaps = torch.tensor([0.1, 0.7, 1.0, 2.0, 5.0, 30.0, -30.0])
    lines = calibration_lines(torch.stack((gaps, torch.zeros(7)), 1), capsys)
    assert sum(count for _, _, count in lines) == 7


def test_calibration_counts_a_tie_one_half(capsys):
    """As the accuracy does: a model that gives all the same reward predicts 50%, and 50% is seen."""
    assert calibration_lines(torch.ones(4, 2), capsys) == [(50, 50, 4)]
