"""experiments/runs.py: the table of runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import SETTINGS, FixedBatches, assert_refused_at_once, run, small_model, training_options

import train
from experiments.runs import differences, row_of, trained_parameters
from files import write_json
from options import parse_options
from presets import GPU, default_options


def train_run(folder: Path, steps=4, **settings):
    """Train a small model on random tokens, and leave its folder as train.py does before the results."""
    options, _ = parse_options(["--device", "cpu", "--depth", "3", "--seed", "1"])
    vars(options).update(vars(training_options(folder, steps=steps)))
    model = small_model(**settings)
    train.train(model, FixedBatches(), FixedBatches(), options, torch.device("cpu"))
    return model


def write_results(folder: Path, loss: float):
    """Write the results of a run with this held-out loss, between 2 of the full and 4 of the cut model."""
    results = {}
    for name, mean in (("full", 2.0), ("cut", 4.0), ("ouroboros", loss)):
        results[name] = {"held-out": [mean - 0.5, mean + 0.5]}
    write_json(folder / "results.json", results)


@pytest.fixture
def runs(tmp_path):
    """A folder with a run that has ended, in 4 steps."""
    train_run(tmp_path / "ended")
    write_results(tmp_path / "ended", 3.0)
    return tmp_path


# ---- A row -----------------------------------------------------------------------------------------------


def test_a_run_that_has_ended_shows_its_loss_and_its_share_of_the_gap(runs):
    _, base, _, steps, held_out, share, _ = row_of(runs / "ended")
    assert base == "tiny on python"
    assert steps == "4 of 4"
    assert held_out == "3.000 ± 0.500"
    assert share == "50.0 ± 0.0%"


def test_a_run_that_has_not_ended_shows_the_newest_held_out_loss_and_its_step(runs):
    run = runs / "ended"
    args = json.loads((run / "args.json").read_text())
    write_json(run / "args.json", {**args, "steps": 9})  # as one that goes on after its end
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    _, _, _, steps, held_out, share, _ = row_of(run)
    assert steps == "4 of 9"
    assert held_out == f"{rows[3]['held_out']:.3f} at 4"
    assert share == ""

    (run / "log.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert row_of(run)[4] == f"{rows[0]['held_out_at_start']:.3f} at 0"


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "nothing trained"])
def test_the_trained_parameters_are_counted_without_bases_and_moments(name, tmp_path):
    model = train_run(tmp_path, steps=1, **SETTINGS[name])
    assert trained_parameters(tmp_path) == sum(p.numel() for p in model.trained_parameters().values())


@pytest.mark.parametrize(
    "switches",
    [
        "",
        "--depth 4 --no-gate --seed 1",
        "--steps 10",  # and with it a shorter warm-up
        "--patch",
        "--depth 2 --patch --distill 0.0 --lr 0.001",
        "--target-offset 2 --pool sequence",
    ],
)
def test_the_options_that_differ_are_those_of_the_command_line(switches):
    options, _ = parse_options(["--device", "cpu", "--save-every", "7", *switches.split()])
    found = differences({**vars(options), "text_hash": "5055eb316d59d206"})
    assert sorted(found.split()) == sorted(switches.split())


@pytest.mark.parametrize("memory", [8_000_000_000, 80_000_000_000])
def test_a_run_of_the_cuda_preset_differs_in_nothing_but_its_own_options(memory):
    """Whether its GPU was small or large: the model stands in a column of its own."""
    gpu = GPU(memory, multiplies_bfloat16=True)
    assert differences(default_options({}, gpu)) == ""
    assert differences({**default_options({}, gpu), "rank": 16}) == "--rank 16"
    assert differences({**default_options({"model": "Qwen/Qwen2.5-0.5B"}, gpu), "rank": 16}) == "--rank 16"


# ---- The program -----------------------------------------------------------------------------------------


def test_what_is_no_run_or_is_damaged_is_named_in_a_line_and_the_runs_are_listed(runs):
    (runs / "foreign").mkdir()
    (runs / "note.txt").write_text("no folder")
    for name, file, content in (
        ("bad-log", "log.jsonl", '{"step": 1'),
        ("bad-options", "args.json", "[]"),
        ("bad-results", "results.json", '{"full": 3}'),
        ("bad-weights", "step-0000004/ouroboros.safetensors", "half"),
    ):
        shutil.copytree(runs / "ended", runs / name)
        (runs / name / file).write_text(content)

    result = run("experiments/runs.py", runs)
    assert result.returncode == 0
    head, *rows = result.stdout.splitlines()
    assert head.split()[0] == "run"
    assert [row.split()[0] for row in rows] == [str(runs / "ended")]
    problems = result.stderr.splitlines()
    assert len(problems) == 5
    for name in ("foreign", "bad-log", "bad-options", "bad-results", "bad-weights"):
        [problem] = [line for line in problems if f"left out: {runs / name}" in line]
        assert "Traceback" not in problem


def test_a_run_can_be_named_itself_and_a_folder_that_is_not_there_is_refused(runs):
    rows = run("experiments/runs.py", runs / "ended").stdout.splitlines()
    assert len(rows) == 2
    assert "--depth 3" in rows[1]
    assert_refused_at_once(run("experiments/runs.py", runs / "nowhere"), "nowhere: no such folder")
