"""Hostile and broken input, by the thousand: texts, data files, pairs files, checkpoints and resume states.

Every case ends in a clean and right result or in a refusal of one line; never in a traceback, in a hang or in a wrong
result. Random cases are drawn from fixed seeds. A test looks at all of its cases before it fails, and then says which
ended badly and how; the last test prints how many cases there were.
"""

import contextlib
import functools
import gzip
import inspect
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import unicodedata
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from test_commands import contents, log_of, run, saved

import dpo
import model
from model import (
    END_OF_TEXT,
    GPT,
    GPT2_WORDS,
    SINGLE_DIGIT_WORDS,
    TURN,
    WORD_PATTERN,
    CommonSettings,
    Config,
    Pairs,
    PairsBuilder,
    Tokenizer,
    Training,
    UserError,
    export_model,
    fingerprint,
    generate,
    load_model,
    load_pairs,
    pack,
    read_file_rows,
    read_pairs,
    split_row,
    train_tokenizer,
)
from reward import RewardModel

pytestmark = pytest.mark.filterwarnings("ignore")  # while hostile files are made; Cases looks at those of a case
CPU = torch.device("cpu")
SECONDS = 10  # a case that takes longer hangs; nearly all take milliseconds


# ---- How a case is judged ----

BEGUN, ENDED = Counter(), Counter()


class Hang(BaseException):
    """A case ran out of time. Not an Exception, so that no code under test takes it for a damaged file."""


@contextlib.contextmanager
def time_limit():
    def stop(number, frame):
        raise Hang(f"still running after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def described(error: BaseException) -> str:
    """Kind, first line without its numbers, and place of an error, alike for cases that fail alike."""
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    code = frame.tb_frame.f_code
    text = re.sub(r"\d+", "#", (str(error).splitlines() or [""])[0])[:120]
    return f"{type(error).__name__}: {text} ({Path(code.co_filename).name}, {code.co_name})"


class Cases:
    """Judges cases one by one, and fails at its end if any ended badly: `with Cases() as case: case(…)`."""

    def __enter__(self):
        self.bad = defaultdict(list)  # what went wrong: the cases where it did
        return self

    def __call__(self, label, action, *arguments, check=None, expect="clean or refused", names=""):
        """One case: `action` returns what `check` finds right, or raises a UserError that holds `names`. `expect` may
        leave only one of the two: "clean" or "refused"."""
        BEGUN["cases"] += 1
        ended, trouble = "a traceback", None
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("default")
            try:
                with time_limit():
                    result = action(*arguments)
                    ended = "clean"
                    if check:
                        check(result)
                    if ended not in expect:
                        trouble = "a bad input was taken"
            except (UserError, OSError) as error:  # OSError: run_command makes one line of it too
                ended, line = "refused", str(error)
                if ended not in expect:
                    trouble = f"refused a good input: {line[:100]}"
                elif names not in line:
                    trouble = f"the refusal does not name {names}: {line[:100]}"
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a panic of the tokenizer's library is no Exception
                trouble = f"{'a wrong result' if ended == 'clean' else ended}: {described(error)}"
        # A warning would be one more line on stderr; those for developers are not shown outside of tests.
        quiet = DeprecationWarning, PendingDeprecationWarning, ResourceWarning
        if loud := [one for one in warned if not issubclass(one.category, quiet)]:
            trouble = trouble or f"a warning on stderr: {str(loud[0].message).splitlines()[0][:80]}"
        ENDED["badly" if trouble else ended] += 1
        if trouble:
            self.bad[trouble].append(label)

    def __exit__(self, kind, error, traceback):
        if kind is None and self.bad:
            most_first = sorted(self.bad.items(), key=lambda item: -len(item[1]))
            lines = [f"{len(labels)} × {trouble}\n    {'; '.join(labels[:6])}" for trouble, labels in most_first]
            count = sum(map(len, self.bad.values()))
            pytest.fail(f"{count} cases ended badly:\n" + "\n".join(lines), pytrace=False)


@pytest.fixture(scope="module", autouse=True)
def source_read_once():
    """The commands find their help texts in their own source, which takes longer than all else that they do here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
        yield


def command(name: str, *flags) -> SimpleNamespace:
    """Runs a command in this process; its exit code 2 and one line on stderr become a UserError of that line."""
    result = run(name, *flags, "--device", "cpu")
    if result.code == 2:
        shown = [line.rpartition("\r")[2] for line in result.err.split("\n")]
        lines = [line for line in shown if line.strip() and not re.match(r"[\w ]+: +\d+%\|", line)]  # no progress bars
        assert len(lines) == 1 and lines[0].startswith(f"{name}.py: "), f"not one line, but {lines!r:.100}"
        raise UserError(lines[0])
    assert result.code == 0, f"exit code {result.code}"
    return result


# ---- Hostile material ----

GOOD_ROW = {"prompt": "\n\nHuman: Is 7 odd?\n\nAssistant:", "chosen": " Yes, 7 is.", "rejected": " No <|im_end|>."}
TALK_ROW = {"chosen": "\n\nHuman: Naïve?\n\nAssistant: Yes 🙂.", "rejected": "\n\nHuman: Naïve?\n\nAssistant: No."}
TLDR_ROW = {"info": {"subreddit": "cats", "title": "A cat", "post": "I have a cat."}, "choice": 1,
            "summaries": [{"text": " Cat."}, {"text": " A person has a cat."}]}  # fmt: skip

PIECES = [
    "", " ", "\n", "\t", "\r\n", "\x00", "\x7f", "\x85", "\u2028", "\u200b", "\ufeff", "\u202e", "\uffff", "   ",
    "\xa0", "é", "e\u0301", "ﬁ", "Å", "ß", "🙂", "👩\u200d👩\u200d👧", "𝔘", "漢字", "नमस्ते", "שלום", "\ud800", "\udc00",
    "\udfff\ud800", END_OF_TEXT, "<|im_end|>", "<|im_start|>", "<tool>", "<|endof", "text|>", "＜|endoftext|＞", "<|",
    "|>", TURN, "\n\nHuman:", "TL;DR:", "'s", "don't", "word", " word", "Yes", " 12345678901", "!?", "a" * 40, "{}",
    "%s", "\\n", '"',
]  # fmt: skip


def hostile_text(rng: random.Random) -> str:
    """Up to a dozen pieces that tokenizers stumble over, or characters from anywhere in Unicode."""
    count = rng.randint(0, 12)
    return "".join(rng.choice(PIECES) if rng.random() < 0.8 else chr(rng.randrange(0x110000)) for _ in range(count))


def whole_characters(text: str) -> str:
    """`text` with U+FFFD for each half of a surrogate pair, and the character for two halves side by side."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def long_texts() -> dict[str, str]:
    letters = "".join(random.Random(0).choices("abcdefgh", k=100_000))
    return {
        "a word of 100,000 letters": "a" * 100_000,
        "a random word of 100,000 letters": letters,
        "100,000 halves of surrogate pairs": "\ud800" * 100_000,
        "100,000 combining marks": "e" + "\u0301" * 100_000,
        "100,000 digits": "1234567890" * 10_000,
        "100,000 full stops": "." * 100_000,
        "a million spaces and more": " " * 1_100_000 + "x",
        "a million line breaks and more": "\n" * 1_100_000,
        "100,000 turns": "\n\nHuman: a\n\nAssistant: b" * 100_000,
        "50,000 control tokens": END_OF_TEXT * 50_000,
    }


BAD_JSON = [None, True, False, 0, 1, 7, -1, 1.0, 0.0, 1.5, math.nan, math.inf, 10**400, "", " ", "text", "\ud800", [],
            ["a"], [{}], [{"role": "user", "content": "Hello"}], {}, {"text": "a"}, {"text": None},
            [{"text": "a"}, {"text": 3}], [{"text": "a"}] * 3, ["a", "b"], [None, None], "ab"]  # fmt: skip

BAD_VALUES = [None, True, 0, 1, -1, 5, 2**31, 2**63, 10**30, -(10**30), 0.0, 1.5, math.nan, math.inf, "", "text", "7",
              "x" * 5000, [], [1, 2], [None], ["a"], {}, {"a": 1}, {1: 2}, (1, 2), b"bytes", torch.tensor(3),
              torch.zeros(0), torch.tensor(math.nan), torch.zeros(2, 2), torch.tensor(0, device="meta")]  # fmt: skip


def bad_tensors(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """`tensor` in wrong dtypes, shapes, layouts and with wrong values."""
    kinds = (torch.float32, torch.float64, torch.float16, torch.bool, torch.int8, torch.int32, torch.int64,
             torch.complex64)  # fmt: skip
    number, hole = tensor.float(), tensor.float().clone()
    hole.view(-1)[0] = math.nan
    twisted = {str(kind): tensor.to(kind) for kind in kinds} | {
        "empty": tensor[:0],
        "scalar": tensor.flatten()[0],
        "without its end": tensor[:-1],
        "without its start": tensor[1:],
        "flat": tensor.flatten(),
        "deeper": tensor[None],
        "a column": tensor.flatten()[:, None],
        "twice": torch.cat((tensor, tensor)),
        "negative": -number.to(tensor.dtype),
        "zero": tensor * 0,
        "one less": tensor - 1,
        "one more": tensor + 1,
        "huge": torch.full_like(tensor, 2**30),
        "lowest": torch.full_like(tensor, -(2**31)),
        "nan": number * math.nan,
        "infinite": number - math.inf,
        "a hole": hole,
        "sparse": tensor.to_sparse(),
        "meta": tensor.to("meta"),
        "expanded": tensor.flatten()[:1].expand(tensor.shape),
        "reversed": tensor.flip(0),
        "a parameter": torch.nn.Parameter(number),
        "a list": tensor.tolist(),
        "quantized": torch.quantize_per_tensor(number, 0.1, 0, torch.qint8),
    }
    if tensor.dim() == 2:
        strided = torch.stack((tensor, tensor), 1)[:, 0]
        twisted |= {"a row": tensor[0], "a column less": tensor[:, :-1], "turned": tensor.T, "strided": strided}
    return twisted


ACCIDENTS = ("cut", "flipped", "inserted", "zeroed", "scrambled", "removed", "zero end", "swapped")


def damaged(rng: random.Random, data: bytes, kind: str) -> bytes:
    """`data` after an accident of this kind, at a random place."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((1, 4, 64, 512)))
    if kind == "flipped":
        for _ in range(rng.choice((1, 1, 2, 8))):
            data = flipped(rng, data, 0, len(data))
        return data
    return {
        "cut": data[:start],
        "inserted": data[:start] + rng.randbytes(rng.choice((1, 4, 100))) + data[start:],
        "zeroed": data[:start] + bytes(end - start) + data[end:],
        "scrambled": data[:start] + rng.randbytes(end - start) + data[end:],
        "removed": data[:start] + data[end:],
        "zero end": data[:start] + bytes(len(data) - start),
        "swapped": data[start:] + data[:start],
    }[kind]


def flipped(rng: random.Random, data: bytes, start: int, end: int) -> bytes:
    """`data` with one bit flipped between `start` and `end`."""
    place = rng.randrange(start, end)
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def flipped_tensor(rng: random.Random, data: bytes, tensor: torch.Tensor) -> bytes:
    """A file `data` with one bit flipped in the numbers of a tensor that it holds."""
    start = data.find(tensor.numpy().tobytes())
    assert start > 0
    return flipped(rng, data, start, start + tensor.nbytes)


REMOVED = object()


def changed(content: dict, key: tuple, value) -> dict:
    """A copy of `content` with another value, or none, at a nested key."""
    first, *rest = key
    copied = dict(content)
    if rest:
        copied[first] = changed(content[first], tuple(rest), value)
    elif value is REMOVED:
        del copied[first]
    else:
        copied[first] = value
    return copied


def fields_of(content: dict, depth: int = 3, prefix: tuple = ()) -> dict[tuple, object]:
    """The values of a nested dictionary under the tuples of keys that lead to them, the inner dictionaries too."""
    found = {}
    for key, value in content.items():
        found[*prefix, key] = value
        if isinstance(value, dict) and depth > 1:
            found |= fields_of(value, depth - 1, (*prefix, key))
    return found


def wrong_fields(rng: random.Random, content: dict, values: int, tensors: int = 99):
    """(label, content) with one field removed or replaced: by some `values` of other types, a tensor by at most
    `tensors` twisted forms of itself."""
    for key, value in fields_of(content).items():
        if key[:1] == ("made",) and len(key) > 2:  # tells how the file was made; nothing computes with it
            continue
        label = ".".join(map(str, key))
        bad = {f"= {one!r:.40}": one for one in rng.sample(BAD_VALUES, values)}
        if isinstance(value, torch.Tensor):
            twisted = list(bad_tensors(value).items())
            bad |= dict(rng.sample(twisted, min(tensors, len(twisted))))
        yield f"{label} removed", changed(content, key, REMOVED)
        for what, one in bad.items():
            yield f"{label} {what}", changed(content, key, one)


# ---- Tokenizers ----


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    """Tokenizers as they come: trained here, and of the kinds that pretrained models bring."""
    trained = train_tokenizer([text for row in model.toy_rows(60, 0) for text in row.values()], 300)
    size = len(trained.tokens)
    gaps = [None if token in "\x00\x01\xf5zé" else token for token in trained.tokens]
    special = {name: size + number for number, name in enumerate([END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<tool>"])}
    end, begin = special["<|im_end|>"], [special["<|im_start|>"], special[END_OF_TEXT]]
    return {
        "trained": trained,
        "GPT-2's words": Tokenizer(trained.tokens, GPT2_WORDS, special, end, begin, ["<tool>"], "NFC"),
        "single digits": Tokenizer(trained.tokens, SINGLE_DIGIT_WORDS, special, end, [], [], "NFKC"),
        "lacking bytes": Tokenizer(gaps, WORD_PATTERN, special, end, begin[:1]),
    }


def readable(tokenizer: Tokenizer, text: str) -> str:
    """What is left of `text` after encode and decode, worked out without the tokenizer's library."""
    text = unicodedata.normalize(tokenizer.normal, text) if tokenizer.normal else text
    lacking = bytes(byte for byte in range(256) if chr(byte) not in tokenizer.tokens)
    return whole_characters(text).encode().translate(None, lacking).decode("utf-8", "replace")


def control_ids(tokenizer: Tokenizer) -> set[int]:
    return set(tokenizer.special.values()) - {tokenizer.special[name] for name in tokenizer.in_text}


def check_encoding(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert not control_ids(tokenizer) & set(ids), "a text became a control token"
    assert all(0 <= token < tokenizer.size for token in ids), "an id out of range"
    assert tokenizer.decode(ids) == readable(tokenizer, text), "another text came back"


def test_a_text_comes_back_from_its_ids_and_is_never_a_control_token(tokenizers):
    rng = random.Random(1)
    texts = PIECES + [hostile_text(rng) for _ in range(120)]
    with Cases() as case:
        for (name, tokenizer), text in itertools.product(tokenizers.items(), texts):
            check = functools.partial(check_encoding, tokenizer, text)
            case(f"{name}: {text[:60]!r}", tokenizer.encode, text, check=check, expect="clean")


def test_long_texts_come_back_or_are_refused(tokenizers):
    # A million spaces are too many for the library's regular expressions; a line that says so is right as well.
    with Cases() as case:
        for name, (what, text) in itertools.product(("trained", "GPT-2's words"), long_texts().items()):
            check = functools.partial(check_encoding, tokenizers[name], text)
            case(f"{what} ({name})", tokenizers[name].encode, text, check=check)


def test_a_tokenizer_is_trained_on_any_text_in_time():
    def check(tokenizer):
        assert 257 <= tokenizer.size <= 512 and tokenizer.special == {END_OF_TEXT: tokenizer.end}
        for text in texts:
            check_encoding(tokenizer, text[:2000], tokenizer.encode(text[:2000]))

    rng = random.Random(3)
    with Cases() as case:
        for what, text in long_texts().items():
            texts = [text]
            case(what, train_tokenizer, texts, 512, check=check, expect="clean")
        for number in range(40):
            texts = [hostile_text(rng) for _ in range(rng.randint(0, 20))]
            case(
                f"texts {number}", train_tokenizer, texts, rng.choice((257, 258, 300, 512)), check=check, expect="clean"
            )


# ---- Rows and pairs ----


def build(tokenizer: Tokenizer, rows: list, context: int, max_response: int) -> PairsBuilder:
    builder = PairsBuilder(tokenizer, "mine", context, max_response)
    for row in rows:
        builder.add(row)
    return builder


def expected(tokenizer: Tokenizer, row, room: int, max_response: int) -> tuple[set[str], list | None]:
    """(all rules that drop a row, by words in their names; the ids of its three parts, if none does)."""
    if row is None:
        return {"turn"}, None
    prompt, other, chosen, rejected = row
    why = {"prompts differ"} if prompt != other else set()
    why |= {"empty response"} if not chosen.strip() or not rejected.strip() else set()
    try:
        prompt, chosen, rejected = (tokenizer.encode(text) for text in (prompt, chosen, rejected))
    except UserError:
        return why | {"cannot be tokenised"}, None
    why |= {"empty prompt"} if not prompt else set()  # there may be a text of which the vocabulary has no byte
    why |= {"empty response"} if not chosen or not rejected else set()
    why |= {"identical"} if chosen == rejected else set()  # that the texts differ is not enough
    why |= {"response over"} if max(len(chosen), len(rejected)) >= max_response else set()  # the end needs a place
    return why, None if why else [
        tokenizer.begin + prompt[-room:],
        [*chosen, tokenizer.end],
        [*rejected, tokenizer.end],
    ]


def check_builder(rows: list, builder: PairsBuilder, context: int, max_response: int) -> None:
    """That every row was kept with the right ids or counted under a rule that drops it."""
    tokenizer, pairs = builder.tokenizer, builder.pairs()
    room = context - max_response - len(tokenizer.begin)
    results = [expected(tokenizer, row, room, max_response) for row in rows]
    kept = [parts for _, parts in results if parts]
    dropped = {rule: count for rule, count in builder.counts.items() if not rule.startswith("kept")}
    assert builder.rows == len(rows) == len(pairs) + sum(dropped.values()), "the counts do not add up"
    for name in ("turn", "prompts differ", "empty prompt", "empty response", "identical", "response over"):
        count = sum(count for rule, count in dropped.items() if name in rule)
        least, most = sum(why == {name} for why, _ in results), sum(name in why for why, _ in results)
        assert least <= count <= most, f"not the right number of: {name}"
    assert [[part.tolist() for part in pairs[index]] for index in range(len(pairs))] == kept, "other ids"
    assert pairs.lengths.sum() == len(pairs.tokens) and pairs.tokens.dtype == torch.int32
    for prompt, *responses in kept:
        assert len(prompt) <= context - max_response and all(len(response) <= max_response for response in responses)
        assert not control_ids(tokenizer) & set(prompt[len(tokenizer.begin) :]), "a control token in a prompt"
        assert all(not control_ids(tokenizer) & set(response[:-1]) for response in responses), "one in a response"


def judge_rows(case: Cases, label: str, tokenizer: Tokenizer, rows: list, context: int, max_response: int, **expect):
    def check(builder):
        check_builder(rows, builder, context, max_response)

    case(label, build, tokenizer, rows, context, max_response, check=check, **expect)


def hostile_row(rng: random.Random) -> tuple | None:
    """A row as split_row returns it."""
    if rng.random() < 0.05:
        return None
    prompt, chosen, rejected = hostile_text(rng), hostile_text(rng), hostile_text(rng)
    if rng.random() < 0.1:
        rejected = unicodedata.normalize(rng.choice(("NFC", "NFD", "NFKC")), chosen)
    return prompt, hostile_text(rng) if rng.random() < 0.05 else prompt, chosen, rejected


def test_rows_become_pairs_or_are_counted(tokenizers):
    rng = random.Random(4)
    with Cases() as case:
        for (name, tokenizer), number in itertools.product(tokenizers.items(), range(90)):
            rows = [hostile_row(rng) for _ in range(rng.choice((0, 1, 1, 8)))]
            # From the shortest context that leaves room for one token of the prompt behind those that open it.
            max_response = rng.choice((2, 20, 400))
            context = max_response + len(tokenizer.begin) + rng.choice((1, 2, 30, 1000))
            label = f"{name} {number}: {rows[:1]!r:.90}"
            judge_rows(case, label, tokenizer, rows, context, max_response, expect="clean")


def test_texts_of_which_the_tokenizer_keeps_nothing_or_the_same_make_no_pair(tokenizers):
    lacking = [("z", "z", " Yes.", " No."), ("Hello?", "Hello?", "z", " No."), ("Hello?", "Hello?", " Yes.", "\x00z"),
               ("Hello?", "Hello?", " Yes.", " Yzes."), ("\x00", "\x00", "\x00", "z")]  # fmt: skip
    alike = [("Hello?", "Hello?", "é", "e\u0301"), ("Hello?", "Hello?", "ﬁ", "fi"), ("Q?", "Q?", "\ud800", "\udfff")]
    with Cases() as case:
        for name, row in [("lacking bytes", row) for row in lacking] + [("single digits", row) for row in alike]:
            judge_rows(case, f"{name}: {row}", tokenizers[name], [row], 50, 20, expect="clean")


def test_opening_tokens_that_fill_the_context_leave_no_longer_prompt(tokenizers):
    tokenizer = tokenizers["GPT-2's words"]  # two tokens open a prompt
    row = ("What is this?", "What is this?", " A thing.", " Nothing.")

    def check(builder):
        assert all(length <= room for length in builder.pairs().lengths[:, 0].tolist()), "a prompt over its limit"

    with Cases() as case:
        for room in (0, 1, 2):
            case(f"room for {room}", build, tokenizer, [row], 20 + room, 20, check=check)


def test_long_rows_are_cut_or_dropped_in_time(tokenizers):
    with Cases() as case:
        for what, text in long_texts().items():
            judge_rows(case, f"prompt: {what}", tokenizers["trained"], [(text, text, " Yes.", " No.")], 300, 100)
            judge_rows(case, f"response: {what}", tokenizers["trained"], [("Q?", "Q?", text, " No.")], 300, 100)


# ---- Rows of wrong types ----


def rows_of(path: Path) -> list:
    return [split_row(where, row) for where, row in read_file_rows(path)]


def check_row(row: dict, split: tuple | None) -> None:
    """That what split_row made of a row are texts of that row."""
    if split is None:
        assert "prompt" not in row and not (TURN in row["chosen"] and TURN in row["rejected"])
        return
    prompt, other, chosen, rejected = split
    assert all(isinstance(text, str) for text in split), "not all texts"
    if "summaries" in row:
        texts, post = [summary["text"] for summary in row["summaries"]], row["info"]
        assert (chosen, rejected) == (texts[row["choice"]], texts[1 - row["choice"]])
        for name in ("subreddit", "title", "post"):  # the post may be missing, and is empty then
            empty = name == "post" and not post[name]
            assert isinstance(post[name], str) or empty, f"took a {type(post[name]).__name__} for the {name}"
        assert prompt == other and prompt.startswith(f"SUBREDDIT: r/{post['subreddit']}\n\nTITLE: {post['title']}\n\n")
        assert prompt.endswith(f"\n\nPOST: {post['post'] or ''}\n\nTL;DR:")
    elif "prompt" in row:
        assert split == (row["prompt"], row["prompt"], row["chosen"], row["rejected"])
    else:
        assert (prompt + chosen, other + rejected) == (row["chosen"], row["rejected"])
        assert prompt.endswith(TURN) and other.endswith(TURN) and TURN not in chosen and TURN not in rejected


def test_a_row_with_a_value_of_the_wrong_type_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"

    def check(read):
        assert len(read) == 3
        check_row(json.loads(json.dumps(bad)), read[1])

    with Cases() as case:
        for row in (GOOD_ROW, TALK_ROW, TLDR_ROW):
            for key, value in itertools.product(fields_of(row), (REMOVED, *BAD_JSON)):
                bad = changed(row, key, value)
                path.write_text("".join(json.dumps(one) + "\n" for one in (GOOD_ROW, bad, TALK_ROW)))
                what = "removed" if value is REMOVED else f"= {value!r:.30}"
                case(f"{'.'.join(key)} {what}", rows_of, path, check=check, names=f"{path} row 2")
        for value in BAD_JSON:
            path.write_text(json.dumps(GOOD_ROW) + "\n" + json.dumps(value))
            case(f"a row is {value!r:.30}", rows_of, path, expect="refused", names=f"{path} row 2")


# ---- Data files ----


def lines_of(*rows: dict) -> bytes:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return lines.encode("utf-8", "surrogatepass")


def parquet_of(*rows: dict) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def many_rows() -> list[dict]:
    """Rows of all layouts in one file, with characters of one to four bytes."""
    rows = []
    for number in range(8):
        talk = {side: text.replace("Naïve", f"Naïve {number}, 漢字") for side, text in TALK_ROW.items()}
        rows += [{**GOOD_ROW, "prompt": f"Is {number} odd?"}, talk, {**TLDR_ROW, "choice": number % 2}]
    return rows


def files_of(rows: list[dict]) -> dict[str, bytes]:
    """The rows in every format that is read; in the last one, whose columns are fixed, those with a prompt."""
    packed = gzip.compress(lines_of(*rows), mtime=0)
    columns = parquet_of(*(row for row in rows if "prompt" in row))
    return {"rows.jsonl": lines_of(*rows), "rows.jsonl.gz": packed, "rows.json": json.dumps(rows).encode(),
            "rows.parquet": columns}  # fmt: skip


def test_damaged_data_files_are_refused_by_name_or_read_right(tmp_path):
    rng, rows = random.Random(5), many_rows()
    whole = [split_row("", row) for row in rows]

    def check(read):
        assert read and all(row is None or all(isinstance(text, str) for text in row) for row in read)
        if kind == "cut":  # right only at the end of a row, with all rows before it
            assert name == "rows.jsonl" and read == whole[: bad.rstrip(b"\n").count(b"\n") + 1], "rows of a cut file"
        if name.endswith(".gz"):  # the format has a checksum
            assert read == whole, "other rows"

    with Cases() as case:
        for name, data in files_of(rows).items():
            path = tmp_path / name
            for kind, number in itertools.product(ACCIDENTS, range(12)):
                bad = damaged(rng, data, kind)
                path.write_bytes(bad)
                case(f"{name} {kind} {number}", rows_of, path, check=check, names=str(path))


def test_files_in_other_encodings_are_refused_or_read_right(tmp_path):
    rows = [{key: text.replace("🙂", "ß") for key, text in row.items()} for row in (GOOD_ROW, TALK_ROW)]
    encodings = (
        "utf-8 utf-8-sig utf-16 utf-16-le utf-16-be utf-32 utf-32-le utf-32-be latin-1 cp1252 cp437 punycode".split()
    )

    def check(read):
        assert read == [split_row("", row) for row in rows[-count:]], "other rows"

    with Cases() as case:
        for encoding, count, name in itertools.product(encodings, (1, 2), ("rows.jsonl", "rows.json", "rows.jsonl.gz")):
            whole, lines = json.dumps(rows[-count:], ensure_ascii=False), lines_of(*rows[-count:]).decode()
            data, path = (whole if name == "rows.json" else lines).encode(encoding), tmp_path / name
            path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
            expect = "clean" if encoding == "utf-8" else "clean or refused"
            case(f"{encoding} {name} {count}", rows_of, path, check=check, expect=expect, names=str(path))


def odd_files() -> dict[str, tuple[bytes, list]]:
    """Files that look odd, but are right: {what: (bytes, the rows they hold)}."""
    good, plain, row = lines_of(GOOD_ROW), json.dumps(GOOD_ROW).encode(), split_row("", GOOD_ROW)
    more = plain[:-1] + b', "margin": NaN, "deep": ' + b"[" * 400 + b"]" * 400 + b', "n": 1e999, "": {"": []}}'
    halves = {"prompt": "\ud83d", "chosen": "\ude00 \udfff", "rejected": "\ude42\ud83d"}
    breaks = {**GOOD_ROW, "chosen": "a\u2028b\x85c\x0bd"}
    talk, turn = "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:"
    return {
        "CRLF": (good.replace(b"\n", b"\r\n") * 2, [row] * 2),
        "blank lines": (b"\n\n  \n\t\r\n" + good + b"\n \n" + good, [row] * 2),
        "no line break at the end": (good + plain, [row] * 2),
        "spaces around": (b"   " + plain + b"\t \n", [row]),
        "a byte order mark": (b"\xef\xbb\xbf" + good, [row]),
        "a key twice": (b'{"prompt": 3, "chosen": null, ' + plain[1:], [row]),
        "more keys": (more, [row]),
        "escapes": (plain.replace(b"a", b"\\u0061"), [row]),
        "halves of pairs": (json.dumps(halves).encode(), [split_row("", halves)]),
        "halves of pairs in UTF-8": (lines_of(halves), [split_row("", halves)]),
        "two escapes for one character": (rb'{"prompt": "Q", "chosen": "\ud83d\ude42", "rejected": ""}',
                                          [("Q", "Q", "🙂", "")]),
        "line breaks of Unicode": (lines_of(breaks), [split_row("", breaks)]),
        "mixed layouts": (lines_of(*many_rows()), [split_row("", one) for one in many_rows()]),
        "no assistant turn": (lines_of({"chosen": "a", "rejected": "b"}, GOOD_ROW), [None, row]),
        "a turn on one side": (lines_of({**TALK_ROW, "rejected": "b"}), [None]),
        "100,000 turns": (lines_of({"chosen": talk * 100_000, "rejected": turn}),
                          [(talk * 99_999 + turn, turn, " b", "")]),
        "ten megabytes": (lines_of({**GOOD_ROW, "prompt": "ab c" * 2_500_000}), [("ab c" * 2_500_000,) * 2 + row[2:]]),
        "100,000 blank lines": (b"\n" * 100_000 + good, [row]),
    }  # fmt: skip


def test_odd_but_right_files_are_read_right(tmp_path):
    def check(read):
        assert read == rows, "other rows"

    files = odd_files()
    with Cases() as case:
        for label, packed in itertools.product(files, (False, True)):
            data, rows = files[label]
            path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
            path.write_bytes(gzip.compress(data, 1) if packed else data)
            case(f"{label} {path.name}", rows_of, path, check=check, expect="clean")


def bad_files() -> list[tuple[str, bytes, str]]:
    """(name, bytes, what the message says behind the name)."""
    good, packed, table = lines_of(GOOD_ROW), gzip.compress(lines_of(GOOD_ROW), mtime=0), parquet_of(GOOD_ROW)
    endings = ".jsonl", ".jsonl.gz", ".json", ".parquet"
    rubbish = [b"\x00" * 100, b"\x1f\x8b", b"PAR1", b"PAR1PAR1", b"\xff\xfe", b"{", b"nonsense", b"PK\x03\x04", b"\x80"]
    texts = [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"3", b"NaN", b"1e999", b"nul", b"null", b"true", b"[3]",
             b'"prompt"', b"[null]", b"[[]]", b"[{}]", b"[[", b'{"prompt": 3}', b'"' + b"a" * 3_000_000]  # fmt: skip
    lines = [b"{}", b'{"prompt": "a"}', b'{"chosen": "a", "rejected": "\xff"}', b'{"chosen": "a\x01", "rejected": "b"}',
             rb'{"prompt": "\ud8"}', b"{'prompt': 'a'}", b'{"prompt": "a", }', good[:-9], good[1:],
             good.replace(b"\n", b"\r") * 2]  # fmt: skip
    turns = {side: [{"role": "user", "content": side}] for side in ("chosen", "rejected")}
    return [
        *[(f"a{ending}", data, " row 1") for ending in endings for data in rubbish],
        *[("a.json", data, " row 1") for data in (*texts, b"\xef\xbb\xbf[]", good)],
        *[("a.json", data, "") for data in (b"{}", b"[]", b'""')],
        *[("a.jsonl", good + data, " row 2") for data in rubbish + texts + lines],
        *[(f"a{ending}", b"", "") for ending in endings],
        ("a.jsonl.gz", packed[:-1], " row 2"),
        ("a.jsonl.gz", packed[:-9] + b"\x00" * 9, " row 2"),
        ("a.jsonl.gz", packed + b"rubbish", " row 2"),
        ("a.jsonl.gz", gzip.compress(packed), " row 1"),
        ("a.jsonl.gz", gzip.compress(b""), ""),
        ("a.parquet", parquet_of({"prompt": 1, "chosen": 2, "rejected": 3}), " row 1"),
        ("a.parquet", parquet_of({"prompt": b"a", "chosen": b"b", "rejected": b"c"}), " row 1"),
        ("a.parquet", parquet_of(GOOD_ROW, {"prompt": "a"}), " row 2"),
        ("a.parquet", parquet_of(turns), " row 1"),
        ("a.parquet", table[:-4] + b"PARE", " row 1"),
        ("a.parquet", table[:-8] + b"\xff\xff\xff\x7fPAR1", " row 1"),
        ("a.parquet", table[:-8] + b"\x00\x00\x00\x00PAR1", " row 1"),
    ]


def test_files_without_rows_name_themselves_and_the_row(tmp_path):
    with Cases() as case:
        for name, data, row in bad_files():
            path = tmp_path / name
            path.write_bytes(data)
            case(f"{name} {data[-30:]!r}, {len(data)} bytes", rows_of, path, expect="refused", names=f"{path}{row}")


def test_a_folder_is_read_whole_or_its_bad_file_is_named(tmp_path):
    rng, good = random.Random(6), files_of([GOOD_ROW, TALK_ROW])
    names = ["with space", "naïve 漢字", "🙂", "quo'te", '"', "%s{}", "-x", ".hidden", "a" * 200, "\\", "x.gz.txt"]

    def check(read):
        assert Counter(read) == Counter(itertools.chain(*map(rows_of, whole)))

    with Cases() as case:
        for number in range(60):
            folder, whole, bad = tmp_path / f"folder {number}", [], []
            folder.mkdir()
            (folder / "notes.txt").write_text("no data")
            for stem in rng.sample(names, rng.randint(1, 4)):
                name, data = rng.choice(list(good.items()))
                path = folder / (stem + name.removeprefix("rows"))
                kind = rng.choice(("good", "good", "good", "half", "folder", "empty folder", "link to nothing"))
                if "folder" in kind:  # named like a file, and read as what it is
                    path.mkdir()
                    path = path / name if kind == "folder" else path
                if kind == "link to nothing":
                    path.symlink_to(folder / "nothing")
                elif kind != "empty folder":
                    path.write_bytes(data[: len(data) // 2] + b"\x00" * 9 if kind == "half" else data)
                (whole if kind in ("good", "folder") else bad).append(path)
            expect, first = ("refused", str(min(bad))) if bad else ("clean", "")
            case(f"{number}: {first[-40:]}", rows_of, folder, check=check, expect=expect, names=first)


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "loop.jsonl").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "circle.jsonl").symlink_to(tmp_path / "circle.jsonl")
    with Cases() as case:
        for name in (
            "loop",
            "pipe.jsonl",
            "circle.jsonl",
            "nothing.jsonl",
            "a" * 5000,
            "pipe.jsonl/inside",
            "a/b.json",
        ):
            case(name[:20], rows_of, tmp_path / name, expect="refused")


def test_the_counts_on_the_screen_add_up(tokenizers, tmp_path, capsys):
    rng, path = random.Random(7), tmp_path / "rows.jsonl"

    def random_row():
        prompt, chosen, rejected = hostile_text(rng), hostile_text(rng), hostile_text(rng)
        row = {"prompt": prompt, "chosen": chosen, "rejected": rng.choice((chosen, rejected, rejected, rejected))}
        if rng.random() < 0.4:
            row = {side: rng.choice((prompt + TURN, prompt)) + row[side] for side in ("chosen", "rejected")}
        return row

    def check(sides):
        screen = capsys.readouterr().out
        numbers = re.search(r"^(\d+) rows read, (\d+) training pairs, (\d+) test pairs", screen).groups()
        dropped = sum(map(int, re.findall(r"^  dropped: .*: (\d+)$", screen, re.MULTILINE)))
        read, *sizes = map(int, numbers)
        assert read == len(rows[: settings.limit]) == sum(sizes) + dropped, "the counts do not add up"
        assert sizes == [len(side) for side in sides]
        prompts = [{tuple(side[index][0].tolist()) for index in range(len(side))} for side in sides]
        if given is None:  # a prompt that was cut may be the end of another
            assert not {prompt for prompt in prompts[0] & prompts[1] if len(prompt) < 80}, "a prompt on both sides"
        for side in sides:
            check_pairs(side)

    with Cases() as case:
        for number in range(70):
            rows = [random_row() for _ in range(rng.choice((0, 1, 5, 40, 40)))]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            settings = model.Settings(data=str(path), out=str(tmp_path), context=120, max_response=40, vocabulary=280,
                                      test_share=0.4, seed=number, limit=rng.choice((None, 20)))  # fmt: skip
            given = rng.choice([None, *tokenizers.values()])
            capsys.readouterr()
            case(f"{number}: {len(rows)} rows", read_pairs, settings, given, check=check)


# ---- Files that the stages write ----


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The chain's files, tiny: 32 pairs, and models of one layer."""
    out = tmp_path_factory.mktemp("made")
    rows = [{"prompt": f"\n\nHuman: Is {number} odd?{TURN}", "chosen": f" Yes, {number}.", "rejected": f" No {number}."}
            for number in range(40)]  # fmt: skip
    (out / "rows.jsonl").write_bytes(lines_of(*rows))
    shape = (
        "--vocabulary 300 --dim 16 --layers 1 --heads 2 --kv-heads 1 --context 96 --max-response 40 --test-share 0.3"
    )
    flags = "--out", out, "--steps", 1, "--batch-size", 4
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)  # so that no path is in the files, and the same places are damaged every time
        command("model", "--data", "rows.jsonl", *flags, *shape.split())
    command("reward", *flags)
    command("split", "--out", out)
    command("dpo", *flags)
    command("ppo", *flags, "--max-new-tokens", 4)
    return out


@pytest.fixture
def folder(made, tmp_path, monkeypatch) -> Path:
    """A copy of the chain's files, for the test alone, and the working directory too."""
    out = Path(shutil.copytree(made, tmp_path / "out"))
    monkeypatch.chdir(out)
    return out


def content_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.fixture
def toy_content(made) -> dict:
    """What a pairs file of the toy world holds when every field is there: with rewards and gold rewards."""
    content = content_of(made / "easy.pt")
    gold = torch.randn(content["rewards"].shape, generator=torch.Generator().manual_seed(0))
    return {**content, "source": "toy", "gold": gold}


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """That a tokenizer can be used: ids within its size, the ends of prompts and responses control tokens."""
    assert tokenizer.end in tokenizer.special.values(), "the end token is no control token"
    ids = [isinstance(token, int) and 0 <= token < tokenizer.size for token in tokenizer.begin]
    assert all(ids), "opening tokens out of range"
    for text in ("Is 7 odd?", f"naïve {END_OF_TEXT} \ud800"):
        ids = tokenizer.begin + tokenizer.encode(text)
        assert all(0 <= token < tokenizer.size for token in ids), "an id out of range"
        assert isinstance(tokenizer.decode([*ids, tokenizer.end]), str)


def check_pairs(pairs: Pairs) -> None:
    """That every use which the stages make of pairs works: ids within the vocabulary, lengths that add up, responses
    that end in the end token, finite rewards."""
    assert len(pairs) and isinstance(pairs.source, str), "no pairs or no source"
    check_tokenizer(pairs.tokenizer)
    lengths, tokens, place, end = pairs.lengths.tolist(), pairs.tokens.tolist(), 0, pairs.tokenizer.end
    assert all(isinstance(token, int) and 0 <= token < pairs.tokenizer.size for token in tokens), "ids out of range"
    for index, row in enumerate(lengths):
        assert len(row) == 3 and all(type(length) is int and length > 0 for length in row), "impossible lengths"
        for part, length in zip(pairs[index], row, strict=True):
            assert part.tolist() == tokens[place : place + length] and len(part) == length, "other tokens"
            place += length
        assert all(response[-1] == end for response in pairs[index][1:]), "a response without its end"
    assert place == len(tokens), "lengths that do not add up to the tokens"
    for scores in (pairs.rewards, pairs.gold):
        if scores is not None:
            assert scores.shape == (len(pairs), 2) and scores.is_floating_point(), "rewards of another shape"
            assert scores.isfinite().all(), "rewards that are not finite"
    # Whether answers are judged by gold rewards is decided now by the one and now by the other.
    assert (pairs.gold is not None) == (pairs.source == "toy"), "gold rewards without the toy world, or it without them"
    backwards = pairs.select(torch.arange(len(pairs)).flip(0))
    assert len(fingerprint(backwards.tokens, backwards.lengths)) == 16
    assert torch.equal(torch.cat(backwards[len(pairs) - 1]), torch.cat(pairs[0]))


def check_model(loaded) -> None:
    """That a model which was loaded can be trained and sampled from. Log-probs may not be finite: the stages say so."""
    network, tokenizer = loaded
    gpt = network if isinstance(network, GPT) else network.trunk
    check_tokenizer(tokenizer)
    assert tokenizer.size <= gpt.config.vocabulary, "ids past the model's vocabulary"
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters()), "weights of another dtype"
    assert all(parameter.isfinite().all() for parameter in network.parameters()), "weights that are not finite"
    # The fused optimiser writes in place as if all weights were contiguous, past the end of those that are not.
    assert all(parameter.is_contiguous() for parameter in network.parameters()), "weights that are not contiguous"
    assert isinstance(gpt.config.context, int) and gpt.config.context > 0, "no context"
    top = tokenizer.size - 1
    for batch in pack([(torch.tensor([1, top, 2]), torch.tensor([3, top]), torch.tensor([top]))], CPU):
        logprobs, _ = gpt.logprobs(batch)
        assert logprobs.shape == (3,) and not (logprobs > 1e-3).any(), "log-probs above 0"
        logprobs.sum().backward()
        assert network is gpt or network.score(batch).shape == (2,)
    (response,) = generate(gpt, [torch.tensor([1, 2])], tokenizer.end, 2)
    assert 1 <= len(response) <= 2 and all(0 <= token < gpt.config.vocabulary for token in response.tolist())


def settings_for(folder: Path) -> CommonSettings:
    return CommonSettings(out=str(folder), device="cpu")


def load_policy(settings: CommonSettings, name: str):
    return load_model(settings, name, GPT)


def load_reward_model(settings: CommonSettings, name: str):
    return load_model(settings, name, RewardModel)


LOADERS = {"easy.pt": (load_pairs, check_pairs), "sft.pt": (load_policy, check_model),
           "reward.pt": (load_reward_model, check_model)}  # fmt: skip
MODELS = ["sft.pt", "reward.pt"]


def load_bytes(folder: Path, data: bytes, load, *before: str):
    """What `load` makes of a file with these bytes, read after the policies `before`."""
    settings = settings_for(folder)
    for name in before:
        load_policy(settings, name)
    (folder / "bad.pt").write_bytes(data)
    return load(settings, "bad.pt")


def judge_file(case: Cases, folder: Path, label: str, name: str, content, expect="clean or refused", before=()) -> None:
    """One case of a file in the place of `name`: refused by its name, or safe to use."""
    load, check = LOADERS[name]
    data = content if isinstance(content, bytes) else saved(content)
    case(label, load_bytes, folder, data, load, *before, check=check, expect=expect, names="bad.pt")


@pytest.mark.parametrize("name", LOADERS)
def test_damaged_files_are_refused_or_safe_to_use(folder, name):
    data, rng = (folder / name).read_bytes(), random.Random(name)
    with Cases() as case:
        judge_file(case, folder, "whole", name, data, "clean")
        for kind, number in itertools.product(ACCIDENTS, range(16 if name == "easy.pt" else 8)):
            expect = "refused" if kind in ("cut", "zero end") else "clean or refused"
            judge_file(case, folder, f"{kind} {number}", name, damaged(rng, data, kind), expect)
        for size in (0, 1, 2, 4, 30, 64, len(data) - 22, len(data) - 1):
            judge_file(case, folder, f"{size} bytes", name, data[:size], "refused")


def test_bits_flipped_in_the_tensors_are_refused_or_safe_to_use(folder, toy_content):
    # The archive's checksums are not looked at when it is read, so such a file loads.
    rng, data = random.Random(8), saved(toy_content)
    with Cases() as case:
        for key, number in itertools.product(("tokens", "lengths", "rewards", "gold"), range(24)):
            judge_file(case, folder, f"{key} {number}", "easy.pt", flipped_tensor(rng, data, toy_content[key]))
        for name in MODELS:
            data, weights = (folder / name).read_bytes(), content_of(folder / name)["weights"]
            for (key, tensor), number in itertools.product(weights.items(), range(4)):
                judge_file(case, folder, f"{key} {number}", name, flipped_tensor(rng, data, tensor))


def test_pairs_files_with_wrong_fields_are_refused_or_safe_to_use(folder, toy_content):
    with Cases() as case:
        judge_file(case, folder, "all fields right", "easy.pt", toy_content, "clean")
        for label, content in wrong_fields(random.Random(9), toy_content, 12):
            judge_file(case, folder, label, "easy.pt", content)
        fields = ["tokens", "lengths", "rewards", "tokenizer", "source"]
        for first, second in itertools.combinations(fields, 2):
            swapped = {**toy_content, first: toy_content[second], second: toy_content[first]}
            judge_file(case, folder, f"{first} and {second} swapped", "easy.pt", swapped, "refused")


def test_lengths_and_tokens_that_do_not_fit_are_refused_or_safe_to_use(folder, toy_content):
    rng = random.Random(10)
    tokens, lengths = toy_content["tokens"], toy_content["lengths"]
    size = max(toy_content["tokenizer"]["special"].values()) + 1
    over, all_in_one = lengths.clone(), torch.tensor([[len(tokens), 0, 0]])
    over[:4, 0] += 2**62  # the sum overflows and is right again
    bad = {"lengths whose sum overflows": {"lengths": over}, "all in the first length": {"lengths": all_in_one}}
    # One length off, or moved to another of the same pair: the sum is right then, and nothing may be wrong at all where
    # it went from a prompt to the chosen response.
    for _ in range(60):
        longer, row, (first, second) = lengths.clone(), rng.randrange(len(lengths)), rng.sample(range(3), 2)
        by, moved = rng.choice((1, 2, int(lengths[row, second]), 100, 2**40)), rng.random() < 0.7
        longer[row, first] += by
        longer[row, second] -= by * moved
        bad[f"length {row},{first} {by} more, {second} {by * moved} less"] = {"lengths": longer}
    for number in (1, 3, 500):
        bad[f"{number} tokens more"] = {"tokens": torch.cat((tokens, tokens[:number]))}
        bad[f"{number} tokens fewer"] = {"tokens": tokens[:-number]}
    for token in (size, size + 1, 2**31 - 1, -1, -2, -size, -(2**31)):
        for place in rng.sample(range(len(tokens)), 4):
            bad[f"token {token} at {place}"] = {"tokens": tokens.index_fill(0, torch.tensor([place]), token)}
    with Cases() as case:
        for label, fields in bad.items():
            judge_file(case, folder, label, "easy.pt", {**toy_content, **fields})


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_with_wrong_fields_are_refused_or_safe_to_use(folder, name):
    content, rng = content_of(folder / name), random.Random(11)
    weights = content["weights"]
    with Cases() as case:
        for label, bad in wrong_fields(rng, content, 4, tensors=4):
            judge_file(case, folder, label, name, bad)
        for first, second in itertools.combinations(weights, 2):
            if weights[first].shape != weights[second].shape:
                bad = changed(content, ("weights", first), weights[second])
                judge_file(case, folder, f"{second} as {first}", name, bad, "refused")
        bad = changed(content, ("weights", "stowaway"), torch.zeros(2))
        judge_file(case, folder, "a weight too many", name, bad, "refused")


SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
BAD_SHAPES = {
    "vocabulary": [0, -1, 1, 299, 301, 10**6, 10**12, 2**63, 300.0, None, "300"],
    "dim": [0, -1, -16, 1, 8, 15, 17, 32, 10**9, 2**62, 16.0, None, "16"],
    "layers": [0, -1, 2, 3, 1.0, None, "1", 10**9],
    "heads": [0, -1, -2, 1, 3, 4, 16, 17, 32, 10**9, 2.0, None, "2"],
    "kv_heads": [0, -1, 2, 3, 5, 10**9, 2**62, 1.0, None, "1"],
    "mlp": [0, -1, 1, 10**9, 2**62, 64.0, None, "64"],
    "context": [0, -1, -(10**9), None, "96", math.nan],
    "rope_theta": [0, 0.0, -1.0, -10000, math.nan, math.inf, None, "10000", [1.0]],
    "rope_scaling": [{}, [], 3, "llama3", {"factor": 8.0}, SCALING, {**SCALING, "factor": None},
                     dict.fromkeys(SCALING, 0)],
    "norm_eps": [-1.0, -(10**9), math.nan, math.inf, None, "1e-5", [1]],
    "tied": [False, None, 0, "no"],
    "pretrained": [None, "no", 3],
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_of_impossible_shapes_are_refused_or_safe_to_use(folder, name):
    content, rng = content_of(folder / name), random.Random(12)
    shapes = [{field: value} for field, values in BAD_SHAPES.items() for value in values]
    # Two at a time, so that one may undo what gives the other away.
    shapes += [
        first | second for first, second in (rng.sample(shapes, 2) for _ in range(50)) if 10**9 not in first.values()
    ]
    embedding = "embedding.weight" if name == "sft.pt" else "trunk.embedding.weight"
    with Cases() as case:
        for shape in shapes:
            judge_file(case, folder, f"{shape!r:.60}", name, {**content, "config": {**content["config"], **shape}})
        for rows in (1, 100, content["config"]["vocabulary"] - 1):  # fewer than the tokenizer has tokens
            bad = changed(content, ("weights", embedding), content["weights"][embedding][:rows].clone())
            bad = changed(bad, ("config", "vocabulary"), rows)
            judge_file(case, folder, f"{rows} embeddings", name, bad, "refused")


def tokenizer_changes(tokens: list, end: int) -> dict[str, dict]:
    """Parts of a tokenizer's state that do not go together with the others."""
    swapped = [*tokens[:97], tokens[98], tokens[97], *tokens[99:]]
    bad = {
        "tokens": [[], ["a"] * len(tokens), [None] * len(tokens), ["", *tokens[1:]], tokens[:100],
                   [*tokens[:-1], "\u1234"], "abc", [1, 2], tokens * 2, swapped],
        "end": [5, 10**6, -1, None, "x", end + 0.5],
        "special": [{}, {END_OF_TEXT: -3}, {END_OF_TEXT: 2**40}, {END_OF_TEXT: end, "x": 2**32 - 400}, {"": end},
                    {"b": 5}, {END_OF_TEXT: end, "b": end}, {END_OF_TEXT: 5}, [[END_OF_TEXT, end]]],
        "pattern": ["", "x*", "x", "(", r"\p{Nope}", r"(a+)+$|\s|.", r"[\s\S]*"],
        "begin": [[10**9], [-1], "a", [None], 3, [[end]]],
        "in_text": [["nope"], 3, [None], [END_OF_TEXT] * 2],
        "normal": ["NFX", 3, "nfc"],
        "stowaway": [1],
    }  # fmt: skip
    return {f"{field} {value!r:.30}": {field: value} for field, values in bad.items() for value in values}


@pytest.mark.parametrize("name", LOADERS)
def test_a_tokenizer_that_is_at_odds_with_itself_is_refused_or_safe_to_use(folder, name):
    content = content_of(folder / name)
    state = content["tokenizer"]
    with Cases() as case:
        for label, change in tokenizer_changes(state["tokens"], state["end"]).items():
            bad = {**content, "tokenizer": {**state, **change}}
            judge_file(case, folder, label, name, bad)
            # Even one that could be used is not the tokenizer of the other files.
            judge_file(case, folder, f"{label}, beside dpo.pt", name, bad, "refused", before=["dpo.pt"])


# ---- Resume states ----


class Run:
    """A small training run that was stopped after two steps of four, and the bytes of its state and log."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.train(stop=2, save_every=2)
        self.state, self.log = (folder / "run.state.pt").read_bytes(), (folder / "run.jsonl").read_bytes()
        self.content = content_of(folder / "run.state.pt")

    def train(self, stop: int = 4, **flags) -> SimpleNamespace:
        settings = dpo.Settings(
            out=str(self.folder), device="cpu", save="run.pt", steps=4, batch_size=2, lr=1e-3, **flags
        )
        settings.parents = {"easy.pt": {"tokenizer": "0", "data": "0", "made": "0"}}
        torch.manual_seed(0)
        policy = GPT(Config(30, 8, 1, 2, 1, 8, 16))
        optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
        with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
            training = Training(settings, 6, policy=policy, optimizer=optimizer)
            first = training.step
            # Looked at before a step is made: the fused optimiser does not, and would write past their end.
            for weight, moments in optimizer.state.items():
                for moment in (moments["exp_avg"], moments["exp_avg_sq"]):
                    assert moment.shape == weight.shape and moment.is_contiguous(), "moments of another shape"
            for step, indices in training:
                if step == stop:
                    break
                (batch,) = pack([(torch.tensor([1, 2]), torch.tensor([3 + index])) for index in indices], CPU)
                loss = -policy.logprobs(batch)[0].mean()
                loss.backward()
                norm = training.optimizer_step(optimizer)
                training.log(("loss",), "pairs", 2, 6, loss=loss.item(), grad_norm=norm)
        return SimpleNamespace(first=first, policy=policy, log=settings.log_path)

    def resume(self, state: bytes, log: bytes | bool | None = None) -> SimpleNamespace:
        (self.folder / "run.state.pt").write_bytes(state)
        (self.folder / "run.jsonl").write_bytes(self.log if log is None else log or b"")
        if log is False:
            (self.folder / "run.jsonl").unlink()
        return self.train(resume=True)


def check_resumed(resumed: SimpleNamespace) -> None:
    assert 0 <= resumed.first <= 4, "a step that is not of this run"
    steps = [record["step"] for record in log_of(resumed.log)]
    assert steps == [*range(min(2, resumed.first)), *range(resumed.first, 4)], "other steps in the log"
    assert all(weight.isfinite().all() for weight in resumed.policy.parameters()), "weights that are not finite"


@pytest.fixture
def stopped(tmp_path) -> Run:
    return Run(tmp_path)


def test_damaged_resume_states_are_refused_or_go_on(stopped):
    rng = random.Random(13)
    with Cases() as case:
        case("whole", stopped.resume, stopped.state, check=check_resumed, expect="clean")
        for kind, number in itertools.product(ACCIDENTS, range(10)):
            expect = "refused" if kind in ("cut", "zero end") else "clean or refused"
            bad = damaged(rng, stopped.state, kind)
            case(f"{kind} {number}", stopped.resume, bad, check=check_resumed, expect=expect)


def test_resume_states_with_wrong_fields_are_refused_or_go_on(stopped):
    rng, content = random.Random(14), stopped.content
    groups, moments = content["optimizer"]["param_groups"], content["optimizer"]["state"]
    with Cases() as case:

        def judge(label, key, value, expect="clean or refused"):
            data = saved(changed(content, key, value))
            case(label, stopped.resume, data, check=check_resumed, expect=expect)

        for label, bad in wrong_fields(rng, content, 3, tensors=3):
            case(label, stopped.resume, saved(bad), check=check_resumed)
        for step in (-1, -5, 5, 100, 10**9, -(10**30), 10**30, 2.0, 1.5, math.nan, None, "2", [2], torch.tensor(2.5)):
            judge(f"step {step}", ("step",), step, "refused")
        for name, value in itertools.product(groups[0], (REMOVED, *rng.sample(BAD_VALUES, 4))):
            label = "removed" if value is REMOVED else f"= {value!r:.30}"
            judge(f"{name} {label}", ("optimizer", "param_groups"), [changed(groups[0], (name,), value)])
        for what, tensor in bad_tensors(moments[3]["exp_avg"]).items():
            for key in ("exp_avg", "exp_avg_sq"):
                judge(f"{key} {what}", ("optimizer", "state", 3, key), tensor)
        judge("no groups", ("optimizer", "param_groups"), [])
        judge("two groups", ("optimizer", "param_groups"), groups * 2)
        judge("no moments", ("optimizer", "state"), {}, "refused")
        judge("moments of nobody", ("optimizer", "state", 99), moments[0])


def test_a_broken_log_ends_no_resume_in_a_traceback(stopped):
    # A power cut may leave half a line, or one of zeros, behind a state that is whole.
    rng, lines = random.Random(15), stopped.log.splitlines(keepends=True)
    logs = {"empty": b"", "one line": lines[0], "half a line": lines[0] + lines[1][:40], "no JSON": b"hello\nworld\n",
            "rubbish": b"\xff\xfe\x80" * 50, "Latin-1": b'{"step": 0, "caf\xe9": 1}\n'}  # fmt: skip
    logs |= {f"{kind} {number}": damaged(rng, stopped.log, kind) for kind in ACCIDENTS for number in range(2)}

    def check(resumed):  # what was lost can't come back, but a log is what is there in the end
        assert [record["step"] for record in log_of(resumed.log)][-2:] == [2, 3]

    with Cases() as case:
        for label, log in logs.items():
            case(label, stopped.resume, stopped.state, log, check=check)
        case("gone", stopped.resume, stopped.state, False, check=check)


# ---- Files that try to run code ----


class Trap:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Setter:
    """Runs code when its state is set."""

    def __init__(self, marker):
        self.marker = marker

    def __setstate__(self, state):
        Path(state["marker"]).touch()


def traps(marker: Path) -> dict:
    """Objects that would make the file `marker` if they were unpickled."""
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Trap(os.system, f"touch {marker}"),
        "os.popen": Trap(os.popen, f"touch {marker}"),
        "os.mkdir": Trap(os.mkdir, str(marker)),
        "eval": Trap(eval, code),
        "exec": Trap(exec, code),
        "open": Trap(open, str(marker), "w"),
        "subprocess": Trap(subprocess.call, ["touch", str(marker)]),
        "Path.touch": Trap(Path.touch, marker),
        "torch.save": Trap(torch.save, {}, str(marker)),
        "a pickle in a pickle": Trap(pickle.loads, pickle.dumps(Trap(os.system, f"touch {marker}"))),
        "numpy": Trap(np.savetxt, str(marker), [1]),
        "reduce": Trap(functools.reduce, eval, [code, {}]),
        "a state": Setter(str(marker)),
    }


def unrun(marker: Path, action, *arguments):
    try:
        return action(*arguments)
    finally:
        assert not marker.exists(), "code of the file ran"


def test_files_that_would_run_code_are_refused_unrun(folder):
    marker, rng = folder / "ran", random.Random(16)
    loads = {name: load for name, (load, _) in LOADERS.items()}
    loads["dpo.pt"] = lambda settings, name: export_model(folder / name, folder / "exported")
    with Cases() as case:
        for (what, trap), (name, load) in itertools.product(traps(marker).items(), loads.items()):
            content = content_of(folder / name)
            files = {f"as {key}": saved({**content, key: trap}) for key in rng.sample(list(content), 3)}
            old = io.BytesIO()
            torch.save({**content, "made": trap}, old, _use_new_zipfile_serialization=False)
            files |= {
                "alone": saved(trap),
                "in a list": saved([1, trap]),
                "in the tokenizer": saved(changed(content, ("tokenizer", "pattern"), trap)),
                "in what made it": saved(changed(content, ("made", "settings", "seed"), trap)),
                "in the old format": old.getvalue(),
            }
            protocols = range(6) if what == "os.system" else [2]
            files |= {f"in a pickle of protocol {protocol}": pickle.dumps(trap, protocol) for protocol in protocols}
            for place, data in files.items():
                label = f"{what} {place} ({name})"
                case(label, unrun, marker, load_bytes, folder, data, load, expect="refused", names="bad.pt")


def test_a_resume_state_that_would_run_code_is_refused_unrun(stopped):
    keys = ("step",), ("policy",), ("optimizer", "param_groups"), ("made", "parents"), ("kind",)
    marker = stopped.folder / "ran"
    with Cases() as case:
        for (what, trap), key in itertools.product(traps(marker).items(), keys):
            data = saved(changed(stopped.content, key, trap))
            case(f"{what} as {key[-1]}", unrun, marker, stopped.resume, data, expect="refused", names="run.state.pt")


# ---- The commands ----

QUICK = {  # flags that make a command quick, and keep its results apart
    "model": "--steps 1 --batch-size 4 --save new.pt --context 96 --max-response 40 --test-share 0.3 --data rows.jsonl",
    "reward": "--steps 1 --batch-size 4 --save new.pt",
    "split": "--easy new_easy.pt --hard new_hard.pt",
    "dpo": "--steps 2 --batch-size 4 --save new.pt",
    "ppo": "--steps 1 --batch-size 4 --minibatch-size 2 --max-new-tokens 3 --save new.pt",
    "evaluate": "--prompts 3 --max-new-tokens 3 --samples 1 --policies sft.pt ppo.pt",
}
READS = [  # command, flag that names a file, and what it names by default
    ("reward", "--data", "pairs.pt"), ("reward", "--test", "test.pt"), ("reward", "--init", "sft.pt"),
    ("split", "--data", "pairs.pt"), ("split", "--init", "reward.pt"), ("dpo", "--data", "easy.pt"),
    ("dpo", "--init", "sft.pt"), ("ppo", "--data", "hard.pt"), ("ppo", "--init", "dpo.pt"),
    ("ppo", "--reference", "sft.pt"), ("ppo", "--reward", "reward.pt"), ("evaluate", "--data", "test.pt"),
    ("evaluate", "--sft", "sft.pt"), ("evaluate", "--reward", "reward.pt"), ("evaluate", "--policies", "dpo.pt"),
]  # fmt: skip


def check_outputs(folder: Path, before: dict[Path, bytes]) -> None:
    """That what a command wrote is whole: strict JSON, finite weights, and pairs that can be used."""
    for path, data in contents(folder).items():
        if before.get(path) == data:
            continue
        if path.suffix == ".jsonl":
            log_of(path)
        elif path.suffix == ".json":
            rows = json.loads(data, parse_constant=lambda text: math.nan)
            numbers = [number for row in rows.values() for number in row.values() if number is not None]
            assert all(map(math.isfinite, numbers)), f"{path.name} holds what is not a number"
        elif "weights" in (content := content_of(path)):
            assert all(weight.isfinite().all() for weight in content["weights"].values()), "weights that are not finite"
        elif len(content["lengths"]):
            check_pairs(load_pairs(settings_for(folder), path.name))


def judge_command(case: Cases, folder: Path, label: str, name: str, *flags, quick=True, **expectations) -> None:
    """One case of a command: refused with every file as it was, or a result that is whole. All is put back then."""
    before = contents(folder)

    def action():
        try:
            return command(name, *QUICK[name].split() * quick, "--out", folder, *flags)
        except UserError as error:
            new = {path.suffix for path, data in contents(folder).items() if before.get(path) != data}
            assert new <= {".jsonl"} or "is not finite" in str(error), "a command that refused its input wrote files"
            raise

    case(f"{name} {label}", action, check=lambda result: check_outputs(folder, before), **expectations)
    after = contents(folder)
    for path in after.keys() - before.keys():
        path.unlink()
    for path, data in before.items():
        if after.get(path) != data:
            path.write_bytes(data)


def test_commands_on_damaged_files_refuse_or_finish(folder):
    rng = random.Random(17)
    with Cases() as case:
        for name in QUICK:
            judge_command(case, folder, "on good files", name, expect="clean")
        for name, flag, file in READS:
            data, content = (folder / file).read_bytes(), content_of(folder / file)
            key, tensor = rng.choice([item for item in fields_of(content).items() if isinstance(item[1], torch.Tensor)])
            bad = {kind: damaged(rng, data, kind) for kind in rng.sample(ACCIDENTS, 1)}
            bad[f"{key[-1]} flipped"] = flipped_tensor(rng, data, tensor)
            # What is not contiguous corrupts the memory where it is taken, which the tests above find out harmlessly.
            wrong = [
                one for one in wrong_fields(rng, content, 2) if not one[0].endswith(("strided", "expanded", "turned"))
            ]
            bad |= {label: saved(one) for label, one in rng.sample(wrong, 2)}
            for label, data in bad.items():
                (folder / "bad.pt").write_bytes(data)
                judge_command(case, folder, f"{flag} {label}", name, flag, "bad.pt")


def test_commands_on_pairs_that_lie_refuse(folder):
    rng, content = random.Random(18), content_of(folder / "easy.pt")
    size = max(content["tokenizer"]["special"].values()) + 1
    tokens, lengths, first = content["tokens"], content["lengths"], torch.tensor([5])
    no_prompts = torch.stack((lengths[:, 0] * 0, lengths[:, 0] + lengths[:, 1], lengths[:, 2]), 1)
    lies = {
        "a token past the vocabulary": {"tokens": tokens.index_fill(0, first, size + 7)},
        "a token below 0": {"tokens": tokens.index_fill(0, first, -1)},
        "lengths moved": {"lengths": lengths + torch.tensor([0, 2, -2])},
        "negative lengths": {"lengths": lengths + torch.tensor([1000, -1000, 0])},
        "no prompts": {"lengths": no_prompts},
        "tokens missing": {"tokens": tokens[:-3]},
        "tokens between whole numbers": {"tokens": tokens + 0.5},
        "rewards of nobody": {"rewards": content["rewards"][:3]},
        "a table for a kind": {"kind": torch.zeros(2, 2)},
    }
    with Cases() as case:
        for label, fields in lies.items():
            torch.save({**content, **fields}, folder / "bad.pt")
            readers = [(name, flag) for name, flag, _ in READS if flag in ("--data", "--test")]
            for name, flag in readers if label == "a token past the vocabulary" else rng.sample(readers, 2):
                judge_command(case, folder, f"{flag} {label}", name, flag, "bad.pt", expect="refused", names="bad.pt")


def test_commands_on_models_that_overflow_refuse_or_finish(folder):
    with Cases() as case:
        for name, flag, file in [one for one in READS if one[1] not in ("--data", "--test")] + [
            ("model", "--init", "sft.pt")
        ]:
            content = content_of(folder / file)
            weights = content["weights"]
            keys = (
                ["head.bias", "trunk.norm.weight"] if file == "reward.pt" else ["norm.weight", "blocks.0.down.weight"]
            )
            for key in keys:
                torch.save(changed(content, ("weights", key), torch.full_like(weights[key], 3e38)), folder / "bad.pt")
                judge_command(case, folder, f"{flag} {key} 3e38", name, flag, "bad.pt")


def test_model_py_on_hostile_data_refuses_or_finishes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, out = random.Random(19), tmp_path / "out"
    out.mkdir()
    shape = "--steps 0 --vocabulary 270 --dim 8 --layers 1 --heads 1 --kv-heads 1 --test-share 0.4 --max-response 300"
    files = [(name, data, "refused") for name, data, _ in rng.sample(bad_files(), 25)]
    for number in range(12):
        texts = [[hostile_text(rng) for _ in range(3)] for _ in range(12)]
        rows = [{"prompt": f"{place}{prompt}", "chosen": f"{chosen}a", "rejected": rejected}
                for place, (prompt, chosen, rejected) in enumerate(texts)]  # fmt: skip
        files.append(
            (
                f"naïve {number} 漢.jsonl",
                "".join(map("{}\n".format, map(json.dumps, rows))).encode(),
                "clean or refused",
            )
        )
    words = lines_of(*({**GOOD_ROW, "prompt": f"{number}" + "ab" * 10_000} for number in range(12)))
    spaces = lines_of(*({**GOOD_ROW, "prompt": f"{number}" + " " * 1_100_000} for number in range(3)))
    files += [("long words.jsonl", words, "clean"), ("spaces.jsonl", spaces, "clean or refused"),
              ("line\nbreak.jsonl", b"{", "refused"), ("line\nbreak.parquet", b"PAR1", "refused"),
              ("end.parquet", bad_files()[-1][1], "refused")]  # fmt: skip
    with Cases() as case:
        for name, data, expect in files:
            (tmp_path / name).write_bytes(data)
            label = f"--data {name!r} {data[:20]!r}"
            judge_command(case, out, label, "model", "--data", name, *shape.split(), quick=False, expect=expect)


def test_evaluate_answers_any_prompt_or_refuses_it(folder):
    rng = random.Random(20)
    prompts = [" ", "\n", END_OF_TEXT, "<|im_end|>", TURN, "\x00", "a" * 5000, " " * 1_100_000, "\ud800", "--prompt"]
    flags = "--out", folder, "--policies", "sft.pt", "--max-new-tokens", 3

    def check(result):
        assert result.out.startswith("SFT ") and result.out.endswith("\n")

    with Cases() as case:
        for prompt in prompts + [hostile_text(rng) or "?" for _ in range(15)]:
            case(f"{prompt[:30]!r}", command, "evaluate", *flags, f"--prompt={prompt}", check=check)


def test_commands_resume_from_broken_states_or_refuse(folder, monkeypatch):
    rng, log = random.Random(21), Training.log

    def log_and_stop(self, *arguments, **metrics):
        log(self, *arguments, **metrics)
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with Cases() as case:
        for name in ("reward", "dpo", "ppo"):
            flags = [*QUICK[name].split(), "--steps", 4]
            with monkeypatch.context() as patch:
                patch.setattr(Training, "log", log_and_stop)
                assert run(name, *flags, "--out", folder, "--device", "cpu").code == 130
            path = folder / "new.state.pt"
            data, content = path.read_bytes(), content_of(path)
            states = {f"step {step}": saved(changed(content, ("step",), step)) for step in (-3, 99, None, math.nan)}
            states |= {kind: damaged(rng, data, kind) for kind in rng.sample(ACCIDENTS, 2)}
            states |= {label: saved(wrong) for label, wrong in rng.sample(list(wrong_fields(rng, content, 2)), 2)}
            for label, state in states.items():
                path.write_bytes(state)
                expect = "refused" if label.startswith("step ") else "clean or refused"
                judge_command(case, folder, f"--resume {label}", name, *flags, "--resume", quick=False, expect=expect)
            path.unlink()


# ---- How many there were ----


def test_every_case_was_counted(capsys):
    parts = [f"{ENDED['clean']:,} clean results", f"{ENDED['refused']:,} refused in one line"]
    parts += [f"{ENDED['badly']:,} that ended badly"] * bool(ENDED["badly"])
    with capsys.disabled():
        print(f"\n{BEGUN['cases']:,} hostile cases: {', '.join(parts)}")
    assert BEGUN["cases"] == sum(ENDED.values())
