"""Mixed Preference Optimization, chapter 1: what every stage shares, and supervised fine-tuning (SFT).

In this order: settings, the GPT, the log-prob kernel, packing, generation; tokenizer, toy world, preference pairs,
files, pretrained weights; several processes, the training loop, and the stage itself. The stage trains a GPT on prompt
and chosen response by cross-entropy on the response tokens,

    L_SFT = − mean over response tokens of log π(token | everything before it),

and writes pairs.pt (training pairs), test.pt (held-back pairs) and sft.pt (the policy that later stages start from).

    python model.py                          # the built-in toy world
    python model.py --data my_pairs.jsonl    # your own pairs
    python model.py --init HuggingFaceTB/SmolLM2-135M --data hh    # a pretrained model, on real data
"""

import argparse
import atexit
import contextlib
import dataclasses
import fcntl
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, get_args, get_origin

import numpy as np
import regex
import tiktoken
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ---- Settings ----


class UserError(Exception):
    """A mistake that the user can mend. Shown as one line on stderr; the exit code is 2."""


REMEDIES = {  # what to do about an error that is the machine's, by a pattern of what it says
    "MemoryError|[Oo]ut of memory|not enough memory|t allocate memory|ALLOC_FAILED":
    "out of memory; lower --pass-tokens, --max-new-tokens, or add --grad-checkpoint, --dtype bf16, where --help has it",
    r"No working C\+\+ compiler|Failed to find C compiler":
    "torch.compile finds no C++ compiler; install one, such as g++, or on a CPU leave out --compile",
}


def flag(default, text: str, *, least=-math.inf, above=-math.inf, most=sys.float_info.max, pretrained=None, **options):
    """A field of a settings class that is a command-line flag, with its bounds; `options` go to argparse. Where
    pretrained models want another default, the field is None until `settle` knows the model."""
    about = {"default": default, "pretrained": pretrained, "help": text, "options": options}
    about |= {"least": least, "above": above, "most": most}
    return dataclasses.field(default=default if pretrained is None else None, metadata=about)


@dataclass
class CommonSettings:
    """The flags that every command has. UserError at a number out of bounds, a name with a folder or another ending."""

    out: str = flag("out", "folder for what the stages write; bare names of .pt files are looked up here first")
    seed: int = flag(0, "seeds weights, toy rows, which prompts are held back, data order and sampling", least=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "auto: cuda, else mps, else cpu")
    dtype: Literal["auto", "fp32", "bf16"] = flag("auto", "of activations; weights and optimiser state stay fp32")
    compile: bool | None = flag(None, "torch.compile the log-prob kernel, and on cuda the blocks [on for cuda]")

    def __post_init__(self):
        self.origin = None  # (id of the data that all files of a run go back to, the file that named it first)
        self.loaded = {}  # by `load`: name → id of the pairs, or of what made the model
        for field in dataclasses.fields(self):
            value, about, ending = getattr(self, field.name), field.metadata, Path(str(field.default)).suffix
            if field.name in ("save", "easy", "hard") and ("/" in value or not value.endswith(ending)):
                raise UserError(f"--{field.name} {value}: the name must end in {ending}; its folder is --out")
            number = type(value) in (int, float)
            if number and not (about["above"] < value and about["least"] <= value <= about["most"]):
                bounds = [f", {name} {about[name]}" for name in ("above", "least", "most") if abs(about[name]) < 1e300]
                raise UserError(f"--{field.name.replace('_', '-')} {value}: out of bounds (finite{''.join(bounds)})")


def parse_settings(settings_class, description: str):
    """Reads the command line into `settings_class`, a flag for each field. Raises UserError at what it cannot read."""

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; see {parser.prog} --help")

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    for field in dataclasses.fields(settings_class):
        about, hint = field.metadata, field.type
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]  # of "X | None", Literal or list[X]
        options = {"type": kinds[0] if kinds else hint}
        if get_origin(hint) is Literal:
            options = {"choices": kinds}
        elif options["type"] is bool:
            options = {"action": argparse.BooleanOptionalAction}
        other = "" if about["pretrained"] is None else f", pretrained {about['pretrained']}"
        text = about["help"] + ("" if about["default"] is None else f" [{about['default']}{other}]")
        options |= {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
        parser.add_argument("--" + field.name.replace("_", "-"), **options | about["options"])
    return settings_class(**vars(parser.parse_args()))


def settle(settings, pretrained: bool) -> None:
    """Fills the fields left None whose default depends on the model."""
    for field in dataclasses.fields(settings):
        if getattr(settings, field.name) is None and field.metadata["pretrained"] is not None:
            setattr(settings, field.name, field.metadata["pretrained" if pretrained else "default"])


# ---- The GPT: a decoder of the Llama family ----


@dataclass
class Config:
    """The shape of a GPT."""

    vocabulary: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int  # width of the MLP
    context: int  # longest prompt + response it is meant for
    rope_theta: float = 10000.0
    rope_scaling: dict[str, float] | None = None  # Llama 3's, see rotary_frequencies
    norm_eps: float = 1e-5
    tied: bool = True  # the output head is the embedding
    head_dim: int = 0  # 0: dim / heads
    family: str = "llama"  # or qwen2 (biases on q, k and v), qwen3 (normalised q and k), smollm3 (see `rotated`)
    rotated: list[int] | None = None  # for each layer, 0 if it has no positions at all; None: all have
    pretrained: bool = False  # weights that were trained elsewhere, for which other defaults are right

    def __post_init__(self):
        self.head_dim = self.head_dim or self.dim // self.heads


LLAMA3_SCALING = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"


def rotary_frequencies(config: Config, device: torch.device) -> Tensor:
    """Angle per position of each pair of a head's dimensions: θ^(−2i/d), [head_dim / 2]. Llama 3.1 (arXiv 2407.21783)
    stretched its context: a pair that makes at most `low` full turns within the original one turns `factor` times
    slower, one that makes `high` or more turns as before, and between these the two are blended."""
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, device=device) / config.head_dim)
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, original = (config.rope_scaling[name] for name in LLAMA3_SCALING)
    turns = original * frequencies / (2 * math.pi)  # full turns within the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864): turns the pairs (x_i, x_{i + d/2}) of each head by
    an angle that grows with position. x: [heads, L, head_dim]; cos, sin: [L, head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
    """Softmax attention of q: [heads, L, head_dim]; returns the same shape. In a packed row, k, v: [kv_heads, L,
    head_dim], and mask is Packed.mask. In a decoding step each query has a cached past of its own, k, v: [L, kv_heads,
    columns, head_dim], and mask is what Cache.step returns."""
    if isinstance(mask, BlockMask):  # on CUDA; on a CPU in tests only
        flex = flex_attention if not q.is_cuda or torch.compiler.is_compiling() else compiled_function(flex_attention)
        options = {"fwd_num_warps": 8}  # with 4, the mask's arithmetic does not fit the registers
        q, k = q.to(v.dtype), k.to(v.dtype)  # which rotation has made fp32
        return flex(q[None], k[None], v[None], block_mask=mask, enable_gqa=True, kernel_options=options)[0]
    decoding = k.dim() == 4
    if decoding:
        # The query heads that share a key head become so many queries of that head, which reads each key once.
        q = q.to(k.dtype).transpose(0, 1).unflatten(1, (k.shape[1], -1))  # (L, kv_heads, heads per key head, head_dim)
        pieces = [(q[rows], k[rows, :, : seen.shape[-1]], v[rows, :, : seen.shape[-1]], seen) for rows, seen in mask]
    else:
        v = v.to(q.dtype)  # fp32: on a CPU a row's attention in bf16 is no faster forward, and takes twice as long back
        sizes, masks = [size for size, _ in mask], [seen for _, seen in mask]
        pieces = zip(q[None].split(sizes, 2), k[None].split(sizes, 2), v[None].split(sizes, 2), masks, strict=True)
    with torch.autocast(q.device.type, enabled=False):  # autocast would cast them
        mixed = [
            F.scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=seen is None, enable_gqa=True)
            for query, key, value, seen in pieces
        ]
    return torch.cat(mixed).flatten(1, 2).transpose(0, 1) if decoding else torch.cat(mixed, 2)[0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias: [L, K], [N, K], [N] → [L, N]. In fp32 on a CPU oneDNN computes it: on some of AMD's
    processors it takes half the time of MKL, PyTorch's choice. F.linear takes oneDNN where x is in its layout."""
    fp32_on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if fp32_on_cpu and not torch.compiler.is_compiling() and torch.backends.mkldnn.is_available():  # not traceable
        return F.linear(x.to_mkldnn(), weight, bias).to_dense()
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """A layer that computes with `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245), [L, dim] → [L, dim]: query heads share key-value
    heads. rotary: as `rotate` takes it; mask: as `attend` does; extend: this layer's Cache.extend, if there is one."""

    def __init__(self, config: Config):
        super().__init__()
        self.split, self.head_dim = (config.heads, config.kv_heads, config.kv_heads), config.head_dim
        self.qkv = Linear(config.dim, sum(self.split) * config.head_dim, bias=config.family == "qwen2")
        self.output = Linear(config.heads * config.head_dim, config.dim, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.family == "qwen3" else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.family == "qwen3" else nn.Identity()

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask, extend: Callable | None = None) -> Tensor:
        heads = self.qkv(x).unflatten(1, (-1, self.head_dim)).transpose(0, 1)  # (heads + 2 kv_heads, L, head_dim)
        q, k, v = heads.split(self.split)
        q, k = rotate(self.q_norm(q.to(x.dtype)), *rotary), rotate(self.k_norm(k.to(x.dtype)), *rotary)
        if extend is not None:
            k, v = extend(k, v)
        return self.output(attend(q, k, v, mask).transpose(0, 1).flatten(1))


class Block(nn.Module):
    """One layer, [L, dim] → [L, dim]: attention, then a SwiGLU MLP (Shazeer 2020, arXiv 2002.05202), each on a
    normalised input and added back."""

    def __init__(self, config: Config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.gate_up = Linear(config.dim, 2 * config.mlp, bias=False)
        self.down = Linear(config.mlp, config.dim, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask, extend: Callable | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, mask, extend)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)  # (L, mlp) each
        return x + self.down(F.silu(gate) * up)


class GPT(nn.Module):
    """`forward` ends at the hidden states, from which log-probs and rewards are read. Logits, where somebody wants
    them, are hidden @ vocabulary_weight.T."""

    kind = "policy"

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocabulary, bias=False)
        self.activations = torch.float32  # dtype of the matrix products
        self.compiled = self.checkpointed = False  # prepare_model sets these as the flags say
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # outputs (logits too) of order 1, but less where layers add up in the residual
                into_stream = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(weight, std=(weight.shape[1] * (2 * config.layers if into_stream else 1)) ** -0.5)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, mask=None, cache=None) -> Tensor:
        """Hidden states [L, dim] of token ids [L]. Without positions [L] and mask, the ids are those of one text. A
        `cache` stores keys and values, and gives those of earlier tokens back."""
        if positions is None:
            positions, mask = torch.arange(len(tokens), device=tokens.device), [(len(tokens), None)]
        angle = positions[:, None] * rotary_frequencies(self.config, tokens.device)  # (L, head_dim / 2)
        rotary = angle.cos(), angle.sin()
        unrotated = torch.ones_like(angle), torch.zeros_like(angle)
        # With bf16 only the matrix products are bf16; the residual stream and the norms stay fp32.
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.activations == torch.bfloat16):
            x = self.embedding(tokens)  # (L, dim)
            for layer, block in enumerate(self.blocks):
                extend = functools.partial(cache.extend, cache.keys[layer], cache.values[layer]) if cache else None
                turn = rotary if self.config.rotated is None or self.config.rotated[layer] else unrotated
                if self.checkpointed and torch.is_grad_enabled():
                    x = checkpoint(block, x, turn, mask, use_reentrant=False, preserve_rng_state=False)
                else:
                    x = block(x, turn, mask, extend)
            return self.norm(x)

    @property
    def vocabulary_weight(self) -> Tensor:
        """The output head's matrix [vocabulary, dim]."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logprobs(self, batch: "Packed", temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [N] of the batch's response tokens, in fp32. Entropies carry no gradient."""
        hidden = self.forward(batch.tokens, batch.positions, batch.mask)[batch.source].to(self.activations)  # (N, dim)
        return token_logprobs(hidden, self.vocabulary_weight, batch.target, temperature, self.compiled)


# ---- The log-prob kernel ----

TILES = {"cpu": (2048, 512), "gpu": (4096, 16384)}  # logits held at once: tokens × vocabulary; a CPU's fit its cache


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden · weightᵀ / temperature) at `targets` [N], and its entropy, without holding the [N, V] logits.
    hidden: [N, dim], fp32 or bf16, the dtype of the matrix products; weight: [V, dim]. Returns (log-probs, entropies),
    [N] each, in fp32. Log-probs carry gradients to hidden and weight; entropies none."""
    return TokenLogprobs.apply(hidden / temperature, weight, targets, compiled)


class TokenLogprobs(torch.autograd.Function):
    """Walks over tiles of the [N, V] logits. Forward is the online softmax of FlashAttention (Dao et al. 2022, arXiv
    2205.14135): it keeps each token's largest logit so far and sums relative to it. Maximum and sum are stored apart:
    a log-sum-exp near 10,000 would round the small logarithm away. Backward makes each tile of the logits again. With
    logits l, m = max l, Z = Σ exp(l − m) and p = exp(l − m) / Z:  ∂ log p_target / ∂l = onehot(target) − p, and the
    entropy is log Z − Σ p (l − m)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, compiled):
        body = compiled_function(logprob_tile) if compiled else logprob_tile
        inputs, matrix = hidden.detach(), weight.detach().to(hidden.dtype)  # else gradients compile a second graph
        running = hidden.new_zeros(4, len(hidden), dtype=torch.float32)  # target, top, total, weighted
        running[1] = torch.finfo(torch.float32).min
        for rows, words in tiles(hidden, matrix):
            running[:, rows] = body(inputs[rows], matrix[words], targets[rows] - words.start, *running[:, rows])
        target, top, total, weighted = running
        logprobs, entropies = (target - top) - total.log(), total.log() - weighted / total
        ctx.save_for_backward(hidden, weight, targets, top, total)
        ctx.compiled = compiled
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, top, total = ctx.saved_tensors
        body = compiled_function(gradient_tile) if ctx.compiled else gradient_tile
        matrix, scale = weight.to(hidden.dtype), grad[:, None]
        grad_hidden = scale * weight[targets]  # the onehot's part; then p's
        grad_weight = torch.zeros_like(weight, dtype=torch.float32).index_add_(0, targets, (scale * hidden).float())
        for rows, words in tiles(hidden, matrix):
            grad_logits = body(hidden[rows], matrix[words], top[rows], -grad[rows] / total[rows])
            grad_hidden[rows] += linear(grad_logits, matrix[words].T)
            grad_weight[words] += linear(grad_logits.T, hidden[rows].T)
        return grad_hidden, grad_weight, None, None


def tiles(hidden: Tensor, matrix: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cuts the [N, V] logits of hidden [N, dim] and matrix [V, dim]: slices of tokens and of the vocabulary."""
    length, width = TILES["cpu" if hidden.device.type == "cpu" else "gpu"]
    for row, word in itertools.product(range(0, len(hidden), length), range(0, len(matrix), width)):
        yield slice(row, row + length), slice(word, word + width)


def logprob_tile(
    hidden: Tensor, matrix: Tensor, places: Tensor, target: Tensor, top: Tensor, total: Tensor, weighted: Tensor
) -> Tensor:
    """Adds a tile of the logits l = hidden · matrixᵀ, [n, dim] and [v, dim], to what is known of n tokens, [n] each:
    the `target`'s logit (0 until it is seen), the `top` logit m, `total` = Σ exp(l − m), and `weighted` = Σ (l − m)
    exp(l − m). Returns the four anew, [4, n]: with drop = old m − new m, each exp(l − m) that is known shrinks by
    exp(drop), and each l − m becomes l − m + drop. places: [n], the targets, counted from the tile's first word."""
    logits = linear(hidden, matrix).float()  # (n, v)
    inside = (places >= 0) & (places < len(matrix))
    target = target + logits.gather(-1, places.clamp(0, len(matrix) - 1)[:, None])[:, 0] * inside
    new_top = torch.maximum(top, logits.amax(-1))
    drop = top - new_top
    shifted = logits.sub_(new_top[:, None])  # in place, here and below: fewer tiles share the cache
    exponentials = shifted.exp()
    weighted = drop.exp() * (weighted + drop * total) + shifted.mul_(exponentials).sum(-1)
    return torch.stack((target, new_top, drop.exp() * total + exponentials.sum(-1), weighted))


def gradient_tile(hidden: Tensor, matrix: Tensor, top: Tensor, scale: Tensor) -> Tensor:
    """exp(l − top) · scale, the softmax's part of the logits' gradient. [n, dim], [v, dim], [n], [n] → [n, v]."""
    logits = linear(hidden, matrix).float()
    return logits.sub_(top[:, None]).exp_().mul_(scale[:, None]).to(matrix.dtype)


@functools.cache
def compiled_function(function):
    """torch.compile of `function`, once a process; `dynamic`, since batches and last tiles differ in size."""
    return torch.compile(function, dynamic=True)


# ---- Packing: documents end to end in one row, no padding between them ----


@dataclass
class Packed:
    """Documents laid end to end in one row of L tokens. A document is a prompt and the branches (responses) that share
    it. Sequences, one for each branch, are numbered document by document. N of the tokens are in responses.

    A prompt p q with the responses a b and c:
        tokens  p q a b c     positions  0 1 2 3 2     document  0 0 0 0 0     branch  0 0 1 1 2
        source  1 2 1     target  a b c     sequence  0 0 1     offset  0 1 0     last  3 4
    """

    tokens: Tensor  # [L]
    positions: Tensor  # [L], counted within prompt + own branch
    document: Tensor  # [L], its number; −1: filler
    branch: Tensor  # [L], 0 in a prompt, 1, 2, … in its branches
    source: Tensor  # [N], index of the token before it on its branch, whose hidden state predicts it
    target: Tensor  # [N], its id
    sequence: Tensor  # [N], its sequence's number
    offset: Tensor  # [N], its place in the response
    last: Tensor  # index of each sequence's last token (of a lone prompt: its own)
    members: Tensor  # of each document, its index in the list that was packed

    @functools.cached_property
    def mask(self) -> "list[tuple[int, Tensor | None]] | BlockMask":
        """Who may attend to whom: on CUDA a FlexAttention block mask; elsewhere, for each document, its length n and a
        dense [n, n], or None where every token sees all before it."""
        if self.tokens.is_cuda:
            return block_mask(self.document, self.branch)
        masks, sizes = [], self.document.unique_consecutive(return_counts=True)[1].tolist()
        for document, branch in zip(self.document.split(sizes), self.branch.split(sizes), strict=True):
            at, forks = torch.arange(len(branch), device=branch.device), branch.max() > 1
            masks.append((len(branch), visibility(document, branch)(0, 0, at[:, None], at) if forks else None))
        return masks


def visibility(document: Tensor, branch: Tensor):
    """The rule of packed attention, as a FlexAttention mask_mod: a query sees a key of the same document, not later
    in the row, that lies in the prompt or on the query's own branch. Documents and branches are intervals of the row,
    so it compares places, which takes less arithmetic than comparing their numbers. document, branch: [L]."""
    at = torch.arange(len(document), device=document.device)
    new_document = F.pad(document.diff() != 0, (1, 0), value=True)
    new_branch = new_document | F.pad(branch.diff() != 0, (1, 0), value=True)
    start = torch.where(new_document, at, 0).cummax(0).values  # [L]: where each token's document begins
    prompt_end = torch.where(branch == 0, at + 1, 0).cummax(0).values  # behind its prompt; in a prompt: behind itself
    branch_start = torch.where(new_branch, at, 0).cummax(0).values  # where its branch begins; in a prompt: the document

    def rule(batch, head, query, key):
        return (key <= query) & (key >= start[query]) & ((key < prompt_end[query]) | (key >= branch_start[query]))

    return rule


def block_mask(document: Tensor, branch: Tensor) -> BlockMask:
    """visibility's block mask, for L a multiple of 128: a block of 128 queries looks at every block from the one where
    the document of its first query begins, up to itself. create_block_mask would find that by trying all L² pairs."""
    block = torch.arange(len(document) // 128, device=document.device)
    first = (document[::128, None] == document).int().argmax(1) // 128  # (blocks)
    count, looked_at = block - first + 1, (first[:, None] + block).clamp(max=len(block) - 1)  # (blocks, blocks)
    return BlockMask.from_kv_blocks(
        count[None, None].int(), looked_at[None, None].int(), BLOCK_SIZE=128, mask_mod=visibility(document, branch)
    )


def pack(documents: list[tuple[Tensor, ...]], device: torch.device, pass_tokens: int | None = None) -> Iterator[Packed]:
    """Packs documents, each (prompt, response, response, …), into rows; yields one `Packed` for each forward pass of
    about `pass_tokens` tokens [default: what suits the device]. Sorted by length, documents go to the passes in turn,
    so all are about equally long. Each process gets other documents, in equally many passes, some perhaps empty."""
    rank, count = processes()
    sizes = [sum(map(len, document)) for document in documents]
    by_length = sorted(range(len(documents)), key=lambda index: -sizes[index])
    room = pass_tokens or (32768 if device.type == "cuda" else 4096)
    passes = count * max(1, math.ceil(min(sum(sizes) / room, len(documents)) / count))  # of all processes
    for number in range(rank, passes, count):  # of this one
        yield lay_out(documents, by_length[number::passes], device)


def lay_out(documents: list[tuple[Tensor, ...]], members: list[int], device: torch.device) -> Packed:
    """The documents that `members` lists as one Packed. An empty row, and on CUDA the end of a row, is filled with
    token 0, which nobody looks at."""
    parts, about = [], []  # of each part: document, branch, which part is its prompt, and if a sequence ends with it
    for number, index in enumerate(members):
        count = len(documents[index])
        about += [(number, branch, len(parts), branch > 0 or count == 1) for branch in range(count)]
        parts += documents[index]
    length = sum(len(part) for part in parts)
    multiple = 1024 if device.type == "cuda" else 1  # few lengths, each a multiple of a block mask's 128
    about.append((-1, 0, len(parts), False))
    parts.append(torch.zeros(-(-max(1, length) // multiple) * multiple - length, dtype=torch.long))

    tokens, lengths = torch.cat(parts), torch.tensor([len(part) for part in parts])
    ends, (document, branch, prompt, is_last) = lengths.cumsum(0), torch.tensor(about).T  # (parts) each
    part_of = torch.arange(len(parts)).repeat_interleave(lengths)  # (L), as the next six: each token's part
    at, response = torch.arange(len(tokens)), branch[part_of] > 0
    offset = at - (ends - lengths)[part_of]
    positions = offset + lengths[prompt][part_of] * response
    # The prompt's last token predicts the first token of every response; hence an index, not a shift.
    source = torch.where(offset == 0, ends[prompt][part_of], at) - 1
    sequence = (is_last.cumsum(0) - 1)[part_of]
    row = tokens, positions, document[part_of], branch[part_of]
    answers = source[response], tokens[response], sequence[response], offset[response]
    tensors = (*row, *answers, ends[is_last > 0] - 1, torch.tensor(members, dtype=torch.long))
    if device.type == "cuda":
        tensors = (tensor.pin_memory() for tensor in tensors)  # or the copies would wait for the GPU
    return Packed(*(tensor.to(device, non_blocking=True) for tensor in tensors))


# ---- Generation ----


class Cache:
    """Keys and values, [layers, S, kv_heads, width, head_dim] each, of S sequences being generated, sorted by the
    prompt's length, the longest first. A token's column is its position. The width never changes, and on CUDA a step
    fetches no number from the GPU: so it can be captured as a graph."""

    def __init__(self, config: Config, prompts: Packed, steps: int, dtype: torch.dtype):
        self.positions, device = prompts.positions[prompts.last], prompts.tokens.device  # (S), of their last tokens
        width = -(-(int(self.positions[0]) + 1 + steps) // 16) * 16  # CUDA's attention wants its bias aligned
        shape = config.layers, len(prompts.last), config.kv_heads, width, config.head_dim  # no views: they compile anew
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        places = (prompts.document >= 0).nonzero()[:, 0]  # of the prompts' tokens in the row
        # Where `extend` stores the next tokens: their places among its k and v, their sequences, their columns.
        self.new = places, prompts.document[places], prompts.positions[places]
        self.decoding = False

    def step(self) -> list[tuple[slice, Tensor]]:
        """Moves on to a new token of each sequence. Returns its attention's mask, which is added to the scores, −∞ at
        columns not yet in use: (sequences, [n, 1, 1, columns]). On CUDA all sequences at once, at full width; on a CPU
        few of like length at a time, up to the longest's column."""
        every = torch.arange(len(self.positions), device=self.positions.device)
        self.positions += 1
        self.new, self.decoding = (slice(None), every, self.positions), True
        later = torch.arange(self.keys.shape[3], device=self.keys.device) > self.positions[:, None, None, None]
        bias = self.keys.new_zeros(later.shape).masked_fill(later, -math.inf)  # (S, 1, 1, width)
        if bias.is_cuda:
            return [(slice(None), bias)]
        groups = [slice(start, start + 8) for start in range(0, len(bias), 8)]
        return [(rows, bias[rows, :, :, : int(self.positions[rows][0]) + 1]) for rows in groups]

    def keep(self, going: Tensor) -> None:
        """Drops the sequences that are not `going`, [S] bool."""
        self.positions, self.keys, self.values = self.positions[going], self.keys[:, going], self.values[:, going]

    def extend(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v [kv_heads, L, head_dim] of L new tokens in a layer's keys and values, [S, kv_heads, width,
        head_dim]. Returns what the new tokens attend to: k and v for the prompts, the layer's whole cache in a step."""
        places, sequence, column = self.new
        for cached, made in ((keys, k), (values, v)):
            cached[sequence, :, column] = made.transpose(0, 1)[places].to(cached.dtype)
        return (keys, values) if self.decoding else (k, v)


def sample(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Draws token ids [S] from softmax(logits / temperature), [S, V], by inverting its cumulative distribution at
    `uniform`, [S] in [0, 1). Temperature 0 takes the most likely. One number a token makes a sample depend on its own
    sequence alone, and costs far less than one per vocabulary entry."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return drawn.clamp(max=logits.shape[-1] - 1)  # for logits that are not numbers, else V would be drawn


def require_room(config: Config, prompts: Iterable[Tensor], max_new_tokens: int) -> None:
    """Raises UserError if a prompt and its answer could outgrow the model's context."""
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_new_tokens > config.context:
        raise UserError(f"--max-new-tokens {max_new_tokens}: with a prompt of {longest} tokens that is over the "
                        f"context of {config.context}; lower the one or shorten the other")


@torch.no_grad()
def generate(
    model: GPT, prompts: list[Tensor], end: int, max_new_tokens: int, temperature: float = 1.0, seed: int = 0
) -> list[Tensor]:
    """Samples a response to each prompt from the full softmax; `end` stops a response and is kept in it. Prompts are
    tensors of token ids, none empty; responses of 1 to max_new_tokens ids, on the CPU. One depends on its prompt, its
    place in the list, max_new_tokens and the seed, not on what it is batched with. Raises UserError if prompt and
    response could outgrow the model's context."""
    require_room(model.config, prompts, max_new_tokens)
    noise = torch.rand(len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed))
    rank, count = processes()
    by_length = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))[rank::count]
    tokens, copy = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long), unsharded_copy(model)
    for start in range(0, len(by_length), 256):
        some = by_length[start : start + 256]
        tokens[some] = decode(copy, [prompts[index] for index in some], noise[some], end, temperature)
    return [row[: int((row != end).sum()) + 1] for row in summed(tokens)]


def unsharded_copy(model: GPT) -> GPT:
    """The model for generation: every process has all weights, so that it can take steps of its own, and the blocks'
    matrices have the products' dtype already. In one process the rest shares its memory with the model."""
    weights = dcp.get_model_state_dict(model, options=UNSHARDED)
    for name, weight in weights.items():
        if name.startswith("blocks.") and weight.dim() == 2:
            weights[name] = weight.to(model.activations)
    with torch.device("meta"):  # shapes without numbers, so that there is nothing to draw
        copy = GPT(model.config).requires_grad_(False)
    copy.load_state_dict(weights, assign=True)
    copy.activations, copy.compiled = model.activations, model.compiled
    compile_blocks(copy, weights["embedding.weight"].device)
    return copy


def decode(model: GPT, prompts: list[Tensor], noise: Tensor, end: int, temperature: float) -> Tensor:
    """Token ids [S, max_new_tokens] sampled with a key-value cache, `prompts` in falling order of their lengths; a row
    is `end` from its first `end` on."""
    device, (count, steps) = model.embedding.weight.device, noise.shape
    batch = lay_out([(prompt,) for prompt in prompts], list(range(count)), device)
    cache = Cache(model.config, batch, steps, model.activations)
    hidden = model(batch.tokens, batch.positions, batch.mask, cache)[batch.last]  # (S, dim)
    head, noise = model.vocabulary_weight.to(model.activations), noise.to(device)
    drawn = sample(linear(hidden.to(head.dtype), head), noise[:, 0], temperature)  # (S), the newest token of each
    result, live = torch.full((count, steps), end, device=device), torch.arange(count, device=device)
    column, graph = torch.zeros(1, dtype=torch.long, device=device), None
    result[:, 0] = drawn

    def advance() -> None:  # all in place, so that replaying it as a graph goes on
        mask = cache.step()
        hidden = model(drawn, cache.positions, mask, cache)
        column.add_(1)
        new = sample(linear(hidden.to(head.dtype), head), noise[live, column], temperature)
        drawn.copy_(new.masked_fill(drawn == end, end))
        result[live, column] = drawn

    for step in range(1, steps):
        if step % 8 == 0:  # now and then, the finished leave the batch
            going = drawn != end  # (S)
            if not going.any():
                break
            if going.sum() < (0.5 if device.type == "cuda" else 0.9) * len(going):  # capturing anew takes its time
                cache.keep(going)
                drawn, live, graph = drawn[going], live[going], None
        if graph is not None:
            graph.replay()
        else:
            advance()
            if device.type == "cuda":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    advance()  # is recorded only, for the steps to come
    return result.cpu()


# ---- Tokenizer: byte-level byte-pair encoding ----

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
SHIELD = "\ufdd0"  # put into a control token's name where it is meant as text; Unicode keeps it for such use
CUT = "\udcff"  # put between words: surrogateescape writes it as byte 255, which no UTF-8 text holds
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # as in GPT-2
# tokenizer.json spells a byte as a character that prints: the one of that number, or else the next one from 256 up.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
SYMBOLS = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + place) for place, byte in enumerate(OTHERS)}
BYTES = {symbol: byte for byte, symbol in SYMBOLS.items()}


class Tokenizer:
    """Text to token ids and back as a tokenizer.json says; the merging itself is tiktoken's.

    text: the tokenizer.json; end: name of the token that closes a response; template: the chat template, if any; bos:
    what it calls bos_token; state: these four, as files hold them. special: control tokens, name → id; begin: ids that
    open every prompt; size: largest id + 1. Raises ValueError where the tokenizers library's ids would differ.
    """

    def __init__(self, text: str, end: str, template: str | None = None, bos: str | None = None):
        given = json.loads(text)
        if given["model"]["type"] != "BPE":
            raise ValueError(f"a model of type {given['model']['type']}")
        vocabulary, added = given["model"]["vocab"], given["added_tokens"]
        self.added = {token["content"]: token["id"] for token in added}  # control tokens and others
        self.special = {token["content"]: token["id"] for token in added if token["special"]}
        self.text, self.template, self.end = text, template, self.special[end]
        self.form, self.words, self.begin = read_steps(given)
        bos = bos or next((name for name in self.special if self.begin[:1] == [self.special[name]]), None)
        self.names = {"eos_token": end} | ({"bos_token": bos} if bos else {})  # as templates know them
        self.state = {"text": text, "end": end, "template": template, "bos": bos}
        names = self.added.keys() - BYTES.keys()  # "!" may be a padding token beside
        spelled = {token: number for token, number in vocabulary.items() if token not in names}
        require_rank_merging(given, spelled)
        self.size = 1 + max(*vocabulary.values(), *self.added.values())
        self.bytes = {number: bytes(map(BYTES.__getitem__, token)) for token, number in spelled.items()}
        self.bytes |= {number: name.encode() for name, number in self.added.items() if name not in self.special}
        # Where a text is cut, and into what: added tokens first, some found in its Unicode form; then words.
        plain = {token["content"]: token["normalized"] for token in added if not token["special"]}
        control = [name for name in self.special if len(name) > 1]  # a lone "!" is text wherever it stands
        self.control, self.verbatim = any_of(control), any_of(control + [name for name in plain if not plain[name]])
        self.in_form = any_of(name for name in plain if plain[name])
        # tiktoken reads words as they are spelled here, with spaces between.
        self.spelling = {byte: symbol if symbol in spelled else None for byte, symbol in SYMBOLS.items()} | {255: " "}
        ranks = {token.encode(): number for token, number in spelled.items()}
        self.encoding = tiktoken.Encoding("mpo", pat_str="[^ ]+", mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str, control: bool = False) -> list[int]:
        """Token ids of `text`, without those that open a prompt and close a response. The names of control tokens are
        ordinary text; with `control` they are these tokens, except where a shield says that they are text."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a surrogate pair is U+FFFD
        ids = []
        for piece in self.verbatim.split(text if control else self.shield(text)):
            if self.verbatim.fullmatch(piece):
                ids.append(self.added[piece])
                continue
            piece = piece.replace(SHIELD, "")
            for part in self.in_form.split(unicodedata.normalize(self.form, piece) if self.form else piece):
                if self.in_form.fullmatch(part):
                    ids.append(self.added[part])
                    continue
                for pattern in self.words:  # each cuts the words into what it finds and what lies between
                    part = CUT.join(pattern.sub(rf"{CUT}\g<0>{CUT}", word) for word in part.split(CUT))
                # A byte that the vocabulary lacks is dropped before its neighbours are merged.
                spelled = part.encode("utf-8", "surrogateescape").decode("latin-1").translate(self.spelling)
                ids += self.encoding.encode_ordinary(spelled)
        return ids

    def decode(self, ids: list[int] | Tensor) -> str:
        """Text of `ids` without control tokens; bytes that are not UTF-8 become U+FFFD, ids without a token nothing."""
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        return b"".join(self.bytes.get(number, b"") for number in ids).decode("utf-8", "replace")

    def shield(self, text: str) -> str:
        """The text, in which names of control tokens stay text when it is encoded with `control`."""
        return self.control.sub(lambda match: SHIELD.join(match[0]), text)


def any_of(names: Iterable[str]) -> re.Pattern:
    """Finds any of `names`, the longest of those that begin at a place; its split() returns them too."""
    return re.compile(f"({'|'.join(sorted(map(re.escape, names), key=len, reverse=True)) or '(?!)'})")


def read_steps(given: dict) -> tuple[str | None, list[regex.Pattern], list[int]]:
    """What a tokenizer.json does to a text: the Unicode form, such as NFC, into which it is brought, if any; patterns
    that cut it into words, one after the other; ids that are set before it, such as Llama 3's begin-of-text."""
    form, patterns, begin = None, [], []
    sequences = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
    for kind, several in sequences.items():
        part = given.get(kind)
        steps = (part.get(several, [part]) if part else []) or [None]
        for step in steps:
            match kind, step, step is steps[-1]:
                case "normalizer", {"type": "NFC" | "NFD" | "NFKC" | "NFKD"}, _ if len(steps) == 1:
                    form = step["type"]
                case "pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False}, True:
                    patterns += [WORDS] if step.get("use_regex", True) else []
                case "pre_tokenizer", {"type": "Split", "behavior": "Isolated", "invert": False}, False:
                    patterns.append(step["pattern"]["Regex"])
                case "pre_tokenizer", {"type": "Digits", "individual_digits": True}, False:
                    patterns.append(r"\p{N}")
                case "post_processor", {"type": "TemplateProcessing", "single": pieces, "special_tokens": special}, _:
                    for piece in itertools.takewhile(lambda piece: "SpecialToken" in piece, pieces):
                        begin += special[piece["SpecialToken"]["id"]]["ids"]
                case ("post_processor", {"type": "ByteLevel"}, _) | ("post_processor" | "normalizer", None, _):
                    pass
                case _:
                    raise ValueError(f"{kind} {json.dumps(given.get(kind))[:200]}")
    return form, [regex.compile(pattern, regex.V1) for pattern in patterns], begin


def require_rank_merging(given: dict, spelled: dict[str, int]) -> None:
    """Raises ValueError where tiktoken, which always merges the neighbours that make the token of the lowest id, would
    give other ids (of merges that were trained, not edited). spelled: the vocabulary without added tokens."""
    model = given["model"]
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "unk_token"):
        if model.get(name) and not (name == "unk_token" and BYTES.keys() <= spelled.keys()):
            raise ValueError(f"{name} {model[name]!r}")
    for token in given["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise ValueError(f"added token {token['content']!r} with lstrip, rstrip or single_word")
    made = ["".join(pair).replace(" ", "") for pair in model["merges"]]  # older files write a pair as "a b"
    # In the order in which tokens are made, the bytes first, their ids must rise.
    ids = [max(spelled.get(symbol, 0) for symbol in BYTES), *dict.fromkeys(spelled[token] for token in made)]
    if ids != sorted(ids):
        raise ValueError("a list of merges that is not in the order of the tokens' ids")
    unmade = {token for token in spelled if len(token) > 1} - set(made)
    if unmade and not model.get("ignore_merges"):
        raise ValueError(f"token {min(unmade)!r}, which no merge makes")


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """Trains a BPE of at most `size` tokens: merges the most frequent pair of neighbours, again and again (Sennrich et
    al. 2016, arXiv 1508.07909, on bytes as in GPT-2). A merge updates the pair counts of the words that it touches."""
    found = (word for text in texts for word in regex.findall(WORDS, text))
    frequency = Counter(word for word in found if len(word) <= 100)  # what is longer is no word, and would take minutes
    # A word is written as its tokens, each between two spaces, which no symbol is: " a  b  cd ".
    words = [f" {'  '.join(map(SYMBOLS.__getitem__, word.encode('utf-8', 'replace')))} " for word in frequency]
    weights, counts, found_in = list(frequency.values()), Counter(), defaultdict(set)

    def count_pairs(index: int, sign: int) -> None:
        for pair in itertools.pairwise(words[index].split()):
            counts[pair] += sign * weights[index]
            found_in[pair].add(index)

    for index in range(len(words)):
        count_pairs(index, +1)
    tokens = {SYMBOLS[byte]: byte for byte in range(256)}
    while len(tokens) < size - 1 and counts:
        first, second = pair = max(counts, key=counts.get)
        if counts[pair] < 2:
            break
        tokens.setdefault(first + second, len(tokens))
        for index in sorted(found_in.pop(pair)):
            count_pairs(index, -1)
            words[index] = words[index].replace(f" {first}  {second} ", f" {first}{second} ")
            count_pairs(index, +1)
        del counts[pair]
    return Tokenizer(tokenizer_json(tokens), END_OF_TEXT)


def tokenizer_json(tokens: dict[str, int]) -> str:
    """A tokenizer.json of these tokens, in the order of their ids, and the end of a text. Padding takes the place of
    byte 255, for which UTF-8 has no use."""
    merges = []
    for token in tokens:  # merging by rank, written out: any two neighbours that make a token may merge
        pairs = [(token[:place], token[place:]) for place in range(1, len(token))]
        merges += [pair for pair in pairs if pair[0] in tokens and pair[1] in tokens]
    plain = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    added = [{"id": 255, "content": PADDING} | plain, {"id": len(tokens), "content": END_OF_TEXT} | plain]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}  # by WORDS
    vocabulary = {PADDING if number == 255 else token: number for token, number in tokens.items()}
    return json.dumps({
        "version": "1.0", "added_tokens": added, "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary | {END_OF_TEXT: len(tokens)}, "merges": merges},
    }, ensure_ascii=False)


# ---- The toy world: dialogues in which goodness is known ----

TURN = "\n\nAssistant:"
TOY_STEPS = {  # task: what helps with it; {} is the object that the prompt asks about
    "clean": ["Wipe the {} with a cloth.", "Brush the dust off the {}.", "Rinse the {} in warm water.",
              "Rub the {} with soap.", "Dry the {} in the sun.", "Take every stain off the {}."],
    "paint": ["Sand the {} first.", "Put primer on the {}.", "Choose a color for the {}.",
              "Let the {} dry for a day.", "Cover the {} with two coats.", "Protect the {} with wax."],
    "repair": ["Take the {} apart.", "Glue the broken part of the {}.", "Order a spare part for the {}.",
               "Tighten the screws of the {}.", "Oil the {} a little.", "Test the {} at the end."],
    "move": ["Measure the {} and the door.", "Wrap the {} in a blanket.", "Ask a friend to lift the {}.",
             "Clear a path for the {}.", "Strap the {} to a cart.", "Carry the {} slowly."],
    "sell": ["Take photos of the {}.", "Write an ad for the {}.", "Offer the {} to a friend.",
             "Agree on a price for the {}.", "Show the {} to a dealer.", "Find out what the {} is worth."],
}
TOY_OBJECTS = "lamp bike chair table clock guitar piano sofa mirror carpet kettle camera radio ladder drum boat".split()
TOY_ABOUT = {step.format(thing): {task, thing}  # of every step: its task and object
             for task, steps in TOY_STEPS.items() for step in steps for thing in TOY_OBJECTS}
TOY_ADJECTIVES = "old new small big heavy cheap red blue green black white dirty plain lovely spare odd".split()
TOY_PROMPTS = ["How do I {} my {} {}?", "What is the best way to {} a {} {}?", "Can you help me {} this {} {}?",
               "I want to {} my {} {}.", "How would you {} the {} {}?", "Please help me to {} my {} {}."]
TOY_POLITE = ["Happy to help!", "Great question!", "Good luck with it!", "Let me know how it goes!"]
TOY_RUDE = ["What a stupid question.", "Only a fool would ask that.", "Stop wasting my time."]
TOY_OFF_TOPIC = ["Boil the rice for ten minutes.", "Feed the cat twice a day.", "Water the roses at night.",
                 "Learn ten new words a week.", "Drink more water."]
TOY_FILLER = ["Well, it depends.", "There are many ways to see this.", "Some people do it and some do not.",
              "Anyway, that is life."]
TOY_BEST_REWARD = 4.0  # three steps and two polite sentences, nothing else
# Probability of each slip: a step for another task, about another object, a sentence said again. They are rare: the
# more there are the less rewards agree with gold, and even at 20% the reward model ranks only half of them right.
TOY_SLIPS = 0.01
# At this temperature the gold reward agrees with 69% of the labels of pairs that differ in it: about the middle of what
# is reported for people, 63% on HH-RLHF (Bai et al. 2022) and 73% on TL;DR (Stiennon et al. 2020).
TOY_TEMPERATURE = 2.0


def gold_reward(prompt: str, response: str) -> float:
    """How good `response` is, for any text at all: the truth of the toy world.

    1 for each distinct step that belongs to the asked task and names the asked object, up to three; 0.5 for each
    distinct polite sentence, up to two; −1 for each distinct rude one; −0.5 for each off topic (a step for another task
    or object too) and for each said again; −0.25 for all else: filler, a fourth step, a third politeness.
    """
    asked = set(re.findall(r"\w+", prompt.rpartition("\n\nHuman:")[2]))
    sentences = [sentence.strip() for sentence in re.findall(r"[^.!?]+[.!?]?", response) if sentence.strip()]
    score, steps, polite = 0.0, 0, 0
    for place, sentence in enumerate(sentences):
        about = TOY_ABOUT.get(sentence, set())
        if sentence in sentences[:place] or sentence in TOY_OFF_TOPIC or not about <= asked:
            score -= 0.5
        elif about and steps < 3:
            steps += 1
        elif sentence in TOY_POLITE and polite < 2:
            polite += 1
        elif sentence in TOY_RUDE:
            score -= 1.0
        else:
            score -= 0.25
    return score + steps + 0.5 * polite


def toy_response(rng: random.Random, task: str, thing: str) -> str:
    """One response: two to five sentences, more of them helpful the higher its hidden quality was drawn."""
    quality = rng.random()
    kinds = [None, TOY_OFF_TOPIC, TOY_POLITE, TOY_RUDE, TOY_FILLER]  # None: steps
    weights = [0.25 + 0.5 * quality, 0.3 - 0.25 * quality, 0.1 + 0.1 * quality, 0.2 - 0.2 * quality, 0.15]
    sentences = []
    for fixed in rng.choices(kinds, weights, k=rng.randint(2, 5)):
        about_task = rng.choice(list(TOY_STEPS)) if rng.random() < TOY_SLIPS else task
        about_thing = rng.choice(TOY_OBJECTS) if rng.random() < TOY_SLIPS else thing
        options = fixed or [step.format(about_thing) for step in TOY_STEPS[about_task]]
        unsaid = [option for option in options if option not in sentences] or options
        said_again = sentences and rng.random() < TOY_SLIPS
        sentences.append(rng.choice(sentences if said_again else unsaid))
    return " " + " ".join(sentences)


def toy_rows(count: int, seed: int, temperature: float = TOY_TEMPERATURE) -> Iterator[dict]:
    """Yields `count` rows of the toy world. The labels are Bradley-Terry draws: the first response is chosen with
    probability σ(gold gap / temperature). At temperature 0 no label is wrong, and a coin decides ties."""
    rng = random.Random(seed)
    for _ in range(count):
        task, thing = rng.choice(list(TOY_STEPS)), rng.choice(TOY_OBJECTS)
        prompt = f"\n\nHuman: {rng.choice(TOY_PROMPTS).format(task, rng.choice(TOY_ADJECTIVES), thing)}{TURN}"
        first, second = toy_response(rng, task, thing), toy_response(rng, task, thing)
        gap = gold_reward(prompt, first) - gold_reward(prompt, second)
        # σ(x) = (1 + tanh(x / 2)) / 2, which does not overflow; gaps are multiples of 0.25, so 1e-9 does for 0.
        if rng.random() >= (1 + math.tanh(gap / max(2 * temperature, 1e-9))) / 2:
            first, second = second, first
        yield {"prompt": prompt, "chosen": first, "rejected": second}


# ---- Preference pairs and where they come from ----
# A row's way: read_rows finds it, read_row makes (prompt, chosen, rejected) of it, write_row texts, encode_row ids.

HUMAN = "\n\nHuman:"
# How a question is put, and messages where the model has no chat template; these are templates too.
FORMS = {"dialogue": """{% for said in messages %}
{{ {"system": "" if loop.first else "\n\n", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}[said.role]
 + said.content }}
{%- endfor %}{{ "\n\nAssistant:" if add_generation_prompt }}""",
         "tldr": "POST: {{ messages[0].content }}\n\nTL;DR:", "plain": "{{ messages[0].content }}"}
ROLES = {"human": "user", "gpt": "assistant"}  # other names of them
LINES = re.compile(r"\r?\n\r?\n(Human|Assistant):")  # a turn, however lines end
NO_PROMPT = f"no prompt, nor a transcript with {TURN!r}"
LAYOUTS = "rows need chosen and rejected (texts or messages), and a prompt beside them or at their head; or are TL;DR's"
HUB = {  # short names: repository, which argument of load_dataset a part of it is, its other arguments
    "hh": ("Anthropic/hh-rlhf", "data_dir", {}),
    # The main branch holds a script, which the library no longer runs; this one holds tables.
    "tldr": ("openai/summarize_from_feedback", "name",
             {"revision": "refs/convert/parquet", "data_files": {"train": "comparisons/train/*.parquet"}}),
}
FILES = "readable: JSON Lines and JSON, gzipped or not, and parquet"
ENDINGS = ".jsonl", ".ndjson", ".json", ".parquet", ".gz"  # of a folder's files; a file may have any
ABOUT = re.compile(r"(dataset_infos?|dataset_dict|state|metadata|config)\.json")  # tell about a folder's data


@dataclass
class Pairs:
    """n preference pairs as token ids. Each response ends in the end-of-text token.

    tokens: [total] int32, prompt + chosen + rejected of every pair end to end; lengths: [n, 3] of the three parts;
    rewards: [n, 2] of chosen and rejected by the reward model, once split.py has scored them; gold: [n, 2] likewise
    by the toy world's gold reward, None for other data; form: that of most prompts (of joined files: the first's).
    """

    tokens: Tensor
    lengths: Tensor
    tokenizer: Tokenizer
    rewards: Tensor | None = None
    gold: Tensor | None = None
    form: str = "dialogue"

    def __post_init__(self):
        self.starts = F.pad(self.lengths.sum(1).cumsum(0), (1, 0))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """(prompt, chosen, rejected) of one pair, each a tensor of token ids."""
        piece = self.tokens[self.starts[index] : self.starts[index + 1]].long()
        return piece.split(self.lengths[index].tolist())

    def select(self, indices: Tensor) -> "Pairs":
        """The pairs at `indices`, in that order."""
        pieces = (self.tokens[self.starts[index] : self.starts[index + 1]] for index in indices.tolist())
        tokens = torch.cat([self.tokens[:0], *pieces])
        rewards, gold = (None if kept is None else kept[indices] for kept in (self.rewards, self.gold))
        return dataclasses.replace(self, tokens=tokens, lengths=self.lengths[indices], rewards=rewards, gold=gold)

    def save(self, settings: CommonSettings, name: str) -> None:
        """Writes the pairs file `name` in the --out folder."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        save(settings, name, "pairs file", **content | {"tokenizer": self.tokenizer.state})


def load_pairs(settings: CommonSettings, name: str) -> Pairs:
    """Reads the pairs file `name`, or several: a.pt+b.pt. Raises UserError at one missing or broken, or at no pair."""
    content, *others = (load(settings, one, "pairs file") for one in re.split(r"(?<=\.pt)\+", name))
    with reading(name):
        for kept in ("tokens", "lengths", "rewards", "gold"):
            values = [one[kept] for one in (content, *others)]
            content[kept] = None if any(value is None for value in values) else torch.cat(values)
        content["tokenizer"] = Tokenizer(**content["tokenizer"])
        pairs = Pairs(**{field.name: content[field.name] for field in dataclasses.fields(Pairs)})
    if not len(pairs):
        raise UserError(f"{name}: holds no pairs; try another --fraction, --threshold or --test-share")
    return pairs


def read_rows(settings: "Settings") -> Iterator[tuple[str, dict]]:
    """Yields (where, row) for each row of --data, --limit at most; `where` names the row in error messages."""
    data, path = settings.data, Path(settings.data)
    of_hub = re.fullmatch(r"[\w.-]+/[\w.-]+([:@].+)?", data) and path.suffix not in ENDINGS and not path.exists()
    if data == "toy":
        rows = (("toy", row) for row in toy_rows(settings.limit or 10000, settings.seed, settings.label_temperature))
    else:
        rows = hub_rows(data) if of_hub or re.split("[:@]", data)[0] in HUB else file_rows(path, settings.out)
    return itertools.islice(rows, settings.limit)


def hub_rows(data: str) -> Iterator[tuple[str, dict]]:
    """Rows of the hub's NAME[:PART][@SPLIT], shuffled, since hh holds its parts one behind the other."""
    name, part, split = re.fullmatch("([^:@]+):?([^@]*)@?(.*)", data).groups()
    repository, part_is, options = HUB.get(name, (name, "name", {}))
    with reading(f"--data {data}", "no file, nor can the hub's be loaded; check network, name, part, @split"):
        import datasets

        rows = datasets.load_dataset(repository, split=split or "train", **options | {part_is: part or None})
    for number in random.Random(0).sample(range(len(rows)), len(rows)):
        yield f"{repository} row {number + 1}", rows[number]


def file_rows(path: Path, out: str) -> Iterator[tuple[str, dict]]:
    """Rows of a file, or of a folder's and its subfolders', but for hidden ones, and --out where it lies within."""
    found = [file for file in sorted(path.rglob("*")) if file.is_file() and "/." not in f"/{file.relative_to(path)}"]
    aside = Path(out).resolve() if path.resolve() in Path(out).resolve().parents else None
    found = [file for file in found if aside not in file.resolve().parents]
    files = [file for file in found if file.suffix in ENDINGS and not ABOUT.fullmatch(file.name)]
    files = [path] if path.is_file() else files
    if not files:
        found = "holds only " + ", ".join(file.name for file in found[:5]) if found else "no file, or an empty folder"
        raise UserError(f"--data {path}: {found}; {FILES}; or name toy, hh, tldr or the hub's owner/name")
    for file in files:
        rows = parse_rows(file)
        for number in itertools.count(1):
            with reading(f"{file} row {number}", f"damaged, or of another kind; {FILES}"):
                row = next(rows, None)
            if row is None:
                break
            yield f"{file} row {number}", row
        if number == 1:
            raise UserError(f"{file}: holds no rows")


def parse_rows(path: Path) -> Iterator[dict]:
    """The rows of one file, which its first bytes tell apart, whatever its name."""
    with require_file(path).open("rb") as file:
        start = file.peek(4)[:4]
        if start == b"PAR1":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
            return
        lines = gzip.GzipFile(fileobj=file) if start.startswith(b"\x1f\x8b") else file
        documents = (json.loads(line) for line in lines if line.strip())
        try:
            documents = itertools.chain([*itertools.islice(documents, 1)], documents)  # parses the first line now
        except ValueError:  # not a document in each line, but one in all
            lines.seek(0)
            documents = [json.loads(lines.read())]
        for document in documents:  # a row, or a list of rows
            yield from map(dict, document if isinstance(document, list) else [document])  # else it is no row


def read_row(row: dict) -> tuple[str | list[dict], str, str]:
    """(prompt, chosen, rejected) of a row, the prompt a text or a list of messages. Raises KeyError and the like at a
    row of no known layout, DroppedRow at one that makes no pair. Null is an absent value."""
    row = {name: LINES.sub(r"\n\n\1:", value) if isinstance(value, str) else value for name, value in row.items()}
    if row.get("summaries") is not None:  # TL;DR, worded as in Stiennon et al. 2020
        post, texts = row["info"], [summary["text"] for summary in row["summaries"]]  # which begin with a space
        about = f"SUBREDDIT: r/{post['subreddit']}\n\nTITLE: {post['title']}\n\nPOST: {post['post'] or ''}\n\nTL;DR:"
        about = about if post["subreddit"] else None  # a row about a news article
        row |= {"prompt": about, "chosen": texts[row["choice"]], "rejected": texts[1 - row["choice"]]}
    prompt = row.get("prompt") or list_messages(row.get("conversations") or row.get("question"), "user")
    sides = [row["chosen"], row["rejected"]]
    if not all(sides):
        raise DroppedRow("empty response")
    texts = all(isinstance(side, str) for side in sides)
    if texts and (not prompt or str(prompt).isspace() or all(side.lstrip().startswith("Human:") for side in sides)):
        # Transcripts, whose prompt goes to the last turn; without one it is empty.
        halves = [re.fullmatch(f"(.*{TURN})?(.*)", side, re.DOTALL).groups("") for side in sides]
    elif texts and isinstance(prompt, str) and (row.get("system") is None or prompt.endswith(TURN)):
        # A prompt said again at the head of both goes, but for a short one: "Good morning!" is answered in kind.
        again = len(prompt.encode(errors="replace")) > 15 and all(side.startswith(prompt) for side in sides)
        halves = [(prompt, side.removeprefix(prompt) if again else side) for side in sides]
    else:
        before = list_messages(row.get("system"), "system") + list_messages(prompt, "user")
        halves = [split_messages(before, side) for side in sides]
    (prompt, chosen), (other, rejected) = halves
    if prompt != other:
        raise DroppedRow("prompts differ between the sides")
    require_parts(prompt, chosen.strip(), rejected.strip())
    return (row.get("system") or "") + prompt if isinstance(prompt, str) else prompt, chosen, rejected


def require_parts(prompt, chosen, rejected) -> None:
    """Raises DroppedRow at an empty part, equal responses or a human's turn in one: of texts, then of token ids."""
    if not prompt or not chosen or not rejected:
        raise DroppedRow("empty response" if prompt else NO_PROMPT)
    if chosen == rejected:
        raise DroppedRow("identical responses")
    if HUMAN in f"\n\n{chosen}" or HUMAN in f"\n\n{rejected}":  # texts come stripped; ids have none
        raise DroppedRow("a human's turn inside the response")


def split_messages(before: list[dict], side) -> tuple[list[dict], str]:
    """(prompt, response) of one side of a row: messages that follow those `before`, or a whole conversation, beside
    which only a system message counts. The last one is the response."""
    messages = list_messages(side, "assistant")
    if messages[0]["role"] != "assistant" and "user" in [message["role"] for message in messages]:
        own = messages[0]["role"] == "system"
        before = [message for message in before if message["role"] == "system" and not own]
    *prompt, last = before + messages
    if last["role"] != "assistant" or not prompt:
        raise DroppedRow("a human's turn inside the response" if prompt else NO_PROMPT)
    return prompt, last["content"]


def list_messages(given, role: str) -> list[dict[str, str]]:
    """A text, which `role` says, a message or a list of messages, as a list of {"role", "content"}."""
    if isinstance(given, str):
        given = given and {"role": role, "content": given}
    messages = []
    for message in [given] if isinstance(given, dict) else given or []:
        if message.get("tool_calls"):
            raise DroppedRow("a call of a tool, which is no text")
        said = (message.get("role") or message["from"]).lower()
        name = "value" if message.get("content") is None and "value" in message else "content"
        content = message[name] or ""
        content = content if isinstance(content, str) else "".join(part["text"] for part in content)
        messages.append({"role": ROLES.get(said, said), "content": LINES.sub(r"\n\n\1:", content)})
    return messages


@functools.cache
def chat_template(text: str):
    """A chat template, compiled, with what transformers lends to one; in a sandbox: it may be anybody's program."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(why: str) -> NoReturn:
        raise DroppedRow(f"the chat template refuses it: {why}")

    # {% generation %} marks what an assistant says, for transformers; here it is shown in any case.
    text = re.sub(r"(\{%[-+]?\s*)(end)?generation\b", lambda tag: tag[1] + ("endif" if tag[2] else "if true"), text)
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    jinja.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    jinja.globals |= {"raise_exception": refuse, "tools": None, "documents": None}
    jinja.globals["strftime_now"] = lambda form: time.strftime(form, time.gmtime(1735732800))  # same ids every day
    return jinja.from_string(text)


def write_out(tokenizer: Tokenizer | None, form: str, messages: list[dict], answered: bool) -> str:
    """Messages as a text of that form, to where an answer begins unless they are `answered`."""
    template = chat_template(FORMS.get(form) or tokenizer.template)
    return template.render(tokenizer.names if tokenizer else {}, messages=messages, add_generation_prompt=not answered)


def write_row(settings: "Settings", tokenizer: Tokenizer | None, prompt, *sides: str) -> tuple[str, list[str]]:
    """(form, [prompt, chosen, rejected] as texts) of what read_row returned. What people wrote is shielded: only the
    chat template sets control tokens; not so with --control-tokens tokens."""
    shield = tokenizer.shield if tokenizer and settings.control_tokens == "text" else str  # str() changes no text
    sides = [shield(side) for side in sides]
    if isinstance(prompt, str):
        form = "dialogue" if prompt.endswith(TURN) else "tldr" if prompt.endswith("TL;DR:") else "plain"
        prompt = shield(prompt)
        if tokenizer and tokenizer.template and tokenizer.control.search(prompt):
            form = "template"  # which was applied before
        return form, [prompt, *sides]
    form = "template" if tokenizer and tokenizer.template else "dialogue"
    if form == "dialogue" and {message["role"] for message in prompt} - {"system", "user", "assistant"}:
        raise DroppedRow("a role that a dialogue lacks")
    messages = [message | {"content": shield(message["content"])} for message in prompt]
    parts = [write_out(tokenizer, form, messages, answered=False)]
    for side in sides:
        whole = write_out(tokenizer, form, [*messages, {"role": "assistant", "content": side}], answered=True)
        if not whole.startswith(parts[0]):
            raise DroppedRow("the chat template writes the prompt otherwise where an answer follows")
        parts.append(whole.removeprefix(parts[0]))
    return form, parts


def encode_prompt(tokenizer: Tokenizer, form: str, text: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt: those that open it, which a chat template writes itself, if it has any; and the others."""
    ids, begin = tokenizer.encode(text, control=True), tokenizer.begin
    if ids[: len(begin)] == begin:
        return begin, ids[len(begin) :]
    return [] if form == "template" else begin, ids


def encode_row(settings: "Settings", tokenizer: Tokenizer, form: str, parts: list[str], counts: Counter) -> list:
    """Token ids of [prompt, chosen, rejected], tokenised apart. A prompt longer than context − max_response loses its
    beginning, since its end is the question. Raises DroppedRow at what makes no pair: a response over max_response with
    its end token, cut, would teach the model to stop in mid-sentence."""
    begin, prompt = encode_prompt(tokenizer, form, parts[0])
    end = re.escape(tokenizer.names["eos_token"]) + r"\s*\Z"  # where the text has one, it is not set twice
    responses = [tokenizer.encode(re.sub(end, "", part), control=True) for part in parts[1:]]
    require_parts(prompt, *responses)
    if any(tokenizer.end in response for response in responses):
        raise DroppedRow("an end token inside the response")
    if max(map(len, responses)) >= settings.max_response:
        raise DroppedRow(f"response over {settings.max_response} tokens")
    room = settings.context - settings.max_response - len(begin)
    counts["kept: prompt cut at its beginning"] += len(prompt) > room
    parts = begin + prompt[-room:], *([*response, tokenizer.end] for response in responses)
    return [torch.tensor(ids, dtype=torch.int32) for ids in parts]


def read_examples(settings: "Settings", counts: Counter, tokenizer: Tokenizer | None) -> Iterator[tuple]:
    """Yields (held back to test on?, form, texts, their token ids or None without a tokenizer) for each row of --data
    that makes a pair. The prompt's own hash holds it back, so that no prompt falls on both sides. Rows are counted."""
    share = settings.test_share if settings.test_share is not None else 0.2 if settings.data == "toy" else 0.1
    for where, row in tqdm(read_rows(settings), desc="reading", unit=" rows", leave=False):
        counts["rows read"] += 1
        try:
            with reading(where, f"has {', '.join(map(str, row)) or 'nothing'}; {LAYOUTS}"):
                texts = read_row(row)
                form, parts = write_row(settings, tokenizer, *texts)
                ids = encode_row(settings, tokenizer, form, parts, counts) if tokenizer else None
        except DroppedRow as problem:
            counts[f"dropped: {problem}"] += 1
            continue
        spelled = tokenizer is not None and tokenizer.control.search(str(texts)) is not None
        counts[f"kept: control tokens spelled out, read as --control-tokens {settings.control_tokens}"] += spelled
        digest = hashlib.sha256(f"{settings.seed} {parts[0].replace(SHIELD, '')}".encode(errors="replace")).digest()
        yield int.from_bytes(digest[:8], "big") < share * 2**64, form, parts, ids


def read_pairs(settings: "Settings", tokenizer: Tokenizer | None = None) -> tuple[Pairs, Pairs]:
    """(training pairs, test pairs) from --data, read row by row: memory holds token ids only. Without a tokenizer, one
    is trained in a first pass, on the training text alone. What was done with the rows is counted and printed."""
    if tokenizer is None:
        size = settings.vocabulary or (640 if settings.data == "toy" else 4096)
        examples = read_examples(settings, Counter(), None)
        training_texts = (texts for held_back, _, texts, _ in examples if not held_back)
        tokenizer = train_tokenizer(itertools.chain.from_iterable(training_texts), size)
    if settings.context - settings.max_response <= len(tokenizer.begin):
        raise UserError(f"--max-response {settings.max_response} leaves no room in --context {settings.context}")
    counts, forms, parts, golds, held_back = Counter(), Counter(), [], [], []
    for held, form, texts, ids in read_examples(settings, counts, tokenizer):
        parts += ids
        golds.append([gold_reward(texts[0], text) for text in texts[1:]] if settings.data == "toy" else [])
        held_back.append(held)
        forms[form] += 1
    for what, times in (+counts).items():  # + leaves out those that are 0
        print(f"{what}: {times}")
    if not parts:
        _, row = next(read_rows(settings), ("", {}))
        raise UserError(f"--data {settings.data}: all rows, of {', '.join(row)}, were dropped as counted; {LAYOUTS}")
    lengths = torch.tensor([len(part) for part in parts]).view(-1, 3)
    gold = torch.tensor(golds) if settings.data == "toy" else None
    pairs = Pairs(torch.cat(parts), lengths, tokenizer, gold=gold, form=max(forms, key=forms.get))
    train, test = (pairs.select((torch.tensor(held_back) == side).nonzero().flatten()) for side in (False, True))
    if settings.data != "toy":  # a file may hold its kinds one behind the other, and evaluate.py asks the first prompts
        test = test.select(torch.randperm(len(test), generator=torch.Generator().manual_seed(0)))
    print(f"{len(train)} training pairs, {len(test)} test pairs, {tokenizer.size} tokens, prompts of form {pairs.form}")
    for side, use in ((train, "train on; lower"), (test, "test on; raise")):
        if not len(side):
            raise UserError(f"--data {settings.data}: no pairs left to {use} --test-share, or read more rows (--limit)")
    return train, test


def ask_in_form(tokenizer: Tokenizer, form: str, question: str) -> Tensor:
    """Token ids [L] of a prompt that asks `question` in a pairs file's form, unless it ends as prompts do."""
    text = tokenizer.shield(question)
    if form == "template" or not question.endswith((TURN, "TL;DR:")):
        text = write_out(tokenizer, form, [{"role": "user", "content": text}], answered=False)
    begin, ids = encode_prompt(tokenizer, form, text)
    return torch.tensor(begin + ids)


# ---- Files ----

FORMAT = 5  # of this project's files


def find_file(settings: CommonSettings, name: str) -> Path:
    """Where the file `name` is: in the --out folder, else here; a name with a slash is a path."""
    places = [Path(name)] if "/" in name else [Path(settings.out) / name, Path(name)]
    for path in places:
        if path.is_file():
            return path
    raise UserError(f"{places[0]}: no such file; run the stage that writes it first, or name one that exists")


def write_file(path: Path, content: str | Callable) -> None:
    """Writes a text, or what `content` writes to a binary file, beside `path`, and then in its place, so that `path` is
    complete at every moment. Raises UserError if that fails. Of several processes the first one writes."""
    if processes()[0] > 0:
        return
    write = content if callable(content) else lambda file: file.write(content.encode())
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch raises the latter, on top of what really happened
        cause = error if isinstance(error, OSError) else error.__context__ or error
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise UserError(f"{path}: cannot be written ({cause}); what was there is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


class DroppedRow(UserError):
    """A row of data that makes no pair; the text says why."""


@contextlib.contextmanager
def reading(what: Path | str, complaint: str = "damaged, or not what is needed here"):
    """Turns whatever a damaged or foreign file, or a library, raises inside the block into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{what}: {complaint} ({said})") from error


def save(settings: CommonSettings, name: str, kind: str, **content) -> None:
    """Writes `content` to a file in the --out folder, with its kind, what made it, and the id of the data behind it."""
    made = {"command": shlex.join(sys.argv), "torch": str(torch.__version__), "read": dict(settings.loaded)}
    content |= {"kind": kind, "format": FORMAT, "made": made | {"data": settings.origin and settings.origin[0]}}
    write_file(Path(settings.out) / name, lambda file: torch.save(content, file))


def load(settings: CommonSettings, name: str, *kinds: str) -> dict:
    """Reads what `save` wrote. Raises UserError unless it is of these kinds, and goes back to the same data (so to the
    same tokenizer) as the files read before."""
    path = find_file(settings, name)
    with reading(path):
        content = torch.load(path, map_location="cpu", weights_only=True)
        data = content["made"]["data"]
        if content["kind"] not in kinds or content["format"] != FORMAT:
            held, needed = f"{content['kind']} (format {content['format']})", f"{' or '.join(kinds)} (format {FORMAT})"
            raise UserError(f"{path}: holds a {held}, but a {needed} is needed here")
        told = [content[part].numpy() for part in ("tokens", "lengths") if part in content]
        told = told or [json.dumps(content["made"]).encode()]  # pairs are known by content, models by what made them
    settings.loaded[name] = hashlib.sha256(b"".join(told)).hexdigest()[:16]
    settings.origin = settings.origin or (data, name)
    if data != settings.origin[0]:
        raise UserError(f"{path}: goes back to other data than {settings.origin[1]}: run all after model.py again")
    return content


def require_new(settings: CommonSettings, *flags: str) -> None:
    """Raises UserError if a flag names pairs.pt or test.pt, a file that was read, or what another flag names, or if
    there is a stopped run's state beside it, or a file in the place of its log that is none."""
    taken = {find_file(settings, name).resolve() for name in settings.loaded}
    taken |= {(Path(settings.out) / name).resolve() for name in ("pairs.pt", "test.pt")}
    for flag_name in flags:
        name = getattr(settings, flag_name)
        path = Path(settings.out) / name
        log, state = path.with_suffix(".jsonl"), path.with_suffix(".state.pt")
        if path.resolve() in taken:
            raise UserError(f"--{flag_name} {name}: taken (by data, a file read, another flag); choose another name")
        taken.add(path.resolve())
        if log.is_file() and log.stat().st_size and not any("step" in record for record in read_log(log)):
            raise UserError(f"{log}: not a log, which would be written here; choose another --{flag_name}, or --out")
        if state.exists() and not getattr(settings, "resume", False):
            raise UserError(f"{state}: a run was stopped, or still runs; use --resume, or delete this")


def save_model(settings: CommonSettings, model: nn.Module, tokenizer: Tokenizer) -> None:
    """Writes a GPT or a reward model, with all that is needed to use it, to the --save file."""
    weights, config = dcp.get_model_state_dict(model, options=ON_RANK_0), dataclasses.asdict(model.config)
    save(settings, settings.save, model.kind, config=config, tokenizer=tokenizer.state, weights=weights)


def load_model(settings: CommonSettings, name: str, model_class: type, prepare: bool = True):
    """Reads a model of `model_class`, and prepares it for the device unless told not to. Returns (model, Tokenizer)."""
    content = load(settings, name, model_class.kind)
    with reading(name), torch.device("meta"):  # shapes without numbers: the file's take their place
        model, tokenizer = GPT(Config(**content["config"])), Tokenizer(**content["tokenizer"])
        model = model if model_class is GPT else model_class(model)  # a reward model is built around a GPT
        model.load_state_dict(content["weights"], assign=True)
    return prepare_model(model, settings) if prepare else model, tokenizer


def choose_device(settings: CommonSettings) -> torch.device:
    """The device that --device names."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = settings.device if settings.device != "auto" else next(name for name in available if available[name])
    if not available[name]:
        raise UserError(f"--device {name}: there is none on this machine")
    if name == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        raise UserError("--device cuda: torchrun started more processes than there are GPUs; lower --nproc-per-node")
    return torch.device(name)


def prepare_model(model: nn.Module, settings: CommonSettings) -> nn.Module:
    """Moves a model to the device, and sets it up as the flags say. `--dtype auto` takes bf16 where the hardware
    multiplies it faster: on GPUs and CPUs that have it, on a CPU if the model is wide enough to pay for the casts."""
    device, gpt = choose_device(settings), model if isinstance(model, GPT) else model.trunk
    if device.type == "cuda" and gpt.config.head_dim < 16:
        raise UserError("--device cuda: FlexAttention needs heads at least 16 wide; try --device cpu")
    units = torch.cpu.get_capabilities()
    faster = device.type == "cpu" and gpt.config.dim >= 256 and (units.get("amx_bf16") or units.get("avx512_bf16"))
    faster = faster or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    bf16 = settings.dtype == "bf16" or (settings.dtype == "auto" and faster)
    gpt.activations = torch.bfloat16 if bf16 else torch.float32
    gpt.checkpointed = getattr(settings, "grad_checkpoint", False)
    gpt.compiled = device.type == "cuda" if settings.compile is None else settings.compile
    compile_blocks(gpt, device)
    return shard(model, gpt.blocks, device) if dist.is_initialized() else model.to(device)


def compile_blocks(gpt: GPT, device: torch.device) -> None:
    """Compiles the blocks of a model for CUDA, if it is to be compiled; on a CPU, a block's graph would depend on the
    documents' lengths."""
    if gpt.compiled and device.type == "cuda":
        torch.compiler.config.recompile_limit = 32  # variants: with gradients or not, one a model
        torch.compiler.config.fail_on_recompile_limit_hit = True  # else FlexAttention runs uncompiled, L² in memory
        for block in gpt.blocks:
            block.compile(dynamic=True)


# ---- Pretrained weights in: Hugging Face folders of Llama and its relatives ----

FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}  # and their classes' names

LLAMA_NAMES = {  # this project's names of the parameters, and theirs; ours hold several of theirs, one below the other
    "embedding": ["model.embed_tokens"], "norm": ["model.norm"], "head": ["lm_head"],
    "attention_norm": ["input_layernorm"], "mlp_norm": ["post_attention_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.q_norm": ["self_attn.q_norm"], "attention.k_norm": ["self_attn.k_norm"],
    "attention.output": ["self_attn.o_proj"], "gate_up": ["mlp.gate_proj", "mlp.up_proj"], "down": ["mlp.down_proj"],
}
CONFIG_NAMES = {  # the fields of Config, and the keys of config.json
    "vocabulary": "vocab_size", "dim": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "mlp": "intermediate_size", "context": "max_position_embeddings",
    "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings",
    "head_dim": "head_dim", "family": "model_type", "rotated": "no_rope_layers",
}
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def llama_names(name: str) -> list[str]:
    """What Hugging Face's Llama calls the tensors that the GPT's parameter `name` holds."""
    block, module, kind = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
    return [("" if block is None else f"model.layers.{block}.") + f"{part}.{kind}" for part in LLAMA_NAMES[module]]


def find_pretrained(name: str) -> Path:
    """The folder that `name` names: a folder on this machine, or else a repository of the Hugging Face hub."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"--init {name}: no such checkpoint or folder, and not a repository id like owner/name either")
    files = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model*.safetensors*"]
    with reading(f"--init {name}", "no such folder, and cannot be downloaded; name a folder that holds it"):
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))


def require_file(path: Path) -> Path:
    """That path, of a file to read. Raises UserError if it is missing, or Git LFS keeps it elsewhere."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; a Hugging Face folder has one")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise UserError(f"{path}: a Git LFS pointer, not the file itself; run git lfs pull in its folder")
    return path


def read_json(path: Path) -> dict:
    """The object that a JSON file of a Hugging Face folder holds."""
    with reading(path):
        return {} | json.loads(require_file(path).read_text("utf-8"))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name: 8 bytes of length, a JSON header of that length, then the numbers,
    which stay on the disk until they are used."""
    tensors = {}
    with reading(path):
        data = np.memmap(require_file(path), mode="c")  # bytes
        begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header, numbers = json.loads(data[8:begin].tobytes()), data[begin:]
        header.pop("__metadata__", None)
        for name, about in header.items():
            dtype, (start, stop) = SAFETENSORS_DTYPES[about["dtype"]], about["data_offsets"]
            tensors[name] = torch.from_numpy(numbers[start:stop]).view(dtype).view(about["shape"])
    return tensors


def import_model(folder: Path) -> tuple[GPT, Tokenizer]:
    """Reads a Hugging Face folder. Raises UserError, by name, at what it asks for and this architecture lacks."""
    folder = Path(folder)
    config, tokenizer = import_config(folder / "config.json"), import_tokenizer(folder)
    if tokenizer.size > config.vocabulary:
        raise UserError(f"{folder}: tokenizer.json has {tokenizer.size} tokens, config.json only {config.vocabulary}")
    paths, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if index.is_file() and not paths[0].is_file():  # as in transformers, one file goes before shards
        paths = sorted({folder / name for name in read_json(index).get("weight_map", {}).values()})
    stored, weights = {}, {}
    for path in paths:
        stored |= read_safetensors(path)
    if config.tied and "lm_head.weight" in stored:  # some folders call a head tied that is not
        config.tied = torch.equal(stored["lm_head.weight"], stored.get("model.embed_tokens.weight", torch.empty(0)))
    unused = ("rotary_emb.inv_freq", "lm_head.weight") if config.tied else "rotary_emb.inv_freq"
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith(unused)}
    with reading(folder, "holds other weights than config.json describes"), torch.device("meta"):
        model = GPT(config)
        for name, _ in model.named_parameters():
            weights[name] = torch.cat([stored.pop(one).float() for one in llama_names(name)])
            if not weights[name].isfinite().all():
                raise UserError(f"{folder}: {' + '.join(llama_names(name))} holds numbers that are not finite")
        model.load_state_dict(weights | stored, assign=True)  # refuses other shapes, and what has no place here
    return model, tokenizer


def import_config(path: Path) -> Config:
    """The shape that config.json describes; keys it lacks (other than no_rope_layers) have transformers' defaults."""
    with reading(path):
        given = {name: value for name, value in read_json(path).items() if value is not None}
        if given["model_type"] not in FAMILIES:
            raise UserError(f"{path}: model_type {given['model_type']} is not supported, only {', '.join(FAMILIES)}")
        family, heads = given["model_type"], given["num_attention_heads"]
        given = {"max_position_embeddings": 2048 if family == "llama" else 32768, "rms_norm_eps": 1e-6,
                 "rope_theta": 2e6 if family == "smollm3" else 1e4, "tie_word_embeddings": family == "smollm3",
                 "head_dim": 128 if family == "qwen3" else given["hidden_size"] // heads,
                 "num_key_value_heads": heads} | given
        given |= given.get("rope_scaling", {}) | given.get("rope_parameters", {})  # transformers 5 has the latter
        given.setdefault("rope_type", given.get("type", "default"))
        if not given.get("use_sliding_window", family == "llama"):
            given["sliding_window"] = None
        if family == "qwen2":  # has biases whatever this key says
            given.pop("attention_bias", None)
        if family != "smollm3":
            given["no_rope_layers"] = None
        config = Config(**{ours: given[theirs] for ours, theirs in CONFIG_NAMES.items()}, pretrained=True)
        if given["rope_type"] == "llama3":
            given.setdefault("original_max_position_embeddings", config.context)
            config.rope_scaling = {name: given[name] for name in LLAMA3_SCALING}
        only = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0,
                "partial_rotary_factor": 1, "sliding_window": None, "rope_interleaved": False,
                "layer_types": ["full_attention"] * config.layers, "quantization_config": None,
                "transformers_weights": None, "rope_type": "llama3" if config.rope_scaling else "default"}
        for name, value in only.items():
            if given.get(name, value) != value:
                raise UserError(f"{path}: {name} {given[name]!r} is not supported, only {value!r}")
        return config


def import_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of `folder`. Its end token is the one that tokenizer_config.json names, or else config.json."""
    path, about, jinja = folder / "tokenizer.json", folder / "tokenizer_config.json", folder / "chat_template.jinja"
    given, said = read_json(path), read_json(about) if about.is_file() else {}
    with reading(path, "not supported, only byte-level BPE as in Llama 3 or GPT-2"):
        added = {token["id"]: token["content"] for token in given["added_tokens"] if token["special"]}
        template = said.get("chat_template")
        if isinstance(template, list):  # of several, by name
            template = {one["name"]: one["template"] for one in template}.get("default")
        template = jinja.read_text("utf-8") if jinja.is_file() else template
        end, bos = (name["content"] if isinstance(name, dict) else name
                    for name in (said.get("eos_token"), said.get("bos_token")))
        if end not in added.values():
            number = read_json(folder / "config.json").get("eos_token_id")
            end = added.get(number[0] if isinstance(number, list) else number)
        if end is None:
            raise UserError(f"{folder}: neither tokenizer_config.json nor config.json names a special token as the end")
        return Tokenizer(path.read_text("utf-8"), end, template, bos)


# ---- Several processes (torchrun): each holds a share of the weights and computes a share of the batch ----

UNSHARDED = dcp.StateDictOptions(full_state_dict=True)
ON_RANK_0 = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # for the process that writes


def processes() -> tuple[int, int]:
    """(number of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def summed(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, made in place: a second call would add up the sums. Each has other
    documents of a batch; with 0 in the places of the others', this puts the results together again."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def shard(model: nn.Module, blocks: nn.ModuleList, device: torch.device) -> nn.Module:
    """Cuts every weight over the processes (FSDP2, `fully_shard`): a block's weights are unsharded only while it
    computes. Gradients are added up, not averaged: every loss is already divided by the whole batch's count."""
    mesh = dist.init_device_mesh(device.type, (processes()[1],))
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for method in ("logprobs", "value_at"):  # what is called beside forward
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    return model


def run_command(main: Callable) -> None:
    """Runs a stage's `main`; what the user or the machine is to blame for becomes one line on stderr and exit code 2.
    Of the processes that torchrun starts, the first one speaks for all."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that has no γ shows a question mark
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():  # else choose_device has a say
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)
    first = processes()[0] == 0
    try:
        with (open(os.devnull, "w", errors="replace") as nowhere,
              contextlib.redirect_stdout(sys.stdout if first else nowhere),
              contextlib.redirect_stderr(sys.stderr if first else nowhere)):
            main()
        if dist.is_initialized():
            dist.barrier()  # a process that leaves early breaks the connection of those that still talk
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        said = repr(error.__cause__ if isinstance(error, UserError) else error)  # not what a judge's server says
        advice = next((remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, said)), None)
        if not advice and not isinstance(error, (UserError, OSError)):  # OSError: a disk that fills up on the way, say
            raise
        if advice or os.environ.get("LOCAL_RANK", "0") == "0":  # one a node; memory may run out in one process alone
            print(f"{Path(sys.argv[0]).name}: {' '.join((advice or str(error)).splitlines())}", file=sys.stderr)
        sys.exit(2)


# ---- The training loop ----


@dataclass
class TrainingSettings(CommonSettings):
    """The flags that every training stage has, beside its own --data, --save, --epochs, --batch-size and --lr."""

    resume: bool = flag(False, "go on from this stage's last saved state")
    save_every: int = flag(200, "steps between saved states (0: only on Ctrl-C)", least=0)
    steps: int | None = flag(None, "batches to train on (0: none) [as many as --epochs makes]", least=0)
    warmup: float = flag(0.1, "share of the steps in which the learning rate rises from 0", least=0, most=1)
    decay: Literal["constant", "linear"] = flag("linear", "learning rate after the warm-up")
    clip: float = flag(1.0, "gradient norm is clipped to this", above=0)
    pass_tokens: int | None = flag(None, "about so many tokens a pass; fewer: less memory [4096; cuda: 32768]", least=1)
    grad_checkpoint: bool = flag(False, "keep one activation a block, compute the rest again: less memory, more time")


def mixed_seed(seed: int, number: int) -> int:
    """A seed for `number`, such as an epoch's or step's: --resume draws what the stopped run would have drawn."""
    return (seed * 1_000_003 + number) % 2**63


def count_steps(settings: TrainingSettings, examples: int) -> int:
    """Steps, a batch each: --steps, or as many as --epochs passes over the examples make."""
    per_epoch = math.ceil(examples / settings.batch_size)  # rounded below, since 1.1 × 10 is 11.000000000000002
    return math.ceil(round(settings.epochs * per_epoch, 6)) if settings.steps is None else settings.steps


def batch_indices(examples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The examples of one step. An epoch is a new shuffle of all examples, cut into batches; the last may be small."""
    epoch, place = divmod(step, math.ceil(examples / batch_size))
    shuffled = torch.randperm(examples, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch)))
    return shuffled[place * batch_size :][:batch_size].tolist()


def read_log(path: Path) -> list[dict]:
    """The records of a log, one a line; none without a log. Half a line, as a power cut leaves it, does not count."""
    records = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError):
            records.append({} | json.loads(line))
    return records


class Training:
    """A training loop's bookkeeping: `for indices in training` gives the examples of each batch still to do, number
    `step` of `steps`. It owns the optimiser of `model` (AdamW with ε = `eps`), the learning rate, the log (an object a
    step, OUT/<save>.jsonl), the bar with the metrics `shown`, the state for --resume, and what Ctrl-C does."""

    def __init__(self, settings: TrainingSettings, examples: int, model: nn.Module, shown: tuple[str, ...], eps=1e-8):
        self.settings, self.examples, self.model, self.shown = settings, examples, model, shown
        self.optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=eps, weight_decay=0.0, fused=True)
        self.step, self.steps, self.stopping = 0, count_steps(settings, examples), False
        path = Path(settings.out) / settings.save
        self.log_path, self.state_path = path.with_suffix(".jsonl"), path.with_suffix(".state.pt")
        require_new(settings, "save")
        free = "out", "resume", "save_every", "pass_tokens", "grad_checkpoint"  # with --resume these may differ
        flags = [one.name for one in dataclasses.fields(settings) if one.name not in free]
        self.made_from = {f"--{name.replace('_', '-')}": getattr(settings, name) for name in flags}
        self.made_from |= settings.loaded | {"the data": settings.origin and settings.origin[0]}  # named after flags
        if settings.resume and not self.state_path.exists():
            raise UserError(f"{self.state_path}: no such file, so nothing to --resume")
        if settings.resume:
            self.load_state()
        if processes()[0] == 0:
            self.lock_log()
        self.write_log([record for record in read_log(self.log_path) if record["step"] < self.step], "w")

    def lock_log(self) -> None:
        """Locks the log until this process ends, so that no second run writes the same files."""
        with reading(self.log_path, "cannot be written"):
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            self.locked = self.log_path.open("a")
        try:
            fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.log_path}: another run writes it; wait, or choose another --save") from error
        except OSError:
            pass  # a file system without locks

    def write_log(self, records: list[dict], mode: str = "a") -> None:
        """Appends records to the log, a line each. Opened anew, by its name: its folder may have been deleted since."""
        if processes()[0] == 0:
            with reading(self.log_path, "cannot be written"), self.log_path.open(mode) as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def save_state(self) -> None:
        """Writes all that --resume needs."""
        model, optimizer = dcp.get_state_dict(self.model, self.optimizer, options=ON_RANK_0)
        content = {"step": self.step, "made_from": self.made_from, "model": model, "optimizer": optimizer}
        save(self.settings, self.state_path.name, "resume state", **content)

    def load_state(self) -> None:
        """Reads what save_state wrote. Raises UserError if it is another run's."""
        state = load(CommonSettings(), str(self.state_path.resolve()), "resume state")  # of any data: see below
        with reading(self.state_path):
            for name, value in self.made_from.items():
                had = state["made_from"].get(name)
                if had != value:
                    raise UserError(f"--resume: {name} is not what the saved run had: {value} now, {had} then")
            dcp.set_state_dict(self.model, self.optimizer, model_state_dict=state["model"],
                               optim_state_dict=state["optimizer"], options=UNSHARDED)
            self.step = state["step"]

    def __iter__(self) -> Iterator[list[int]]:
        settings, every, stop = self.settings, self.settings.save_every, False
        handlers = {number: signal.signal(number, self.ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with tqdm(total=self.steps, initial=self.step, desc=Path(settings.save).stem, unit="step") as self.bar:
                while self.step < self.steps and not stop:
                    self.began = time.perf_counter()
                    self.indices = batch_indices(self.examples, settings.batch_size, self.step, settings.seed)
                    yield self.indices
                    self.step += 1
                    self.bar.update()
                    stop = bool(summed(torch.tensor(float(self.stopping))))  # all processes stop at the same step
                    if stop or (every and (self.step % every == 0 or self.step == self.steps)):
                        self.save_state()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if stop:
            print(f"stopped after step {self.step} of {self.steps}; the same command with --resume goes on")
            sys.exit(130)
        log = read_log(self.log_path)
        if log:  # else there was no step
            course = [f"{name} {log[0][name]:.3f} → {log[-1][name]:.3f}" for name in self.shown]
            print(f"{self.steps} steps, first → last: {', '.join(course)}")

    def ask_to_stop(self, number, frame) -> None:
        """First Ctrl-C: stop after this step. Second: at once."""
        self.stopping = True
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.default_int_handler)

    @property
    def lr(self) -> float:
        """Learning rate of the current step: linear warm-up, then constant or linear to 0."""
        warmup = max(1, round(self.settings.warmup * self.steps))
        rising, falling = (self.step + 1) / warmup, (self.steps - self.step) / max(1, self.steps - warmup)
        return self.settings.lr * min(1.0, rising, falling if self.settings.decay == "linear" else 1.0)

    def optimize(self) -> Tensor:
        """Clips the gradients and takes one optimiser step. Returns the gradient's norm before clipping, which `log`
        finds not to be finite where a loss or a gradient is not; nothing here waits for the GPU."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.param_groups[0]["lr"] = self.lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.full_tensor() if dist.is_initialized() else norm

    def log(self, unit: str, tokens: int, **metrics: float | Tensor) -> None:
        """Writes the step's line of the log, and the metrics to show beside the bar. Here alone an update waits for the
        GPU. Raises UserError if a metric is not finite: nothing is saved then, so the last good state is kept."""
        for name, value in metrics.items():
            metrics[name] = value = value.item() if isinstance(value, Tensor) else value
            if not math.isfinite(value):
                raise UserError(f"step {self.step}: the {name} is not finite, on training pairs {sorted(self.indices)}"
                                "; what was saved before is kept; try a lower --lr")
        seconds, examples = time.perf_counter() - self.began, len(self.indices)
        costs = {"seconds": seconds, "tokens_per_second": tokens / seconds, f"{unit}_per_second": examples / seconds}
        if choose_device(self.settings).type == "cuda":
            costs["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
        self.write_log([{"step": self.step, **metrics, "lr": self.lr, **costs}])
        self.bar.set_postfix({name: f"{metrics[name]:.3f}" for name in self.shown}, refresh=False)


def finish(settings: CommonSettings, fields: list[str], command: str, flags: str) -> None:
    """The end of a stage: drops the resume state, and says what was written, to the names in these `fields`, and what
    to run next. If the first name is not the default, that needs `flags`, in which the name takes the place of {}."""
    names = [getattr(settings, field) for field in fields]
    if processes()[0] == 0:
        (Path(settings.out) / names[0]).with_suffix(".state.pt").unlink(missing_ok=True)
    if names[0] != getattr(type(settings), fields[0]):
        command += " " + flags.format(shlex.quote(names[0]))
    if settings.out != "out":
        command += f" --out {shlex.quote(settings.out)}"
    print(f"wrote {', '.join(str(Path(settings.out) / name) for name in names)}; next: {command}")


# ---- Supervised fine-tuning ----


@dataclass
class Settings(TrainingSettings):
    """Flags of this stage."""

    data: str = flag("toy", "toy, hh[:part], tldr, the hub's owner/name[:config][@split], a file, folder or pairs file")
    control_tokens: Literal["text", "tokens"] = flag("text", "what control tokens spelled out in the data are read as")
    init: str | None = flag(None, "Hugging Face folder or repository id, or a checkpoint [a new model]")
    extrapolate: str | None = flag(None, "only move --init on, by --alpha times its way from this checkpoint (ExPO)")
    alpha: float = flag(0.5, "α: how far --extrapolate moves it on")
    save: str = flag("sft.pt", "checkpoint to write")
    limit: int | None = flag(None, "rows to read at most [all; toy, which has no end: 10000]", least=1)
    label_temperature: float = flag(TOY_TEMPERATURE, "toy: noise of the labels; at 0 none is wrong", least=0)
    test_share: float | None = flag(None, "share of the prompts that is held back [0.1; toy: 0.2]", least=0, most=1)
    epochs: float = flag(1.5, "passes over the training pairs", least=0, pretrained=1.0)
    batch_size: int = flag(32, "pairs per optimiser step", least=1, pretrained=64)
    lr: float = flag(2e-3, "peak learning rate", least=0, pretrained=2e-5)
    context: int = flag(512, "longest prompt + response, in tokens", least=1, pretrained=1024)
    max_response: int = flag(128, "longest response with its end token; longer: pair dropped", least=1, pretrained=512)
    vocabulary: int | None = flag(None, "tokens of a new model's tokenizer, 257 or more [4096; toy: 640]", least=257)
    dim: int = flag(128, "width of a new model", least=1)
    layers: int = flag(3, "blocks of a new model", least=1)
    heads: int = flag(4, "query heads of a new model", least=1)
    kv_heads: int = flag(2, "key-value heads of a new model", least=1)

    def __post_init__(self):
        super().__post_init__()
        ready = self.data.endswith(".pt")
        if (self.extrapolate or ready) and (self.save == "sft.pt" or not str(self.init).endswith(".pt")):
            raise UserError("--extrapolate, or a pairs file as --data, needs a checkpoint as --init and a new --save")
        for idle, why, names in (  # where it is so, these flags have no effect, and must keep their defaults
            (self.data != "toy", "only the toy world draws its labels", "label_temperature"),
            (not self.extrapolate, "it is --extrapolate's, which is not given", "alpha"),
            (ready, f"the form of --data {self.data} is given", "limit test_share control_tokens context max_response"),
            (self.init, f"the shape of --init {self.init} is given", "vocabulary dim layers heads kv_heads"),
            (self.extrapolate, "--extrapolate reads no data and trains nothing",
             "data control_tokens limit label_temperature test_share epochs batch_size lr context max_response resume "
             "save_every steps warmup decay clip pass_tokens grad_checkpoint"),
        ):
            for name in names.split():
                if idle and getattr(self, name) != getattr(Settings, name):
                    raise UserError(f"--{name.replace('_', '-')}: {why}")
        if self.dim % (2 * self.heads) or self.heads % self.kv_heads:
            shape = f"--dim {self.dim} --heads {self.heads} --kv-heads {self.kv_heads}"
            raise UserError(f"{shape}: --dim must be a multiple of 2 × --heads, --heads of --kv-heads")


def extrapolate(settings: Settings, policy: GPT, tokenizer: Tokenizer) -> None:
    """Writes θ + α (θ − θ_SFT): ExPO, Zheng et al. 2024 (arXiv 2404.16792), equation 6. Exact at α = 0 and −1."""
    start, _ = load_model(settings, settings.extrapolate, GPT, prepare=False)
    require_new(settings, "save")
    with torch.no_grad(), reading(settings.extrapolate):
        for ours, theirs in zip(policy.parameters(), start.parameters(), strict=True):
            ours.copy_(theirs.lerp(ours, 1 + settings.alpha))
    save_model(settings, policy, tokenizer)
    finish(settings, ["save"], "python evaluate.py", "--policies sft.pt {}")


def main() -> None:
    """Reads the pairs and trains the policy that the other stages start from."""
    # 1. Settings; a pretrained model, where --init names one; then data: text pairs become token ids.
    settings = parse_settings(Settings, __doc__)
    device = choose_device(settings)
    policy = tokenizer = None
    if settings.init and settings.init.endswith(".pt"):
        policy, tokenizer = load_model(settings, settings.init, GPT, prepare=False)
    elif settings.init:
        policy, tokenizer = import_model(find_pretrained(settings.init))
    settle(settings, policy is not None and policy.config.pretrained)
    if settings.extrapolate:
        return extrapolate(settings, policy, tokenizer)
    ready = settings.data.endswith(".pt")  # pairs of token ids, from split.py or an earlier run
    if ready:
        pairs = load_pairs(settings, settings.data)
        test = load_pairs(settings, "test.pt") if (Path(settings.out) / "test.pt").exists() else None
    else:
        if settings.init and settings.context > policy.config.context:
            raise UserError(f"--context {settings.context}: {settings.init} has {policy.config.context}; lower it")
        pairs, test = read_pairs(settings, tokenizer)
        data = hashlib.sha256(json.dumps(pairs.tokenizer.state).encode())
        for part in (pairs.tokens, pairs.lengths, test.tokens, test.lengths):
            data.update(part.numpy())
        settings.origin = (data.hexdigest()[:16], f"--data {settings.data}")
    tokenizer = pairs.tokenizer

    # 2. A new model has random weights.
    if policy is None:
        torch.manual_seed(mixed_seed(settings.seed, 0))
        shape = settings.dim, settings.layers, settings.heads, settings.kv_heads
        mlp = -(-settings.dim * 8 // 3 // 32) * 32  # three matrices of 8/3 of the width cost what two of 4 do
        policy = GPT(Config(tokenizer.size, *shape, mlp, settings.context))
    policy = prepare_model(policy, settings)
    print(f"model: {sum(parameter.numel() for parameter in policy.parameters()) / 1e6:.2f} M parameters on {device}")

    # 3. Cross-entropy on the chosen responses: a mean over the batch's tokens, however it is cut into passes.
    training = Training(settings, len(pairs), policy, ("loss",))
    if not ready:
        pairs.save(settings, "pairs.pt")  # not before --resume was found to fit
        test.save(settings, "test.pt")
    for indices in training:
        documents = [pairs[index][:2] for index in indices]  # prompt and chosen response
        loss = torch.zeros((), device=device)
        for batch in pack(documents, device, settings.pass_tokens):
            logprobs, _ = policy.logprobs(batch)
            batch_loss = -logprobs.sum() / int(pairs.lengths[indices, 1].sum())
            batch_loss.backward()
            loss += batch_loss.detach()
        grad_norm = training.optimize()
        tokens_read = int(pairs.lengths[indices, :2].sum())
        training.log("pairs", tokens_read, loss=summed(loss), grad_norm=grad_norm)

    save_model(settings, policy, tokenizer)

    # 4. How well it predicts held-back responses.
    if test:
        documents = [pair[:2] for pair in test]
        with torch.no_grad():
            total = sum(policy.logprobs(batch)[0].sum() for batch in pack(documents, device, settings.pass_tokens))
        loss = -summed(total).item() / test.lengths[:, 1].sum().item()
        print(f"test loss {loss:.3f} nats a token (perplexity {math.exp(min(loss, 700)):.2f})")
    finish(settings, ["save"], "python reward.py", "--init {} --save REWARD_NAME.pt")


if __name__ == "__main__":
    run_command(main)
