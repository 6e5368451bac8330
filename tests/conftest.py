"""What several test files use: the repository on the import path, tiny models, and random packed documents."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import GPT, Config
from reward import RewardModel

TINY = Config(vocabulary=97, dim=32, layers=2, heads=4, kv_heads=2, mlp=64, context=128)


@pytest.fixture
def policy() -> GPT:
    """A tiny GPT with random weights."""
    torch.manual_seed(0)
    return GPT(TINY)


@pytest.fixture
def reward_model() -> RewardModel:
    """A tiny reward model with random weights."""
    torch.manual_seed(1)
    return RewardModel(GPT(TINY))


@pytest.fixture
def documents() -> list[tuple[torch.Tensor, ...]]:
    """Nine documents of a prompt and two responses, of many lengths, one token up; the last token ends a response."""
    generator = torch.Generator().manual_seed(2)

    def tokens(longest: int) -> torch.Tensor:
        length = int(torch.randint(1, longest, (), generator=generator))
        return torch.randint(0, TINY.vocabulary, (length,), generator=generator)

    made = [(tokens(30), tokens(40), tokens(40)) for _ in range(9)]
    for _, chosen, rejected in made:
        chosen[-1] = rejected[-1] = TINY.vocabulary - 1
    return made
