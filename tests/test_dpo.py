"""Chapter 4: DPO's loss, the log-probs that it is made of, its gradient and its first step."""

import json
import math

import pytest
import torch
from conftest import TINY

import dpo
from dpo import dpo_loss, pair_logprobs
from model import GPT, Pairs, Tokenizer, load_model, pack, save_model

CPU = torch.device("cpu")
BYTES = Tokenizer([chr(byte) for byte in range(TINY.vocabulary - 1)], ".", {"<end>": TINY.vocabulary - 1}, 96)


def plain_logprobs(policy, prompt, response):
    """Log-probs of one response's tokens, with nothing packed and an ordinary causal mask."""
    tokens = torch.cat((prompt, response))[None]
    length = tokens.shape[1]
    mask = [(length, torch.ones(length, length, dtype=torch.bool).tril())]
    logits = policy(tokens, torch.arange(length)[None], mask)[0] @ policy.embedding.weight.T
    before = logits[len(prompt) - 1 : -1]  # the token before each of the response's tokens predicts it
    return before.log_softmax(-1).gather(1, response[:, None])[:, 0]


def all_logprobs(policy, documents, mean=False, tokens_per_pass=0):
    """pair_logprobs of all documents, in their order: [n, 2]."""
    result = torch.empty(len(documents), 2)
    for batch in pack(documents, CPU, tokens_per_pass):
        result[batch.members] = pair_logprobs(policy, batch, mean)
    return result


def test_sigmoid_loss_by_hand():
    """β = 0.5 and m = 2 ln 3: σ(ln 3) = 3/4, so the loss is ln 4/3; the other way round σ = 1/4, so ln 4."""
    chosen = torch.tensor([1.0 + 2 * math.log(3), 1.0])
    rejected = torch.tensor([1.0, 1.0 + 2 * math.log(3)])
    torch.testing.assert_close(dpo_loss(chosen, rejected, 0.5), torch.tensor([math.log(4 / 3), math.log(4)]))


def test_label_smoothing_by_hand():
    """ε = 1/4 at σ = 3/4: 3/4 ln 4/3 + 1/4 ln 4 = ln 4 − 3/4 ln 3."""
    loss = dpo_loss(torch.tensor([2 * math.log(3)]), torch.zeros(1), 0.5, smoothing=0.25)
    assert loss.item() == pytest.approx(math.log(4) - 0.75 * math.log(3), abs=1e-6)


def test_ipo_loss_by_hand():
    """β = 0.25: m should be 1 / (2 β) = 2. At m = 5 the loss is 3² = 9, at m = −1 too, at 2 it is 0."""
    losses = dpo_loss(torch.tensor([6.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 0.0]), 0.25, "ipo")
    assert losses.tolist() == [9.0, 9.0, 0.0]


@pytest.mark.parametrize("kind, smoothing", [("sigmoid", 0.0), ("sigmoid", 0.1), ("ipo", 0.0)])
def test_loss_and_gradient_equal_the_formula_in_float64(kind, smoothing):
    torch.manual_seed(0)
    logratios, beta = torch.randn(2, 40) * 10, 0.1
    ours, exact = logratios.clone().requires_grad_(), logratios.double().requires_grad_()
    margin = exact[0] - exact[1]
    if kind == "ipo":
        expected = margin**2 - margin / beta + 1 / (4 * beta**2)
    else:
        right = 1 / (1 + (-beta * margin).exp())
        expected = -(1 - smoothing) * right.log() - smoothing * (1 - right).log()
    losses = dpo_loss(ours[0], ours[1], beta, kind, smoothing)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-5)
    losses.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_zero_logratios_give_ln_2():
    for smoothing in (0.0, 0.1, 0.5):
        losses = dpo_loss(torch.zeros(3), torch.zeros(3), 0.1, smoothing=smoothing)
        assert losses.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("mean", [False, True])
def test_pair_logprobs_equal_the_sums_or_means_of_plain_sequences(policy, documents, mean):
    expected = torch.empty(len(documents), 2)
    for index, (prompt, *sides) in enumerate(documents):
        for side, response in enumerate(sides):
            logprobs = plain_logprobs(policy, prompt, response)
            expected[index, side] = logprobs.mean() if mean else logprobs.sum()
    torch.testing.assert_close(all_logprobs(policy, documents, mean), expected, rtol=1e-5, atol=1e-4)


def test_gradient_does_not_depend_on_passes_or_packing(policy, documents):
    """All in one pass, a document per pass, a document per batch, documents in another order."""
    torch.manual_seed(0)
    reference = all_logprobs(policy, documents).detach() + torch.randn(9, 2) * 5
    assert len(list(pack(documents, CPU))) == 1
    assert len(list(pack(documents, CPU, tokens_per_pass=1))) > 1
    cuts = [([list(range(9))], 0), ([list(range(9))], 1), ([[index] for index in range(9)], 0)]
    cuts.append(([[8, 3, 1, 5], [0, 2, 7], [6, 4]], 0))
    gradients = []
    for groups, tokens_per_pass in cuts:
        policy.zero_grad()
        for group in groups:
            for batch in pack([documents[index] for index in group], CPU, tokens_per_pass):
                members = torch.tensor(group)[batch.members]
                logratios = pair_logprobs(policy, batch, False) - reference[members]
                (dpo_loss(*logratios.unbind(1), 0.1).sum() / 9).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]))
    assert gradients[0].abs().max() > 1e-2
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-5)


def test_gradient_equals_that_of_plain_sequences(policy, documents):
    """d loss / d θ by the formula on unpacked log-probs, with no code of the project but the GPT."""
    documents, reference = documents[:3], torch.tensor([[-3.0, -9.0], [-100.0, -90.0], [-50.0, -60.0]])
    gradients = []
    for packed in (True, False):
        policy.zero_grad()
        if packed:
            loss = dpo_loss(*(all_logprobs(policy, documents) - reference).unbind(1), 0.1).mean()
        else:
            margins = []
            for (prompt, *sides), before in zip(documents, reference, strict=True):
                chosen, rejected = (plain_logprobs(policy, prompt, side).sum() for side in sides)
                margins.append((chosen - before[0]) - (rejected - before[1]))
            loss = (1 + (-0.1 * torch.stack(margins)).exp()).log().mean()
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_a_step_raises_the_chosen_and_lowers_the_rejected(policy, kind):
    document = tuple(torch.tensor(ids) for ids in ([1, 2, 3], [10, 11, 12, 96], [20, 21, 22, 23, 24, 96]))
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
    before = all_logprobs(policy, [document], kind == "ipo")
    dpo_loss(*(before - before.detach()).unbind(1), 0.1, kind).mean().backward()
    optimizer.step()
    change = (all_logprobs(policy, [document], kind == "ipo") - before)[0]
    assert change[0] > 1e-4
    assert change[1] < -1e-4


def write_inputs(folder, policy, documents, data="easy.pt", init="sft.pt"):
    tokens = torch.cat([torch.cat(document) for document in documents]).int()
    lengths = torch.tensor([[len(part) for part in document] for document in documents])
    Pairs(tokens, lengths, BYTES, "made up").save(dpo.Settings(out=str(folder)), data)
    save_model(dpo.Settings(out=str(folder), save=init), policy, BYTES)


def run_dpo(monkeypatch, folder, policy, documents, *flags):
    """Runs the command on nine pairs in batches of four; returns the lines of its log."""
    write_inputs(folder, policy, documents)
    fixed = ["--out", str(folder), "--device", "cpu", "--batch-size", "4", "--steps", "5"]
    monkeypatch.setattr("sys.argv", ["dpo.py", *fixed, *flags])
    dpo.main()
    return [json.loads(line) for line in (folder / "dpo.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("flags", ["--label-smoothing 0.2 --beta 0.3", "--loss ipo --beta 0.3"])
def test_the_command_equals_a_plain_loop(monkeypatch, tmp_path, policy, documents, flags):
    """Three steps on all nine pairs, each in several passes: every logged number, and the weights that are saved. The
    files that the default names would find are others."""
    per_token, beta = "ipo" in flags, 0.3
    write_inputs(tmp_path, policy, documents, "mine.pt", "start.pt")
    monkeypatch.setattr(dpo, "pack", lambda some, device: pack(some, device, 150))
    assert len(list(pack(documents, CPU, 150))) > 1
    flags += " --data mine.pt --init start.pt --batch-size 9 --steps 3 --lr 1e-3 --warmup 0 --decay constant"
    torch.manual_seed(7)
    log = run_dpo(monkeypatch, tmp_path, GPT(TINY), documents[:3], *flags.split())

    def plain_sides():
        sides = [[plain_logprobs(policy, prompt, side) for side in pair] for prompt, *pair in documents]
        return torch.stack([(one.mean() if per_token else one.sum()) for pair in sides for one in pair]).view(9, 2)

    reference = plain_sides().detach()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    assert len(log) == 3
    for line in log:
        logprobs = plain_sides()
        rewards = beta * (logprobs - reference)
        margins = rewards[:, 0] - rewards[:, 1]
        likely = margins.sigmoid()
        losses = (margins / beta - 1 / (2 * beta)) ** 2 if per_token else -0.8 * likely.log() - 0.2 * (1 - likely).log()
        losses.mean().backward()
        expected = {"loss": losses.mean(), "margin": margins.mean(), "accuracy": (margins > 0).float().mean()}
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
    torch.testing.assert_close(all_logprobs(saved, documents, per_token), plain_sides(), rtol=1e-3, atol=1e-2)


def test_the_reference_of_the_first_pass_is_read_in_its_own_batches(monkeypatch, tmp_path, policy, documents):
    """With an arithmetic that makes a difference between batches, as bf16 may: the third runs over into a second pass,
    and what it says of the first eight pairs does not count."""
    plain = dpo.pair_logprobs
    monkeypatch.setattr(
        dpo, "pair_logprobs", lambda policy, batch, mean: plain(policy, batch, mean) + batch.tokens.sum()
    )
    log = run_dpo(monkeypatch, tmp_path, policy, documents, "--lr", "0")
    assert [line["chosen_rewards"] for line in log[:2]] == [0.0, 0.0]
    assert log[3]["chosen_rewards"] != 0.0


@pytest.mark.parametrize("kind, start", [("sigmoid", math.log(2)), ("ipo", 25.0)])
def test_every_pair_is_compared_with_its_own_reference(monkeypatch, tmp_path, policy, documents, kind, start):
    """At learning rate 0 the policy stays the reference, and every batch's loss is ln 2 (IPO: (1 / 0.2)² = 25)."""
    log = run_dpo(monkeypatch, tmp_path, policy, documents, "--lr", "0", "--loss", kind)
    assert [line["loss"] for line in log] == pytest.approx([start] * 5, abs=1e-6 * start / math.log(2))
    assert [line["margin"] for line in log] == pytest.approx([0.0] * 5, abs=1e-5)


@pytest.mark.parametrize("flags", [["--dtype", "fp32"], ["--dtype", "bf16"], ["--grad-checkpoint"]], ids=" ".join)
def test_the_first_pass_begins_at_ln_2_to_the_last_digit(monkeypatch, tmp_path, policy, documents, flags):
    """In every mode, since the reference went through the same batches; the third runs over into a second pass."""
    log = run_dpo(monkeypatch, tmp_path, policy, documents, "--lr", "0", *flags)
    assert [line["margin"] for line in log[:2]] == [0.0, 0.0]
    assert [line["loss"] for line in log[:2]] == pytest.approx([math.log(2)] * 2, abs=1e-7)
    assert [line["margin"] for line in log] == pytest.approx([0.0] * 5, abs=0.1)


def test_only_the_pairs_to_come_are_scored_by_the_reference(monkeypatch, tmp_path, policy, documents):
    seen = []
    monkeypatch.setattr(dpo, "pack", lambda some, device: seen.append(len(some)) or pack(some, device))
    log = run_dpo(monkeypatch, tmp_path, policy, documents, "--steps", "1", "--seed", "3")
    assert (len(log), seen) == (1, [4, 4])  # once by the reference, once in training
    assert (log[0]["margin"], log[0]["chosen_rewards"]) == (0.0, 0.0)  # the same four


def test_command_widens_the_margin(monkeypatch, tmp_path, policy, documents):
    log = run_dpo(monkeypatch, tmp_path, policy, documents, "--lr", "1e-3")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[-1]["loss"] < 0.5
    for line in log:
        assert line["margin"] == pytest.approx(line["chosen_rewards"] - line["rejected_rewards"], abs=1e-5)
