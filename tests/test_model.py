"""Chapter 1: tokenizer, toy world, pairs, packing, GPT, log-prob kernel, generation, files and the training loop."""

import gc
import gzip
import json
import math
import os
import random
import weakref
from collections import Counter
from itertools import pairwise

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import regex
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

import model
from model import (
    GPT,
    TOY_BEST_REWARD,
    WORD_PATTERN,
    Config,
    Linear,
    PairsBuilder,
    Settings,
    Training,
    UserError,
    attend,
    batch_indices,
    count_steps,
    fill_rows,
    generate,
    gold_reward,
    lay_out,
    load_file,
    load_model,
    load_pairs,
    pack,
    read_file_rows,
    read_hub_rows,
    read_pairs,
    reordered,
    row_problem,
    sample,
    save_model,
    settle,
    split_row,
    suits_onednn,
    token_logprobs,
    toy_rows,
    train_tokenizer,
    visibility,
    whole_copy,
)

CPU = torch.device("cpu")
BYTES = train_tokenizer([], 257)  # no merges: a token is a byte, and 256 is the end
TOY_TEXTS = [text for row in toy_rows(60, 0) for text in row.values()]
TOY_TOKENIZER = train_tokenizer(TOY_TEXTS, 400)


def close(result, expected, tolerance=1e-5):
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


# ---- Tokenizer ----


def random_texts():
    """Texts out of random bytes, read in many encodings, and of random characters from all of Unicode."""
    rng = random.Random(0)
    for length in range(120):
        noise = rng.randbytes(length)
        for encoding in ("utf-8", "latin-1", "cp1251", "utf-16-le", "utf-32-le", "shift_jis"):
            yield noise.decode(encoding, "replace")
        points = [rng.randrange(0x110000) for _ in range(length)]
        yield "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


@pytest.mark.parametrize("tokenizer", [BYTES, TOY_TOKENIZER], ids=["bytes", "toy"])
def test_random_unicode_survives_encode_and_decode(tokenizer):
    for text in random_texts():
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello, world! It's 12345678 o'clock.",
        "Привет, мир · Γειά σου · 你好世界 · こんにちは · 안녕 · مرحبا · שלום · नमस्ते · สวัสดี",
        "👍🏽 👩‍👩‍👧‍👦 🇫🇷 e\u0301 \u00e9 ﬁ",
        " \t\n\r\n   \u00a0\u3000 x  \n\n\n y   ",
        "\x00\x01\x1c\x1f\x7f\ufeff\u200b\u2028",
        "1 22 333 4444 55555 ¾ ٣ Ⅻ",
        "\n\nHuman: a\n\nAssistant: b",
    ],
)
def test_text_survives_encode_and_decode(text):
    assert TOY_TOKENIZER.decode(TOY_TOKENIZER.encode(text)) == text


def test_end_of_text_written_out_is_ordinary_text():
    for text in ("<|endoftext|>", " a <|endoftext|><|endoftext|> b\n"):
        ids = TOY_TOKENIZER.encode(text)
        assert TOY_TOKENIZER.end not in ids
        assert TOY_TOKENIZER.decode(ids) == text


def test_half_a_surrogate_pair_does_not_stop_anything():
    """JSON may hold one; it is no character and becomes a replacement."""
    tokenizer = train_tokenizer(["a \ud83d b \ud83d c"], 300)
    assert tokenizer.decode(tokenizer.encode("a \ud83d b")) == "a \ufffd b"


def test_every_byte_has_a_token():
    for byte in range(256):
        assert TOY_TOKENIZER.encoding.decode_single_token_bytes(byte) == bytes([byte])


def test_decode_takes_any_token_ids():
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(TOY_TOKENIZER.size) for _ in range(20)]
        assert isinstance(TOY_TOKENIZER.decode(ids), str)
    assert BYTES.decode([0xC3]) == "\ufffd"
    assert BYTES.decode([104, BYTES.end, 105]) == "hi"


def test_tokenizer_training_is_deterministic():
    assert train_tokenizer(TOY_TEXTS, 400).state == TOY_TOKENIZER.state
    assert TOY_TOKENIZER.size == 400


def test_merges_worked_by_hand():
    # Words: "aab", " aab", " ab". Pairs of neighbours: ab 3, aa 2, " a" 2. So "ab" is merged first. Then the words
    # are a·ab, " "·a·ab and " "·ab, with the pairs a·ab 2, " "·a 1, " "·ab 1: "aab" is second. Then none is left twice.
    tokenizer = train_tokenizer(["aab aab", " ab"], 1000)
    assert tokenizer.state["tokens"][256:] == ["ab", "aab"]
    assert tokenizer.encode("aab aab ab") == [257, 32, 257, 32, 256]
    assert (tokenizer.end, tokenizer.size) == (258, 259)


def test_every_merge_is_of_a_most_frequent_pair():
    """Plays the merges again with all pairs counted anew each time."""
    words = Counter(word for text in TOY_TEXTS for word in regex.findall(WORD_PATTERN, text))
    words = {tuple(bytes([byte]) for byte in word.encode()): count for word, count in words.items()}
    for token in TOY_TOKENIZER.state["tokens"][256:]:
        counts = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                counts[pair] += count
        made_by = {pair: count for pair, count in counts.items() if pair[0] + pair[1] == token.encode("latin-1")}
        assert max(made_by.values()) == max(counts.values())
        merged_words = {}
        for word, count in words.items():
            merged = []
            for piece in word:
                if merged and max(made_by, key=made_by.get) == (merged[-1], piece):
                    piece = merged.pop() + piece
                merged.append(piece)
            merged_words[tuple(merged)] = count
        words = merged_words


# ---- The toy world ----

LAMP = "\n\nHuman: How do I clean my old lamp?\n\nAssistant:"
THREE_STEPS = " Wipe the lamp with a cloth. Rub the lamp with soap. Dry the lamp in the sun."


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("", 0.0),
        (" Wipe the lamp with a cloth.", 1.0),
        (THREE_STEPS, 3.0),
        (THREE_STEPS + " Great question! Good luck with it!", 4.0),  # 3 + 0.5 + 0.5
        (THREE_STEPS + " Take every stain off the lamp.", 2.75),  # a fourth step is filler: 3 − 0.25
        (" Wipe the bike with a cloth.", -0.5),  # wrong object
        (" Sand the lamp first.", -0.5),  # wrong task
        (" Drink more water.", -0.5),  # off topic
        (" Great question!", 0.5),
        (" Great question! Happy to help! Good luck with it!", 0.75),  # a third polite one is filler: 1 − 0.25
        (" Great question! Great question!", 0.0),  # 0.5 − 0.5 for saying it again
        (" What a stupid question.", -1.0),
        (" Anyway, that is life.", -0.25),
        (" Anyway, that is life. Anyway, that is life.", -0.75),  # −0.25 − 0.5
        (" Wipe the lamp with a cloth. Wipe the lamp with a cloth.", 0.5),  # 1 − 0.5
        (" Wipe the lamp with a", -0.25),  # a broken-off sentence is filler
        ("qwz lamp xx", -0.25),
        (" Wipe the lamp with a cloth. Wipe the bike with a cloth. Great question! Stop wasting my time.", 0.0),
    ],
)
def test_gold_reward_by_hand(response, score):
    assert gold_reward(LAMP, response) == score


def test_gold_reward_looks_at_the_last_question_only():
    prompt = "\n\nHuman: How do I paint my red bike?\n\nAssistant: Sand the bike first." + LAMP
    assert gold_reward(prompt, " Wipe the lamp with a cloth.") == 1.0
    assert gold_reward(prompt, " Sand the bike first.") == -0.5


def test_best_toy_reward_is_reached_and_never_passed():
    assert gold_reward(LAMP, THREE_STEPS + " Great question! Good luck with it!") == TOY_BEST_REWARD
    sentences = [step.format("lamp") for steps in model.TOY_STEPS.values() for step in steps]
    sentences += model.TOY_POLITE + model.TOY_FILLER
    rng = random.Random(0)
    best = max(gold_reward(LAMP, " ".join(rng.choices(sentences, k=rng.randint(1, 12)))) for _ in range(1000))
    assert best <= TOY_BEST_REWARD


def test_toy_rows_depend_on_the_seed_alone():
    assert list(toy_rows(50, 3)) == list(toy_rows(50, 3))
    assert list(toy_rows(50, 3)) != list(toy_rows(50, 4))


def test_toy_labels_are_bradley_terry_draws_wrong_mostly_where_the_gap_is_small():
    rows = list(toy_rows(4000, 1))
    gaps = [gold_reward(row["prompt"], row["chosen"]) - gold_reward(row["prompt"], row["rejected"]) for row in rows]
    wrong = [-gap for gap in gaps if gap < 0]
    assert 0.1 < len(wrong) / len(rows) < 0.3
    assert sum(gap <= 2.5 for gap in wrong) > 0.95 * len(wrong)
    for low, high in ((0, 1), (1, 2), (2, 8)):
        sizes = [abs(gap) for gap in gaps if low < abs(gap) <= high]
        expected = sum(1 / (1 + math.exp(size)) for size in sizes)
        assert abs(sum(low < gap <= high for gap in wrong) - expected) < 4 * math.sqrt(expected)


def test_a_share_of_wrong_labels_is_wrong_whatever_the_gap_and_changes_nothing_else():
    drawn = list(toy_rows(2000, 1))
    for share in (0.0, 0.25, 1.0):
        rows = list(toy_rows(2000, 1, share))
        assert [{row["chosen"], row["rejected"]} for row in rows] == [{r["chosen"], r["rejected"]} for r in drawn]
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in drawn]
        gaps = [gold_reward(row["prompt"], row["chosen"]) - gold_reward(row["prompt"], row["rejected"]) for row in rows]
        for low, high in ((0, 1), (1, 2.5), (2.5, 9)):
            sizes = [gap for gap in gaps if low < abs(gap) <= high]
            assert abs(sum(gap < 0 for gap in sizes) - share * len(sizes)) <= 4 * math.sqrt(
                share * (1 - share) * len(sizes)
            )


# ---- Pairs: rows, rules, sources, files ----


def make(rows, context=20, max_response=8):
    """Pairs of bytes; also checks that each row is either kept or counted once as dropped."""
    builder = PairsBuilder(BYTES, "test", context, max_response)
    for row in rows:
        builder.add(row)
    pairs, counts = builder.pairs(), builder.counts
    assert builder.rows == len(rows)
    assert len(pairs) + sum(count for what, count in counts.items() if what.startswith("dropped")) == len(rows)
    return pairs, counts


def test_transcripts_are_split_at_the_last_assistant_turn():
    talk = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = split_row("row 1", {"chosen": talk + " yes", "rejected": talk + " no"})
    assert row == (talk, talk, " yes", " no")


def test_a_prompt_field_is_taken_as_it_is():
    row = {"prompt": "a\n\nAssistant:", "chosen": "b\n\nAssistant: c", "rejected": "d", "more": 1}
    assert split_row("row 1", row) == ("a\n\nAssistant:", "a\n\nAssistant:", "b\n\nAssistant: c", "d")


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"chosen": "a"}, "rejected"),
        ({"rejected": "a"}, "chosen"),
        ({"chosen": 3, "rejected": "a"}, "chosen"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "prompt"),
        ({"prompt": "p", "chosen": "a", "rejected": ["b"]}, "rejected"),
        ({}, "chosen"),
        (["a", "b"], "chosen"),
        ("prompt", "chosen"),
        (None, "chosen"),
    ],
)
def test_a_missing_or_wrong_field_is_an_error_that_names_the_row(row, field):
    with pytest.raises(UserError, match=f"file row 7.*'{field}'"):
        split_row("file row 7", row)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a"}, "turn"),
        ({"chosen": "a b", "rejected": "a c"}, "turn"),
        ({"chosen": "a\n\nAssistant: b", "rejected": "c\n\nAssistant: d"}, "prompts differ"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "empty response"),
        ({"prompt": "p", "chosen": "a", "rejected": " \n"}, "empty response"),
        ({"chosen": "a\n\nAssistant:", "rejected": "a\n\nAssistant: d"}, "empty response"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "identical"),
    ],
)
def test_what_cannot_be_a_pair_is_dropped_and_counted(row, why):
    split = split_row("row 1", row)
    assert why in row_problem(split)
    pairs, counts = make([split, ("p", "p", "good", "bad"), split])
    assert len(pairs) == 1
    assert counts == {row_problem(split): 2}


def test_a_good_row_has_no_problem():
    assert row_problem(("p", "p", " a", " b")) is None


def test_pairs_hold_the_ids_of_prompt_and_both_responses():
    pairs, counts = make([("pq", "pq", "a", "bc"), ("x", "x", "yz", "w")])
    assert not counts
    assert [[part.tolist() for part in pair] for pair in (pairs[0], pairs[1])] == [
        [list(b"pq"), [*b"a", 256], [*b"bc", 256]],
        [list(b"x"), [*b"yz", 256], [*b"w", 256]],
    ]
    assert pairs.tokens.dtype == torch.int32
    assert pairs.lengths.tolist() == [[2, 2, 3], [1, 3, 2]]


def test_the_prompt_ids_are_those_of_the_prompt_alone():
    """ " Wipe" after "Assistant:" might merge differently if the two were tokenised as one text."""
    rows = [(row["prompt"], row["prompt"], row["chosen"], row["rejected"]) for row in toy_rows(20, 0)]
    builder = PairsBuilder(TOY_TOKENIZER, "toy", 512, 128)
    for row in rows:
        builder.add(row)
    pairs = builder.pairs()
    assert len(pairs) == len(rows)
    for index, row in enumerate(rows):
        prompt, chosen, rejected = (part.tolist() for part in pairs[index])
        assert prompt == TOY_TOKENIZER.encode(row[0])
        assert chosen == [*TOY_TOKENIZER.encode(row[2]), TOY_TOKENIZER.end]
        assert rejected == [*TOY_TOKENIZER.encode(row[3]), TOY_TOKENIZER.end]


def test_a_response_over_the_limit_is_dropped_not_cut():
    pairs, counts = make([("p", "p", "1234567", "1"), ("p", "p", "12345678", "1"), ("p", "p", "1", "12345678")])
    assert pairs.lengths.tolist() == [[1, 8, 2]]  # seven bytes and the end are eight tokens
    assert list(counts.values()) == [2]


@pytest.mark.parametrize("context", [9, 14, 20])
def test_a_long_prompt_keeps_its_end(context):
    pairs, counts = make([("0123456789abcdefgh",) * 2 + ("1234567", "1"), ("h", "h", "1", "2")], context)
    assert bytes(pairs[0][0].tolist()) == b"0123456789abcdefgh"[8 - context :]
    assert bytes(pairs[1][0].tolist()) == b"h"
    assert list(counts.values()) == [1]  # counted, though kept


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"dim": 20, "heads": 4}, "--dim 20"),  # heads of 5: rotary positions turn pairs
        ({"heads": 4, "kv_heads": 3}, "--kv-heads 3"),
    ],
)
def test_a_shape_that_makes_no_model_is_a_user_error(flags, named):
    with pytest.raises(UserError, match=named):
        Settings(**flags)


@pytest.mark.parametrize("context", [64, 128])
def test_a_context_without_room_for_a_prompt_is_a_user_error(context):
    with pytest.raises(UserError, match=f"--context {context}"):
        read_pairs(settled(context=context, max_response=128))


ROWS = [
    {"chosen": "a\n\nAssistant: é", "rejected": "a\n\nAssistant: c"},
    {"prompt": "p", "chosen": "1", "rejected": "2"},
]


def write_rows(path, rows=ROWS):
    """Writes rows in the form that the file's ending asks for."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else lines, "utf-8")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet"])
def test_a_file_gives_its_rows_and_where_they_are(name, tmp_path):
    rows = [{"prompt": f"p{number}", "chosen": "é\n", "rejected": "2"} for number in range(5)]
    write_rows(tmp_path / name, rows)
    expected = [(f"{tmp_path / name} row {number}", row) for number, row in enumerate(rows, 1)]
    assert list(read_file_rows(tmp_path / name)) == expected


def test_a_folder_gives_the_rows_of_its_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.json", "c.parquet", "d.jsonl.gz"):
        write_rows(tmp_path / name, [{"prompt": name, "chosen": "1", "rejected": "2"}])
    (tmp_path / "README.md").write_text("not rows")
    assert [row["prompt"] for _, row in read_file_rows(tmp_path)] == ["a.json", "b.jsonl", "c.parquet", "d.jsonl.gz"]


def test_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(["", json.dumps(ROWS[0]), "  ", json.dumps(ROWS[1]), "", ""]))
    assert [row for _, row in read_file_rows(path)] == ROWS


def test_a_bad_line_is_an_error_that_names_file_and_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1]) + '\n{"chosen": "a\n')
    rows = read_file_rows(path)
    assert [next(rows)[1], next(rows)[1]] == ROWS
    with pytest.raises(UserError, match=r"rows\.jsonl row 3"):
        next(rows)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet"])
def test_a_damaged_file_is_a_user_error(name, tmp_path):
    path = tmp_path / name
    write_rows(path, ROWS[:1] * 50)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) * 2 // 3], b"\xff\xfe\x00garbage"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=name):
            list(read_file_rows(path))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_a_user_error(content, tmp_path):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"rows\.jsonl"):
        list(read_file_rows(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("content", ["[]", "3", "null", '{"chosen": "a", "rejected": "b"}'])
def test_json_that_is_no_list_of_rows_is_a_user_error(content, tmp_path):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(UserError, match=r"rows\.json"):
        for where, row in read_file_rows(tmp_path / "rows.json"):
            split_row(where, row)


def test_a_missing_file_and_an_empty_folder_are_user_errors(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            list(read_file_rows(path))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The real `datasets` library on a local folder laid out as the repositories are; returns what was asked."""
    asked, load = [], datasets.load_dataset

    def load_dataset(repository, revision=None, **options):
        asked.append((repository, revision))
        return load(str(tmp_path / repository), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def hh_row(text):
    return {"chosen": f"\n\nHuman: {text}\n\nAssistant: b", "rejected": f"\n\nHuman: {text}\n\nAssistant: c"}


@pytest.mark.parametrize(("source", "texts"), [("hh", ["x", "y"]), ("hh:part-x", ["x"]), ("hh:part-y", ["y"])])
def test_hh_rows_and_its_parts(source, texts, hub, tmp_path):
    for part in ("x", "y"):
        folder = tmp_path / "Anthropic/hh-rlhf" / f"part-{part}"
        folder.mkdir(parents=True)
        for split, text in (("train", part), ("test", "held back by the data set")):
            with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
                file.write(json.dumps(hh_row(text)) + "\n")
    rows = list(read_hub_rows(source))
    assert hub == [("Anthropic/hh-rlhf", None)]
    assert sorted(where for where, _ in rows) == [f"Anthropic/hh-rlhf row {n}" for n in range(1, len(rows) + 1)]
    prompts = [f"\n\nHuman: {text}\n\nAssistant:" for text in texts]
    assert sorted(split_row(*row) for row in rows) == [(prompt, prompt, " b", " c") for prompt in prompts]


def test_the_first_rows_of_hh_hold_some_of_each_part_and_know_their_numbers(hub, tmp_path):
    for part in ("x", "y"):
        folder = tmp_path / "Anthropic/hh-rlhf" / f"part-{part}"
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text("".join(json.dumps(hh_row(f"{part}{n}")) + "\n" for n in range(50)))
    texts = [f"{part}{n}" for part in ("x", "y") for n in range(50)]
    rows = [(int(where.split()[-1]), row) for where, row in read_hub_rows("hh")]
    assert sorted(number for number, _ in rows) == list(range(1, 101))
    assert all(row == hh_row(texts[number - 1]) for number, row in rows)
    assert 5 <= sum(number <= 50 for number, _ in rows[:20]) <= 15
    assert rows == [(int(where.split()[-1]), row) for where, row in read_hub_rows("hh")]


def comparison(choice, post="I did it."):
    """A row of the TL;DR comparisons with all of its columns."""
    info = {"id": "t3_1", "post": post, "title": "So", "subreddit": "tifu", "site": None, "article": None}
    summaries = [{"text": text, "policy": "sup2", "note": None} for text in (" first", " second")]
    return {"info": info, "summaries": summaries, "choice": choice, "worker": "w", "batch": "batch3", "split": "train",
            "extra": {"confidence": None}}  # fmt: skip


def test_tldr_rows_become_prompt_chosen_and_rejected(hub, tmp_path):
    folder = tmp_path / "openai/summarize_from_feedback/comparisons"
    for split, rows in (("train", [comparison(0), comparison(1)]), ("validation", [comparison(0)])):
        (folder / split).mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / split / "0000.parquet")
    rows = sorted(read_hub_rows("tldr"), key=lambda row: row[0])
    first, second = (split_row(*row) for row in rows)
    prompt = "SUBREDDIT: r/tifu\n\nTITLE: So\n\nPOST: I did it.\n\nTL;DR:"
    assert hub == [("openai/summarize_from_feedback", "refs/convert/parquet")]
    assert first == (prompt, prompt, " first", " second")
    assert second == (prompt, prompt, " second", " first")


@pytest.mark.parametrize(
    "row",
    [
        comparison(2),
        comparison(None),
        comparison(0) | {"info": None},
        comparison(0) | {"summaries": [{"text": "one"}]},
        comparison(0) | {"summaries": None},
        {"summaries": []},
    ],
)
def test_a_broken_comparison_is_an_error_that_names_the_row(row):
    with pytest.raises(UserError, match="row 7: not a TL;DR comparison"):
        split_row("row 7", row)


@pytest.mark.parametrize("error", [ConnectionError("no network\nmore\nlines"), ValueError(), FileNotFoundError("gone")])
@pytest.mark.parametrize("source", ["hh", "hh:harmless-base", "tldr"])
def test_a_hub_that_fails_is_one_line(source, error, monkeypatch):
    def fail(*names, **more):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError) as caught:
        list(read_hub_rows(source))
    assert f"--data {source}" in str(caught.value)
    assert "\n" not in str(caught.value)


def settled(**flags):
    """Settings as they are for a model from scratch."""
    settings = Settings(**flags)
    settle(settings, pretrained=False)
    return settings


def test_training_and_test_pairs_share_no_prompt(tmp_path):
    train, test = read_pairs(settled(out=str(tmp_path), limit=400, test_share=0.25))
    prompts = [{tuple(part[index][0].tolist()) for index in range(len(part))} for part in (train, test)]
    assert not prompts[0] & prompts[1]
    share = len(prompts[1]) / len(prompts[0] | prompts[1])
    assert 0.2 < share < 0.3
    assert train.tokenizer.state == test.tokenizer.state


def test_toy_pairs_carry_the_gold_reward_of_their_texts(tmp_path):
    train, _ = read_pairs(settled(out=str(tmp_path), limit=100))
    for index in range(len(train)):
        prompt, chosen, rejected = (train.tokenizer.decode(part.tolist()) for part in train[index])
        assert train.gold[index].tolist() == [gold_reward(prompt, chosen), gold_reward(prompt, rejected)]


def scored_pairs():
    pairs, _ = make([("pq", "pq", "a", "bc"), ("x", "x", "yz", "w"), ("uvw", "uvw", "s", "t")])
    pairs.rewards, pairs.gold = torch.tensor([[1.0, 0.0], [2.0, 3.0], [5.0, 4.0]]), torch.arange(6.0).view(3, 2)
    pairs.source = "toy"
    return pairs


def assert_same_pairs(pairs, expected):
    assert len(pairs) == len(expected)
    for index in range(len(expected)):
        assert [part.tolist() for part in pairs[index]] == [part.tolist() for part in expected[index]]
    assert pairs.tokens.dtype == expected.tokens.dtype
    assert (pairs.tokenizer.state, pairs.source) == (expected.tokenizer.state, expected.source)
    for name in ("rewards", "gold"):
        result, wanted = getattr(pairs, name), getattr(expected, name)
        assert (result is None) == (wanted is None)
        assert wanted is None or torch.equal(result, wanted)


@pytest.mark.parametrize("scored", [True, False])
def test_pairs_survive_save_and_load(scored, tmp_path):
    pairs = scored_pairs()
    if not scored:
        pairs.rewards = pairs.gold = None
        pairs.source = "made up"
    pairs.save(Settings(out=str(tmp_path)), "pairs.pt")
    assert_same_pairs(load_pairs(Settings(out=str(tmp_path)), "pairs.pt"), pairs)


def test_pairs_without_a_pair_cannot_be_loaded(tmp_path):
    scored_pairs().select(torch.tensor([], dtype=torch.long)).save(Settings(out=str(tmp_path)), "hard.pt")
    with pytest.raises(UserError, match=r"hard\.pt"):
        load_pairs(Settings(out=str(tmp_path)), "hard.pt")


def test_select_takes_pairs_with_their_rewards_in_order():
    pairs = scored_pairs()
    chosen = pairs.select(torch.tensor([2, 0]))
    assert len(chosen) == 2
    for place, index in enumerate((2, 0)):
        assert [part.tolist() for part in chosen[place]] == [part.tolist() for part in pairs[index]]
    assert chosen.rewards.tolist() == [[5.0, 4.0], [1.0, 0.0]]
    assert chosen.gold.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert_same_pairs(pairs.select(torch.arange(3)), pairs)


# ---- Packing ----


def plain_hidden(policy, tokens):
    """Hidden states [length, dim] of one sequence, with an ordinary causal mask."""
    n = len(tokens)
    return policy(tokens[None], torch.arange(n)[None], [(n, torch.ones(n, n, dtype=torch.bool).tril())])[0]


def plain_logprobs(policy, prompt, response):
    """Log-probs of the response's tokens, the slow and obvious way."""
    logits = plain_hidden(policy, torch.cat((prompt, response))) @ policy.vocabulary_weight.T
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, response[:, None])[:, 0]


def packed_logprobs(policy, documents, tokens_per_pass=0):
    """For each document, the log-probs of each of its responses, all packed together."""
    result = [None] * len(documents)
    for batch in pack(documents, CPU, tokens_per_pass):
        logprobs, _ = policy.logprobs(batch)
        pieces = iter(logprobs.split(batch.sequence.bincount().tolist()))
        for member in batch.members.tolist():
            result[member] = [next(pieces) for _ in documents[member][1:]]
    return result


def test_logprobs_are_those_of_a_plain_forward(policy, documents):
    for (prompt, *responses), results in zip(documents, packed_logprobs(policy, documents), strict=True):
        for response, result in zip(responses, results, strict=True):
            close(result, plain_logprobs(policy, prompt, response))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.15)])
def test_logprobs_do_not_depend_on_what_they_are_packed_with(policy, documents, dtype, tolerance):
    """Among strangers, alone with the sibling, and without it: all the same, but for bf16's rounding of logits."""
    policy.activations = dtype
    for document, results in zip(documents, packed_logprobs(policy, documents), strict=True):
        (alone,) = packed_logprobs(policy, [document])
        prompt, *responses = document
        single = [packed_logprobs(policy, [(prompt, response)])[0][0] for response in responses]
        swapped = packed_logprobs(policy, [(prompt, *responses[::-1])])[0][::-1]
        for others in (alone, single, swapped):
            for result, other in zip(results, others, strict=True):
                close(result, other, tolerance)


def test_changing_one_document_leaves_the_others_alone(policy, documents):
    before = packed_logprobs(policy, documents)
    changed = [(prompt, (chosen + 1) % 97, rejected) for prompt, chosen, rejected in documents]
    for index in range(len(documents)):
        after = packed_logprobs(policy, [*documents[:index], changed[index], *documents[index + 1 :]])
        for place in range(len(documents)):
            chosen_moved = not torch.allclose(after[place][0], before[place][0], atol=1e-3)
            assert chosen_moved == (place == index)
            close(after[place][1], before[place][1], 1e-6)  # the sibling has not moved either


@pytest.mark.parametrize("mode, tolerance", [("fp32", 1e-6), ("bf16", 0.02), ("checkpointed", 1e-6)])
def test_gradients_do_not_depend_on_the_size_of_a_pass(policy, documents, mode, tolerance):
    """The whole gradient's relative error."""
    policy.activations = torch.bfloat16 if mode == "bf16" else torch.float32
    policy.checkpointed = mode == "checkpointed"
    many = documents * 3
    gradients = []
    for tokens_per_pass in (1, 300, 10**6):
        policy.zero_grad()
        batches = list(pack(many, CPU, tokens_per_pass))
        for batch in batches:
            (policy.logprobs(batch)[0] * batch.offset.cos()).sum().backward()
        gradients.append((len(batches), torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])))
    (most, reference), *others = gradients
    assert most > others[0][0] > others[1][0] == 1
    for _, other in others:
        assert (other - reference).norm() <= tolerance * reference.norm()


def test_packed_rows_by_hand():
    first = torch.tensor([5, 6]), torch.tensor([7, 8]), torch.tensor([9])
    second = torch.tensor([4]), torch.tensor([3])
    batch = lay_out([first, second], [[0], [1]], CPU)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    assert batch.branch.tolist() == [[0, 0, 1, 1, 2], [0, 1, 0, 0, 0]]
    assert batch.document.tolist() == [[0, 0, 0, 0, 0], [1, 1, -1, -1, -1]]
    assert batch.source.tolist() == [1, 2, 1, 5]  # the prompt's last token predicts the first of both responses
    assert batch.target.tolist() == [7, 8, 9, 3]
    assert batch.sequence.tolist() == [0, 0, 1, 2]
    assert batch.offset.tolist() == [0, 1, 0, 0]
    assert batch.last.tolist() == [3, 4, 6]
    assert batch.members.tolist() == [0, 1]


@pytest.mark.parametrize("tokens_per_pass", [0, 1, 100, 400])
def test_packing_loses_and_invents_nothing(documents, tokens_per_pass):
    """Every document is in one batch once, and the index lists lead to its tokens."""
    many, seen = documents * 4, []
    for batch in pack(many, CPU, tokens_per_pass):
        longest = max(sum(map(len, many[member])) for member in batch.members.tolist())
        assert not tokens_per_pass or (batch.document >= 0).sum() < tokens_per_pass + longest
        used = sum(len(part) for member in batch.members.tolist() for part in many[member])
        assert (batch.document >= 0).sum() == used <= batch.tokens.numel()
        tokens, positions, branch = (part.flatten() for part in (batch.tokens, batch.positions, batch.branch))
        document, number = batch.document.flatten(), 0
        for place, member in enumerate(batch.members.tolist()):
            prompt, *responses = many[member]
            assert tokens[(document == place) & (branch == 0)].tolist() == prompt.tolist()
            for label, response in enumerate(responses, 1):
                mine = batch.sequence == number
                assert batch.target[mine].tolist() == response.tolist()
                assert batch.offset[mine].tolist() == list(range(len(response)))
                before = torch.cat((prompt[-1:], response[:-1]))
                assert tokens[batch.source[mine]].tolist() == before.tolist()
                assert positions[batch.source[mine]].tolist() == (len(prompt) - 1 + batch.offset[mine]).tolist()
                last = batch.last[number]
                assert (document[last], branch[last], tokens[last]) == (place, label, response[-1])
                assert positions[last] == len(prompt) + len(response) - 1
                number += 1
        assert len(batch.last) == number
        seen += batch.members.tolist()
    assert sorted(seen) == list(range(len(many)))


def test_rows_of_a_gpu_are_about_equally_full():
    """Three hundred documents of 20 to 1,000 tokens, longest first: little is left empty."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(20, 1001, (300,), generator=generator).sort(descending=True).values.tolist()
    rows = fill_rows(sizes, list(range(300)), torch.device("cuda"))
    loads = [sum(sizes[index] for index in row) for row in rows]
    assert sorted(index for row in rows for index in row) == list(range(300))
    assert 4096 <= max(loads) < 1.1 * 4096
    assert sum(loads) > 0.98 * len(rows) * max(loads)
    rows = fill_rows([9000, 100], [0, 1], torch.device("cuda"))  # longer than a row: the row grows
    assert rows == [[0, 1]]


def test_a_row_has_no_gaps(documents):
    """On the CPU: one row, and every place of it a token; of two processes, one row each, about equally full."""
    many = documents * 20
    for batch in pack(many, CPU, 1000):
        assert len(batch.tokens) == 1 and (batch.document >= 0).all()
    sizes = sorted((sum(map(len, document)) for document in many), reverse=True)
    first, second = fill_rows(sizes, list(range(len(many))), CPU, least=2)
    assert sorted(first + second) == list(range(len(many)))
    assert abs(sum(sizes[index] for index in first) - sum(sizes[index] for index in second)) <= sizes[0]


def test_passes_are_about_equally_long():
    """What is left after two full passes would make a small one, whose matrix products are slow."""
    batches = pack([(torch.arange(60), torch.arange(40))] * 22, CPU, 1000)
    assert [batch.tokens.numel() for batch in batches] == [800, 800, 600]
    batches = pack([(torch.arange(40), torch.arange(20))] * 33, CPU, 1000)
    assert [batch.tokens.numel() for batch in batches] == [1020, 960]


def test_prompts_alone_can_be_packed():
    """Generation does so; `last` is then the prompt's last token."""
    prompts = [torch.arange(1, 4), torch.arange(10, 15)]
    (batch,) = pack([(prompt,) for prompt in prompts], CPU)
    ends = batch.tokens.flatten()[batch.last].tolist()
    assert ends == [prompts[member][-1].item() for member in batch.members.tolist()]
    assert not len(batch.source) and not len(batch.target)


def test_a_batch_can_be_moved_after_its_mask_was_made(documents):
    batch = next(pack(documents, CPU))
    for (size, mask), (moved_size, moved) in zip(batch.mask, batch.to(CPU).mask, strict=True):
        assert size == moved_size and torch.equal(mask, moved)


def allowed(at, seen):
    """May a place labelled (document, branch or nothing in the prompt) attend to an earlier one labelled `seen`?"""
    return at[0] == seen[0] and (len(seen) == 1 or seen == at)


def ids(count):
    return torch.ones(count, dtype=torch.long)


def test_masks_are_the_rule_token_by_token():
    documents = [(ids(2), ids(3), ids(2)), (ids(1), ids(1), ids(2)), (ids(3), ids(2)), (ids(4),)]
    batch = lay_out(documents, [[2, 0, 3, 1]], CPU)
    labels = [["C", "C", "C", "C1", "C1"], ["A", "A", "A1", "A1", "A1", "A2", "A2"], [*"DDDD"], ["B", "B1", "B2", "B2"]]
    assert [size for size, _ in batch.mask] == [5, 7, 4, 4]
    for (_, mask), places in zip(batch.mask, labels, strict=True):
        if mask is None:  # every token sees all before it: right for one branch or none
            assert all(allowed(at, seen) for place, at in enumerate(places) for seen in places[: place + 1])
            continue
        for query, at in enumerate(places):
            for key, seen in enumerate(places):
                assert mask[query, key] == (key <= query and allowed(at, seen)), (places, query, key)
    assert [mask is None for _, mask in batch.mask] == [True, False, True, False]


def test_the_unused_end_of_a_row_is_a_document_of_its_own():
    """Or a block mask would hold rows that see nothing."""
    batch = lay_out([(ids(3), ids(2)), (ids(1), ids(1))], [[0], [1]], CPU)
    labels = [["A", "A", "A", "A1", "A1"], ["B", "B1", *"..."]]
    rule = visibility(batch.document, batch.branch)
    for row, places in enumerate(labels):
        for query, at in enumerate(places):
            for key, seen in enumerate(places):
                assert rule(row, 0, query, key) == (key <= query and allowed(at, seen)), (row, query, key)


@pytest.mark.parametrize("longest", [30, 310])
def test_flex_attention_equals_attention_by_document(policy, documents, longest):
    """Bare attention on random queries, and the whole GPT: under a block mask, of rows that no block divides, and with
    a mask for each document."""
    several = [*documents, (torch.arange(longest) % 97, torch.arange(5))]
    (batch,) = pack(several, CPU)
    rule, length = visibility(batch.document, batch.branch), batch.tokens.shape[1]
    block_mask = create_block_mask(rule, 1, None, length, length, device="cpu")
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, heads, length, 8, generator=generator) for heads in (4, 2, 2)]
    with torch.no_grad():
        close(attend(*parts, block_mask), attend(*parts, batch.mask))
        expected = policy(batch.tokens, batch.positions, batch.mask)
        close(policy(batch.tokens, batch.positions, block_mask), expected)
        rows = lay_out(several, fill_rows([1] * len(several), batch.members.tolist(), CPU, least=3), CPU)
        rule, length = visibility(rows.document, rows.branch), rows.tokens.shape[1]
        block_mask = create_block_mask(rule, 3, None, length, length, device="cpu")
        cut = policy(rows.tokens, rows.positions, block_mask)
        for place, member in enumerate(rows.members.tolist()):  # the same documents in three rows, with unused ends
            at = (batch.members == member).nonzero()[0, 0]
            close(cut[rows.document == place], expected[batch.document == at])


# ---- The GPT ----


def test_hidden_states_depend_on_earlier_tokens_only(policy):
    tokens = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(0))
    before = plain_hidden(policy, tokens)
    for place in (0, 17, 39):
        changed = tokens.clone()
        changed[place] = (changed[place] + 1) % 97
        moved = (plain_hidden(policy, changed) - before).abs().amax(-1)
        assert (moved[:place] < 1e-6).all()
        assert (moved[place:] > 1e-6).all()


def test_only_differences_of_positions_matter(policy):
    tokens = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    positions, mask = torch.arange(40)[None], [(40, torch.ones(40, 40, dtype=torch.bool).tril())]
    hidden = policy(tokens, positions, mask)
    close(policy(tokens, positions + 100, mask), hidden, 1e-4)
    assert (policy(tokens, positions * 2, mask) - hidden).abs().max() > 1e-2


def test_rotary_angles_by_hand():
    """Head width 4: pairs (x0, x2) and (x1, x3); at position 3 they turn by 3 · 10000^0 and 3 · 10000^(-1/2)."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    angle = torch.tensor([3.0, 0.03]).view(1, 1, 1, 2)
    turned = model.rotate(x, angle.cos(), angle.sin()).flatten()
    for first, second, turn in ((0, 2, 3.0), (1, 3, 0.03)):
        number = complex(x.flatten()[first], x.flatten()[second]) * complex(math.cos(turn), math.sin(turn))
        assert (turned[first].item(), turned[second].item()) == pytest.approx((number.real, number.imag), abs=1e-6)


def test_gpt_equals_the_formulas_written_out():
    """One head, one layer, token by token, in float64."""
    torch.manual_seed(0)
    policy = GPT(Config(vocabulary=11, dim=8, layers=1, heads=1, kv_heads=1, mlp=12, context=16)).double()
    nn.init.normal_(policy.norm.weight), nn.init.normal_(policy.blocks[0].mlp_norm.weight)
    block, tokens = policy.blocks[0], torch.tensor([3, 1, 4, 1, 5])

    def norm(x, weight):
        return x / (x.square().mean() + 1e-5).sqrt() * weight

    def turn(x, position):
        angle = position * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
        pairs = torch.complex(x[:4], x[4:]) * torch.polar(torch.ones(4, dtype=torch.float64), angle)
        return torch.cat((pairs.real, pairs.imag))

    stream = policy.embedding.weight[tokens]
    normed = [norm(x, block.attention_norm.weight) for x in stream]
    keys = [turn(block.attention.key.weight @ x, place) for place, x in enumerate(normed)]
    expected = []
    for place, x in enumerate(normed):
        query = turn(block.attention.query.weight @ x, place)
        weights = torch.stack([query @ key / math.sqrt(8) for key in keys[: place + 1]]).softmax(0)
        values = torch.stack([block.attention.value.weight @ x for x in normed[: place + 1]])
        x = stream[place] + block.attention.output.weight @ (weights @ values)
        y = norm(x, block.mlp_norm.weight)
        gate, up = block.gate.weight @ y, block.up.weight @ y
        expected.append(norm(x + block.down.weight @ (gate / (1 + (-gate).exp()) * up), policy.norm.weight))
    close(plain_hidden(policy, tokens), torch.stack(expected), 1e-6)


# ---- The log-prob kernel ----

N, V, D = 50, 97, 16


def kernel_inputs():
    """hidden, weight, targets with repetitions, and a weight for each log-prob."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, grad = (torch.randn(shape, generator=generator) for shape in ((N, D), (V, D), (N,)))
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[10:20] = 5
    return hidden, weight, targets, grad


def run_kernel(hidden, weight, targets, grad, temperature=1.0, compiled=False):
    """(log-probs, entropies, gradient of hidden, gradient of weight)."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropies = token_logprobs(hidden, weight, targets, temperature, compiled)
    (logprobs * grad).sum().backward()
    return logprobs.detach(), entropies, hidden.grad, weight.grad


def run_plain(hidden, weight, targets, grad, temperature=1.0):
    """The same by log_softmax and gather, in float64."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    everything = (hidden @ weight.T / temperature).log_softmax(-1)
    logprobs = everything.gather(-1, targets[:, None])[:, 0]
    (logprobs * grad).sum().backward()
    return logprobs.detach(), -(everything.exp() * everything).sum(-1).detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("tile", [(1, 1000), (7, 10), (25, 1), (1000, 1000)])
def test_kernel_equals_log_softmax_and_gather(tile, temperature, monkeypatch):
    monkeypatch.setitem(model.TILES, "cpu", tile)
    inputs = kernel_inputs()
    for result, expected in zip(run_kernel(*inputs, temperature), run_plain(*inputs, temperature), strict=True):
        assert result.dtype == torch.float32
        close(result, expected.float())


def test_kernel_stands_large_logits():
    """Logits up to several hundred are known to about 3e-5 in fp32; results may lose that much, and no more."""
    hidden, weight, targets, grad = kernel_inputs()
    results = run_kernel(hidden * 20, weight, targets, grad)
    expected = run_plain(hidden * 20, weight, targets, grad)
    for result, wanted in zip(results, expected, strict=True):
        close(result, wanted.float(), 2e-4)


def test_kernel_does_not_depend_on_the_tiles(monkeypatch):
    reference = run_kernel(*kernel_inputs())
    for tile in ((1, 1), (1, V), (7, 13), (49, V - 1)):
        monkeypatch.setitem(model.TILES, "cpu", tile)
        for result, expected in zip(run_kernel(*kernel_inputs()), reference, strict=True):
            close(result, expected)


def test_kernel_never_makes_more_logits_than_a_tile(monkeypatch):
    sizes = {"logprob_tile": [], "gradient_tile": []}
    for name, seen in sizes.items():
        whole = getattr(model, name)

        def watched(hidden, matrix, *rest, whole=whole, seen=seen):
            seen.append((len(hidden), len(matrix)))
            return whole(hidden, matrix, *rest)

        monkeypatch.setattr(model, name, watched)
    monkeypatch.setitem(model.TILES, "cpu", (20, 60))
    run_kernel(*kernel_inputs())
    for seen in sizes.values():
        assert seen == [(length, width) for length in (20, 20, 10) for width in (60, 37)]


def test_compiled_kernel_equals_the_plain_one(monkeypatch):
    """With tiles that the plain one leaves to oneDNN, and smaller ones at the edges."""
    monkeypatch.setitem(model.TILES, "cpu", (14, 240))
    generator = torch.Generator().manual_seed(0)
    hidden, weight, grad = (torch.randn(shape, generator=generator) for shape in ((33, 300), (400, 300), (33,)))
    inputs = hidden, weight / 300**0.5, torch.randint(0, 400, (33,), generator=generator), grad
    for result, expected in zip(run_kernel(*inputs, 0.7, True), run_kernel(*inputs, 0.7, False), strict=True):
        close(result, expected)


def test_kernel_in_bf16_keeps_its_results_in_fp32():
    """Products are bf16; against float64 on the same rounded inputs only the logits' rounding is left."""
    hidden, weight, targets, grad = kernel_inputs()
    hidden, weight = hidden.bfloat16(), weight.bfloat16().float()
    logprobs, entropies, *_ = run_kernel(hidden, weight, targets, grad)
    expected = run_plain(hidden, weight, targets, grad)
    assert (logprobs.dtype, entropies.dtype) == (torch.float32, torch.float32)
    close(logprobs, expected[0].float(), 0.05)
    close(entropies, expected[1].float(), 0.05)


def test_policy_logprobs_scale_with_temperature(policy, documents):
    (batch,) = pack([documents[0][:2]], CPU)
    prompt, response, _ = documents[0]
    logits = plain_hidden(policy, torch.cat((prompt, response)))[len(prompt) - 1 : -1] @ policy.embedding.weight.T
    expected = (logits / 0.5).log_softmax(-1)
    logprobs, entropies = policy.logprobs(batch, 0.5)
    close(logprobs, expected.gather(-1, response[:, None])[:, 0])
    close(entropies, -(expected.exp() * expected).sum(-1))


# ---- Products ----

WIDE = Config(vocabulary=300, dim=288, layers=2, heads=4, kv_heads=2, mlp=320, context=64)  # wide enough for oneDNN


def wide_policy():
    torch.manual_seed(6)
    return GPT(WIDE)


with_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is without oneDNN")


@with_onednn
@pytest.mark.parametrize("shape", [(1, 300), (37, 300), (2, 19, 300)])
def test_products_and_their_gradients_equal_float64(shape):
    generator = torch.Generator().manual_seed(0)
    layer = Linear(300, 260)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    grad = torch.randn(*shape[:-1], 260, generator=generator)
    result = layer(x)
    assert "Product" in type(result.grad_fn).__name__  # not torch's own
    result.backward(grad)
    exact_x, exact_weight = (part.detach().double().requires_grad_() for part in (x, layer.weight))
    exact = exact_x @ exact_weight.T
    exact.backward(grad.double())
    for one, other in ((result, exact), (x.grad, exact_x.grad), (layer.weight.grad, exact_weight.grad)):
        assert one.shape == other.shape
        assert (one - other).norm() < 1e-6 * other.norm()


@with_onednn
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_products_with_reordered_weights_equal_those_without(dtype, tolerance):
    layer, x = Linear(300, 260), torch.randn(9, 300, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ layer.weight.double().T
    layer.weight = torch.nn.Parameter(reordered(layer.weight.to(dtype)), requires_grad=False)
    assert layer.weight.is_mkldnn == suits_onednn(torch.empty(260, 300, dtype=dtype))
    with torch.no_grad():
        result = layer(x)
    assert result.dtype == dtype
    assert (result - exact).norm() < tolerance * exact.norm()


def test_a_wide_gpt_is_the_same_without_onednn(monkeypatch):
    """Log-probs, and the gradients of all weights."""
    documents = [(torch.arange(9), torch.arange(20, 31), torch.arange(5)), (torch.arange(4), torch.arange(7))]
    results = []
    for there in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda there=there: there)
        policy = wide_policy()
        (batch,) = pack(documents, CPU)
        logprobs, _ = policy.logprobs(batch)
        (logprobs * batch.offset.cos()).sum().backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
        results.append((logprobs.detach(), gradients))
    (logprobs, gradients), (other_logprobs, other_gradients) = results
    close(logprobs, other_logprobs)
    assert (gradients - other_gradients).norm() < 1e-5 * gradients.norm()


# ---- Generation ----

SMALL = Config(vocabulary=12, dim=32, layers=2, heads=4, kv_heads=2, mlp=64, context=64, tied=False)
END = 3  # one token in twelve: many sequences end early


def small_policy():
    torch.manual_seed(5)
    return GPT(SMALL)


def some_prompts(count, longest=20):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(0, 12, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def plain_generate(policy, prompts, end, max_new_tokens, temperature, seed):
    """Samples without a cache: a full forward for each token."""
    noise = torch.rand(len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed))
    responses = []
    for prompt, uniforms in zip(prompts, noise, strict=True):
        tokens = prompt
        for uniform in uniforms:
            logits = plain_hidden(policy, tokens)[-1:] @ policy.vocabulary_weight.T
            tokens = torch.cat((tokens, sample(logits, uniform[None], temperature)))
            if tokens[-1] == end:
                break
        responses.append(tokens[len(prompt) :].tolist())
    return responses


@pytest.mark.parametrize(("temperature", "seed"), [(0, 0), (1.0, 0), (1.0, 1), (0.6, 2), (3.0, 3)])
def test_generation_equals_the_sampler_without_a_cache(temperature, seed):
    policy, prompts = small_policy(), some_prompts(14)
    result = [response.tolist() for response in generate(policy, prompts, END, 26, temperature, seed)]
    assert result == plain_generate(policy, prompts, END, 26, temperature, seed)


@with_onednn
def test_generation_with_reordered_weights_equals_the_sampler_without_a_cache():
    """Also after the weights have changed."""
    policy, prompts = wide_policy(), some_prompts(6)
    assert whole_copy(policy).blocks[0].gate.weight.is_mkldnn and suits_onednn(policy.vocabulary_weight)
    for _ in range(2):
        result = [response.tolist() for response in generate(policy, prompts, END, 12)]
        assert result == plain_generate(policy, prompts, END, 12, 1.0, 0)
        with torch.no_grad():
            policy.blocks[0].gate.weight.neg_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_copy_for_generation_shares_what_it_can_and_needs_no_gradient(dtype):
    """Small weights stay where they are in fp32; in bf16 the products' are cast, and only those."""
    policy = small_policy()
    policy.activations = dtype
    copy = whole_copy(policy)
    assert copy.activations == dtype and copy.config == policy.config
    for (name, ours), theirs in zip(copy.named_parameters(), policy.parameters(), strict=True):
        cast = dtype if ours.dim() == 2 and not name.startswith(("embedding", "head")) else torch.float32
        assert ours.dtype == cast and not ours.requires_grad, name
        assert (ours.data_ptr() == theirs.data_ptr()) == (cast == torch.float32), name
        torch.testing.assert_close(ours, theirs.to(cast), rtol=0, atol=0)


def test_sequences_that_end_early_leave_and_the_others_go_on_as_they_would():
    """Some end before the first clearing out, some between, some never; the end token is the last and only one."""
    policy, prompts = small_policy(), some_prompts(20)
    responses = [response.tolist() for response in generate(policy, prompts, END, 30, 1.0, 7)]
    lengths = [len(response) for response in responses]
    assert sum(length <= 8 for length in lengths) >= 5
    assert sum(8 < length <= 24 for length in lengths) >= 3
    assert sum(length > 24 for length in lengths) >= 1
    for response in responses:
        assert END not in response[:-1]
        assert response[-1] == END or len(response) == 30
    assert responses == plain_generate(policy, prompts, END, 30, 1.0, 7)


def test_no_time_is_spent_on_sequences_that_ended_eight_steps_ago(monkeypatch):
    policy, prompts, sizes = small_policy(), some_prompts(20), []

    def counted(self, tokens, *others, forward=GPT.forward, **more):
        sizes.append(len(tokens))
        return forward(self, tokens, *others, **more)

    monkeypatch.setattr(GPT, "forward", counted)
    lengths = [len(response) for response in generate(policy, prompts, END, 30, 1.0, 7)]
    for step, size in enumerate(sizes[1:], 1):  # the first forward is that of the packed prompts
        assert size <= sum(length > step - 8 for length in lengths)
    assert len(sizes) <= max(lengths) + 8
    assert sizes[-1] < len(prompts) / 4


def test_more_prompts_than_one_batch_holds_keep_their_order():
    policy, prompts = small_policy(), some_prompts(270, 5)
    result = [response.tolist() for response in generate(policy, prompts, END, 2, 1.0, 0)]
    assert result == plain_generate(policy, prompts, END, 2, 1.0, 0)


def test_one_new_token():
    policy, prompts = small_policy(), some_prompts(3)
    result = [response.tolist() for response in generate(policy, prompts, END, 1, 1.0, 0)]
    assert result == plain_generate(policy, prompts, END, 1, 1.0, 0)


def test_a_response_does_not_depend_on_the_other_prompts():
    policy, prompts = small_policy(), some_prompts(8)
    reference = generate(policy, prompts, END, 20, 1.0, 4)
    longer = [prompts[0], *(torch.arange(30) % 12 for _ in range(6)), prompts[7]]
    shorter = [prompts[0], *(torch.tensor([1]) for _ in range(6)), prompts[7], *prompts]
    for others in (longer, shorter):
        responses = generate(policy, others, END, 20, 1.0, 4)
        for place in (0, 7):
            assert responses[place].tolist() == reference[place].tolist()


@pytest.mark.parametrize("seed", range(6))
def test_a_watched_answer_is_seen_token_by_token_and_stops_at_its_end(seed):
    policy, (prompt,), seen = small_policy(), some_prompts(1), []
    (response,) = generate(policy, [prompt], END, 20, 1.0, seed, watch=lambda tokens: seen.append(tokens.item()))
    assert seen == response.tolist()
    assert seen == generate(policy, [prompt], END, 20, 1.0, seed)[0].tolist()


def test_generation_takes_another_path_with_another_seed():
    policy, prompts = small_policy(), some_prompts(8)
    first, second, third = (generate(policy, prompts, END, 20, 1.0, seed) for seed in (1, 1, 2))
    assert [response.tolist() for response in first] == [response.tolist() for response in second]
    assert [response.tolist() for response in first] != [response.tolist() for response in third]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_are_distributed_as_the_softmax(temperature):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, -4.0, 1.5, -0.2, 0.9])
    expected = (logits / temperature).softmax(-1)
    for uniform, error in (
        (torch.rand(20000, generator=torch.Generator().manual_seed(0)), 4 * 0.5 / math.sqrt(20000)),
        ((torch.arange(20000) + 0.5) / 20000, 2e-4),  # evenly spaced: exact but for the rounding to 1 in 20000
    ):
        drawn = sample(logits.expand(20000, -1), uniform, temperature)
        assert (drawn.bincount(minlength=8) / 20000 - expected).abs().max() < error


@pytest.mark.parametrize("vocabulary", [8, 1000])
def test_tokens_of_probability_zero_are_never_drawn(vocabulary):
    """They are first, last and in between, and the uniform numbers include the least and the greatest there are."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5000, vocabulary, generator=generator)
    logits[:, [0, 1, vocabulary // 2, vocabulary - 2, vocabulary - 1]] = -torch.inf
    for uniform in (torch.zeros(5000), torch.full((5000,), 1 - 2**-24), torch.rand(5000, generator=generator)):
        drawn = sample(logits, uniform, 1.0)
        assert logits.gather(-1, drawn[:, None]).isfinite().all()


def test_temperature_zero_takes_the_most_likely_token():
    assert sample(torch.tensor([[0.0, 3.0, 2.9], [5.0, -1.0, 4.9]]), torch.tensor([0.999, 0.999]), 0).tolist() == [1, 0]


# ---- Checkpoints and files ----


@pytest.fixture
def pretended_gpu(monkeypatch):
    """For what can be tested of the GPU's path without one: what is decided before a tensor goes there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(nn.Module, "to", lambda module, device: module)


def test_on_a_gpu_blocks_are_compiled_and_multiply_in_bf16(pretended_gpu):
    policy = model.prepare_model(GPT(WIDE), model.Settings())
    assert policy.compiled and policy.activations == torch.bfloat16
    assert all(block._compiled_call_impl is not None for block in policy.blocks)
    policy = model.prepare_model(GPT(WIDE), model.Settings(compile=False, dtype="fp32"))
    assert not policy.compiled and policy.activations == torch.float32
    assert all(block._compiled_call_impl is None for block in policy.blocks)


def test_heads_too_narrow_for_the_gpus_attention_are_a_user_error(pretended_gpu):
    with pytest.raises(UserError, match=r"--device cuda: .* 8 wide, .* try --device cpu"):
        model.prepare_model(GPT(SMALL), model.Settings())
    model.prepare_model(GPT(SMALL), model.Settings(device="cpu"))


def test_a_compiled_model_that_nothing_uses_leaves_before_the_next_goes_to_the_gpu(pretended_gpu):
    gc.disable()
    try:
        policy = model.prepare_model(GPT(WIDE), model.Settings())
        weight = weakref.ref(policy.blocks[0].gate.weight)
        del policy
        model.prepare_model(GPT(WIDE), model.Settings())
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_survives_save_and_load(tied, tmp_path):
    settings = Settings(out=str(tmp_path), save="sft.pt", device="cpu")
    torch.manual_seed(0)
    policy = GPT(Config(vocabulary=400, dim=32, layers=1, heads=4, kv_heads=2, mlp=48, context=64, tied=tied))
    save_model(settings, policy, TOY_TOKENIZER)
    loaded, tokenizer = load_model(settings, "sft.pt", GPT)
    assert loaded.config == policy.config
    assert tokenizer.state == TOY_TOKENIZER.state
    tokens = torch.arange(30)
    assert torch.equal(plain_hidden(loaded, tokens), plain_hidden(policy, tokens))
    assert torch.equal(loaded.vocabulary_weight, policy.vocabulary_weight)
    assert [path.name for path in tmp_path.iterdir()] == ["sft.pt"]


def test_a_file_of_another_kind_is_a_user_error(tmp_path, policy, reward_model):
    settings = Settings(out=str(tmp_path), save="some.pt", device="cpu")
    scored_pairs().save(Settings(out=str(tmp_path)), "pairs.pt")
    save_model(settings, reward_model, BYTES)
    for name in ("pairs.pt", "some.pt"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            load_model(settings, name, GPT)
    with pytest.raises(UserError, match=r"some\.pt"):
        load_pairs(settings, "some.pt")


@pytest.mark.parametrize(
    "content",
    [
        {"kind": "policy", "version": model.FORMAT_VERSION + 1},
        {"kind": "policy"},
        {"version": model.FORMAT_VERSION},
        torch.zeros(3),
        [1, 2],
    ],
)
def test_a_file_without_the_right_kind_and_version_is_a_user_error(content, tmp_path):
    torch.save(content, tmp_path / "sft.pt")
    with pytest.raises(UserError, match=r"sft\.pt"):
        load_file(tmp_path / "sft.pt", "policy")


def test_a_missing_file_is_a_user_error_that_says_what_makes_it(tmp_path):
    with pytest.raises(UserError, match=r"sft\.pt.*python model\.py"):
        load_model(Settings(out=str(tmp_path)), "sft.pt", GPT)


def test_a_truncated_file_is_a_user_error(tmp_path, policy):
    settings = Settings(out=str(tmp_path), save="sft.pt", device="cpu")
    save_model(settings, policy, BYTES)
    whole = (tmp_path / "sft.pt").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "sft.pt").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"sft\.pt"):
            load_model(settings, "sft.pt", GPT)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_unrun(zipped, tmp_path):
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    path = tmp_path / "sft.pt"
    content = {"kind": "policy", "version": model.FORMAT_VERSION, "weights": Bomb()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"sft\.pt"):
        load_model(Settings(out=str(tmp_path), device="cpu"), "sft.pt", GPT)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the file was armed


def test_a_failed_write_leaves_the_previous_file_whole(tmp_path, policy, monkeypatch):
    def disk_full(content, file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    settings = Settings(out=str(tmp_path), save="sft.pt", device="cpu")
    save_model(settings, policy, BYTES)
    before = (tmp_path / "sft.pt").read_bytes()
    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(UserError, match=r"sft\.pt.*no space left"):
        save_model(settings, policy, BYTES)
    assert (tmp_path / "sft.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["sft.pt"]


# ---- The training loop's bookkeeping ----


def learning_rates(tmp_path, steps, **flags):
    training = Training(Settings(out=str(tmp_path), lr=2.0, steps=steps, **flags), 1)
    rates = []
    for training.step in range(steps):
        rates.append(training.lr)
    return rates


def test_learning_rate_constant_after_warm_up(tmp_path):
    rates = learning_rates(tmp_path, 8, warmup=0.5, decay="constant")
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0])


def test_learning_rate_falls_linearly_after_warm_up(tmp_path):
    # Two steps of warm-up; then 8/8, 7/8, … of the peak, and the step after the last would be at 0.
    rates = learning_rates(tmp_path, 10, warmup=0.2, decay="linear")
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25])


def test_learning_rate_without_warm_up_starts_at_its_peak(tmp_path):
    assert learning_rates(tmp_path, 4, warmup=0.0, decay="constant") == [2.0] * 4
    assert learning_rates(tmp_path, 4, warmup=0.0, decay="linear") == pytest.approx([2.0, 2.0, 4 / 3, 2 / 3])
    assert learning_rates(tmp_path, 1, decay="linear") == [2.0]


def test_learning_rate_may_rise_to_the_end(tmp_path):
    assert learning_rates(tmp_path, 4, warmup=1.0) == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_each_pass_covers_all_examples_once():
    stream = [index for step in range(30) for index in batch_indices(10, 4, step, 0)]
    passes = [stream[start : start + 10] for start in range(0, 120, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == len(passes)


def test_a_batch_may_be_larger_than_the_examples():
    stream = [index for step in range(2) for index in batch_indices(3, 6, step, 0)]
    assert [sorted(stream[start : start + 3]) for start in (0, 3, 6, 9)] == [[0, 1, 2]] * 4


def test_batches_depend_on_seed_and_step_alone():
    forwards = [batch_indices(100, 8, step, 5) for step in range(20)]
    torch.manual_seed(9)
    torch.rand(3)
    backwards = [batch_indices(100, 8, step, 5) for step in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert batch_indices(100, 8, 0, 6) != forwards[0]


def test_optimizer_step_by_hand(tmp_path):
    """The gradient (3, 4) has norm 5 and is clipped to (0.6, 0.8); the first of two warm-up steps has rate 0.5."""
    weight = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = torch.optim.SGD([weight], lr=123.0)
    training = Training(Settings(out=str(tmp_path), lr=1.0, warmup=0.5, clip=1.0, steps=4), 1)
    weight.grad = torch.tensor([3.0, 4.0])
    assert training.optimizer_step(optimizer) == pytest.approx(5.0)
    close(weight.detach(), torch.tensor([0.7, 0.6]))
    assert weight.grad is None or not weight.grad.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad, tmp_path):
    layer = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    optimizer = torch.optim.AdamW(layer.parameters())
    training = Training(Settings(out=str(tmp_path), steps=10), 1)
    training.step, training.indices = 7, [31, 4]
    layer(torch.ones(1, 3)).sum().backward()
    layer.weight.grad[1, 2] = bad
    with pytest.raises(UserError, match="step 7: the gradient is not finite, on pairs 4 31 of --data toy"):
        training.optimizer_step(optimizer)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert not optimizer.state


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_not_logged(bad, tmp_path):
    training = Training(Settings(out=str(tmp_path), steps=10), 1)
    with pytest.raises(UserError, match="step 0: the loss is not finite"):
        training.log(("loss",), "pairs", 1, 1, loss=bad)
    assert (tmp_path / "sft.jsonl").read_text() == ""


def test_count_steps():
    assert count_steps(Settings(epochs=1.5, batch_size=32), 640) == 30
    assert count_steps(Settings(epochs=1.0, batch_size=32), 65) == 3  # a started batch is filled from the next pass
    assert count_steps(Settings(epochs=1.0, batch_size=32), 10) == 1
    assert count_steps(Settings(epochs=0.0, batch_size=32), 640) == 0
    assert count_steps(Settings(epochs=1.5, batch_size=32, steps=7), 640) == 7
    assert count_steps(Settings(steps=0), 640) == 0
