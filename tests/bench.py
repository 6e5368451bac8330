"""How fast each stage is, beside the same work written the plain way and done by TRL and transformers.

    python tests/bench.py                                     # everything, in fp32 and bf16
    python tests/bench.py --work dpo kernel --dtypes bf16     # some of it
    python tests/bench.py --data my_pairs.jsonl               # lengths of real pairs instead of drawn ones
    python tests/bench.py --scaling                           # how time and memory grow

Three ways of doing one work, on the same weights, token ids, batches, optimiser and steps:

    ours    the stage's own main
    plain   padded batches in which each response carries its own prompt, whole logits, a second model as the reference,
            generation with a padded cache; written here
    trl     TRL's trainers and transformers' generate, where they are installed: trl 1.11 is the last one with PPO;
            for the kernel, torch's linear_cross_entropy, chunked

Every measurement is a process of its own; memory is the peak of that process, and `beyond` what of it came on top of
the libraries. Losses are printed side by side: they show that the same thing is computed. Machines are noisy: only
ratios within one run count, and each is the middle of --repeats runs.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
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
}
WORKS = ("kernel", "sft", "reward", "dpo", "generate", "ppo")
UNITS = {"kernel": "tokens/s", "generate": "tokens/s", "ppo": "episodes/s"}  # else pairs/s
LR = 1e-5
PPO = {"prompts": 32, "new_tokens": 64, "epochs": 4, "minibatch": 32}


# ---- What is measured: a folder with pairs.pt, sft.pt, reward.pt and both models exported ----


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    """Writes the files that every way reads."""
    vocabulary, *shape = arguments.numbers or SHAPES[arguments.shape]
    generator = torch.Generator().manual_seed(0)
    count = max(arguments.batch_size, PPO["prompts"]) * arguments.steps
    if arguments.data:
        settings = model.Settings(data=arguments.data, limit=4 * count, test_share=0.1)
        settle(settings, pretrained=False)
        lengths = model.read_pairs(settings)[0].lengths[:count]
    elif arguments.lengths:
        lengths = torch.tensor([arguments.lengths]).repeat(count, 1)
    else:  # drawn: about 94, 31 and 38 tokens on average, a little shorter and more even than HH-RLHF's harmless pairs
        means, spreads = torch.tensor([75.0, 24.0, 28.0]).log(), torch.tensor([0.65, 0.7, 0.75])
        lengths = (means + spreads * torch.randn(count, 3, generator=generator)).exp().long()
        lengths = lengths.clamp(torch.tensor([8, 2, 2]), torch.tensor([341, 128, 128]))
    tokens = torch.randint(0, vocabulary - 2, (int(lengths.sum()),), generator=generator, dtype=torch.int32)
    names = [SYMBOLS[byte] for byte in range(256)]
    pairs = map("".join, itertools.product(names[:255], repeat=2))  # without byte 255, whose place padding takes
    names += itertools.islice(pairs, vocabulary - 257)
    tokenizer = Tokenizer(tokenizer_json({name: number for number, name in enumerate(names)}), END_OF_TEXT)
    ends = lengths.cumsum(1) + (lengths.sum(1).cumsum(0) - lengths.sum(1))[:, None] - 1
    tokens[ends[:, 1:].flatten()] = tokenizer.end
    torch.manual_seed(0)
    policy = GPT(Config(vocabulary, *shape, context=1024))
    settings = model.Settings(out=str(folder))
    Pairs(tokens, lengths, tokenizer, "bench").save(settings, "pairs.pt")
    Pairs(tokens[: int(lengths[:2].sum())], lengths[:2], tokenizer, "bench").save(settings, "test.pt")
    save_model(settings, policy, tokenizer)
    torch.manual_seed(model.mixed_seed(0, 0))  # as reward.py seeds its head
    settings.save = "reward.pt"
    save_model(settings, RewardModel(policy), tokenizer)
    if importlib.util.find_spec("transformers"):
        for name in ("sft", "reward"):
            export_model(folder / f"{name}.pt", folder / name)


def batches(pairs: Pairs, arguments: argparse.Namespace) -> list[list[tuple]]:
    """The pairs of each step, as the stages draw them."""
    return [[pairs[index] for index in batch_indices(len(pairs), arguments.batch_size, step, 0)]
            for step in range(arguments.steps)]


# ---- Ours: the stages' own mains ----


def ours(work: str, folder: Path, arguments: argparse.Namespace) -> dict:
    """Runs the stage; the clock runs from when its files are loaded to the end of its loop."""
    out = folder / "sft_run" if work == "sft" else folder  # where model.py may write pairs.pt anew
    common = f"--out {out} --device cpu --dtype {arguments.dtype} --save {work}_ours.pt --seed 0".split()
    training = f"--lr {LR} --warmup 0 --decay constant --save-every 0 --steps {arguments.steps}".split()
    size = ["--batch-size", str(arguments.batch_size)]
    flags = {
        "sft": [*size, "--init", str(folder / "sft.pt")], "reward": size, "dpo": [*size, "--data", "pairs.pt"],
        "ppo": f"--batch-size {PPO['prompts']} --ppo-epochs {PPO['epochs']} --minibatch-size {PPO['minibatch']} "
               f"--max-new-tokens {PPO['new_tokens']} --data pairs.pt --init sft.pt".split(),
    }
    stage, clock = importlib.import_module("model" if work == "sft" else work), {}
    sides = [load_pairs(model.Settings(out=str(folder)), name) for name in ("pairs.pt", "test.pt")]
    loop = model.Training.__iter__

    def timed_settle(*given):
        clock["start"] = time.perf_counter()
        settle(*given)

    def timed_loop(steps):
        yield from loop(steps)
        clock["end"] = time.perf_counter()

    stage.settle, model.Training.__iter__, model.read_pairs = timed_settle, timed_loop, lambda *_: sides
    sys.argv = [f"{work}.py", *common, *training, *flags[work]]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        stage.main()
    losses = [json.loads(line)["loss"] for line in (out / f"{work}_ours.jsonl").read_text().splitlines()]
    units = arguments.steps * (PPO["prompts"] if work == "ppo" else arguments.batch_size)
    return {"seconds": clock["end"] - clock["start"], "units": units, "losses": losses}


# ---- Plain: padded, unshared, whole logits ----


def plain_forward(gpt: GPT, tokens, positions, mask, cache=None) -> torch.Tensor:
    """Hidden states [B, T, dim] of padded token ids [B, T]; positions: [B, T]; mask: [B, 1, T, keys] bool."""
    angle = positions[:, None, :, None] * model.rotary_frequencies(gpt.config, tokens.device)  # (B, 1, T, head_dim / 2)
    cos, sin = angle.cos(), angle.sin()
    with gpt.precision():
        x = gpt.embedding(tokens)  # (B, T, dim)
        for number, block in enumerate(gpt.blocks):
            attention = block.attention
            heads = attention.qkv(block.attention_norm(x)).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
            q, k, v = heads.split((attention.heads, attention.kv_heads, attention.kv_heads), 1)  # (B, …, T, head_dim)
            q, k, v = model.rotate(q, cos, sin).float(), model.rotate(k, cos, sin).float(), v.float()  # as ours: faster
            if cache is not None:
                old_k, old_v = cache.get(number, (k[:, :, :0], v[:, :, :0]))
                k, v = cache[number] = torch.cat((old_k, k), 2), torch.cat((old_v, v), 2)
            with torch.autocast("cpu", enabled=False):
                mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            x = x + attention.output(mixed.transpose(1, 2).flatten(2))
            gate, up = block.gate_up(block.mlp_norm(x)).chunk(2, dim=-1)
            x = x + block.down(F.silu(gate) * up)
        return gpt.norm(x)


def plain_hidden(gpt: GPT, sequences: list[torch.Tensor]) -> torch.Tensor:
    """Hidden states [B, T, dim] of a batch padded on the right."""
    tokens = pad_sequence(sequences, batch_first=True)
    length = tokens.shape[1]
    real = torch.arange(length) < torch.tensor([len(sequence) for sequence in sequences])[:, None]
    mask = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, None]
    return plain_forward(gpt, tokens, torch.arange(length).expand_as(tokens), mask)


@torch.no_grad()
def plain_generate(gpt: GPT, prompts: list[torch.Tensor], end: int, new: int, seed: int = 0) -> list[torch.Tensor]:
    """What `generate` samples, for a batch padded on the left. The cache, {layer: (keys, values)} of the whole batch,
    grows by a column a step, padding included."""
    width, cache, drawn = max(map(len, prompts)), {}, []
    tokens = torch.stack([F.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    padding = torch.tensor([width - len(prompt) for prompt in prompts])[:, None]
    columns = torch.arange(width + new)
    real = (columns >= padding)[:, None, None]
    mask = (torch.ones(width, width, dtype=torch.bool).tril() & real[..., :width]) | torch.eye(width, dtype=torch.bool)
    noise = torch.rand(len(prompts), new, generator=torch.Generator().manual_seed(seed))
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
    hidden = plain_hidden(gpt, sequences)
    logits = (hidden.to(gpt.activations) @ gpt.vocabulary_weight.to(gpt.activations).T).float()
    tokens = pad_sequence(sequences, batch_first=True)
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return [row[len(prompt) - 1 : len(prompt) + len(response) - 1]
            for row, prompt, response in zip(logprobs, prompts, responses, strict=True)]


def plain(work: str, folder: Path, arguments: argparse.Namespace) -> dict:
    settings = model.Settings(out=str(folder), dtype=arguments.dtype)
    pairs, (policy, _) = load_pairs(settings, "pairs.pt"), load_model(settings, "sft.pt", GPT)
    reference = load_model(settings, "sft.pt", GPT)[0] if work == "dpo" else None
    trained = load_model(settings, "reward.pt", RewardModel)[0] if work == "reward" else policy
    optimizer = torch.optim.AdamW(trained.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    start, losses = time.perf_counter(), []
    for batch in batches(pairs, arguments):
        prompts, chosen, rejected = (list(side) for side in zip(*batch, strict=True))
        if work == "sft":
            loss = -torch.cat(plain_logprobs(policy, prompts, chosen)).mean()
        elif work == "reward":
            sequences = [torch.cat(pair) for pair in zip(prompts * 2, chosen + rejected, strict=True)]
            last = torch.tensor([len(sequence) - 1 for sequence in sequences])
            hidden = plain_hidden(trained.trunk, sequences)[torch.arange(len(last)), last]
            loss = bradley_terry_loss(*trained.head(hidden.float()).view(2, -1)).mean()
        else:
            both = prompts * 2, chosen + rejected
            sums = torch.stack([one.sum() for one in plain_logprobs(policy, *both)]).view(2, -1)
            with torch.no_grad():
                theirs = torch.stack([one.sum() for one in plain_logprobs(reference, *both)]).view(2, -1)
            logratios = sums - theirs
            loss = -F.logsigmoid(0.1 * (logratios[0] - logratios[1])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"seconds": time.perf_counter() - start, "units": len(losses) * arguments.batch_size, "losses": losses}


def plain_ppo(folder: Path, arguments: argparse.Namespace) -> dict:
    """PPO with the stage's formulas, on padded batches and whole logits; its answers are the stage's in fp32."""
    settings = ppo.Settings(out=str(folder), dtype=arguments.dtype)
    pairs, (policy, tokenizer) = load_pairs(settings, "pairs.pt"), load_model(settings, "sft.pt", GPT)
    reference, _ = load_model(settings, "sft.pt", GPT)
    reward, critic = (load_model(settings, "reward.pt", RewardModel)[0] for _ in range(2))
    settle(settings, pretrained=False)
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)
    start, losses = time.perf_counter(), []

    def read(scored: RewardModel, places: list[slice]) -> torch.Tensor:
        hidden = plain_hidden(scored.trunk, sequences)
        values = [scored.head(row[place].float())[:, 0] for row, place in zip(hidden, places, strict=True)]
        return pad_sequence(values, batch_first=True)

    for step in range(arguments.steps):
        indices, seed = batch_indices(len(pairs), PPO["prompts"], step, 0), model.mixed_seed(0, step)
        prompts = [pairs[index][0] for index in indices]
        responses = plain_generate(policy, prompts, tokenizer.end, PPO["new_tokens"], seed)
        sequences = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
        before = [slice(len(p) - 1, len(p) + len(r) - 1) for p, r in zip(prompts, responses, strict=True)]
        with torch.no_grad():
            logprobs, theirs = (pad_sequence(plain_logprobs(one, prompts, responses), batch_first=True)
                                for one in (policy, reference))
            values = read(critic, before)
            scores = read(reward, [slice(len(row) - 1, len(row)) for row in sequences])[:, 0]
        lengths = torch.tensor([len(response) for response in responses])
        ended = torch.tensor([bool(response[-1] == tokenizer.end) for response in responses])
        rollout = ppo.Rollout([], logprobs, theirs, values, scores, lengths, ended)
        advantages, returns = ppo.advantages_and_returns(settings, rollout)
        history, real = [], rollout.real
        for _ in range(PPO["epochs"]):
            new_logprobs = torch.cat(plain_logprobs(policy, prompts, responses))
            policy_losses = ppo.ppo_loss(new_logprobs, logprobs[real], advantages[real], settings.clip_ratio)
            new_values = read(critic, before)[real]
            value_losses = ppo.value_loss(new_values, values[real], returns[real], settings.clip_value)
            loss = (policy_losses + settings.value_coefficient * value_losses).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.item())
        losses.append(sum(history) / len(history))
    return {"seconds": time.perf_counter() - start, "units": arguments.steps * PPO["prompts"], "losses": losses}


# ---- TRL and transformers ----


def trl_ppo(folder: Path, arguments: argparse.Namespace) -> dict:
    """TRL's last PPO trainer (trl 1.11 has it, 1.13 not). Its answers are others than ours: it draws otherwise."""
    import datasets
    import transformers
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    settings = ppo.Settings(out=str(folder))
    settle(settings, pretrained=False)
    pairs = load_pairs(settings, "pairs.pt")
    causal, scorer = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
    policy, reference = (causal.from_pretrained(folder / "sft", dtype=torch.float32) for _ in range(2))
    reward, value = (scorer.from_pretrained(folder / "reward", dtype=torch.float32) for _ in range(2))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "sft", padding_side="left")
    tokenizer.pad_token = PADDING
    config = PPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=PPO["prompts"], num_mini_batches=1,
        num_ppo_epochs=PPO["epochs"], total_episodes=PPO["prompts"] * arguments.steps,
        response_length=PPO["new_tokens"], local_rollout_forward_batch_size=PPO["prompts"], num_sample_generations=0,
        stop_token="eos", missing_eos_penalty=settings.missing_eos_penalty, kl_coef=settings.kl_coefficient,
        cliprange=settings.clip_ratio, cliprange_value=settings.clip_value, vf_coef=settings.value_coefficient,
        gamma=settings.gamma, lam=settings.gae_lambda, temperature=1.0, learning_rate=LR,
        lr_scheduler_type="constant", weight_decay=0.0, adam_beta2=0.95, logging_steps=1, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, gradient_checkpointing=False, bf16=arguments.dtype == "bf16",
    )
    indices = [index for step in range(arguments.steps) for index in batch_indices(len(pairs), PPO["prompts"], step, 0)]
    dataset = datasets.Dataset.from_list([{"input_ids": pairs[index][0].tolist()} for index in indices])
    trainer = PPOTrainer(config, tokenizer, policy, reference, reward, dataset, value, eval_dataset=dataset)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    losses = [entry["loss/policy_avg"] + settings.value_coefficient * entry["loss/value_avg"]
              for entry in trainer.state.log_history if "loss/policy_avg" in entry]
    return {"seconds": seconds, "units": len(indices), "losses": losses}


def trl(work: str, folder: Path, arguments: argparse.Namespace) -> dict:
    import datasets
    import transformers
    import trl

    settings = model.Settings(out=str(folder))
    pairs = load_pairs(settings, "pairs.pt")
    rows = [[part.tolist() for part in pair] for batch in batches(pairs, arguments) for pair in batch]
    common = {"output_dir": str(folder / "trl"), "per_device_train_batch_size": arguments.batch_size, "report_to": [],
              "max_steps": arguments.steps, "learning_rate": LR, "lr_scheduler_type": "constant", "weight_decay": 0.0,
              "adam_beta2": 0.95, "max_grad_norm": 1.0, "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
              "disable_tqdm": True, "gradient_checkpointing": False, "bf16": arguments.dtype == "bf16",
              "max_length": 1024}
    trainers = {
        "sft": (trl.SFTTrainer, trl.SFTConfig, {}),
        "reward": (trl.RewardTrainer, trl.RewardConfig, {}),
        "dpo": (trl.DPOTrainer, trl.DPOConfig, {"beta": 0.1}),
    }
    columns = {
        "sft": lambda p, c, r: {"input_ids": p + c, "labels": [-100] * len(p) + c},
        "reward": lambda p, c, r: {"chosen_ids": p + c, "rejected_ids": p + r},
        "dpo": lambda p, c, r: {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r},
    }
    kind = transformers.AutoModelForSequenceClassification if work == "reward" else transformers.AutoModelForCausalLM
    name = "reward" if work == "reward" else "sft"
    loaded = kind.from_pretrained(folder / name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name)
    tokenizer.pad_token = PADDING
    trainer_class, config_class, more = trainers[work]

    class InOrder(trainer_class):
        """The given token ids as they are, in the order of the other ways."""

        def _prepare_dataset(self, dataset, *given, **more):
            return dataset

        def _get_train_sampler(self, *given):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    config = config_class(**common, **more)
    dataset = datasets.Dataset.from_list([columns[work](*row) for row in rows])
    trainer = InOrder(model=loaded, args=config, train_dataset=dataset, processing_class=tokenizer)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": seconds, "units": len(rows), "losses": losses}


# ---- Generation, the kernel ----


@torch.no_grad()
def generation(way: str, folder: Path, arguments: argparse.Namespace) -> dict:
    """32 prompts × 64 new tokens, none of which ends a response."""
    settings = model.Settings(out=str(folder), dtype=arguments.dtype)
    pairs, (policy, _) = load_pairs(settings, "pairs.pt"), load_model(settings, "sft.pt", GPT)
    prompts, new = [pairs[index % len(pairs)][0] for index in range(32)], 64
    if way == "trl":
        import transformers

        kind = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "sft", dtype=kind)
        width = max(map(len, prompts))
        tokens = torch.stack([F.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
        mask = torch.stack([F.pad(torch.ones_like(prompt), (width - len(prompt), 0)) for prompt in prompts])
        start = time.perf_counter()
        theirs.generate(input_ids=tokens, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, eos_token_id=None,
                        max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
    elif way == "ours":
        start = time.perf_counter()
        generate(policy, prompts, -1, new)
    else:
        start = time.perf_counter()
        plain_generate(policy, prompts, -1, new)
    return {"seconds": time.perf_counter() - start, "units": len(prompts) * new, "losses": []}


def kernel(way: str, folder: Path, arguments: argparse.Namespace) -> dict:
    """4,096 tokens, 576 wide, 49,152 vocabulary, forward and backward."""
    torch.manual_seed(0)
    kind = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    hidden = torch.randn(4096, 576).to(kind).requires_grad_()
    weight = (torch.randn(49152, 576) / 24).requires_grad_()
    targets = torch.randint(0, 49152, (4096,))

    def once() -> torch.Tensor:
        if way == "plain":
            logits = (hidden @ weight.to(kind).T).float()
            loss = -logits.log_softmax(-1).gather(-1, targets[:, None]).mean()
        elif way == "trl":
            options = torch.nn.LinearCrossEntropyOptions(chunking_method="auto")
            loss = F.linear_cross_entropy(hidden, weight.to(kind), targets, options=options)
        else:
            loss = -token_logprobs(hidden, weight, targets, compiled=arguments.compile)[0].mean()
        loss.backward()
        return loss

    once()  # compilation and the process's first use of so much memory are not the kernel's time
    hidden.grad = weight.grad = None
    start = time.perf_counter()
    loss = once()
    return {"seconds": time.perf_counter() - start, "units": 4096, "losses": [loss.item(), hidden.grad.float().norm()]}


# ---- Measuring ----


def measure(work: str, way: str, folder: Path, arguments: argparse.Namespace) -> dict:
    """One measurement, in this process."""
    import torch._dynamo  # noqa: F401 (AdamW imports it when it is made: seconds that are not training)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if work == "generate":
        result = generation(way, folder, arguments)
    elif work == "kernel":
        result = kernel(way, folder, arguments)
    elif way == "ours":
        result = ours(work, folder, arguments)
    elif work == "ppo":
        result = {"plain": plain_ppo, "trl": trl_ppo}[way](folder, arguments)
    else:
        result = {"plain": plain, "trl": trl}[way](work, folder, arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result["losses"] = [float(loss) for loss in result["losses"]]
    return {**result, "peak_mb": peak / 1024, "beyond_mb": (peak - before) / 1024}


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
    print(f"{arguments.shape}, {arguments.batch_size} pairs a step, {arguments.steps} steps, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, middle of {arguments.repeats}")
    print(f"{'work':10s} {'dtype':5s} {'way':6s} {'speed':>20s} {'ours is':>9s} {'peak':>8s} {'beyond':>8s}  losses")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            prepare(folder, arguments)
        for work, dtype in itertools.product(arguments.work, arguments.dtypes):
            ways = [way for way in arguments.ways if way != "trl" or work == "kernel" or libraries]
            runs = {way: [] for way in ways}
            for _ in range(arguments.repeats):
                for way in ways:  # in turn, so that a slow minute of the machine hits all
                    if result := in_a_process(work, way, dtype, folder, flags):
                        runs[way].append(result)
            speeds = {way: statistics.median(one["units"] / one["seconds"] for one in done)
                      for way, done in runs.items() if done}
            for way in speeds:
                last = runs[way][-1]
                ratio = f"{speeds['ours'] / speeds[way]:8.2f}×" if "ours" in speeds else ""
                losses = " ".join(f"{loss:.4f}" for loss in last["losses"][:3] + last["losses"][3:][-1:])
                speed = f"{speeds[way]:.2f} {UNITS.get(work, 'pairs/s')}"
                print(f"{work:10s} {dtype:5s} {way:6s} {speed:>20s} {ratio:>9s} {last['peak_mb']:6.0f}MB "
                      f"{last['beyond_mb']:6.0f}MB  {losses}", flush=True)


def scaling(arguments: argparse.Namespace) -> None:
    """How time and memory of a DPO step grow as each of four sizes is doubled twice."""
    base = {"pairs": 16, "lengths": (128, 32, 32), "vocabulary": 8192, "width": 256}
    print(f"DPO, 4 blocks, {arguments.steps} steps, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("state: weights, gradients and moments, 16 bytes a parameter; logits: one copy of the whole, never held")
    print(f"{'doubled':12s} {'to':>6s} {'tokens/step':>11s} {'s/step':>7s} {'state':>8s} {'beyond it':>9s} "
          f"{'logits':>8s}")
    for name, factor in itertools.product(base, (1, 2, 4)):
        grown = base[name]
        grown = tuple(factor * part for part in grown) if name == "lengths" else factor * grown
        sizes = {**base, name: grown}
        width = sizes["width"]
        numbers = [sizes["vocabulary"], width, 4, width // 64, width // 64, 3 * width]
        flags = ["--numbers", *map(str, numbers), "--lengths", *map(str, sizes["lengths"])]
        flags += ["--batch-size", str(sizes["pairs"]), "--steps", str(arguments.steps)]
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, *flags, "--one", "prepare", "ours", folder]
            subprocess.run(command, check=True, capture_output=True)
            result = in_a_process("dpo", "ours", arguments.dtype, Path(folder), flags)
        parameters = sizes["vocabulary"] * width + 4 * (4 * width**2 + 9 * width**2)
        tokens, responses = sizes["pairs"] * sum(sizes["lengths"]), sizes["pairs"] * sum(sizes["lengths"][1:])
        state, logits = 16 * parameters / 2**20, 4 * responses * sizes["vocabulary"] / 2**20
        value = str(sum(sizes["lengths"]) if name == "lengths" else sizes[name])
        seconds, beyond = result["seconds"] / arguments.steps, result["beyond_mb"] - state
        print(f"{name:12s} {value:>6s} {tokens:11,d} {seconds:7.2f} {state:6.0f}MB {beyond:7.0f}MB {logits:6.0f}MB",
              flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--ways", nargs="+", choices=("ours", "plain", "trl"), default=["ours", "plain", "trl"])
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--shape", choices=SHAPES, default="19m")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs a step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", help="rows whose lengths are taken; default: drawn, a little shorter and more even")
    parser.add_argument("--compile", action="store_true", help="compile our log-prob kernel")
    parser.add_argument("--scaling", action="store_true", help="instead of the table: how a DPO step's cost grows")
    parser.add_argument("--numbers", nargs=6, type=int, help=argparse.SUPPRESS)  # a shape, and fixed lengths
    parser.add_argument("--lengths", nargs=3, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=3, metavar=("WORK", "WAY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtypes[0]
    if arguments.one:
        work, way, folder = arguments.one
        if work == "prepare":
            prepare(Path(folder), arguments)
        else:
            print(json.dumps(measure(work, way, Path(folder), arguments)))
    elif arguments.scaling:
        scaling(arguments)
    else:
        compare(arguments, list(sys.argv[1:]))


if __name__ == "__main__":
    main()
