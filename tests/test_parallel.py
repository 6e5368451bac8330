"""Two processes under torchrun compute what one does: losses, checkpoints, answers, stopping and going on."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))
import model

CHAIN = [
    ("model", "--limit 300 --steps 8 --vocabulary 400 --dim 32 --layers 2 --heads 2 --kv-heads 1 --batch-size 16"),
    ("reward", "--steps 3 --batch-size 8"),
    ("split", ""),
    ("dpo", "--steps 4 --batch-size 7"),
    ("dpo", "--steps 3 --batch-size 1 --loss ipo --save one_pair.pt"),  # one process has nothing to do
    ("ppo", "--steps 2 --batch-size 6 --ppo-epochs 2 --minibatch-size 4 --max-new-tokens 12"),
    ("evaluate", "--prompts 7 --max-new-tokens 12 --samples 2"),
    ("dpo", "--steps 4 --batch-size 7 --save stopped.pt"),
    ("dpo", "--steps 4 --batch-size 7 --save stopped.pt --resume"),
]


def stop_after_two_steps(training, *names, **metrics):
    """In place of Training.log: after the second step, the last process alone is told to stop."""
    log(training, *names, **metrics)
    if training.step == 1 and model.processes()[0] == model.processes()[1] - 1:
        os.kill(os.getpid(), signal.SIGTERM)


log = model.Training.log


def run_chain(out: str) -> None:
    """All commands in this process; what they print is marked with the number of the process."""
    for command, flags in CHAIN:
        sys.argv = [f"{command}.py", *flags.split(), "--device", "cpu", "--out", out]
        model.Training.log = stop_after_two_steps if flags.endswith("stopped.pt") else log
        try:
            model.run_command(importlib.import_module(command).main)
        except SystemExit as stop:
            print(f"process {model.processes()[0]} exits with {stop.code}", flush=True)


if __name__ == "__main__":
    run_chain(sys.argv[1])


@pytest.fixture(scope="module")
def outs(tmp_path_factory):
    """(folder of one process, folder of two, what the two printed)."""
    folder = tmp_path_factory.mktemp("parallel")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ways = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
    started = [
        subprocess.Popen([sys.executable, *way, __file__, folder / name], stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, env=environment)
        for name, way in ways.items()
    ]  # fmt: skip
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert not any(process.returncode for process in started), printed
    return folder / "one", folder / "two", printed[1]


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "one_pair", "ppo"])
def test_two_processes_log_what_one_does(outs, name):
    one, two = ([json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()] for out in outs[:2])
    assert len(one) == len(two) > 1
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"seconds", "tokens_per_second", "pairs_per_second", "episodes_per_second",
                                  "peak_memory_mb"}:  # fmt: skip
            assert theirs[key] == pytest.approx(ours[key], rel=1e-5, abs=1e-5), key


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "one_pair", "ppo"])
def test_two_processes_write_the_checkpoint_that_one_does(outs, name):
    one, two = (torch.load(out / f"{name}.pt", weights_only=True) for out in outs[:2])
    weights, others = one.pop("weights"), two.pop("weights")
    assert one == two and weights.keys() == others.keys()
    start = torch.load(outs[0] / "sft.pt", weights_only=True)["weights"] if name in ("dpo", "ppo") else weights
    for key in weights:
        torch.testing.assert_close(others[key], weights[key], rtol=0, atol=1e-4)
    if name in ("dpo", "ppo"):
        assert any(not torch.equal(start[key], others[key]) for key in weights)


@pytest.mark.parametrize("name", ["pairs.pt", "test.pt", "easy.pt", "hard.pt"])
def test_two_processes_write_the_pairs_that_one_does(outs, name):
    one, two = (torch.load(out / name, weights_only=True) for out in outs[:2])
    assert one.keys() == two.keys() and one["made"] == two["made"]
    for key in one:
        if isinstance(one[key], torch.Tensor):
            torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-4)
    assert len(two["lengths"])


def test_two_processes_give_the_answers_that_one_does(outs):
    one, two = (json.loads((out / "evaluation.json").read_text()) for out in outs[:2])
    assert one.keys() == two.keys()
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-4)


def test_one_process_speaks_for_both(outs):
    printed = outs[2]
    for command in ("reward", "split", "dpo", "ppo", "evaluate"):
        assert printed.count(f"next: python {command}.py") == {"reward": 1, "split": 1, "dpo": 1, "ppo": 3}.get(
            command, 1
        )


def test_a_signal_to_one_process_stops_both_after_the_same_step_and_they_go_on(outs):
    assert outs[2].count("stopped after step 2 of 4") == 1
    assert "process 0 exits with 130" in outs[2]
    for out in outs[:2]:
        whole, stopped = (torch.load(out / name, weights_only=True)["weights"] for name in ("dpo.pt", "stopped.pt"))
        assert all(torch.equal(whole[key], stopped[key]) for key in whole)
        assert [json.loads(line)["step"] for line in (out / "stopped.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
        assert not (out / "stopped.state.pt").exists()


def test_a_process_without_a_gpu_of_its_own_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert model.choose_device(model.Settings()) == torch.device("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # and so to all: only the first one's message is shown
    assert model.choose_device(model.Settings(device="cpu")) == torch.device("cpu")
    with pytest.raises(model.UserError, match="lower --nproc-per-node"):
        model.choose_device(model.Settings())
