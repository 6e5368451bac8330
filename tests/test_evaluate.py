"""Chapter 6: the answers' measures, wins, errors, the table, the samples and evaluation.json."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import TINY

import evaluate
from evaluate import Answers, Settings, answer, mean_and_error, side_by_side, summarise, table, wins
from model import GPT, Pairs, Tokenizer, generate, gold_reward, mixed_seed, save_model
from reward import RewardModel

END = 256
BYTES = Tokenizer([chr(byte) for byte in range(END)], r"[\s\S]", {"<end>": END}, END)
KEYS = ("gold_reward", "reward", "win_rate_vs_chosen", "win_rate_vs_sft", "kl", "length", "ended")
ASKED = ("How do I paint my old chair?", "I want to sell my red lamp.", "Move it.", "Clean the big drum?")
QUESTIONS = [f"\n\nHuman: {question}\n\nAssistant:" for question in ASKED]


def make_model(kind, seed):
    torch.manual_seed(seed)
    return kind(replace(TINY, vocabulary=END + 1))


@pytest.fixture
def sft():
    return make_model(GPT, 0)


@pytest.fixture
def other():
    return make_model(GPT, 1)


@pytest.fixture
def judge():
    return make_model(lambda config: RewardModel(GPT(config)), 2)


@pytest.fixture
def prompts():
    return [torch.tensor(BYTES.encode(question)) for question in QUESTIONS]


@pytest.fixture
def settings():
    return Settings(max_new_tokens=10, temperature=0.7, seed=3)


def make_pairs(source="toy"):
    pieces = [[BYTES.encode(question), [*b" Good luck with it!", END], [*b" No.", END]] for question in QUESTIONS]
    tokens = torch.tensor([token for pair in pieces for piece in pair for token in piece], dtype=torch.int32)
    gold = torch.tensor([[0.5, -0.25]] * 4) if source == "toy" else None
    return Pairs(tokens, torch.tensor([[len(piece) for piece in pair] for pair in pieces]), BYTES, source, None, gold)


def made_answers(gold):
    """Two answers with numbers worked by hand below."""
    return Answers(
        ["Sand the chair first.", "Offer the lamp to a friend."],
        torch.tensor([1.0, 3.0]) if gold else None,
        torch.tensor([0.0, 4.0]),
        torch.tensor([2.0, 6.0]),
        torch.tensor([10.0, 20.0]),
        torch.tensor([1.0, 0.0]),
    )


def plain_hidden(model, prompt, response):
    tokens = torch.cat((prompt, response))[None]
    length = tokens.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    return model(tokens, torch.arange(length)[None], mask)[0]


def plain_logprob(policy, prompt, response):
    """log π(response | prompt), token by token, with nothing packed."""
    logits = plain_hidden(policy, prompt, response) @ policy.embedding.weight.T
    before = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return sum(before[t, token].item() for t, token in enumerate(response.tolist()))


def test_wins_count_a_tie_one_half():
    ours, theirs = torch.tensor([2.0, 1.0, 1.5]), torch.tensor([1.0, 2.0, 1.5])
    assert wins(ours, theirs).tolist() == [1.0, 0.0, 0.5]


def test_mean_and_error_by_hand():
    """1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 3 = 14/3, error √(14/3 / 4) = √(7/6). One value: error 0."""
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt(7 / 6), abs=1e-6)
    assert mean_and_error(torch.tensor([5.0])) == (5.0, 0.0)


def test_kl_of_sft_from_itself_is_0(settings, prompts, sft, judge):
    assert answer(settings, prompts, BYTES, "toy", sft, sft, judge).kl.tolist() == [0.0] * 4


@torch.no_grad()
def test_kl_is_the_sum_of_log_ratios_at_temperature_1(settings, prompts, sft, other, judge):
    """Though the answers are sampled at 0.7. The same seed samples the same answers here."""
    responses = generate(other, prompts, END, 10, 0.7, mixed_seed(3, 500_000))
    expected = [
        plain_logprob(other, prompt, response) - plain_logprob(sft, prompt, response)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    given = answer(settings, prompts, BYTES, "toy", other, sft, judge)
    assert min(map(abs, expected)) > 0.1
    assert given.kl.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("source", ["toy", "hh"])
def test_answers_hold_text_gold_reward_length_and_end_of_each_prompt(monkeypatch, prompts, sft, judge, source):
    """Fixed answers, in another order of length than packing's: one helpful, one cut off, one empty, one polite."""
    texts = [" Sand the chair first.", " What a", "", " Great question!"]
    responses = [torch.tensor([*text.encode(), *([] if text == " What a" else [END])]) for text in texts]
    monkeypatch.setattr(evaluate, "generate", lambda *_: responses)
    given = answer(Settings(max_new_tokens=30), prompts, BYTES, source, sft, sft, judge)
    assert given.texts == texts
    assert given.length.tolist() == [23.0, 7.0, 1.0, 17.0]
    assert given.ended.tolist() == [1.0, 0.0, 1.0, 1.0]
    rewards = [
        judge.head(plain_hidden(judge.trunk, *document)[-1]).item() for document in zip(prompts, responses, strict=True)
    ]
    assert given.reward.tolist() == pytest.approx(rewards, rel=1e-4, abs=1e-5)
    if source == "toy":
        assert given.gold.tolist() == [1.0, -0.25, 0.0, 0.5]
        assert given.gold.tolist() == [gold_reward(*pair) for pair in zip(QUESTIONS, texts, strict=True)]
        assert given.judged is given.gold
    else:
        assert given.gold is None
        assert given.judged is given.reward


def test_summary_by_hand():
    """Gold 1, 3 against chosen 1, 3.5: tie, loss: (0.5 + 0) / 2; against SFT's 0, 3: win, tie.
    Of two values the error is half their distance."""
    sft = replace(made_answers(gold=True), gold=torch.tensor([0.0, 3.0]))
    summary = summarise(made_answers(gold=True), sft, torch.tensor([1.0, 3.5]))
    expected = {"gold_reward": 2.0, "gold_reward_se": 1.0, "reward": 2.0, "reward_se": 2.0,
                "win_rate_vs_chosen": 0.25, "win_rate_vs_chosen_se": 0.25, "win_rate_vs_sft": 0.75,
                "win_rate_vs_sft_se": 0.25, "kl": 4.0, "kl_se": 2.0, "length": 15.0, "length_se": 5.0,
                "ended": 0.5, "ended_se": 0.5}  # fmt: skip
    assert summary == pytest.approx(expected, abs=1e-6)
    assert set(summary) == {name for key in KEYS for name in (key, f"{key}_se")}


def test_summary_without_gold_reward_counts_wins_by_the_reward_model():
    """Rewards 0, 4 against chosen 1, 1 and SFT's 0, 0: one of two, and a tie and a win."""
    sft = replace(made_answers(gold=False), reward=torch.tensor([0.0, 0.0]))
    summary = summarise(made_answers(gold=False), sft, torch.tensor([1.0, 1.0]))
    assert set(summary) == {name for key in KEYS for name in (key, f"{key}_se")}
    assert summary["gold_reward"] is None
    assert summary["gold_reward_se"] is None
    assert (summary["win_rate_vs_chosen"], summary["win_rate_vs_sft"]) == (0.5, 0.75)


@pytest.mark.parametrize("gold", [True, False])
def test_table_has_a_row_per_policy(gold):
    given = made_answers(gold)
    summary = summarise(given, given, torch.tensor([2.0, 2.0]))
    lines = table({"sft": summary, "dpo": summary, "ppo": summary, "dpo_all": summary}, 2).split("\n")
    assert [line.split()[0] for line in lines] == ["policy", "SFT", "DPO", "MPO", "dpo_all"]
    assert len({len(line) for line in lines}) == 1  # aligned
    for line in lines[1:]:
        assert ("2.00 ± 1.00" in line) == gold
        assert ("–" in line) == (not gold)
        for cell in ("2.00 ± 2.00", "50% (9% to 91%)", "4.0 ± 2.0", "15.0 ± 5.0", "50.0%"):
            assert cell in line


@pytest.mark.parametrize("gold", [True, False])
def test_side_by_side_shows_every_policy_on_each_of_the_first_prompts(gold):
    text = side_by_side(make_pairs(), {"sft": made_answers(gold), "mine": made_answers(gold)}, 2)
    marks = ("[+1.00]", "[+3.00]") if gold else ("[+0.00]", "[+4.00]")
    lines = [" ".join(line.split()) for line in text.split("\n") if line.strip() not in ("", "Assistant:")]
    assert lines == [
        "Human: How do I paint my old chair?",
        f"SFT {marks[0]} Sand the chair first.",
        f"mine {marks[0]} Sand the chair first.",
        "Human: I want to sell my red lamp.",
        f"SFT {marks[1]} Offer the lamp to a friend.",
        f"mine {marks[1]} Offer the lamp to a friend.",
    ]


def test_side_by_side_shows_no_more_prompts_than_there_are():
    given = replace(made_answers(True), texts=["one", "two", "three", "four"], gold=torch.zeros(4))
    assert side_by_side(make_pairs(), {"sft": given}, 9).count("SFT") == 4
    assert side_by_side(make_pairs(), {"sft": given}, 0) == ""


def test_side_by_side_shows_a_policy_whose_answer_is_empty():
    """A policy that ends at once has an empty text; its line, with name and reward, must not be lost."""
    text = side_by_side(
        make_pairs(), {"sft": made_answers(True), "mine": replace(made_answers(True), texts=["", ""])}, 2
    )
    assert "SFT [+1.00]" in text
    assert "mine [+1.00]" in text


@pytest.mark.parametrize("source", ["toy", "hh"])
def test_command_writes_every_policy_and_sft_ties_with_itself(monkeypatch, tmp_path, capsys, sft, other, judge, source):
    out = Settings(out=str(tmp_path))
    make_pairs(source).save(Settings(out=str(tmp_path)), "test.pt")
    for name, model in (("sft.pt", sft), ("ppo.pt", other), ("reward.pt", judge)):
        out.save = name
        save_model(out, model, BYTES)
    flags = ["--out", str(tmp_path), "--device", "cpu", "--policies", "sft.pt", "ppo.pt", "--max-new-tokens", "8"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *flags])
    evaluate.main()
    summaries = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(summaries) == ["sft", "ppo"]
    for summary in summaries.values():
        assert set(summary) == {name for key in KEYS for name in (key, f"{key}_se")}
        assert (summary["gold_reward"] is None) == (source == "hh")
    assert summaries["sft"]["kl"] == 0.0
    assert (summaries["sft"]["win_rate_vs_sft"], summaries["sft"]["win_rate_vs_sft_se"]) == (0.5, 0.0)
    assert summaries["ppo"]["kl"] > 0.0
    assert "4 test prompts" in capsys.readouterr().out
