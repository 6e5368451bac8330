"""Chapter 2: the reward model's loss, where it reads the score, and the numbers of its report."""

import json
import math
import re

import pytest
import torch
from conftest import TINY

import reward
from model import GPT, Config, Pairs, Tokenizer, UserError, load_model, pack, save_model
from reward import RewardModel, bradley_terry_loss, ranking_accuracy, report, score_pairs, wilson_interval

CPU = torch.device("cpu")
BYTES = Tokenizer([chr(byte) for byte in range(TINY.vocabulary - 1)], ".", {"<end>": TINY.vocabulary - 1}, 96)


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
    return Pairs(tokens, lengths, BYTES, "made up")


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


def test_rewards_that_are_not_finite_are_refused_with_the_pairs_numbers(reward_model, documents):
    """An infinite embedding of a token that pairs 1 and 2 alone hold."""
    tokens = [set(torch.cat(document).tolist()) for document in documents]
    (only, *_) = (tokens[1] & tokens[2]).difference(*tokens[:1], *tokens[3:])
    with torch.no_grad():
        reward_model.trunk.embedding.weight[only] = math.inf
    with pytest.raises(UserError, match=r"\b1 2\b"):
        score_pairs(reward_model, make_pairs(documents), CPU)


# The loop


def write_inputs(folder, policy, documents, data="pairs.pt", test="test.pt", init="sft.pt"):
    """The pairs; four of them as held-back ones, the first with its label the wrong way round; and a policy."""
    settings = reward.Settings(out=str(folder), save=init)
    make_pairs(documents).save(settings, data)
    prompt, chosen, rejected = documents[0]
    make_pairs([(prompt, rejected, chosen), *documents[1:4]]).save(settings, test)
    save_model(settings, policy, BYTES)


def run_reward(monkeypatch, folder, *flags):
    """Runs the command; returns the lines of its log, and the reward model that it saved."""
    files = "--data mine.pt --test held.pt --init start.pt --batch-size 9 --warmup 0 --decay constant".split()
    monkeypatch.setattr("sys.argv", ["reward.py", "--out", str(folder), "--device", "cpu", *files, *flags])
    reward.main()
    log = [json.loads(line) for line in (folder / "reward.jsonl").read_text().splitlines()]
    return log, load_model(reward.Settings(out=str(folder), device="cpu"), "reward.pt", RewardModel)[0]


def test_the_command_equals_a_plain_loop(monkeypatch, tmp_path, capsys, policy, documents):
    """Three steps on all nine pairs, each in several passes, from the weights that a run at rate 0 shows: the log, the
    model that is saved, its mean and the report. The files that the default names would find are others."""
    torch.manual_seed(7)
    write_inputs(tmp_path, GPT(TINY), documents[:4])
    write_inputs(tmp_path, policy, documents, "mine.pt", "held.pt", "start.pt")
    monkeypatch.setattr(reward, "pack", lambda some, device: pack(some, device, 150))
    assert len(list(pack(documents, CPU, 150))) > 1
    _, model = run_reward(monkeypatch, tmp_path, "--lr", "0", "--steps", "1")
    for ours, theirs in zip(model.trunk.parameters(), policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    log, saved = run_reward(monkeypatch, tmp_path, "--lr", "1e-3", "--steps", "3")
    printed = capsys.readouterr().out

    def plain_rewards():
        rewards = [plain_score(model, prompt, side) for prompt, *sides in documents for side in sides]
        return torch.stack(rewards).view(9, 2)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    assert len(log) == 3
    for line in log:
        gaps = plain_rewards() @ torch.tensor([1.0, -1.0])
        loss = -gaps.sigmoid().log().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        expected = {"loss": loss.item(), "accuracy": (gaps > 0).float().mean().item(), "grad_norm": norm.item()}
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)
        seen = line["tokens_per_second"] * line["seconds"]
        assert seen == pytest.approx(sum(len(part) for document in documents for part in document))
        optimizer.step()
        optimizer.zero_grad()
    assert log[0]["accuracy"] not in (0.0, 0.5, 1.0)
    with torch.no_grad():
        rewards = plain_rewards()
    found = score_pairs(saved, make_pairs(documents), CPU)
    assert found.mean().item() == pytest.approx(0.0, abs=1e-4)
    torch.testing.assert_close(found, rewards - rewards.mean(), rtol=1e-2, atol=1e-2)
    assert (found[:4, 0] > found[:4, 1]).all()
    assert re.findall(r"test accuracy (.*?)% .*, (\d+) pairs", printed)[-1] == ("75.0", "4")


def test_the_seed_makes_the_head(monkeypatch, tmp_path, policy, documents):
    write_inputs(tmp_path, policy, documents, "mine.pt", "held.pt", "start.pt")
    heads = []
    for seed in "335":
        torch.manual_seed(len(heads))
        _, model = run_reward(monkeypatch, tmp_path, "--lr", "0", "--steps", "1", "--seed", seed)
        heads.append(model.head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
