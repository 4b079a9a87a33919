"""What a person can mend is one line and exit code 2; a bug keeps its traceback."""

import errno
import sys
import zlib

import pytest
import torch
from helpers import (
    FixedBatches,
    folder_of,
    quick_run,
    small_model,
    small_qwen,
    tokens,
    training_options,
)

import checkpoint
import documents
import hub
import train
from checkpoint import read_checkpoint, step_folder, write_checkpoint
from data import Batches
from documents import read_documents
from experiments import benchmark
from files import (
    FILE_ERRORS,
    UserError,
    exit_on_user_error,
    explaining,
    is_out_of_memory,
    read_json,
    replace_file,
)
from ouroboros import Ouroboros
from patch import load_run
from processes import is_lost_connection
from qwen import Qwen

# ---- One line --------------------------------------------------------------------------------------------

FILE_PROBLEMS = [
    OSError("the disk is gone"),
    EOFError("ended early"),
    ValueError("no number\nin two lines"),
    KeyError("weight_map"),
    zlib.error("invalid block"),
]


@pytest.mark.parametrize("problem", FILE_PROBLEMS, ids=repr)
def test_what_a_file_raises_is_one_line_with_the_file_and_the_cause(problem):
    with pytest.raises(UserError) as caught, explaining("a/file.json", "read as text", "get it again"):
        raise problem
    message = str(caught.value)
    assert message.startswith("a/file.json: cannot be read as text (")
    assert message.endswith("; get it again")
    assert type(problem).__name__ in message
    assert "\n" not in message
    assert caught.value.__cause__ is problem


@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b"\xff\xfe", b""])
def test_a_file_that_holds_no_json_object_is_one_line(content, tmp_path):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(UserError, match="file.json: cannot be read as a JSON object") as caught:
        read_json(tmp_path / "file.json")
    assert "\n" not in str(caught.value)


def exit_of(action, capsys) -> tuple[int, str]:
    """The exit code and stderr of a program whose main is this action."""
    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(action)
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("name another folder"), "error: name another folder\n"),
        (OSError("the disk\nis gone"), "error: the disk is gone\n"),
        (MemoryError(), "error: out of memory; take a smaller model"),
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 1 GiB"),
            "error: out of memory; take a smaller",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 99 bytes"),
            "error: out of memory; take a",
        ),
    ],
    ids=repr,
)
def test_what_a_person_can_mend_is_one_line_and_exit_code_2(error, line, capsys):
    def main():
        raise error

    code, printed = exit_of(main, capsys)
    assert code == 2
    assert printed.startswith(line)
    assert printed.count("\n") == 1


def test_where_memory_runs_out_a_program_says_which_of_its_options_helps(capsys):
    def main():
        raise MemoryError

    with pytest.raises(SystemExit):
        exit_on_user_error(main, "try a shorter --prompt")
    assert capsys.readouterr().err == "error: out of memory; try a shorter --prompt: MemoryError\n"


def test_ctrl_c_is_one_line_and_exit_code_130(capsys):
    def main():
        raise KeyboardInterrupt

    assert exit_of(main, capsys) == (130, "ended by Ctrl-C\n")


def raising(bug):
    """A function that raises the bug, in the place of one that a student has changed."""

    def function(*arguments, **options):
        raise bug

    return function


# ---- A traceback -----------------------------------------------------------------------------------------

BUGS = [
    TypeError("unsupported operand"),
    AttributeError("no attribute 'gate'"),
    KeyError("gate.linear.bias"),
    ValueError("too many values to unpack"),
    IndexError("list index out of range"),
    AssertionError("a claim"),
    RuntimeError("an illegal memory access was encountered"),
]


@pytest.mark.parametrize("bug", BUGS, ids=repr)
def test_a_bug_passes_through_the_programs_unchanged(bug):
    def main():
        raise bug

    with pytest.raises(type(bug)) as caught:
        exit_on_user_error(main)
    assert caught.value is bug


@pytest.mark.parametrize("bug", [bug for bug in BUGS if not isinstance(bug, FILE_ERRORS)], ids=repr)
def test_what_no_file_raises_keeps_its_traceback_even_while_a_file_is_read(bug):
    with pytest.raises(type(bug)) as caught, explaining("a/file.json", "read as text"):
        raise bug
    assert caught.value is bug


@pytest.mark.parametrize("bug", [TypeError("Tensor is not JSON serializable"), ValueError("a bug")], ids=repr)
def test_a_value_that_cannot_be_written_is_not_taken_for_a_full_disk(bug, tmp_path):
    with pytest.raises(type(bug)) as caught:
        replace_file(tmp_path / "file.txt", raising(bug))
    assert caught.value is bug
    with pytest.raises(TypeError):
        train.append_row(tmp_path / "log.jsonl", {"loss": torch.zeros(1)})
    assert not (tmp_path / "log.jsonl").exists()


def test_a_tensor_that_cannot_be_saved_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(Ouroboros, "saved_tensors", lambda model: {"gate.bias": torch.zeros(2, 3).T})
    with pytest.raises(ValueError, match="non contiguous"):
        small_model().save(tmp_path / "run")


@pytest.mark.parametrize("name", ["LongLine", "text_of_line"])
def test_a_bug_in_reading_a_text_is_not_taken_for_a_damaged_text(name, tmp_path, monkeypatch):
    (tmp_path / "text.jsonl").write_text('{"text": "' + "one " * 200_000 + '"}\n{"text": "two"}\n')
    assert len(list(read_documents(tmp_path / "text.jsonl"))) > 2
    bug = TypeError("a student's own")
    monkeypatch.setattr(documents, name, raising(bug))
    with pytest.raises(TypeError) as caught:
        list(read_documents(tmp_path / "text.jsonl"))
    assert caught.value is bug


def test_a_bug_in_the_checksum_is_not_taken_for_a_damaged_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        write_checkpoint(step_folder(tmp_path, step), {"x": torch.zeros(1)}, {"step": step})
    bug = TypeError("a student's own")
    monkeypatch.setattr(checkpoint, "checksum", raising(bug))
    with pytest.raises(TypeError) as caught:
        read_checkpoint(tmp_path)
    assert caught.value is bug


@pytest.mark.parametrize("called", ["hf_hub_download", "get_hf_file_metadata", "Tokenizer"])
def test_a_bug_beside_the_hub_or_the_tokenizer_is_not_taken_for_theirs(called, pretrained, monkeypatch):
    bug = TypeError("an argument that this version does not know")
    if called == "Tokenizer":
        monkeypatch.setattr(hub.Tokenizer, "from_file", raising(bug), raising=False)
    else:
        monkeypatch.setattr(hub, called, raising(bug))
    with pytest.raises(TypeError) as caught:
        if called == "Tokenizer":
            hub.load_tokenizer(pretrained)
        elif called == "hf_hub_download":
            hub.locate("someone/model", "config.json")
        else:
            hub.size_to_fetch("someone/model", ["config.json"])
    assert caught.value is bug


def test_another_process_that_has_ended_is_told_from_a_bug_in_the_sum():
    lost = "[../gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"
    assert is_lost_connection(RuntimeError(lost))
    assert is_lost_connection(RuntimeError("Timed out waiting 10800000ms for recv operation to complete"))
    assert not is_lost_connection(RuntimeError("Tensors must be contiguous"))
    assert not is_lost_connection(RuntimeError("CUDA out of memory. Tried to open a socket"))


def test_memory_that_has_run_out_is_told_from_other_errors_about_memory():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("MPS backend out of memory"))
    assert is_out_of_memory(RuntimeError("unable to mmap 9 bytes from file <m>: Cannot allocate memory (12)"))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    cublas = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert is_out_of_memory(RuntimeError(cublas))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(TypeError("out of memory"))


class Student(Ouroboros):
    """A changed model whose author has made a mistake, if `bug` is one."""

    bug = None

    def __init__(self, qwen, **settings):
        super().__init__(qwen, **settings)
        if self.bug is not None:
            raise self.bug


@pytest.mark.parametrize("bug", BUGS, ids=repr)
def test_a_bug_in_a_models_init_keeps_its_traceback_when_it_is_loaded(bug, tmp_path, monkeypatch):
    base = folder_of(small_qwen(), tmp_path / "base")
    Student(Qwen.from_pretrained(base), rank=4).save(tmp_path / "run")
    assert torch.isfinite(Student.load(tmp_path / "run")(tokens())).all()

    monkeypatch.setattr(Student, "bug", bug)
    with pytest.raises(type(bug)) as caught:
        Student.load(tmp_path / "run")
    assert caught.value is bug


PLACES = [
    (Ouroboros, "residual_bases"),
    (Ouroboros, "hidden"),
    (Ouroboros, "loop_step"),
    (Ouroboros, "saved_tensors"),
    (Qwen, "hidden"),
    (Batches, "batch"),
    (Batches, "place_of"),
    (train, "learning_rate"),
]


@pytest.mark.parametrize("bug", [BUGS[0], BUGS[3]], ids=repr)
@pytest.mark.parametrize("owner, name", PLACES, ids=str)
def test_a_bug_in_a_changed_function_keeps_its_traceback_in_training(
    owner, name, bug, pretrained, empty_cache, tmp_path, monkeypatch
):
    command = [*quick_run(pretrained, 2), "--device", "cpu", "--out", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in command])
    monkeypatch.setattr(owner, name, raising(bug))
    with pytest.raises(type(bug)) as caught:
        exit_on_user_error(train.main)
    assert caught.value is bug


def test_a_bug_in_a_batch_keeps_its_traceback_in_the_training_loop(tmp_path):
    class Broken(FixedBatches):
        def batch(self, first, size, device):
            return super().batch(first, size, device)[2]

    with pytest.raises(IndexError):
        options = training_options(tmp_path)
        train.train(small_model(), Broken(), FixedBatches(), options, torch.device("cpu"))


def test_a_bug_in_loading_a_run_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch):
    base = folder_of(small_qwen(), tmp_path / "base")
    Ouroboros(Qwen.from_pretrained(base), rank=4).save(tmp_path / "run")
    bug = TypeError("a student's own")
    monkeypatch.setattr(Ouroboros, "load_state_dict", raising(bug))
    with pytest.raises(TypeError) as caught:
        load_run(tmp_path / "run")
    assert caught.value is bug


@pytest.mark.parametrize(
    "arguments, kind", [({"dtype": "float32"}, TypeError), ({"device": "nowhere"}, RuntimeError)], ids=str
)
def test_a_wrong_dtype_or_device_says_what_it_is(arguments, kind, tmp_path):
    base = folder_of(small_qwen(), tmp_path / "base")
    Ouroboros(Qwen.from_pretrained(base), rank=4).save(tmp_path / "run")
    with pytest.raises(kind):
        Ouroboros.load(tmp_path / "run", **arguments)
    with pytest.raises(kind):
        Qwen.from_pretrained(base, **arguments)


def test_the_benchmark_says_how_to_install_what_it_needs(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["benchmark.py", "runs/mine", "--tasks", "piqa"])
    with pytest.raises(UserError, match="pip install lm-eval==0.4.13"):
        benchmark.main()
