"""Tokenizers and pretrained models in, trained ones out, with transformers, tokenizers and safetensors as oracles."""

import dataclasses
import functools
import json
import random
import re
import unicodedata
from collections import Counter

import pytest
import torch
from conftest import CPU, write

transformers, tokenizers, safetensors = map(pytest.importorskip, ("transformers", "tokenizers", "safetensors.torch"))

import huggingface_hub
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

import evaluate
import model
from model import END_OF_TEXT as END
from model import GPT, CommonSettings, Config, Tokenizer, UserError, find_pretrained, import_model, pack
from reward import RewardModel

close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)

SAMPLE = """The quick brown fox jumps over the lazy dog. It's what they'd said: we're sure you'll find that I'm right,
they've been there, HE'S THERE, I'LL GO, DON'T STOP; O'Neill isn't here 's 't 're. What is the best way to do that?
\treturn fibonacci(n - 1) + fibonacci(n - 2)  # the sum of both\r\n\r\n\r\n
In 1969, 2024, 12, 365, 1000000, 3.14159, 1,234,567.89 and 100% of 50 people paid $9.99 for 20 of them. 你好,世
Les élèves étaient déjà là, où l'été commençait à Noël. Der Bär fraß große Äpfel. Η γρήγορη αλεπού. 日本
Съешь же ещё этих мягких булок. السلام عليكم ورحمة الله שלום עולם कैसे हैं? 안녕 세계 สวัส
Tiếng Việt: người. Łódź, İstanbul, ŒUVRE, ﬁne, ſtop. 🙂 👨\u200d👩\u200d👧 👍🏽 🇩🇪 ❤\ufe0f ½ ⅔ Ⅳ ① ٣٤٥ १२३ ∑ x² ≤ ∞
"""
HARD = [*"|x| |  |\n\n| \n|\n |\t\t x| \r\n \r\n |a\rb|   a  b   c    |a \n \n b|  1|1 2  3|v1.2.3|1٣1|12\xa034|1\n\n2"
        "|xx|IT'S 'Ll 'rE|'s 's''s'sa'S1a'sb|'ſ 'ſt it'ſ|’s it’s|if(a&&b){d+=e<<2;}//f\r\n|__init__ aB|--==###...!!???"
        "|ᄒ\u1161\u11ab|ẞß ǅ|𝓗𝓮 𐍈|e\u0301\u0302\u0316 a\u030a|\u212b \u2126|\u0344 \u0958|1\ufe0f⃣|\u202ea"
        "|a\u200bb|\ufeffa|a\xadb|\u2028a\u2029b|a\x85b|\u180ea|\xa0 \xa01|a\u2003b \u20031|\u3000中\u30001|\x00|\x01"
        "|\x7f\x80\x9f|\x0b\x0c a\x0b1|\x1c\x1d\x1e\x1f a|\ufffd\ufffe\uffff|\ue000\uf8ff\U0010fffd| \u0301a|1\u0301 \n"
        "|ʼs|ª º ² ʰ|<think> ⅓ ﬁ|axb|xaxbxcx|é|aéxbÃc|a xb x b|a©b|aä|éa|a!b|! !!!|x  <t> y|ώ|ω\u0301|xω\u0301ώ\u0323"
        "|ab\u0323|abb\u0323ab|abc xabc|ab1cd|ab 12ab".split("|"), f"  {END}'s", END[:-1], "x" + " " * 60 + "y"]
NAMES = [END, "<|im_start|>", "<think>", "</think>", "⅓", "qﬁ", "qfi", "<a", "<ab", "<abc"]


def random_texts(count: int, seed: int) -> list[str]:
    """Words, characters, spaces, digits and names in random order; every fourth text is of any characters at all."""
    rng, characters = random.Random(seed), sorted(set("".join(HARD) + SAMPLE))
    pieces = [*characters, *NAMES * 4, *"0123456789" * 6, *["'s", "'LL", " "] * 20, *SAMPLE.split(), *SAMPLE.split(" ")]
    pieces += ["  ", "\n\n", "\t", "\r\n", " \n", "\xa0", "\u3000", "\u200b", " " * 9, "\n" * 5] * 8
    # Characters that have long had their place: what a letter is must not depend on anyone's version of Unicode.
    old = [chr(point) for point in range(0x2FA20) if unicodedata.ucd_3_2_0.category(chr(point))[1] not in "nso"]
    kinds = [pieces, pieces, [*characters, " ", "\n\n"], old + characters]
    return ["".join(rng.choices(kinds[number % 4], k=rng.randint(1, 16))) for number in range(count)]


TEXTS = [*HARD, SAMPLE, *SAMPLE.splitlines(keepends=True), *random_texts(2000, seed=0)]
LONG = [part * 20_000 for part in (" ", "a", "a b", "字", "axb")] + [" " * 50_000 + "x", "a \ud83d b\udc00", "\ud83dé"]

# ---- Tokenizers, made with the tokenizers library ----

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
GPT2, BYTES = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words) for words in (True, False))
DIGITS, NFC = pre_tokenizers.Digits(individual_digits=True), normalizers.NFC()
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def made(*words, bpe=None, form=None, first=(), special=(END,), added=(), opening=None):
    """A byte-level BPE; `words` are pre-tokenizers or regular expressions as in Llama 3. Without `bpe` it learns from
    texts not cut into words, so that wrong cuts show; with tokens at its `first` ids from few: it lacks bytes."""
    tokenizer = tokenizers.Tokenizer(bpe or models.BPE(ignore_merges=bool(opening)))
    tokenizer.pre_tokenizer, tokenizer.decoder, tokenizer.normalizer = BYTES, decoders.ByteLevel(), form
    if bpe is None:
        texts = [text for text in HARD + random_texts(500, seed=1) if not re.search("<|q", text)]  # no added token
        trainer = trainers.BpeTrainer(vocab_size=2000, show_progress=False, special_tokens=[*first],
                                      initial_alphabet=["!"] if first else ALPHABET)
        tokenizer.train_from_iterator([SAMPLE] * 3 if first else [SAMPLE] * 3 + texts, trainer)
    words = [pre_tokenizers.Split(Regex(word), "isolated") if isinstance(word, str) else word for word in words]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words) if len(words) > 1 else words[0]
    tokenizer.add_special_tokens([] if first else [*special])
    tokenizer.add_tokens([*added])
    if opening:
        pair = (opening, tokenizer.token_to_id(opening))
        template = processors.TemplateProcessing(f"{opening} $A", special_tokens=[pair])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return tokenizer


def bytes_only(*more: str, merges=(), lack="", words=(GPT2,), form=None, special=(END,), added=(), **options):
    """Bytes, the merges given, `more` entries in the vocabulary, and an end token: 256, unless there is more."""
    names = [*(symbol for symbol in ALPHABET if symbol not in lack), *("".join(pair) for pair in merges), *more]
    bpe = models.BPE({name: number for number, name in enumerate(names)}, [*merges], **options)
    return made(*words, bpe=bpe, form=form, special=special, added=added)


SCRATCH = model.train_tokenizer([SAMPLE, *(text for row in model.toy_rows(60, 0) for text in row.values())], 500)
SPECIALS, AB = [END, "<|im_start|>", "<|im_end|>"], [("a", "b"), ("ab", "c"), ("a", "a")]
RAW = {name: AddedToken(name, normalized=False) for name in ("⅓", "<ab", "ώ", "b\u0323", "t>")}
ADDED = [RAW["⅓"], RAW["<ab"], "qfi", "<a", "<abc", "  ", "    ", "<think>"]
KINDS = {
    "gpt2": lambda: made(GPT2), "added, nfkd": lambda: made(GPT2, added=ADDED, form=normalizers.NFKD()),
    "added, nfc": lambda: made(GPT2, added=ADDED, form=normalizers.Sequence([NFC])),
    "smollm2": lambda: made(DIGITS, GPT2, first=SPECIALS),
    "llama3": lambda: made(LLAMA3, BYTES, special=["<s>", END, "<|right_pad_id|>"], opening="<s>"),
    "qwen": lambda: made(LLAMA3.replace("{1,3}", ""), BYTES, special=SPECIALS, added=NAMES[2:4], form=NFC),
    "deepseek": lambda: made(r"\p{N}{1,3}", "[一-龥぀-ヿ]+", LLAMA3, BYTES, form=normalizers.Sequence([])),
    "viking": lambda: made(r" ?[^(\s|[.,!?…。，、।۔،])]+", r"[\p{L}&&[^a-z]]+", BYTES),
    "scratch": lambda: tokenizers.Tokenizer.from_str(SCRATCH.text),
}
RARE = {
    "lacking": lambda: bytes_only(merges=AB, lack="xÃ"), "half a letter": lambda: bytes_only(merges=AB, lack="©Ã"),
    "padding that is a byte": lambda: bytes_only(merges=[("!", "!")], special=["!", END]),
    "control tokens, one the head of another": lambda: bytes_only(special=[END, "<t", "<t>"]),
    "not normalised": lambda: bytes_only(added=[RAW["ώ"]], form=NFC),
    "not normalised first": lambda: bytes_only(added=[RAW["b\u0323"], "ab"], form=NFC),
    "whole words": lambda: bytes_only("abc", ignore_merges=True),
    "an added token in a control token": lambda: bytes_only(special=[END, "<t>"], added=[RAW["t>"]]),
    "words that leave gaps": lambda: bytes_only(merges=AB, words=[r"(\d)+", BYTES]),
    "unknown token, nothing lacking": lambda: bytes_only("<u>", added=["<u>"], unk_token="<u>"),
}
original = functools.cache(lambda kind: (KINDS | RARE)[kind]())  # as the tokenizers library has it


@pytest.mark.parametrize("kind", KINDS | RARE)
def test_ids_and_texts_equal_those_of_the_tokenizers_library(kind):
    theirs, content = original(kind), json.loads(original(kind).to_str())
    theirs.encode_special_tokens = True  # special tokens written out are ordinary text
    if kind == "gpt2":  # as older files say it: merges are texts, and some keys did not exist yet
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        for part, key in (("model", "byte_fallback"), ("model", "ignore_merges"), ("pre_tokenizer", "use_regex")):
            del content[part][key]
    ours, texts, used = Tokenizer(json.dumps(content), END), TEXTS + LONG, set()
    sound = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    for text, expected in zip(texts, theirs.encode_batch(sound, add_special_tokens=False), strict=True):
        assert ours.encode(text) == expected.ids == ours.encode(ours.shield(text), control=True), text[:200]
        used.update(expected.ids)
    assert len(used) > (250 if kind in KINDS else 100)
    assert ours.end == theirs.token_to_id(END) and ours.size == max(theirs.get_vocab().values()) + 1
    assert ours.begin == theirs.encode("").ids and len(ours.begin) == (kind == "llama3")
    if kind in ("gpt2", "llama3", "deepseek", "viking", "scratch"):  # which lack nothing and normalise nothing
        assert [ours.decode(ours.encode(text)) for text in TEXTS] == TEXTS
    if kind in KINDS:
        some = [random.Random(seed).choices(range(280 if seed % 2 else ours.size), k=seed % 9) for seed in range(800)]
        assert [ours.decode(ids) for ids in some] == theirs.decode_batch(some, skip_special_tokens=True)
        assert ours.decode(torch.tensor([ours.end, *ours.encode("Hi"), ours.size, 10**9, -1])) == "Hi"


# ---- Chat templates ----

CHATS = [  # of Qwen's kind, whose end token is not the tokenizer's last word; of Llama 3's; of Mistral's
    ("qwen", "<|im_end|>", """{%- if messages[0].role != "system" %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}
{%- for message in messages %}{{ "<|im_start|>" + message["role"] + "\n" + message["content"] + "<|im_end|>\n" }}
{%- if message.content == "go on" %}{% continue %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"""),
    ("llama3", END, """{{- bos_token }}{% if tools is not none %}{{ tools | tojson }}{% endif %}
{%- for message in messages %}
    {{- "[" + message.role + "]\n\n" + message.content | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "[assistant]\n\n" }}{% endif %}
"""),
    ("llama3", END, """{{ bos_token }}{% for message in messages %}{% if message.role == "user" %}
{{- "[INST] " + message.content + " [/INST]" }}{% elif message.role == "assistant" %}
{{- " " + message.content + eos_token }}{% else %}{{ raise_exception("no " + message.role) }}{% endif %}
{%- endfor %}"""),
    ("llama3", END, "{% for message in messages %}\n  {% generation %}\n{{ message.content + eos_token }}"
     "\n  {%- endgeneration %}\n{% endfor %}"),  # nothing begins, and a prompt ends as an answer does
]


@pytest.mark.parametrize("kind, end, template", CHATS, ids=["qwen", "llama3", "mistral", "bare"])
def test_message_lists_get_the_ids_of_chat_templates_in_transformers(kind, end, template):
    """Names of control tokens in what people say are text, or tokens by flag; one end token, and one beginning."""
    begin, rng, roles = {"llama3": "<s>"}.get(kind), random.Random(0), ["system", "user", "assistant", "user"]
    names = {"eos_token": end, "bos_token": begin, "chat_template": template}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=original(kind), **names)
    ours, counts = Tokenizer(original(kind).to_str(), end, template), Counter()

    def encoded(prompt, answers, control, parts=None):
        settings = model.Settings(context=10**6, max_response=10**5, control_tokens=control)
        said = [{"role": "assistant", "content": answer} for answer in answers]
        row = {"prompt": prompt, "chosen": [said[0]], "rejected": [*prompt, said[1]]}
        form, parts = model.write_row(settings, ours, *(parts or model.read_row(row)))
        assert form == "template"
        return [ids.tolist() for ids in model.encode_row(settings, ours, form, parts, counts)]

    def by_template(messages, asked):
        return theirs.apply_chat_template(messages, add_generation_prompt=asked, return_dict=False)

    texts = [text for text in TEXTS if not re.search(r"<\||</?s>", text)]
    for number in range(200):
        some = roles[0 if kind == "qwen" and number % 2 else 1 :][: 1 if number % 3 else 4]
        some = some[:-1] if some[-1] == "assistant" else some if some[-1] == "user" else roles[1:2]
        control, name = ("text", "") if number % 4 else ("tokens", rng.choice([*ours.special]))
        prompt = [{"role": role, "content": rng.choice(texts) + (name if role == "user" else "")} for role in some]
        answers = [f"A{rng.choice(texts)}", f"B{rng.choice(texts)}"]
        ids, *sides = encoded(prompt, answers, control)
        assert ids == by_template(prompt, True)
        for answer, side in zip(answers, sides, strict=True):
            whole = by_template([*prompt, {"role": "assistant", "content": answer}], False)
            assert ids + side == whole[: len(whole) - whole[::-1].index(ours.end)]
            assert side.count(ours.end) == 1 and side[-1] == ours.end
    written = theirs.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert encoded(prompt, answers, "tokens", (written, *(f"{a}{end} \n" for a in answers)))[0] == ids
    spelled, plain = ([{"role": "user", "content": text}] for text in (f"{end}<s>{end}", "x"))
    found = [[token for token in encoded(prompt, (f"A{end}C", "B"), "text")[part] if token in ours.special.values()]
             for prompt in (spelled, plain) for part in (0, 1)]
    assert found[:2] == found[2:] and f"{end}<s>{end}" in theirs.decode(encoded(spelled, "AB", "text")[0])
    with pytest.raises(model.DroppedRow, match="an end token inside"):
        encoded(plain, (f"A{end}C", "B"), "tokens")
    asked = model.ask_in_form(ours, "template", spelled[0]["content"])
    assert asked.tolist() == encoded(spelled, "AB", "text")[0]
    if "raise_exception" in template:
        with pytest.raises(model.DroppedRow, match="refuses it: no system"):
            encoded([{"role": "system", "content": "s"}, *plain], "AB", "text")


# ---- Models, written by transformers ----

SHAPE = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "bos_token_id": None,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "eos_token_id": 256}
STRETCHED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3_ROPE, TIED = {"rope_type": "llama3", **STRETCHED}, {"tie_word_embeddings": True}
SCALED = {"rope_parameters": {"rope_theta": 10000.0, **LLAMA3_ROPE}}
IDS = [torch.randint(0, 257, (length,), generator=torch.Generator().manual_seed(length)) for length in (120, 33, 1)]


def llama(family="llama", **changes):
    """A …ForCausalLM whose random weights are large enough that every setting shows in its logits."""
    torch.manual_seed(0)
    shape = transformers.AutoConfig.for_model(family, **{**SHAPE, "pad_token_id": None, **changes})
    theirs = transformers.AutoModelForCausalLM.from_config(shape).eval()
    for parameter in theirs.parameters():
        torch.nn.init.uniform_(parameter, *((0.5, 1.5) if parameter.dim() == 1 else (-0.35, 0.35)))
    return theirs


def stored(theirs, folder, tokenizer=None, **options):
    theirs.save_pretrained(folder, **options)
    (tokenizer or bytes_only()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return folder


@pytest.fixture
def folder(tmp_path):
    return stored(llama(num_hidden_layers=1), tmp_path / "folder")


def config(**changes):
    """Changes config.json of a folder, as the next two change the tokenizer and a weight; None takes away."""
    def edit(folder):
        content = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return edit


def tokenizer(*more, **options):
    return lambda folder: bytes_only(*more, **options).save(str(folder / "tokenizer.json"))


def weights(name, tensor=None):
    def edit(folder):
        content = safetensors.load_file(folder / SINGLE) | {name: tensor}
        safetensors.save_file({k: v for k, v in content.items() if v is not None}, folder / SINGLE, {"format": "pt"})
    return edit


def test_end_and_template_are_what_the_folder_names(folder):
    tokenizer(special=[END, "<e>"])(folder)
    about, old = folder / "tokenizer_config.json", {"chat_template": "{{ 1 }}"}
    for said, number, template in (({"eos_token": "<e>"} | old, 256, "{{ 1 }}"), ({"eos_token": None}, 257, None),
                                   ({"eos_token": {"content": "<e>"}}, None, None), ({}, [257, 256], None)):
        about.write_text(json.dumps(said))
        config(eos_token_id=number)(folder)
        ours = import_model(folder)[1]
        assert (ours.end, ours.template) == (257, template)
    named = [{"name": "default", "template": "{{ 2 }}"}, {"name": "tool_use", "template": "{{ 3 }}"}]
    about.write_text(json.dumps({"chat_template": named, "bos_token": {"content": "<e>"}}))
    assert import_model(folder)[1].names == {"eos_token": "<e>", "bos_token": "<e>"}
    assert import_model(folder)[1].template == "{{ 2 }}"
    about.write_text(json.dumps(old))
    (folder / "chat_template.jinja").write_text("{{ 'fïle' }}", "utf-8")
    assert import_model(folder)[1].template == "{{ 'fïle' }}"
    about.unlink()
    assert import_model(folder)[1].end == 257


@torch.no_grad()
def same_logits(policy, theirs):
    """Compares with a model or with a folder, which transformers then loads: a tensor for every place and no more."""
    if not isinstance(theirs, torch.nn.Module):
        load = transformers.AutoModelForCausalLM.from_pretrained
        theirs, report = load(theirs, dtype=torch.float32, output_loading_info=True)
        assert theirs.config.model_type == policy.config.family and not any(report.values()), report
    for ids in IDS:
        logits = theirs(ids[None]).logits[0]
        assert logits.std() > 0.5
        close(policy(ids) @ policy.vocabulary_weight.T, logits)
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    {**TIED, "num_key_value_heads": 4}, {"rms_norm_eps": 0.02}, {"num_key_value_heads": 1, "num_attention_heads": 1},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {**SCALED, **TIED, "num_key_value_heads": 1},
    {"family": "llama", "head_dim": 24}, {"family": "qwen2"}, {"family": "qwen3", "head_dim": 32, **TIED},
    {"family": "qwen2", **TIED, "num_key_value_heads": 1, "use_sliding_window": False, "sliding_window": 8},
    {"family": "qwen3", "num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    {"family": "smollm3", "no_rope_layers": [0, 1], "num_hidden_layers": 2},
], ids=lambda changes: " ".join(changes))
def test_logits_logprobs_and_greedy_answers_equal_those_of_transformers(changes, tmp_path):
    theirs = llama(**changes)
    policy, _ = import_model(stored(theirs, tmp_path))
    same_logits(policy, theirs)
    same_logits(policy, exported(tmp_path, Tokenizer(bytes_only().to_str(), END), policy))
    assert policy.config.pretrained and policy.config.tied == theirs.config.tie_word_embeddings
    prompt, *responses = document = IDS[0][:50], IDS[1], IDS[0][50:]
    (batch,) = pack([(IDS[2], IDS[1]), document], CPU)  # in which the longer document comes first
    for number, response in enumerate(responses):
        expected = theirs(torch.cat((prompt, response))[None]).logits[0, 49:-1].log_softmax(-1)
        close(policy.logprobs(batch)[0][batch.sequence == number], expected.gather(1, response[:, None])[:, 0])
    for ids, answer in zip(IDS, model.generate(policy, IDS, 256, 40, temperature=0), strict=True):
        greedy = theirs.generate(ids[None], max_new_tokens=40, do_sample=False, pad_token_id=259)[0, len(ids) :]
        assert answer.tolist() == greedy.tolist()


@pytest.mark.parametrize("tied, dtype", [(False, torch.bfloat16), (True, torch.float16)])
def test_weights_may_be_half_precision_and_in_several_shards_but_one_file_goes_first(tied, dtype, tmp_path):
    theirs = llama(tie_word_embeddings=tied).to(dtype)
    policy, _ = import_model(stored(theirs, tmp_path, max_shard_size="15KB"))
    assert len([*tmp_path.glob("model-*")]) > 3 and {weight.dtype for weight in policy.parameters()} == {torch.float32}
    same_logits(policy, tmp_path)
    other = {name: tensor * 1.5 for name, tensor in theirs.state_dict().items() if not (tied and "lm_head" in name)}
    safetensors.save_file(other, tmp_path / SINGLE, metadata={"format": "pt"})
    again, _ = import_model(tmp_path)
    same_logits(again, tmp_path)
    assert torch.equal(again.norm.weight, other["model.norm.weight"].float())


def test_a_head_beside_a_tied_config_is_kept_where_it_differs(folder):
    config(**TIED)(folder)
    policy, _ = import_model(folder)
    assert not policy.config.tied
    same_logits(policy, transformers.AutoModelForCausalLM.from_pretrained(folder))
    weights("lm_head.weight", policy.embedding.weight.detach().clone())(folder)
    assert import_model(folder)[0].config.tied


@pytest.mark.parametrize("edits", [
    {}, {"rope_theta": 500.0}, {"rope_theta": 500.0, "rope_scaling": LLAMA3_ROPE}, {"rope_scaling": None},
    {"rope_scaling": {"type": "llama3", **STRETCHED}}, {"rope_interleaved": False},
    {"max_position_embeddings": 32, "rope_scaling": dict([*LLAMA3_ROPE.items()][:-1])},
    dict.fromkeys("num_key_value_heads rms_norm_eps tie_word_embeddings hidden_act max_position_embeddings".split()),
], ids=lambda edits: " ".join(edits)[:40])
def test_older_configs_and_missing_keys_mean_what_transformers_takes_them_for(edits, tmp_path):
    config(rope_parameters=None, torch_dtype="float32", **edits)(stored(llama(num_key_value_heads=4), tmp_path))
    policy, _ = import_model(tmp_path)
    assert policy.config.context == same_logits(policy, tmp_path).config.max_position_embeddings
    assert (policy.config.rope_scaling is not None) == bool(edits.get("rope_scaling"))


def refusal(folder) -> str:
    """What import_model says: one line that names the file."""
    with pytest.raises(UserError, match=f"^.*{folder}.*$") as caught:
        import_model(folder)
    return str(caught.value)


def header(**entry) -> bytes:
    text = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


DAMAGED = [b"once upon a time there was a file", b"", b"[]", b'{"a', b"\xff\xfe{}", header()[:-1], header()[:20],
           header(data_offsets=[4, 12]), header(shape=[1]), header(dtype="F31")]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", SINGLE, INDEX])
def test_broken_and_missing_files_and_git_lfs_pointers_are_called_so(name, folder):
    if name == INDEX:
        (folder / SINGLE).unlink()
    for damage in DAMAGED:
        (folder / name).write_bytes(damage)
        assert f"{folder / name}: damaged" in refusal(folder)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert f"{folder / name}: a Git LFS pointer" in refusal(folder)
    (folder / name).unlink()
    if name != "tokenizer_config.json":  # which may be missing
        assert f"{folder / name.removesuffix('.index.json')}: no such file" in refusal(folder)


QUERY, KEY = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
ROPE, NORM = {"rope_type": "default", "rope_theta": 10000.0, "factor": 4.0}, "model.norm.weight"
PREFIX, REMOVED = pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Split(Regex(r"\s+"), "removed")
LOWER, REVERSED = normalizers.Lowercase(), json.loads(bytes_only(merges=AB).to_str())
REVERSED["model"]["merges"].reverse()
ROBERTA = json.loads(bytes_only().to_str()) | {"post_processor": {"type": "RobertaProcessing"}}
KEYS = {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "sliding_window": 64,
        "attention_dropout": 0.1, "quantization_config": {"bits": 4}, "rope_interleaved": True}
OPTIONS = {"dropout": 0.1, "end_of_word_suffix": "</w>", "byte_fallback": True, "continuing_subword_prefix": "##"}
SPOILT = {  # what the message names, and what is wrong
    **{f"{name} {value!r} is not": config(**{name: value}) for name, value in KEYS.items()},
    **{f"ValueError: {name} {value!r}": tokenizer(**{name: value}) for name, value in OPTIONS.items()},
    **{f"'<{name}>' with lstrip, rstrip or": tokenizer(added=[AddedToken(f"<{name}>", special=special, **{name: True})])
       for name, special in (("lstrip", True), ("rstrip", False), ("single_word", False))},
    "size mismatch for blocks.0.attention": config(head_dim=32), "type mistral is not": config(model_type="mistral"),
    "layer_types ['sl": config(layer_types=["sliding_attention"]),
    "partial_rotary_factor 0.5": config(rope_parameters={**ROPE, "partial_rotary_factor": 0.5}),
    "yarn": config(rope_parameters=None, rope_scaling={"type": "yarn"}), "KeyError: 'vocab": config(vocab_size=None),
    "config.json: damaged": config(num_hidden_layers="two"),
    "257 tokens": config(vocab_size=256), "[{\"type\": \"By": tokenizer(words=[GPT2, DIGITS]),
    "low_freq_factor": config(rope_parameters={**ROPE, "rope_type": "llama3"}),
    "q_proj.bias": weights(QUERY.replace("weight", "bias"), torch.zeros(64)), f"KeyError: '{QUERY}'": weights(QUERY),
    "KeyError: 'lm_head": weights("lm_head.weight"), "torch.Size([96, 64])": weights(QUERY, torch.ones(32, 64)),
    "v_proj.weight holds numbers that are not finite": weights(KEY, torch.full((32, 64), float("nan"))),
    f"{NORM} holds numbers that are not finite": weights(NORM, torch.full((64,), -float("inf"))),
    "KeyError: 'model.embed": lambda folder: (folder / SINGLE).write_bytes(header()),
    "unk_token 'u'": tokenizer("u", lack="xu", unk_token="u"), "'▁the', which no merge makes": tokenizer("▁the"),
    "type Unigram": lambda f: (f / "tokenizer.json").write_text(json.dumps(REVERSED).replace('"BPE"', '"Unigram"')),
    "Metaspace": tokenizer(words=[pre_tokenizers.Metaspace()]), "ByteLevel": tokenizer(words=[PREFIX]),
    "Digits": tokenizer(words=[pre_tokenizers.Digits(False), GPT2]), "Lowercase": tokenizer(form=LOWER),
    "Removed": tokenizer(words=[REMOVED, BYTES]), "[{": tokenizer(form=normalizers.Sequence([NFC, NFC])),
    'pre_tokenizer {"type": "Split"': tokenizer(words=[LLAMA3]),
    "token 'abc', which no merge makes": tokenizer("abc"), "order": tokenizer("b", merges=[("a", "c")], lack="xb"),
    "not in the order of the tokens' ids": lambda folder: (folder / "tokenizer.json").write_text(json.dumps(REVERSED)),
    "RobertaProcessing": lambda folder: (folder / "tokenizer.json").write_text(json.dumps(ROBERTA)),
    "special token": lambda folder: (tokenizer(special=["<e>"], added=[END])(folder), config(eos_token_id=65)(folder)),
}


@pytest.mark.parametrize("named, spoil", SPOILT.items(), ids=SPOILT)
def test_what_would_give_other_numbers_or_ids_is_refused_by_name(named, spoil, folder):
    spoil(folder)
    assert named in refusal(folder)


def test_init_names_a_folder_or_a_repository_to_download(folder, monkeypatch):
    files = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", SINGLE,
             "model-00001-of-00002.safetensors", INDEX]
    def snapshot_download(name, allow_patterns):
        if name == "owner/broken":
            raise ConnectionError("no route to host\nand a second line")
        offered = [*files, "pytorch_model.bin", "consolidated.safetensors", "README.md", "model.py"]
        assert [*huggingface_hub.utils.filter_repo_objects(offered, allow_patterns=allow_patterns)] == files
        return str(folder) * (name == "some-owner/Some.Model_1")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_pretrained("some-owner/Some.Model_1") == folder == find_pretrained(str(folder))
    for name in ("owner/broken", "nonsense", "a/b/c", "nowhere/", "my folder/model"):
        with pytest.raises(UserError, match=f"^--init {re.escape(name)}: .*$") as caught:
            find_pretrained(name)
        assert ("no route to host" in str(caught.value)) == (name == "owner/broken")


def test_init_trains_on_from_the_folder_and_keeps_its_shape(folder, run, tmp_path):
    flags = f"--init {folder} --limit 60 --steps 0 --context 300 --max-response 200"
    run(model, flags)
    policy, tokenizer = import_model(folder)
    kept, same = model.load_model(CommonSettings(out=str(tmp_path)), "sft.pt", GPT)
    assert kept.config == policy.config and same.state == tokenizer.state
    close(kept.state_dict(), policy.state_dict(), rtol=0, atol=0)
    for more in ("--dim 64", "--layers 1", "--heads 8", "--kv-heads 1", "--vocabulary 300", "--context 513"):
        with pytest.raises(UserError, match=more.split()[0]):
            run(model, f"{flags} {more}")


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}{{ eos_token }}"
SHAPE_HERE = Config(SCRATCH.size, 64, 2, 4, 2, 48, 128, rope_theta=500.0, norm_eps=1e-3)


def exported(folder, tokenizer, content):
    """The folder into which a model is exported."""
    write(folder, tokenizer, model=content)
    evaluate.export_model(folder / "model.pt", folder / "exported")
    return folder / "exported"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_means_the_same_in_transformers_and_imported_again(kind, tmp_path):
    policy, tokenizer = GPT(SHAPE_HERE), SCRATCH
    if kind != "scratch":
        theirs = llama(vocab_size=2100, **SCALED, tie_word_embeddings=kind == "qwen")
        there = stored(theirs, tmp_path / "in", original(kind))
        (there / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
        policy, tokenizer = import_model(there)
    folder = exported(tmp_path, tokenizer, policy)
    again, same = import_model(folder)
    assert same.state == tokenizer.state and again.config == dataclasses.replace(policy.config, pretrained=True)
    close(again.state_dict(), policy.state_dict(), rtol=0, atol=0)
    made, read = same_logits(policy, folder).config, transformers.AutoTokenizer.from_pretrained(folder)
    assert made.max_position_embeddings == policy.config.context and read.eos_token_id == made.eos_token_id == same.end
    assert read.bos_token_id == made.bos_token_id == (same.begin[0] if same.begin else None)
    ours = [tokenizer.encode(text) for text in TEXTS[:500]]
    assert read(TEXTS[:500], split_special_tokens=True)["input_ids"] == [tokenizer.begin + ids for ids in ours]
    assert [read.decode(ids, skip_special_tokens=True) for ids in ours] == [*map(tokenizer.decode, ours)]
    if kind != "scratch":
        assert (folder / "tokenizer.json").read_bytes() == (there / "tokenizer.json").read_bytes()
        shown = read.apply_chat_template([{"role": "user", "content": "Hï"}], tokenize=False)
        assert shown == f"<|im_start|>user\nHï<|im_end|>{END}"


@torch.no_grad()
@pytest.mark.parametrize("kind, padding", [
    ("scratch", model.PADDING), ("llama3", "<|right_pad_id|>"), ("smollm2", "<|im_start|>"), ("gpt2", None)])
def test_an_exported_reward_model_scores_the_same_in_transformers(kind, padding, tmp_path, capsys):
    tokenizer = SCRATCH if kind == "scratch" else Tokenizer(original(kind).to_str(), END)
    torch.manual_seed(0)
    ours = RewardModel(GPT(dataclasses.replace(SHAPE_HERE, vocabulary=tokenizer.size, tied=kind != "llama3")))
    ours.head.bias.fill_(0.73)
    folder = exported(tmp_path, tokenizer, ours)
    assert "minus 0.730000, the shift" in capsys.readouterr().out
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert type(theirs) is transformers.LlamaForSequenceClassification and not any(report.values()), report
    number, named = theirs.config.pad_token_id, transformers.AutoTokenizer.from_pretrained(folder).pad_token
    assert named == padding and number == tokenizer.special.get(padding, 0) != tokenizer.end
    texts = map(tokenizer.encode, ("What is the best way?", "Yes", SAMPLE[:90]))
    documents = [(torch.tensor(tokenizer.begin + ids), torch.tensor([*ids[::-1], tokenizer.end])) for ids in texts]
    (batch,) = pack(documents, CPU)
    rewards = ours.score(batch)[batch.members.argsort()]
    sequences = [torch.cat(document) for document in documents]
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=number)
    real = torch.arange(padded.shape[1]) < torch.tensor([[len(sequence)] for sequence in sequences])
    close(theirs.eval()(padded, attention_mask=real.long()).logits[:, 0], rewards - 0.73)
    assert rewards.std() > 0.1


def test_export_writes_a_folder_of_its_own_or_nothing(tmp_path, run):
    write(tmp_path, SCRATCH, model=GPT(SHAPE_HERE))
    run(evaluate, "--export model.pt", tmp_path / "new")
    made = ["config.json", SINGLE, "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == made
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    for name in (SINGLE, "pytorch_model.bin", INDEX):
        (tmp_path / "full").mkdir(exist_ok=True)
        (tmp_path / "full" / name).write_text("mine")
        for source, target, named in (("model", "full", "there are weights"), ("model", "bad.pt", "bad.pt"),
                                      ("bad", "x", "bad.pt"), ("gone", "x", "gone.pt")):
            with pytest.raises(UserError, match=f"^.*{named}.*$"):
                run(evaluate, f"--export {source}.pt", tmp_path / target)
        (tmp_path / "full" / name).rename(tmp_path / "out of the way")
        (tmp_path / "full").rmdir()  # where nothing was written
    assert (tmp_path / "bad.pt").read_bytes() == b"no checkpoint" and not (tmp_path / "x").exists()
