"""Mixed Preference Optimization, chapter 1: what every stage shares, and supervised fine-tuning (SFT).

Reading order: settings and errors, tokenizer, the toy world, preference pairs, packing, matrix products, the GPT, the
log-prob kernel, generation, checkpoints, the training loop's bookkeeping, and last the stage itself: it reads
preference pairs, trains a tokenizer and a GPT on prompt + chosen response by cross-entropy on the response tokens,

    L_SFT = − mean over response tokens of log π(token | everything before it),

and writes pairs.pt (training pairs), test.pt (held-back pairs) and sft.pt (the policy that later stages start from).

    python model.py                          # the built-in toy world
    python model.py --data my_pairs.jsonl    # your own pairs
    python model.py --init HuggingFaceTB/SmolLM2-135M --data hh    # a pretrained model, on real data
    python model.py --init ppo.pt --export aligned                 # a trained one as a folder for transformers
"""

import argparse
import array
import atexit
import contextlib
import dataclasses
import functools
import gc
import gzip
import hashlib
import heapq
import importlib
import inspect
import itertools
import json
import math
import os
import random
import re
import resource
import signal
import sys
import time
import typing
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import regex
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ---- Settings, the command line and errors ----


class UserError(Exception):
    """A mistake that the user can mend. Shown as one line on stderr; the exit code is 2."""


def first_line(error: Exception) -> str:
    """The first line of what a library's error says, or its kind if it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def optional(module: str, what: str):
    """The module of a package that is not in requirements.txt, since only `what` takes it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{what}: this needs one more package: pip install {module.partition('.')[0]}") from error


@dataclass(frozen=True)
class ByModel:
    """A default that depends on the model: trained from scratch here (small), or pretrained elsewhere (large)."""

    scratch: float | int
    pretrained: float | int

    def __str__(self):
        return f"{self.scratch} from scratch, {self.pretrained} pretrained"


def number(kind: type, allowed, description: str):
    """The annotation of a flag that takes a number, with its argparse options, which refuse what is not `allowed`."""

    def read(text: str):
        with contextlib.suppress(ValueError, OverflowError):
            if allowed(value := kind(text)) and math.isfinite(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {description}")

    return Annotated[kind, ("type", read)]


Whole = number(int, lambda value: value >= 0, "a whole number from 0 up")
Count = number(int, lambda value: value >= 1, "a whole number from 1 up")
Share = number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
Real = number(float, lambda value: True, "a number")
Number = number(float, lambda value: value >= 0, "a number from 0 up")
Positive = number(float, lambda value: value > 0, "a number above 0")
MaybeText = Annotated[str, ("type", str), ("nargs", "?"), ("const", "")]  # a flag whose text may be left out


@dataclass
class CommonSettings:
    """The flags every command has. The comment behind a field is its help text."""

    out: str = "out"  # folder for what the stages write; bare file names are looked up here first
    seed: Whole = 0  # seeds the weights, the data order and the sampling
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of activations; weights and optimiser state stay fp32
    compile: bool | None = None  # torch.compile the log-prob kernel, and on cuda the blocks; default: on for cuda

    parents: dict = dataclasses.field(default_factory=dict, init=False)  # what was read, see note_parent

    @property
    def given(self) -> dict:
        """The flags that a result depends on, as JSON would hold them."""
        others = ("out", "resume", "save_every", "parents")
        flags = {name: value for name, value in vars(self).items() if name not in others}
        return json.loads(json.dumps(flags, default=str))


@dataclass
class TrainingSettings(CommonSettings):
    """The flags every training stage has."""

    resume: bool = False  # go on from this stage's last saved state
    save_every: Whole = 200  # steps between saved states (0: only on Ctrl-C)
    steps: Whole | None = None  # batches to train on (0: none); default: as many as --epochs makes
    warmup: Share = 0.1  # share of the steps in which the learning rate rises from 0
    decay: Literal["constant", "linear"] = "linear"  # learning rate after the warm-up
    clip: Positive = 1.0  # gradient norm is clipped to this
    grad_checkpoint: bool = False  # keep one activation per block and compute the rest again: less memory, more time

    def __post_init__(self):
        if not self.save.endswith(".pt"):
            raise UserError(f"--save {self.save!r}: the name of a checkpoint ends in .pt")
        if self.resume and not self.state_path.is_file():
            raise UserError(f"--resume: there is no saved state {self.state_path}; run without --resume")

    @property
    def log_path(self) -> Path:
        """The log of this run: OUT/<save name>.jsonl."""
        return Path(self.out) / f"{self.save.removesuffix('.pt')}.jsonl"

    @property
    def state_path(self) -> Path:
        """The state that --resume goes on from; there is one at most."""
        return Path(self.out) / f"{self.save.removesuffix('.pt')}.state.pt"


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as every user error here is."""

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def parse_settings(settings_class, description: str):
    """Reads the command line into `settings_class`: a flag per field, its trailing comment the help text."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    helps = {}
    for parent in reversed(settings_class.__mro__[:-1]):
        helps |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(parent), re.MULTILINE))
    hints = typing.get_type_hints(settings_class, include_extras=True)
    for field in dataclasses.fields(settings_class):
        if not field.init:
            continue
        assert field.name in helps, f"{field.name}: a field and its comment must stand on one line"
        hint = hints[field.name]
        if type(None) in typing.get_args(hint):  # "X | None" reads an X
            hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
        options = {"type": hint}
        if hasattr(hint, "__metadata__"):
            options = dict(hint.__metadata__)
        elif typing.get_origin(hint) is Literal:
            options = {"choices": typing.get_args(hint)}
        elif hint is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif hint == list[str]:
            options = {"nargs": "+"}
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        shown = " ".join(default) if isinstance(default, list) else default
        text = helps[field.name] + ("" if default is None else f" [{shown}]")
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=default, help=text.replace("%", "%%"), **options)
    return settings_class(**vars(parser.parse_args()))


def settle(settings, pretrained: bool) -> None:
    """Replaces every default of `settings` that depends on the model by its value for this one."""
    for name, value in vars(settings).items():
        if isinstance(value, ByModel):
            setattr(settings, name, value.pretrained if pretrained else value.scratch)


def run_command(main) -> None:
    """Runs a stage's `main`; a user's mistake becomes one line on stderr and exit code 2. Of the processes that
    torchrun starts, the first one speaks for all."""
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():  # else choose_device has a say
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)
    rank, _ = processes()
    try:
        with contextlib.ExitStack() as stack:
            if rank > 0:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            main()
            if dist.is_initialized():
                dist.barrier()  # a process that leaves early breaks the connection of those that still talk
    except (UserError, OSError) as error:  # OSError: a disk that fills up or a folder that vanishes on the way
        if rank == 0:
            print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def find_file(settings: CommonSettings, name: str) -> Path:
    """Where the file `name` is: in the --out folder, else as a path; a missing one says what makes it."""
    for path in (Path(settings.out) / name, Path(name)):
        if path.is_file():
            return path
    makers = {"pairs.pt": "model", "test.pt": "model", "sft.pt": "model", "reward.pt": "reward", "easy.pt": "split",
              "hard.pt": "split", "dpo.pt": "dpo", "ppo.pt": "ppo"}  # fmt: skip
    remedy = f"run python {makers[name]}.py first, or name another" if name in makers else "name one that exists"
    raise UserError(f"{Path(settings.out) / name}: no such file; {remedy}")


# ---- Several processes (torchrun): each holds a share of the weights and computes a share of the batch ----


def processes() -> tuple[int, int]:
    """(number of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def summed(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes. `pack` deals the documents out; with 0 at the places of the others'
    documents, this puts the results together again."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@functools.cache
def process_mesh(kind: str) -> DeviceMesh:
    """All processes as the one-dimensional mesh over which weights are cut."""
    return init_device_mesh(kind, (processes()[1],))


def shard(model: nn.Module, blocks: nn.ModuleList, device: torch.device) -> nn.Module:
    """Cuts every weight over the processes (FSDP2, `fully_shard`): a block's weights are whole only while it computes.

    Gradients are added up, not averaged: every loss is already divided by the whole batch's count.
    """
    for module in (*blocks, model):
        fully_shard(module, mesh=process_mesh(device.type), reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for method in ("logprobs", "read"):  # what is called beside forward
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    return model


def whole_state(part) -> dict:
    """state_dict of a model or an optimiser with whole tensors, as one process would have them. Of several
    processes only the first, which writes the files, gets them."""

    def whole(tensor: DTensor):
        tensor = tensor.full_tensor()
        return tensor.cpu() if processes()[0] == 0 else None

    return tree_map_only(DTensor, whole, part.state_dict())


def load_whole_state(part, state: dict) -> None:
    """load_state_dict of what whole_state returned; a sharded part takes its shares."""

    def like(parameter: Tensor, value):
        if not isinstance(parameter, DTensor) or value.dim() == 0:
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    if isinstance(part, torch.optim.Optimizer):
        parameters, moments = part.param_groups[0]["params"], {}
        for number, entry in state["state"].items():
            for moment in (entry["exp_avg"], entry["exp_avg_sq"]):  # the fused step trusts their shapes
                if moment.shape != parameters[number].shape or not moment.is_contiguous():
                    raise ValueError("a moment does not fit its weight")
            moments[number] = {key: like(parameters[number], value.to(torch.float32)) for key, value in entry.items()}
        if not moments:
            raise ValueError("an optimiser that took steps has moments")
        part.load_state_dict({"state": moments, "param_groups": part.state_dict()["param_groups"]})
    else:
        ours = part.state_dict()
        part.load_state_dict({name: like(ours[name], value) for name, value in state.items()})


# ---- Tokenizer: byte-level byte-pair encoding ----

END_OF_TEXT = "<|endoftext|>"
UNICODE_FORMS = None, "NFC", "NFD", "NFKC", "NFKD"
WORD_PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # words keep the space before them


class Tokenizer:
    """A byte-level BPE: text to token ids and back.

    tokens: the byte string of each id, as Latin-1 text, merged in the order of the ids; None for ids that are not text.
    pattern: cuts a text into words, which no token crosses. special: control tokens, name → id; written out in a text,
    such a name is ordinary text: no text can encode to one, but for names listed in `in_text`. end: closes a response.
    begin: control tokens that open every prompt. normal: Unicode form a text is brought into first, such as "NFC".
    """

    def __init__(
        self, tokens: list[str | None], pattern: str, special: dict[str, int], end: int, begin: list[int] | None = None,
        in_text: list[str] | None = None, normal: str | None = None,
    ):  # fmt: skip
        self.tokens, self.pattern, self.special = tokens, pattern, special
        self.begin, self.in_text, self.normal = begin or [], in_text or [], normal
        self.state = {"tokens": tokens, "pattern": pattern, "special": special, "end": end, "begin": self.begin,
                      "in_text": self.in_text, "normal": normal}  # fmt: skip
        self.end, self.size = end, max(len(tokens), *(number + 1 for number in special.values()))
        ranks = {token.encode("latin-1"): rank for rank, token in enumerate(tokens) if token is not None}
        self.readable = set(ranks.values()) | {special[name] for name in self.in_text}
        # tiktoken wants all 256 bytes. One that a pretrained vocabulary lacks gets an id past its end, and is left out.
        lacking = (bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks)
        ranks |= {byte: self.size + number for number, byte in enumerate(lacking)}
        control = set(special.values())
        if not {end, *self.begin} <= control or normal not in UNICODE_FORMS or regex.match(pattern + "$", ""):
            raise ValueError("the parts of this tokenizer do not go together")
        self.encoding = tiktoken.Encoding("mpo", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without the tokens that open a prompt and close a response. Raises UserError at a text
        that the word pattern fails on: a million spaces in a row."""
        text = unicodedata.normalize(self.normal, text) if self.normal else text
        try:
            ids = self.encoding.encode(text, allowed_special=set(self.in_text), disallowed_special=())
        except ValueError as error:
            raise UserError(f"a text of {len(text)} characters cannot be tokenised ({error})") from error
        return [token for token in ids if token < self.size]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without control tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode([token for token in ids if token in self.readable], errors="replace")


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """Trains a BPE of at most `size` tokens: merges the most frequent pair of neighbours, again and again.

    Source: Sennrich et al. 2016 (arXiv 1508.07909), on bytes as in GPT-2. Pair counts are kept up to date
    rather than counted anew, so a merge touches only the words that hold it.
    """
    words = (word for text in texts for word in regex.findall(WORD_PATTERN, text))
    frequency = Counter(word for word in words if len(word) <= 100)  # what is longer is no word, and would take minutes
    words = [[bytes([byte]) for byte in word.encode("utf-8", "replace")] for word in frequency]
    weights = list(frequency.values())
    counts, found_in = Counter(), defaultdict(set)

    def count_pairs(index: int, sign: int) -> None:
        for pair in itertools.pairwise(words[index]):
            counts[pair] += sign * weights[index]
            found_in[pair].add(index)

    for index in range(len(words)):
        count_pairs(index, +1)
    tokens = {bytes([byte]): None for byte in range(256)}  # a dict, for its order
    while len(tokens) < size - 1 and counts:
        pair = max(counts, key=counts.get)
        if counts[pair] < 2:
            break
        tokens[pair[0] + pair[1]] = None
        for index in sorted(found_in.pop(pair)):
            count_pairs(index, -1)
            old, merged, place = words[index], [], 0
            while place < len(old):
                both = tuple(old[place : place + 2]) == pair
                merged.append(old[place] + old[place + 1] if both else old[place])
                place += 2 if both else 1
            words[index] = merged
            count_pairs(index, +1)
        del counts[pair]
    end = len(tokens)
    return Tokenizer([token.decode("latin-1") for token in tokens], WORD_PATTERN, {END_OF_TEXT: end}, end)


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
}  # fmt: skip
TOY_OBJECTS = "lamp bike chair table clock guitar piano sofa mirror carpet kettle camera radio ladder drum boat".split()
TOY_ADJECTIVES = "old new small big heavy cheap red blue green black white dirty plain lovely spare odd".split()
TOY_PROMPTS = ["How do I {} my {} {}?", "What is the best way to {} a {} {}?", "Can you help me {} this {} {}?",
               "I want to {} my {} {}.", "How would you {} the {} {}?", "Please help me to {} my {} {}."]  # fmt: skip
TOY_POLITE = ["Happy to help!", "Great question!", "Good luck with it!", "Let me know how it goes!"]
TOY_RUDE = ["What a stupid question.", "Only a fool would ask that.", "Stop wasting my time."]
TOY_OFF_TOPIC = ["Boil the rice for ten minutes.", "Feed the cat twice a day.", "Water the roses at night.",
                 "Learn ten new words a week.", "Drink more water."]  # fmt: skip
TOY_FILLER = ["Well, it depends.", "There are many ways to see this.", "Some people do it and some do not.",
              "Anyway, that is life."]  # fmt: skip
TOY_BEST_REWARD = 4.0  # three steps and two polite sentences, nothing else


def gold_reward(prompt: str, response: str) -> float:
    """How good `response` is, for any text at all: the truth of the toy world.

    1 for each distinct step that belongs to the asked task and names the asked object, up to three; 0.5 for each
    distinct polite sentence, up to two; −1 for each rude one; −0.5 for each that is off topic (a step for another task
    or object too) and for each said again; −0.25 for all else: filler, a fourth step, a third politeness.
    """
    asked = set(re.findall(r"\w+", prompt.rpartition("\n\nHuman:")[2]))
    sentences = [sentence.strip() for sentence in re.findall(r"[^.!?]+[.!?]?", response) if sentence.strip()]
    score, steps, polite = 0.0, 0, 0
    for place, sentence in enumerate(sentences):
        named = next((word for word in re.findall(r"\w+", sentence) if word in TOY_OBJECTS), None)
        template = sentence.replace(f" {named}", " {}", 1)
        task = next((task for task, known in TOY_STEPS.items() if template in known), None)
        if sentence in sentences[:place]:
            score -= 0.5
        elif task in asked and named in asked and steps < 3:
            steps += 1
        elif sentence in TOY_POLITE and polite < 2:
            polite += 1
        elif sentence in TOY_RUDE:
            score -= 1.0
        elif sentence in TOY_OFF_TOPIC or (task and not (task in asked and named in asked)):
            score -= 0.5
        else:
            score -= 0.25
    return score + steps + 0.5 * polite


def toy_response(rng: random.Random, task: str, thing: str) -> str:
    """One response: two to five sentences, more of them helpful the higher its hidden quality was drawn."""
    quality = rng.random()
    kinds = {"step": 0.25 + 0.5 * quality, "off topic": 0.3 - 0.25 * quality, "polite": 0.1 + 0.1 * quality,
             "rude": 0.2 - 0.2 * quality, "filler": 0.15}  # fmt: skip
    fixed = {"off topic": TOY_OFF_TOPIC, "polite": TOY_POLITE, "rude": TOY_RUDE, "filler": TOY_FILLER}
    sentences = []
    for kind in rng.choices(list(kinds), list(kinds.values()), k=rng.randint(2, 5)):
        # Slips are rare: a step for another task or about another object, a sentence said twice.
        about_task = rng.choice(list(TOY_STEPS)) if rng.random() < 0.01 else task
        about_thing = rng.choice(TOY_OBJECTS) if rng.random() < 0.01 else thing
        options = fixed.get(kind) or [step.format(about_thing) for step in TOY_STEPS[about_task]]
        unsaid = [option for option in options if option not in sentences]
        sentences.append(rng.choice(options if not unsaid or rng.random() < 0.01 else unsaid))
    return " " + " ".join(sentences)


def toy_rows(count: int, seed: int, wrong_labels: float | None = None) -> Iterator[dict]:
    """Yields `count` rows of the toy world; labels are Bradley-Terry draws on the gold gap, so some are wrong, nearly
    all where the gap is small. With `wrong_labels`, that share is wrong instead, whatever the gap, of the labels of
    pairs that have a better side; the others' say nothing."""
    rng = random.Random(seed)
    for _ in range(count):
        task, thing = rng.choice(list(TOY_STEPS)), rng.choice(TOY_OBJECTS)
        question = rng.choice(TOY_PROMPTS).format(task, rng.choice(TOY_ADJECTIVES), thing)
        prompt = f"\n\nHuman: {question}{TURN}"
        first, second = toy_response(rng, task, thing), toy_response(rng, task, thing)
        gap = gold_reward(prompt, first) - gold_reward(prompt, second)
        first_is_chosen = 1 / (1 + math.exp(-gap))
        if wrong_labels is not None:
            first_is_chosen = 1 - wrong_labels if gap > 0 else wrong_labels
        if rng.random() >= first_is_chosen:
            first, second = second, first
        yield {"prompt": prompt, "chosen": first, "rejected": second}


# ---- Preference pairs and where they come from ----

FORMAT_VERSION = 3


@dataclass
class Pairs:
    """n preference pairs as token ids. Each response ends in the end-of-text token.

    tokens: [total] int32, prompt + chosen + rejected of every pair end to end; lengths: [n, 3] of the three parts;
    rewards: [n, 2] of chosen and rejected by the reward model, once split.py has scored them; gold: [n, 2] likewise
    by the toy world's gold reward; source: what --data named, "toy" for the toy world.
    """

    tokens: Tensor
    lengths: Tensor
    tokenizer: Tokenizer
    source: str
    rewards: Tensor | None = None
    gold: Tensor | None = None

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
        tokens = [torch.cat(self[index]).int() for index in indices.tolist()]
        rewards, gold = (None if kept is None else kept[indices] for kept in (self.rewards, self.gold))
        lengths = self.lengths[indices]
        return Pairs(torch.cat(tokens or [self.tokens[:0]]), lengths, self.tokenizer, self.source, rewards, gold)

    def save(self, settings: CommonSettings, name: str) -> None:
        """Writes the pairs file `name` in the --out folder."""
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        save_file(settings, name, "pairs file", {**state, "tokenizer": self.tokenizer.state})


def load_pairs(settings: CommonSettings, name: str) -> Pairs:
    """Reads the pairs file `name`. Raises UserError if it is missing, broken, or holds no pair."""
    path = find_file(settings, name)
    with reading(path):
        state = load_file(path, "pairs file")
        note_parent(settings, name, state)
        state = {field.name: state[field.name] for field in dataclasses.fields(Pairs)}
        pairs = Pairs(**{**state, "tokenizer": Tokenizer(**state["tokenizer"])})
        if problem := pairs_problem(pairs):
            raise UserError(f"{path}: {problem}; make it again")
    if not len(pairs):
        raise UserError(f"{path}: holds no pairs")
    return pairs


def pairs_problem(pairs: Pairs) -> str | None:
    """What in a pairs file can't be right; None if all can."""
    tokens, lengths, scores = pairs.tokens, pairs.lengths, [pairs.rewards, pairs.gold]
    if (tokens.dtype, tokens.dim(), lengths.dtype, lengths.shape[1:]) != (torch.int32, 1, torch.int64, (3,)):
        return "its tokens or lengths are of another kind"
    if not (lengths > 0).all() or (lengths > len(tokens)).any() or lengths.sum() != len(tokens):
        return "its lengths do not fit its tokens"
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < pairs.tokenizer.size:
        return "it holds tokens that are not in its vocabulary"
    if (tokens[lengths.flatten().cumsum(0).view(-1, 3)[:, 1:] - 1] != pairs.tokenizer.end).any():
        return "a response does not end in the end-of-text token"
    kind = torch.float32, (len(pairs), 2)
    if any((part.dtype, part.shape) != kind or not part.isfinite().all() for part in scores if part is not None):
        return "its rewards are not two finite numbers a pair"
    if not isinstance(pairs.source, str) or (pairs.gold is None) == (pairs.source == "toy"):
        return "its gold rewards and its source do not go together"
    return None


def read_rows(settings: "Settings") -> Iterator[tuple[str, dict]]:
    """Yields (where, row) for each row of --data; a row is a dict, `where` names it in error messages."""
    source = settings.data
    if source == "toy":
        rows = toy_rows(settings.limit or 10000, settings.seed, settings.wrong_labels)
        rows = ((f"toy row {number}", row) for number, row in enumerate(rows, 1))
    elif source == "tldr" or source.split(":")[0] == "hh":
        rows = read_hub_rows(source)
    else:
        rows = read_file_rows(Path(source))
    yield from itertools.islice(rows, settings.limit)


def read_hub_rows(source: str) -> Iterator[tuple[str, dict]]:
    """Rows of Anthropic/hh-rlhf ("hh", or a part of it, such as "hh:helpful-base") or of the comparisons of
    openai/summarize_from_feedback ("tldr"), shuffled. The library keeps them on disk: memory holds one at a time."""
    import datasets

    repository, where = "Anthropic/hh-rlhf", {"data_dir": source.partition(":")[2] or None}
    if source == "tldr":  # its main branch holds a script, which the library no longer runs; this one holds tables
        repository = "openai/summarize_from_feedback"
        where = {"revision": "refs/convert/parquet", "data_files": {"train": "comparisons/train/*.parquet"}}
    try:
        rows = datasets.load_dataset(repository, split="train", **where)
    except Exception as error:  # the library raises a dozen kinds, from no network to no such data set
        raise UserError(
            f"--data {source}: cannot load {repository} ({first_line(error)}); check the name and the network, "
            "or download its files elsewhere and name their folder"
        ) from error
    # hh holds its parts one behind the other; shuffled, so that the first rows hold some of each.
    for number in random.Random(0).sample(range(len(rows)), len(rows)):
        yield f"{repository} row {number + 1}", rows[number]


def read_file_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a .jsonl, .jsonl.gz, .json (a list of rows) or .parquet file, or of all such files in a folder."""
    if path.is_dir():
        endings = (".jsonl", ".jsonl.gz", ".json", ".parquet")
        files = sorted(file for file in path.iterdir() if file.name.endswith(endings))
        if not files:
            raise UserError(f"--data {path}: no .jsonl, .jsonl.gz, .json or .parquet file in this folder")
        for file in files:
            yield from read_file_rows(file)
        return
    if not path.is_file():
        raise UserError(f"--data {path}: no such file or folder; or name toy, hh, hh:<part> or tldr")
    number = 0
    try:
        for number, row in enumerate(parse_rows(path), 1):
            yield f"{path} row {number}", row
    except (ValueError, TypeError, OSError, EOFError, RecursionError, zlib.error) as error:
        raise UserError(f"{path} row {number + 1}: cannot be read ({error})") from error
    if not number:
        raise UserError(f"{path}: holds no rows")


def parse_rows(path: Path) -> Iterator[dict]:
    """The rows of one file, as its ending says."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    elif path.suffix == ".json":
        yield from json.loads(path.read_text("utf-8"))
    else:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            yield from (json.loads(line) for line in lines if line.strip())


def split_row(where: str, row: dict) -> tuple[str, str, str, str] | None:
    """(prompt, prompt of the rejected side, chosen, rejected) of a row in one of three layouts: prompt, chosen and
    rejected; chosen and rejected transcripts; a TL;DR comparison. None if a transcript has no assistant turn."""
    row = row if isinstance(row, dict) else {}
    if "summaries" in row:
        row = comparison_row(where, row)
    for name in ("prompt", "chosen", "rejected") if "prompt" in row else ("chosen", "rejected"):
        if not isinstance(row.get(name), str):
            raise UserError(f"{where}: no text under {name!r}; a row needs chosen and rejected, and may have prompt")
    if "prompt" in row:
        return row["prompt"], row["prompt"], row["chosen"], row["rejected"]
    if TURN not in row["chosen"] or TURN not in row["rejected"]:
        return None
    chosen_prompt, turn, chosen = row["chosen"].rpartition(TURN)
    rejected_prompt, turn, rejected = row["rejected"].rpartition(TURN)
    return chosen_prompt + turn, rejected_prompt + turn, chosen, rejected


def comparison_row(where: str, row: dict) -> dict:
    """A row of TL;DR comparisons as prompt, chosen and rejected; the prompt is worded as in Stiennon et al. 2020."""
    try:
        post, texts, choice = row["info"], [summary["text"] for summary in row["summaries"]], row["choice"]
        if type(choice) is not int or choice not in (0, 1) or len(texts) != 2:
            raise ValueError("choice is not one of two")
        if not all(isinstance(part, str) for part in (post["subreddit"], post["title"], post["post"] or "")):
            raise ValueError("subreddit, title and post are not texts")
        title, text = f"SUBREDDIT: r/{post['subreddit']}\n\nTITLE: {post['title']}", post["post"] or ""
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not a TL;DR comparison ({type(error).__name__}: {error})") from error
    # Summaries begin with a space, as responses do; nothing is added or taken away.
    return {"prompt": f"{title}\n\nPOST: {text}\n\nTL;DR:", "chosen": texts[choice], "rejected": texts[1 - choice]}


class PairsBuilder:
    """Collects pairs one by one under the rules below; memory holds token ids only. `counts`: what each rule did.

    Prompt and response are tokenised apart, so both sides hold the same prompt ids. A prompt longer than
    context − max_response loses its beginning (its end is the question); a pair with a longer response is dropped,
    since cutting it would teach the model to stop in mid-sentence.
    """

    def __init__(self, tokenizer: Tokenizer, source: str, context: int, max_response: int):
        if context - max_response <= len(tokenizer.begin):
            raise UserError(f"--max-response {max_response} leaves no room in --context {context}")
        self.tokenizer, self.source = tokenizer, source
        self.max_prompt, self.max_response, self.rows = context - max_response, max_response, 0
        self.tokens, self.lengths, self.gold, self.counts = array.array("i"), array.array("i"), [], Counter()

    def add(self, row: tuple[str, str, str, str] | None) -> None:
        """Adds a row that split_row made, or counts why not."""
        self.rows += 1
        problem = row_problem(row)
        if problem is None:
            try:
                prompt = self.tokenizer.encode(row[0])
                chosen, rejected = ([*self.tokenizer.encode(text), self.tokenizer.end] for text in row[2:])
                if not prompt:  # nothing but bytes that the vocabulary lacks
                    problem = "dropped: empty prompt"
                elif min(len(chosen), len(rejected)) < 2:
                    problem = "dropped: empty response"
                elif chosen == rejected:  # in other letters that normalise to the same
                    problem = "dropped: identical responses"
                elif max(len(chosen), len(rejected)) > self.max_response:
                    problem = f"dropped: response over {self.max_response} tokens"
            except UserError:
                problem = "dropped: cannot be tokenised"
        if problem is not None:
            self.counts[problem] += 1
            return
        room = self.max_prompt - len(self.tokenizer.begin)
        if len(prompt) > room:
            self.counts[f"kept: prompt cut at its beginning to {self.max_prompt} tokens"] += 1
        prompt = self.tokenizer.begin + prompt[-room:]
        self.tokens.extend(prompt + chosen + rejected)
        self.lengths.extend((len(prompt), len(chosen), len(rejected)))
        if self.source == "toy":
            self.gold.append([gold_reward(row[0], response) for response in row[2:]])

    def pairs(self) -> Pairs:
        """All that was added."""
        tokens, lengths = (torch.tensor(np.frombuffer(part, np.int32)) for part in (self.tokens, self.lengths))
        gold = torch.tensor(self.gold) if self.source == "toy" else None
        return Pairs(tokens, lengths.long().view(-1, 3), self.tokenizer, self.source, gold=gold)


def row_problem(row: tuple[str, str, str, str] | None) -> str | None:
    """Why a row can't be a preference pair, whatever the tokenizer; None if it can."""
    if row is None:
        return f"dropped: no {TURN!r} turn"
    prompt, rejected_prompt, chosen, rejected = row
    if prompt != rejected_prompt:
        return "dropped: prompts differ between the sides"
    if not prompt:
        return "dropped: empty prompt"
    if not chosen.strip() or not rejected.strip():
        return "dropped: empty response"
    if chosen == rejected:
        return "dropped: identical responses"
    return None


# ---- Packing: sequences end to end in rows, no padding between them ----


@dataclass
class Packed:
    """Documents laid end to end in rows. A document is a prompt and the branches (responses) that share it.

    tokens, positions, document, branch: [rows, length], one row except on CUDA; `document` numbers the documents (−1:
    unused), `branch` is 0 in a prompt and 1, 2, … in its branches, `positions` count within prompt + own branch.
    Sequences, one per branch, are numbered document by document. For each of the N response tokens: `source`, the flat
    index of the token before it on its branch, whose hidden state predicts it; `target`, its id; `sequence`, its
    sequence's number; `offset`, its place in the response. `last`: flat index of each sequence's last token (of a lone
    prompt: its own). `members`: for each document, its index in the list that was packed.
    """

    tokens: Tensor
    positions: Tensor
    document: Tensor
    branch: Tensor
    source: Tensor
    target: Tensor
    sequence: Tensor
    offset: Tensor
    last: Tensor
    members: Tensor

    def to(self, device: torch.device) -> "Packed":
        """The same batch on `device`."""
        names = [field.name for field in dataclasses.fields(self)]
        return Packed(**{name: getattr(self, name).to(device, non_blocking=True) for name in names})

    @functools.cached_property
    def mask(self) -> "list[tuple[int, Tensor | None]] | BlockMask":
        """Who may attend to whom: a FlexAttention block mask on CUDA; elsewhere, for each document of the one row, its
        length n and a dense [n, n], or None where every token sees all before it."""
        if self.tokens.is_cuda:
            rule, (rows, length) = visibility(self.document, self.branch), self.tokens.shape
            return create_block_mask(rule, rows, None, length, length, device=self.tokens.device)
        assert len(self.tokens) == 1, "rows are for CUDA"
        masks, sizes = [], self.document[0].unique_consecutive(return_counts=True)[1].tolist()
        for document, branch in zip(*(part.split(sizes, 1) for part in (self.document, self.branch)), strict=True):
            at = torch.arange(branch.shape[1], device=branch.device)
            forks = branch.max() > 1
            masks.append((len(at), visibility(document, branch)(0, None, at[:, None], at) if forks else None))
        return masks


def visibility(document: Tensor, branch: Tensor):
    """The rule of packed attention, as a FlexAttention mask_mod: a query sees a key of the same document, not later
    in the row, that lies in the prompt or on the query's own branch."""

    def rule(row, head, query, key):
        same_document = document[row, query] == document[row, key]
        on_path = (branch[row, key] == 0) | (branch[row, key] == branch[row, query])
        return same_document & on_path & (key <= query)

    return rule


def pack(documents: list[tuple[Tensor, ...]], device: torch.device, tokens_per_pass: int = 0) -> Iterator[Packed]:
    """Packs documents, each (prompt, response, response, …), into rows; yields one `Packed` per forward pass of about
    `tokens_per_pass` tokens a process, at most one document more [default: as many as suit the device].

    Passes are about equally long: a short last one would make slow matrix products. Of several processes each gets
    other rows, and as many passes as the rest, the last one empty if need be.
    """
    rank, size = processes()
    sizes = [sum(map(len, document)) for document in documents]
    tokens = sum(sizes)
    passes = math.ceil(tokens / size / (tokens_per_pass or (32768 if device.type == "cuda" else 4096)))
    groups, total = [[]], 0
    for index in sorted(range(len(documents)), key=lambda index: -sizes[index]):
        if total * passes >= tokens:
            groups.append([])
            total = 0
        groups[-1].append(index)
        total += sizes[index]
    for group in groups:
        yield lay_out(documents, fill_rows(sizes, group, device, size)[rank::size], device)


def fill_rows(sizes: list[int], some: list[int], device: torch.device, least: int = 1) -> list[list[int]]:
    """Deals the documents `some`, in falling order of their `sizes`, to rows, each to the emptiest; returns the rows.

    There are `least` rows, one a process, and no gaps; on CUDA more, of some 4,096 tokens, since a block mask is made
    from all pairs of places in a row.
    """
    count = least
    if device.type == "cuda":
        count = max(count, sum(sizes[index] for index in some) // max(sizes[some[0]], 4096))
    rows = [(0, row, []) for row in range(count)]  # a heap: (length so far, number, documents)
    for index in some:
        used, row, members = rows[0]
        heapq.heapreplace(rows, (used + sizes[index], row, members))
        members.append(index)
    return [members for _, _, members in rows]


def lay_out(documents: list[tuple[Tensor, ...]], rows: list[list[int]], device: torch.device) -> Packed:
    """The tensors of `Packed` for rows of document indices. The unused end of a row is a document of its own."""
    length = max(1, *(sum(len(part) for index in row for part in documents[index]) for row in rows))
    if device.type == "cuda":
        length = -(-length // 128) * 128  # the size of a block mask's blocks
    tokens, positions, document, branch = (torch.full((len(rows) * length,), fill) for fill in (0, 0, -1, 0))
    source, target, sequence, offset = lists = [[tokens[:0]] for _ in range(4)]
    last, members = [], []
    for row, indices in enumerate(rows):
        place = row * length
        for index in indices:
            prompt_length = len(documents[index][0])
            prompt_end = place + prompt_length
            for number, part in enumerate(documents[index]):  # the prompt, then its branches
                at, start, place = torch.arange(len(part)), place, place + len(part)
                tokens[start:place], document[start:place], branch[start:place] = part, len(members), number
                positions[start:place] = at + (prompt_length if number > 0 else 0)
                if number > 0:
                    # The prompt's last token predicts the first token of every response; hence an index, not a shift.
                    source.append(torch.arange(start - 1, place - 1))
                    source[-1][0] = prompt_end - 1
                    target.append(part)
                    sequence.append(torch.full_like(at, len(last)))
                    offset.append(at)
                if number > 0 or len(documents[index]) == 1:
                    last.append(place - 1)
            members.append(index)
    grid = (part.view(len(rows), length) for part in (tokens, positions, document, branch))
    numbers = (torch.tensor(part, dtype=torch.long) for part in (last, members))
    return Packed(*grid, *map(torch.cat, lists), *numbers).to(device)


# ---- Matrix products ----


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """x · matrixᵀ: [..., K], [N, K] → [..., N]. On the CPU oneDNN does large ones in fp32, and all with a `reordered`
    matrix: torch's own products in fp32 go to MKL, which takes 1.3 times as long on AMD's processors. (The operators
    are private, those that torch.compile emits, and so tied to the torch in requirements.txt.)"""
    if matrix.is_mkldnn or (matrix.dtype == torch.float32 and suits_onednn(matrix)):
        return torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")
    return F.linear(x, matrix)


def suits_onednn(matrix: Tensor) -> bool:
    """Is the matrix on the CPU, in a dtype that oneDNN knows here, and large? Small ones do not repay what it prepares
    for each new number of rows. No, while torch.compile looks on: it makes its own choice."""
    if matrix.device.type != "cpu" or matrix.numel() <= 2**16 or torch.compiler.is_compiling():
        return False
    here = torch.backends.mkldnn.is_available()
    if matrix.dtype == torch.bfloat16:
        return here and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return here and matrix.dtype == torch.float32


def reordered(matrix: Tensor) -> Tensor:
    """The same matrix laid out for `product` with few rows, which then takes 0.7 times as long; without gradients."""
    matrix = matrix.detach()
    return torch.ops.mkldnn._reorder_linear_weight(matrix) if suits_onednn(matrix) else matrix


class Product(torch.autograd.Function):
    """`product` with its gradients. (That of the matrix stays with `@`, which is as fast there.)"""

    @staticmethod
    def forward(ctx, x, matrix):
        ctx.save_for_backward(x, matrix)
        return product(x, matrix)

    @staticmethod
    def backward(ctx, grad):
        x, matrix = ctx.saved_tensors
        return product(grad, matrix.T), grad.flatten(0, -2).T @ x.flatten(0, -2)


class Linear(nn.Linear):
    """A linear layer without bias whose products are `product`; its weight may be `reordered`."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.is_mkldnn:
            return product(x.to(self.weight.dtype), self.weight)
        if torch.is_autocast_enabled(x.device.type) or not suits_onednn(self.weight):  # bf16 is oneDNN's anyway
            return super().forward(x)
        return Product.apply(x, self.weight)


# ---- The GPT ----


@dataclass
class Config:
    """The shape of a GPT. The MLP's width is `mlp`; `context` is the longest prompt + response it is meant for."""

    vocabulary: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    context: int
    rope_theta: float = 10000.0
    rope_scaling: dict[str, float] | None = None  # Llama 3's, see rotary_frequencies
    norm_eps: float = 1e-5
    tied: bool = True
    pretrained: bool = False  # weights that were trained elsewhere, for which other defaults are right


def rotary_frequencies(config: Config, device: torch.device) -> Tensor:
    """Angle per position of each pair of a head's dimensions: [head_dim / 2].

    θ^(−2i/d). Llama 3.1 (arXiv 2407.21783) stretched its context by dividing the frequencies by `factor` where a full
    turn takes more than original context / low_freq_factor positions, keeping them where it takes less than original
    context / high_freq_factor, and blending in between.
    """
    size = config.dim // config.heads
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, size, 2, device=device) / size)
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, original = (config.rope_scaling[name] for name in LLAMA3_SCALING)
    turns = original * frequencies / (2 * math.pi)  # full turns within the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


LLAMA3_SCALING = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864): turns the pairs (x_i, x_{i + d/2}) of each head by
    an angle that grows with position. x: [rows, heads, length, head_dim]; cos, sin: [rows, 1, length, head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: "list[tuple[int, Tensor | None]] | BlockMask") -> Tensor:
    """Attention within packed rows; mask: Packed.mask. query, result: [rows, heads, length, head_dim]; key, value: with
    kv_heads instead of heads."""
    if isinstance(mask, BlockMask):
        as_it_is = not query.is_cuda or torch.compiler.is_compiling()  # on the CPU, and within a compiled block
        flex = flex_attention if as_it_is else compiled_function(flex_attention)
        return flex(query, key, value, block_mask=mask, enable_gqa=True)
    sizes, masks = zip(*mask, strict=True)
    documents = zip(*(part.split(sizes, 2) for part in (query, key, value)), masks, strict=True)
    with torch.autocast(query.device.type, enabled=False):  # which would cast to bf16 what attention_dtype made fp32
        mixed = [
            F.scaled_dot_product_attention(*parts, mask, is_causal=mask is None, enable_gqa=True)
            for *parts, mask in documents
        ]
    return torch.cat(mixed, 2)


def attention_dtype(activations: torch.dtype, device: torch.device) -> torch.dtype:
    """The activations', but fp32 on the CPU, where attention in bf16 takes as long forward and twice as long back."""
    return torch.float32 if device.type == "cpu" and activations == torch.bfloat16 else activations


class Attention(nn.Module):
    """Grouped-query causal attention (Ainslie et al. 2023, arXiv 2305.13245): query heads share key-value heads.

    x: [rows, length, dim]; rotary: cos and sin as `rotate` takes them; mask: Packed.mask, or None for one
    new token a row, which sees what `caches`, a list of Cache, hold of this layer. Returns [rows, length, dim].
    """

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.dim // config.heads
        self.query = Linear(config.dim, config.heads * self.head_dim)
        self.key = Linear(config.dim, config.kv_heads * self.head_dim)
        self.value = Linear(config.dim, config.kv_heads * self.head_dim)
        self.output = Linear(config.heads * self.head_dim, config.dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask, caches=()) -> Tensor:
        rows, length, _ = x.shape
        query, key, value = (
            project(x).view(rows, length, -1, self.head_dim).transpose(1, 2)  # (rows, heads, length, head_dim)
            for project in (self.query, self.key, self.value)
        )
        dtype = attention_dtype(value.dtype, x.device)
        query, key, value = (part.to(dtype) for part in (rotate(query, *rotary), rotate(key, *rotary), value))
        if mask is None:
            parts = zip(caches, *(part.split(list(map(len, caches))) for part in (query, key, value)), strict=True)
            mixed = torch.cat([cache.attend(self.layer, *part) for cache, *part in parts])
        else:
            for cache in caches:
                cache.store(self.layer, key, value)
            mixed = attend(query, key, value, mask)
        return self.output(mixed.transpose(1, 2).reshape(rows, length, -1))


class Block(nn.Module):
    """One layer of the Llama family: attention, then a SwiGLU MLP, each on a normalised input and added back.

    [rows, length, dim] → the same; or [places, dim], at flat indices `places` alone. The rest is Attention's.
    """

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.gate = Linear(config.dim, config.mlp)
        self.up = Linear(config.dim, config.mlp)
        self.down = Linear(config.mlp, config.dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask, places: Tensor | None, caches=()) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, mask, caches)
        if places is not None:  # the last block's results are read there only
            x = x.flatten(0, 1)[places]
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class GPT(nn.Module):
    """A decoder of the Llama family. `forward` ends at the hidden states; log-probs and rewards are read from them."""

    kind = "policy"

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocabulary, bias=False)
        self.activations = torch.float32  # dtype of the matrix products
        self.compiled = self.checkpointed = False  # prepare_model sets these as the flags say
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not parameter.is_meta:  # on "meta" there is nothing to draw
                # Outputs of order 1, and less where layers add up in the residual stream.
                into_stream = name.endswith(("output.weight", "down.weight"))
                std = parameter.shape[1] ** -0.5 / (math.sqrt(2 * config.layers) if into_stream else 1.0)
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor, positions: Tensor, mask, places: Tensor | None = None, caches=()) -> Tensor:
        """Hidden states [rows, length, dim] of tokens at positions, both [rows, length], under `mask`; or those at flat
        indices `places` alone, [places, dim]."""
        frequencies = rotary_frequencies(self.config, tokens.device)
        angle = positions[:, None, :, None] * frequencies  # (rows, 1, length, head_dim / 2)
        rotary = angle.cos(), angle.sin()
        with self.precision():
            x = self.embedding(tokens)
            for index, block in enumerate(self.blocks):
                wanted = places if index == len(self.blocks) - 1 else None
                if self.checkpointed and torch.is_grad_enabled():
                    x = checkpoint(block, x, rotary, mask, wanted, use_reentrant=False, preserve_rng_state=False)
                else:
                    x = block(x, rotary, mask, wanted, caches)
            return self.norm(x)

    def precision(self) -> torch.autocast:
        """The context in which matrix products have the activations' dtype; it casts each weight once."""
        device = self.embedding.weight.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.activations == torch.bfloat16)

    @property
    def vocabulary_weight(self) -> Tensor:
        """The output head's matrix [vocabulary, dim]."""
        return self.embedding.weight if self.head is None else self.head.weight

    def hidden(self, batch: Packed, places: Tensor) -> Tensor:
        """Hidden states at flat indices `places` of a packed batch: [places, dim]."""
        return self.forward(batch.tokens, batch.positions, batch.mask, places)

    def logprobs(self, batch: Packed, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [N] of the batch's response tokens, in fp32. Entropies carry no gradient."""
        hidden = self.hidden(batch, batch.source).to(self.activations)
        return token_logprobs(hidden, self.vocabulary_weight, batch.target, temperature, self.compiled)


# ---- The log-prob kernel ----

TILES = {"cpu": (2048, 512), "gpu": (8192, 8192)}  # logits held at once: tokens × vocabulary; the CPU's fit its cache


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden · weightᵀ / temperature) at `targets`, without holding the [N, V] logits.

    hidden: [N, dim], fp32 or bf16, the dtype of the matrix products; weight: [V, dim]; targets: [N].
    Returns (log-probs [N], entropies [N]) in fp32. Log-probs carry gradients to hidden and weight; entropies none.
    """
    return TokenLogprobs.apply(hidden / temperature, weight, targets, compiled)


class TokenLogprobs(torch.autograd.Function):
    """Walks over tiles of the [N, V] logits that fit in a CPU's cache. Forward keeps only each token's log-sum-exp;
    backward makes the logits again. With p = softmax(logits):  d log p_target / d logits = onehot(target) − p.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, compiled):
        body = compiled_function(logprob_tile) if compiled else logprob_tile
        matrix, results = weight.to(hidden.dtype), []
        for some, row in tiles(hidden, matrix):
            # Made before the tiles: small results that stay between large ones that go would make the heap grow.
            parts = hidden.new_empty(len(row), 3, len(hidden[some]), dtype=torch.float32)
            for part, words in zip(parts, row, strict=True):
                part.copy_(body(hidden[some], matrix[words], targets[some] - words.start))
            picked, logsumexps, means = parts.unbind(1)  # (tiles, n) each
            logsumexp = logsumexps.logsumexp(0)
            shares = (logsumexps - logsumexp).exp()  # of the probability, that each tile's words hold
            results.append((picked.sum(0) - logsumexp, (shares * (logsumexp - means)).sum(0), logsumexp))
        logprobs, entropies, logsumexp = (torch.cat(parts) for parts in zip(*results, strict=True))
        ctx.save_for_backward(hidden, weight, targets, logsumexp)
        ctx.compiled = compiled
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        body = compiled_function(gradient_tile) if ctx.compiled else gradient_tile
        matrix, weighted = weight.to(hidden.dtype), grad[:, None]
        grad_hidden = weighted * weight[targets]  # the onehot's part; then p's
        grad_weight = torch.zeros_like(weight).index_add_(0, targets, weighted * hidden)
        for some, row in tiles(hidden, matrix):
            for words in row:
                grad_logits = body(hidden[some], matrix[words], logsumexp[some], grad[some])
                grad_hidden[some] += product(grad_logits, matrix[words].T)
                grad_weight[words] += grad_logits.T @ hidden[some]
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


def tiles(hidden: Tensor, matrix: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Cuts the [N, V] logits of hidden [N, dim] and matrix [V, dim]: (slice of tokens, slices of the vocabulary)."""
    length, width = TILES["cpu" if hidden.device.type == "cpu" else "gpu"]
    row = [slice(start, start + width) for start in range(0, len(matrix), width)]
    return ((slice(start, start + length), row) for start in range(0, max(1, len(hidden)), length))


def logprob_tile(hidden: Tensor, matrix: Tensor, places: Tensor) -> Tensor:
    """Of n tokens and v words: the logits at `places` (0 where that is outside of the tile), log-sum-exps, and means
    of the logits under the tile's own softmax. Shapes: [n, dim], [v, dim], [n] → [3, n]."""
    logits = product(hidden, matrix).float()
    inside = (places >= 0) & (places < len(matrix))
    picked = logits.gather(-1, places.clamp(0, len(matrix) - 1)[:, None])[:, 0] * inside
    top = logits.amax(-1)
    shifted = logits.sub_(top[:, None])  # in place, here and below: fewer tiles share the cache
    weights = shifted.exp()
    total = weights.sum(-1)
    return torch.stack((picked, top + total.log(), top + shifted.mul_(weights).sum(-1) / total))


def gradient_tile(hidden: Tensor, matrix: Tensor, logsumexp: Tensor, grad: Tensor) -> Tensor:
    """−p · grad, the softmax's part of the gradient of the logits. [n, dim], [v, dim], [n], [n] → [n, v]."""
    logits = product(hidden, matrix).float()
    return logits.sub_(logsumexp[:, None]).exp_().mul_(-grad[:, None]).to(matrix.dtype)


VARIANTS = 32  # of a function that torch.compile makes at most: with and without gradients, of one row or several, …


@functools.cache
def compiled_function(function):
    """torch.compile of `function`, once a process; `dynamic`, since batches and last chunks differ in size."""
    return torch.compile(function, dynamic=True, recompile_limit=VARIANTS)


# ---- Generation ----


class Cache:
    """Keys and values of those sequences being generated whose prompts are of like length, so that little of it is
    empty: [layers, sequences, kv_heads, columns, head_dim] each. The prompts end in the same column, and so the column
    of a new token is the same for all.

    lengths: of the sequences' prompts; steps: new tokens at most; slots: (row, place in row, sequence, position) of
    each token of the packed prompts, which are stored first.
    """

    def __init__(self, config: Config, lengths: Tensor, steps: int, dtype: torch.dtype, slots: tuple[Tensor, ...]):
        self.columns = int(lengths.max())  # in use
        self.first = self.columns - lengths  # the column where each prompt begins
        shape = config.layers, len(lengths), config.kv_heads, self.columns + steps, config.dim // config.heads
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=lengths.device) for _ in range(2))
        row, place, sequence, position = slots
        self.slots = row, place, sequence, self.first[sequence] + position

    def __len__(self) -> int:
        return len(self.first)

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Stores the keys and values of packed prompts, [rows, kv_heads, length, head_dim], where the slots say."""
        row, place, sequence, column = self.slots
        self.keys[layer][sequence, :, column] = key[row, :, place]
        self.values[layer][sequence, :, column] = value[row, :, place]

    def step(self) -> None:
        """Makes room for a new token of each sequence."""
        self.columns += 1
        empty = torch.arange(self.columns, device=self.first.device) < self.first[:, None]
        self.mask = torch.zeros(empty.shape, device=empty.device, dtype=self.keys.dtype)[:, None, None]
        self.mask.masked_fill_(empty[:, None, None], -math.inf)  # (sequences, 1, 1, columns), added to the scores

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Stores the new tokens' key and value, [sequences, kv_heads, 1, head_dim]; returns the attention of their
        query, [sequences, heads, 1, head_dim] both.

        The query heads that share a key head are handed over as so many queries of that one head, which reads each key
        once.
        """
        keys, values = (kept[layer, :, :, : self.columns] for kept in (self.keys, self.values))
        keys[:, :, -1:], values[:, :, -1:] = key, value
        sharing = query.reshape(len(query), keys.shape[1], -1, keys.shape[3])  # (sequences, kv_heads, heads a key, …)
        with torch.autocast(query.device.type, enabled=False):  # as in the function `attend`
            return F.scaled_dot_product_attention(sharing, keys, values, attn_mask=self.mask).reshape(query.shape)

    def keep(self, going: Tensor) -> None:
        """Drops the sequences that are not `going`, [sequences] bool."""
        self.first, self.keys, self.values = self.first[going], self.keys[:, going], self.values[:, going]


def sample(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Draws a token from softmax(logits / temperature) by inverting its cumulative distribution at `uniform`.

    logits: [S, V]; uniform: [S] in [0, 1); temperature 0 takes the most likely token. Returns token ids [S]. One number
    a token makes a sample depend on nothing but its own sequence, and costs far less than one per vocabulary entry.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return drawn.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def generate(
    model: GPT, prompts: list[Tensor], end: int, max_new_tokens: int, temperature: float = 1.0, seed: int = 0,
    watch: Callable[[Tensor], None] | None = None,
) -> list[Tensor]:  # fmt: skip
    """Samples one response to each prompt from the full softmax; `end` stops a response and is kept in it.

    prompts: tensors of token ids. Returns tensors of 1 to max_new_tokens ids on the CPU. A response depends on its
    prompt, its place in the list, max_new_tokens and the seed, not on what it is batched with. `watch` is called at
    each step with the new tokens. Raises UserError if prompt and response could outgrow the model's context.
    """
    require_room(model.config, prompts, max_new_tokens)
    noise = torch.rand(len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed))
    rank, size = processes()
    by_length = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))[rank::size]
    tokens = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long)
    model = whole_copy(model)
    for start in range(0, len(by_length), 256):  # prompts of like length together: less of the cache lies empty
        indices = by_length[start : start + 256]
        some = [prompts[index] for index in indices]
        tokens[indices] = decode(model, some, noise[indices], end, temperature, watch)
    ends = [(row == end).nonzero()[:1] for row in summed(tokens)]
    return [row[: place + 1] if len(place) else row for row, place in zip(tokens, ends, strict=True)]


def require_room(config: Config, prompts: Iterable[Tensor], max_new_tokens: int) -> None:
    """Raises UserError if a prompt and its answer could outgrow the model's context."""
    room = config.context - max(map(len, prompts))
    if max_new_tokens > room:
        raise UserError(f"--max-new-tokens {max_new_tokens}: the longest prompt leaves room for {room} in the context")


def whole_copy(model: GPT) -> GPT:
    """The model for generation. Its weights are whole, so that each process can take steps of its own; those of matrix
    products have the products' dtype already, and are reordered where oneDNN has use for that. Nothing is compiled: a
    cache that grows would have it compiled again. The rest shares its memory with the model."""
    products = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
    weights = {}
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        weights[name] = reordered(whole.to(model.activations)) if name in products else whole
    with torch.device("meta"):
        copy = GPT(model.config).requires_grad_(False)
    copy.load_state_dict(weights, assign=True)
    copy.activations = model.activations
    return copy


def decode(model: GPT, prompts: list[Tensor], noise: Tensor, end: int, temperature: float, watch=None) -> Tensor:
    """Token ids [S, max_new_tokens] sampled with a key-value cache, `prompts` in falling order of their lengths; a row
    is `end` from its first `end` on."""
    device, steps = model.embedding.weight.device, noise.shape[1]
    dtype = attention_dtype(model.activations, device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    rows = fill_rows(lengths.tolist(), list(range(len(prompts))), device)
    batch = lay_out([(prompt,) for prompt in prompts], rows, device)
    row, place = (batch.document >= 0).nonzero(as_tuple=True)
    sequence, caches, start = batch.members[batch.document[row, place]], [], 0
    while start < len(prompts):  # a cache for those that need at least 0.7 times the columns of the longest
        after = int((lengths + steps >= 0.7 * (lengths[start] + steps)).sum())
        own = (sequence >= start) & (sequence < after)
        slots = row[own], place[own], sequence[own] - start, batch.positions[row[own], place[own]]
        caches.append(Cache(model.config, lengths[start:after], steps, dtype, slots))
        start = after
    hidden = model(batch.tokens, batch.positions, batch.mask, batch.last[batch.members.argsort()], caches)
    head = reordered(model.vocabulary_weight.to(model.activations))
    output = torch.full((len(prompts), steps), end, device=device)
    live, noise = torch.arange(len(prompts), device=device), noise.to(device)
    for step in range(steps):
        tokens = sample(product(hidden.to(head.dtype), head), noise[live, step], temperature)
        if step > 0:
            tokens = torch.where(output[live, step - 1] == end, end, tokens)
        output[live, step] = tokens
        if watch:
            watch(tokens)
        if watch or step % 8 == 7:  # now and then, the finished leave the batch
            going = tokens != end
            if not going.any():
                break
            if not going.all():
                for cache, own in zip(caches, going.split([len(cache) for cache in caches]), strict=True):
                    cache.keep(own)
                caches = [cache for cache in caches if len(cache)]
                live, tokens, lengths = live[going], tokens[going], lengths[going]
        if step < steps - 1:
            for cache in caches:
                cache.step()
            hidden = model(tokens[:, None], (lengths + step)[:, None], None, caches=caches)[:, 0]
    return output.cpu()


# ---- Files: pairs, checkpoints, resume states ----


def beside(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(path.name + ".part")


def write_whole(path: Path, write) -> None:
    """Calls `write` on a binary file so that `path` is whole at every moment: beside it first, then to the disk, then
    renamed onto it. Raises UserError if that fails; what was there is unchanged."""
    if processes()[0] > 0:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path).open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside(path).replace(path)
    except (OSError, RuntimeError) as error:
        # torch raises a RuntimeError on top of what really happened in a write: a full disk, or Ctrl-C.
        cause = error.__context__ if isinstance(error, RuntimeError) and error.__context__ else error
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise UserError(f"{path}: cannot be written ({cause}); what was there is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            beside(path).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole."""
    write_whole(path, lambda file: file.write(text.encode()))


def save_file(settings: CommonSettings, name: str, kind: str, content: dict) -> None:
    """Writes `content` to the file `name` in the --out folder with torch.save, whole, and with it what made it."""
    versions = {"format": FORMAT_VERSION, "torch": str(torch.__version__), "python": sys.version.split()[0]}
    data = next((parent["data"] for parent in settings.parents.values()), None)
    made = {"command": Path(inspect.getfile(type(settings))).name, "settings": settings.given, "data": data,
            "parents": settings.parents, "versions": versions}  # fmt: skip
    content = {"kind": kind, "version": FORMAT_VERSION, "made": made, **content}
    write_whole(Path(settings.out) / name, lambda file: torch.save(content, file))


def fingerprint(*parts) -> str:
    """16 hexadecimal digits that tell apart tensors, or whatever JSON can hold."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.numpy() if isinstance(part, Tensor) else json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def note_parent(settings: CommonSettings, name: str, content: dict) -> None:
    """Notes the file `name` as a parent of what this command will write. Raises UserError if its tokenizer, or the
    data that it goes back to, is not that of the files read before."""
    found = {"tokenizer": fingerprint(content["tokenizer"]), "data": content["made"]["data"]}
    for other, parent in settings.parents.items():
        for what in ("tokenizer", "data"):
            if found[what] != parent[what]:
                raise UserError(f"{name} goes with another {what} than {other}: they are of different runs of model.py")
    settings.parents[name] = {**found, "made": fingerprint(content["made"])}


@contextlib.contextmanager
def reading(path: Path):
    """Turns whatever a damaged file raises while it is read into a UserError that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said in one line
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: damaged, or not a file of the kind needed here ({type(error).__name__})") from error


def load_file(path: Path, *kinds: str) -> dict:
    """Reads what `save_file` wrote. Raises UserError unless it is a file of one of these kinds, and of this version."""
    with reading(path):
        content = torch.load(path, map_location="cpu", weights_only=True)
        found, version = content["kind"], content.pop("version")
    if found not in kinds:
        raise UserError(f"{path}: holds a {found}, but a {' or '.join(kinds)} is needed here")
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: has format {version}, this code reads {FORMAT_VERSION}; make it again")
    return content


def save_model(settings: CommonSettings, model: nn.Module, tokenizer: Tokenizer) -> None:
    """Writes a GPT or a reward model, with all that is needed to use it, to the --save file."""
    content = {"config": dataclasses.asdict(model.config), "tokenizer": tokenizer.state, "weights": whole_state(model)}
    save_file(settings, settings.save, model.kind, content)


def config_problem(config: Config) -> str | None:
    """What in a model's shape can't be right, in the words of config.json; None if all can."""
    counts = config.vocabulary, config.dim, config.layers, config.heads, config.kv_heads, config.mlp, config.context
    scaling = [] if config.rope_scaling is None else [config.rope_scaling[name] for name in LLAMA3_SCALING]
    if not all(type(count) is int and count > 0 for count in counts):
        return "the model's shape is not given in whole numbers from 1 up"
    if config.dim % (2 * config.heads) or config.heads % config.kv_heads:
        shape = f"hidden_size {config.dim}, num_attention_heads {config.heads}, num_key_value_heads {config.kv_heads}"
        return f"{shape} do not make heads of one even size that share keys evenly"
    factors = config.rope_theta, config.norm_eps, *scaling
    if not all(type(factor) in (int, float) and 0 < factor < 1e20 for factor in factors):
        return "rope_theta, rms_norm_eps and scaling are not finite numbers above 0"
    if scaling and scaling[1] >= scaling[2]:
        return f"low_freq_factor {scaling[1]} is not below high_freq_factor {scaling[2]}"
    return None


def load_model(settings: CommonSettings, name: str, model_class: type, prepare: bool = True):
    """Reads a model of `model_class`, and prepares it for the device unless told not to. Returns (model, Tokenizer)."""
    path = find_file(settings, name)
    with reading(path):
        content = load_file(path, model_class.kind)
        note_parent(settings, name, content)
        tokenizer = Tokenizer(**content["tokenizer"])
        config, weights = Config(**content["config"]), content["weights"].values()
        if problem := config_problem(config):
            raise UserError(f"{path}: {problem}; make it again")
        if config.layers > len(weights) or config.vocabulary < tokenizer.size:
            raise UserError(f"{path}: its shape, weights and tokenizer do not go together; make it again")
        if not all(weight.dtype == torch.float32 and weight.is_contiguous() for weight in weights):
            raise UserError(f"{path}: its weights are of another kind; make it again")
        with torch.device("meta"):  # shapes without numbers: the file's take their place
            model = GPT(config)
            if model_class is not GPT:  # a reward model is built around a GPT
                model = model_class(model)
        if not all(weight.isfinite().all() for weight in content["weights"].values()):
            raise UserError(f"{path}: holds weights that are not finite; make it again")
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
    """Moves a model to the device, and sets the activations' dtype, compilation and checkpointing as the flags say.

    `--dtype auto` takes bf16 where the hardware multiplies it faster: on GPUs that have it, and on CPUs with
    instructions for it when the model is wide enough to pay for the casts.
    """
    device = choose_device(settings)
    gpt = model if isinstance(model, GPT) else model.trunk
    if device.type == "cuda" and (size := gpt.config.dim // gpt.config.heads) < 16:
        raise UserError(f"--device cuda: the model's heads are {size} wide, FlexAttention needs 16; try --device cpu")
    units = torch.cpu.get_capabilities()
    faster = {
        "cuda": device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False),
        "cpu": (units.get("amx_bf16") or units.get("avx512_bf16")) and gpt.config.dim >= 256,
        "mps": False,
    }
    bf16 = settings.dtype == "bf16" or (settings.dtype == "auto" and faster[device.type])
    gpt.activations = torch.bfloat16 if bf16 else torch.float32
    gpt.checkpointed = isinstance(settings, TrainingSettings) and settings.grad_checkpoint
    gpt.compiled = device.type == "cuda" if settings.compile is None else settings.compile
    if gpt.compiled and device.type == "cuda":  # elsewhere a block's graph would depend on the documents' lengths
        gc.collect()  # compiled blocks hold on to themselves: this frees those of models that nothing uses any more
        for block in gpt.blocks:
            block.compile(dynamic=True, recompile_limit=VARIANTS)
    return shard(model, gpt.blocks, device) if dist.is_initialized() else model.to(device)


# ---- Pretrained weights in, trained ones out: Hugging Face folders of the Llama family ----

LLAMA_NAMES = {  # this project's names of the parameters, and theirs
    "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm", "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj", "attention.output": "self_attn.o_proj", "gate": "mlp.gate_proj",
    "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SINGLE_DIGIT_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


def llama_name(name: str) -> str:
    """What Hugging Face's Llama calls the GPT's parameter `name`."""
    block, module = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.weight", name).groups()
    return ("" if block is None else f"model.layers.{block}.") + LLAMA_NAMES[module] + ".weight"


def find_pretrained(name: str) -> Path:
    """The folder that `name` names: a folder on this machine, or else a repository of the Hugging Face hub."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"--init {name}: no such checkpoint or folder, and not a repository id like owner/name either")
    import huggingface_hub

    files = ["config.json", "tokenizer.json", "tokenizer_config.json", "model*.safetensors*"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except Exception as error:  # no network, no such repository, no permission, a full disk
        raise UserError(
            f"--init {name}: no such folder, and cannot be downloaded ({first_line(error)}); download it elsewhere "
            "and name its folder"
        ) from error


def import_model(folder: Path) -> tuple[GPT, Tokenizer]:
    """Reads config.json, tokenizer.json and the safetensors of `folder`. Raises UserError, by name, at whatever this
    architecture does not have and would compute other numbers with."""
    safetensors = optional("safetensors.torch", "pretrained weights")
    config = import_config(folder / "config.json")
    tokenizer = import_tokenizer(folder)
    if tokenizer.size > config.vocabulary:
        raise UserError(f"{folder}: tokenizer.json has {tokenizer.size} tokens, config.json only {config.vocabulary}")
    with torch.device("meta"):
        model = GPT(config)
    ours = {llama_name(name): name for name, _ in model.named_parameters()}
    index, weights = folder / "model.safetensors.index.json", {}
    files = ["model.safetensors"]
    if index.is_file():
        with reading(index):
            files = sorted({Path(file) for file in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    for path in (folder / file for file in files):
        if not path.is_file():
            raise UserError(f"{path}: no such file; weights are read from model.safetensors or the shards of its index")
        with reading(path), safetensors.safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name in ours:
                    weights[ours[name]] = tensors.get_tensor(name).float()
                elif not name.endswith("rotary_emb.inv_freq") and not (name == "lm_head.weight" and config.tied):
                    raise UserError(f"{path}: {name} has no place in this architecture")
    for name, parameter in model.named_parameters():
        if name not in weights:
            raise UserError(f"{folder}: no weights for {llama_name(name)}")
        if weights[name].shape != parameter.shape:
            shapes = f"{list(weights[name].shape)}, config.json says {list(parameter.shape)}"
            raise UserError(f"{folder}: {llama_name(name)} is {shapes}")
    model.load_state_dict(weights, assign=True)
    return model, tokenizer


def import_config(path: Path) -> Config:
    """The shape that config.json describes; keys it lacks have the defaults of transformers' LlamaConfig."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; a Hugging Face folder has one")
    with reading(path):
        given = json.loads(path.read_text("utf-8"))
        rope = {"rope_theta": given.get("rope_theta", 10000.0), **(given.get("rope_scaling") or {})}
        rope |= given.get("rope_parameters") or {}  # where transformers 5 keeps both
        only = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
                "attention_dropout": 0, "partial_rotary_factor": 1, "sliding_window": None,
                "quantization_config": None, "rope_interleaved": False}  # fmt: skip
        for name, value in only.items():
            if (found := {**rope, **given}.get(name)) not in (value, None):
                raise UserError(f"{path}: {name} {found!r} is not supported, only {value!r}")
        names = "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
        vocabulary, dim, layers, heads, mlp = (given[name] for name in names)
        kv_heads, context = given.get("num_key_value_heads") or heads, given.get("max_position_embeddings", 2048)
        kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
        if kind == "llama3":
            scaling = {name: {"original_max_position_embeddings": context, **rope}[name] for name in LLAMA3_SCALING}
        elif kind != "default":
            raise UserError(f"{path}: rotary scaling of type {kind!r} is not supported, only 'llama3'")
        theta, epsilon = float(rope["rope_theta"]), float(given.get("rms_norm_eps", 1e-6))
        tied = bool(given.get("tie_word_embeddings", False))
        config = Config(vocabulary, dim, layers, heads, kv_heads, mlp, context, theta, scaling, epsilon, tied, True)
        if problem := config_problem(config):
            raise UserError(f"{path}: {problem}")
        if given.get("head_dim") not in (dim // heads, None):
            raise UserError(f"{path}: head_dim {given['head_dim']!r} is not supported, only {dim // heads}")
        return config


def byte_symbols() -> dict[str, int]:
    """The printable stand-ins with which tokenizer.json spells bytes, and the bytes: {symbol: byte} (from GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def import_tokenizer(folder: Path) -> Tokenizer:
    """The byte-level BPE of tokenizer.json, with the same ids. Raises UserError at any other kind of tokenizer."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; a Hugging Face folder with a fast tokenizer has one")
    with reading(path):
        given = json.loads(path.read_text("utf-8"))
        special = {token["content"]: token["id"] for token in given["added_tokens"]}
        in_text = [token["content"] for token in given["added_tokens"] if not token["special"]]
        normal = (given.get("normalizer") or {}).get("type")
        if problem := tokenizer_problem(given, special, in_text):
            raise UserError(f"{path}: {problem} is not supported, only byte-level BPE as in Llama 3 or GPT-2")
        vocabulary, symbols = given["model"]["vocab"], byte_symbols()
        tokens = [None] * (max(vocabulary.values()) + 1)
        for token, number in vocabulary.items():
            if token not in special:
                tokens[number] = bytes(symbols[symbol] for symbol in token).decode("latin-1")
        pattern, begin = word_pattern(given["pre_tokenizer"]), opening_tokens(given.get("post_processor") or {})
        return Tokenizer(tokens, pattern, special, find_end(folder, special), begin, in_text, normal)


def tokenizer_problem(given: dict, special: dict[str, int], in_text: list[str]) -> str | None:
    """What in a tokenizer.json would give other ids than tiktoken's merging by rank; None if nothing does."""
    model, normal, symbols = given["model"], (given.get("normalizer") or {}).get("type"), byte_symbols()
    only = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "byte_fallback": False}  # fmt: skip
    for name, value in only.items():
        if (model.get(name) or None) != (value or None):
            return f"{name} {model[name]!r}"
    if normal not in UNICODE_FORMS:
        return f"normalizer {normal}"
    if word_pattern(given["pre_tokenizer"]) is None:
        return "pre-tokenizer " + json.dumps(given["pre_tokenizer"])[:200]
    if opening_tokens(given.get("post_processor") or {}) is None:
        return "post-processor " + json.dumps(given["post_processor"])[:200]
    for token in given["added_tokens"]:
        if token["content"] in in_text and (token["lstrip"] or token["rstrip"] or token["single_word"]):
            return f"added token {token['content']!r} with lstrip, rstrip or single_word"
        if any(token["content"] != other and token["content"].startswith(other) for other in in_text):
            return f"added token {token['content']!r} that begins like another"
    texts = [token for token in model["vocab"] if token not in special]
    if strange := next((token for token in texts if not set(token) <= symbols.keys()), None):
        return f"token {strange!r}, which is not spelled in bytes,"
    if model.get("unk_token") and not symbols.keys() <= set(texts):
        return f"unk_token {model['unk_token']!r}"
    made = ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    ids = list(dict.fromkeys(model["vocab"][token] for token in made))
    if ids != sorted(ids):
        return "a list of merges that is not in the order of the tokens' ids"
    if not model.get("ignore_merges") and (unmade := {token for token in texts if len(token) > 1} - set(made)):
        return f"token {min(unmade)!r}, which no merge makes,"
    return None


def word_pattern(pre_tokenizer: dict) -> str | None:
    """The one regular expression that cuts texts as the pre-tokenizer of a tokenizer.json does; None: unknown."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    match [{"use_regex": True, **step} for step in steps]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2_WORDS
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return SINGLE_DIGIT_WORDS
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return rf"(?:{pattern})|(?:(?!{pattern})[\s\S])+"  # what lies between matches is a word too
    return None


def opening_tokens(processor: dict) -> list[int] | None:
    """The ids that a post-processor sets before a text, such as Llama 3's begin-of-text; None: unknown kind."""
    begin = []
    for step in processor.get("processors", [processor] if processor else []):
        if step["type"] not in ("ByteLevel", "TemplateProcessing"):
            return None
        for piece in step.get("single", []):
            if "Sequence" in piece:
                break
            begin += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return begin


def find_end(folder: Path, special: dict[str, int]) -> int:
    """The end-of-text token: tokenizer_config.json names it, or else config.json does."""
    end = None
    if (path := folder / "tokenizer_config.json").is_file():
        with reading(path):
            end = json.loads(path.read_text("utf-8")).get("eos_token")
            end = special.get(end["content"] if isinstance(end, dict) else end)
    if end is None:
        with reading(path := folder / "config.json"):
            end = json.loads(path.read_text("utf-8")).get("eos_token_id")
            end = end[0] if isinstance(end, list) else end
    if end not in special.values():
        raise UserError(f"{folder}: neither tokenizer_config.json nor config.json names an end-of-text token")
    return end


def export_model(path: Path, folder: Path) -> None:
    """Writes the checkpoint at `path` as a folder that transformers loads: a policy as LlamaForCausalLM, a reward model
    as LlamaForSequenceClassification, which has no bias: what its scores lack is printed."""
    safetensors = optional("safetensors.torch", "pretrained weights")
    content = load_file(path, "policy", "reward model")
    with reading(path):
        config, tokenizer = Config(**content["config"]), Tokenizer(**content["tokenizer"])
        weights, rewards = content["weights"], content["kind"] == "reward model"
        head = {}
        if rewards:
            head = {"score.weight": weights.pop("head.weight")}
            shift = weights.pop("head.bias").item()
            weights = {name.removeprefix("trunk."): weight for name, weight in weights.items()}
            weights.pop("head.weight", None)  # an untied trunk's, which scores do not need
        weights = {llama_name(name): weight.contiguous() for name, weight in weights.items()} | head
        begin = tokenizer.begin[0] if tokenizer.begin else None
        described = {
            "architectures": ["LlamaForSequenceClassification" if rewards else "LlamaForCausalLM"],
            "model_type": "llama", "vocab_size": config.vocabulary, "hidden_size": config.dim,
            "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads, "intermediate_size": config.mlp,
            "max_position_embeddings": config.context, "rope_theta": config.rope_theta,
            "rope_scaling": config.rope_scaling and {"rope_type": "llama3", **config.rope_scaling},
            "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied, "hidden_act": "silu",
            "torch_dtype": "float32", "bos_token_id": begin, "eos_token_id": tokenizer.end,
            "pad_token_id": padding_token(tokenizer),
        }  # fmt: skip
        if rewards:
            described |= {"num_labels": 1}
    write_text(folder / "config.json", json.dumps(described, indent=1) + "\n")
    write_whole(
        folder / "model.safetensors",
        lambda file: safetensors.save_file(weights, file.name, metadata={"format": "pt"}),
    )
    export_tokenizer(folder, tokenizer, config.context)
    print(f"wrote {folder}, a {described['architectures'][0]} for transformers")
    if rewards:
        print(f"its scores are these rewards minus {shift:.6f}, the shift that made the training responses' mean 0")


def padding_token(tokenizer: Tokenizer) -> int:
    """A token for padding in batches of transformers. It is not the end-of-text token: LlamaForSequenceClassification
    reads a score at the last token that is not padding, which must be that one."""
    control = (number for name, number in tokenizer.special.items() if name not in tokenizer.in_text)
    return next((number for number in control if number != tokenizer.end), 0)


def export_tokenizer(folder: Path, tokenizer: Tokenizer, context: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    spelling = {byte: symbol for symbol, byte in byte_symbols().items()}
    ids = {token.encode("latin-1"): number for number, token in enumerate(tokenizer.tokens) if token is not None}
    spelled = {token: "".join(spelling[byte] for byte in token) for token in ids}
    # Any two neighbours that make up a token may merge: tiktoken's rule, written out as a list of pairs.
    merges = [
        [spelled[token[:cut]], spelled[token[cut:]]]
        for token in ids
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    names = {number: name for name, number in tokenizer.special.items()}
    added = [
        {"id": number, "content": names[number], "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": names[number] not in tokenizer.in_text}
        for number in sorted(names)
    ]  # fmt: skip
    opening = [{"SpecialToken": {"id": names[number], "type_id": 0}} for number in tokenizer.begin]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    described = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": tokenizer.normal and {"type": tokenizer.normal},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing", "single": [*opening, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [*opening, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {names[number]: {"id": names[number], "ids": [number], "tokens": [names[number]]}
                               for number in tokenizer.begin},
        },
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": {spelled[token]: number for token, number in ids.items()} | tokenizer.special,
                  "merges": merges},
    }  # fmt: skip
    write_text(folder / "tokenizer.json", json.dumps(described, ensure_ascii=False))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context,
                 "clean_up_tokenization_spaces": False, "eos_token": names[tokenizer.end]}  # fmt: skip
    if tokenizer.begin:
        described["bos_token"] = names[tokenizer.begin[0]]
    if padding_token(tokenizer) in names:
        described["pad_token"] = names[padding_token(tokenizer)]
    write_text(folder / "tokenizer_config.json", json.dumps(described, indent=1) + "\n")


# ---- The training loop's bookkeeping ----


def count_steps(settings: TrainingSettings, examples: int) -> int:
    """Optimiser steps: --steps, or as many as --epochs passes over the examples make."""
    if settings.steps is not None:
        return settings.steps
    return math.ceil(settings.epochs * examples / settings.batch_size)


def mixed_seed(seed: int, number: int) -> int:
    """A seed for pass or step `number`, so that its randomness hangs on nothing that came before it."""
    return (seed * 1_000_003 + number) % 2**63


def batch_indices(examples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The examples of one step: a piece of an endless stream of passes, each shuffled anew."""
    start = step * batch_size
    first, last = start // examples, (start + batch_size - 1) // examples
    passes = [
        torch.randperm(examples, generator=torch.Generator().manual_seed(mixed_seed(seed, number)))
        for number in range(first, last + 1)
    ]
    return torch.cat(passes)[start - first * examples :][:batch_size].tolist()


def read_log(path: Path) -> list[dict]:
    """The records of a log, one a step; none without a log. Half a line, as a power cut leaves it, is passed over."""
    steps = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            if record["step"] == len(steps):
                steps.append(record)
    return steps


class Training:
    """Bookkeeping of a training loop: `for step, indices in training` gives the steps still to do and the examples of
    each step's batch, and does the rest.

    The rest: learning rate, log (OUT/<save>.jsonl, one object a step), progress bar, resume states, Ctrl-C. `parts`
    are the models and optimisers that a resume state holds; batches depend on seed and step alone.
    """

    def __init__(self, settings: TrainingSettings, examples: int, **parts):
        self.settings, self.examples, self.parts, self.step = settings, examples, parts, 0
        self.steps, self.indices, self.stopping = count_steps(settings, examples), [], False
        log = []
        if settings.resume:
            state = load_file(settings.state_path, "resume state")
            with reading(settings.state_path):
                for key, value in settings.given.items():
                    if (had := state["made"]["settings"][key]) != value:
                        raise UserError(f"--resume: --{key.replace('_', '-')} is {value}, but the saved run had {had}")
                for name, parent in settings.parents.items():
                    if state["made"]["parents"].get(name) != parent:
                        raise UserError(f"--resume: {name} is not the file that the saved run read")
                self.step = state["step"]
                if type(self.step) is not int or not 0 <= self.step <= self.steps:
                    raise UserError(f"{settings.state_path}: is at step {self.step} of {self.steps}; delete it")
                for key, part in parts.items():
                    load_whole_state(part, state[key])
            log = read_log(settings.log_path)[: self.step]
        elif settings.state_path.exists():
            raise UserError(f"{settings.state_path}: a run was stopped; --resume goes on, or delete this to start anew")
        write_text(settings.log_path, "".join(json.dumps(record) + "\n" for record in log))

    def __iter__(self):
        handlers = {number: signal.signal(number, self.ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        description, stop = Path(self.settings.save).stem, False
        try:
            with tqdm(total=self.steps, initial=self.step, desc=description, unit="step") as self.bar:
                while self.step < self.steps:
                    self.began, settings = time.perf_counter(), self.settings
                    self.indices = batch_indices(self.examples, settings.batch_size, self.step, settings.seed)
                    yield self.step, self.indices
                    self.step += 1
                    self.bar.update()
                    every = self.settings.save_every
                    stop = bool(summed(torch.tensor(float(self.stopping))))  # all processes stop at the same step
                    if stop or (every and (self.step % every == 0 or self.step == self.steps)):
                        self.save_state()
                    if stop:
                        break
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if stop:
            print(f"stopped after step {self.step} of {self.steps}; the same command with --resume goes on")
            sys.exit(130)

    def ask_to_stop(self, number, frame) -> None:
        """First Ctrl-C: stop after this step. Second: at once."""
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True

    def save_state(self) -> None:
        """Writes all that --resume needs."""
        parts = {key: whole_state(part) for key, part in self.parts.items()}
        save_file(self.settings, self.settings.state_path.name, "resume state", {"step": self.step, **parts})

    @property
    def lr(self) -> float:
        """Learning rate of the current step: linear warm-up, then constant or linear to 0."""
        warmup = max(1, round(self.settings.warmup * self.steps))
        rising = (self.step + 1) / warmup
        falling = 1.0
        if self.settings.decay == "linear":
            falling = (self.steps - self.step) / max(1, self.steps - warmup)
        return self.settings.lr * min(1.0, rising, falling)

    def optimizer_step(self, optimizer: torch.optim.Optimizer) -> float:
        """Clips the gradients and takes one step with the current learning rate. Returns the norm before clipping.

        Raises UserError at a gradient that is not finite, which every loss that is not finite brings about.
        """
        (group,) = optimizer.param_groups
        norm = nn.utils.clip_grad_norm_(group["params"], self.settings.clip)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        self.require_finite("gradient", norm)
        group["lr"] = self.lr
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def require_finite(self, what: str, *values: float) -> None:
        """Raises UserError unless all values are finite; nothing is saved then, so the last good state is kept."""
        if not all(map(math.isfinite, values)):
            raise UserError(
                f"step {self.step}: the {what} is not finite, on pairs {' '.join(map(str, sorted(self.indices)))} of "
                f"--data {self.settings.data}; what was saved before is kept; try a lower --lr"
            )

    def log(self, shown: tuple[str, ...], unit: str, units: int, tokens: int, **metrics: float) -> None:
        """Writes the step's line of the log, and the `shown` metrics beside the bar."""
        for name, value in metrics.items():
            self.require_finite(name, value)
        seconds = time.perf_counter() - self.began
        if choose_device(self.settings).type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:  # kilobytes, but bytes on macOS
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        speed = {"tokens_per_second": tokens / seconds, f"{unit}_per_second": units / seconds}
        record = {"step": self.step, **metrics, "lr": self.lr, "seconds": seconds, **speed, "peak_memory_mb": peak}
        if processes()[0] == 0:
            try:
                with self.settings.log_path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise UserError(f"{self.settings.log_path}: cannot be written ({error})") from error
        self.bar.set_postfix({name: f"{metrics[name]:.3f}" for name in shown}, refresh=False)

    def finish(self, model: nn.Module, tokenizer: Tokenizer, next_command: str, flags: str) -> None:
        """Saves the trained model, drops the resume state, and says which command comes next."""
        save_model(self.settings, model, tokenizer)
        if processes()[0] == 0:
            for path in (self.settings.state_path, beside(self.settings.state_path)):
                path.unlink(missing_ok=True)
        say_next(self.settings, ["save"], next_command, flags)


def say_next(settings: CommonSettings, fields: list[str], command: str, flags: str) -> None:
    """The last line of every stage: what was written, to the names in these `fields` of the settings, and what to run
    next. If the first name is not the default, that command needs `flags`, in which the name takes the place of {}."""
    names = [getattr(settings, field) for field in fields]
    given = "" if names[0] == getattr(type(settings), fields[0]) else " " + flags.format(names[0])
    out = "" if settings.out == "out" else f" --out {settings.out}"
    print(f"wrote {', '.join(str(Path(settings.out) / name) for name in names)}; next: {command}{given}{out}")


# ---- Supervised fine-tuning ----

Vocabulary = number(int, lambda value: value > 256, "a whole number from 257 up (256 bytes and end-of-text)")


@dataclass
class Settings(TrainingSettings):
    """Flags of this stage."""

    data: str = "toy"  # toy, hh, hh:<part>, tldr, or a .jsonl, .jsonl.gz, .json or .parquet file, or a folder of them
    init: str | None = None  # Hugging Face folder or repository id, or a checkpoint; default: a new model
    export: str | None = None  # write --init as a folder for Hugging Face's transformers, and do nothing else
    save: str = "sft.pt"  # checkpoint to write
    limit: Count | None = None  # rows to read at most; default: all (toy, which has no end: 10000)
    wrong_labels: Share | None = None  # toy: share of labels that are wrong; default: Bradley-Terry decides
    test_share: Share | None = None  # share of the prompts, drawn by --seed, held back; default: 0.1 (toy: 0.2)
    epochs: Number = ByModel(scratch=1.5, pretrained=1.0)  # passes over the training pairs
    batch_size: Count = ByModel(scratch=32, pretrained=64)  # pairs per optimiser step
    lr: Number = ByModel(scratch=2e-3, pretrained=2e-5)  # peak learning rate
    context: Count = ByModel(scratch=512, pretrained=1024)  # longest prompt + response, in tokens
    max_response: Count = ByModel(scratch=128, pretrained=512)  # pairs with a longer response are dropped, in tokens
    vocabulary: Vocabulary | None = None  # tokens of a new model's tokenizer; default: 640 for toy, else 4096
    dim: Count = 128  # width of a new model
    layers: Count = 3  # blocks of a new model
    heads: Count = 4  # query heads of a new model
    kv_heads: Count = 2  # key-value heads of a new model

    def __post_init__(self):
        super().__post_init__()
        if self.dim % (2 * self.heads):
            raise UserError(f"--dim {self.dim} is not a multiple of 2 × --heads {self.heads}: rotation turns pairs")
        if self.heads % self.kv_heads:
            raise UserError(f"--heads {self.heads} is not a multiple of --kv-heads {self.kv_heads}")
        if self.wrong_labels is not None and self.data != "toy":
            raise UserError("--wrong-labels: only the toy world knows which labels are wrong")
        if self.export and not self.init:
            raise UserError("--export: name the checkpoint with --init")
        for name in ("vocabulary", "dim", "layers", "heads", "kv_heads"):
            if self.init and getattr(self, name) != getattr(Settings, name):
                raise UserError(f"--{name.replace('_', '-')}: the shape of --init {self.init} is given")


def start_from(settings: Settings) -> tuple[GPT, Tokenizer]:
    """The model of --init, ready for the device, and its tokenizer."""
    if settings.init.endswith(".pt"):
        return load_model(settings, settings.init, GPT)
    policy, tokenizer = import_model(find_pretrained(settings.init))
    return prepare_model(policy, settings), tokenizer


def read_pairs(settings: Settings, tokenizer: Tokenizer | None = None) -> tuple[Pairs, Pairs]:
    """(training pairs, test pairs) from --data, read row by row. Without a tokenizer, one is trained in a first pass,
    on the training text alone. A prompt's own hash says on which side it falls, so no prompt falls on both."""
    share = settings.test_share
    if share is None:
        share = 0.2 if settings.data == "toy" else 0.1

    def rows() -> Iterator[tuple[tuple[str, str, str, str] | None, bool]]:  # (row, is it held back?)
        for where, row in read_rows(settings):
            row = split_row(where, row)
            digest = hashlib.sha256(f"{settings.seed} {row[0] if row else ''}".encode(errors="replace")).digest()
            yield row, int.from_bytes(digest[:8], "big") < share * 2**64

    if tokenizer is None:
        size = settings.vocabulary or (640 if settings.data == "toy" else 4096)
        training_rows = (row for row, held_back in rows() if not held_back and not row_problem(row))
        tokenizer = train_tokenizer((text for row in training_rows for text in (row[0], *row[2:])), size)
    sides = [PairsBuilder(tokenizer, settings.data, settings.context, settings.max_response) for _ in range(2)]
    for row, held_back in tqdm(rows(), desc="tokenising", unit=" pairs", leave=False):
        sides[held_back].add(row)
    pairs, test = (side.pairs() for side in sides)
    count = sum(side.rows for side in sides)
    print(f"{count} rows read, {len(pairs)} training pairs, {len(test)} test pairs, {pairs.tokenizer.size} tokens")
    for what, times in sorted((sides[0].counts + sides[1].counts).items()):
        print(f"  {what}: {times}")
    if not len(pairs) or not len(test):
        raise UserError(f"--data {settings.data}: no pairs left to train or to test on")
    return pairs, test


def sft_documents(pairs: Pairs, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
    """(prompt, chosen) of each pair."""
    return [pairs[index][:2] for index in indices]


def main() -> None:
    """Reads the pairs and trains the policy that the other stages start from."""
    # 1. Settings; a pretrained model, where --init names one; then data: text pairs become token ids.
    settings = parse_settings(Settings, __doc__)
    if settings.export:
        source = find_file(settings, settings.init)
        return export_model(source, Path(settings.export))
    device = choose_device(settings)
    policy, tokenizer = start_from(settings) if settings.init else (None, None)
    settle(settings, policy is not None and policy.config.pretrained)
    if policy is not None and settings.context > policy.config.context:
        raise UserError(f"--context {settings.context}: {settings.init} has a context of {policy.config.context}")
    pairs, test = read_pairs(settings, tokenizer)
    data = fingerprint(pairs.tokens, pairs.lengths, test.tokens, test.lengths)
    settings.parents = {settings.data: {"data": data, "tokenizer": fingerprint(pairs.tokenizer.state)}}

    # 2. A new model has random weights.
    if policy is None:
        torch.manual_seed(mixed_seed(settings.seed, 0))
        shape = settings.dim, settings.layers, settings.heads, settings.kv_heads
        mlp = -(-settings.dim * 8 // 3 // 32) * 32  # three matrices of 8/3 of the width cost what two of 4 do
        policy = prepare_model(GPT(Config(pairs.tokenizer.size, *shape, mlp, settings.context)), settings)
    print(f"model: {sum(parameter.numel() for parameter in policy.parameters()) / 1e6:.2f} M parameters on {device}")

    # 3. Cross-entropy on the chosen responses: a mean over the batch's tokens, however it is cut into passes.
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    training = Training(settings, len(pairs), model=policy, optimizer=optimizer)
    pairs.save(settings, "pairs.pt")  # not before --resume was found to fit
    test.save(settings, "test.pt")
    for _, indices in training:
        documents = sft_documents(pairs, indices)
        tokens = sum(len(response) for _, response in documents)
        loss = torch.zeros((), device=device)
        for batch in pack(documents, device):
            logprobs, _ = policy.logprobs(batch)
            batch_loss = -logprobs.sum() / tokens
            batch_loss.backward()
            loss += batch_loss.detach()
        grad_norm = training.optimizer_step(optimizer)
        tokens_read = sum(len(prompt) + len(response) for prompt, response in documents)
        training.log(("loss",), "pairs", len(documents), tokens_read, loss=summed(loss).item(), grad_norm=grad_norm)

    # 4. How well it predicts held-back responses.
    with torch.no_grad():
        sums = [policy.logprobs(batch)[0].sum() for batch in pack(sft_documents(test, range(len(test))), device)]
    loss = -summed(sum(sums)).item() / test.lengths[:, 1].sum().item()
    print(f"test loss {loss:.3f} nats a token (perplexity {math.exp(loss):.2f})")
    training.finish(policy, pairs.tokenizer, "python reward.py", "--init {} --save NAME.pt")


if __name__ == "__main__":
    run_command(main)
