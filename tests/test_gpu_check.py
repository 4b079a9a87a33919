"""experiments/gpu_check.py: the rows that need no GPU, and what becomes of a row that fails."""

import json
import subprocess

import pytest
import torch
from helpers import assert_refused_at_once, run

from experiments import gpu_check
from experiments.contestants import COMPILED, COMPILED_RECOMPUTED, OBVIOUS, OURS, flops_per_token
from experiments.gpu_rows import (
    FAILED,
    MEASURED,
    NOT_RUN,
    OK,
    Setting,
    generation_speed,
    matrix_product,
    needs_a_gpu,
    rows_of,
    step_name,
    summary,
    training_step,
)
from experiments.sizes import SIZES

CPU = Setting(torch.device("cpu"), small=True)


def check(*arguments, env=None) -> subprocess.CompletedProcess:
    return run("experiments/gpu_check.py", "--device", "cpu", "--small", *arguments, env=env)


def verdicts_in(out) -> dict[str, set[str]]:
    """{row: the verdicts of its lines}, from the numbers that a check has left."""
    content = json.loads((out / "gpu_check.json").read_text())
    return {name: {line["verdict"] for line in row["lines"]} for name, row in content["rows"].items()}


def test_every_row_that_needs_no_gpu_passes_on_a_cpu(tmp_path):
    result = check("--out", tmp_path)
    assert result.returncode == 0, result.stdout
    verdicts = verdicts_in(tmp_path)
    for name, row in rows_of(CPU).items():
        if row is needs_a_gpu:
            assert verdicts[name] == {NOT_RUN}, name
        elif row.func is training_step or row.func is generation_speed or row.func is matrix_product:
            assert verdicts[name] <= {MEASURED, NOT_RUN}, name  # without transformers, a row is not run
        else:
            assert OK in verdicts[name], name
            assert verdicts[name] <= {OK, MEASURED}, name
    text = (tmp_path / "gpu_check.md").read_text()
    for line in text.splitlines()[2:]:
        assert line in result.stdout


def test_a_row_that_fails_is_named_and_the_next_one_goes_on(tmp_path):
    no_folder = tmp_path / "file"
    no_folder.write_text("")
    result = check(
        "--rows", "torchrun", "tiny, bases", "--out", tmp_path, env={"XDG_CACHE_HOME": str(no_folder / "x")}
    )
    assert result.returncode == 1
    assert result.stdout.endswith("failed: torchrun\n")
    assert verdicts_in(tmp_path)["torchrun"] == {FAILED}
    assert OK in verdicts_in(tmp_path)["tiny, bases"]
    assert "cannot be written" in (tmp_path / "torchrun.log").read_text()


def test_a_row_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROW_SECONDS", 0.5)
    result = gpu_check.result_of("torchrun", CPU, tmp_path)
    assert gpu_check.has_failed(result)
    assert "not done after 0.5 seconds" in result["lines"][0]["result"]


def test_rows_do_not_begin_after_the_time_is_up(tmp_path):
    result = check("--minutes", "0", "--out", tmp_path)
    assert result.returncode == 0
    assert set().union(*verdicts_in(tmp_path).values()) == {NOT_RUN}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rows", "speed"], "--rows 'speed': no such row; there are "),
        (["--device", "tpu"], "--device tpu: cannot be used"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_in_one_line(arguments, message, tmp_path):
    assert_refused_at_once(check(*arguments, "--out", tmp_path), message)


def test_the_large_models_need_a_gpu(tmp_path):
    result = run("experiments/gpu_check.py", "--device", "cpu", "--out", tmp_path)
    assert_refused_at_once(result, "cpu: only a CUDA GPU runs the large models; add --small")


class LargeGPU(Setting):
    """The setting of a GPU that trains Qwen2.5-3B."""

    models = ["0.5B", "3B"]


@pytest.mark.parametrize(
    "share, times, gigabytes, verdict",
    [(0.46, 2.1, 11.9, OK), (0.44, 2.1, 11.9, FAILED), (0.46, 1.9, 11.9, FAILED), (0.46, 2.1, 12.1, FAILED)],
)
def test_what_is_asked_of_the_papers_model_is_checked(share, times, gigabytes, verdict):
    rate = 1e14
    speed = share * rate / flops_per_token(SIZES["3B"].config)

    def numbers(**content):
        return {"numbers": content}

    results = {
        "matrix product": numbers(rate=rate),
        step_name("3B", OBVIOUS): numbers(**{"tokens/s": speed / times}),
        step_name("3B", OURS): numbers(**{"tokens/s": speed / 1.5, "first loss": 12.0}),
        step_name("3B", COMPILED): numbers(
            **{"tokens/s": speed, "first loss": 12.01, "peak": gigabytes * 1e9}
        ),
        step_name("3B", COMPILED_RECOMPUTED): numbers(**{"tokens/s": speed, "peak": 4.9e9}),
    }
    lines = summary(results, LargeGPU(torch.device("cuda"), small=False))
    found = {line["verdict"] for line in lines}
    assert found == ({OK} if verdict == OK else {OK, FAILED})
    assert sum(line["verdict"] == FAILED for line in lines) == (verdict == FAILED)


def test_a_check_without_any_result_has_an_empty_sum():
    assert summary({}, LargeGPU(torch.device("cuda"), small=False)) == []
