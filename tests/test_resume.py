"""A run that is stopped, killed, resumed or starved loses nothing and says what to do."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import (
    ROOT,
    FixedBatches,
    assert_refused,
    assert_refused_at_once,
    assert_same_end,
    log_rows,
    losses,
    quick_run,
    release_claims,
    run,
    small_model,
    start,
    stop_at,
    succeed,
    training_options,
    wait_for_rows,
    write_text,
)

import train
from checkpoint import read_checkpoint, write_checkpoint
from estimates import mean_loss
from files import UserError
from options import parse_options

# ---- Stopped and killed ----------------------------------------------------------------------------------


def test_a_run_stopped_and_killed_and_resumed_ends_bit_for_bit_as_the_one_left_alone(pretrained, tmp_path):
    alone = tmp_path / "alone"
    out = tmp_path / "a stopped run"
    command = quick_run(pretrained, 200)
    resume = ["train.py", "--resume", out]
    succeed(*command, "--out", alone)

    code, printed = stop_at(start(*command, "--out", out), out, 21, signal.SIGINT)
    assert code == 130
    assert f"python train.py --resume {shlex.quote(str(out))}\n" in printed
    code, _ = stop_at(start(*resume, "--save-every", 7), out, 50, signal.SIGKILL)
    assert code == -signal.SIGKILL
    code, printed = stop_at(start(*resume), out, 90, signal.SIGHUP)
    assert code == 129
    assert f"--resume {shlex.quote(str(out))}\n" in printed
    code, _ = stop_at(start(*resume), out, 130, signal.SIGINT, signal.SIGINT)
    assert code == 130
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 4')  # a line that a kill cut short
    succeed(*resume)

    assert_same_end(alone, out)
    assert len(list(out.glob("step-*"))) == 2
    assert not list(out.rglob("*.part*"))
    assert "gap recovered" in succeed(*resume)  # nothing is left to do but to show the results again


def test_a_distilled_run_goes_on_with_the_full_model_and_ends_bit_for_bit(pretrained, tmp_path):
    alone = tmp_path / "alone"
    out = tmp_path / "stopped"
    program, *options = quick_run(pretrained, 60)
    options += ["--patch", "--distill", 0.5, "--seam-tokens", 2000]
    succeed(program, *options, "--out", alone)

    stop_at(start(program, *options, "--out", out), out, 11, signal.SIGINT)
    stop_at(start("train.py", "--resume", out, "--save-every", 4), out, 30, signal.SIGKILL)
    with pytest.raises(UserError, match="--distill cannot change"):
        parse_options(["--resume", str(out), "--distill", "0"])
    release_claims()
    succeed("train.py", "--resume", out)
    assert_same_end(alone, out)

    cut = mean_loss(json.loads((alone / "results.json").read_text())["cut"]["held-out"]).mean
    assert losses(alone)[0] < cut - 0.01  # the seams were mended before the first step
    printed = succeed("train.py", "--eval", out)
    assert "gap recovered" in printed


def test_no_step_at_all_is_a_result_where_the_seams_are_fitted(pretrained, tmp_path):
    program, *options = quick_run(pretrained, 0)
    options += ["--patch", "--out", tmp_path / "run"]
    assert "gap recovered" in succeed(program, *options)
    succeed("train.py", "--resume", tmp_path / "run", "--steps", 2)
    assert len(losses(tmp_path / "run")) == 2


def test_a_run_from_before_distillation_goes_on_without_it(pretrained, tmp_path):
    out = tmp_path / "run"
    program, *options = quick_run(pretrained, 2)
    options += ["--patch", "--distill", 0, "--seam-tokens", 0]
    succeed(program, *options, "--out", out)
    tensors, about = read_checkpoint(out)
    for name in ("distill", "seam_tokens"):
        del about["options"][name]
    write_checkpoint(out / "step-0000002", tensors, about)
    succeed("train.py", "--resume", out, "--steps", 3)
    succeed(program, *options, "--out", tmp_path / "other", "--warmup", 1)
    assert losses(out)[:2] == losses(tmp_path / "other")


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path):
    class Interrupting(FixedBatches):
        def batch(self, first, size, device):
            if first == 4:  # in the second step
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            return super().batch(first, size, device)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    options = training_options(tmp_path)
    with pytest.raises(SystemExit) as caught:
        train.train(small_model(), Interrupting(), FixedBatches(), options, torch.device("cpu"))
    assert caught.value.code == 130
    assert len(losses(tmp_path)) == 1
    assert read_checkpoint(tmp_path)[1]["step"] == 1
    # and signals do again what they did before the training
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


class Signalling(FixedBatches):
    """Batches during whose second step a signal arrives."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def batch(self, first, size, device):
        if first == 4:
            os.kill(os.getpid(), self.number)
        return super().batch(first, size, device)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_training_with_a_whole_step_that_is_saved_and_says_so_at_once(
    number, tmp_path, capfd
):
    options = training_options(tmp_path, save_every=100)
    batches = Signalling(number)
    stopped_by = train.train(small_model(), batches, FixedBatches(), options, torch.device("cpu"))
    assert stopped_by == number
    assert len(losses(tmp_path)) == 2
    assert read_checkpoint(tmp_path)[1]["step"] == 2
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_a_signal_that_nohup_has_switched_off_stays_off(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        options = training_options(tmp_path)
        batches = Signalling(signal.SIGHUP)
        assert train.train(small_model(), batches, FixedBatches(), options, torch.device("cpu")) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert read_checkpoint(tmp_path)[1]["step"] == options.steps


def test_before_its_first_checkpoint_a_killed_run_can_be_started_again(pretrained, tmp_path):
    part = tmp_path / "run" / "step-0000000" / "ouroboros.123.part.safetensors"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half")
    refused = run("train.py", "--resume", tmp_path / "run")
    assert_refused_at_once(refused, "no such file")
    succeed(*quick_run(pretrained, 2), "--out", tmp_path / "run")


# ---- What may change on the way --------------------------------------------------------------------------


def test_what_may_change_on_the_way_changes_and_the_rest_is_refused(pretrained, tmp_path):
    out = tmp_path / "run"
    text = tmp_path / "text.txt"
    succeed(*quick_run(pretrained, 6), "--out", out)
    for changed, message in (
        (["--rank", "5"], "--rank cannot change"),
        (["--no-gate"], "--no-gate cannot change: .*run began without it; leave it out"),
        (["--patch"], "--patch cannot change: .*run began without it"),
        (["--prelude", "1"], "--prelude cannot change: .*run began with the default"),
        (["--depth", "3"], "--depth cannot change: .*run began with 2"),
        (["--seed", "1"], "--seed cannot change"),
        (["--batch-size", "2"], "a step of .*run has 4 sequences; give two numbers whose product is 4"),
        (["--steps", "5"], "--steps 5: .*run has done 6 steps already; give 6 or more"),
        (["--out", "x"], "--out cannot change"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            parse_options(["--resume", str(out), *changed])
        assert "\n" not in str(caught.value)
    release_claims()
    refused = run("train.py", "--resume", out, "--rank", 5)
    assert_refused_at_once(refused, "--rank cannot change")

    os.utime(text)  # the text counts, not the time of its file
    changes = ["--steps", 9, "--eval-every", 2, "--batch-size", 2, "--accumulation", 2]
    same = ["--rank", 4, "--model", os.path.relpath(pretrained), "--data", os.path.relpath(text)]
    succeed("train.py", "--resume", out, *changes, *same)
    assert len(losses(out)) == 9
    evaluated = [row["step"] for row in log_rows(out) if "held_out" in row]
    assert evaluated == [1, 2, 3, 4, 5, 6, 8, 9]
    _, about = read_checkpoint(out)
    assert about["options"]["steps"] == 9
    assert about["options"]["batch_size"] == 2

    shutil.copytree(out / "step-0000009", out / "step-0000009-mine")  # what another put there stays
    succeed("train.py", "--resume", out / "step-0000006", "--steps", 8)  # back to the one before
    folders = sorted(path.name for path in out.glob("step*"))
    assert folders == ["step-0000006", "step-0000008", "step-0000009-mine"]
    assert len(losses(out)) == 8

    write_text(text, 399)
    refused = run("train.py", "--resume", out)
    assert_refused(refused, f"{text}: not the text with which {out} began", "give --data with where")


# ---- A disk that is full, a folder that goes, memory that runs out ---------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB, mounted for one test."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", disk]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mount is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid(), reason="needs root to mount a small file system")
def test_on_a_full_or_read_only_disk_the_old_checkpoint_stays_and_the_run_goes_on_later(
    pretrained, small_disk
):
    out = small_disk / "run"
    filler = small_disk / "filler"
    succeed(*quick_run(pretrained, 4), "--out", out)

    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 8192))
    full = run("train.py", "--resume", out, "--steps", 400)
    assert_refused(full, "cannot be written", "make room")
    assert read_checkpoint(out)[1]["step"] == 4

    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    locked = run("train.py", "--resume", out, "--steps", 8)
    assert_refused(locked, "log.jsonl: cannot be written")
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)

    filler.unlink()
    succeed("train.py", "--resume", out, "--steps", 8)
    assert len(losses(out)) == 8
    assert not list(out.rglob("*.part*"))


def test_a_folder_removed_under_a_run_is_one_clear_line(pretrained, tmp_path):
    out = tmp_path / "run"
    process = start(*quick_run(pretrained, 100_000), "--save-every", 100_000, "--out", out)
    wait_for_rows(process, out, 1)
    out.rename(tmp_path / "elsewhere")
    printed, error = process.communicate(timeout=600)
    result = subprocess.CompletedProcess(process.args, process.returncode, printed, error)
    assert_refused(result, "log.jsonl: no such file; make room or bring its folder back")
    assert read_checkpoint(tmp_path / "elsewhere")[1]["step"] == 0


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build's libraries alone may not fit")
def test_out_of_memory_ends_with_the_number_and_what_helps(pretrained, tmp_path):
    program, *options = quick_run(pretrained, 200)
    options += ["--seq-len", 256, "--batch-size", 16384, "--out", tmp_path / "run"]
    command = [sys.executable, ROOT / program, *options, "--device", "cpu"]
    shell = "ulimit -v 4000000; exec " + " ".join(map(str, command))
    result = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=600)
    assert_refused(result, "error: out of memory; try a smaller --batch-size")
    assert re.search(r"\d{6,} bytes", result.stderr.splitlines()[-1])


# ---- A base that was moved -------------------------------------------------------------------------------


def test_a_run_goes_on_with_a_base_that_was_moved_and_not_with_a_changed_one(pretrained, tmp_path):
    succeed(*quick_run(pretrained, 2), "--out", tmp_path / "run")
    moved = pretrained.rename(tmp_path / "moved")
    resume = ["train.py", "--resume", tmp_path / "run", "--steps", 3]
    advice = (
        f"the pretrained model of {tmp_path / 'run'} is not there any more; add --model and where it lies"
    )
    assert_refused_at_once(run(*resume), f"{pretrained}: {advice}")
    sample = ["sample.py", tmp_path / "run", "--prompt", "doc1"]
    assert_refused_at_once(run(*sample), f"{pretrained}: no such folder here", "--model FOLDER")
    succeed(*sample, "--model", moved)
    succeed(*resume, "--model", moved)
    assert read_checkpoint(tmp_path / "run")[1]["step"] == 3

    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rope_theta": 99.0}))
    changed = run("train.py", "--eval", tmp_path / "run")
    assert_refused(changed, "rope_theta in config.json is 99.0, and was 10000.0")


# ---- A text that was moved -------------------------------------------------------------------------------


def test_a_run_goes_on_with_a_text_that_was_moved_and_keeps_its_new_place(pretrained, tmp_path):
    alone = tmp_path / "alone"
    out = tmp_path / "run"
    text = tmp_path / "text.txt"
    succeed(*quick_run(pretrained, 6), "--out", alone)
    command = quick_run(pretrained, 6)
    code, _ = stop_at(start(*command, "--save-every", 1, "--out", out), out, 2, signal.SIGTERM)
    assert code == 143
    step = read_checkpoint(out)[1]["step"]

    moved = text.rename(tmp_path / "moved.txt")
    resume = ["train.py", "--resume", out]
    for option in ("--resume", "--eval"):
        message = f"{text}: the text of {out} is not there any more; add --data and where it lies now"
        with pytest.raises(UserError, match=message):
            parse_options([option, str(out)])
    other = write_text(tmp_path / "other.txt", 399)
    release_claims()
    refused = run(*resume, "--data", other)
    assert_refused(refused, f"{other}: not the text with which {out} began")
    assert read_checkpoint(out)[1]["step"] == step  # refused before any training

    printed = succeed(*resume, "--data", moved)
    assert f"continuing at step {step} of 6" in printed
    assert_same_end(alone, out)
    assert read_checkpoint(out)[1]["options"]["data"] == str(moved)
    succeed(*resume, "--steps", 7)  # the new place is known now
    assert "this is another text" not in succeed("train.py", "--eval", out)
    assert "perplexity" in succeed("train.py", "--eval", out, "--data", other)  # of the whole file
    folder = tmp_path / "folder"
    folder.mkdir()
    other.rename(folder / "other.txt")
    assert "this is another text" in succeed("train.py", "--eval", out, "--data", folder)


def test_a_link_at_the_old_place_of_base_and_text_is_no_change(pretrained, tmp_path):
    out = tmp_path / "run"
    succeed(*quick_run(pretrained, 2), "--out", out)
    for place in (pretrained, tmp_path / "text.txt"):
        place.symlink_to(place.rename(place.with_name(f"moved-{place.name}")))
    succeed("train.py", "--resume", out, "--steps", 3)
    succeed("train.py", "--eval", out)
