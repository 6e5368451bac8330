"""Chapter 1: settings, GPT, log-prob kernel, packing, generation; tokenizer, toy world, pairs, files, training, SFT."""

import copy
import gzip
import io
import json
import math
import os
import random
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import pytest
import regex
import torch
from conftest import CPU, LETTERS, TINY, TOLERANCES, plain_distribution, plain_logprobs, write
from jinja2.exceptions import SecurityError
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.overrides import TorchFunctionMode

try:
    import pyarrow.parquet
except ImportError:  # it comes with datasets; without it nothing of tables is tested
    pyarrow = None

import dpo
import model
import ppo
import reward
from model import (
    END_OF_TEXT, GPT, TOY_BEST_REWARD, TOY_SLIPS, TURN, CommonSettings, Config, Pairs, Settings, Tokenizer, Training,
    UserError, batch_indices, flag, generate, gold_reward, lay_out, load_model, load_pairs, pack, read_pairs, read_row,
    read_rows, sample, save_model, settle, toy_rows, train_tokenizer, visibility,
)

TOY_TEXTS = [text for row in toy_rows(60, 0) for text in row.values()]
TOY = train_tokenizer(TOY_TEXTS, 400)


def close(result, expected, tolerance=1e-5):
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def settled(**flags):
    """Settings as they are for a model from scratch."""
    settings = Settings(device="cpu", **flags)
    settle(settings, pretrained=False)
    return settings


# ---- Settings ----


@dataclass
class Made(CommonSettings):
    """A flag of every type."""

    rate: float = flag(0.5, "a rate, in %", above=0, most=2, pretrained=0.25)
    shift: float = flag(0.0, "a number that may be negative")
    count: int | None = flag(None, "a count", least=1)
    kind: Literal["a", "b"] = flag("a", "a kind")
    fast: bool = flag(False, "goes fast")
    some_names: tuple[str, ...] = flag(("x",), "names", nargs="+")


def parsed(monkeypatch, line):
    monkeypatch.setattr("sys.argv", ["made.py", *line.split()])
    return model.parse_settings(Made, "What it does.")


def test_flags_have_the_types_of_their_fields_and_may_reach_their_bounds(monkeypatch):
    made = parsed(monkeypatch, "--rate 2 --count 1 --kind b --fast --some-names y z --no-compile --seed 0 --out o")
    assert made == Made("o", 0, "auto", "auto", False, 2.0, 0.0, 1, "b", True, ["y", "z"]) and type(made.rate) is float
    for pretrained, rate in ((False, 0.5), (True, 0.25)):  # what nobody set depends on the model
        fresh = parsed(monkeypatch, "")
        assert fresh == Made("out", 0, "auto", "auto", None, None, 0.0, None, "a", False, ("x",))
        settle(made, pretrained), settle(fresh, pretrained)
        assert (made.rate, fresh.rate, fresh.count) == (2.0, rate, None)
    assert [parsed(monkeypatch, f"--shift {text}").shift for text in ("-1.5", "-.5", "2")] == [-1.5, -0.5, 2.0]


@pytest.mark.parametrize("line", ["--rate 0", "--rate 2.1", "--rate nan", "--shift=-inf", "--shift", "--count 0",
                                  "--count 1.5", "--kind c", "--fast=1", "--nothing 1", "stray", "--seed -1"])
def test_what_a_flag_cannot_be_is_refused_by_its_name(monkeypatch, line):
    with pytest.raises(UserError, match=re.split("[ =]", line)[0] + "[^\n]*(bounds|made.py --help)"):
        parsed(monkeypatch, line)


# ---- The GPT ----


def test_gpt_equals_the_formulas_written_out():
    """Token by token and head by head, in float64; two query heads share a key head. In fp32 gradients are the same."""
    torch.manual_seed(0)
    policy = GPT(Config(11, 16, 2, 4, 2, mlp=12, context=16, rope_theta=50, norm_eps=0.1, family="qwen2"))
    for name, weight in policy.double().named_parameters():
        if "norm" in name:
            nn.init.normal_(weight)

    def norm(x, weight):
        return x / (x.square().mean() + 0.1).sqrt() * weight

    def turn(x, position):
        angle = position * 50.0 ** (-torch.arange(2, dtype=torch.float64) / 2)
        pairs = torch.complex(x[:2], x[2:]) * torch.polar(torch.ones(2, dtype=torch.float64), angle)
        return torch.cat((pairs.real, pairs.imag))

    tokens = torch.tensor([3, 1, 4, 1, 5])
    stream = list(policy.embedding.weight[tokens])
    for block in policy.blocks:
        made = [block.attention.qkv(norm(x, block.attention_norm.weight)).view(8, 4) for x in stream]  # q, k and v
        for place, heads in enumerate(made):
            mixed = []
            for head in range(4):
                query, past = turn(heads[head], place), made[: place + 1]
                keys = [turn(other[4 + head // 2], before) for before, other in enumerate(past)]
                weights = torch.stack([query @ key / 2 for key in keys]).softmax(0)
                mixed.append(weights @ torch.stack([other[6 + head // 2] for other in past]))
            x = stream[place] + block.attention.output.weight @ torch.cat(mixed)
            gate, up = (block.gate_up.weight @ norm(x, block.mlp_norm.weight)).chunk(2)
            stream[place] = x + block.down.weight @ (gate / (1 + (-gate).exp()) * up)
    close(policy(tokens), torch.stack([norm(x, policy.norm.weight) for x in stream]), 1e-6)
    single = copy.deepcopy(policy).float()
    single(tokens).square().sum().backward(), policy(tokens).square().sum().backward()
    for ours, exact in zip(single.parameters(), policy.parameters(), strict=True):
        assert (ours.grad - exact.grad).norm() < 1e-5 * exact.grad.norm()


def test_new_weights_keep_outputs_of_order_1():
    policy = GPT(Config(500, dim=200, layers=8, heads=4, kv_heads=2, mlp=300, context=16, tied=False))
    for name, weight in policy.named_parameters():
        if weight.dim() == 2:  # 16 outputs are added up in the residual stream
            added = 16 if name.endswith(("output.weight", "down.weight")) else 1
            assert weight.std().item() == pytest.approx((weight.shape[1] * added) ** -0.5, rel=0.05), name
    assert policy.vocabulary_weight is policy.head.weight


@pytest.mark.parametrize("device, units, dim, flags, bf16, compiled", [
    ("cuda", {}, 64, {}, True, True), ("cuda", {}, 64, {"compile": False, "dtype": "fp32"}, False, False),
    ("cpu", {}, 256, {}, False, False), ("cpu", {"amx_bf16": 1}, 256, {"compile": True}, True, True),
    ("cpu", {"amx_bf16": 1}, 128, {}, False, False),  # too narrow to pay for the casts
])
def test_a_model_is_prepared_for_its_device(device, units, dim, flags, bf16, compiled, monkeypatch):
    """With a pretended GPU, where the blocks are compiled too, and whose attention needs heads at least 16 wide."""
    for where, name, value in ((torch.cuda, "is_available", device == "cuda"), (torch.cuda, "device_count", 1),
                               (torch.cuda, "is_bf16_supported", True), (torch.cpu, "get_capabilities", units)):
        monkeypatch.setattr(where, name, lambda value=value, **_: value)
    blocks = []
    monkeypatch.setattr(nn.Module, "to", lambda module, device: setattr(module, "moved_to", device.type) or module)
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: blocks.append(module))
    policy = model.prepare_model(GPT(Config(11, dim, 1, 4, 2, 12, 16)), Settings(grad_checkpoint=bf16, **flags))
    assert (policy.activations == torch.bfloat16, policy.compiled, policy.checkpointed) == (bf16, compiled, bf16)
    assert policy.moved_to == device and blocks == (list(policy.blocks) if compiled and device == "cuda" else [])
    with pytest.raises(UserError, match="--device cuda: " + (".* try --device cpu" if device == "cuda" else "")):
        model.prepare_model(GPT(replace(TINY, head_dim=8)), Settings(device="cuda"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # and so to both: only the first one's message is shown
    with pytest.raises(UserError, match="lower --nproc-per-node" if device == "cuda" else "there is none"):
        model.choose_device(Settings(device="cuda"))
    assert model.choose_device(Settings(device="cpu")) == CPU


# ---- The log-prob kernel ----

N, V, D = 50, 97, 16


def plain_kernel(hidden, weight, targets, temperature):
    everything = (hidden @ weight.T / temperature).log_softmax(-1)
    return everything.gather(-1, targets[:, None])[:, 0], -(everything.exp() * everything).sum(-1).detach()


def run_kernel(kernel, hidden, weight, targets, grad, *more):
    """(log-probs, entropies, gradient of hidden, gradient of weight) where the loss is log-probs · grad."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropies = kernel(hidden, weight, targets, *more)
    assert not entropies.requires_grad
    (logprobs * grad).sum().backward()
    return logprobs.detach(), entropies, hidden.grad, weight.grad


def kernel_inputs(device=CPU):
    """hidden, weight, targets with repetitions, and a weight for each log-prob."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, grad = (torch.randn(shape, generator=generator) for shape in ((N, D), (V, D), (N,)))
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[10:20], targets[20], targets[21] = 5, 0, V - 1
    return [part.to(device) for part in (hidden, weight, targets, grad)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("tile, temperature", [((1, 1000), 1.0), ((7, 10), 2.0), ((25, 1), 0.5), ((49, V - 1), 0.5)])
def test_kernel_equals_log_softmax_and_gather_in_float64(tile, temperature, dtype, tolerance, device, monkeypatch):
    """In bf16 too, on the same rounded inputs, but for the logits' rounding; results are fp32 even then."""
    monkeypatch.setattr(model, "TILES", dict.fromkeys(model.TILES, tile))
    hidden, weight, *others = kernel_inputs(device)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    results = run_kernel(model.token_logprobs, hidden, weight, *others, temperature)
    expected = run_kernel(plain_kernel, hidden.double(), weight.double(), *others, temperature)
    assert [result.dtype for result in results] == [torch.float32, torch.float32, dtype, dtype]
    close(results[:2], expected[:2], tolerance)
    for result, exact in zip(results, expected, strict=True):
        assert (result - exact).norm() < tolerance / 5 * exact.norm()


@pytest.mark.parametrize("width, first", [(1, 10000.0), (2, 10000.0), (1, -10000.0)])
def test_kernel_loses_nothing_beside_large_logits(width, first, monkeypatch):
    """Two words at logits 10000 and 9999, or −10000 and −10001: σ(±1) = 0.731059 and 0.268941, whatever the tiles."""
    monkeypatch.setitem(model.TILES, "cpu", (1, width))
    inputs = torch.ones(2, 1), torch.tensor([[first], [first - 1]]), torch.tensor([0, 1]), torch.tensor([0.0, 1.0])
    logprobs, entropies, _, grad_weight = run_kernel(model.token_logprobs, *inputs)
    assert [*logprobs, *entropies] == pytest.approx([-0.313262, -1.313262, 0.582203, 0.582203], abs=1e-5)
    assert grad_weight.flatten().tolist() == pytest.approx([-0.731059, 0.731059], abs=1e-5)


def test_kernel_never_makes_more_logits_than_a_tile_and_compiled_it_is_the_same(device, monkeypatch):
    made = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            made.append(function(*args, **(kwargs or {})))
            return made[-1]

    def backward(*given, plain=model.TokenLogprobs.backward):
        with Watch():  # which Tensor.backward has left
            return plain(*given)

    monkeypatch.setattr(model, "TILES", dict.fromkeys(model.TILES, (20, 60)))  # and smaller tiles at the edges
    with monkeypatch.context() as patch, Watch():
        patch.setattr(model.TokenLogprobs, "backward", staticmethod(backward))
        results = run_kernel(model.token_logprobs, *kernel_inputs(device), 0.7)
    sizes = {part.numel() for part in made if isinstance(part, torch.Tensor)}
    assert 20 * 60 in sizes and max(sizes) == V * D  # the gradient of the weights
    monkeypatch.setattr(model, "compiled_function", lambda body: torch.compile(body, dynamic=True, fullgraph=True))
    close(run_kernel(model.token_logprobs, *kernel_inputs(device), 0.7, True), results)


# ---- Packing ----


def test_who_sees_whom_is_the_rule_token_by_token(monkeypatch):
    """Labels are document and branch, none in a prompt. On CUDA a row has a multiple of 1,024 places: the filler sees
    itself, or a block mask would hold rows without a key, and nobody sees the filler."""
    documents = [[torch.arange(size) for size in sizes] for sizes in ((2, 3, 2), (1, 1, 2), (3, 2), (4,))]
    labels = "C C C C1 C1 A A A1 A1 A1 A2 A2 D D D D B B1 B2 B2".split() + ["."] * 1004
    expected = torch.zeros(1024, 1024, dtype=torch.bool)
    for query, at in enumerate(labels):
        for key, other in enumerate(labels[: query + 1]):
            expected[query, key] = other in (at, at[0])
    batch, at = lay_out(documents, [2, 0, 3, 1], CPU), torch.arange(1024)
    pieces = [torch.ones(size, size).tril().bool() if mask is None else mask for size, mask in batch.mask]
    assert torch.equal(torch.block_diag(*pieces).bool(), expected[:20, :20])
    assert [mask is None for _, mask in batch.mask] == [True, False, True, False]  # causal where nothing forks
    for name in ("to", "pin_memory"):
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, *_, **__: tensor)
    row = lay_out(documents, [2, 0, 3, 1], torch.device("cuda"))
    assert torch.equal(visibility(row.document, row.branch)(0, 0, at[:, None], at), expected)


@pytest.mark.parametrize("count, copies, most", [(1, 9, 200), (2, 3, 9), (3, 60, 0), (4, 3, 150), (8, 1, 0)])
def test_processes_and_passes_get_equal_shares_of_the_documents(documents, count, copies, most, monkeypatch):
    many, passes = documents[:5] * copies, []
    lengths = [sum(len(part) for part in document) for document in many]
    for rank in range(count):
        monkeypatch.setattr(model, "processes", lambda rank=rank: (rank, count))
        passes += pack(many, CPU, most)
        assert len(passes) == (rank + 1) * math.ceil(min(sum(lengths) / (most or 4096), len(many)) / count)
    sizes = [len(batch.tokens) for batch in passes if len(batch.members)]
    assert sorted(member for batch in passes for member in batch.members.tolist()) == list(range(len(many)))
    assert max(sizes) - min(sizes) <= max(lengths) and sum(sizes) == sum(lengths)


@pytest.mark.parametrize("dtype, tied, temperature", [("fp32", True, 1.0), ("fp32", False, 0.5), ("bf16", True, 1.0)])
def test_logprobs_are_the_same_packed_with_siblings_alone_and_plain(documents, dtype, tied, temperature, device):
    """And entropies."""
    torch.manual_seed(0)
    policy, expected = GPT(replace(TINY, tied=tied, family="qwen3" if dtype == "bf16" else "llama")), []
    alone = [(prompt, response) for prompt, *responses in documents for response in responses]
    for pair in alone:
        everything = plain_distribution(policy, *pair, temperature)
        entropies = -(everything.exp() * everything).sum(-1)
        expected.append(torch.stack((plain_logprobs(policy, *pair, temperature), entropies), 1))
    policy.to(device).activations = torch.bfloat16 if dtype == "bf16" else torch.float32
    for parts in ([documents], [[document] for document in documents], [[pair] for pair in alone]):
        batches = [lay_out(some, [*range(len(some))], device) for some in parts]
        results = torch.cat([torch.stack(policy.logprobs(batch, temperature), 1).cpu() for batch in batches])
        close(results, torch.cat(expected), TOLERANCES[device.type, dtype][0])  # bf16 rounds logits


@pytest.mark.parametrize("mode", ["fp32", "bf16", "checkpointed", "compiled"])
def test_gradients_do_not_depend_on_the_size_of_a_pass(policy, documents, mode, device):
    """The first gradients are fp32's. Checkpointing computes each block twice; bf16 is for matrix products."""
    gradients, begun, dtypes, dtype = [], [], set(), "bf16" if mode == "bf16" else "fp32"
    if mode != "compiled":
        policy.blocks[0].register_forward_pre_hook(lambda *_: begun.append(1))
        policy.blocks[0].down.register_forward_hook(lambda layer, inputs, output: dtypes.add(output.dtype))
    for tokens_per_pass in (80, 300, 10**6):
        flags = {"dtype": dtype, "compile": mode == "compiled", "grad_checkpoint": mode == "checkpointed"}
        flags = flags if gradients else {"dtype": "fp32", "compile": False}
        model.prepare_model(policy, Settings(device=device.type, **flags))
        begun.clear(), dtypes.clear(), policy.zero_grad()
        batches = list(pack(documents * 3, device, tokens_per_pass))
        for batch in batches:
            (policy.logprobs(batch)[0] * batch.offset.cos()).sum().backward()
        if mode != "compiled":
            assert len(begun) == len(batches) * (1 + policy.checkpointed) and dtypes == {policy.activations}
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]))
    near = TOLERANCES[device.type, dtype][1]
    assert all((other - gradients[0]).norm() <= near * gradients[0].norm() for other in gradients)


def test_flex_attention_equals_attention_by_document(policy, documents, device, monkeypatch):
    """A mask a document; on CUDA a block mask, which covers each block that FlexAttention's own trial finds."""
    documents = [*documents, (torch.arange(310) % 97, torch.arange(5)), *documents]
    batch = lay_out(documents, [*range(len(documents))], CPU)
    with monkeypatch.context() as patch:
        for name in ("to", "pin_memory"):
            patch.setattr(torch.Tensor, name, lambda tensor, *_, **__: tensor)
        row = lay_out(documents, [*range(len(documents))], torch.device("cuda"))
    about, length, real = (row.document.to(device), row.branch.to(device)), len(row.tokens), len(batch.tokens)
    mask = model.block_mask(*about)
    tried = create_block_mask(visibility(*about), None, None, length, length, device=device).to_dense()
    assert length % 1024 == 0 and bool((mask.to_dense() >= tried).all()) and mask.to_dense().sum() <= 1.2 * tried.sum()
    with torch.no_grad():
        expected = policy(batch.tokens, batch.positions, batch.mask)
        found = policy.to(device)(row.tokens.to(device), row.positions.to(device), mask)
        close(found[:real].cpu(), expected, TOLERANCES[device.type, "fp32"][0])


# ---- Generation ----

END = 3  # one token in twelve: many sequences end early
NEAR = [7, 1, 19, 12, 3, 16, 9, 5, 14, 2, 18, 11, 6, 10]
FAR = [1, 90, 4, 30, 2, 60, 45, 88, 7, 21, 3, 75, 12, 5, 33, 9]


def some_prompts(lengths):
    torch.manual_seed(5)
    return GPT(replace(TINY, vocabulary=12, tied=False)), [torch.randint(0, 12, (length,)) for length in lengths]


@torch.no_grad()
def plain_generate(policy, prompts, max_new_tokens, temperature, seed):
    """Samples without a cache: a full forward for each token."""
    noise = torch.rand(len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed))
    responses = []
    for prompt, uniforms in zip(prompts, noise, strict=True):
        tokens = prompt
        for uniform in uniforms:
            logits = policy(tokens)[-1:] @ policy.vocabulary_weight.T
            tokens = torch.cat((tokens, sample(logits, uniform[None], temperature)))
            if tokens[-1] == END:
                break
        responses.append(tokens[len(prompt) :].tolist())
    return responses


@pytest.mark.parametrize("lengths, steps, temperature, seed", [
    (NEAR, 26, 0, 0), (NEAR, 26, 1.0, 1), (FAR, 38, 0.6, 2), (FAR, 38, 1.0, 3), (FAR, 38, 3.0, 4), (FAR, 1, 1.0, 5),
    (FAR, 9, 1.0, 6), ([1], 20, 1.0, 7), ([*range(1, 28)] * 10, 2, 1.0, 8),
], ids=lambda value: str(value)[:12])
def test_generation_equals_the_sampler_without_a_cache(lengths, steps, temperature, seed, device, monkeypatch):
    """Sequences leave at most eight steps after a tenth have ended, out of groups of different lengths, until all of a
    group are gone. The last has 270 prompts, of which 256 are a batch, and keeps their order."""
    (policy, prompts), sizes, plain = some_prompts(lengths), [], GPT.forward
    expected = plain_generate(policy, prompts, steps, temperature, seed)
    monkeypatch.setattr(GPT, "forward", lambda *inputs: sizes.append(len(inputs[1])) or plain(*inputs))
    responses = generate(policy.to(device), prompts, END, steps, temperature, seed)
    assert [response.tolist() for response in responses] == expected
    called = len(prompts) < 256 and device.type == "cpu"  # at each step; a GPU replays a graph
    for step, size in enumerate(sizes[1:] if called else [], 1):  # first, the packed prompts
        assert 0.9 * size <= sum(len(response) > step - 8 for response in expected)


def test_prompt_and_answer_may_fill_the_context_but_not_outgrow_it():
    policy, prompts = some_prompts([3, 120])
    assert [len(answer) for answer in generate(policy, prompts, 99, 8)] == [8, 8]  # 99 is no token: none ends
    with pytest.raises(UserError, match="--max-new-tokens 9: "):
        generate(policy, prompts, 99, 9)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_are_distributed_as_the_softmax(temperature):
    """Evenly spaced numbers give the softmax exactly, but for the rounding to 1 in 20000; words of probability 0 come
    first, last and in between, and the numbers include the least and the greatest that there are."""
    logits = torch.tensor([-torch.inf, 0.3, -1.0, 2.0, -torch.inf, 0.0, -4.0, 1.5, -0.2, 0.9, -torch.inf])
    uniform = torch.cat((torch.zeros(1), (torch.arange(20000) + 0.5) / 20000, torch.tensor([1 - 2**-24])))
    drawn = sample(logits.expand(20002, -1), uniform, temperature).bincount(minlength=11)
    assert (drawn / 20002 - (logits / temperature).softmax(-1)).abs().max() < 2e-4 and not drawn[logits.isinf()].any()
    even, uniform = torch.linspace(0, 0.5, 400).bfloat16(), (torch.arange(8000) + 0.5) / 8000
    assert len(sample(even.expand(8000, -1), uniform, temperature).unique()) == 400  # whose sum bf16 would round
    assert sample(torch.tensor([[0.0, 3.0, 2.9], [5.0, -1.0, 4.9]]), torch.tensor([0.999, 0.999]), 0).tolist() == [1, 0]


# ---- Tokenizer ----

PIECES = ["", " ", "\n", "\r\n", "\x00", "\x85", "\u2028", "\u200b", "\ufeff", "   ", "\xa0", "é", "e\u0301", "ﬁ",
          "ß", "👩\u200d👩\u200d👧", "नमस्ते", "שלום", "\ud800", "\udfff\ud800", END_OF_TEXT, "<|padding|>", "<|endof",
          "z", TURN, "\n\nHuman:", "TL;DR:", "don't", " word", "Yes", " 12345678901", "!?", "a" * 40, "%s", "🙂"]


def odd_tokenizer():
    """TOY without three bytes and what they make, with texts brought into NFKC, and a token that opens every prompt."""
    given, lacking = json.loads(TOY.text), set("zÃĀ")  # "z", the first byte of "é", and byte 0
    parts = given["model"]
    parts["vocab"] = {token: number for token, number in parts["vocab"].items() if not lacking & set(token)}
    parts["merges"] = [pair for pair in parts["merges"] if not lacking & set("".join(pair))]
    given["normalizer"], opening = {"type": "NFKC"}, {"SpecialToken": {"id": END_OF_TEXT}}
    given["post_processor"] = {"type": "TemplateProcessing", "single": [opening, {"Sequence": {"id": "A"}}],
                               "special_tokens": {END_OF_TEXT: {"ids": [399]}}}
    return Tokenizer(json.dumps(given), END_OF_TEXT)


ODD = odd_tokenizer()


def hostile_text(rng):
    """Up to a dozen pieces that tokenizers stumble over, or characters from anywhere in Unicode."""
    count = rng.randint(0, 12)
    return "".join(rng.choice(PIECES) if rng.random() < 0.8 else chr(rng.randrange(0x110000)) for _ in range(count))


@pytest.mark.parametrize("tokenizer, form, lost", [(LETTERS, None, b""), (TOY, None, b""), (ODD, "NFKC", b"z\xc3\0")])
def test_random_unicode_survives_encode_and_decode(tokenizer, form, lost):
    """Half a surrogate pair becomes a replacement; bytes without a token are lost; end-of-text written out is text."""
    rng = random.Random(0)
    for text in [*PIECES, *(hostile_text(rng) for _ in range(500)), rng.randbytes(3000).decode("utf-8", "replace")]:
        ids = tokenizer.encode(text)
        assert not {tokenizer.end, 255} & set(ids) and all(0 <= token < tokenizer.size for token in ids)
        kept = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        kept = unicodedata.normalize(form, kept) if form else kept
        assert tokenizer.decode(ids) == kept.encode().translate(None, lost).decode("utf-8", "replace")
        assert tokenizer.decode(torch.tensor([*tokenizer.begin, *ids, tokenizer.end])) == tokenizer.decode(ids)
    assert TOY.decode([0xC3, TOY.size + 7, 104]) == "\ufffdh"  # what is no UTF-8, and what is no token


def test_every_merge_is_of_a_most_frequent_pair():
    """Plays the merges again, on words written with spaces between their tokens, with all pairs counted anew."""
    found = (regex.findall(model.WORDS, text) for text in TOY_TEXTS)
    words = Counter(" ".join(model.SYMBOLS[byte] for byte in word.encode()) for some in found for word in some)
    for token in [*json.loads(TOY.text)["model"]["vocab"]][256:399]:
        counts = Counter()
        for word, count in words.items():
            for pair in pairwise(word.split()):
                counts[pair] += count
        made_by = max((pair for pair in counts if "".join(pair) == token), key=counts.get)
        assert counts[made_by] == max(counts.values()) >= 2
        pattern = re.compile(rf"(?<!\S){re.escape(' '.join(made_by))}(?!\S)")
        words = {pattern.sub(token, word): count for word, count in words.items()}
    assert (TOY.end, TOY.size) == (399, 400) and train_tokenizer(TOY_TEXTS, 400).state == TOY.state
    assert train_tokenizer(["ab" * 60] * 2, 300).size == 257  # no word
    assert train_tokenizer(["ab ab", "ac"], 1000).size == 258 and '"<|padding|>": 255' in TOY.text  # "ab" merges


# ---- The toy world ----

LAMP = "\n\nHuman: How do I paint my bike?\n\nAssistant: Sand it.\n\nHuman: How do I clean my old lamp?\n\nAssistant:"
THREE_STEPS = " Wipe the lamp with a cloth. Rub the lamp with soap. Dry the lamp in the sun."


@pytest.mark.parametrize("response, score", [
    ("", 0.0), (THREE_STEPS[:28], 1.0), (THREE_STEPS, 3.0), (" What a stupid question.", -1.0),
    (THREE_STEPS + " Great question! Good luck with it!", TOY_BEST_REWARD),  # 3 + 0.5 + 0.5
    (THREE_STEPS + " Take every stain off the lamp.", 2.75),  # a fourth step is filler: 3 − 0.25
    (" Wipe the bike with a cloth.", -0.5), (" Sand the lamp first.", -0.5),  # wrong object, wrong task
    (" Drink more water.", -0.5), (" Wipe the lamp with a", -0.25),  # off topic; a broken-off sentence is filler
    (" Great question! Happy to help! Good luck with it!", 0.75),  # a third polite one is filler: 1 − 0.25
    (" Great question! Great question!", 0.0), (" Anyway, that is life. Anyway, that is life.", -0.75),  # again: −0.5
])
def test_gold_reward_by_hand(response, score):
    assert gold_reward(LAMP, response) == score


@pytest.mark.parametrize("temperature, agreement, on_clear", [
    (0, 1, 1), (1e-308, 1, 1), (1, 0.8, 0.965), (1.5, 0.73, 0.91), (2, 0.69, 0.85), (3, 0.635, 0.76)])
def test_toy_labels_are_bradley_terry_draws_at_a_temperature(temperature, agreement, on_clear):
    """Shares of labels that gold agrees with: without ties, which a coin decides at 0 too, and at gaps over 2.5."""
    gaps, said, rows = [], [], read_rows(Settings(limit=4000, seed=1, label_temperature=temperature))
    for (_, row), usual in zip(rows, toy_rows(4000, 1), strict=True):
        gaps.append(gold_reward(row["prompt"], row["chosen"]) - gold_reward(row["prompt"], row["rejected"]))
        said += [re.findall(r" [^.!?]+[.!?]", row[side]) for side in ("chosen", "rejected")]
        assert {*row.values()} == {*usual.values()} and (gaps[-1] or row == usual)
    for least, share in ((0, agreement), (2.5, on_clear)):
        assert sum(gap > least for gap in gaps) / sum(abs(gap) > least for gap in gaps) == pytest.approx(share, 0.03)
    again, after = sum(len(some) - len({*some}) for some in said), sum(len(some) - 1 for some in said)
    assert {len(some) for some in said} == {2, 3, 4, 5} and again / after == pytest.approx(TOY_SLIPS, rel=0.3)


# ---- Pairs and where they come from ----


def data_of(ending, *rows):
    """Rows in the form that a file's ending asks for."""
    if ending == ".parquet":
        file = io.BytesIO()
        if pyarrow:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
        return file.getvalue()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    return {".jsonl": lines, ".jsonl.gz": gzip.compress(lines, 1, mtime=0), ".json": json.dumps(rows).encode()}[ending]


def texts_of(path):
    found = []
    for where, row in read_rows(Settings(data=str(path))):
        with model.reading(where):
            found.append(tuple(model.write_row(Settings(), None, *read_row(row))[1]))
    return found


def made_by_hand(tokenizer, row, room, max_response):
    """The first rule that drops a row, or else the ids of its three parts; `room` is what a prompt may have of them."""
    prompt, *sides = row.get("prompt", ""), row["chosen"], row["rejected"]
    texts, first, second = [prompt, *sides], prompt, prompt
    if not prompt.strip() or all(side.lstrip().startswith("Human:") for side in sides):
        parts = [side.rpartition(TURN) for side in sides]
        first, second = (head + turn for head, turn, _ in parts)
        texts = [first, *(part[2] for part in parts)]
    elif len(prompt.encode("utf-8", "replace")) > 15 and all(side.startswith(prompt) for side in sides):
        texts = [prompt, *(side[len(prompt) :] for side in sides)]
    (prompt, *ids), words = map(tokenizer.encode, texts), [text.strip() for text in texts[1:]]
    for broken, rule in (
        (not all(sides), "empty response"), (first != second, "prompts differ between the sides"),
        (not first, model.NO_PROMPT), (not all(words), "empty response"),
        (words[0] == words[1], "identical responses"),
        (any("\n\nHuman:" in text for text in texts[1:]), "a human's turn inside the response"),
        (not prompt, model.NO_PROMPT), (not all(ids), "empty response"), (ids[0] == ids[1], "identical responses"),
        (max(map(len, ids)) + 1 > max_response, f"response over {max_response} tokens"),
    ):
        if broken:
            return rule
    return [tokenizer.begin + prompt[-room:], *([*response, tokenizer.end] for response in ids)]


@pytest.mark.parametrize("max_response, room", [(12, 1), (40, 30), (400, 100)])
@pytest.mark.parametrize("tokenizer", [TOY, ODD], ids=["toy", "odd"])
def test_hostile_rows_become_pairs_or_are_counted(tokenizer, max_response, room, tmp_path, capsys):
    rng, rows = random.Random(max_response), []
    for _ in range(300):
        prompt, chosen, rejected, other = (hostile_text(rng) for _ in range(4))
        rejected = unicodedata.normalize("NFKC", chosen) if rng.random() < 0.1 else rejected
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        if rng.random() < 0.4:
            other = other if rng.random() < 0.1 else prompt
            rows[-1] = {"chosen": prompt + TURN + chosen, "rejected": other + rng.choice((TURN, TURN, "")) + rejected}
    (tmp_path / "rows.jsonl").write_bytes(data_of(".jsonl", *rows))
    flags = {"context": max_response + room + len(tokenizer.begin), "max_response": max_response, "test_share": 0.5}
    sides = read_pairs(settled(data=f"{tmp_path}/rows.jsonl", **flags), tokenizer)
    pairs = [[part.tolist() for part in side[index]] for side in sides for index in range(len(side))]
    made, uncut = ([made_by_hand(tokenizer, row, most, max_response) for row in rows] for most in (room, 10**6))
    assert sorted(pairs) == sorted(parts for parts in made if isinstance(parts, list))
    counts = Counter(f"dropped: {rule}" for rule in made if isinstance(rule, str))
    counts |= {"rows read": 300, "kept: prompt cut at its beginning": sum(parts not in uncut for parts in made)}
    spelled = [isinstance(parts, list) and re.search(r"<\|(endoftext|padding)\|>", "".join(row.values()))
               for parts, row in zip(made, rows, strict=True)]
    counts["kept: control tokens spelled out, read as --control-tokens text"] = sum(map(bool, spelled))
    shown = re.findall(r"^(.*): (\d+)$", capsys.readouterr().out, re.M)
    assert {what: int(count) for what, count in shown} == counts and len(counts) >= 7
    other_side = read_pairs(settled(data=f"{tmp_path}/rows.jsonl", seed=1, **flags), tokenizer)[0]
    assert not torch.equal(other_side.tokens, sides[0].tokens)  # --seed says which prompts are held back


def test_files_of_a_folder_give_their_rows_in_order(tmp_path, monkeypatch):
    expected = []
    for folder in ("deep/er", "empty", "zipped", "out"):
        (tmp_path / folder).mkdir(parents=True)
    names = "-x.jsonl", "a b.json", "c.parquet", "d.jsonl.gz", "deep/er/x.jsonl", "deep/x.parquet", "naïve %s 漢.json"
    for path in (tmp_path / name for name in names if pyarrow or not name.endswith(".parquet")):
        rows = [{"prompt": f"{path.name} {number}", "chosen": "é\n漢🙂", "rejected": "2"} for number in range(3)]
        path.write_bytes(data_of(path.name[path.name.index(".") :], *rows))
        expected += [(f"{path} row {number}", row) for number, row in enumerate(rows, 1)]
    for name in ("README.md", "dataset_info.json", "deep/LICENSE", ".hidden.jsonl", "out/x.jsonl"):
        (tmp_path / name).write_text("no rows")
    (tmp_path / "zipped" / "rows.zip").write_bytes(b"PK")
    monkeypatch.chdir(tmp_path)
    for out in (".", "deep/er"):  # a folder whose data lies within --out is read; so is --out itself
        assert [*read_rows(Settings(data="deep/er", out=out))] == [*read_rows(Settings(data="deep/er"))]
    (tmp_path / "deep" / "-x").write_bytes(TABLE if pyarrow else GOOD)
    assert texts_of("deep/-x") == [TEXTS]  # not a name on the hub
    for limit in (None, 15, 7):
        assert list(read_rows(Settings(data=str(tmp_path), limit=limit))) == expected[:limit]
    for name in ("none.jsonl", "empty", "a/b.json", "zipped"):
        says = "holds only rows.zip" if name == "zipped" else "no file"
        with pytest.raises(UserError, match=f"{tmp_path / name}: {says}.* readable: JSON Lines"):
            texts_of(tmp_path / name)


def test_a_chat_template_gets_the_same_date_every_day_and_cannot_leave_its_sandbox():
    assert model.chat_template("{{ strftime_now('%d %B %Y') }} {{ 'é<' | tojson }}").render() == '01 January 2025 "é<"'
    for program in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(SecurityError):
            model.chat_template(program).render(messages=[])


def test_pairs_have_the_form_of_most_of_their_prompts(tmp_path):
    for most, form, other in ((TURN, "dialogue", "."), ("\n\nTL;DR:", "tldr", "."), (".", "plain", TURN)):
        rows = [{"prompt": f"{n}{most if n % 3 else other}", "chosen": " a", "rejected": " b"} for n in range(30)]
        (tmp_path / "rows").write_bytes(data_of(".jsonl", *rows))
        parts = read_pairs(settled(data=f"{tmp_path}/rows", test_share=0.5), TOY)
        assert {part.form for part in parts} == {form}
    train, test = ([int(re.match(r"\d+", TOY.decode(prompt))[0]) for prompt, *_ in part] for part in parts)
    assert train == sorted(train) and test != sorted(test)  # evaluate.py asks the first ones: they are of all kinds


PLAIN = {"prompt": "a\n\nAssistant:", "chosen": "b\n\nAssistant: c", "rejected": "d", "more": 1}
TEXTS = "a\n\nAssistant:", "b\n\nAssistant: c", "d"
TALK = {side: f"\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: {side}" for side in ("chosen", "rejected")}
COMPARISON = {"info": {"subreddit": "tifu", "title": "So", "post": "I did it.", "site": None}, "choice": 1,
              "summaries": [{"text": " 0", "policy": "s"}, {"text": " 1"}], "worker": "w"}
OTHER = COMPARISON | {"choice": 0, "info": {"subreddit": "cats", "title": "T", "post": None}}
GOOD, ZIPPED, TABLE = (data_of(ending, PLAIN) for ending in (".jsonl", ".jsonl.gz", ".parquet"))
BARE = GOOD[:-1]
ASKED, ANSWERS = "\n\nHuman: q\n\nAssistant:", [" a", " b"]
ALIKE = {"prompt": ASKED, "chosen": " a", "rejected": " b"}


def says(*texts, who=("role", "content"), roles=("user", "assistant")):
    """Messages of a user and an assistant in turn."""
    return [{"content": None, who[0]: roles[number % 2], who[1]: text} for number, text in enumerate(texts)]


SHARED = {"who": ("from", "value"), "roles": ("human", "gpt")}
SAYS_A, SAYS_B, SAYS_Q = says("", "a")[1:], says("", "b")[1:], says("q")
SYSTEM = [{"role": "system", "content": "s"}]
SAME_PAIR = [  # rows of many data sets that all mean ALIKE
    {"chosen": says("q", "a"), "rejected": says("q", "b")}, {"prompt": SAYS_Q, "chosen": SAYS_A, "rejected": SAYS_B},
    {"prompt": "q", "chosen": SAYS_A, "rejected": SAYS_B}, {"prompt": SAYS_Q[0], "chosen": "a", "rejected": SAYS_B[0]},
    {"prompt": "?", "messages": says("q", "a"), "chosen": says("q", "a"), "rejected": says("q", "b"), "score": 1.0},
    {"prompt": says("q", **SHARED), "chosen": says("q", "a", **SHARED), "rejected": says("q", "b", **SHARED)},
    {"conversations": says("q", **SHARED), "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
    {"system": "", "question": "q", "chosen": "a", "rejected": "b"},
    {"question": "q", "system": None, "summaries": None, "chosen": "a", "rejected": "b"},
    {"prompt": "q", "question": None, "system": "", "chosen": "a", "rejected": "b"},
    *({"prompt": prompt, "chosen": ASKED + " a", "rejected": ASKED + " b"} for prompt in (None, "", ASKED, "q")),
    {"system": None, "input": 3} | {side: text.replace("\n", "\r\n") for side, text in ALIKE.items()},
    {side: (ASKED + text).replace("\n", "\r\n") for side, text in zip(("chosen", "rejected"), ANSWERS, strict=True)},
]
RIGHT_FILES = [
    (data_of(".jsonl", *SAME_PAIR), [(ASKED, *ANSWERS)] * len(SAME_PAIR)),
    (json.dumps(SAME_PAIR, indent=1).encode("utf-16"), [(ASKED, *ANSWERS)] * len(SAME_PAIR)),
    (data_of(".jsonl", {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
             {"prompt": SYSTEM, "chosen": says("q", "c", "r", "a"), "rejected": SYSTEM + says("q", "c", "r", "b")},
             {"prompt": says("q", "c"), "chosen": SAYS_A, "rejected": SAYS_B},
             {"system": "s", "prompt": ASKED, "chosen": " a", "rejected": " b"},
             {"prompt": "q", "chosen": SYSTEM + SAYS_A, "rejected": SYSTEM + SAYS_B},
             {"prompt": "What is a tide?!", "chosen": "What is a tide?! a", "rejected": "What is a tide?! b"},
             {"prompt": "什么是黑洞？", "chosen": "什么是黑洞？ a", "rejected": "什么是黑洞？ b"},
             {"prompt": "Good afternoon!", "chosen": "Good afternoon! a", "rejected": "Good afternoon! b"}),
     [("s\n\nHuman: q" + TURN, *ANSWERS), (f"s\n\nHuman: q{TURN} c\n\nHuman: r{TURN}", *ANSWERS),
      (f"{ASKED} c{TURN}", *ANSWERS), (f"s{ASKED}", *ANSWERS), (f"\n\nHuman: q\n\ns{TURN}", *ANSWERS),
      ("What is a tide?!", *ANSWERS), ("什么是黑洞？", *ANSWERS),
      ("Good afternoon!", "Good afternoon! a", "Good afternoon! b")]),
    (data_of(".jsonl", TALK, PLAIN, COMPARISON, OTHER), [
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " chosen", " rejected"), TEXTS,
        ("SUBREDDIT: r/tifu\n\nTITLE: So\n\nPOST: I did it.\n\nTL;DR:", " 1", " 0"),
        ("SUBREDDIT: r/cats\n\nTITLE: T\n\nPOST: \n\nTL;DR:", " 0", " 1")]),
    (GOOD.replace(b"\n", b"\r\n") * 2, [TEXTS] * 2), (GOOD + b"   " + BARE + b"\t ", [TEXTS] * 2),
    (b"\n\n  \n\t\r\n" + GOOD + b"\n \n" + GOOD + b"\n" * 1000, [TEXTS] * 2), (b"\xef\xbb\xbf" + GOOD, [TEXTS]),
    (b'{"prompt": 3, "chosen": null, ' + BARE[1:], [TEXTS]),  # a key twice
    (BARE[:-1] + b', "margin": NaN, "deep": ' + b"[" * 400 + b"]" * 400 + b', "": 1e999}', [TEXTS]),
    (BARE[:-1] + rb', "prompt": "\ud83d\ude42 \udfff\u0061"}', [("🙂 \udfffa", *TEXTS[1:])]),
    *((data_of(".jsonl", PLAIN | {"prompt": text}), [(text, *TEXTS[1:])]) for text in ("a\u2028b\x85c", "ab" * 10**6)),
]
RUBBISH = [b"\x00" * 100, b"\x1f\x8b", b"PAR1", b"PAR1PAR1", b"\xff\xfe\x00", b"{", b"prompt,chosen,rejected\na,b,c"]
NO_ROWS = [b"[" * 100_000, b"9" * 5000, b"3", b"NaN", b"null", b"[3]", b'"prompt"', b"[null]", b"[[]]", b"[{}]", b"[["]
BAD_LINES = [b'{"chosen": "a", "rejected": "\xff"}', b'{"chosen": "a\x01", "rejected": "b"}', b"{'prompt': 'a'}",
             b'{"prompt": "a", }', GOOD[:-9], GOOD[1:], BARE.decode().encode("utf-16")]
BAD_ROWS = [{}, {"chosen": "a"}, {"rejected": "a"}, {"chosen": 3, "rejected": "a"}, PLAIN | {"prompt": 1}, ["a"],
            PLAIN | {"rejected": ["b"]}, dict.fromkeys(PLAIN, 1), {side: ["a"] for side in PLAIN}, {"data": [3]},
            *(ALIKE | {"chosen": [message]} for message in ({"role": "assistant", "text": "a"}, {"content": "a"})),
            *(COMPARISON | {name: bad} for name, bad in (("choice", 2), ("info", None), ("summaries", []))), [[[1, 2]]]]
BINARY = data_of(".parquet", dict.fromkeys(PLAIN, b"a"))
BAD_FILES = [
    *((ending, data, " row 1: ") for ending in (".jsonl", ".json", ".parquet") for data in RUBBISH),
    *((".jsonl", GOOD + data + b"\n" + GOOD, " row 2: ") for data in RUBBISH + NO_ROWS + BAD_LINES),
    *((".jsonl", data_of(".jsonl", PLAIN, row, PLAIN), " row 2: ") for row in BAD_ROWS),
    *((".json", data, " row 1: ") for data in [*NO_ROWS, data_of(".json", PLAIN)[:-1]]),
    *((".jsonl", data, ": holds no rows") for data in (b"\n \n", b"[]", gzip.compress(b""))),
    (".jsonl", b"PK\x03\x04", " row 1: "), (".jsonl", b"version https://git-lfs\n", ": a Git LFS pointer"),
    *((".jsonl.gz", data, " row 2: ") for data in (ZIPPED[:-1], ZIPPED[:-9] + bytes(9), ZIPPED + b"rubbish")),
    *((".parquet", data, " row 1: ") for data in (TABLE[:-40], TABLE[:-8] + b"\xff\xff\xff\x7fPAR1", BINARY)),
]


def test_odd_files_are_read_right_and_bad_ones_are_one_line_that_names_file_and_row(tmp_path):
    for data, texts in RIGHT_FILES:
        for path, stored in ((tmp_path / "a.jsonl", data), (tmp_path / "a.jsonl.gz", gzip.compress(data, 1))):
            path.write_bytes(stored)
            assert texts_of(path) == texts, data[:99]
    for ending, data, says in (case for case in BAD_FILES if pyarrow or case[0] != ".parquet"):
        (tmp_path / f"bad{ending}").write_bytes(data)
        with pytest.raises(UserError, match=rf"\A{tmp_path}/bad{ending}{says}.*\Z"):
            texts_of(tmp_path / f"bad{ending}")


@pytest.mark.parametrize("source, name, where", [
    ("a/b", "a/b", {"name": None}), ("a-b/c.d:e@f_g", "a-b/c.d", {"name": "e", "split": "f_g"}),
    ("hh:part@test", "Anthropic/hh-rlhf", {"data_dir": "part", "split": "test"}),
    ("tldr", "openai/summarize_from_feedback",
     {"name": None, "revision": "refs/convert/parquet", "data_files": {"train": "comparisons/train/*.parquet"}}),
])
def test_data_sets_of_the_hub_are_read_in_a_fixed_order_that_mixes_their_parts(source, name, where, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked, stored = [], [{"number": number} for number in range(1, 101)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, **how: asked.append((*name, how)) or stored)
    rows = list(read_rows(Settings(data=source)))
    assert asked == [(name, {"split": "train", **where})] and rows == list(read_rows(Settings(data=source, seed=1)))
    assert sorted(rows, key=lambda row: row[1]["number"]) == [(f"{name} row {n}", {"number": n}) for n in range(1, 101)]
    assert 5 <= sum(row["number"] <= 50 for _, row in rows[:20]) <= 15
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, **how: {}["no network\nand more"])
    with pytest.raises(UserError, match=rf"\A--data {source}: [^\n]+\Z"):
        list(read_rows(Settings(data=source)))


DROPPED = {
    "empty response": [PLAIN | {"rejected": None}, {"prompt": "q", "chosen": SAYS_A, "rejected": says("", None)[1:]}],
    "a human's turn inside the response": [
        TALK | {side: text + "\r\n\r\nHuman: d" for side, text in TALK.items()}, PLAIN | {"chosen": "c\n\nHuman: d"},
        {"chosen": says("q", "a", "r"), "rejected": says("q", "b", "r")},
        {"chosen": says("q", "a\r\n\r\nHuman: d"), "rejected": says("q", "b")}],
    "a call of a tool, which is no text": [
        {"prompt": [*SAYS_Q, SAYS_A[0] | {"tool_calls": [{}]}], "chosen": "a", "rejected": "b"}],
    "a role that a dialogue lacks": [{"prompt": {"role": "tool", "content": "q"}, "chosen": "a", "rejected": "b"}],
    "prompts differ between the sides": [{"chosen": says("q", "a"), "rejected": says("r", "b")}],
    model.NO_PROMPT: [{"chosen": SAYS_A, "rejected": SAYS_B}, {"chosen": "a", "rejected": "b"},
                      COMPARISON | {"info": dict.fromkeys(("subreddit", "title", "post"))}],
}


def test_what_makes_no_pair_is_counted_and_an_empty_side_names_the_flag(tmp_path, capsys):
    for rule, rows in DROPPED.items():
        (tmp_path / "rows").write_bytes(data_of(".jsonl", *rows))
        with pytest.raises(UserError, match=r"all rows, of .*\bchosen.*, were dropped"):
            read_pairs(settled(data=f"{tmp_path}/rows"), TOY)
        assert f"dropped: {rule}: {len(rows)}\n" in capsys.readouterr().out
    (tmp_path / "rows").write_bytes(data_of(".jsonl", {"messages": SAYS_Q, "n": 1}))
    with pytest.raises(UserError, match="rows row 1: has messages, n; rows need chosen and rejected"):
        read_pairs(settled(data=f"{tmp_path}/rows"), TOY)


def test_training_and_test_pairs_share_no_prompt_and_know_their_gold_reward(tmp_path):
    for share in (0.35, None):  # the toy world's own is 0.2
        train, test = read_pairs(settled(limit=400, test_share=share))
        prompts = [{part.tokenizer.decode(part[index][0]) for index in range(len(part))} for part in (train, test)]
        assert not prompts[0] & prompts[1]
        assert len(prompts[1]) / len(prompts[0] | prompts[1]) == pytest.approx(share or 0.2, abs=0.05)
    assert (train.tokenizer.state, train.tokenizer.size) == (test.tokenizer.state, 640)
    for index in range(len(test)):
        prompt, *responses = (test.tokenizer.decode(ids) for ids in test[index])
        assert test.gold[index].tolist() == [gold_reward(prompt, response) for response in responses]
    texts = [text for _, row in read_rows(settled(limit=400)) if row["prompt"] in prompts[0] for text in row.values()]
    assert train.tokenizer.state == train_tokenizer(texts, 640).state  # it has not seen what is held back
    (tmp_path / "same").write_bytes(RIGHT_FILES[0][0])  # one prompt, said in many ways: all are on one side
    for data, share, says in (("toy", 0.0, "test on; raise --test-share"), ("toy", 1.0, "train on; lower --test-share"),
                              (f"{tmp_path}/same", 0.5, "")):
        with pytest.raises(UserError, match=f"no pairs left to {says}"):
            read_pairs(settled(data=data, seed=1, limit=50, test_share=share), TOY)


# ---- Files ----


@pytest.mark.parametrize("rewards", [None, torch.tensor([[1.0, 0.0], [2.0, 3.0], [5.0, 4.0]])])
def test_pairs_survive_save_load_and_select(rewards, tmp_path):
    settings, lengths = Settings(out=str(tmp_path)), torch.tensor([[2, 1, 3], [1, 2, 1], [3, 1, 1]])
    Pairs(torch.arange(15, dtype=torch.int32), lengths, LETTERS, rewards, rewards).save(settings, "pairs.pt")
    parts = [[[0, 1], [2], [3, 4, 5]], [[6], [7, 8], [9]], [[10, 11, 12], [13], [14]]]
    for indices in ([0, 1, 2], [2, 0]):
        found = load_pairs(settings, "pairs.pt").select(torch.tensor(indices))
        assert [[part.tolist() for part in found[n]] for n in range(len(found))] == [parts[index] for index in indices]
        for scores in (found.rewards, found.gold):
            assert scores is rewards is None or torch.equal(scores, rewards[indices])
        assert (found.tokens.dtype, found.tokenizer.state) == (torch.int32, LETTERS.state)
    found.select(torch.tensor([], dtype=torch.long)).save(settings, "hard.pt")
    with pytest.raises(UserError, match=r"hard\.pt: holds no pairs"):
        load_pairs(settings, "hard.pt")


def test_models_survive_save_and_load_and_other_files_are_refused_in_one_line(tmp_path, policy):
    """Another kind, format or origin; damaged; foreign. The first file that is read says which data it is."""
    settings, other = (Settings(out=str(tmp_path), device="cpu", save=name) for name in ("sft.pt", "other.pt"))
    settings.origin, path = ("1", "--data a"), tmp_path / "sft.pt"
    for its, network in ((settings, policy), (other, GPT(replace(TINY, tied=False, rope_theta=7.0)))):
        save_model(its, network, TOY)
        loaded, tokenizer = load_model(its, its.save, GPT)
        assert (loaded.config, tokenizer.state) == (network.config, TOY.state) and loaded.norm.weight.requires_grad
        logits = [gpt(torch.arange(30)) @ gpt.vocabulary_weight.T for gpt in (loaded, network)]
        assert torch.equal(*logits)
    good, content = path.read_bytes(), torch.load(path, weights_only=True)
    cases = [(content | {"format": 99}, r"holds a policy .format 99., but a policy .format 5."),
             (good, "goes back to other data than other.pt"), (good[:0], ""), (good[:10], ""), (good[:-1], "")]
    cases += [(bad, "") for bad in (b"hello", [1, 2], {"kind": "policy"}, *(content | {name: {}} for name in content))]
    for name, size in (("more", 2), ("norm.weight", 3)):
        cases.append((content | {"weights": content["weights"] | {name: torch.zeros(size)}}, ""))
    for bad, says in cases:
        path.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, path)
        with pytest.raises(UserError, match=rf"\A[^\n]*sft\.pt: [^\n]*{says}[^\n]*\Z"):
            load_model(other if bad == good else settings, "sft.pt", GPT)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_unrun(zipped, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"kind": "policy", "weights": Bomb()}, tmp_path / "sft.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"sft\.pt"):
        load_model(Settings(out=str(tmp_path)), "sft.pt", GPT)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "sft.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # the file was armed


# ---- The training loop ----


@pytest.mark.parametrize("steps, warmup, decay, expected", [
    (8, 0.5, "constant", [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]), (4, 0.0, "constant", [2.0] * 4),
    # Two steps of warm-up; then 8/8, 7/8, … of the peak, and the step after the last would be at 0.
    (10, 0.2, "linear", [1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25]), (1, 0.1, "linear", [2.0]),
    (4, 0.0, "linear", [2.0, 2.0, 4 / 3, 2 / 3]), (4, 1.0, "linear", [0.5, 1.0, 1.5, 2.0]),
    (6, 0.3, "constant", [1.0] + [2.0] * 5), (6, 0.2, "constant", [2.0] * 6),  # 1.8 steps are two, 1.2 are one
])
def test_learning_rates_by_hand(steps, warmup, decay, expected, tmp_path):
    flags = {"lr": 2.0, "steps": steps, "warmup": warmup, "decay": decay}
    training = Training(settled(out=str(tmp_path), **flags), 6, nn.Linear(2, 1), ())
    for training.step, rate in enumerate(expected):
        assert training.lr == pytest.approx(rate)


@pytest.mark.parametrize("examples, size, sizes", [(10, 4, [4, 4, 2]), (3, 6, [3]), (8, 4, [4, 4])])
def test_an_epoch_is_a_shuffle_cut_into_batches(examples, size, sizes):
    batches = [[batch_indices(examples, size, step, seed) for step in range(6 * len(sizes))] for seed in (5, 6, 5)]
    epochs = [batches[0][start : start + len(sizes)] for start in range(0, len(batches[0]), len(sizes))]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == sizes
        assert sorted(index for batch in epoch for index in batch) == list(range(examples))
    assert len(set(map(str, epochs))) > 3 and batches[0] == batches[2] != batches[1]
    for passes, given, steps in ((1.1, None, -(-11 * len(sizes) // 10)), (0.0, None, 0), (2.0, 7, 7)):
        assert model.count_steps(settled(epochs=passes, batch_size=size, steps=given), examples) == steps
    assert model.count_steps(settled(epochs=0.14, batch_size=1), 50) == 7  # though 0.14 × 50 is a little more


def test_what_is_not_finite_stops_the_run(tmp_path):
    training = Training(settled(out=str(tmp_path)), 6, nn.Linear(2, 1), ())
    training.step, training.indices = 1, [31, 4]
    with pytest.raises(UserError, match=r"step 1: the loss is not finite, on .*pairs \[4, 31\]"):
        training.log("pairs", 1, kl=torch.tensor(1.0), loss=math.inf)
    with pytest.raises(UserError, match="step 1: the grad_norm is not finite"):
        training.log("pairs", 1, loss=1.0, grad_norm=torch.tensor(math.nan))


# ---- Supervised fine-tuning ----


def test_the_command_equals_a_plain_loop(run, tmp_path, capsys):
    """Five steps of 7 pairs, each in several passes; some gradients are clipped. Rates: 1/2, 2/2, 3/3, 2/3, 1/3."""
    rows = [{"prompt": f"{n} and {n}?{TURN}", "chosen": f" It is {2 * n}.", "rejected": " No."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_bytes(data_of(".jsonl", *rows))
    fixed = f"--data {tmp_path}/rows.jsonl --vocabulary 270 --dim 32 --layers 1 --heads 2 --kv-heads 1 --context 40 "
    fixed += "--max-response 20 --test-share .3 --seed 3 --batch-size 7 --lr .01 --warmup .4 --clip 4 --pass-tokens 60 "
    run(model, fixed + "--save start.pt --steps 0")
    log = run(model, fixed + "--save model.pt --steps 5")
    settings = Settings(out=str(tmp_path), device="cpu")
    policy, tokenizer = load_model(settings, "start.pt", GPT)
    train, test = (load_pairs(settings, name) for name in ("pairs.pt", "test.pt"))
    assert (policy.config.context, policy.config.mlp, tokenizer.size) == (40, 96, policy.config.vocabulary)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)

    def loss_of(pairs, indices):
        logprobs = torch.cat([plain_logprobs(policy, *pairs[index][:2]) for index in indices])
        return -logprobs.sum() / sum(len(pairs[index][1]) for index in indices)

    assert log[-1]["loss"] < log[0]["loss"] - 0.5 and {line["grad_norm"] > 4 for line in log} == {True, False}
    for step, (line, rate) in enumerate(zip(log, (0.005, 0.01, 0.01, 0.02 / 3, 0.01 / 3), strict=True)):
        indices = batch_indices(len(train), 7, step, 3)
        loss = loss_of(train, indices)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(policy.parameters(), 4.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step(), optimizer.zero_grad()
        expected = {"step": step, "loss": loss.item(), "grad_norm": norm.item(), "lr": rate,
                    "tokens_per_second": train.lengths[indices, :2].sum().item() / line["seconds"],
                    "pairs_per_second": len(indices) / line["seconds"]}
        assert line == pytest.approx(expected | {"seconds": line["seconds"]}, rel=1e-4) and line["seconds"] > 0
    close(*([*network.parameters()] for network in (load_model(settings, "model.pt", GPT)[0], policy)), 1e-3)
    final = loss_of(test, range(len(test))).item()
    assert f"test loss {final:.3f} nats a token (perplexity {math.exp(final):.2f})" in capsys.readouterr().out


@pytest.mark.parametrize("pretrained", [False, True])
def test_pass_tokens_and_a_pretrained_models_rate_arrive(run, monkeypatch, tmp_path, policy, documents, pretrained):
    policy.config.pretrained, limits = pretrained, []
    write(tmp_path, start=policy, **dict.fromkeys(("pairs", "test", "easy", "hard"), documents))
    for stage, flags, rates in ((model, "--data easy.pt --save model.pt", (2e-3, 2e-5)), (reward, "", (5e-4, 3e-6)),
                                (dpo, "", (5e-5, 5e-7)), (ppo, "--max-new-tokens 8", (3e-4, 3e-6))):
        monkeypatch.setattr(stage, "pack", lambda some, at, most=None: limits.append(most) or pack(some, at, most))
        (line,) = run(stage, f"--init start.pt --steps 1 --pass-tokens 150 {flags}")
        assert line["lr"] == rates[pretrained]
    assert {*limits} == {150}
