"""Two processes under torchrun compute what one does: losses, checkpoints, answers, stopping and going on."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

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
SAVED = ["sft", "reward", "dpo", "one_pair", "ppo"]


def run_chain(out: str) -> None:
    """All commands in this process; of several processes the last alone is told to stop, in the second step."""
    log = model.Training.log

    def log_and_stop(training, *names, **metrics):
        log(training, *names, **metrics)
        if training.step == 1 and model.processes()[0] == model.processes()[1] - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    for command, flags in CHAIN:
        sys.argv = [f"{command}.py", *flags.split(), "--device", "cpu", "--out", out]
        model.Training.log = log_and_stop if flags.endswith("stopped.pt") else log
        try:
            model.run_command(importlib.import_module(command).main)
        except SystemExit as stop:
            if not flags.endswith("stopped.pt"):
                raise
            print(f"process {model.processes()[0]} exits with {stop.code}", flush=True)


if __name__ == "__main__":
    run_chain(sys.argv[1])


@pytest.fixture(scope="module")
def outs(tmp_path_factory):
    """(folder of one process, folder of two, what the two printed)."""
    folder, environment = tmp_path_factory.mktemp("parallel"), {**os.environ, "OMP_NUM_THREADS": "1"}
    ways = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
    started = [
        subprocess.Popen([sys.executable, *way, __file__, folder / name], stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, env=environment)
        for name, way in ways.items()
    ]
    printed = [process.communicate(timeout=100)[0] for process in started]
    assert not any(process.returncode for process in started), printed
    return folder / "one", folder / "two", printed[1]


def parts(path: Path) -> dict:
    """What a file holds, by name: the weights and all else of a checkpoint, or the numbers of a log or a table, without
    those that depend on the clock and on who made it."""
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        return content | content.pop("weights", {}) | {"made": content["made"]["data"]}
    text = path.read_text()
    rows = dict(enumerate(map(json.loads, text.splitlines()))) if path.suffix == ".jsonl" else json.loads(text)
    return {f"{row} {key}": value for row, record in rows.items() for key, value in record.items()
            if "second" not in key and "memory" not in key}


@pytest.mark.parametrize("name", [*(f"{name}.jsonl" for name in SAVED), "evaluation.json",
                                  *(f"{name}.pt" for name in [*SAVED, "pairs", "test", "easy", "hard"])])
def test_two_processes_write_what_one_does(outs, name):
    one, two = (parts(out / name) for out in outs[:2])
    assert one.keys() == two.keys() and len(one) > 5
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-5)
        elif isinstance(value, float):
            tolerance = 1e-4 if name == "evaluation.json" else 1e-5
            assert two[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key
        else:
            assert two[key] == value, key


def test_a_signal_to_one_process_stops_both_after_the_same_step_and_they_go_on_and_one_speaks_for_both(outs):
    assert outs[2].count("stopped after step 2 of 4") == 1 and outs[2].count("exits with 130") == 2
    assert [outs[2].count(f"next: python {name}.py") for name in ("split", "dpo", "ppo", "evaluate")] == [1, 1, 3, 1]
    for out in outs[:2]:
        full, stopped = (torch.load(out / name, weights_only=True)["weights"] for name in ("dpo.pt", "stopped.pt"))
        assert all(torch.equal(full[key], stopped[key]) for key in full)
        assert [json.loads(line)["step"] for line in (out / "stopped.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
        assert not (out / "stopped.state.pt").exists()


def test_a_process_without_a_gpu_of_its_own_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert model.choose_device(model.Settings()) == torch.device("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # and so to all: only the first one's message is shown
    assert model.choose_device(model.Settings(device="cpu")) == torch.device("cpu")
    with pytest.raises(model.UserError, match="lower --nproc-per-node"):
        model.choose_device(model.Settings())
