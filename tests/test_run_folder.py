"""A run's folder says what it is, and only one program writes in it."""

import json

import pytest
from helpers import assert_refused_at_once, assert_same_end, quick_run, run, start, succeed, wait_for_rows

from files import UserError, write_json
from options import parse_options
from run_folder import append_row, claim_new_folder, read_log

# ---- The name --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, name",
    [
        ([], "tiny-python"),
        (["--depth", "8", "--rank", "32", "--lr", "2e-3"], "tiny-python"),  # these are the defaults
        (["--depth", "4", "--seed", "1"], "tiny-python-depth4-seed1"),
        (["--steps", "10"], "tiny-python-steps10"),
        (["--no-gate", "--no-step-norm"], "tiny-python-no-gate-no-step-norm"),
        (["--patch"], "tiny-python-patch"),
        (["--patch", "--depth", "3", "--train-coda", "lora"], "tiny-python-depth3-patch-train-codalora"),
        (["--device", "cpu", "--save-every", "7", "--eval-every", "3"], "tiny-python"),
        (["--model", "Qwen/Qwen2.5-0.5B", "--data", "my texts.jsonl.gz"], "Qwen2.5-0.5B-my_texts"),
        (["--name", "mine", "--depth", "2"], "mine"),
    ],
)
def test_a_run_is_named_after_its_model_its_text_and_what_differs_from_the_defaults(arguments, name):
    options, _ = parse_options(["--device", "cpu", *arguments])
    assert options.name == name


@pytest.mark.parametrize("name", ["", "..", "a/b", "/tmp/x"])
def test_a_name_that_is_no_name_is_refused(name):
    with pytest.raises(UserError, match="--name .* a folder in runs/"):
        parse_options(["--name", name])


def test_a_name_beside_a_folder_is_refused():
    with pytest.raises(UserError, match="one of the two"):
        parse_options(["--name", "mine", "--out", "there"])


# ---- The claim -------------------------------------------------------------------------------------------


def test_a_run_takes_the_first_name_that_is_neither_used_nor_claimed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    used = tmp_path / "runs" / "mine"
    used.mkdir(parents=True)
    (used / "args.json").write_text("{}")
    assert claim_new_folder(None, "mine").as_posix() == "runs/mine-2"
    assert claim_new_folder(None, "mine").as_posix() == "runs/mine-3"  # the other one is still empty
    assert claim_new_folder(None, "other").as_posix() == "runs/other"


def test_what_a_kill_left_half_written_does_not_use_a_folder(tmp_path):
    part = tmp_path / "run" / "step-0000000" / "ouroboros.123.part.safetensors"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half")
    assert claim_new_folder(tmp_path / "run", "any") == tmp_path / "run"


def test_a_file_is_no_folder_for_a_run(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="file: cannot be made .*choose another --out"):
        claim_new_folder(tmp_path / "file", "any")
    assert (tmp_path / "file").read_text() == "text"


def test_a_run_that_saved_nothing_leaves_no_folder(pretrained, tmp_path):
    command = [*quick_run(pretrained, 3), "--no-gate", "--no-step-norm", "--modulation", "none"]
    assert_refused_at_once(run(*command, cwd=tmp_path), "nothing is left to train")
    assert not (tmp_path / "runs").exists()


def test_two_runs_started_together_have_two_folders(pretrained, tmp_path):
    command = [*quick_run(pretrained, 3), "--name", "same"]
    both = [start(*command, cwd=tmp_path), start(*command, cwd=tmp_path)]
    for process in both:
        _, error = process.communicate(timeout=600)
        assert process.returncode == 0, error
    folders = [tmp_path / "runs" / name for name in ("same", "same-2")]
    assert_same_end(*folders)  # each is whole
    assert sorted((tmp_path / "runs").iterdir()) == folders


def test_a_second_program_in_the_folder_of_a_run_is_refused_before_anything_slow(pretrained, tmp_path):
    alone = tmp_path / "alone"
    out = tmp_path / "run"
    command = quick_run(pretrained, 40)
    succeed(*command, "--out", alone)

    first = start(*command, "--out", out)
    wait_for_rows(first, out, 1)
    first.send_signal(19)  # SIGSTOP: it holds the folder as long as it is there
    second = run(*command, "--out", out)
    resumed = run("train.py", "--resume", out)
    first.send_signal(18)  # SIGCONT
    assert_refused_at_once(second, f"{out}: another program is training in it")
    assert_refused_at_once(resumed, f"{out}: another program is training in it")
    assert second.stdout.count("\n") <= 1  # no model was loaded

    _, error = first.communicate(timeout=600)
    assert first.returncode == 0, error
    assert_same_end(alone, out)
    succeed("train.py", "--resume", out)  # the claim has ended with the program


# ---- The log ---------------------------------------------------------------------------------------------


def test_json_files_are_json(tmp_path):
    with pytest.raises(ValueError):
        append_row(tmp_path, {"step": 1, "loss": float("nan")})
    with pytest.raises(ValueError):
        write_json(tmp_path / "results.json", {"loss": float("inf")})
    assert not (tmp_path / "results.json").exists()
    append_row(tmp_path, {"step": 1, "loss": 0.1})
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 1, "loss": 0.1}


@pytest.mark.parametrize("line", ['{"step": 4', "[]", '{"step": 4}', "4"])
def test_a_damaged_log_is_one_line(line, tmp_path):
    append_row(tmp_path, {"step": 1, "loss": 0.1})
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write(line + "\n")
    with pytest.raises(UserError, match="log.jsonl: cannot be read as a line of JSON for each step"):
        read_log(tmp_path)
