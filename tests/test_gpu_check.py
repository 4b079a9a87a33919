"""experiments/gpu_check.py: the rows that need no GPU, and what becomes of a row that fails."""

import json
import subprocess

import pytest
import torch
from helpers import assert_refused_at_once, run

from experiments import gpu_check
from experiments.contestants import COMPILED, COMPILED_RECOMPUTED, OBVIOUS, OURS, flops_per_token
from experiments.gpu_check import needs_a_gpu, rows_of
from experiments.gpu_setting import FAILED, MEASURED, NOT_RUN, OK, Setting
from experiments.gpu_speed import (
    FIRST_STEP,
    LEAST_MATRIX_SHARE,
    PEAK,
    PEAK_RECOMPUTED,
    SHARE,
    SPEED,
    step_name,
    summary,
)
from experiments.sizes import SIZES

CPU = Setting(torch.device("cpu"), small=True)


def check(*arguments, env=None) -> subprocess.CompletedProcess:
    return run("experiments/gpu_check.py", "--device", "cpu", "--small", *arguments, env=env)


def verdicts_in(out) -> dict[str, set[str]]:
    """{row: the verdicts of its lines}, from the numbers that a check has left."""
    content = json.loads((out / "gpu_check.json").read_text())
    return {name: {line["verdict"] for line in row["lines"]} for name, row in content["rows"].items()}


def test_a_check_leaves_a_table_and_its_numbers(tmp_path):
    """Of three rows; .ci/run takes all of them."""
    chosen = ["matrix product", "waiting for the GPU", "bases"]
    result = check("--rows", *chosen, "--out", tmp_path)
    assert result.returncode == 0, result.stdout
    assert verdicts_in(tmp_path) == {
        "matrix product": {MEASURED},
        "waiting for the GPU": {NOT_RUN},
        "bases": {OK},
    }
    numbers = json.loads((tmp_path / "gpu_check.json").read_text())["rows"]["matrix product"]["numbers"]
    assert numbers["rate"] > 1e9
    text = (tmp_path / "gpu_check.md").read_text()
    assert text.count("\n") == 2 + 2 + 4  # the machine, the head of the table, the lines
    for line in text.splitlines()[2:]:
        assert line in result.stdout


def test_only_what_needs_a_gpu_is_left_out_on_a_cpu():
    left_out = [name for name, row in rows_of(CPU).items() if row is needs_a_gpu]
    on_cuda = rows_of(Setting(torch.device("cuda"), small=True))
    assert list(on_cuda) == list(rows_of(CPU))
    assert needs_a_gpu not in on_cuda.values()
    assert len(left_out) == 9


def test_a_row_that_fails_is_named_and_the_next_one_goes_on(tmp_path):
    no_folder = tmp_path / "file"
    no_folder.write_text("")
    out = tmp_path / "out"
    result = check("--rows", "torchrun", "bases", "--out", out, env={"XDG_CACHE_HOME": str(no_folder / "x")})
    assert result.returncode == 1
    assert result.stdout.endswith("failed: torchrun\n")
    assert verdicts_in(out)["torchrun"] == {FAILED}
    assert OK in verdicts_in(out)["bases"]
    assert "cannot be written" in (out / "torchrun.log").read_text()


def test_a_row_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROW_SECONDS", 0.5)
    result = gpu_check.result_of("torchrun", CPU, tmp_path)
    assert gpu_check.has_failed(result)
    assert "not done after 0.5 seconds" in result["lines"][0]["result"]


def test_a_row_that_has_no_time_left_has_not_passed(tmp_path):
    result = check("--minutes", "0", "--rows", "matrix product", "--out", tmp_path)
    assert result.returncode == 1
    assert verdicts_in(tmp_path) == {"matrix product": {NOT_RUN}}
    assert result.stdout.endswith("which --minutes gives: matrix product\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rows", "speed"], "--rows 'speed': no such row; there are: precision; "),
        (["--device", "tpu"], "--device tpu: cannot be used"),
        (["--minutes", "-1"], "--minutes -1.0: give a number from 0"),
        (["--minutes", "nan"], "--minutes nan: give a number from 0"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_in_one_line(arguments, message, tmp_path):
    assert_refused_at_once(check(*arguments, "--out", tmp_path), message)


def test_an_earlier_table_is_never_overwritten(tmp_path):
    earlier = tmp_path / "gpu_check.md"
    earlier.write_text("an earlier table")
    result = check("--rows", "bases", "--out", tmp_path)
    assert_refused_at_once(result, f"{tmp_path}: is there already, and nothing saved is overwritten")
    assert earlier.read_text() == "an earlier table"


def test_the_large_models_need_a_gpu(tmp_path):
    result = run("experiments/gpu_check.py", "--out", tmp_path)
    assert_refused_at_once(result, "cpu: only a CUDA GPU runs the large models; add --small")


class LargeGPU(Setting):
    """The setting of a GPU that trains Qwen2.5-3B."""

    models = ["0.5B", "3B"]
    is_large = True


LARGE_GPU = LargeGPU(torch.device("cuda"), small=False)
RATE = 1e14
SPEED_AT_LEAST_SHARE = LEAST_MATRIX_SHARE * RATE / flops_per_token(SIZES["3B"].config)  # tokens/s


def numbers_of_steps(times_the_least: float, times_the_obvious: float, peak: float, recomputed_peak: float):
    """What summary() needs, of steps with these speeds and peaks in bytes."""
    speed = times_the_least * SPEED_AT_LEAST_SHARE
    numbers = {
        "matrix product": {"rate": RATE},
        step_name("3B", OBVIOUS): {"tokens/s": speed / times_the_obvious},
        step_name("3B", OURS): {"tokens/s": speed / 1.5, "first loss": 12.0, "first gradient norm": 1.0},
        step_name("3B", COMPILED): {
            "tokens/s": speed,
            "first loss": 12.001,
            "first gradient norm": 1.01,
            "peak": peak,
        },
        step_name("3B", COMPILED_RECOMPUTED): {"tokens/s": speed, "peak": recomputed_peak},
    }
    return {row: {"numbers": content} for row, content in numbers.items()}


def verdicts_of(results: dict) -> dict[str, str]:
    return {line.what.removeprefix("3B, "): line.verdict for line in summary(results, LARGE_GPU)}


@pytest.mark.parametrize(
    "numbers, failed",
    [
        ((1.01, 2.1, 11.9e9, 4.9e9), None),
        ((0.99, 2.1, 11.9e9, 4.9e9), SHARE),
        ((1.01, 1.9, 11.9e9, 4.9e9), SPEED),
        ((1.01, 2.1, 12.1e9, 4.9e9), PEAK),
        ((1.01, 2.1, 11.9e9, 5.1e9), PEAK_RECOMPUTED),
    ],
)
def test_what_is_asked_of_the_papers_model_is_checked(numbers, failed):
    verdicts = verdicts_of(numbers_of_steps(*numbers))
    assert set(verdicts) == {SHARE, SPEED, FIRST_STEP, PEAK, PEAK_RECOMPUTED}
    for what, verdict in verdicts.items():
        assert verdict == (FAILED if what == failed else OK), what


@pytest.mark.parametrize("change", [{"first loss": 12.1}, {"first gradient norm": 1.1}], ids=str)
def test_a_compiled_step_that_is_another_one_fails(change):
    results = numbers_of_steps(1.01, 2.1, 11.9e9, 4.9e9)
    results[step_name("3B", COMPILED)]["numbers"].update(change)
    assert verdicts_of(results)[FIRST_STEP] == FAILED


def test_what_could_not_be_compared_is_named():
    assert verdicts_of({}) == dict.fromkeys((SHARE, SPEED, FIRST_STEP, PEAK, PEAK_RECOMPUTED), NOT_RUN)
