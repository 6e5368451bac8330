"""What several test files use: the repository on the import path, tiny models, random documents, the slow and plain
way through a model, and a stage's command run in a folder."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import GPT, CommonSettings, Config, Pairs, Tokenizer, read_log, save_model, train_tokenizer
from reward import RewardModel

torch.set_num_threads(1)  # tests are tiny: more threads would spend their time waiting for one another
LETTERS = train_tokenizer([], 257)  # all bytes, and an end token
TINY = Config(LETTERS.size, dim=32, layers=2, heads=4, kv_heads=2, mlp=64, context=128, head_dim=16)
CPU, END = torch.device("cpu"), LETTERS.end
# By device and dtype, how far off may be: log-probs from those of fp32 or float64 on the CPU; a model's gradients,
# relative to their norm; and log-probs of the same rows with and without gradients, which a GPU compiles apart.
TOLERANCES = {("cpu", "fp32"): (1e-5, 1e-6, 0.0), ("cpu", "bf16"): (0.15, 0.02, 0.0),
              ("cuda", "fp32"): (1e-4, 1e-5, 1e-4), ("cuda", "bf16"): (0.15, 0.03, 0.1)}
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.fixture(params=["cpu", GPU])
def device(request):
    """Each device that a test should pass on. What was compiled for one test does not count for the next."""
    yield torch.device(request.param)
    if request.param == "cuda":
        torch.compiler.reset()


def tiny(seed: int) -> GPT:
    """A tiny GPT with random weights."""
    torch.manual_seed(seed)
    return GPT(replace(TINY))  # a copy, which tests may change


policy = pytest.fixture(lambda: tiny(0))
reward_model = pytest.fixture(lambda: RewardModel(tiny(1)))


@pytest.fixture
def documents() -> list[tuple[torch.Tensor, ...]]:
    """Nine documents of a prompt and two responses, of many lengths, one token up; the last token ends a response."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 40, (27,), generator=generator).tolist()
    parts = torch.randint(0, TINY.vocabulary, (sum(lengths),), generator=generator).split(lengths)
    for response in parts[9:]:
        response[-1] = END
    return list(zip(parts[:9], parts[9:18], parts[18:], strict=True))


def spell(text: str) -> torch.Tensor:
    """Token ids of LETTERS: the text's bytes, and the end token, unless … says that it did not end."""
    return torch.tensor(LETTERS.encode(text.rstrip("…")) + [LETTERS.end] * (not text.endswith("…")))


def make_pairs(documents, gold=None) -> Pairs:
    """Pairs of these documents, each (prompt, chosen, rejected)."""
    tokens = torch.cat([part for document in documents for part in document]).int()
    lengths = torch.tensor([[len(part) for part in document] for document in documents])
    return Pairs(tokens, lengths, LETTERS, gold=gold)


def write(folder: Path, tokenizer: Tokenizer = LETTERS, **content) -> None:
    """Writes models, pairs and lists of documents to the files NAME.pt of the folder."""
    settings = CommonSettings(out=str(folder))
    for name, what in content.items():
        settings.save = f"{name}.pt"
        if isinstance(what, torch.nn.Module):
            save_model(settings, what, tokenizer)
        else:
            (what if isinstance(what, Pairs) else make_pairs(what)).save(settings, settings.save)


def plain_hidden(gpt: GPT, prompt: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """Hidden states of the tokens before each response token, [length, dim], with nothing packed."""
    return gpt(torch.cat((prompt, response)))[len(prompt) - 1 : -1]


def plain_distribution(policy: GPT, prompt, response, temperature: float = 1.0) -> torch.Tensor:
    """log softmax over the vocabulary at each response token: [length, V]."""
    return (plain_hidden(policy, prompt, response) @ policy.vocabulary_weight.T / temperature).log_softmax(-1)


def plain_logprobs(policy: GPT, prompt, response, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of the response's tokens: [length]."""
    return plain_distribution(policy, prompt, response, temperature).gather(1, response[:, None])[:, 0]


def plain_score(model: RewardModel, *parts: torch.Tensor) -> torch.Tensor:
    """The head on the last hidden state of one text."""
    return model.head(model.trunk(torch.cat(parts))[-1])[0]


def plain_rewards(model, documents):
    """Scores [documents, 2], each response on its own behind its prompt."""
    scores = [plain_score(model, prompt, side) for prompt, *sides in documents for side in sides]
    return torch.stack(scores).view(-1, 2)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs a stage's main with these flags, its files in tmp_path, and returns its log."""

    def call(stage, flags: str = "", *more) -> list[dict]:
        fixed = ["--out", str(tmp_path), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [f"{stage.__name__}.py", *fixed, *flags.split(), *map(str, more)])
        stage.main()
        return read_log(tmp_path / f"{stage.__name__}.jsonl")

    return call
