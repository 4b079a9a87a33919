"""What is printed fails no run: not the terminal's characters, and not a reader that goes away."""

import io
import os
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT, log_rows, quick_run, start, succeed, wait_for_rows

import output
from checkpoint import read_checkpoint
from output import SafeStream


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_run_ends_well_on_a_terminal_without_the_samples_characters(encoding, pretrained, tmp_path):
    out = tmp_path / "run"
    environment = {"PYTHONIOENCODING": encoding}
    printed = succeed(*quick_run(pretrained, 2), "--out", out, env=environment)
    assert "the cut model continues:" in printed
    printed = succeed("sample.py", out, "--prompt", "d\u4e2d", "--max-new-tokens", 2, env=environment)
    assert printed.startswith("d")


def test_a_reader_that_goes_away_ends_a_run_as_sigterm_does(pretrained, tmp_path):
    out = tmp_path / "run"
    process = start(*quick_run(pretrained, 100_000), "--eval-every", 1, "--out", out)
    wait_for_rows(process, out, 3)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=600) == 143
    assert "Traceback" not in errors
    assert f"stopped, and saved. To continue: python train.py --resume {out}" in errors
    steps = len(log_rows(out))
    assert 3 <= steps == read_checkpoint(out)[1]["step"]


def test_a_prompts_reader_may_go_away(pretrained, tmp_path):
    out = tmp_path / "run"
    succeed(*quick_run(pretrained, 1), "--out", out)
    process = start("sample.py", out, "--prompt", "doc1", "--max-new-tokens", 2)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=600) == 0


def test_a_program_may_have_no_output_at_all(pretrained, tmp_path):
    command = [sys.executable, ROOT / "train.py", *quick_run(pretrained, 2)[1:], "--out", tmp_path / "run"]
    closed = f"exec {shlex.join(map(str, command))} >&- 2>&-"
    assert subprocess.run(closed, shell=True).returncode == 0
    assert (tmp_path / "run" / "results.json").exists()


def test_a_stream_that_fails_is_noted_and_does_not_fail_its_writer(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    stream = SafeStream(os.fdopen(writing, "w", encoding="ascii"))
    monkeypatch.setattr(output.sys, "stdout", stream)
    assert not output.reader_is_gone()
    print("one line", flush=True)
    assert output.reader_is_gone()
    print("and another", flush=True)
    stream.stream.close()


def test_a_bug_in_printing_is_no_reader_that_goes_away():
    stream = SafeStream(io.StringIO())
    with pytest.raises(TypeError):
        stream.write(3)
