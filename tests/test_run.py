"""A run on disk: stopped, killed, resumed, starved or damaged, it loses nothing and says what to do."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import ROOT, SMALL, TOKENIZER, folder_of, replace, small_qwen, write_text
from safetensors import SafetensorError
from safetensors.torch import save_file
from test_train import assert_same_end, command, losses, newest_step, refusal, resume
from test_train import short_end as short_end  # fixtures that the tests use
from test_train import trained as trained

import evaluate
import sample
import train
from support.files import UserError
from support.machine import Workers, process_number
from support.options import parse_options
from support.run import Run, checkpoints_of, read_log

TRAIN = ROOT / "train.py"
WEIGHTS = "ouroboros.safetensors"


def stop_after(patch: pytest.MonkeyPatch, steps: int):
    """Let the wish to stop come while this step is computed."""
    patch.setattr(Run, "wish_to_stop", property(lambda run: len(read_log(run.folder)) == steps - 1))


def contents(folder: Path) -> dict:
    """path -> content, of all that is below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(pretrained, tmp_path_factory) -> Path:
    """A run of six steps that nobody stopped, with the checkpoints 4 and 6. Tests only read it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train.main(command(pretrained, "--out", run, "--steps", 6, "--save-every", 2))
    return run


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(whole, tmp_path / "a run"))


@pytest.fixture
def killed(run) -> Path:
    """A copy that was killed after six rows were logged and before step 6 was saved."""
    shutil.rmtree(run / "step-0000006")
    (run / "results.json").unlink()
    return run


# ---- Stopped and resumed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", ["", "--patch --depth 2 --modulation static", "--pool sequence"])
def test_a_run_stopped_twice_ends_bit_for_bit_as_one_left_alone(argv, trained, monkeypatch, capsys):
    argv = [*argv.split(), "--steps", 6]
    alone = trained("alone", *argv)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        run = trained("a stopped run", *argv, code=143)
        stop_after(patch, 4)
        assert resume(run) == 143
    assert capsys.readouterr().out.count(f"python train.py --resume '{run}'") == 2
    assert newest_step(run) == len(losses(run)) == 4
    assert not (run / "results.json").exists()
    assert resume(run) == 0
    assert_same_end(run, alone)
    assert (run / "results.json").read_text() == (alone / "results.json").read_text()
    assert resume(run) == 0  # nothing is left to do but to show the results again
    assert capsys.readouterr().out.count("gap recovered") == 2


def signal_in_the_second_step(patch: pytest.MonkeyPatch, *numbers: int):
    """Let these signals come while the second step is computed."""
    for number in numbers:
        if signal.getsignal(number) == signal.SIG_IGN:  # as in the background of a shell
            signal.signal(number, signal.default_int_handler)
    rate = train.learning_rate

    def interrupted(step, options):
        for number in numbers:
            if step == 1:
                os.kill(os.getpid(), number)
        return rate(step, options)

    patch.setattr(train, "learning_rate", interrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_job_that_is_ended_and_a_terminal_that_closes_stop_after_the_step(number, trained, monkeypatch):
    signal_in_the_second_step(monkeypatch, number)
    assert newest_step(trained("run", code=128 + number)) == 2


def test_a_second_ctrl_c_does_not_wait(trained, tmp_path, monkeypatch):
    signal_in_the_second_step(monkeypatch, signal.SIGINT, signal.SIGINT)
    with pytest.raises(SystemExit, match="130"):
        trained("run", "--save-every", 1)
    assert newest_step(tmp_path / "run") == 1


# ---- Real processes --------------------------------------------------------------------------------------


def start(*words) -> subprocess.Popen:
    """Start Python with these words, and read what it prints."""
    line = [sys.executable, *map(str, words)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")


def signal_later(process: subprocess.Popen, run: Path, number: int):
    """Send a signal when the program, which resumes a run, has made some steps. Fails if it ends before."""
    log = run / "log.jsonl"
    before = log.stat().st_ino  # going on replaces the log
    rows = newest_step(run) + 12
    while log.stat().st_ino == before or log.read_text().count("\n") < rows:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
            raise AssertionError(f"the program has ended: {process.communicate()}")
    process.send_signal(number)


def test_a_run_stopped_killed_and_interrupted_ends_as_one_left_alone(trained, pretrained, tmp_path, capsys):
    argv = ["--steps", 150, "--save-every", 7]
    alone, run = trained("alone", *argv), tmp_path / "run"
    process = start(TRAIN, *command(pretrained, "--out", run, *argv, "--eval-every", 1))
    process.stdout.readline()
    process.stdout.close()  # as head -1 does
    errors = process.stderr.read()
    assert process.wait(timeout=300) == 143
    assert "Traceback" not in errors and "BrokenPipe" not in errors
    assert f"stopped, and saved. To continue: python train.py --resume {run}\n" in errors
    assert 0 < newest_step(run) == len(losses(run)) < 10

    process = start(TRAIN, "--resume", run, "--eval-every", 100)
    signal_later(process, run, signal.SIGSTOP)  # it has the folder as long as it is there
    for line in (["--resume", run], command(pretrained, "--out", run)):
        assert f"{run}: another training has it" in refusal(capsys, train.main, *line)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    process = start(TRAIN, "--resume", run)
    signal_later(process, run, signal.SIGINT)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in errors
    assert f"stopped, and saved. To continue: python train.py --resume {run}\n" in printed
    assert 12 < newest_step(run) == len(losses(run)) < 150
    assert resume(run) == 0
    assert_same_end(run, alone)
    assert len(list(run.glob("step-*"))) == 2 and not list(run.rglob("*.part*"))


def test_two_processes_train_as_one_and_one_goes_on_alone(trained, pretrained, tmp_path):
    argv = ["--batch-size", 5, "--seed", 3]  # a share of two sequences and one of three
    torchrun = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    line = command(pretrained, "--out", tmp_path / "two", *argv)
    process = start(*torchrun, "--nproc-per-node", 2, TRAIN, *line)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert printed.count("gap recovered") == 1  # the second process is silent
    resume(tmp_path / "two", "--steps", 6)
    resume(trained("one", *argv), "--steps", 6)
    for one, two in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=0, abs=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    "source, done, out", [("step-0000004", 4, ""), ("step-0000004", 4, "new"), (".", 6, "new")]
)
def test_going_back_begins_a_new_run_and_leaves_the_old_one(source, done, out, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, old = contents(run), losses(run)
    with monkeypatch.context() as patch:
        stop_after(patch, done + 1)
        argv = ["--lr", 0.001, "--steps", 8, *(["--out", out] if out else [])]
        assert resume(run / source, *argv) == 143
    new = tmp_path / (out or "runs/model-text")
    assert resume(new) == 0  # with the new rate
    assert contents(run) == before
    assert losses(new)[: done + 1][:6] == old[: done + 1]  # one more step has the same weights
    assert losses(new)[done + 1 : 6] != old[done + 1 :] or done == 6
    assert len(losses(new)) == 8
    assert max(row["lr"] for row in read_log(new)[done:]) <= 0.001


VARIABLES = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
WRONG = [("RANK", "5"), ("RANK", ""), ("RANK", "-1"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "two")]


def test_variables_of_torchrun_that_cannot_be_are_named(pretrained, tmp_path, monkeypatch, capsys):
    argv = command(pretrained, "--out", tmp_path / "run")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        good = VARIABLES | {"MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in [*WRONG, ("MASTER_PORT", good["MASTER_PORT"])]:
            for variable, text in (good | {name: value}).items():
                monkeypatch.setenv(variable, text)
            assert name in refusal(capsys, train.main, *argv)
    with pytest.raises(UserError, match="LOCAL_RANK ''"):  # of which a GPU's number is made
        process_number("LOCAL_RANK")
    assert list(tmp_path.iterdir()) == []


# ---- The log and the checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", '{"step": 7, "lo'])  # a row that was cut short
def test_rows_after_the_checkpoint_are_logged_once(end, killed, whole):
    with open(killed / "log.jsonl", "a") as log:
        log.write(end)
    resume(killed)
    assert_same_end(killed, whole)


def test_a_damaged_log_is_named_and_without_one_a_run_logs_the_steps_it_makes(killed, capsys):
    log = killed / "log.jsonl"
    for row in ("[]", '{"step": 2}', '{"step": "2", "loss": 1}', "\x00", "4"):
        log.write_text(f"{row}\n")
        assert f"{log}: is not a log" in refusal(capsys, train.main, "--resume", killed)
    log.unlink()
    resume(killed)
    assert [row["step"] for row in read_log(killed)] == [5, 6]


def test_a_half_written_step_does_not_count_and_the_two_newest_whole_ones_are_kept(killed, whole):
    for step in (3, 5, 9):
        folder = killed / f"step-{step:07}"
        folder.mkdir()
        (folder / "ouroboros.123.part.safetensors").write_bytes(b"half")
    (killed / "log.123.part.jsonl").write_text("half")
    resume(killed, "--save-every", 1)
    assert sorted(path.name for path in killed.glob("step-*")) == ["step-0000005", "step-0000006"]
    assert not list(killed.rglob("*.part*"))
    assert_same_end(killed, whole)


def test_a_finished_run_that_goes_on_and_is_stopped_shows_no_results_of_an_earlier_step(run, monkeypatch):
    (run / "loss.png").write_bytes(b"the picture of step 6")
    stop_after(monkeypatch, 7)
    assert resume(run, "--steps", 9) == 143
    assert newest_step(run) == 7
    assert not (run / "results.json").exists() and not (run / "loss.png").exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_read(run, whole, capsys):
    os.truncate(run / "step-0000006" / WEIGHTS, 10_000)
    assert resume(run) == 0
    assert f"{run}/step-0000006/{WEIGHTS}: is not a whole checkpoint" in capsys.readouterr().err
    assert_same_end(run, whole)
    for checkpoint in checkpoints_of(run):
        os.truncate(checkpoint / WEIGHTS, 10_000)
    for main, argv in ((train.main, ["--resume", run]), (evaluate.main, [run]), (sample.main, [run])):
        line = refusal(capsys, main, *argv)
        assert f"{run}/step-0000004/{WEIGHTS}: is not a whole checkpoint" in line


# ---- What may change on the way --------------------------------------------------------------------------

FIXED = """--rank 5, --depth 3, --no-gate, --no-step-norm, --patch, --cut 1 2 1, --modulation none, --seed 1,
--pool sequence, --target-offset 2, --distill 0.5, --seq-len 16, --dtype bfloat16"""


def test_what_would_make_it_another_run_is_refused(whole, capsys):
    before = contents(whole)
    for words in FIXED.split(","):
        line = refusal(capsys, train.main, "--resume", whole, *words.split())
        assert f"{words.split()[0]} cannot change" in line
    line = refusal(capsys, train.main, "--resume", whole, "--batch-size", 4)
    assert "--batch-size times --accumulation must stay 2" in line
    assert "6 are done" in refusal(capsys, train.main, "--resume", whole, "--steps", 5)
    assert contents(whole) == before


def test_what_makes_no_other_run_may_change(killed, whole):
    argv = ["--steps", 8, "--eval-every", 3, "--save-every", 3, "--eval-sequences", 2, "--lr", 0.02]
    argv += ["--batch-size", 1, "--accumulation", 2, "--rank", 4, "--compile", "off", "--device", "cpu"]
    assert resume(killed, *argv) == 0
    rows = read_log(killed)
    assert [row["step"] for row in rows if "held_out" in row] == [6, 8]
    assert losses(killed)[:5] == pytest.approx(losses(whole)[:5], rel=1e-5)
    options, _ = parse_options(["--resume", str(killed)])
    assert (options.steps, options.lr) == (8, 0.02)
    assert rows[4]["lr"] == train.learning_rate(4, options)
    assert [path.name for path in checkpoints_of(killed)] == ["step-0000006", "step-0000008"]
    assert len(json.loads((killed / "results.json").read_text())["full"]["train"]) == 2


def test_base_and_text_may_move_and_their_new_places_are_kept(pretrained, tmp_path, monkeypatch, capsys):
    old, new, run = tmp_path / "old", tmp_path / "new", tmp_path / "run"
    shutil.copytree(pretrained.parent, old)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        train.main(command(old / "model", "--out", run))
    old.rename(new)
    assert f"{old}/text.txt: no such file" in refusal(capsys, train.main, "--resume", run)
    line = refusal(capsys, train.main, "--resume", run, "--data", new / "text.txt")
    assert f"{old}/model: no such folder" in line
    assert f"{old}/model: no such folder" in refusal(capsys, evaluate.main, run)
    monkeypatch.chdir(new)
    assert resume(run, "--model", "model", "--data", "text.txt") == 0
    monkeypatch.chdir(tmp_path)
    assert resume(run, "--steps", 5) == 0
    train.main(command(new / "model", "--out", tmp_path / "alone"))
    assert losses(run)[:4] == losses(tmp_path / "alone")


def test_another_text_or_base_is_refused_and_nothing_changes(whole, tmp_path, capsys):
    before = contents(whole)
    text = write_text(tmp_path / "other.txt", 300)
    assert f"{text}: is not the text of" in refusal(capsys, train.main, "--resume", whole, "--data", text)
    config = replace(SMALL, vocab_size=400, eos_token_id=(0,))
    base = folder_of(small_qwen(seed=7, config=config), tmp_path / "base")
    TOKENIZER.save(str(base / "tokenizer.json"))
    for main, argv in ((train.main, ["--resume", whole]), (evaluate.main, [whole]), (sample.main, [whole])):
        assert f"{base}: is not the model" in refusal(capsys, main, *argv, "--model", base)
    assert contents(whole) == before


def test_a_folder_under_another_name_is_the_same_folder(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(run)
    options, checkpoint = parse_options(["--resume", str(run)])
    with Run(options, Workers(options), checkpoint):
        for name in (run, tmp_path / "link", ".", Path("..", run.name)):
            assert "another training has it" in refusal(capsys, train.main, "--resume", name)
    assert resume(tmp_path / "link", "--steps", 7) == 0
    assert newest_step(run) == 7
    with pytest.raises(UserError, match="another training went on"):  # it starts from step 6, read above
        Run(options, Workers(options), checkpoint).__enter__()
    assert resume(run) == 0


@pytest.mark.parametrize("place", ["evaluate.Evaluation.results", "support.files.save_file"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_a_failure_before_the_first_checkpoint_leaves_nothing(
    error, place, pretrained, tmp_path, monkeypatch
):
    def fail(*_):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(place, fail)
    for out in ([], ["--out", "mine"]):
        with pytest.raises(error):
            train.main(command(pretrained, *out))
        assert list(tmp_path.iterdir()) == []


def test_an_out_with_files_is_refused_but_what_a_kill_left_half_written_is_none(
    trained, pretrained, tmp_path, capsys
):
    out = tmp_path / "out"
    part = out / "step-0000000" / "ouroboros.123.part.safetensors"
    for file in (part, out / "deep" / "mine.txt"):
        file.parent.mkdir(parents=True)
        file.write_text("text")
    before = contents(out)
    assert f"{out}: holds files" in refusal(capsys, train.main, *command(pretrained, "--out", out))
    assert "cannot be written" in refusal(capsys, train.main, *command(pretrained, "--out", part))
    assert contents(out) == before
    (out / "deep" / "mine.txt").unlink()
    trained("out")


# ---- A full disk, and files of others --------------------------------------------------------------------


def half(tensors, path, metadata):
    save_file(tensors, path, metadata)
    os.truncate(path, 1000)
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def no_space(path, mode, **_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "place, fails", [("files.save_file", half), ("files.os.replace", no_space), ("run.open", no_space)]
)
def test_on_a_full_disk_the_old_checkpoint_stays(place, fails, killed, whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(f"support.{place}", fails, raising=False)
        line = refusal(capsys, train.main, "--resume", killed)
    assert "cannot be written" in line and "No space left" in line and "make room" in line
    assert [path.name for path in checkpoints_of(killed)] == ["step-0000004"]
    assert not list(killed.rglob("*.part*"))
    assert resume(killed) == 0
    assert_same_end(killed, whole)
