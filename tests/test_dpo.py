"""Chapter 4: DPO's loss, the log-probs that it is made of, and the command against a plain loop."""

import math

import pytest
import torch
from conftest import CPU, TOLERANCES, plain_logprobs, tiny, write

import dpo
from dpo import dpo_loss
from model import GPT, load_model, pack

LN = {number: math.log(number) for number in (2, 3, 4)}


def plain_sides(policy, documents, mean=False):
    """log π of each response, or its mean over tokens: [documents, 2]."""
    sides = [plain_logprobs(policy, prompt, side) for prompt, *sides in documents for side in sides]
    return torch.stack([side.mean() if mean else side.sum() for side in sides]).view(-1, 2)


@pytest.mark.parametrize("margin, beta, options, loss, slope", [
    (0.0, 0.1, (), LN[2], -0.05), (0.0, 0.1, ("sigmoid", 0.3), LN[2], -0.02),  # at log-ratios of 0, smoothed or not
    (2 * LN[3], 0.5, (), LN[4] - LN[3], -0.125), (-2 * LN[3], 0.5, (), LN[4], -0.375),  # σ(±ln 3) = 3/4 and 1/4
    (2 * LN[3], 0.5, ("sigmoid", 0.25), LN[4] - 0.75 * LN[3], 0.0),  # 3/4 ln 4/3 + 1/4 ln 4, the least there is
    (5.0, 0.25, ("ipo",), 9.0, 6.0), (-1.0, 0.25, ("ipo",), 9.0, -6.0),  # m should be 1 / (2 β) = 2
    (0.0, 0.1, ("linear",), 0.0, -0.1), (3.0, 0.25, ("linear",), -0.75, -0.25),  # IRFT: first, twice DPO's slope
    (0.0, 0.1, ("sigmoid", 0.0, 0.5), 1.5 * LN[2], -0.05),  # SAIL-DP; at z = 1, −ln σ + H and σ − 1 − σ (1 − σ):
    (2.0, 0.5, ("sigmoid", 0.0, 1.0), 0.313262 + 0.582203, (-0.268941 - 0.196612) / 2),
])
def test_loss_and_slope_by_hand(margin, beta, options, loss, slope):
    """Only the margin counts: chosen and rejected log-ratios may both be higher by 1."""
    chosen = torch.tensor([margin + 1.0], requires_grad=True)
    found = dpo_loss(chosen, torch.tensor([1.0]), beta, *options)
    found.backward()
    assert (found.item(), chosen.grad.item()) == pytest.approx((loss, slope), abs=2e-6)


@pytest.mark.parametrize("flags", ["--label-smoothing 0.2 --self-weight 0.5 --reference sft.pt", "--loss ipo"])
def test_the_command_equals_a_plain_loop(run, tmp_path, policy, documents, flags, capsys):
    """Three steps on all nine pairs, in several passes each; a batch could be more. Default names find other files."""
    mean, beta, other = "ipo" in flags, 0.3, tiny(7)
    held_back = [documents[0], *((prompt, two, one) for prompt, one, two in documents[1:4])]  # 3 the wrong way
    write(tmp_path, mine=documents, start=policy, easy=documents[:3], sft=other, test=held_back)
    assert len(list(pack(documents, CPU, 150))) > 1
    flags += " --data mine.pt --init start.pt --batch-size 12 --pass-tokens 150 --steps 3 --beta 0.3"
    log = run(dpo, f"{flags} --lr 1e-3 --warmup 0 --decay constant")
    anchor = other if "--reference" in flags else policy
    reference, start = (plain_sides(one, documents, mean).detach() for one in (anchor, policy))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    assert len(log) == 3
    for line in log:
        logprobs = plain_sides(policy, documents, mean)
        rewards = beta * (logprobs - reference)
        margins = rewards[:, 0] - rewards[:, 1]
        likely = margins.sigmoid()
        losses = -(0.8 + 0.5 * likely) * likely.log() - (0.2 + 0.5 * (1 - likely)) * (1 - likely).log()
        losses = (margins / beta - 1 / (2 * beta)) ** 2 if mean else losses
        losses.mean().backward()
        expected = {"loss": losses.mean(), "margin": margins.mean(), "accuracy": margins.sign().mean() / 2 + 0.5}
        expected["pairs_per_second"] = torch.tensor(9 / line["seconds"])
        for side, name in enumerate(("chosen", "rejected")):
            expected[f"{name}_logprobs"] = logprobs[:, side].mean()
            expected[f"{name}_rewards"] = rewards[:, side].mean()
            expected[f"{name}_length"] = torch.tensor([len(one[1 + side]) for one in documents]).float().mean()
        expected["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for name, value in expected.items():
            assert line[name] == pytest.approx(value.item(), rel=2e-3, abs=1e-4), name
        optimizer.step()
        optimizer.zero_grad()
    saved, _ = load_model(dpo.Settings(out=str(tmp_path), device="cpu"), "dpo.pt", GPT)
    torch.testing.assert_close(plain_sides(saved, documents, mean), plain_sides(policy, documents, mean),
                               rtol=1e-3, atol=1e-2)
    margins = (torch.stack((start, plain_sides(saved, documents, mean))) - reference) @ torch.tensor([1.0, -1.0])
    before, after = (margins[:, 0].sign() - margins[:, 1:4].sign().sum(1)) / 8 + 0.5  # [2, 9] → [2]
    first, last = (f"{log[place]['loss']:.3f}" for place in (0, -1))
    said = capsys.readouterr().out
    assert f"ranks {before:.1%} → {after:.1%} as" in said and f"first → last: loss {first} → {last}" in said


@pytest.mark.parametrize("dtype, flags, start", [
    ("fp32", "", LN[2]), ("bf16", "", LN[2]), ("fp32", "--grad-checkpoint", LN[2]),
    ("fp32", "--loss ipo", 25.0), ("fp32", "--loss linear", 0.0),  # (1 / (2 β))²; −β m
])
def test_rate_0_shows_the_reference(run, monkeypatch, tmp_path, policy, documents, dtype, flags, start, device):
    """Nine pairs in fours; an arithmetic that differs between batches, as bf16's may: in the first pass log-ratios are
    0 on a CPU, since the reference went through the same batches; the second is cut otherwise. One step reads four."""
    near, _, same = TOLERANCES[device.type, dtype]
    write(tmp_path, easy=documents, sft=policy)
    tokens = sum(len(part) for document in documents for part in document)
    plain, read = dpo.pair_logprobs, []
    monkeypatch.setattr(dpo, "pair_logprobs", lambda *given: plain(*given) + given[1].tokens.sum() / 1000)
    flags = f"--lr 0 --batch-size 4 --seed 3 --device {device} --dtype {dtype} {flags}"
    log = run(dpo, f"{flags} --steps 5")
    assert [line["chosen_rewards"] for line in log[:3]] == pytest.approx([0.0] * 3, rel=0, abs=same)
    assert 0.0 not in [line["chosen_rewards"] for line in log[3:]]
    assert [line["margin"] for line in log[:3]] == pytest.approx([0.0] * 3, rel=0, abs=same)
    assert [line["loss"] for line in log[:3]] == pytest.approx([start] * 3, rel=1e-6 + same, abs=same)
    assert [line["margin"] for line in log] == pytest.approx([0.0] * 5, abs=near)
    assert sum(line["tokens_per_second"] * line["seconds"] for line in log[:3]) == pytest.approx(tokens)
    monkeypatch.setattr(dpo, "pack", lambda some, *more: read.append(len(some)) or pack(some, *more))
    run(dpo, f"{flags} --steps 1")
    assert read == [0, 0, 4, 4]  # held back, by both policies; for the reference; to train
