"""Pretrained models and tokenizers in, trained ones out, with transformers and tokenizers as the oracles."""

import dataclasses
import functools
import json
import os
import random
import re
import shutil
import sys
import unicodedata

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.torch")

import huggingface_hub
from test_commands import contents, run
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors, trainers

from model import (
    GPT,
    WORD_PATTERN,
    Config,
    Settings,
    Tokenizer,
    UserError,
    export_model,
    find_pretrained,
    generate,
    import_model,
    import_tokenizer,
    load_file,
    pack,
    rotary_frequencies,
    save_model,
    train_tokenizer,
)
from reward import RewardModel

CPU = torch.device("cpu")
END = "<|endoftext|>"
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def close(result, expected, tolerance=1e-4):
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def nothing_but_the_test(tmp_path_factory, monkeypatch):
    """No bare name means a file or folder of the checkout, and nothing asks the hub for more."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


# ---- Small models, written by transformers ----

GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
VOCABULARY = 260  # more than the 257 tokens of bytes_only(), as padded vocabularies are
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 160, "rms_norm_eps": 1e-5,
         "bos_token_id": None, "eos_token_id": 256}  # fmt: skip
# A head of 16 has frequencies from 1 down to 3e-4; the full turns within 32 positions are then 5.1, 1.6, 0.5, …
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SCALED = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, **LLAMA3}}


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


def bytes_only(*more: str, merges=(), lack="", **options):
    """A tokenizer of bytes, with no merges but those given, `more` entries in its vocabulary, and an end-of-text token:
    256, unless there is more."""
    symbols = [symbol for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()) if symbol not in lack]
    vocabulary = {name: number for number, name in enumerate([*symbols, *("".join(pair) for pair in merges), *more])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, list(merges), **options))
    tokenizer.pre_tokenizer, tokenizer.decoder = GPT2, decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.encode_special_tokens = True
    return tokenizer


def write_tokenizer(tokenizer, folder):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return folder


def imported(theirs, folder, **options) -> GPT:
    theirs.save_pretrained(folder, **options)
    return import_model(write_tokenizer(bytes_only(), folder))[0]


def edit(path, **changes):
    """Changes keys of a JSON file; None takes the key away."""
    content = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), "utf-8")


def random_ids(*lengths, seed=0, vocabulary=VOCABULARY) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (length,), generator=generator) for length in lengths]


IDS = random_ids(120, 33, 1, 90)  # more positions than the 32 before scaling


@torch.no_grad()
def our_logits(policy, documents=IDS) -> list[torch.Tensor]:
    """Logits of each document, all of them packed together."""
    result = [None] * len(documents)
    for batch in pack([(ids,) for ids in documents], CPU):
        logits = policy(batch.tokens, batch.positions, batch.mask).flatten(0, 1) @ policy.vocabulary_weight.T
        for number, member in enumerate(batch.members.tolist()):
            result[member] = logits[batch.document.flatten() == number]
    return result


@torch.no_grad()
def their_logits(model, documents=IDS) -> list[torch.Tensor]:
    return [model(ids[None]).logits[0].float() for ids in documents]


# ---- Logits ----

MODELS = {  # changes to the shape above, and changes to our Config that must then show
    "plain": ({}, {"rope_theta": 9000.0}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "multi-head": ({"num_key_value_heads": 4}, {}),
    "multi-query": ({"num_key_value_heads": 1}, {}),
    "one head": ({"num_attention_heads": 1, "num_key_value_heads": 1}, {}),
    "theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {"rope_theta": 10000.0}),
    "norm eps": ({"rms_norm_eps": 0.02}, {"norm_eps": 1e-5}),
    "llama3": (SCALED, {"rope_scaling": None}),
    "llama3, tied, multi-query": ({**SCALED, "tie_word_embeddings": True, "num_key_value_heads": 1}, {}),
}


@pytest.mark.parametrize("changes, other", MODELS.values(), ids=MODELS)
def test_logits_equal_those_of_transformers(changes, other, tmp_path):
    theirs = llama(**changes)
    policy = imported(theirs, tmp_path)
    assert policy.config.pretrained and policy.config.tied == theirs.config.tie_word_embeddings
    expected = their_logits(theirs)
    for ours, logits in zip(our_logits(policy), expected, strict=True):
        assert logits.std() > 0.5
        close(ours, logits)
    if other:  # the setting under test is one that these logits depend on
        policy.config = dataclasses.replace(policy.config, **other)
        if "norm_eps" in other:
            policy = GPT(policy.config)
            policy.load_state_dict(imported(theirs, tmp_path).state_dict())
        assert (our_logits(policy)[0] - expected[0]).abs().max() > 0.01


def test_scaled_frequencies_are_kept_blended_and_divided(tmp_path):
    theirs = llama(**SCALED)
    config = imported(theirs, tmp_path).config
    scaled = rotary_frequencies(config, CPU)
    close(scaled, theirs.model.rotary_emb.inv_freq, 1e-6)
    shares = (scaled / rotary_frequencies(dataclasses.replace(config, rope_scaling=None), CPU)).tolist()
    assert shares[0] == 1 and 1 / 8 < shares[1] < 1 and shares[2:] == [1 / 8] * 6


def test_weights_in_bf16_become_fp32(tmp_path):
    policy = imported(llama(**SCALED).to(torch.bfloat16), tmp_path)
    stored = safetensors.load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for ours, logits in zip(our_logits(policy), their_logits(theirs), strict=True):
        close(ours, logits)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_may_lie_in_several_shards(tied, tmp_path):
    theirs = llama(tie_word_embeddings=tied)
    policy = imported(theirs, tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3 and not (tmp_path / "model.safetensors").exists()
    for ours, logits in zip(our_logits(policy), their_logits(theirs), strict=True):
        close(ours, logits)


LLAMA3_OLD = {"rope_type": "llama3", **LLAMA3}
OLD = {  # rotary settings as config.json had them before transformers 5
    "theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {"rope_theta": 500.0}),
    "rope_type": (SCALED, {"rope_theta": 10000.0, "rope_scaling": LLAMA3_OLD}),
    "type": (SCALED, {"rope_theta": 10000.0, "rope_scaling": {"type": "llama3", **LLAMA3}}),
    "both names": (SCALED, {"rope_theta": 10000.0, "rope_scaling": {"type": "llama3", **LLAMA3_OLD}}),
    "no theta": (SCALED, {"rope_scaling": LLAMA3_OLD}),
    "nothing": ({}, {}),
}


@pytest.mark.parametrize("changes, old", OLD.values(), ids=OLD)
def test_an_old_config_means_the_same(changes, old, tmp_path):
    theirs = llama(**changes)
    imported(theirs, tmp_path)
    # torch_dtype and rope_interleaved stand in old files too, and say nothing that matters here.
    edit(tmp_path / "config.json", rope_parameters=None, dtype=None, torch_dtype="float32", rope_interleaved=False,
         **old)  # fmt: skip
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for ours, logits, same in zip(
        our_logits(import_model(tmp_path)[0]), their_logits(theirs), their_logits(again), strict=True
    ):
        close(ours, logits)
        close(same, logits)


def test_a_config_without_optional_keys_has_the_defaults_of_transformers(tmp_path):
    imported(llama(num_key_value_heads=4), tmp_path)
    optional = {"num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "head_dim",
                "hidden_act", "max_position_embeddings", "attention_bias", "mlp_bias", "attention_dropout"}  # fmt: skip
    edit(tmp_path / "config.json", **dict.fromkeys(optional))
    policy, _ = import_model(tmp_path)
    assert policy.config.context == transformers.LlamaConfig().max_position_embeddings
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for ours, logits in zip(our_logits(policy), their_logits(theirs), strict=True):
        close(ours, logits)


def test_llama3_scaling_without_an_original_context_takes_the_whole_one(tmp_path):
    imported(llama(max_position_embeddings=32), tmp_path)
    scaling = {key: value for key, value in LLAMA3_OLD.items() if key != "original_max_position_embeddings"}
    edit(tmp_path / "config.json", rope_parameters=None, rope_theta=10000.0, rope_scaling=scaling)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.model.rotary_emb.inv_freq[2] < 0.02  # divided: 32 was taken, not the default of 2048
    for ours, logits in zip(our_logits(import_model(tmp_path)[0]), their_logits(theirs), strict=True):
        close(ours, logits)


def test_tensors_that_say_nothing_new_are_passed_over(tmp_path):
    theirs = llama(tie_word_embeddings=True)
    imported(theirs, tmp_path)
    stored = safetensors.load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    safetensors.save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for ours, logits in zip(our_logits(import_model(tmp_path)[0]), their_logits(theirs), strict=True):
        close(ours, logits)


# ---- Decoding with a cache, and log-probs of responses ----

PROMPTS = random_ids(1, 40, 7, 25, 64, 3, seed=1)


@torch.no_grad()
def their_response(model, prompt, end, longest) -> list[int]:
    """transformers' greedy response, the end included."""
    ids = prompt[None]
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=longest,
                            eos_token_id=end, pad_token_id=0)  # fmt: skip
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("changes", [{}, SCALED], ids=["plain", "llama3"])
def test_greedy_decoding_of_a_batch_equals_transformers_one_by_one(changes, tmp_path):
    theirs = llama(**changes)
    policy = imported(theirs, tmp_path)
    endless = [their_response(theirs, prompt, None, 40) for prompt in PROMPTS]
    assert all(len(response) == 40 and len(set(response)) > 5 for response in endless)
    end = endless[1][11]  # so that one response ends early
    expected = [their_response(theirs, prompt, end, 40) for prompt in PROMPTS]
    assert min(map(len, expected)) <= 12 and max(map(len, expected)) == 40
    result = generate(policy, PROMPTS, end, 40, temperature=0)
    assert [response.tolist() for response in result] == expected


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("changes", [{}, SCALED, {"tie_word_embeddings": True}], ids=["plain", "llama3", "tied"])
def test_packed_logprobs_equal_log_softmax_of_transformers_logits(changes, temperature, tmp_path):
    theirs = llama(**changes)
    policy = imported(theirs, tmp_path)
    documents = [(prompt, *random_ids(30, 9, seed=len(prompt))) for prompt in PROMPTS]
    checked = 0
    for batch in pack(documents, CPU, tokens_per_pass=1):
        with torch.no_grad():
            pieces = iter(policy.logprobs(batch, temperature)[0].split(batch.sequence.bincount().tolist()))
        for prompt, *responses in (documents[member] for member in batch.members.tolist()):
            for response in responses:
                (logits,) = their_logits(theirs, [torch.cat((prompt, response))])
                every = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
                close(next(pieces), every.gather(-1, response[:, None])[:, 0])
                checked += 1
    assert checked == 12


# ---- Tokenizers, trained with the tokenizers library ----

SAMPLE = """The quick brown fox jumps over the lazy dog. It's what they'd said: we're sure you'll find that I'm right,
they've been there, HE'S THERE, I'LL GO, DON'T STOP; O'Neill isn't here 's 't 're. What is the best way to do that?
def fibonacci(n: int) -> int:
    if n < 2:
        return n
\treturn fibonacci(n - 1) + fibonacci(n - 2)  # the sum of both\r\n\r\n\r\n
for (int i = 0; i < 100; ++i) { printf("%d\\n", array[i] != NULL ? 1 : 0); }      // a comment
https://www.example.org/path/to/page.html?query=value&other=12345#top  user@example.org  C:\\Users\\name
In 1969, 2024, 12, 365, 1000000, 3.14159, 1,234,567.89 and 100% of 50 people paid $9.99 for 20 of them.
Les élèves français étaient déjà là, où l'été commençait à Noël. Der Bär fraß große Äpfel für fünf Mäuse.
Съешь же ещё этих мягких французских булок, да выпей чаю. Привет, как дела? Хорошо, спасибо, привет.
Η γρήγορη καφέ αλεπού πηδάει πάνω από το τεμπέλικο σκυλί. Καλημέρα, τι κάνεις; Καλά, ευχαριστώ.
السلام عليكم ورحمة الله وبركاته، كيف حالك اليوم؟ مرحبا بالعالم، مرحبا بكم. שלום עולם, מה שלומך היום? שלום שלום.
नमस्ते दुनिया, आप कैसे हैं? यह एक परीक्षण है। नमस्ते नमस्ते। বাংলা ভাষা আমার ভাষা। தமிழ் மொழி தமிழ் மொழி.
你好,世界!今天天气很好。我们去学校学习中文。你好你好。 日本語のテキストです。これはテストです。東京タワーへ行きます。
안녕하세요 세계, 오늘은 날씨가 좋습니다. 한국어 문장입니다. 안녕하세요. สวัสดีชาวโลก วันนี้อากาศดีมาก สวัสดีครับ
Tiếng Việt có nhiều dấu: người, được, những, trường. Łódź, żółć, İstanbul'da ığdır, ŒUVRE, ﬁne, ſtop.
🙂🙂 👨\u200d👩\u200d👧\u200d👦 👍🏽 🇩🇪🇫🇷🇯🇵 ❤\ufe0f 🏳\ufe0f\u200d🌈
∑ x² ≤ ∞ → ½ ⅔ Ⅳ ① ٣٤٥ १२३ ๑๒๓ — “quotes” ‘n’ … «là» ┌──┐ ™ © €
"""

HARD = [
    "", " ", "  ", "   ", "\n", "\n\n", " \n", "\n ", "\t", "\t\t x", "\r\n", "\r\n\r\n", " \r\n \r\n ",
    "a\r\nb", "a\rb", "a ", " a", "  a", "   a  b   c    ", "a\n\n\nb", "a \n \n b", "\n\n  \n\ta",
    "a\t b \t c", "x" + " " * 60 + "y", "\n" * 40, " " * 40, "\t \t \n\t \n  ", " 1", "  1", "   1", "1 ",
    "1  ", "1 2  3   4", "\t1", "\n1", "\n 1", " \n1", "1\n", "1\n\n2", "a  1  b", "1a2b3c", "a1 b2  c3",
    " 12345678901", "1,234,567.89", "3.14159e-10", "0x1F2e", "v1.2.3-rc4", "1st 2nd 33rd", "٣٤٥٦٧", " १२३४",
    "๑๒๓ ๔", "½⅔ Ⅳ ① ²³", "x²+y³", "１２３", "𝟏𝟐𝟑 𝟙", "一二三", "1٣१", "12\u00a034", "1\u202f000",
    "it's I'm we're you'll they've he'd don't", "IT'S I'M WE'RE YOU'LL THEY'VE HE'D DON'T",
    "It'S i'M 'Ll 'rE 'VE", "'s", " 's", "''s", "'sa", "'S1", "a'sb", "'ſ 'ſt it'ſ", "’s it’s", "l'été d'Arc",
    "'", "''", "' '", "'t'm'd", "1's 2'll",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # done\n\n\nclass A:\n\tpass\n",
    "if(a&&b||!c){d+=e<<2;}//f\r\n", "<div class=\"x\">&nbsp;</div>\n", "SELECT * FROM t WHERE a >= 10;",
    "\\frac{a}{b} $x_1$ \\\\", "a_b __init__ aB CamelCase", "https://www.example.org:8080/a/b.c?d=e&f=%20#g",
    "user.name+tag@example.co.uk", "C:\\Temp\\x.txt", "----====####....!!!???", "x" * 500,
    "antidisestablishmentarianism" * 10, "а" * 200, "字" * 200, "1" * 200, "!" * 200, "ab" * 150, "🙂" * 50,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft", "Привет, мир! Ещё раз.",
    "Καλημέρα κόσμε;", "مرحبا بالعالم، كيف حالك؟", "لا إِلَٰهَ", "שלום, עולם! שָׁלוֹם", "नमस्ते दुनिया क्षत्रिय",
    "বাংলা ভাষা", "தமிழ் மொழி", "ภาษาไทยไม่มีช่องว่าง", "你好,世界!今天天气很好。",
    "日本語のテキスト、カタカナ。ｶﾀｶﾅ", "안녕하세요 세계", "ᄒ\u1161\u11ab", "ქართული", "አማርኛ", "ᏣᎳᎩ",
    "Tiếng Việt được", "İstanbul ığdır ẞß", "ﬁne ﬃ Ǆ ǅ", "𝓗𝓮𝓵𝓵𝓸 𐍈 𠜎𠜱",
    "Zalgo e\u0301\u0302\u0303\u0316\u0317 a\u030a", "e\u0301 é E\u0301 \u0301",
    "o\u0302\u0301 \u1ed1 \u00f4\u0301", "\u212b \u2126 \u00c5", "q\u0307\u0323 q\u0323\u0307", "\u0344 \u0958",
    "🙂", " 🙂 ", "👨\u200d👩\u200d👧\u200d👦", "👍🏽👍🏿", "🇩🇪🇫🇷🇯", "❤\ufe0f\u200d🔥",
    "🏳\ufe0f\u200d🌈 #\ufe0f⃣ 1\ufe0f⃣", "☺\ufe0e☺\ufe0f", "a🙂b1🙂2", "👩🏽\u200d💻 x", "\U000e0067\U000e007f",
    "\u200fשלום\u200e abc\u202e abc\u202c", "a\u200bb a\u200cb a\u200db", "\ufeffa", "a\u00adb",
    "\u2028a\u2029b", "a\u0085b", "\u180ea", "a\u00a0b", "a\u00a01", "1\u00a0a", "\u00a0\u00a0",
    "\u00a0 \u00a01", " \u00a0a", "a\u2003b \u20031", "\u3000中\u3000", "a\u3000\u30001",
    "a\u1680b\u2009c\u205f", "\u2002\n\u2002a", "\x00", "a\x00b", "\x01\x02 \x1b[31mred\x1b[0m", "\x7f\x80\x9f",
    "\x0b\x0c a\x0b1", "\x1c\x1d\x1e\x1f a", "\ufffd\ufffe\uffff", "\ue000\uf8ff", "\U0010fffd", "\u0378",
    "\U0001f9ff", "¿Qué? ¡Sí!", "„Ja“ – ‚nein‘ — «oui»…", "£€¥₹₿ ™®©", "∀x∈ℝ: ∃y", "┌─┐│░▒▓█", "\u0300\u0300",
    " \u0301a", "1\u0301", "\n\u0301", "\u093f", "ʼs ˈa", "ª º ² ʰ", "_1_", "#1 @a *b* `c`", "…1", ".1", "-1",
    "+1 -1", " -1", END, f"a{END}b", f"{END}{END}", "<|im_start|>user\nHi<|im_end|>\n", "<|begin_of_text|>",
    "<s> </s>", " <|endoftext|> ", "<|endoftext|", "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "<think>", "a<think>b</think>c", " <think> ", "<think", "1<think>1", "  <think>  </think>\n",
    "a\t\t\tb", "\t\t\t\t",
]  # fmt: skip
SPACES = ["  ", "   ", "\n\n", "\t", "\r\n", " \n", "\u00a0", "\u3000", "\u2003", "\u200b", " " * 9, "\n" * 5]
NAMES = [END, "<|im_start|>", "<|im_end|>", "<s>", "<think>", "</think>"]


def random_texts(count: int, seed: int) -> list[str]:
    """Words, characters, spaces, digits and names in random order; every fourth text is of any characters at all."""
    rng = random.Random(seed)
    characters = sorted(set("".join(HARD) + SAMPLE))
    pieces = [*characters, *SPACES * 8, *NAMES * 4, *"0123456789" * 6, *["'s", "'LL", "'ve", " "] * 20]
    pieces += [word for word in SAMPLE.split(" ") if word] + SAMPLE.split()
    # Characters that have long had their place: what a letter is must not depend on anyone's version of Unicode.
    old = [chr(point) for point in range(0x2FA20) if unicodedata.ucd_3_2_0.category(chr(point))[1] not in "nso"]
    old += characters
    kinds = [pieces, pieces, [*characters, " ", *SPACES], old]
    return ["".join(rng.choices(kinds[number % 4], k=rng.randint(1, 16))) for number in range(count)]


TEXTS = [*HARD, SAMPLE, *SAMPLE.splitlines(keepends=True), *random_texts(3000, seed=0)]

DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = [END, "<|im_start|>", "<|im_end|>", "<repo>", "<file>"]


def split_by(pattern: str):
    """The pre-tokenizer of Llama 3 and Qwen: a regular expression of one's own, then bytes."""
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


def train(pre_tokenizer, first=(), alphabet=None, last=(END,), in_text=(), begin=None, normalizer=None, across=False):
    """A byte-level BPE with special tokens at its first or last ids. `across`: trained on texts that were not cut into
    words, so that a word which is later cut elsewhere than it should be shows in the ids."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = BYTES if across else pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
    size = 2500 if across else 1100
    more = [text for text in HARD + random_texts(600, seed=1) if "<" not in text]  # no special token becomes a merge
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, special_tokens=list(first), initial_alphabet=sorted(alphabet)
    )
    tokenizer.train_from_iterator([SAMPLE] * 3 + more * across, trainer)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_special_tokens(list(last))
    tokenizer.add_tokens(list(in_text))
    if begin:
        tokenizer.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]),
        ])  # fmt: skip
    tokenizer.encode_special_tokens = True  # special tokens written out are ordinary text
    return tokenizer


def llama3(**options):
    last = ["<|begin_of_text|>", END, "<|eot_id|>"]
    tokenizer = train(split_by(LLAMA3_WORDS), last=last, begin="<|begin_of_text|>", **options)
    tokenizer.model.ignore_merges = True
    return tokenizer


KINDS = {
    "gpt2": lambda: train(GPT2),
    "digits": lambda: train(DIGITS, last=["<|im_end|>", END]),
    "llama3": llama3,
    "nfc": lambda: train(split_by(LLAMA3_WORDS.replace("{1,3}", "")), normalizer=normalizers.NFC(), last=SPECIALS),
    "smollm2": lambda: train(DIGITS, first=SPECIALS, alphabet=["!"], last=[]),
    "begin": lambda: train(GPT2, first=["<s>", END], last=[], begin="<s>"),
    "in text": lambda: train(GPT2, in_text=["<think>", "</think>", "\t\t\t"]),
    "gpt2, across": lambda: train(GPT2, across=True),
    "digits, across": lambda: train(DIGITS, first=SPECIALS, last=[], across=True),
    "llama3, across": lambda: llama3(across=True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def original(kind: str):
    """The tokenizer as the tokenizers library has it. Tests only read it."""
    return KINDS[kind]()


@pytest.fixture
def ours(kind, tmp_path) -> Tokenizer:
    return import_tokenizer(write_tokenizer(original(kind), tmp_path / "tokenizer"))


def spelled(text: str) -> str:
    """The bytes of a text, each as the symbol that stands for it in a vocabulary."""
    return "".join(piece for piece, _ in BYTES.pre_tokenize_str(text))


def texts_for(kind: str) -> list[str]:
    """The texts, without those that hold a byte which the tokenizer lacks."""
    vocabulary = original(kind).get_vocab().keys()
    return [text for text in TEXTS if set(spelled(text)) <= vocabulary]


def assert_same(texts, results, expected):
    wrong = [row for row in zip(texts, results, expected, strict=True) if row[1] != row[2]]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, such as {min(wrong, key=lambda row: len(repr(row)))}"


def their_ids(tokenizer, texts) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


@every_kind
def test_ids_equal_those_of_the_tokenizers_library(kind, ours):
    texts = texts_for(kind)
    assert 800 < len(texts) < len(TEXTS) if kind == "smollm2" else texts == TEXTS
    results = [ours.encode(text) for text in texts]
    assert_same(texts, results, their_ids(original(kind), texts))
    used = {token for ids in results for token in ids}
    hidden = {number for name, number in ours.special.items() if name not in ours.in_text}
    assert ours.end in hidden and not used & hidden, "a text encoded to a control token"
    assert used >= {ours.special[name] for name in ours.in_text}
    assert len(used) > (0.8 * ours.size if texts == TEXTS and "across" not in kind else 300)
    assert sum(map(len, results)) < 0.8 * sum(len(text.encode()) for text in texts)


@every_kind
def test_a_prompt_opens_with_the_same_tokens(kind, ours):
    for text in ("Hello there", ""):
        assert ours.begin + ours.encode(text) == original(kind).encode(text, add_special_tokens=True).ids
    assert len(ours.begin) == (kind in ("begin", "llama3", "llama3, across"))


@every_kind
def test_text_comes_back(kind, ours):
    texts = texts_for(kind)
    expected = [unicodedata.normalize("NFC", text) for text in texts] if kind == "nfc" else texts
    assert (expected != texts) == (kind == "nfc")
    assert_same(texts, [ours.decode(ours.encode(text)) for text in texts], expected)


@every_kind
def test_any_ids_decode_to_the_same_text(kind, ours):
    """Broken UTF-8 and control tokens among them."""
    rng = random.Random(0)
    some = [[rng.randrange(ours.size) for _ in range(rng.randint(0, 12))] for _ in range(500)]
    some += [[rng.randrange(min(280, ours.size)) for _ in range(rng.randint(0, 8))] for _ in range(500)]  # mostly bytes
    expected = original(kind).decode_batch(some, skip_special_tokens=True)
    assert any("\ufffd" in text for text in expected)
    assert_same(some, [ours.decode(ids) for ids in some], expected)


def test_a_byte_that_the_vocabulary_lacks_is_left_out(tmp_path):
    """The library leaves it out before it merges, this code afterwards: no difference where no merge crosses it."""
    theirs = original("smollm2")
    controls = [chr(byte) for byte in range(32) if not chr(byte).isspace()]
    missing = [control for control in controls if spelled(control) not in theirs.get_vocab()]
    ours = import_tokenizer(write_tokenizer(theirs, tmp_path))
    assert len(missing) > 10
    texts = texts_for("smollm2")[:300]
    for number, text in enumerate(texts):
        mixed = f"The end. {missing[number % len(missing)]} {text}"
        assert ours.encode(mixed) == their_ids(theirs, [mixed])[0]
        assert ours.encode(mixed) == ours.encode("The end.") + ours.encode(" ") + ours.encode(f" {text}")
    assert ours.encode("".join(missing)) == []


def test_an_older_tokenizer_json_means_the_same(tmp_path):
    """Merges were texts, not lists, and some keys did not exist yet."""
    theirs = train(GPT2)
    path = write_tokenizer(theirs, tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    assert content["model"]["merges"]
    for key in ("byte_fallback", "ignore_merges"):
        del content["model"][key]
    del content["pre_tokenizer"]["use_regex"]
    path.write_text(json.dumps(content), "utf-8")
    ours = import_tokenizer(tmp_path)
    assert_same(TEXTS[:600], [ours.encode(text) for text in TEXTS[:600]], their_ids(theirs, TEXTS[:600]))


@pytest.mark.parametrize(
    "described, config, end",
    [
        ({"eos_token": "<|im_end|>"}, {"eos_token_id": 0}, "<|im_end|>"),
        ({"eos_token": {"content": "<|im_end|>", "special": True}}, {}, "<|im_end|>"),
        ({"eos_token": None}, {"eos_token_id": 2}, "<|im_end|>"),
        ({}, {"eos_token_id": [2, 0]}, "<|im_end|>"),
        (None, {"eos_token_id": 0}, END),
    ],
)
def test_the_end_is_the_token_that_the_folder_names(described, config, end, tmp_path):
    write_tokenizer(original("smollm2"), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if described is None:
        (tmp_path / "tokenizer_config.json").unlink()
    else:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    assert import_tokenizer(tmp_path).end == original("smollm2").token_to_id(end)


def with_added(*added) -> tokenizers.Tokenizer:
    tokenizer = bytes_only()
    tokenizer.add_tokens(list(added))
    return tokenizer


def changed(**parts) -> tokenizers.Tokenizer:
    """bytes_only() with another pre_tokenizer, normalizer or post_processor."""
    tokenizer = bytes_only()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def with_words(pattern: str) -> tokenizers.Tokenizer:
    tokenizer = bytes_only(merges=[("a", "b"), ("1", "2")])
    tokenizer.pre_tokenizer = split_by(pattern)
    return tokenizer


ROBERTA = processors.RobertaProcessing((END, 256), (END, 256))
CLOSING = processors.TemplateProcessing(single=f"{END} $A {END}", special_tokens=[(END, 256)])
ODD = {  # rare in the Llama family: must mean the same here, or be refused
    "an added token that begins another": (lambda: with_added("<a", "<ab", "<abc"), ["x<abcd", "<ab>", "<a>"]),
    "added runs of spaces": (lambda: with_added("  ", "   ", "    "), ["a     b", "       ", "  \n   "]),
    "lstrip": (lambda: with_added(AddedToken("<t>", lstrip=True)), ["x  <t> y"]),
    "rstrip": (lambda: with_added(AddedToken("<t>", rstrip=True)), ["x <t>  y"]),
    "single_word": (lambda: with_added(AddedToken("<t>", single_word=True)), ["x<t>y", "x <t> y"]),
    "a token that no merge makes": (lambda: bytes_only("abc"), ["abc", " abc", "xabc", "abcd"]),
    "the same, taken whole": (lambda: bytes_only("abc", ignore_merges=True), ["abc", " abc", "xabc", "abcd"]),
    "a token for unknown bytes": (lambda: bytes_only("<unk>", lack="x", unk_token="<unk>"), ["axb", "xx"]),
    "words that leave gaps": (lambda: with_words(r"\d+"), ["ab1cd", "ab 12ab"]),
    "words in another order": (lambda: with_words(r"\s+|\S+"), ["ab 12ab", " \n "]),
    "processor of RoBERTa": (lambda: changed(post_processor=ROBERTA), ["a"]),
    "template that closes": (lambda: changed(post_processor=CLOSING), ["a"]),
}


@pytest.mark.parametrize("make, texts", ODD.values(), ids=ODD)
def test_what_is_rare_means_the_same_or_is_refused(make, texts, tmp_path):
    theirs = make()
    try:
        ours = import_tokenizer(write_tokenizer(theirs, tmp_path))
    except UserError as error:
        assert str(tmp_path / "tokenizer.json") in str(error) and "damaged" not in str(error)
        return
    assert_same(texts, [ours.encode(text) for text in texts], their_ids(theirs, texts))
    opened = theirs.encode("a", add_special_tokens=True).ids
    assert ours.begin == opened[: opened.index(theirs.token_to_id("a"))]


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


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
CONFIGS = {  # what config.json says, and what the message names
    "mistral": ({"model_type": "mistral"}, ["model_type", "mistral"]),
    "qwen2": ({"model_type": "qwen2"}, ["model_type", "qwen2"]),
    "gpt2": ({"model_type": "gpt2", "hidden_size": None, "n_embd": 64}, ["model_type", "gpt2"]),
    "attention bias": ({"attention_bias": True}, ["attention_bias", "True"]),
    "mlp bias": ({"mlp_bias": True}, ["mlp_bias", "True"]),
    "gelu": ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
    "sliding window": ({"sliding_window": 64}, ["sliding_window", "64"]),
    "dropout": ({"attention_dropout": 0.1}, ["attention_dropout", "0.1"]),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
    "partial": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    "partial, new": (
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}},
        ["partial_rotary_factor", "0.5"],
    ),
    "interleaved": ({"rope_interleaved": True}, ["rope_interleaved", "True"]),
    "other head": ({"head_dim": 32}, ["head_dim", "32"]),
    "odd head": ({"hidden_size": 60, "num_attention_heads": 4, "head_dim": 15}, ["hidden_size", "60"]),
    "ragged head": ({"hidden_size": 66, "num_attention_heads": 4, "head_dim": None}, ["hidden_size", "66"]),
    "yarn": ({"rope_parameters": YARN}, ["yarn"]),
    "yarn, old": ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, ["yarn"]),
    "dynamic": ({"rope_parameters": {**YARN, "rope_type": "dynamic"}}, ["dynamic"]),
    "dynamic, old": ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["dynamic"]),
    "linear": ({"rope_parameters": {**YARN, "rope_type": "linear"}}, ["linear"]),
    "linear, old": ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, ["linear"]),
}


@pytest.mark.parametrize("changes, named", CONFIGS.values(), ids=CONFIGS)
def test_another_architecture_is_refused_by_name(changes, named, folder):
    edit(folder / "config.json", **changes)
    line = refusal(folder)
    assert str(folder / "config.json") in line and all(name in line for name in named), line


WRONG = {
    "shape in text": {"vocab_size": "260"},
    "no vocabulary": {"vocab_size": None},
    "no width": {"hidden_size": None},
    "width in a list": {"hidden_size": [64]},
    "layers in text": {"num_hidden_layers": "1"},
    "half a layer": {"num_hidden_layers": 1.5},
    "no heads": {"num_attention_heads": 0},
    "no MLP": {"intermediate_size": None},
    "MLP in text": {"intermediate_size": "wide"},
    "eps in text": {"rms_norm_eps": "small"},
    "no eps": {"rms_norm_eps": 0},
    "theta without end": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e20}},
    "context in text": {"max_position_embeddings": "long"},
    "theta in text": {"rope_parameters": {"rope_type": "default", "rope_theta": "large"}},
    "rope in a list": {"rope_parameters": [10000.0]},
    "rope of no kind": {"rope_parameters": {"rope_type": 3}},
    "no factor": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "low_freq_factor": 1.0}},
    "no original": {"rope_parameters": {**SCALED["rope_parameters"], "original_max_position_embeddings": None}},
    "factor in text": {"rope_parameters": {**SCALED["rope_parameters"], "factor": "8"}},
    "factors alike": {"rope_parameters": {**SCALED["rope_parameters"], "low_freq_factor": 4.0}},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_a_config_of_wrong_types_is_refused(changes, folder):
    edit(folder / "config.json", **changes)
    line = refusal(folder)
    assert str(folder / "config.json") in line, line


def test_heads_that_do_not_share_key_value_heads_evenly_are_refused(tmp_path):
    llama(num_key_value_heads=3).save_pretrained(tmp_path)
    line = refusal(write_tokenizer(bytes_only(), tmp_path))
    assert str(tmp_path / "config.json") in line and "num_key_value_heads" in line, line


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", [b"", b"[]", b"null", b"3", b"{", None, b"\xff\xfe{}"],
                         ids=["empty", "list", "null", "number", "brace", "half", "not UTF-8"])  # fmt: skip
def test_broken_json_is_refused(name, damage, folder):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    line = refusal(folder)
    assert str(folder / name) in line, line


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(name, folder):
    (folder / name).unlink()
    assert str(folder / name) in refusal(folder)


def respoil(folder, change) -> None:
    """Reads the weights, has them changed, and writes them back."""
    path = folder / "model.safetensors"
    tensors = safetensors.load_file(path)
    change(tensors)
    safetensors.save_file(tensors, path, metadata={"format": "pt"})


QUERY = "model.layers.0.self_attn.q_proj"
WEIGHTS = {
    "a bias": (lambda tensors: tensors.update({f"{QUERY}.bias": torch.zeros(64)}), [f"{QUERY}.bias"]),
    "a layer more": (lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.ones(48, 64)}),
                     ["model.layers.1.mlp.up_proj.weight"]),
    "no query": (lambda tensors: tensors.pop(f"{QUERY}.weight"), [f"{QUERY}.weight"]),
    "no head": (lambda tensors: tensors.pop("lm_head.weight"), ["lm_head.weight"]),
    "another shape": (lambda tensors: tensors.update({f"{QUERY}.weight": torch.ones(32, 64)}),
                      [f"{QUERY}.weight", "[32, 64]", "[64, 64]"]),
    "transposed": (lambda tensors: tensors.update({"model.norm.weight": torch.ones(1, 64)}), ["model.norm.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("change, named", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_do_not_fit_are_refused_by_name(change, named, folder):
    respoil(folder, change)
    line = refusal(folder)
    assert str(folder) in line and all(name in line for name in named), line


@pytest.mark.parametrize("damage", [lambda whole: whole[:-100], lambda whole: whole[:50], lambda whole: b"",
                                    lambda whole: b"once upon a time"],
                         ids=["cut", "cut in its head", "empty", "text"])  # fmt: skip
def test_damaged_weights_are_refused(damage, folder):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert str(path) in refusal(folder)


def test_a_missing_or_damaged_shard_is_refused(tmp_path):
    imported(llama(num_hidden_layers=1), tmp_path, max_shard_size="30KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    assert str(shard) in refusal(tmp_path)
    shard.unlink()
    assert str(shard) in refusal(tmp_path)
    shard.write_bytes(whole)
    assert import_model(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"lm_head.weight": 1}}'])
def test_a_broken_index_is_refused(content, folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(content)
    assert str(index) in refusal(folder)


def unigram():
    return tokenizers.Tokenizer(tokenizers.models.Unigram([("a", -1.0), ("b", -2.0)]))


def word_piece():
    return tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))


def word_level():
    return tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))


def out_of_order():
    """Merges in another order than the ids of what they make."""
    tokenizer = bytes_only(merges=[("a", "b"), ("b", "c")])
    tokenizer.model = tokenizers.models.BPE(tokenizer.get_vocab(with_added_tokens=False), [("b", "c"), ("a", "b")])
    return tokenizer


BYTE_LEVEL_SPACE = pre_tokenizers.ByteLevel(add_prefix_space=True)
TOKENIZERS = {  # a tokenizer of another kind, and what the message names
    "Unigram": (unigram, "Unigram"),
    "WordPiece": (word_piece, "WordPiece"),
    "WordLevel": (word_level, "WordLevel"),
    "byte_fallback": (lambda: bytes_only(byte_fallback=True), "byte_fallback"),
    "dropout": (lambda: bytes_only(dropout=0.1), "dropout"),
    "suffix": (lambda: bytes_only(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "prefix": (lambda: bytes_only(continuing_subword_prefix="##"), "continuing_subword_prefix"),
    "Metaspace": (lambda: changed(pre_tokenizer=pre_tokenizers.Metaspace()), "Metaspace"),
    "Whitespace": (lambda: changed(pre_tokenizer=pre_tokenizers.Whitespace()), "Whitespace"),
    "prefix space": (lambda: changed(pre_tokenizer=BYTE_LEVEL_SPACE), "ByteLevel"),
    "prefix space after digits": (
        lambda: changed(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(True), BYTE_LEVEL_SPACE])),
        "ByteLevel",
    ),
    "whole numbers": (
        lambda: changed(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(False), GPT2])),
        "Digits",
    ),
    "two splits": (
        lambda: changed(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d"), "isolated"), GPT2])),
        "Split",
    ),
    "removed": (
        lambda: changed(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\s+"), "removed"), BYTES])),
        "Split",
    ),
    "no words": (lambda: changed(pre_tokenizer=BYTES), "ByteLevel"),
    "Lowercase": (lambda: changed(normalizer=normalizers.Lowercase()), "Lowercase"),
    "several": (
        lambda: changed(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
        "Sequence",
    ),
    "Prepend": (lambda: changed(normalizer=normalizers.Prepend("▁")), "Prepend"),
    "characters": (lambda: bytes_only("▁the"), "▁the"),
    "order": (out_of_order, "merges"),
}


@pytest.mark.parametrize("make, named", TOKENIZERS.values(), ids=TOKENIZERS)
def test_another_kind_of_tokenizer_is_refused_by_name(make, named, folder):
    path = write_tokenizer(make(), folder) / "tokenizer.json"
    line = refusal(folder)
    assert str(path) in line and named in line and "damaged" not in line, line


@pytest.mark.parametrize("key, value", [("model", None), ("model", []), ("added_tokens", "all"), ("added_tokens", [3]),
                                        ("pre_tokenizer", None), ("pre_tokenizer", "ByteLevel"), ("normalizer", 3),
                                        ("post_processor", [1])])  # fmt: skip
def test_a_tokenizer_of_wrong_types_is_refused(key, value, folder):
    edit(folder / "tokenizer.json", **{key: value})
    assert str(folder / "tokenizer.json") in refusal(folder)


@pytest.mark.parametrize("changes", [{"vocab": None}, {"vocab": ["a"]}, {"vocab": {"a": "b"}}, {"merges": None},
                                     {"merges": ["a b c"]}, {"merges": [["a", "€"]]}, {"merges": [3]},
                                     {"vocab": {}}])  # fmt: skip
def test_a_vocabulary_of_wrong_types_is_refused(changes, folder):
    path = folder / "tokenizer.json"
    edit(path, model={**json.loads(path.read_text("utf-8"))["model"], **changes})
    assert str(path) in refusal(folder)


def test_a_tokenizer_larger_than_the_model_is_refused(folder):
    tokenizer = bytes_only()
    tokenizer.add_tokens(["<1>", "<2>", "<3>"])
    assert import_model(write_tokenizer(tokenizer, folder))[1].size == VOCABULARY
    tokenizer.add_tokens(["<4>"])
    line = refusal(write_tokenizer(tokenizer, folder))
    assert str(folder) in line and "261" in line and "260" in line


def test_a_folder_that_names_no_end_is_refused(folder):
    for changes in ({"eos_token_id": None}, {"eos_token_id": 65}, {"eos_token_id": 99999}):
        (folder / "tokenizer_config.json").write_text("{}")
        edit(folder / "config.json", **changes)
        line = refusal(folder)
        assert str(folder) in line and "end-of-text" in line


def test_without_safetensors_the_pip_command_is_named(folder, tmp_path, monkeypatch):
    export_source(tmp_path, Config(0, 16, 1, 2, 1, 16, 32), train_tokenizer([], 257))
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install safetensors" in refusal(folder)
    with pytest.raises(UserError, match="pip install safetensors"):
        export_model(tmp_path / "policy.pt", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


# ---- The command line ----


def complaint(out, *flags) -> str:
    """The one line with which model.py refuses its flags, having written nothing."""
    before = contents(out)
    result = run("model", "--device", "cpu", "--out", out, *flags)
    assert result.code == 2 and result.err.count("\n") == 1, result.err
    assert contents(out) == before
    return result.err


def test_a_repository_id_is_downloaded(folder, monkeypatch):
    calls = []

    def snapshot_download(name, allow_patterns):
        calls.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_pretrained("some-owner/Some.Model_1") == folder
    ((name, patterns),) = calls
    wanted = [*folder.iterdir(), folder / "model-00001-of-00002.safetensors", folder / "model.safetensors.index.json"]
    unwanted = ["pytorch_model.bin", "consolidated.safetensors", "README.md", "model.py"]
    read = set(huggingface_hub.utils.filter_repo_objects([path.name for path in wanted], allow_patterns=patterns))
    assert name == "some-owner/Some.Model_1"
    assert read == {path.name for path in wanted} - {"generation_config.json"}
    assert not list(huggingface_hub.utils.filter_repo_objects(unwanted, allow_patterns=patterns))


@pytest.mark.parametrize("error", [ConnectionError("no route to host\nand a second line"), OSError(28, "disk full"),
                                   ValueError(), RuntimeError("404 not found")])  # fmt: skip
def test_a_repository_that_can_not_be_downloaded_is_one_line(error, tmp_path, monkeypatch):
    def snapshot_download(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    line = complaint(tmp_path, "--init", "some-owner/some-model")
    assert "--init some-owner/some-model" in line
    assert (str(error).splitlines() or [type(error).__name__])[0] in line


@pytest.mark.parametrize("name", ["nonsense", "a/b/c", "nowhere/", "my folder/model", "missing.pt"])
def test_an_init_that_is_nothing_is_refused(name, tmp_path):
    assert name in complaint(tmp_path, "--init", name)


def test_a_folder_that_can_not_be_imported_is_one_line(folder, tmp_path):
    edit(folder / "config.json", model_type="gpt2")
    assert "model_type" in complaint(tmp_path / "out", "--init", folder)


@pytest.mark.parametrize("flags", [["--dim", 64], ["--layers", 2], ["--heads", 8], ["--kv-heads", 4],
                                   ["--vocabulary", 300]])  # fmt: skip
def test_the_shape_of_a_pretrained_model_is_given(flags, folder, tmp_path):
    line = complaint(tmp_path / "out", "--init", folder, *flags)
    assert flags[0] in line and str(folder) in line


def test_a_context_beyond_the_model_is_refused(folder, tmp_path):
    line = complaint(tmp_path / "out", "--init", folder, "--context", 161)
    assert "--context 161" in line and "160" in line


def test_no_steps_on_a_pretrained_model_keep_its_weights_and_its_tokens(folder, tmp_path):
    tokenizer = train(GPT2, first=["<s>", END], last=[], begin="<s>")
    llama(num_hidden_layers=1, vocab_size=1100, **SCALED).save_pretrained(folder)
    write_tokenizer(tokenizer, folder)
    rows = [{"prompt": f"What is {number}?", "chosen": f" It's {END}.", "rejected": " No."} for number in range(40)]
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("model", "--init", folder, "--steps", 0, "--data", data, "--out", out, "--device", "cpu",
                 "--context", 100, "--max-response", 40)  # fmt: skip
    assert not result.code, result.err
    policy, ours = import_model(folder)
    content = load_file(out / "sft.pt", "policy")
    assert content["config"] == dataclasses.asdict(policy.config) and content["config"]["pretrained"] is True
    assert content["weights"].keys() == policy.state_dict().keys()
    assert all(torch.equal(content["weights"][name], weight) for name, weight in policy.state_dict().items())
    assert content["tokenizer"] == ours.state
    pairs = load_file(out / "pairs.pt", "pairs file")
    prompt, chosen, _ = pairs["tokens"][: pairs["lengths"][0].sum()].split(pairs["lengths"][0].tolist())
    question = re.fullmatch(r"What is \d+\?", tokenizer.decode(prompt.tolist()))[0]
    assert prompt.tolist() == tokenizer.encode(question).ids and prompt[0] == tokenizer.token_to_id("<s>")
    expected = tokenizer.encode(f" It's {END}.", add_special_tokens=False).ids
    assert chosen.tolist() == [*expected, tokenizer.token_to_id(END)] and tokenizer.token_to_id(END) not in expected


# ---- Export ----

SCRATCH = train_tokenizer([SAMPLE] * 3, 600)
TINY = Config(0, 32, 2, 4, 2, 48, 128, rope_theta=500.0, norm_eps=1e-3)
POLICIES = {
    "scratch, tied": TINY,
    "scratch, untied": dataclasses.replace(TINY, tied=False),
    "llama3, tied": dataclasses.replace(TINY, dim=64, pretrained=True, rope_theta=10000.0, rope_scaling=LLAMA3),
    "llama3, untied": dataclasses.replace(
        TINY, dim=64, kv_heads=1, pretrained=True, rope_theta=10000.0, rope_scaling=LLAMA3, tied=False
    ),
}
every_policy = pytest.mark.parametrize("config", POLICIES.values(), ids=POLICIES)


def export_source(out, config, tokenizer, change=None) -> GPT:
    """Writes policy.pt with random weights and uneven norms, and what `change` does to them; returns the policy."""
    torch.manual_seed(0)
    policy = GPT(dataclasses.replace(config, vocabulary=tokenizer.size))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
        if change:
            change(policy)
    save_model(Settings(out=str(out), save="policy.pt"), policy, tokenizer)
    return policy


def load_whole(automatic, folder):
    """Loads a folder with transformers, which must find a place for every tensor and a tensor for every place."""
    model, report = automatic.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    return model.eval()


@every_policy
def test_an_exported_policy_has_the_same_logits_in_transformers(config, tmp_path):
    policy = export_source(tmp_path, config, SCRATCH)
    export_model(tmp_path / "policy.pt", tmp_path / "exported")
    theirs = load_whole(transformers.AutoModelForCausalLM, tmp_path / "exported")
    assert type(theirs) is transformers.LlamaForCausalLM and theirs.config.tie_word_embeddings == config.tied
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == SCRATCH.end
    assert theirs.config.max_position_embeddings == config.context
    documents = random_ids(120, 5, 33, vocabulary=SCRATCH.size)
    for ours, logits in zip(our_logits(policy, documents), their_logits(theirs, documents), strict=True):
        assert logits.std() > 0.5
        close(ours, logits, 1e-5)


@every_policy
def test_generation_in_transformers_stops_at_the_end(config, tmp_path):
    prompts = random_ids(3, 50, vocabulary=256)
    endless = generate(export_source(tmp_path, config, SCRATCH), prompts, -1, 20, temperature=0)
    said = endless[0][6].item()

    def swap(policy):  # what it says at its seventh token, or before, becomes the end
        weight = policy.vocabulary_weight
        weight[[said, SCRATCH.end]] = weight[[SCRATCH.end, said]]

    policy = export_source(tmp_path, config, SCRATCH, swap)
    export_model(tmp_path / "policy.pt", tmp_path / "exported")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    ours = generate(policy, prompts, SCRATCH.end, 20, temperature=0)
    assert len(ours[0]) <= 7 and ours[0][-1] == SCRATCH.end
    for prompt, response in zip(prompts, ours, strict=True):
        output = theirs.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), do_sample=False,
                                 max_new_tokens=20)  # fmt: skip
        assert output[0, len(prompt) :].tolist() == response.tolist()


def exported_tokenizer(tokenizer, folder):
    """The tokenizer of an exported policy, as transformers loads it."""
    export_source(folder, Config(0, 8, 1, 2, 1, 8, 64), tokenizer)
    export_model(folder / "policy.pt", folder / "exported")
    config = json.loads((folder / "exported" / "config.json").read_text())
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "exported")
    assert theirs.eos_token_id == config["eos_token_id"] == tokenizer.end
    assert theirs.bos_token_id == config["bos_token_id"] == (tokenizer.begin[0] if tokenizer.begin else None)
    return theirs


@pytest.mark.parametrize("kind", [*KINDS, "scratch", "scratch, across"])
def test_an_exported_tokenizer_means_the_same_in_transformers(kind, tmp_path):
    tokenizer, texts = SCRATCH, TEXTS[:1200]
    if kind != "scratch":
        source = kind.replace("scratch", "gpt2")
        tokenizer = import_tokenizer(write_tokenizer(original(source), tmp_path / "in"))
        texts = texts_for(source)[:1200]
    if kind == "scratch, across":
        tokenizer = Tokenizer(**{**tokenizer.state, "pattern": WORD_PATTERN})
    theirs = exported_tokenizer(tokenizer, tmp_path)
    ours = [tokenizer.encode(text) for text in texts]
    result = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert_same(texts, result, ours)
    opened = theirs(texts[:50], split_special_tokens=True)["input_ids"]
    assert_same(texts[:50], opened, [tokenizer.begin + ids for ids in ours[:50]])
    assert {name: theirs.convert_tokens_to_ids(name) for name in tokenizer.special} == tokenizer.special
    rng = random.Random(0)
    some = [[rng.randrange(tokenizer.size) for _ in range(rng.randint(0, 9))] for _ in range(200)] + ours
    decoded = [theirs.decode(ids, skip_special_tokens=True) for ids in some]
    assert_same(some, decoded, [tokenizer.decode(ids) for ids in some])
    assert sum("\ufffd" in text for text in decoded) > 20


@pytest.mark.parametrize("config", [TINY, POLICIES["llama3, untied"]], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["scratch", "llama3", "smollm2"])
def test_an_exported_reward_model_scores_the_same_in_transformers(kind, config, tmp_path):
    tokenizer = SCRATCH
    if kind != "scratch":
        tokenizer = import_tokenizer(write_tokenizer(original(kind), tmp_path / "in"))
    model = RewardModel(export_source(tmp_path, config, tokenizer))
    with torch.no_grad():
        model.head.bias.fill_(0.73)
    save_model(Settings(out=str(tmp_path), save="reward.pt"), model, tokenizer)
    result = run("model", "--out", tmp_path, "--init", "reward.pt", "--export", tmp_path / "exported")
    assert not result.code, result.err
    assert "LlamaForSequenceClassification" in result.out
    shift = float(re.search(r"minus (-?[\d.]+)", result.out)[1])
    assert abs(shift - 0.73) < 1e-5
    theirs = load_whole(transformers.AutoModelForSequenceClassification, tmp_path / "exported")
    assert type(theirs) is transformers.LlamaForSequenceClassification and theirs.config.num_labels == 1
    padding, end = theirs.config.pad_token_id, torch.tensor([tokenizer.end])
    assert padding != tokenizer.end
    opening = torch.tensor(tokenizer.begin, dtype=torch.long)
    texts = [
        torch.tensor(tokenizer.encode(text)) for text in ("What is the best way?", "Yes", SAMPLE[:90], "你好,世界!")
    ]
    documents = [(torch.cat((opening, text)), torch.cat((text.flip(0), end))) for text in texts]
    (batch,) = pack(documents, CPU)
    with torch.no_grad():
        rewards = torch.empty(len(documents))
        rewards[batch.members] = model.score(batch)
        sequences = [torch.cat(document) for document in documents]
        padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=padding)
        assert (padded == padding).sum() > 20
        real = torch.arange(padded.shape[1]) < torch.tensor([[len(sequence)] for sequence in sequences])
        scores = theirs(padded, attention_mask=real.long()).logits[:, 0]
        alone = torch.cat([theirs(sequence[None]).logits[:, 0] for sequence in sequences])
    assert rewards.std() > 0.1
    close(scores, rewards - shift)
    close(alone, rewards - shift)


@pytest.mark.parametrize("kind", KINDS)
def test_import_export_import_changes_nothing(kind, tmp_path):
    changes = {**SCALED, "tie_word_embeddings": kind == "smollm2"}
    llama(vocab_size=2600, num_hidden_layers=1, **changes).save_pretrained(tmp_path / "in")
    policy, tokenizer = import_model(write_tokenizer(original(kind), tmp_path / "in"))
    save_model(Settings(out=str(tmp_path), save="policy.pt"), policy, tokenizer)
    export_model(tmp_path / "policy.pt", tmp_path / "exported")
    again, same = import_model(tmp_path / "exported")
    assert again.config == policy.config
    assert again.state_dict().keys() == policy.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in policy.state_dict().items())
    for name in ("special", "end", "begin", "in_text", "normal", "size", "readable"):
        assert getattr(same, name) == getattr(tokenizer, name), name
    assert_same(TEXTS, [same.encode(text) for text in TEXTS], [tokenizer.encode(text) for text in TEXTS])
    every = [[number] for number in range(tokenizer.size)]
    assert_same(every, [same.decode(ids) for ids in every], [tokenizer.decode(ids) for ids in every])


def test_export_writes_nothing_outside_its_folder(tmp_path):
    out, target = tmp_path / "out", tmp_path / "deep" / "exported"
    export_source(out, TINY, SCRATCH)
    before = contents(tmp_path)
    result = run("model", "--out", out, "--init", "policy.pt", "--export", target)
    assert not result.code, result.err
    after = contents(tmp_path)
    assert {path.relative_to(target).as_posix() for path in after.keys() - before.keys()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    assert all(after[path] == old for path, old in before.items())
    assert str(target) in result.out and "LlamaForCausalLM" in result.out
    assert not any(map(os.path.exists, ("out", "exported"))) and not os.listdir()


def test_export_without_a_checkpoint_is_refused(tmp_path, folder):
    target = tmp_path / "exported"
    out = tmp_path / "out"
    assert "--init" in complaint(out, "--export", target)
    assert "sft.pt" in complaint(out, "--export", target, "--init", "sft.pt")
    assert str(folder) in complaint(out, "--export", target, "--init", folder)
    out.mkdir()
    (out / "bad.pt").write_bytes(b"no checkpoint")
    assert "bad.pt" in complaint(out, "--export", target, "--init", "bad.pt")
    export_source(out, TINY, SCRATCH)
    assert "--dim" in complaint(out, "--export", target, "--init", "policy.pt", "--dim", 64)
    assert not target.exists()
    target.write_text("I am a file")
    assert str(target) in complaint(out, "--export", target, "--init", "policy.pt")
    assert target.read_text() == "I am a file"
