"""Mixed Preference Optimization, chapter 4: Direct Preference Optimization (DPO) on the easy pairs.

DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7) trains the policy π on preference pairs, without reward
model or sampling. Any π is the best policy, at KL price β, for this reward of response y to prompt x (plus any f(x)):

    r(x, y) = β (log π(y|x) − log π_ref(y|x)),

and the loss is Bradley-Terry on it, L_DPO = − mean log σ(r(chosen) − r(rejected)). It trusts every label, so it gets
the easy pairs here. The reference's log-probs are computed once, at the start: no second model is held in training.

    python dpo.py                                                 # easy.pt → dpo.pt
    python dpo.py --data pairs.pt --steps 256 --save dpo_all.pt   # the baseline: DPO on all pairs
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model import (
    GPT, Packed, Training, TrainingSettings, UserError, batch_indices, choose_device, count_steps, finish, flag,
    load_model, load_pairs, pack, parse_settings, run_command, save_model, settle, summed,
)


@dataclass
class Settings(TrainingSettings):
    """Flags of this stage."""

    data: str = flag("easy.pt", "pairs to train on")
    init: str = flag("sft.pt", "policy to start from")
    reference: str | None = flag(None, "policy to stay near [--init]")
    save: str = flag("dpo.pt", "checkpoint to write")
    epochs: float = flag(1.0, "passes over the pairs", least=0)
    batch_size: int = flag(64, "pairs per optimiser step", least=1)
    lr: float = flag(5e-5, "peak learning rate", least=0, pretrained=5e-7)
    beta: float = flag(0.1, "β: how closely the policy is held to the reference", above=0)
    loss: Literal["sigmoid", "ipo", "linear"] = flag("sigmoid", "sigmoid: DPO's and SPIN's; linear: IRFT's")
    label_smoothing: float = flag(0.0, "share of labels taken to be wrong (conservative DPO)", least=0, most=1)
    self_weight: float = flag(0.0, "weight w of the loss on labels that the policy itself gives (SAIL-DP)", least=0)

    def __post_init__(self):
        super().__post_init__()
        for name in ("label_smoothing", "self_weight"):
            if self.loss != "sigmoid" and getattr(self, name):
                raise UserError(f"--{name.replace('_', '-')}: --loss {self.loss} has none; take --loss sigmoid")


def dpo_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, kind: str = "sigmoid", smoothing: float = 0.0,
    self_weight: float = 0.0,
) -> Tensor:
    """Loss of each pair, in nats for "sigmoid", from log-ratios log π(y|x) − log π_ref(y|x). Shapes: [n], [n] → [n].

    With m = chosen_logratio − rejected_logratio:
    sigmoid: −(1 − ε) log σ(β m) − ε log σ(−β m), with ε = smoothing; Rafailov et al. 2023, equation 7, and for ε > 0
    Mitchell 2023, "A note on DPO with noisy preferences", equation 3;
    ipo: (m − 1 / (2 β))², Azar et al. 2023 (arXiv 2310.12036), equation 17, but on log-ratios that are means over the
    response's tokens where the equation has sums, as its authors later advised;
    linear: −β m, IRFT of Li et al. 2024 (arXiv 2405.17888), on labelled responses and the policy's own answers. On such
    pairs "sigmoid" is SPIN, Chen et al. 2024 (arXiv 2401.01335), equation 4.7, of which "linear" is the case ℓ(t) = −t.
    With z = β m, `self_weight` w adds w H(σ(z)) to "sigmoid", the loss to expect where the policy draws the label, with
    H(σ(z)) = softplus(z) − z σ(z), the binary entropy: SAIL-DP of Ding et al. 2024 (arXiv 2406.15567).
    """
    margin = chosen_logratios - rejected_logratios
    z = beta * margin
    if kind == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    if kind == "linear":
        return -z
    labelled = -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)
    return labelled + self_weight * (F.softplus(z) - z * z.sigmoid())


def pair_logprobs(policy: GPT, batch: Packed, mean: bool) -> Tensor:
    """log π(chosen|x) and log π(rejected|x) of each packed pair: [pairs, 2]; `mean` divides them by the lengths."""
    logprobs, _ = policy.logprobs(batch)
    sums = torch.zeros(len(batch.last), device=logprobs.device).index_add(0, batch.sequence, logprobs)
    lengths = batch.sequence.bincount(minlength=len(batch.last)) if mean else 1
    return (sums / lengths).view(-1, 2)


@torch.no_grad()
def all_logprobs(settings: Settings, policy: GPT, documents: list, device: torch.device) -> Tensor:
    """pair_logprobs of all these documents, without gradients: [n, 2]."""
    logprobs = torch.zeros(len(documents), 2, device=device)
    for batch in pack(documents, device, settings.pass_tokens):
        logprobs[batch.members] = pair_logprobs(policy, batch, settings.loss == "ipo")
    return summed(logprobs)


def main() -> None:
    """Trains the policy on preference pairs by DPO."""
    # 1. Settings, pairs, the policy, and the reference, by default the untrained policy.
    settings = parse_settings(Settings, __doc__)
    device = choose_device(settings)
    pairs = load_pairs(settings, settings.data)
    policy, tokenizer = load_model(settings, settings.init, GPT)
    reader, _ = load_model(settings, settings.reference or settings.init, GPT)
    settle(settings, policy.config.pretrained)
    held_back = list(load_pairs(settings, "test.pt"))[:512] if (Path(settings.out) / "test.pt").exists() else []
    anchor, start = (all_logprobs(settings, model, held_back, device) for model in (reader, policy))  # [n, 2] each
    training = Training(settings, len(pairs), policy, ("loss", "margin", "accuracy"))

    # 2. The reference's log-probs of the training pairs. Read in the batches of the first epoch, both models round
    # alike: then, on a CPU, the margins of step 1 are exactly 0, in bf16 too.
    reference = torch.zeros(len(pairs), 2, device=device)
    steps = min(count_steps(settings, len(pairs)), -(-len(pairs) // settings.batch_size))
    for step in tqdm(range(steps), desc="reference", unit="step", leave=False):
        indices = batch_indices(len(pairs), settings.batch_size, step, settings.seed)
        reference[indices] = all_logprobs(settings, reader, [pairs[index] for index in indices], device)
    del reader

    # 3. Train.
    options = settings.beta, settings.loss, settings.label_smoothing, settings.self_weight
    for indices in training:
        documents, logprobs = [pairs[index] for index in indices], torch.zeros(len(indices), 2, device=device)
        for batch in pack(documents, device, settings.pass_tokens):
            batch_logprobs = pair_logprobs(policy, batch, settings.loss == "ipo")
            logratios = batch_logprobs - reference[indices][batch.members]
            (dpo_loss(*logratios.unbind(1), *options).sum() / len(documents)).backward()
            logprobs[batch.members] = batch_logprobs.detach()
        metrics = {"grad_norm": training.optimize()}
        logprobs = summed(logprobs)  # for the log: of the whole batch, whichever process had them
        logratios = logprobs - reference[indices]
        losses, rewards = dpo_loss(*logratios.unbind(1), *options), settings.beta * logratios
        margin = rewards[:, 0] - rewards[:, 1]
        lengths = pairs.lengths[indices]  # (batch, 3)
        metrics |= {"loss": losses.mean(), "margin": margin.mean(), "accuracy": margin.sign().mean() / 2 + 0.5}
        for side, name in enumerate(("chosen", "rejected")):
            metrics[f"{name}_logprobs"] = logprobs[:, side].mean()
            metrics[f"{name}_rewards"] = rewards[:, side].mean()
            metrics[f"{name}_length"] = lengths[:, side + 1].float().mean().item()
        training.log("pairs", int(lengths.sum()), **metrics)

    # 4. Save, and report on held-back pairs; a policy that started as the reference began with ties, which count ½.
    save_model(settings, policy, tokenizer)
    if held_back:
        logratios = torch.stack((start, all_logprobs(settings, policy, held_back, device))) - anchor  # (2, n, 2)
        before, after = (logratios[..., 0] - logratios[..., 1]).sign().mean(1) / 2 + 0.5
        print(f"{len(held_back)} held-back pairs: the policy's own reward ranks {before:.1%} → {after:.1%} as labelled")
    finish(settings, ["save"], "python ppo.py", "--init {} --save PPO_NAME.pt")


if __name__ == "__main__":
    run_command(main)
