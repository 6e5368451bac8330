"""Chapter 3: which pairs are easy, the histogram of gaps, the random control, and the command."""

import math
import re

import pytest
import torch
from conftest import BYTES, END, TINY, make_pairs, plain_logprobs, plain_score, write

import model
import split
from model import GPT, CommonSettings, UserError, generate, load_model, load_pairs, mixed_seed, read_log, train_tokenizer
from split import describe, easy_mask, histogram, order_agreement, reward_gaps


def test_a_pair_ranked_against_its_label_is_hard_by_signed_gap_and_easy_by_absolute_gap():
    rewards = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.5, 0.0]])
    signed, absolute = reward_gaps(rewards, "signed"), reward_gaps(rewards, "absolute")
    assert (signed.tolist(), absolute.tolist()) == ([2.0, -3.0, 0.5], [2.0, 3.0, 0.5])
    assert easy_mask(signed, 0.5, 1.0)[0].tolist() == [True, False, False]
    assert easy_mask(absolute, 0.5, 1.0)[0].tolist() == [True, True, False]


@pytest.mark.parametrize("fraction, threshold, easy, gamma", [
    (0.0, 1.0, [True, False, True, True], 1.0),  # a threshold is γ itself, whatever the fraction; a gap equal to it
    (1.0, 1.0, [True, False, True, True], 1.0),  # is easy
    (0.5, 0.0, [True, True, True, True], 0.0),  # 0 is a threshold, not "none given"
    (0.25, None, [False, False, True, False], 2.0),
    (0.5, None, [True, False, True, True], 1.0),  # half of four is two; those that tie at γ are all easy
    (0.0, None, [False] * 4, math.inf), (1.0, None, [True] * 4, 0.0),
])
def test_easy_pairs_by_hand(fraction, threshold, easy, gamma):
    found, at = easy_mask(torch.tensor([1.0, 0.0, 2.0, 1.0]), fraction, threshold)
    assert (found.tolist(), at) == (easy, gamma)


def test_a_fraction_takes_the_largest_gaps():
    gaps = torch.randn(40, generator=torch.Generator().manual_seed(0))
    for count in range(1, 41):
        easy, gamma = easy_mask(gaps, count / 40, None)
        best = sorted(range(40), key=lambda index: -gaps[index])[:count]
        assert easy.nonzero()[:, 0].tolist() == sorted(best)
        assert gamma == gaps[best[-1]].item()


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
    """γ on each gap, on each bin's edge and between. The largest gap is counted in the last bin, so as γ, which it is
    when one pair is easy, it lies there; equal gaps have one bin."""
    for seed in range(10):
        gaps = torch.randn(30, generator=torch.Generator().manual_seed(seed)).sort().values
        for gamma in [*gaps.tolist(), *torch.linspace(gaps[0].item(), gaps[-1].item(), 65).tolist()]:
            text = histogram(gaps, None, gamma)
            assert (sum(histogram_counts(text)), text.count("γ")) == (30, 1)
        assert "γ" in histogram(gaps, None, easy_mask(gaps, 1 / 30, None)[1]).split("\n")[15]
    (line,) = (line for line in histogram(torch.full((5,), 0.25), None, 0.25).split("\n") if "γ" in line)
    assert histogram_counts(line) == [5]


def test_description_gives_size_agreement_and_wrong_labels():
    """The reward model agrees with one of two labels; by gold, one of two is wrong (a tie is not)."""
    part = make_pairs([(torch.ones(1),) * 3] * 2, gold=torch.tensor([[1.0, 2.0], [1.0, 1.0]]))
    part.rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    line = describe("easy", part)
    assert line == "easy: 2 pairs, the reward model agrees with 50.0% of the labels, 50.0% of the labels are wrong"
    assert describe("hard", part.select(torch.tensor([], dtype=torch.long))) == "hard: 0 pairs"


# ---- The command ----


@pytest.fixture
def divide(run, tmp_path, reward_model, documents):
    """A function that runs the command on nine pairs; returns the numbers of the easy and the hard ones, and all their
    rewards. The gold reward of a pair's chosen side is its number; the four odd pairs are labelled wrongly, the even
    ones are ties."""
    gold = torch.stack((torch.arange(9.0), torch.arange(9.0) + torch.arange(9) % 2), 1)
    write(tmp_path, pairs=make_pairs(documents, source="toy", gold=gold), reward=reward_model)

    def call(flags, names=("easy.pt", "hard.pt")):
        run(split, flags)
        parts, rewards = [], torch.empty(9, 2)
        for name in names:
            content = torch.load(tmp_path / name, weights_only=True)
            parts.append(content["gold"][:, 0].int().tolist())
            rewards[parts[-1]] = content["rewards"]
        return *parts, rewards

    return call


def test_command_puts_the_largest_gaps_into_easy_and_writes_both_parts_even_if_one_is_empty(divide):
    easy, hard, rewards = divide("--fraction 0.34")
    gaps = (rewards[:, 0] - rewards[:, 1]).tolist()
    order = sorted(range(9), key=lambda index: -gaps[index])
    assert (easy, hard) == (sorted(order[:3]), sorted(order[3:]))
    assert divide("--fraction 0")[:2] == ([], list(range(9)))
    assert divide("--fraction 1")[:2] == (list(range(9)), [])


def test_command_heeds_threshold_gap_and_file_names(divide, tmp_path, capsys):
    """By absolute gap, at a γ between the second largest and the next, in files of other names than the default ones;
    there, nothing is to be found. The histogram counts the four wrong labels."""
    *_, rewards = divide("")
    for old, new in (("pairs", "mine"), ("reward", "judge"), ("easy", "old"), ("hard", "older")):
        (tmp_path / f"{old}.pt").rename(tmp_path / f"{new}.pt")
    gaps = (rewards[:, 0] - rewards[:, 1]).tolist()
    order = sorted(range(9), key=lambda index: -abs(gaps[index]))
    gamma = (abs(gaps[order[1]]) + abs(gaps[order[2]])) / 2
    assert min(gaps[index] for index in order[:2]) < 0
    capsys.readouterr()
    files = "--data mine.pt --init judge.pt --easy a.pt --hard b.pt"
    easy, hard, _ = divide(f"{files} --gap absolute --threshold {gamma}", names=("a.pt", "b.pt"))
    assert (easy, hard) == (sorted(order[:2]), sorted(order[2:]))
    assert not (tmp_path / "easy.pt").exists()
    bins = re.findall(r"to +\S+ +(\d+) +(\d+)% wrong", capsys.readouterr().out)
    assert sum(int(count) for count, _ in bins) == 9
    assert sum(int(count) * int(share) / 100 for count, share in bins) == pytest.approx(4, abs=0.1)


def test_random_control_keeps_the_sizes_and_every_pair_but_not_the_members(divide):
    members = set()
    for seed in range(4):
        easy, hard, _ = divide(f"--fraction 0.34 --by random --seed {seed}")
        assert len(easy) == 3 and sorted(easy + hard) == list(range(9))
        members.add(tuple(easy))
    assert len(members) > 1
    assert members != {tuple(divide("--fraction 0.34")[0])}


@pytest.mark.parametrize("names", ["--easy same.pt --hard same.pt", "--easy sub/same.pt"])
def test_the_parts_are_two_files_in_the_folder(divide, tmp_path, names):
    with pytest.raises(UserError, match=r"same\.pt"):
        divide(names)
    assert not list(tmp_path.rglob("same.pt"))
