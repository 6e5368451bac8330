"""Two processes under torchrun compute what one does: losses, checkpoints, answers, stopping and going on."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_commands import TERM, content, log, run, same_weights

from model import processes

CHAIN = [  # beside test_commands' quick flags, whose rates make more of rounding; by seed 0 it decides a token
    "model --limit 300 --layers 2 --batch-size 16 --lr 2e-3", "reward --steps 3", "split",
    "dpo --batch-size 7 --lr 5e-5",
    "dpo --batch-size 1 --lr 5e-5 --steps 3 --loss ipo --save one_pair.pt",  # one process has nothing to do
    "ppo --steps 2 --batch-size 6 --minibatch-size 4 --max-new-tokens 12 --seed 1", "evaluate --prompts 7 --samples 2",
    "dpo --batch-size 7 --lr 5e-5 --save stopped.pt", "dpo --batch-size 7 --lr 5e-5 --save stopped.pt --resume",
]
SAVED = ["sft", "reward", "dpo", "one_pair", "ppo"]


if __name__ == "__main__":  # all commands; of several processes the last alone is told to stop, in the second step
    for command, *flags in map(str.split, CHAIN):
        rank, count = processes()
        stopping = flags[-1:] == ["stopped.pt"] and rank == count - 1
        result = run(command, Path(sys.argv[1]), *flags, hooks=[("model.Training.log", 2, TERM)] if stopping else [])
        print(f"{result.out}{result.err}\nprocess {rank} exits with {result.code}", flush=True)


@pytest.fixture(scope="module")
def outs(tmp_path_factory):
    """(folder of one process, folder of two, what each printed)."""
    folder, environment = tmp_path_factory.mktemp("parallel"), {**os.environ, "OMP_NUM_THREADS": "1"}
    ways = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
    started, outputs = [], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for name, way in ways.items():
        started.append(subprocess.Popen([sys.executable, *way, __file__, folder / name], **outputs, env=environment))
    printed = [process.communicate(timeout=100)[0] for process in started]
    assert not any(process.returncode for process in started), printed
    return folder / "one", folder / "two", *printed


def parts(path: Path) -> dict:
    """What a file holds, by name: of what made a checkpoint the data's id alone."""
    if path.suffix == ".pt":
        held = content(path)
        return held | held.pop("weights", {}) | {"made": held["made"]["data"]}
    rows = dict(enumerate(log(path))) if path.suffix == ".jsonl" else json.loads(path.read_text())
    return {f"{row} {key}": value for row, record in rows.items() for key, value in record.items()}


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
    assert outs[3].count("stopped after step 2 of 6") == 1 and outs[3].count("exits with 130") == 2
    assert [outs[3].count(f"next: python {name}.py") for name in ("split", "dpo", "ppo", "evaluate")] == [1, 1, 3, 1]
    one, two = (re.findall("(?:test loss|test accuracy|ranks) .*", printed) for printed in outs[2:])
    assert one == two and len(one) == 6
    for out in outs[:2]:
        assert same_weights(out / "dpo.pt", out / "stopped.pt") and log(out / "dpo.jsonl") == log(out / "stopped.jsonl")
        assert not (out / "stopped.state.pt").exists()
