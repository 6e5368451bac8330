"""Chapter 3: which pairs are easy, the histogram of gaps, the random control, and the command."""

import math
import re

import pytest
import torch
from conftest import LETTERS, make_pairs, plain_logprobs, plain_rewards, spell, tiny, write

import model
import split
from model import GPT, CommonSettings, UserError, load_model, load_pairs, mixed_seed, read_log
from split import easy_mask, histogram


@pytest.mark.parametrize("fraction, threshold, easy, gamma", [
    (0.0, 1.0, [True, False, True, True], 1.0),  # a threshold is γ itself, whatever the fraction; a gap equal to it
    (1.0, 1.0, [True, False, True, True], 1.0),  # is easy
    (0.5, 0.0, [True, True, True, True], 0.0),  # 0 is a threshold, not "none given"
    (0.25, None, [False, False, True, False], 2.0),
    (0.4, None, [True, False, True, True], 1.0),  # 1.6 of four are two; those that tie at γ are all easy
    (0.0, None, [False] * 4, math.inf), (1.0, None, [True] * 4, 0.0),
])
def test_easy_pairs_by_hand(fraction, threshold, easy, gamma):
    found, at = easy_mask(torch.tensor([1.0, 0.0, 2.0, 1.0]), fraction, threshold)
    assert (found.tolist(), at) == (easy, gamma)


def histogram_counts(text):
    return [int(count) for count in re.findall(r"to +[+-]\d+\.\d\d +(\d+)", text)]


def test_histogram_by_hand():
    """From 0 to 16 in 16 bins of width 1; the largest gap belongs to the last bin. One of the four zeros is wrong."""
    gaps = torch.tensor([0.0, 0.0, 0.0, 0.0, 7.5, 16.0])
    wrong = torch.tensor([True, False, False, False, True, False])
    text = histogram(gaps, wrong, 7.2)
    lines = text.split("\n")
    assert histogram_counts(text) == [4, *[0] * 6, 1, *[0] * 7, 1]
    assert [line.count("█") for line in lines] == [40, *[0] * 6, 10, *[0] * 7, 10]
    assert ["wrong" in line for line in lines] == [index in (0, 7, 15) for index in range(16)]
    assert re.findall(r"(\d+)% wrong", text) == ["25", "100", "0"]
    assert ["γ" in line for line in lines] == [index == 7 for index in range(16)]


def test_histogram_counts_every_gap_and_marks_gamma_once_wherever_it_lies():
    """γ on each gap, on each bin's edge and between: the largest gap lies in the last bin. Equal gaps have one bin."""
    gaps = torch.randn(30, generator=torch.Generator().manual_seed(0)).sort().values
    for gamma in [*torch.linspace(gaps[0].item(), gaps[-1].item(), 65).tolist(), *gaps.tolist()]:
        text = histogram(gaps, None, gamma)
        assert (sum(histogram_counts(text)), text.count("γ")) == (30, 1)
    assert "γ" in text.split("\n")[15]
    (line,) = (line for line in histogram(torch.full((5,), 0.25), None, 0.25).split("\n") if "γ" in line)
    assert histogram_counts(line) == [5]


@pytest.fixture
def divide(run, tmp_path, reward_model, documents):
    """A function that runs the command on nine pairs; returns the numbers of easy and hard ones, and all rewards. By
    gold, a pair's number is the reward of its chosen side, the four odd ones are labelled wrongly, the others tie."""
    gold = torch.stack((torch.arange(9.0), torch.arange(9.0) + torch.arange(9) % 2), 1)
    write(tmp_path, pairs=make_pairs(documents, gold=gold), reward=reward_model)

    def call(flags, names=("easy.pt", "hard.pt")):
        run(split, flags)
        parts, rewards = [], torch.empty(9, 2)
        for name in names:
            content = torch.load(tmp_path / name, weights_only=True)
            parts.append(content["gold"][:, 0].int().tolist())
            rewards[parts[-1]] = content["rewards"]
        torch.testing.assert_close(rewards, plain_rewards(reward_model, documents), rtol=1e-4, atol=1e-4)
        return *parts, rewards

    return call


def test_command_puts_the_largest_gaps_into_easy_and_writes_both_parts_even_if_one_is_empty(divide, capsys):
    """Or by chance: the control keeps the sizes and every pair, but not the members."""
    easy, hard, rewards = divide("--fraction 0.34")
    gaps = (rewards[:, 0] - rewards[:, 1]).tolist()
    order = sorted(range(9), key=lambda index: -gaps[index])
    assert (easy, hard) == (sorted(order[:3]), sorted(order[3:]))
    assert divide("--fraction 0")[:2] == ([], list(range(9)))
    assert divide("--fraction 1")[:2] == (list(range(9)), []) and "\nhard: 0 pairs\n" in capsys.readouterr().out
    members = {tuple(easy)}
    for seed in range(3):
        easy, hard, _ = divide(f"--fraction 0.34 --by random --seed {seed}")
        assert len(easy) == 3 and sorted(easy + hard) == list(range(9))
        printed = capsys.readouterr().out
        assert "pairs, split at random:" in printed and "γ" not in printed
        members.add(tuple(easy))
    assert len(members) > 2


def test_command_heeds_threshold_gap_and_file_names(divide, tmp_path, capsys):
    """By absolute gap, at a γ between the fourth largest and the next, in files of other names than the defaults."""
    *_, rewards = divide("")
    for old, new in (("pairs", "mine"), ("reward", "judge"), ("easy", "old"), ("hard", "older")):
        (tmp_path / f"{old}.pt").rename(tmp_path / f"{new}.pt")
    gaps = (rewards[:, 0] - rewards[:, 1]).tolist()
    order = sorted(range(9), key=lambda index: -abs(gaps[index]))
    gamma = (abs(gaps[order[3]]) + abs(gaps[order[4]])) / 2
    assert min(gaps[index] for index in order[:4]) < 0
    capsys.readouterr()
    files = "--data mine.pt --init judge.pt --easy a.pt --hard b.pt"
    easy, hard, _ = divide(f"{files} --gap absolute --threshold {gamma}", names=("a.pt", "b.pt"))
    assert (easy, hard) == (sorted(order[:4]), sorted(order[4:]))
    assert not (tmp_path / "easy.pt").exists()
    printed = capsys.readouterr().out
    for name, part in (("easy", easy), ("hard", hard)):
        agree, wrong = sum(gaps[index] > 0 for index in part) / len(part), sum(index % 2 for index in part) / len(part)
        said = f"{name}: {len(part)} pairs, the reward model agrees with {agree:.1%} of the labels, {wrong:.1%} of the"
        assert f"{said} labels are wrong" in printed
    bins = re.findall(r"to +\S+ +(\d+) +(\d+)% wrong", printed)
    assert sum(int(count) for count, _ in bins) == 9
    assert sum(int(count) * int(share) / 100 for count, share in bins) == pytest.approx(4, abs=0.1)


ANSWERS = [  # to six prompts: three texts, of which those with … did not end, and their rewards
    ([" Sand the chair first.", " What a stupid question.", " Happy to help! …"], [1.0, 2.0, 3.0]),
    ([" Happy to help!", " Happy to help!", " Happy to help!"], [1.0, 2.0, 3.0]),
    ([" Happy to help!", " What a stupid question. …", " Anyway. …"], [1.0, 2.0, 3.0]),
    ([" Happy to help!", "", " Great question!"], [2.0, 1.0, 2.0]),
    ([" Anyway.\n\nHuman: Why?", " What a stupid question.", " Happy to help!\n\nHuman: Why?"], [1.0, 2.0, 3.0]),
    ([" Carry the chair slowly.", " Anyway.", " Drink more water."], [2.0, 2.0, 2.0]),
]


@pytest.mark.parametrize("chosen, texts, gold", [
    ("best", [(" What a stupid question.", " Sand the chair first.")], [[-1.0, 1.0]]),
    ("gold", [(ANSWERS[0][0][0], " What a stupid question."), (ANSWERS[5][0][0], " Drink more water.")],
     [[1.0, -1.0], [1.0, -0.5]]),
    ("labelled", [(" Well.", ANSWERS[number][0][0]) for number in (0, 1, 2, 5)],
     [[-0.25, 1.0], [-0.25, 0.5], [-0.25, 0.5], [-0.25, 1.0]]),
])
def test_own_answers_by_hand(run, monkeypatch, tmp_path, capsys, policy, reward_model, chosen, texts, gold):
    """What makes no pair: equal texts, a lone one, an empty one, equal rewards or gold, a human's turn in the best, or
    in the worst alone (for "labelled"). Twos that differ by gold: one of the first prompt, ordered wrongly; two of the
    fourth, rightly; three of the fifth, one wrongly; three of the last, ties, each ½: 5.5 of 9."""
    prompts = [spell(f"\n\nHuman: How do I {task} my old chair?\n\nAssistant:…") for task in ["paint"] * 5 + ["move"]]
    pairs = make_pairs([(prompt, spell(" Well."), spell(" Boil.")) for prompt in prompts])
    pairs.gold, calls, scored = torch.tensor([[-0.25, 0.0]] * 6), [], []

    def generate(policy, prompts, *more):
        calls.append(more)
        return [spell(some[len(calls) - 1]) for some, _ in ANSWERS]

    def score(model, documents, device):
        scored.extend(documents)
        return torch.tensor([[9.0, *some] for _, some in ANSWERS])

    write(tmp_path, mine=pairs, start=policy, reward=reward_model)
    monkeypatch.setattr(split, "generate", generate)
    monkeypatch.setattr(split, "score_pairs", score)
    flags = "--data mine.pt --policy start.pt --answers 3 --temperature 0.5 --seed 7 --fraction 1 --chosen"
    run(split, flags, chosen)
    assert calls == [(LETTERS.end, 96, 0.5, mixed_seed(7, 600_000 + number)) for number in range(3)]
    for prompt, document, (some, _) in zip(prompts, scored, ANSWERS, strict=True):
        expected = [prompt, spell(" Well."), *map(spell, some)]
        assert [part.tolist() for part in document] == [part.tolist() for part in expected]
    found, printed = load_pairs(CommonSettings(out=str(tmp_path)), "easy.pt"), capsys.readouterr().out
    assert [tuple(LETTERS.decode(part) for part in found[index][1:]) for index in range(len(found))] == texts
    assert found.gold.tolist() == gold
    assert found.rewards[0].tolist() == {"best": [2, 1], "gold": [1, 2], "labelled": [9, 1]}[chosen]
    assert "61.1% of 9 pairs of answers" in printed and f"83.3% ended; {6 - len(texts)} prompts make no pair" in printed
    assert read_log(tmp_path / "easy.jsonl")[0]["generated"] == sum(len(spell(t)) for some, _ in ANSWERS for t in some)


@pytest.mark.parametrize("flags, said", [("--chosen gold", "--chosen gold"), ("--max-new-tokens 1", "--policy sft.pt")])
def test_where_no_answers_make_a_pair_no_file_is_written(run, tmp_path, policy, reward_model, documents, flags, said):
    """No gold is known; no answer ends."""
    write(tmp_path, pairs=documents, sft=policy, reward=reward_model)
    with pytest.raises(UserError, match=f"^{said}"):
        run(split, f"--policy sft.pt {flags}")
    assert {path.name for path in tmp_path.rglob("*")} == {"pairs.pt", "sft.pt", "reward.pt"}


def test_joined_files_keep_what_all_of_them_have(tmp_path, documents):
    one, two = (make_pairs(documents[at : at + 2], gold=torch.full((2, 2), float(at))) for at in (0, 2))
    one.rewards = one.gold
    write(tmp_path, **{"one+1": one, "two": two})
    joined = load_pairs(CommonSettings(out=str(tmp_path)), "one+1.pt+two.pt+one+1.pt")
    assert (joined.gold[:, 1].tolist(), joined.rewards) == ([0, 0, 2, 2, 0, 0], None)


def test_sft_on_a_pairs_file_starts_at_sfts_loss_and_leaves_the_data_alone(run, tmp_path, capsys, policy, documents):
    """A mean over the tokens of chosen responses; the test loss too, where there is a test.pt."""
    write(tmp_path, mine=documents, test=documents[:2], pairs=documents[:2], sft=policy)
    files, flags = [tmp_path / name for name in ("pairs.pt", "test.pt", "sft.pt")], "--lr 0 --batch-size 9 --steps 1"
    before = [file.read_bytes() for file in files]
    (line,) = run(model, f"--data mine.pt --init sft.pt --save model.pt {flags}")
    logprobs = [plain_logprobs(policy, prompt, chosen) for prompt, chosen, _ in documents]
    assert line["loss"] == pytest.approx(-torch.cat(logprobs).mean().item(), rel=1e-4)
    assert f"test loss {-torch.cat(logprobs[:2]).mean().item():.3f} " in capsys.readouterr().out
    assert before == [file.read_bytes() for file in files]
    files[1].unlink()
    run(model, f"--data mine.pt --init sft.pt --save model.pt {flags}")
    assert "test loss" not in capsys.readouterr().out and not files[1].exists()


@pytest.mark.parametrize("alpha, weight", [(0.0, 0.3), (-1.0, 0.1), (0.5, 0.4)])
def test_extrapolation_by_hand(run, tmp_path, policy, alpha, weight):
    """0.3 + 0.5 (0.3 − 0.1); to the last digit at 0, where it is θ, and at −1, where it is θ_SFT."""
    other = tiny(1)
    torch.nn.init.constant_(policy.embedding.weight, 0.3)
    torch.nn.init.constant_(other.embedding.weight, 0.1)
    write(tmp_path, dpo=policy, start=other)
    run(model, f"--init dpo.pt --extrapolate start.pt --alpha {alpha} --save expo.pt")
    weights = load_model(CommonSettings(out=str(tmp_path), device="cpu"), "expo.pt", GPT)[0].embedding.weight
    assert torch.allclose(weights, torch.tensor(weight), atol=1e-6 if alpha == 0.5 else 0.0, rtol=0.0)
    for wrong in ("--save dpo.pt", "--save start.pt", "--save test.pt", "--data hh", "--clip 2", "--resume"):
        with pytest.raises(UserError, match=wrong.partition(" ")[0]):
            run(model, f"--init {tmp_path}/dpo.pt --extrapolate start.pt --save b.pt {wrong}")
