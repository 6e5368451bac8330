"""Tokenizers and pretrained models in, trained ones out, with transformers, tokenizers and safetensors as oracles."""

import dataclasses
import functools
import itertools
import json
import random
import re
import shutil
import unicodedata
from collections import Counter

import pytest
import regex
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.torch")

import huggingface_hub
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors, trainers

from evaluate import export_model, write_safetensors
from model import (
    END_OF_TEXT as END,
)
from model import (
    GPT,
    PADDING,
    WORD_PATTERN,
    Config,
    Settings,
    Tokenizer,
    UserError,
    find_pretrained,
    import_model,
    import_tokenizer,
    pack,
    read_safetensors,
    save_model,
    toy_rows,
    train_tokenizer,
)
from reward import RewardModel

CPU = torch.device("cpu")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def close(result, expected, tolerance=1e-4):
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def assert_same(texts, results, expected):
    wrong = [row for row in zip(texts, results, expected, strict=True) if row[1] != row[2]]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, such as {min(wrong, key=lambda row: len(repr(row)))}"


@pytest.fixture(autouse=True)
def nothing_but_the_test(tmp_path_factory, monkeypatch):
    """No bare name means a file or folder of the checkout, and nothing asks the hub for more."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


# ---- Texts ----

SAMPLE = """The quick brown fox jumps over the lazy dog. It's what they'd said: we're sure you'll find that I'm right,
they've been there, HE'S THERE, I'LL GO, DON'T STOP; O'Neill isn't here 's 't 're. What is the best way to do that?
def fibonacci(n: int) -> int:
    if n < 2:
        return n
\treturn fibonacci(n - 1) + fibonacci(n - 2)  # the sum of both\r\n\r\n\r\n
https://www.example.org/path/to/page.html?query=value&other=12345#top  user@example.org  C:\\Users\\name
In 1969, 2024, 12, 365, 1000000, 3.14159, 1,234,567.89 and 100% of 50 people paid $9.99 for 20 of them.
Les élèves français étaient déjà là, où l'été commençait à Noël. Der Bär fraß große Äpfel für fünf Mäuse.
Съешь же ещё этих мягких французских булок, да выпей чаю. Η γρήγορη καφέ αλεπού πηδάει πάνω από το σκυλί.
السلام عليكم ورحمة الله وبركاته، كيف حالك اليوم؟ שלום עולם, מה שלומך היום? नमस्ते दुनिया, आप कैसे हैं?
你好,世界!今天天气很好。日本語のテキストです。안녕하세요 세계, 오늘은 날씨가 좋습니다. สวัสดีชาวโลก วันนี้อากาศดีมาก
Tiếng Việt có nhiều dấu: người, được, những, trường. Łódź, żółć, İstanbul'da ığdır, ŒUVRE, ﬁne, ſtop.
🙂🙂 👨\u200d👩\u200d👧\u200d👦 👍🏽 🇩🇪🇫🇷🇯🇵 ❤\ufe0f 🏳\ufe0f\u200d🌈
∑ x² ≤ ∞ → ½ ⅔ Ⅳ ① ٣٤٥ १२३ ๑๒๓ — “quotes” ‘n’ … «là» ┌──┐ ™ © €
"""
HARD = [
    "", " ", "  ", "\n\n", " \n", "\n ", "\t\t x", " \r\n \r\n ", "a\rb", "a ", "   a  b   c    ", "a \n \n b",
    "\n\n  \n\ta",
    "x" + " " * 60 + "y", "\n" * 40, "\t \t \n\t \n  ", "  1", "1  ", "1 2  3   4", "\n 1", "1\n\n2", "1a2b3c",
    "a1 b2  c3",
    " 12345678901", "3.14159e-10", "v1.2.3-rc4", "٣٤٥٦٧", " १२३४", "½⅔ Ⅳ ① ²³", "１２３ 𝟏𝟐𝟑", "1٣१", "12\u00a034",
    "it's I'm we're you'll they've he'd don't IT'S 'Ll 'rE", "'s 's''s'sa'S1a'sb", "'ſ 'ſt it'ſ", "’s it’s", "' '",
    "1's",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # done\n\n\nclass A:\n\tpass\n",
    "if(a&&b||!c){d+=e<<2;}//f\r\n",
    "a_b __init__ aB CamelCase", "https://www.example.org:8080/a/b.c?d=e&f=%20#g", "----====####....!!!???", "x" * 500,
    "antidisestablishmentarianism" * 10, "字" * 200, "1" * 200, "!" * 200, "ab" * 150, "🙂" * 50, "Καλημέρα κόσμε;",
    "لا إِلَٰهَ שָׁלוֹם", "नमस्ते क्षत्रिय ภาษาไทย", "你好,世界!カタカナ。ｶﾀｶﾅ", "안녕 ᄒ\u1161\u11ab", "İstanbul ığdır ẞß ﬁne ǅ",
    "𝓗𝓮𝓵𝓵𝓸 𐍈 𠜎𠜱", "e\u0301\u0302\u0303\u0316 a\u030a", "o\u0302\u0301 \u1ed1", "\u212b \u2126", "q\u0307\u0323",
    "\u0344 \u0958", "👨\u200d👩\u200d👧 👍🏽👍🏿 🇩🇪🇫🇷🇯", "🏳\ufe0f\u200d🌈 1\ufe0f⃣", "\U000e0067\U000e007f",
    "\u200f\u200e \u202eabc\u202c",
    "a\u200bb a\u200db", "\ufeffa", "a\u00adb", "\u2028a\u2029b", "a\u0085b", "\u180ea", "\u00a0 \u00a01",
    "a\u2003b \u20031",
    "\u3000中\u3000\u30001", "a\u1680b\u2009c", "\x00", "a\x00b", "\x01\x02 \x1b[31mred\x1b[0m", "\x7f\x80\x9f",
    "\x0b\x0c a\x0b1",
    "\x1c\x1d\x1e\x1f a", "\ufffd\ufffe\uffff", "\ue000\uf8ff\U0010fffd\u0378", "„Ja“ – ‚nein‘ — «oui»…", "∀x∈ℝ: ∃y",
    " \u0301a",
    "1\u0301 \n\u0301", "ʼs ˈa", "ª º ² ʰ", "#1 @a *b* `c`", "+1 -1", END, f"a{END}b", f"{END}{END}", " <|endoftext|> ",
    "<|im_start|>user\nHi<|im_end|>\n", "<s> </s>", "<|endoftext|", "a<think>b</think>c", " <think> ", "<think",
    "1<think>1",
    "\t\t\t\t", "a\t\t\tb", "\ud83d", "a \ud83d b", "\udc00\ud83d",
]
SPACES = ["  ", "   ", "\n\n", "\t", "\r\n", " \n", "\u00a0", "\u3000", "\u2003", "\u200b", " " * 9, "\n" * 5]
NAMES = [END, "<|im_start|>", "<|im_end|>", "<s>", "<think>", "</think>", "ώ", "ω\u0301", "\u1f7d", "<a", "<ab", "<abc"]


def sound(texts) -> list[str]:
    """Without halves of surrogate pairs, which the libraries do not take."""
    return [text for text in texts if not re.search("[\ud800-\udfff]", text)]


def random_texts(count: int, seed: int) -> list[str]:
    """Words, characters, spaces, digits and names in random order; every fourth text is of any characters at all."""
    rng = random.Random(seed)
    characters = sorted(set("".join(sound(HARD)) + SAMPLE))
    pieces = [*characters, *SPACES * 8, *NAMES * 4, *"0123456789" * 6, *["'s", "'LL", "'ve", " "] * 20]
    pieces += [word for word in SAMPLE.split(" ") if word] + SAMPLE.split()
    # Characters that have long had their place: what a letter is must not depend on anyone's version of Unicode.
    old = [chr(point) for point in range(0x2FA20) if unicodedata.ucd_3_2_0.category(chr(point))[1] not in "nso"]
    kinds = [pieces, pieces, [*characters, " ", *SPACES], old + characters]
    return ["".join(rng.choices(kinds[number % 4], k=rng.randint(1, 16))) for number in range(count)]


TEXTS = [*sound(HARD), SAMPLE, *SAMPLE.splitlines(keepends=True), *random_texts(3000, seed=0)]

# ---- Tokenizers, made with the tokenizers library ----

GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIALS = [END, "<|im_start|>", "<|im_end|>", "<repo>", "<file>"]


def split_by(pattern: str):
    """The pre-tokenizer of Llama 3 and Qwen: a regular expression of one's own, then bytes."""
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


def train(words, first=(), alphabet=None, last=(END,), in_text=(), begin=None, normalizer=None, across=False):
    """A byte-level BPE with special tokens at its first or last ids. `across`: trained on texts that were not cut into
    words, so that a word which is later cut elsewhere than it should be shows in the ids."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = BYTES if across else words, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
    more = [text for text in sound(HARD) + random_texts(600, seed=1) if "<" not in text]  # no special token is merged
    trainer = trainers.BpeTrainer(vocab_size=2500 if across else 1100, show_progress=False,
                                  special_tokens=list(first), initial_alphabet=sorted(alphabet))
    tokenizer.train_from_iterator([SAMPLE] * 3 + more * across, trainer)
    tokenizer.pre_tokenizer = words
    tokenizer.add_special_tokens(list(last))
    tokenizer.add_tokens(list(in_text))
    if begin:
        opening = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), opening])
    tokenizer.encode_special_tokens = True  # special tokens written out are ordinary text
    return tokenizer


def llama3(**options):
    last = ["<|begin_of_text|>", END, "<|eot_id|>", "<|finetune_right_pad_id|>"]
    tokenizer = train(split_by(LLAMA3_WORDS), last=last, begin="<|begin_of_text|>", **options)
    tokenizer.model.ignore_merges = True
    return tokenizer


ADDED = [AddedToken("ώ", normalized=False), AddedToken("\u1f7d ", normalized=True), AddedToken("<a", normalized=True),
         AddedToken("<ab", normalized=False), AddedToken("<abc", normalized=True), "  ", "    ", "<think>"]
KINDS = {
    "gpt2": lambda: train(GPT2),
    "digits": lambda: train(DIGITS, last=["<|im_end|>", END]),
    "llama3": llama3,
    "nfc": lambda: train(split_by(LLAMA3_WORDS.replace("{1,3}", "")), normalizer=normalizers.NFC(), last=SPECIALS),
    "smollm2": lambda: train(DIGITS, first=SPECIALS, alphabet=["!"], last=[]),
    "smollm2, llama3's words": lambda: train(split_by(LLAMA3_WORDS), first=SPECIALS, alphabet=["!"], last=[]),
    "begin": lambda: train(GPT2, first=["<s>", END], last=[], begin="<s>"),
    "in text": lambda: train(GPT2, in_text=["<think>", "</think>", "\t\t\t"]),
    "in text, nfc": lambda: train(GPT2, in_text=ADDED, normalizer=normalizers.Sequence([normalizers.NFC()])),
    "in text, nfkd": lambda: train(GPT2, in_text=ADDED, normalizer=normalizers.NFKD()),
    "gpt2, across": lambda: train(GPT2, across=True),
    "digits, across": lambda: train(DIGITS, first=SPECIALS, last=[], across=True),
    "llama3, across": lambda: llama3(across=True),
}
FORMS = {"nfc": "NFC", "in text, nfc": "NFC", "in text, nfkd": "NFKD"}
every_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def original(kind: str):
    """The tokenizer as the tokenizers library has it. Tests only read it."""
    return KINDS[kind]()


def write_tokenizer(tokenizer, folder):
    """tokenizer.json, and the configs as far as a tokenizer needs them."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text("{}")
    return folder


def ours_of(theirs) -> Tokenizer:
    return Tokenizer(theirs.to_str(), END)


def spelled(text: str) -> str:
    """The bytes of a text, each as the symbol that stands for it in a vocabulary."""
    return "".join(piece for piece, _ in BYTES.pre_tokenize_str(text))


def their_ids(tokenizer, texts) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


@every_kind
def test_ids_and_texts_equal_those_of_the_tokenizers_library(kind, tmp_path):
    theirs = original(kind)
    ours = import_tokenizer(write_tokenizer(theirs, tmp_path))
    results = [ours.encode(text) for text in TEXTS]
    assert_same(TEXTS, results, their_ids(theirs, TEXTS))
    used = {token for ids in results for token in ids}
    assert ours.end == theirs.token_to_id(END) and not used & set(ours.special.values()), "text became a control token"
    assert ours.size == max(theirs.get_vocab().values()) + 1
    assert len(used) > (0.7 * ours.size if "across" not in kind else 300)
    for text in ("Hello there", ""):
        assert ours.begin + ours.encode(text) == theirs.encode(text, add_special_tokens=True).ids
    assert len(ours.begin) == (kind in ("begin", "llama3", "llama3, across"))

    rng = random.Random(0)
    texts = [text for text in TEXTS if set(spelled(text)) <= theirs.get_vocab().keys()]
    assert 300 < len(texts) < len(TEXTS) if "smollm2" in kind else texts == TEXTS
    if "in text," not in kind:  # whose added tokens come back as they are written there
        expected = [unicodedata.normalize(FORMS[kind], text) if kind in FORMS else text for text in texts]
        assert_same(texts, [ours.decode(ours.encode(text)) for text in texts], expected)
    some = [[rng.randrange(ours.size) for _ in range(rng.randint(0, 12))] for _ in range(500)]
    some += [[rng.randrange(min(280, ours.size)) for _ in range(rng.randint(0, 8))] for _ in range(500)]  # mostly bytes
    expected = theirs.decode_batch(some, skip_special_tokens=True)
    assert any("\ufffd" in text for text in expected)
    assert_same(some, [ours.decode(ids) for ids in some], expected)
    assert_same(some, [ours.decode(torch.tensor(ids)) for ids in some], expected)
    assert ours.decode([ours.end, *ours.encode("Hi"), ours.size, 10**9, -1]) == "Hi"


def bytes_only(*more: str, merges=(), lack="", added=(), **options):
    """A tokenizer of bytes, with no merges but those given, `more` entries in its vocabulary, and an end-of-text token:
    256, unless there is more."""
    symbols = [symbol for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()) if symbol not in lack]
    vocabulary = {name: number for number, name in enumerate([*symbols, *("".join(pair) for pair in merges), *more])}
    parts = {name: options.pop(name) for name in ("pre_tokenizer", "normalizer", "post_processor") if name in options}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, list(merges), **options))
    for name, part in {"pre_tokenizer": GPT2, "decoder": decoders.ByteLevel(), **parts}.items():
        setattr(tokenizer, name, part)
    tokenizer.add_special_tokens([END])
    tokenizer.add_tokens(list(added))
    tokenizer.encode_special_tokens = True
    return tokenizer


AB = [("a", "b"), ("ab", "c"), ("a", "a")]
RARE = {  # each with texts that show it
    "a lacking byte": (lambda: bytes_only(merges=AB, lack="xÃ"),
                       ["axb", "xaxbxcx", "xx", "é", "aéxbÃc", "a xb", " x b"]),
    "half a character": (lambda: bytes_only(merges=AB, lack="©Ã"), ["aéb", "é", "a©b", "aä", "éa", "\ud83dé"]),
    "tokens that begin alike": (lambda: bytes_only(added=["<a", "<ab", "<abc"]), ["x<abcd", "<ab>", "<a>", "<<abab"]),
    "runs of spaces": (lambda: bytes_only(added=["  ", "   ", "    "]), ["a     b", "       ", "  \n   "]),
    "control token over another": (lambda: bytes_only(added=["<|end", "of"]), [END, f"of{END}of", "<|endof<|end"]),
    "control token, trimmed": (lambda: bytes_only(added=[AddedToken("<t>", lstrip=True, special=True)]), ["x  <t> y"]),
    "not normalised": (lambda: bytes_only(added=[AddedToken("ώ", normalized=False)], normalizer=normalizers.NFC()),
                       ["ώ", "ω\u0301", "\u1f7d", "xω\u0301ώ\u0323"]),
    "normalised": (lambda: bytes_only(added=[AddedToken("ω\u0301", normalized=True)], normalizer=normalizers.NFC()),
                   ["ώ", "ω\u0301", "\u1f7d", "xω\u0301ώ\u0323"]),
    "not normalised first": (lambda: bytes_only(normalizer=normalizers.NFC(), added=[
        AddedToken("b\u0323", normalized=False), AddedToken("ab", normalized=True)]), ["ab\u0323", "abb\u0323ab"]),
    "accent after a token": (lambda: bytes_only(added=[AddedToken("a", normalized=False)],
                                                normalizer=normalizers.NFC()),
                             ["a\u030a", "ba\u030a", "a\u030aa"]),
    "words cut at a token": (lambda: bytes_only(merges=[("Ġ", "a"), ("s", "s")], added=["|"]),
                             ["s|s ss", "| a", " | a|'s"]),
    "whole words": (lambda: bytes_only("abc", ignore_merges=True), ["abc", " abc", "xabc", "abcd"]),
    "no normaliser": (lambda: bytes_only(normalizer=normalizers.Sequence([])), ["Å", "A\u030a"]),
    "one in one": (lambda: bytes_only(normalizer=normalizers.Sequence([normalizers.Sequence([normalizers.NFD()])])),
                   ["Å"]),
    "words that leave gaps": (lambda: bytes_only(merges=AB, pre_tokenizer=split_by(r"\d+")),
                              ["ab1cd", "ab 12ab", "aab1"]),
    "words in another order": (lambda: bytes_only(merges=AB, pre_tokenizer=split_by(r"\s+|\S+")), ["ab 12ab", " \n "]),
    "unknown token, nothing lacking": (lambda: bytes_only("<unk>", added=["<unk>"], unk_token="<unk>"), ["axb", "é"]),
}


@pytest.mark.parametrize("make, texts", RARE.values(), ids=RARE)
def test_what_is_rare_means_the_same(make, texts, tmp_path):
    theirs = make()
    ours = import_tokenizer(write_tokenizer(theirs, tmp_path))
    texts = texts + [text for text in random_texts(300, seed=2) if "x" not in text] + [f"x{text}" for text in texts]
    whole = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    assert_same(texts, [ours.encode(text) for text in texts], their_ids(theirs, whole))


def test_a_lacking_byte_by_hand():
    """Dropped before merging, so that its neighbours merge; but not with those of another word."""
    ours = ours_of(bytes_only(merges=AB, lack="x"))
    ab, c, space = ours.ranks["ab"], ours.ranks["c"], ours.ranks["Ġ"]
    assert ours.encode("axb c x axbxc x") == [ab, space, c, space, space, ours.ranks["abc"], space]
    assert ours.encode("x" * 10) == [] and len(ours.encode("axb" * 30_000)) == 30_000


def test_an_older_tokenizer_json_means_the_same():
    """Merges were texts, not lists, and some keys did not exist yet."""
    theirs = original("gpt2")
    content = json.loads(theirs.to_str())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    for part, key in (("model", "byte_fallback"), ("model", "ignore_merges"), ("pre_tokenizer", "use_regex")):
        del content[part][key]
    ours = Tokenizer(json.dumps(content), END)
    assert_same(TEXTS[:600], [ours.encode(text) for text in TEXTS[:600]], their_ids(theirs, TEXTS[:600]))


ENDS = [({"eos_token": "<|im_end|>"}, {"eos_token_id": 0}, "<|im_end|>"),
        ({"eos_token": {"content": "<|im_end|>", "special": True}}, {}, "<|im_end|>"),
        ({"eos_token": None}, {"eos_token_id": 2}, "<|im_end|>"), ({}, {"eos_token_id": [2, 0]}, "<|im_end|>"),
        (None, {"eos_token_id": 0}, END)]


@pytest.mark.parametrize("described, config, end", ENDS)
def test_the_end_is_the_token_that_the_folder_names(described, config, end, tmp_path):
    write_tokenizer(original("smollm2"), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    if described is None:
        (tmp_path / "tokenizer_config.json").unlink()
    ours = import_tokenizer(tmp_path)
    assert (ours.end, ours.end_name) == (original("smollm2").token_to_id(end), end)


def test_the_template_is_the_file_s_or_else_the_config_s(tmp_path):
    config = write_tokenizer(original("gpt2"), tmp_path) / "tokenizer_config.json"
    assert import_tokenizer(tmp_path).template is None
    config.write_text(json.dumps({"eos_token": END, "chat_template": "in the config"}))
    assert import_tokenizer(tmp_path).template == "in the config"
    (tmp_path / "chat_template.jinja").write_text("{{ 'fïle' }}", "utf-8")
    assert import_tokenizer(tmp_path).template == "{{ 'fïle' }}"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template == "{{ 'fïle' }}"


# ---- A tokenizer trained here ----

TOY_TEXTS = [text for row in toy_rows(60, 0) for text in row.values()]
TOY = train_tokenizer(TOY_TEXTS, 400)


def test_the_toy_tokenizer_is_what_the_tokenizers_library_reads():
    theirs = tokenizers.Tokenizer.from_str(TOY.text)
    theirs.encode_special_tokens = True
    texts = TEXTS + TOY_TEXTS
    assert_same(texts, [TOY.encode(text) for text in texts], their_ids(theirs, texts))
    assert_same(texts, [TOY.decode(TOY.encode(text)) for text in texts], texts)
    assert TOY.special == {PADDING: 255, END: 399} and (TOY.end, TOY.size, TOY.begin) == (399, 400, [])
    assert theirs.get_vocab().keys() == {theirs.id_to_token(number) for number in range(400)}
    assert train_tokenizer(TOY_TEXTS, 400).state == TOY.state == Tokenizer(**TOY.state).state
    assert [TOY.bytes[number] for number in range(255)] == [bytes([number]) for number in range(255)]


def test_broken_characters_and_endless_spaces_stop_nothing():
    """JSON may hold half a surrogate pair: it is no character and becomes a replacement."""
    tokenizer = train_tokenizer(["a \ud83d b \ud83d c"], 300)
    assert tokenizer.decode(tokenizer.encode("a \ud83d b\udc00")) == "a \ufffd b\ufffd"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "🙂"
    with pytest.raises(UserError, match="a text of 1000001 characters cannot be tokenised"):
        TOY.encode(" " * 1_000_000 + "x")


@pytest.mark.parametrize("text", ["letters" * 20_000, "a b " * 50_000, "😀" * 50_000, "\x00" * 100_000, "x\n" * 50_000,
                                  " " * 20_000], ids=lambda text: repr(text[:4]))
def test_long_texts_come_back_and_can_be_trained_on(text):
    for tokenizer in (TOY, train_tokenizer([text], 300), ours_of(original("gpt2"))):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_merges_worked_by_hand():
    # Words: "aab", " aab", " ab". Pairs of neighbours: ab 3, aa 2, " a" 2. So "ab" is merged first. Then the words
    # are a·ab, " "·a·ab and " "·ab, with the pairs a·ab 2, " "·a 1, " "·ab 1: "aab" is second. Then none is left twice.
    tokenizer = train_tokenizer(["aab aab", " ab"], 1000)
    assert [tokenizer.bytes[number] for number in (256, 257)] == [b"ab", b"aab"]
    assert tokenizer.encode("aab aab ab") == [257, 32, 257, 32, 256]
    assert (tokenizer.end, tokenizer.size) == (258, 259)
    assert (train_tokenizer([], 257).end, train_tokenizer(["aab aab"], 258).size) == (256, 258)


def test_every_merge_is_of_a_most_frequent_pair():
    """Plays the merges again with all pairs counted anew each time."""
    words = Counter(word for text in TOY_TEXTS for word in regex.findall(WORD_PATTERN, text))
    words = {tuple(bytes([byte]) for byte in word.encode()): count for word, count in words.items()}
    for number in range(256, TOY.end):
        counts = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                counts[pair] += count
        made_by = {pair: count for pair, count in counts.items() if pair[0] + pair[1] == TOY.bytes[number]}
        assert max(made_by.values()) == max(counts.values()) >= 2
        merged_words = {}
        for word, count in words.items():
            merged = []
            for piece in word:
                if merged and max(made_by, key=made_by.get) == (merged[-1], piece):
                    piece = merged.pop() + piece
                merged.append(piece)
            merged_words[tuple(merged)] = count
        words = merged_words


# ---- Small models, written by transformers ----

VOCABULARY = 260  # more than the 257 tokens of bytes_only(), as padded vocabularies are
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 160, "rms_norm_eps": 1e-5,
         "bos_token_id": None, "eos_token_id": 256}
# A head of 16 has frequencies from 1 down to 3e-4; the full turns within 32 positions are then 5.1, 1.6, 0.5, …
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SCALED = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, **LLAMA3}}
TIED = {"tie_word_embeddings": True}


def llama(**changes):
    """A LlamaForCausalLM whose random weights are large enough that every setting shows in its logits."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    return model


def imported(theirs, folder, **options) -> GPT:
    theirs.save_pretrained(folder, **options)
    return import_model(write_tokenizer(bytes_only(), folder))[0]


def edit(path, **changes):
    """Changes keys of a JSON file; None takes the key away."""
    content = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), "utf-8")


def respoil(path, change) -> None:
    """Reads the weights, has them changed, and writes them back."""
    tensors = safetensors.load_file(path)
    change(tensors)
    safetensors.save_file(tensors, path, metadata={"format": "pt"})


def random_ids(*lengths, seed=0, vocabulary=VOCABULARY) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (length,), generator=generator) for length in lengths]


IDS = random_ids(120, 33, 1)  # more positions than the 32 before scaling


@torch.no_grad()
def same_logits(policy, theirs, documents=IDS, tolerance=1e-4):
    for ids in documents:
        logits = theirs(ids[None]).logits[0].float()
        assert logits.std() > 0.5
        close(policy(ids) @ policy.vocabulary_weight.T, logits, tolerance)


def in_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


MODELS = {  # changes to the shape above, and changes to our Config that must then show
    "plain": ({}, {"rope_theta": 9000.0}),
    "tied": (TIED, {}),
    "multi-head": ({"num_key_value_heads": 4}, {}),
    "multi-query": ({"num_key_value_heads": 1}, {}),
    "one head": ({"num_attention_heads": 1, "num_key_value_heads": 1}, {}),
    "theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {"rope_theta": 10000.0}),
    "norm eps": ({"rms_norm_eps": 0.02}, {"norm_eps": 1e-5}),
    "llama3, tied, multi-query": ({**SCALED, **TIED, "num_key_value_heads": 1}, {"rope_scaling": None}),
}


@torch.no_grad()
@pytest.mark.parametrize("changes, other", MODELS.values(), ids=MODELS)
def test_logits_equal_those_of_transformers(changes, other, tmp_path):
    theirs = llama(**changes)
    policy = imported(theirs, tmp_path)
    same_logits(policy, theirs)
    assert policy.config.pretrained and policy.config.tied == theirs.config.tie_word_embeddings
    if other:  # the setting under test is one that these logits depend on
        changed = GPT(dataclasses.replace(policy.config, **other))
        changed.load_state_dict(policy.state_dict())
        assert ((changed(IDS[0]) - policy(IDS[0])) @ policy.vocabulary_weight.T).abs().max() > 0.01


def test_weights_in_bf16_become_fp32_of_their_own(tmp_path):
    policy = imported(llama(**SCALED).to(torch.bfloat16), tmp_path)
    assert safetensors.load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    theirs = in_transformers(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")  # nothing is read from the file any more
    same_logits(policy, theirs)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_may_lie_in_several_shards(tied, tmp_path):
    theirs = llama(tie_word_embeddings=tied)
    policy = imported(theirs, tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3 and not (tmp_path / "model.safetensors").exists()
    same_logits(policy, theirs)


def test_of_two_weight_sources_the_one_that_transformers_takes_wins(tmp_path):
    theirs = llama()
    imported(theirs, tmp_path, max_shard_size="30KB")
    other = {name: tensor * 1.5 for name, tensor in theirs.state_dict().items()}
    safetensors.save_file(other, tmp_path / "model.safetensors", metadata={"format": "pt"})
    same_logits(import_model(tmp_path)[0], in_transformers(tmp_path))
    assert torch.equal(import_model(tmp_path)[0].norm.weight, other["model.norm.weight"])


@pytest.mark.parametrize("differs", [False, True])
def test_a_head_beside_a_tied_config_is_kept_where_it_differs(differs, tmp_path):
    theirs = llama(**TIED)
    imported(theirs, tmp_path)

    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][3] += differs
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # in old files

    respoil(tmp_path / "model.safetensors", add_head)
    policy, _ = import_model(tmp_path)
    assert policy.config.tied == (not differs)
    again = in_transformers(tmp_path)
    same_logits(policy, again)
    assert torch.equal(again.lm_head.weight, again.model.embed_tokens.weight) == (not differs)


LLAMA3_OLD = {"rope_type": "llama3", **LLAMA3}
OLD = {  # rotary settings as config.json had them before transformers 5
    "theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {"rope_theta": 500.0}),
    "rope_type": (SCALED, {"rope_theta": 10000.0, "rope_scaling": LLAMA3_OLD}),
    "type": (SCALED, {"rope_theta": 10000.0, "rope_scaling": {"type": "llama3", **LLAMA3}}),
    "no theta": (SCALED, {"rope_scaling": LLAMA3_OLD}),
    "nothing": ({}, {}),
}


@pytest.mark.parametrize("changes, old", OLD.values(), ids=OLD)
def test_an_old_config_means_the_same(changes, old, tmp_path):
    theirs = llama(**changes)
    imported(theirs, tmp_path)
    # torch_dtype and rope_interleaved stand in old files too, and say nothing that matters here.
    edit(tmp_path / "config.json", rope_parameters=None, dtype=None, torch_dtype="float32", rope_interleaved=False,
         **old)
    same_logits(import_model(tmp_path)[0], theirs)
    same_logits(import_model(tmp_path)[0], in_transformers(tmp_path))


def test_keys_that_a_config_lacks_have_the_defaults_of_transformers(tmp_path):
    imported(llama(num_key_value_heads=4), tmp_path)
    optional = ("num_key_value_heads rms_norm_eps tie_word_embeddings rope_parameters head_dim hidden_act "
                "max_position_embeddings attention_bias mlp_bias attention_dropout").split()
    edit(tmp_path / "config.json", **dict.fromkeys(optional))
    policy, _ = import_model(tmp_path)
    assert policy.config.context == transformers.LlamaConfig().max_position_embeddings
    same_logits(policy, in_transformers(tmp_path))
    scaling = {key: value for key, value in LLAMA3_OLD.items() if key != "original_max_position_embeddings"}
    edit(tmp_path / "config.json", rope_theta=10000.0, rope_scaling=scaling, max_position_embeddings=32)
    theirs = in_transformers(tmp_path)
    assert theirs.model.rotary_emb.inv_freq[2] < 0.02  # divided: 32 was taken, not the default of 2048
    same_logits(import_model(tmp_path)[0], theirs)


# ---- Safetensors ----

MANY = {f"{dtype}".removeprefix("torch."): (torch.arange(6) % 2).to(dtype).view(2, 3) for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)}
MANY |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "nöte": torch.tensor([float("nan"), -0.0, 1e-45])}


def same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert found[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_safetensors_are_read_and_written_as_by_the_library(tmp_path):
    safetensors.save_file(MANY, tmp_path / "theirs", metadata={"format": "pt", "more": "text"})
    same_tensors(read_safetensors(tmp_path / "theirs"), MANY)
    with (tmp_path / "ours").open("wb") as file:
        write_safetensors(file, {**MANY, "turned": torch.arange(6.0).view(2, 3).T})
    same_tensors(safetensors.load_file(tmp_path / "ours"), {**MANY, "turned": torch.arange(6.0).view(2, 3).T})
    with safetensors.safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    whole = (tmp_path / "theirs").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    padded = whole[8 : 8 + length] + b"   " + whole[8 + length :]
    (tmp_path / "odd").write_bytes((length + 3).to_bytes(8, "little") + padded)
    same_tensors(read_safetensors(tmp_path / "odd"), MANY)  # numbers that are not aligned


def header(**entry) -> bytes:
    text = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


DAMAGED = {"cut": header()[:-1], "cut in its head": header()[:20], "empty": b"",
           "text": b"once upon a time there was a file",
           "too long a head": b"\xff" * 8 + header()[8:], "no object": (2).to_bytes(8, "little") + b"[]",
           "before its start": header(data_offsets=[-8, 0]), "past its end": header(data_offsets=[4, 12]),
           "backwards": header(data_offsets=[8, 0]), "another shape": header(shape=[3]),
           "huge shape": header(shape=[2**62]),
           "negative shape": header(shape=[-1, -2]), "unknown dtype": header(dtype="F31"),
           "no offsets": header(data_offsets=None)}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_safetensors_are_one_line(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match="/x: damaged"):
        read_safetensors(tmp_path / "x")
    (tmp_path / "x").write_bytes(header())
    assert read_safetensors(tmp_path / "x")["x"].tolist() == [0, 0]


# ---- Refusals: one line that names the file and the thing ----


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder that can be imported, of one shard. Tests only read it."""
    folder = tmp_path_factory.mktemp("stored")
    imported(llama(num_hidden_layers=1), folder)
    return folder


@pytest.fixture
def folder(stored, tmp_path):
    """A copy of that folder, for the test to spoil."""
    return shutil.copytree(stored, tmp_path / "folder")


def refusal(folder) -> str:
    with pytest.raises(UserError) as caught:
        import_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **more}}


CONFIGS = [  # what config.json says, and what the message names
    ({"model_type": "mistral"}, "model_type 'mistral'"),
    ({"model_type": "gpt2", "hidden_size": None}, "model_type 'gpt2'"),
    ({"attention_bias": True}, "attention_bias True"), ({"mlp_bias": True}, "mlp_bias True"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"), ({"sliding_window": 64}, "sliding_window 64"),
    ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    (rope("default", partial_rotary_factor=0.5), "partial_"),
    ({"rope_interleaved": True}, "rope_interleaved True"), ({"transformers_weights": "a"}, "transformers_weights"),
    ({"head_dim": 32}, "head_dim 32"), ({"hidden_size": 60, "head_dim": 15}, "hidden_size 60"),
    ({"hidden_size": 66, "head_dim": None}, "hidden_size 66"), ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    (rope("yarn"), "'yarn'"), (rope("dynamic"), "'dynamic'"), (rope("linear"), "'linear'"),
    ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
    ({"hidden_size": None}, "damaged"),
    ({"vocab_size": "260"}, "damaged"), ({"num_hidden_layers": 1.5}, "damaged"),
    ({"num_attention_heads": 0}, "damaged"),
    ({"intermediate_size": "wide"}, "damaged"), ({"rms_norm_eps": "small"}, "damaged"),
    ({"rope_parameters": [10000.0]}, "damaged"), (rope("llama3"), "damaged"),
]


@pytest.mark.parametrize("changes, named", CONFIGS, ids=map(str, range(len(CONFIGS))))
def test_another_architecture_is_refused_by_name(changes, named, folder):
    edit(folder / "config.json", **changes)
    line = refusal(folder)
    assert f"{folder / 'config.json'}: " in line and named in line, line


@pytest.mark.parametrize("name",
                         ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("damage", [b"", b"[]", b"null", b"3", b'{"a', b"\xff\xfe{}"])
def test_broken_json_is_refused(name, damage, folder):
    (folder / name).write_bytes(damage)
    if "index" in name:
        (folder / "model.safetensors").unlink()
    assert f"{folder / name}: " in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_files_and_git_lfs_pointers_are_called_so(name, folder):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    line = refusal(folder)
    assert str(folder / name) in line and "Git LFS pointer" in line
    (folder / name).unlink()
    line = refusal(folder)
    assert str(folder / name) in line and "no such file" in line


def test_a_missing_or_damaged_shard_is_refused(tmp_path):
    imported(llama(num_hidden_layers=1), tmp_path, max_shard_size="30KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    for damage in (whole[:-10], b"", b"version https://git-lfs"):
        shard.write_bytes(damage)
        assert str(shard) in refusal(tmp_path)
    shard.unlink()
    assert str(shard) in refusal(tmp_path)
    shard.write_bytes(whole)
    assert import_model(tmp_path)


QUERY, KEY = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
NORM = "model.norm.weight"
WEIGHTS = {
    "a bias": (lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
               "q_proj.bias"),
    "a layer more": (lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.ones(48, 64)}),
                     "layers.1.mlp"),
    "no query": (lambda tensors: tensors.pop(QUERY), QUERY),
    "no head": (lambda tensors: tensors.pop("lm_head.weight"), "lm_head.weight"),
    "another shape": (lambda tensors: tensors.update({QUERY: torch.ones(32, 64)}), f"{QUERY} is [32, 64]"),
    "same rows in all": (lambda tensors: tensors.update({QUERY: torch.ones(48, 64), KEY: torch.ones(48, 64)}),
                         "[48, 64]"),
    "transposed": (lambda tensors: tensors.update({NORM: torch.ones(1, 64)}), NORM),
    "nan": (lambda tensors: tensors[KEY][1].fill_(float("nan")), f"{KEY} holds numbers that are not finite"),
    "infinite": (lambda tensors: tensors[NORM][3:4].fill_(float("-inf")), f"{NORM} holds numbers that are not finite"),
    "whole numbers": (lambda tensors: tensors.update({NORM: torch.ones(64, dtype=torch.int8)}),
                      f"{NORM} is [64] of torch.int8"),
}


@pytest.mark.parametrize("change, named", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_do_not_fit_are_refused_by_name(change, named, folder):
    respoil(folder / "model.safetensors", change)
    line = refusal(folder)
    assert str(folder) in line and named in line, line


def reordered(*merges, **options):
    """A vocabulary in which the merges' tokens have ids in another order than the merges."""
    tokenizer = bytes_only(merges=sorted(merges), **options)
    tokenizer.model = tokenizers.models.BPE(tokenizer.get_vocab(with_added_tokens=False), list(merges))
    return tokenizer


def sequence(*steps):
    return {"pre_tokenizer": pre_tokenizers.Sequence(list(steps))}


def renumbered():
    text = bytes_only(added=["<t>"]).to_str().replace('"id":257', '"id":259')
    assert '"id":259' in text
    return text


SPACE, SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Split(Regex(r"\d"), "isolated")
LOWER = normalizers.Lowercase()
REFUSED = {  # a tokenizer of another kind, and what the message names
    "Unigram": (lambda: tokenizers.Tokenizer(tokenizers.models.Unigram([("a", -1.0), ("b", -2.0)])), "Unigram"),
    "WordPiece": (lambda: tokenizers.Tokenizer(tokenizers.models.WordPiece({"u": 0, "a": 1}, unk_token="u")),
                  "WordPiece"),
    "byte_fallback": (lambda: bytes_only(byte_fallback=True), "byte_fallback"),
    "dropout": (lambda: bytes_only(dropout=0.1), "dropout 0.1"),
    "suffix": (lambda: bytes_only(end_of_word_suffix="</w>"), "end_of_word_suffix '</w>'"),
    "prefix": (lambda: bytes_only(continuing_subword_prefix="##"), "continuing_subword_prefix '##'"),
    "unknown bytes": (lambda: bytes_only("u", lack="xu", unk_token="u"), "unk_token 'u'"),
    "Metaspace": (lambda: bytes_only(pre_tokenizer=pre_tokenizers.Metaspace()), "Metaspace"),
    "Whitespace": (lambda: bytes_only(pre_tokenizer=pre_tokenizers.Whitespace()), "Whitespace"),
    "prefix space": (lambda: bytes_only(pre_tokenizer=SPACE), "ByteLevel"),
    "prefix space after digits": (lambda: bytes_only(**sequence(pre_tokenizers.Digits(True), SPACE)), "ByteLevel"),
    "whole numbers": (lambda: bytes_only(**sequence(pre_tokenizers.Digits(False), GPT2)), "Digits"),
    "two splits": (lambda: bytes_only(**sequence(SPLIT, GPT2)), "Split"),
    "removed": (lambda: bytes_only(**sequence(pre_tokenizers.Split(Regex(r"\s+"), "removed"), BYTES)), "Split"),
    "empty words": (lambda: bytes_only(pre_tokenizer=split_by("x*")), "Split"),
    "no words": (lambda: bytes_only(pre_tokenizer=BYTES), "ByteLevel"),
    "Lowercase": (lambda: bytes_only(normalizer=LOWER), "normalizer"),
    "several": (lambda: bytes_only(normalizer=normalizers.Sequence([normalizers.NFC(), LOWER])), "Sequence"),
    "Prepend": (lambda: bytes_only(normalizer=normalizers.Prepend("▁")), "Prepend"),
    "RoBERTa": (lambda: bytes_only(post_processor=processors.RobertaProcessing((END, 256), (END, 256))), "Roberta"),
    "lstrip": (lambda: bytes_only(added=[AddedToken("<t>", lstrip=True)]), "'<t>' with lstrip"),
    "rstrip": (lambda: bytes_only(added=[AddedToken("<t>", rstrip=True)]), "'<t>' with lstrip, rstrip"),
    "single_word": (lambda: bytes_only(added=[AddedToken("<t>", single_word=True)]),
                    "'<t>' with lstrip, rstrip or single"),
    "renumbered": (renumbered, "'<t>' with id 259"),
    "characters": (lambda: bytes_only("▁the"), "token '▁the'"),
    "order": (lambda: reordered(("b", "c"), ("a", "b")), "order"),
    "symbols after merges": (lambda: bytes_only("b", merges=[("a", "c")], lack="xb"), "order"),
    "unmade": (lambda: bytes_only("abc"), "token 'abc'"),
    "unmade, and a byte lacking": (lambda: bytes_only("abc", lack="x", ignore_merges=True), "token 'abc'"),
    "made another way": (lambda: bytes_only(merges=[("a", "b"), ("b", "c"), ("a", "bc")]), "token 'abc'"),
    "made another way, taken whole": (lambda: bytes_only("abc", merges=[("a", "b")], ignore_merges=True),
                                      "token 'abc'"),
}


@pytest.mark.parametrize("make, named", REFUSED.values(), ids=REFUSED)
def test_another_kind_of_tokenizer_is_refused_by_name(make, named, folder):
    made = make()
    (folder / "tokenizer.json").write_text(made if isinstance(made, str) else made.to_str(), "utf-8")
    line = refusal(folder)
    assert str(folder / "tokenizer.json") in line and named in line and "damaged" not in line, line


WRONG = [{key: value} for key, value in [
    ("model", None), ("model", []), ("added_tokens", "all"), ("added_tokens", [3]), ("pre_tokenizer", None),
    ("pre_tokenizer", "ByteLevel"), ("normalizer", 3), ("post_processor", [1])]]
WRONG += [{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], **changes}} for changes in [
    {"vocab": None}, {"vocab": ["a"]}, {"vocab": {"a": "b"}}, {"vocab": {}}, {"merges": None}, {"merges": ["a b c"]},
    {"merges": [["a", "€"]]}, {"merges": [3]}]]


@pytest.mark.parametrize("changes", WRONG, ids=map(str, range(len(WRONG))))
def test_a_tokenizer_of_wrong_types_is_refused(changes, folder):
    edit(folder / "tokenizer.json", **changes)
    assert str(folder / "tokenizer.json") in refusal(folder)


def test_a_tokenizer_larger_than_the_model_is_refused(folder):
    assert import_model(write_tokenizer(bytes_only(added=["<1>", "<2>", "<3>"]), folder))[1].size == VOCABULARY
    line = refusal(write_tokenizer(bytes_only(added=["<1>", "<2>", "<3>", "<4>"]), folder))
    assert str(folder) in line and "261" in line and "260" in line


@pytest.mark.parametrize("end", [None, 65, 99999])
def test_a_folder_that_names_no_end_is_refused(end, folder):
    (folder / "tokenizer_config.json").write_text("{}")
    edit(folder / "config.json", eos_token_id=end)
    line = refusal(folder)
    assert str(folder) in line and "end-of-text" in line


# ---- What --init names ----


def test_init_names_a_folder_or_a_repository_to_download(folder, monkeypatch):
    calls = []

    def snapshot_download(name, allow_patterns):
        calls.append((name, allow_patterns))
        if "broken" in name:
            raise ConnectionError("no route to host\nand a second line")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_pretrained("some-owner/Some.Model_1") == folder == find_pretrained(str(folder))
    ((name, patterns),) = calls
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors",
             "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    others = ["pytorch_model.bin", "consolidated.safetensors", "README.md", "model.py"]
    assert name == "some-owner/Some.Model_1"
    assert list(huggingface_hub.utils.filter_repo_objects(names + others, allow_patterns=patterns)) == names
    for name in ("some-owner/broken", "nonsense", "a/b/c", "nowhere/", "my folder/model", "./x/y"):
        with pytest.raises(UserError, match=f"^--init {re.escape(name)}: ") as caught:
            find_pretrained(name)
        assert "\n" not in str(caught.value) and ("no route to host" in str(caught.value)) == ("broken" in name)


# ---- Export ----

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}{{ eos_token }}"
SCRATCH = train_tokenizer([SAMPLE] * 3, 600)
TINY = Config(0, 64, 2, 4, 2, 48, 128, rope_theta=500.0, norm_eps=1e-3)
POLICIES = {
    "scratch, tied": TINY,
    "scratch, untied": dataclasses.replace(TINY, tied=False),
    "llama3": dataclasses.replace(TINY, kv_heads=1, pretrained=True, rope_theta=10000.0, rope_scaling=LLAMA3,
                                  tied=False),
}
every_policy = pytest.mark.parametrize("config", POLICIES.values(), ids=POLICIES)


def settings(folder, name) -> Settings:
    return Settings(out=str(folder), save=name)


def exported(folder, config, tokenizer, change=None):
    """A policy with random weights and uneven norms, and what `change` does to them, exported to folder/exported."""
    torch.manual_seed(0)
    policy = GPT(dataclasses.replace(config, vocabulary=tokenizer.size))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
        if change:
            change(policy)
    save_model(settings(folder, "policy.pt"), policy, tokenizer)
    export_model(folder / "policy.pt", folder / "exported")
    return policy


def load_unsharded(automatic, folder):
    """Loads a folder with transformers, which must find a place for every tensor and a tensor for every place."""
    model, report = automatic.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    return model.eval()


@every_policy
def test_an_exported_policy_has_the_same_logits_in_transformers(config, tmp_path):
    policy = exported(tmp_path, config, SCRATCH)
    theirs = load_unsharded(transformers.AutoModelForCausalLM, tmp_path / "exported")
    assert type(theirs) is transformers.LlamaForCausalLM and theirs.config.tie_word_embeddings == config.tied
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == SCRATCH.end
    assert theirs.config.max_position_embeddings == config.context
    same_logits(policy, theirs, random_ids(120, 5, 33, vocabulary=SCRATCH.size), 1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "scratch"])
def test_an_exported_tokenizer_means_the_same_in_transformers(kind, tmp_path):
    tokenizer = SCRATCH if kind == "scratch" else Tokenizer(original(kind).to_str(), END, TEMPLATE)
    exported(tmp_path, dataclasses.replace(TINY, dim=8, heads=2, mlp=8), tokenizer)
    assert (tmp_path / "exported/tokenizer.json").read_text("utf-8") == tokenizer.text
    theirs, texts = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported"), TEXTS[:1000]
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert theirs.eos_token_id == config["eos_token_id"] == tokenizer.end and len(theirs) <= config["vocab_size"]
    assert theirs.bos_token_id == config["bos_token_id"] == (tokenizer.begin[0] if tokenizer.begin else None)
    ours = [tokenizer.encode(text) for text in texts]
    assert_same(texts, theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"], ours)
    opened = theirs(texts[:50], split_special_tokens=True)["input_ids"]
    assert_same(texts[:50], opened, [tokenizer.begin + ids for ids in ours[:50]])
    assert_same(texts, [theirs.decode(ids, skip_special_tokens=True) for ids in ours],
                [tokenizer.decode(ids) for ids in ours])
    assert {name: theirs.convert_tokens_to_ids(name) for name in tokenizer.special} == tokenizer.special
    if tokenizer.template:
        shown = theirs.apply_chat_template([{"role": "user", "content": "Hï"}], tokenize=False)
        assert shown == f"<|im_start|>user\nHï<|im_end|>{END}"


PADDINGS = {"scratch": PADDING, "llama3": "<|finetune_right_pad_id|>", "smollm2": "<|im_start|>", "gpt2": None}


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, POLICIES["llama3"]], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", PADDINGS)
def test_an_exported_reward_model_scores_the_same_in_transformers(kind, config, tmp_path, capsys):
    tokenizer = SCRATCH if kind == "scratch" else ours_of(original(kind))
    model = RewardModel(exported(tmp_path / "policy", config, tokenizer))
    model.head.bias.fill_(0.73)
    save_model(settings(tmp_path, "reward.pt"), model, tokenizer)
    export_model(tmp_path / "reward.pt", tmp_path / "exported")
    said = capsys.readouterr().out
    shift = float(re.search(r"minus (-?[\d.]+)", said)[1])
    assert abs(shift - 0.73) < 1e-5 and "LlamaForSequenceClassification" in said
    theirs = load_unsharded(transformers.AutoModelForSequenceClassification, tmp_path / "exported")
    assert type(theirs) is transformers.LlamaForSequenceClassification and theirs.config.num_labels == 1
    padding, end = theirs.config.pad_token_id, torch.tensor([tokenizer.end])
    named = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported").pad_token
    assert named == PADDINGS[kind] and padding != tokenizer.end and padding == tokenizer.special.get(named, 0)
    texts = [tokenizer.encode(text) for text in ("What is the best way?", "Yes", SAMPLE[:90], "你好,世界!")]
    opening = torch.tensor(tokenizer.begin, dtype=torch.long)
    texts = [torch.tensor(ids, dtype=torch.long) for ids in texts]
    documents = [(torch.cat((opening, text)), torch.cat((text.flip(0), end))) for text in texts if len(text)]
    rewards = torch.empty(len(documents))
    for batch in pack(documents, CPU):
        rewards[batch.members] = model.score(batch)
    sequences = [torch.cat(document) for document in documents]
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=padding)
    real = torch.arange(padded.shape[1]) < torch.tensor([[len(sequence)] for sequence in sequences])
    assert rewards.std() > 0.1 and (~real).sum() > 20
    close(theirs(padded, attention_mask=real.long()).logits[:, 0], rewards - shift)
    close(torch.cat([theirs(sequence[None]).logits[:, 0] for sequence in sequences]), rewards - shift)


@pytest.mark.parametrize("kind", ["llama3", "smollm2", "in text, nfc"])
def test_import_export_import_changes_nothing(kind, tmp_path):
    llama(vocab_size=2600, num_hidden_layers=1, **SCALED,
          tie_word_embeddings=kind == "smollm2").save_pretrained(tmp_path / "in")
    (write_tokenizer(original(kind), tmp_path / "in") / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    policy, tokenizer = import_model(tmp_path / "in")
    save_model(settings(tmp_path, "policy.pt"), policy, tokenizer)
    export_model(tmp_path / "policy.pt", tmp_path / "exported")
    assert (tmp_path / "exported/tokenizer.json").read_bytes() == (tmp_path / "in/tokenizer.json").read_bytes()
    theirs = [safetensors.load_file(tmp_path / name / "model.safetensors") for name in ("in", "exported")]
    same_tensors(*theirs)
    again, same = import_model(tmp_path / "exported")
    assert again.config == policy.config and same.state == tokenizer.state and same.template == TEMPLATE
    same_tensors(again.state_dict(), policy.state_dict())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors",
                                  "model.safetensors.index.json"])
def test_export_writes_a_folder_of_its_own_or_nothing(name, tmp_path):
    exported(tmp_path, TINY, SCRATCH)
    made = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([*made, "exported", "policy.pt"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / name).write_text("mine")
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    for source, target, named in (("policy.pt", "other", f"other/{name}"), ("policy.pt", "bad.pt", "bad.pt"),
                                  ("bad.pt", "new", "bad.pt"), ("missing.pt", "new", "missing.pt")):
        with pytest.raises(UserError, match=re.escape(named)) as caught:
            export_model(tmp_path / source, tmp_path / target)
        assert "\n" not in str(caught.value)
    assert [path.read_text() for path in (tmp_path / "other").iterdir()] == ["mine"]
    assert (tmp_path / "bad.pt").read_bytes() == b"no checkpoint" and not (tmp_path / "new").exists()
