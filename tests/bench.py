"""How fast each stage is, beside the same work written the plain way and done by TRL and transformers.

    python tests/bench.py                                     # everything, in fp32 and bf16
    python tests/bench.py --work dpo kernel --dtypes bf16     # some of it
    python tests/bench.py --data my_pairs.jsonl               # lengths of real pairs instead of drawn ones
    python tests/bench.py --scaling                           # how time and memory grow
    python tests/bench.py --device cuda --shape 1b --batch-size 64 --lengths 200 150 150 --prompts 256 --new-tokens 256

Three ways of doing one work, on the same weights, token ids, batches, optimiser and steps:

    ours    the stage's own main
    plain   padded batches in which each response carries its own prompt, whole logits, a second model as the reference,
            generation with a padded cache; written here, never compiled
    trl     TRL's trainers and transformers' generate, where they are installed: trl 1.11 has PPO, 1.13 has not;
            for the kernel, torch's linear_cross_entropy, chunked

Every measurement is a process of its own, which on a GPU, and of the kernel, does the work twice: to compile, and to be
measured. tokens/s counts a shared prompt once, in PPO and generation the new tokens only. TFLOP/s counts what no way
can do without (backward as twice forward; no padding, repeated prompt or recomputation), and `share` is its part of
what the device reaches at a product of large matrices, which the first line of each dtype measures. Memory is the peak
beyond the libraries: of the process, or of what is allocated on the GPU. Losses show that the same thing is computed.
Machines are noisy: only ratios within one run count, and each line is the median of --repeats runs.
"""

import argparse
import gc
import importlib
import itertools
import json
import math
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # now, so that it counts as a library
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).parent.parent))
import model
import ppo
from evaluate import export_model
from model import (
    END_OF_TEXT, GPT, PADDING, SYMBOLS, Config, Pairs, Tokenizer, batch_indices, generate, load_model, load_pairs,
    sample, save_model, settle, token_logprobs, tokenizer_json,
)
from reward import RewardModel, bradley_terry_loss

SHAPES = {  # vocabulary, width, blocks, heads, key-value heads, MLP width
    "tiny": (2048, 128, 3, 4, 2, 352),
    "19m": (16384, 384, 8, 6, 2, 1024),
    "135m": (49152, 576, 30, 9, 3, 1536),
    "1b": (128256, 2048, 16, 32, 8, 8192),
}
LR, PPO_EPOCHS = 1e-5, 4  # and all answers in one minibatch
MATRIX = {"cpu": 2048, "cuda": 8192}  # side of the matrices whose product is the measure
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WORKS = {  # forward passes through the blocks and through the head, a backward one counted as two
    "kernel": (0, 3), "sft": (3, 3), "reward": (3, 0), "dpo": (4, 4), "generate": (1, 1),
    "ppo": (5 + 6 * PPO_EPOCHS, 3 + 3 * PPO_EPOCHS),  # sampling, four models read, then updates of two
}


def clock(arguments: argparse.Namespace) -> float:
    """Now, when the device has done all that it was given."""
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def settings_of(stage, folder: Path, arguments: argparse.Namespace):
    """A stage's settings, with the defaults of a model from scratch."""
    settings = stage.Settings(out=str(folder), device=arguments.device, dtype=arguments.dtype)
    settle(settings, pretrained=False)
    return settings


# ---- What is measured: a folder with pairs.pt, sft.pt, reward.pt and both models exported ----


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    """Writes the files that every way reads."""
    vocabulary, *shape = arguments.numbers
    generator = torch.Generator().manual_seed(0)
    count = max(arguments.batch_size, arguments.prompts) * arguments.steps
    if arguments.data:
        settings = model.Settings(data=arguments.data, limit=4 * count, test_share=0.1)
        settle(settings, pretrained=False)
        lengths = model.read_pairs(settings)[0].lengths[:count]
        if len(lengths) < count:
            raise SystemExit(f"--data {arguments.data}: {len(lengths)} pairs are kept, {count} are needed")
    elif arguments.lengths:
        lengths = torch.tensor([arguments.lengths]).repeat(count, 1)
    else:  # drawn: about 94, 31 and 38 tokens on average, a little shorter and more even than HH-RLHF's harmless pairs
        means, spreads = torch.tensor([75.0, 24.0, 28.0]).log(), torch.tensor([0.65, 0.7, 0.75])
        lengths = (means + spreads * torch.randn(count, 3, generator=generator)).exp().long()
        lengths = lengths.clamp(torch.tensor([8, 2, 2]), torch.tensor([341, 128, 128]))
    tokens = torch.randint(0, vocabulary - 2, (int(lengths.sum()),), generator=generator, dtype=torch.int32)
    names = [SYMBOLS[byte] for byte in range(256)]
    for length in (2, 3):  # without byte 255, whose place padding takes
        longer = map("".join, itertools.product(names[:255], repeat=length))
        names += itertools.islice(longer, vocabulary - 1 - len(names))
    tokenizer = Tokenizer(tokenizer_json({name: number for number, name in enumerate(names)}), END_OF_TEXT)
    ends = lengths.cumsum(1) + (lengths.sum(1).cumsum(0) - lengths.sum(1))[:, None] - 1
    tokens[ends[:, 1:].flatten()] = tokenizer.end
    torch.manual_seed(0)
    policy = GPT(Config(vocabulary, *shape, context=1024))
    settings = model.Settings(out=str(folder))
    Pairs(tokens, lengths, tokenizer).save(settings, "pairs.pt")
    Pairs(tokens[: int(lengths[:2].sum())], lengths[:2], tokenizer).save(settings, "test.pt")
    save_model(settings, policy, tokenizer)
    torch.manual_seed(model.mixed_seed(0, 0))  # as reward.py seeds its head
    settings.save = "reward.pt"
    save_model(settings, RewardModel(policy), tokenizer)
    if "trl" in arguments.ways and importlib.util.find_spec("transformers"):
        for name in ("sft", "reward"):
            export_model(folder / f"{name}.pt", folder / name)


def batches(pairs: Pairs, size: int, arguments: argparse.Namespace) -> list[list[tuple]]:
    """The pairs of each step, as the stages draw them, on the device."""
    steps = [batch_indices(len(pairs), size, step, 0) for step in range(arguments.steps)]
    return [[tuple(part.to(arguments.device) for part in pairs[index]) for index in step] for step in steps]


def amount(work: str, folder: Path, arguments: argparse.Namespace) -> tuple[int, float]:
    """(tokens, floating-point operations) of a work."""
    vocabulary, dim, layers, heads, kv_heads, mlp = arguments.numbers
    if work == "matrix":
        return 0, 2 * MATRIX[arguments.device] ** 3
    pairs, answering = load_pairs(settings_of(model, folder, arguments), "pairs.pt"), work in ("generate", "ppo")
    steps = batches(pairs, arguments.prompts if answering else arguments.batch_size, arguments)
    block, (through_blocks, through_head) = dim * (2 * dim + 2 * dim * kv_heads // heads + 3 * mlp), WORKS[work]
    tokens = operations = 0
    for document in itertools.chain(*steps[: 1 if work in ("generate", "kernel") else None]):
        prompt, *responses = map(len, document[: 2 if work == "sft" else 3])
        responses = {"kernel": [256]}.get(work, [arguments.new_tokens] if answering else responses)
        answers = sum(responses)
        seen = prompt * (prompt + 1) / 2 + sum(answer * prompt + answer * (answer + 1) / 2 for answer in responses)
        operations += through_blocks * 2 * layers * (block * (prompt + answers) + 2 * dim * seen)
        operations += through_head * 2 * answers * vocabulary * dim
        tokens += answers if answering or work == "kernel" else prompt + answers
    return tokens, operations


# ---- Ours: the stages' own mains ----


def ours(work: str, folder: Path, arguments: argparse.Namespace) -> dict:
    """Runs the stage; the clock runs from when its files are loaded to the end of its loop."""
    out = folder / "sft_run" if work == "sft" else folder  # where model.py may write pairs.pt anew
    size = arguments.prompts if work == "ppo" else arguments.batch_size
    common = f"--out {out} --device {arguments.device} --dtype {arguments.dtype} --save {work}_ours.pt --lr {LR} "
    common += f"--warmup 0 --decay constant --save-every 0 --steps {arguments.steps} --batch-size {size}"
    flags = {
        "sft": ["--init", str(folder / "sft.pt")], "reward": [], "dpo": ["--data", "pairs.pt"],
        "ppo": f"--ppo-epochs {PPO_EPOCHS} --minibatch-size {arguments.prompts} --max-new-tokens "
               f"{arguments.new_tokens} --data pairs.pt --init sft.pt".split(),
    }
    stage, times = importlib.import_module("model" if work == "sft" else work), {}
    sides = [load_pairs(model.Settings(out=str(folder)), name) for name in ("pairs.pt", "test.pt")]
    loop = model.Training.__iter__

    def timed_settle(*given):
        times["start"] = clock(arguments)
        settle(*given)

    def timed_loop(steps):
        yield from loop(steps)
        times["end"] = clock(arguments)

    with (mock.patch.object(stage, "settle", timed_settle), mock.patch.object(model.Training, "__iter__", timed_loop),
          mock.patch.object(model, "read_pairs", lambda *_: sides),
          mock.patch.object(sys, "argv", [f"{work}.py", *common.split(), *flags[work]])):
        stage.main()
    losses = [json.loads(line)["loss"] for line in (out / f"{work}_ours.jsonl").read_text().splitlines()]
    return {"seconds": times["end"] - times["start"], "losses": losses}


# ---- Plain: padded, unshared, whole logits ----


def plain_forward(gpt: GPT, tokens, positions, mask, cache=None) -> torch.Tensor:
    """Hidden states [B, T, dim] of padded token ids [B, T]; positions: [B, T]; mask: [B, 1, T, keys] bool."""
    angle = positions[:, None, :, None] * model.rotary_frequencies(gpt.config, tokens.device)  # (B, 1, T, head_dim / 2)
    cos, sin = angle.cos(), angle.sin()
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=gpt.activations == torch.bfloat16):
        x = gpt.embedding(tokens)  # (B, T, dim)
        for number, block in enumerate(gpt.blocks):
            attention = block.attention
            heads = attention.qkv(block.attention_norm(x)).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
            q, k, v = heads.split(attention.split, 1)  # (B, …, T, head_dim)
            v = v if v.is_cuda else v.float()  # as ours: faster
            q, k = model.rotate(q, cos, sin).to(v.dtype), model.rotate(k, cos, sin).to(v.dtype)
            if cache is not None:
                old_k, old_v = cache.get(number, (k[:, :, :0], v[:, :, :0]))
                k, v = cache[number] = torch.cat((old_k, k), 2), torch.cat((old_v, v), 2)
            with torch.autocast(x.device.type, enabled=False):
                mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            x = x + attention.output(mixed.transpose(1, 2).flatten(2))
            gate, up = block.gate_up(block.mlp_norm(x)).chunk(2, dim=-1)
            x = x + block.down(F.silu(gate) * up)
        return gpt.norm(x)


def plain_hidden(gpt: GPT, sequences: list[torch.Tensor]) -> torch.Tensor:
    """Hidden states [B, T, dim] of a batch padded on the right."""
    tokens = pad_sequence(sequences, batch_first=True)
    at = torch.arange(tokens.shape[1], device=tokens.device)
    real = at < torch.tensor([len(sequence) for sequence in sequences], device=tokens.device)[:, None]
    return plain_forward(gpt, tokens, at.expand_as(tokens), (at <= at[:, None]) & real[:, None, None])


@torch.no_grad()
def plain_generate(gpt: GPT, prompts: list[torch.Tensor], end: int, new: int, seed: int = 0) -> list[torch.Tensor]:
    """What `generate` samples, for a batch padded on the left; the cache, {layer: (keys, values)}, grows each step."""
    width, cache, drawn, device = max(map(len, prompts)), {}, [], prompts[0].device
    tokens = pad_sequence(prompts, True, 0, "left")
    padding = torch.tensor([width - len(prompt) for prompt in prompts], device=device)[:, None]
    columns = torch.arange(width + new, device=device)
    real, at = (columns >= padding)[:, None, None], columns[:width]
    mask = ((at <= at[:, None]) & real[..., :width]) | (at == at[:, None])
    noise = torch.rand(len(prompts), new, generator=torch.Generator().manual_seed(seed)).to(device)
    head = gpt.vocabulary_weight.to(gpt.activations)
    hidden = plain_forward(gpt, tokens, (columns[:width] - padding).clamp(0), mask, cache)[:, -1]
    for step in range(new):
        drawn.append(sample(hidden.to(head.dtype) @ head.T, noise[:, step], 1.0))
        if step < new - 1:
            mask = real[..., : width + step + 1]
            hidden = plain_forward(gpt, drawn[-1][:, None], width + step - padding, mask, cache)[:, 0]
    rows = torch.stack(drawn, 1)
    ends = [(row == end).nonzero()[:1] for row in rows]
    return [row[: place + 1] if len(place) else row for row, place in zip(rows, ends, strict=True)]


def plain_logprobs(gpt: GPT, prompts: list[torch.Tensor], responses: list[torch.Tensor]) -> list[torch.Tensor]:
    """Log-probs of each response's tokens, out of the whole [B, T, V] logits."""
    sequences = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    hidden = plain_hidden(gpt, sequences).to(gpt.activations)
    logits = (hidden @ gpt.vocabulary_weight.to(gpt.activations).T).float()
    tokens = pad_sequence(sequences, batch_first=True)
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return [row[len(prompt) - 1 : len(prompt) + len(response) - 1]
            for row, prompt, response in zip(logprobs, prompts, responses, strict=True)]


def plain_read(scored: RewardModel, sequences: list[torch.Tensor], places: list[slice]) -> torch.Tensor:
    """What the head reads at these places of each sequence, padded: [B, most places]."""
    hidden = plain_hidden(scored.trunk, sequences)
    values = [scored.head(row[place].float())[:, 0] for row, place in zip(hidden, places, strict=True)]
    return pad_sequence(values, batch_first=True)


def plain(work: str, folder: Path, arguments: argparse.Namespace) -> dict:
    settings = settings_of(model, folder, arguments)
    pairs, (policy, _) = load_pairs(settings, "pairs.pt"), load_model(settings, "sft.pt", GPT)
    reference = load_model(settings, "sft.pt", GPT)[0] if work == "dpo" else None
    trained = load_model(settings, "reward.pt", RewardModel)[0] if work == "reward" else policy
    optimizer = torch.optim.AdamW(trained.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    start, losses = clock(arguments), []
    for batch in batches(pairs, arguments.batch_size, arguments):
        prompts, chosen, rejected = (list(side) for side in zip(*batch, strict=True))
        if work == "sft":
            loss = -torch.cat(plain_logprobs(policy, prompts, chosen)).mean()
        elif work == "reward":
            sequences = [torch.cat(pair) for pair in zip(prompts * 2, chosen + rejected, strict=True)]
            scores = plain_read(trained, sequences, [slice(len(row) - 1, len(row)) for row in sequences])
            loss = bradley_terry_loss(*scores.view(2, -1)).mean()
        else:
            both = prompts * 2, chosen + rejected
            sums = torch.stack([one.sum() for one in plain_logprobs(policy, *both)]).view(2, -1)
            with torch.no_grad():
                theirs = torch.stack([one.sum() for one in plain_logprobs(reference, *both)]).view(2, -1)
            loss = -F.logsigmoid(0.1 * (sums - theirs).T @ sums.new_tensor([1.0, -1.0])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"seconds": clock(arguments) - start, "losses": losses}


def plain_ppo(work: str, folder: Path, arguments: argparse.Namespace) -> dict:
    """PPO with the stage's formulas, on padded batches and whole logits; its answers are the stage's in fp32."""
    settings = settings_of(ppo, folder, arguments)
    pairs, (policy, tokenizer) = load_pairs(settings, "pairs.pt"), load_model(settings, "sft.pt", GPT)
    reference, _ = load_model(settings, "sft.pt", GPT)
    reward, critic = (load_model(settings, "reward.pt", RewardModel)[0] for _ in range(2))
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)
    start, losses = clock(arguments), []
    for step, batch in enumerate(batches(pairs, arguments.prompts, arguments)):
        prompts = [prompt for prompt, *_ in batch]
        responses = plain_generate(policy, prompts, tokenizer.end, arguments.new_tokens, model.mixed_seed(0, step))
        sequences = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
        before = [slice(len(p) - 1, len(p) + len(r) - 1) for p, r in zip(prompts, responses, strict=True)]
        with torch.no_grad():
            logprobs, theirs = (pad_sequence(plain_logprobs(one, prompts, responses), batch_first=True)
                                for one in (policy, reference))
            values = plain_read(critic, sequences, before)
            scores = plain_read(reward, sequences, [slice(len(row) - 1, len(row)) for row in sequences])[:, 0]
        lengths = torch.tensor([len(response) for response in responses], device=arguments.device)
        ended = torch.stack([response[-1] == tokenizer.end for response in responses])
        rollout = ppo.Rollout([], logprobs, theirs, values, scores, lengths, ended)
        advantages, returns = ppo.advantages_and_returns(settings, rollout)
        real, loss_sum = rollout.real, 0.0
        for _ in range(PPO_EPOCHS):
            new_logprobs = torch.cat(plain_logprobs(policy, prompts, responses))
            policy_losses = ppo.ppo_loss(new_logprobs, logprobs[real], advantages[real], settings.clip_ratio)
            new_values = plain_read(critic, sequences, before)[real]
            value_losses = ppo.value_loss(new_values, values[real], returns[real], settings.clip_value)
            loss = (policy_losses + settings.value_coefficient * value_losses).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss_sum += loss.item()
        losses.append(loss_sum / PPO_EPOCHS)
    return {"seconds": clock(arguments) - start, "losses": losses}


# ---- TRL and transformers ----


def trl(work: str, folder: Path, arguments: argparse.Namespace) -> dict:
    """Its trainer, given the token ids as they are, in the order of the other ways."""
    import transformers

    size = arguments.prompts if work == "ppo" else arguments.batch_size
    steps = batches(load_pairs(settings_of(model, folder, arguments), "pairs.pt"), size, arguments)
    rows = [[part.tolist() for part in pair] for pair in itertools.chain(*steps)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "sft", padding_side="left")
    tokenizer.pad_token = PADDING
    common = {
        "output_dir": str(folder / "trl"), "per_device_train_batch_size": size, "learning_rate": LR,
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "adam_beta2": 0.95, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": arguments.device == "cpu", "disable_tqdm": True,
        "gradient_checkpointing": False, "bf16": arguments.dtype == "bf16",
    }

    def loaded(name: str):
        kind = "AutoModelForSequenceClassification" if name == "reward" else "AutoModelForCausalLM"
        return getattr(transformers, kind).from_pretrained(folder / name, dtype=torch.float32)

    trainer = (ppo_trainer if work == "ppo" else trainer_of)(work, arguments, rows, tokenizer, common, loaded)
    start = clock(arguments)
    trainer.train()
    seconds, history = clock(arguments) - start, trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    losses += [entry["loss/policy_avg"] + ppo.Settings().value_coefficient * entry["loss/value_avg"]
               for entry in history if "loss/policy_avg" in entry]
    return {"seconds": seconds, "losses": losses}


def ppo_trainer(work, arguments, rows, tokenizer, common: dict, loaded):
    """TRL's last PPO trainer (see above). Its answers differ from ours, since it samples differently."""
    import datasets
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    settings = settings_of(ppo, Path(), arguments)
    config = PPOConfig(
        **common, num_mini_batches=1, num_ppo_epochs=PPO_EPOCHS, total_episodes=len(rows),
        response_length=arguments.new_tokens, local_rollout_forward_batch_size=arguments.prompts,
        num_sample_generations=0, stop_token="eos", missing_eos_penalty=settings.missing_eos_penalty,
        kl_coef=settings.kl_coefficient, cliprange=settings.clip_ratio, cliprange_value=settings.clip_value,
        vf_coef=settings.value_coefficient, gamma=settings.gamma, lam=settings.gae_lambda, temperature=1.0,
    )
    dataset = datasets.Dataset.from_list([{"input_ids": prompt} for prompt, *_ in rows])
    models = [loaded(name) for name in ("sft", "sft", "reward")]
    return PPOTrainer(config, tokenizer, *models, dataset, loaded("reward"), eval_dataset=dataset)


def trainer_of(work, arguments, rows, tokenizer, common: dict, loaded):
    import datasets
    import trl

    trainer_class, config_class, columns = {
        "sft": (trl.SFTTrainer, trl.SFTConfig, lambda p, c, r: {"input_ids": p + c, "labels": [-100] * len(p) + c}),
        "reward": (trl.RewardTrainer, trl.RewardConfig, lambda p, c, r: {"chosen_ids": p + c, "rejected_ids": p + r}),
        "dpo": (trl.DPOTrainer, trl.DPOConfig, lambda p, c, r: {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r}),
    }[work]

    class InOrder(trainer_class):
        def _prepare_dataset(self, dataset, *given, **more):
            return dataset

        def _get_train_sampler(self, *given):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    config = config_class(**common, max_steps=arguments.steps, max_grad_norm=1.0, max_length=1024)
    dataset = datasets.Dataset.from_list([columns(*row) for row in rows])
    network = loaded("reward" if work == "reward" else "sft")
    return InOrder(model=network, args=config, train_dataset=dataset, processing_class=tokenizer)


# ---- Generation, the kernel, and the device's measure ----


@torch.no_grad()
def generation(way: str, folder: Path, arguments: argparse.Namespace) -> dict:
    """Answers of --new-tokens to --prompts prompts, none of which ends before."""
    settings, new = settings_of(model, folder, arguments), arguments.new_tokens
    pairs, (policy, _) = load_pairs(settings, "pairs.pt"), load_model(settings, "sft.pt", GPT)
    prompts = [prompt for prompt, *_ in batches(pairs, arguments.prompts, arguments)[0]]
    if way == "trl":
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "sft", dtype=DTYPES[arguments.dtype])
        theirs.to(arguments.device)
        tokens = pad_sequence(prompts, True, 0, "left")
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, 0, "left")
    start = clock(arguments)
    if way == "trl":
        theirs.generate(input_ids=tokens, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, eos_token_id=None,
                        max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
    elif way == "ours":
        generate(policy, [prompt.cpu() for prompt in prompts], -1, new)
    else:
        plain_generate(policy, prompts, -1, new)
    return {"seconds": clock(arguments) - start, "losses": []}


def kernel(way: str, folder: Path, arguments: argparse.Namespace) -> dict:
    """256 tokens for each pair of a step, forward and backward."""
    torch.manual_seed(0)
    (vocabulary, dim, *_), device, kind = arguments.numbers, arguments.device, DTYPES[arguments.dtype]
    hidden = torch.randn(256 * arguments.batch_size, dim).to(device, kind).requires_grad_()
    weight = (torch.randn(vocabulary, dim) / dim**0.5).to(device).requires_grad_()
    targets = torch.randint(0, vocabulary, (len(hidden),)).to(device)
    start = clock(arguments)
    if way == "plain":
        logits = (hidden @ weight.to(kind).T).float()
        loss = -logits.log_softmax(-1).gather(-1, targets[:, None]).mean()
    elif way == "trl":
        options = torch.nn.LinearCrossEntropyOptions(chunking_method="auto")
        loss = F.linear_cross_entropy(hidden, weight.to(kind), targets, options=options)
    else:
        loss = -token_logprobs(hidden, weight, targets, compiled=device == "cuda")[0].mean()
    loss.backward()
    return {"seconds": clock(arguments) - start, "losses": [loss.item(), hidden.grad.float().norm()]}


def matrix(way: str, folder: Path, arguments: argparse.Namespace) -> dict:
    """The product of two large matrices, the best of ten of each kind: PyTorch's own, and the model's."""
    side, times = MATRIX[arguments.device], []
    one, two = torch.randn(2, side, side, device=arguments.device).to(DTYPES[arguments.dtype])
    for product in [torch.matmul, model.linear] * 10:
        start = clock(arguments)
        product(one, two)
        times.append(clock(arguments) - start)
    return {"seconds": min(times), "losses": []}


# ---- Measuring ----


def peak_mb(arguments: argparse.Namespace) -> float:
    """The most memory so far: on the GPU, or this process's (on Linux getrusage begins at what the parent had)."""
    if arguments.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10


def load_libraries(work: str) -> None:
    """Imports what the other way uses, whose classes load on first sight, so that none of it counts as its memory."""
    wanted = {"transformers": ["LlamaForCausalLM", "LlamaForSequenceClassification"]}
    if work != "generate":
        wanted |= {"datasets": ["Dataset"], "trl": ["SFTTrainer", "RewardTrainer", "DPOTrainer"]}
    for library, names in wanted.items():
        for name in names:
            getattr(importlib.import_module(library), name)


def measure(work: str, way: str, folder: Path, arguments: argparse.Namespace) -> dict:
    """One measurement, in this process."""
    if way == "trl" and work not in ("kernel", "matrix"):
        load_libraries(work)
    before = peak_mb(arguments)
    alone = {"generate": generation, "kernel": kernel, "matrix": matrix}
    stages = {"ours": ours, "plain": plain_ppo if work == "ppo" else plain, "trl": trl}
    function, what = (alone[work], way) if work in alone else (stages[way], work)
    if arguments.device == "cuda" or work == "kernel":  # what the first time compiles and sets up is not the work
        function(what, folder, arguments)
        gc.collect()
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result = function(what, folder, arguments)
    result["losses"] = [float(loss) for loss in result["losses"]]
    tokens, operations = amount(work, folder, arguments)
    return {**result, "tokens": tokens, "operations": operations, "memory_mb": peak_mb(arguments) - before}


def in_a_process(work: str, way: str, dtype: str, folder: Path, flags: list[str]) -> dict | None:
    """The same in a process of its own; None, with the reason printed, if it fails."""
    command = [sys.executable, __file__, *flags, "--one", work, way, str(folder), "--dtypes", dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"  {work} {dtype} {way}: {(done.stderr.strip() or 'failed').splitlines()[-1][:150]}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments: argparse.Namespace, flags: list[str]) -> None:
    """Prints the table."""
    libraries = importlib.util.find_spec("trl") and importlib.util.find_spec("transformers")
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} threads"
    with tempfile.TemporaryDirectory() as name:
        folder, most = Path(name), math.nan
        prepare(folder, arguments)
        print(f"{arguments.shape}, {device}, torch {torch.__version__}, {arguments.steps} × {arguments.batch_size} "
              f"pairs, {arguments.prompts} prompts × {arguments.new_tokens} tokens, median of {arguments.repeats}")
        print("work     dtype way     seconds  tokens/s  ours is TFLOP/s share   memory  losses")
        for dtype, work in itertools.product(arguments.dtypes, ("matrix", *arguments.work)):
            ways = [way for way in arguments.ways if way != "trl" or work == "kernel" or libraries]
            runs = {}
            for way in (["plain"] if work == "matrix" else ways) * arguments.repeats:  # a slow minute hits all ways
                result = in_a_process(work, way, dtype, folder, flags)
                if result:
                    runs.setdefault(way, []).append(result)
            middle = {}
            for way, done in runs.items():
                middle[way] = sorted(done, key=lambda one: one["seconds"])[(len(done) - 1) // 2]
            most = math.nan if work == "matrix" else most
            for way, one in middle.items():
                rate = one["operations"] / one["seconds"]
                ratio = one["seconds"] / middle["ours"]["seconds"] if "ours" in middle else math.nan
                most = rate if work == "matrix" else most
                losses = " ".join(f"{loss:.4f}" for loss in one["losses"][:3] + one["losses"][3:][-1:])
                times = f"{ratio:.2f}×" if ratio > 0 else "–"
                print(f"{work:8s} {dtype:5s} {way:5s} {one['seconds']:9.3f} {one['tokens'] / one['seconds']:9,.0f} "
                      f"{times:>8s} {rate / 1e12:7.3f} {rate / most:5.1%} {one['memory_mb']:6,.0f}MB  "
                      + losses, flush=True)


def scaling(arguments: argparse.Namespace) -> None:
    """How time and memory of a DPO step grow as each of four sizes is doubled twice."""
    base = {"pairs": 16, "tokens": (128, 32, 32), "vocabulary": 8192, "width": 256}
    fixed = f"--work dpo --ways ours --repeats 1 --dtypes {arguments.dtype} --device {arguments.device}".split()
    for name, factor in itertools.product(base, (1, 2, 4)):
        grown = tuple(factor * part for part in base[name]) if name == "tokens" else factor * base[name]
        pairs, lengths, vocabulary, width = {**base, name: grown}.values()
        shape = ["--numbers", vocabulary, width, 4, width // 64, width // 64, 3 * width, "--lengths", *lengths]
        flags = [*fixed, *shape, "--batch-size", pairs, "--steps", arguments.steps]
        table = subprocess.check_output([sys.executable, __file__, *map(str, flags)], text=True).splitlines()
        state = 16 * (vocabulary * width + 4 * (4 * width**2 + 9 * width**2)) / 2**20
        print(f"{name} × {factor}; weights, gradients and moments: {state:,.0f}MB\n{table[1]}\n{table[-1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--ways", nargs="+", choices=("ours", "plain", "trl"), default=["ours", "plain", "trl"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="19m")
    for name, default, text in (("batch-size", 16, "pairs a step"), ("prompts", 32, "of generation, and a step of PPO"),
                                ("new-tokens", 64, "of generation and PPO"), ("steps", 4, ""), ("repeats", 3, "")):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--data", help="rows whose lengths are taken; default: drawn, a little shorter and more even")
    parser.add_argument("--lengths", nargs=3, type=int, help="of every prompt, chosen and rejected response instead")
    parser.add_argument("--scaling", action="store_true", help="instead of the table: how a DPO step's cost grows")
    parser.add_argument("--numbers", nargs=6, type=int, help=argparse.SUPPRESS)  # a shape
    parser.add_argument("--one", nargs=3, metavar=("WORK", "WAY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.dtype, arguments.numbers = arguments.dtypes[0], arguments.numbers or SHAPES[arguments.shape]
    if arguments.one:
        work, way, folder = arguments.one
        print(json.dumps(measure(work, way, Path(folder), arguments)))
    elif arguments.scaling:
        scaling(arguments)
    else:
        compare(arguments, list(sys.argv[1:]))


if __name__ == "__main__":
    main()
