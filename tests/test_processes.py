"""Training by several processes gives what one process gives."""

import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import (
    ROOT,
    FixedBatches,
    losses,
    quick_run,
    relative,
    run,
    small_model,
    start,
    stop_at,
    succeed,
    training_options,
)
from torch import nn

import processes
import train
from checkpoint import read_checkpoint

TORCHRUN = ["torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def torchrun(number: int, *arguments) -> list:
    """The command line that starts a program in so many processes."""
    return [*TORCHRUN, "--nproc-per-node", number, *arguments]


def test_the_shares_of_the_processes_are_all_sequences_once(monkeypatch):
    for world_size in (1, 2, 3, 5, 8):
        monkeypatch.setattr(processes, "WORLD_SIZE", world_size)
        taken = []
        for rank in range(world_size):
            monkeypatch.setattr(processes, "RANK", rank)
            share = list(processes.share_of(8))
            assert len(share) in (8 // world_size, 8 // world_size + 1)
            taken += share
        assert taken == list(range(8))


def train_in_float64(folder: Path):
    """Fifty steps, in which the order of additions counts for nothing."""
    options = training_options(folder, steps=50, lr=1e-3, accumulation=3, save_every=100)
    model = small_model(torch.float64, randomise=False)
    train.train(model, FixedBatches(), FixedBatches(), options, torch.device("cpu"))


def train_one_step(folder: Path):
    """One step in float32, whose moments are a tenth of the gradient."""
    options = training_options(folder, steps=1, lr=1e-3, accumulation=3, save_every=100)
    model = small_model(randomise=False)
    nn.init.normal_(model.controller.heads.weight, std=0.001)  # zero would keep all gradient from the rest
    train.train(model, FixedBatches(), FixedBatches(), options, torch.device("cpu"))


SCRIPT = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import test_processes
test_processes.dist.init_process_group("gloo")
test_processes.train_in_float64(Path(sys.argv[1]) / "long")
test_processes.train_one_step(Path(sys.argv[1]) / "step")
"""


def test_two_processes_are_one(tmp_path):
    assert dist.is_available()
    (tmp_path / "script.py").write_text(SCRIPT)
    succeed(*torchrun(2, tmp_path / "script.py", tmp_path / "two"))
    train_in_float64(tmp_path / "one" / "long")
    train_one_step(tmp_path / "one" / "step")

    one = torch.tensor(losses(tmp_path / "one" / "long"), dtype=torch.float64)
    two = torch.tensor(losses(tmp_path / "two" / "long"), dtype=torch.float64)
    assert (one - two).abs().max() < 1e-12
    assert len(one.unique()) == 50

    first, _ = read_checkpoint(tmp_path / "one" / "step")
    again, _ = read_checkpoint(tmp_path / "two" / "step")
    moments = [name for name in first if name.startswith("exp_avg/")]
    assert len(moments) == len(small_model().trained_parameters())
    for name in moments:
        assert relative(again[name], first[name]) < 1e-6, name


def test_one_process_under_torchrun_connects_and_trains_as_one_without(pretrained, tmp_path):
    program, *options = quick_run(pretrained, 5)
    succeed(program, *options, "--out", tmp_path / "alone")
    succeed(*torchrun(1, ROOT / program, *options, "--out", tmp_path / "one"))
    assert losses(tmp_path / "one") == losses(tmp_path / "alone")

    unreachable = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "none"}
    assert run(program, *options, "--out", tmp_path / "no", env=unreachable).returncode != 0
    del unreachable["MASTER_PORT"]  # another program's variables
    succeed(program, *options, "--out", tmp_path / "yes", env=unreachable)


def test_torchrun_stops_on_sigterm_and_goes_on_with_another_number_of_processes(pretrained, tmp_path):
    one = tmp_path / "one"
    out = tmp_path / "many"
    program, *options = quick_run(pretrained, 100)
    options += ["--dtype", "float32", "--patch", "--modulation", "controller"]
    succeed(program, *options, "--out", one)

    process = start(*torchrun(2, ROOT / program, *options, "--out", out))
    _, printed = stop_at(process, out, 20, signal.SIGTERM)
    # the first process speaks, the other one is silent
    assert printed.count(f"To continue: python train.py --resume {out}") == 1
    assert 20 <= read_checkpoint(out)[1]["step"] == len(losses(out)) < 100

    printed = succeed(*torchrun(3, ROOT / program, "--resume", out))
    assert printed.count("gap recovered") == 1
    assert losses(out) == pytest.approx(losses(one), rel=0, abs=1e-4)


def test_more_processes_than_sequences_are_refused(pretrained, tmp_path):
    program, *options = quick_run(pretrained, 4)
    options += ["--batch-size", 1, "--out", tmp_path / "run"]
    result = run(*torchrun(2, ROOT / program, *options))
    assert result.returncode != 0
    assert (
        "error: a step has 1 sequences for 2 processes; give --batch-size and --accumulation" in result.stderr
    )
    assert not list(tmp_path.glob("run/*"))
