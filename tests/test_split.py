"""Chapter 3: which pairs are easy, the histogram of gaps, and the random control."""

import math
import re

import pytest
import torch
from conftest import TINY

import reward
import split
from model import Pairs, Tokenizer, UserError, save_model
from split import describe, easy_mask, histogram, reward_gaps

BYTES = Tokenizer([chr(byte) for byte in range(TINY.vocabulary - 1)], ".", {"<end>": TINY.vocabulary - 1}, 96)


def test_a_pair_ranked_against_its_label_is_hard_by_signed_gap_and_easy_by_absolute_gap():
    rewards = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.5, 0.0]])
    signed, absolute = reward_gaps(rewards, "signed"), reward_gaps(rewards, "absolute")
    assert signed.tolist() == [2.0, -3.0, 0.5]
    assert absolute.tolist() == [2.0, 3.0, 0.5]
    assert easy_mask(signed, 0.5, 1.0)[0].tolist() == [True, False, False]
    assert easy_mask(absolute, 0.5, 1.0)[0].tolist() == [True, True, False]


def test_a_threshold_is_gamma_itself_and_a_gap_equal_to_it_is_easy():
    """γ = 1 for one of four is easy, whatever the fraction."""
    gaps = torch.tensor([1.0, -1.0, 0.99, 2.0])
    for fraction in (0.0, 0.5, 1.0):
        easy, gamma = easy_mask(gaps, fraction, 1.0)
        assert easy.tolist() == [True, False, False, True]
        assert gamma == 1.0
    assert easy_mask(gaps, 0.5, 0.0)[0].tolist() == [True, False, True, True]  # 0 is a threshold, not "none given"


def test_a_fraction_takes_the_largest_gaps():
    torch.manual_seed(0)
    gaps = torch.randn(40)
    for count in range(1, 41):
        easy, gamma = easy_mask(gaps, count / 40, None)
        best = sorted(range(40), key=lambda index: -gaps[index])[:count]
        assert easy.nonzero()[:, 0].tolist() == sorted(best)
        assert gamma == gaps[best[-1]].item()


def test_pairs_tied_at_gamma_are_all_easy():
    """Half of four is two, and the second largest gap is 1, which three pairs have."""
    easy, gamma = easy_mask(torch.tensor([1.0, 0.0, 1.0, 1.0]), 0.5, None)
    assert easy.tolist() == [True, False, True, True]
    assert gamma == 1.0


def test_fraction_0_makes_none_easy_and_fraction_1_all():
    gaps = torch.tensor([1.0, -2.0, 3.0])
    assert easy_mask(gaps, 0.0, None)[0].tolist() == [False, False, False]
    assert easy_mask(gaps, 0.0, None)[1] == math.inf
    assert easy_mask(gaps, 1.0, None)[0].tolist() == [True, True, True]
    assert easy_mask(gaps, 1.0, None)[1] == -2.0


def histogram_counts(text):
    return [int(count) for count in re.findall(r"to +[+-]\d+\.\d\d +(\d+)", text)]


def test_histogram_by_hand():
    """From 0 to 16 in 16 bins of width 1; the largest gap belongs to the last bin. One of the four zeros is wrong."""
    gaps = torch.tensor([0.0, 0.0, 0.0, 0.0, 7.5, 16.0])
    wrong = torch.tensor([True, False, False, False, True, False])
    lines = histogram(gaps, wrong, 7.2).split("\n")
    assert histogram_counts("\n".join(lines)) == [4, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert ["wrong" in line for line in lines] == [index in (0, 7, 15) for index in range(16)]
    assert [line.split(" wrong")[0][-4:].strip() for line in lines if "wrong" in line] == ["25%", "100%", "0%"]
    assert [line.count("█") for line in lines] == [40, *[0] * 6, 10, *[0] * 7, 10]
    assert ["γ" in line for line in lines] == [index == 7 for index in range(16)]


def test_histogram_counts_add_up_to_n():
    torch.manual_seed(0)
    for n in (1, 2, 17, 500):
        gaps = torch.randn(n) * 3 + 1
        counts = histogram_counts(histogram(gaps, None, 0.0))
        assert len(counts) == 16
        assert sum(counts) == n


def test_histogram_marks_gamma_once_wherever_it_lies():
    """γ on each gap, on each bin's edge and between; the largest gap has its own test."""
    gaps = torch.randn(30, generator=torch.Generator().manual_seed(0)).sort().values
    inside = torch.linspace(gaps[0].item(), gaps[-1].item(), 65)[:-1]
    for gamma in [*gaps[:-1].tolist(), *inside.tolist()]:
        assert histogram(gaps, None, gamma).count("γ") == 1


def test_histogram_marks_a_gamma_that_is_the_largest_gap():
    """As γ is when the fraction makes one pair easy. The pair is counted in the last bin, so γ lies there."""
    for seed in range(10):
        gaps = torch.randn(30, generator=torch.Generator().manual_seed(seed))
        lines = histogram(gaps, None, easy_mask(gaps, 1 / 30, None)[1]).split("\n")
        assert ["γ" in line for line in lines] == [False] * 15 + [True]


def test_histogram_of_equal_gaps_has_one_full_bin_and_the_mark_there():
    lines = histogram(torch.full((5,), 0.3), None, torch.tensor(0.3).item()).split("\n")
    assert sum("γ" in line for line in lines) == 1
    assert next(line for line in lines if "γ" in line).split()[3] == "5"


def test_description_gives_size_agreement_and_wrong_labels():
    """The reward model agrees with one of two labels; by gold, one of two is wrong (a tie is not)."""
    lengths, rewards = torch.ones(2, 3, dtype=torch.long), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    part = Pairs(torch.zeros(6), lengths, None, "toy", rewards, torch.tensor([[1.0, 2.0], [1.0, 1.0]]))
    line = describe("easy", part)
    assert line == "easy: 2 pairs, the reward model agrees with 50.0% of the labels, 50.0% of the labels are wrong"
    assert describe("hard", part.select(torch.tensor([], dtype=torch.long))) == "hard: 0 pairs"


@pytest.fixture
def folder(tmp_path, reward_model, documents):
    """A folder with nine pairs and a reward model. The gold reward of a pair's chosen side is its number; by gold the
    four odd pairs are labelled wrongly, and the even ones are ties."""
    tokens = torch.cat([torch.cat(document) for document in documents]).int()
    lengths = torch.tensor([[len(part) for part in document] for document in documents])
    gold = torch.stack((torch.arange(9.0), torch.arange(9.0) + torch.arange(9) % 2), 1)
    Pairs(tokens, lengths, BYTES, "toy", None, gold).save(reward.Settings(out=str(tmp_path)), "pairs.pt")
    save_model(reward.Settings(out=str(tmp_path)), reward_model, BYTES)
    return tmp_path


def run_split(monkeypatch, folder, *flags, names=("easy.pt", "hard.pt")):
    """Runs the command; returns the numbers of the easy and of the hard pairs, and all their rewards."""
    monkeypatch.setattr("sys.argv", ["split.py", "--out", str(folder), "--device", "cpu", *flags])
    split.main()
    parts, rewards = [], torch.empty(9, 2)
    for name in names:
        content = torch.load(folder / name, weights_only=True)
        parts.append(content["gold"][:, 0].int().tolist())
        rewards[parts[-1]] = content["rewards"]
    return *parts, rewards


def test_command_heeds_threshold_gap_and_file_names(monkeypatch, folder, capsys, documents):
    """By absolute gap, at a γ between the largest and the next, in files of other names than the default ones; there,
    nothing is to be found. The histogram counts the four wrong labels."""
    *_, rewards = run_split(monkeypatch, folder)
    for name, other in (("pairs.pt", "mine.pt"), ("reward.pt", "judge.pt")):
        (folder / name).rename(folder / other)
    (folder / "easy.pt").unlink()
    gaps = (rewards[:, 0] - rewards[:, 1]).tolist()
    order = sorted(range(9), key=lambda index: -abs(gaps[index]))
    gamma = (abs(gaps[order[1]]) + abs(gaps[order[2]])) / 2
    assert min(gaps[index] for index in order[:2]) < 0
    capsys.readouterr()
    files = "--data mine.pt --init judge.pt --easy a.pt --hard b.pt --gap absolute --threshold".split()
    easy, hard, _ = run_split(monkeypatch, folder, *files, str(gamma), names=("a.pt", "b.pt"))
    assert (easy, hard) == (sorted(order[:2]), sorted(order[2:]))
    assert not (folder / "easy.pt").exists()
    bins = re.findall(r"to +\S+ +(\d+) +(\d+)% wrong", capsys.readouterr().out)
    assert sum(int(count) for count, _ in bins) == 9
    assert sum(int(count) * int(share) / 100 for count, share in bins) == pytest.approx(4, abs=0.1)


def test_command_puts_the_largest_gaps_into_easy(monkeypatch, folder):
    easy, hard, rewards = run_split(monkeypatch, folder, "--fraction", "0.34")
    gaps = (rewards[:, 0] - rewards[:, 1]).tolist()
    order = sorted(range(9), key=lambda index: -gaps[index])
    assert easy == sorted(order[:3])
    assert hard == sorted(order[3:])


def test_command_writes_both_parts_even_if_one_is_empty(monkeypatch, folder):
    assert run_split(monkeypatch, folder, "--fraction", "0")[:2] == ([], list(range(9)))
    assert run_split(monkeypatch, folder, "--fraction", "1")[:2] == (list(range(9)), [])


def test_random_control_keeps_the_sizes_and_every_pair_but_not_the_members(monkeypatch, folder):
    by_reward = run_split(monkeypatch, folder, "--fraction", "0.34")
    members = set()
    for seed in range(4):
        easy, hard, _ = run_split(monkeypatch, folder, "--fraction", "0.34", "--by", "random", "--seed", str(seed))
        assert len(easy) == len(by_reward[0]) == 3
        assert sorted(easy + hard) == list(range(9))
        members.add(tuple(easy))
    assert len(members) > 1
    assert members != {tuple(by_reward[0])}


def test_the_parts_are_not_written_over_each_other(monkeypatch, folder):
    with pytest.raises(UserError, match=r"same\.pt"):
        run_split(monkeypatch, folder, "--easy", "same.pt", "--hard", "same.pt")
    assert not (folder / "same.pt").exists()
