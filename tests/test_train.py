"""train.py: options, the loop and its log, what is trained, what is refused. All on a small random model."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
import train
from data import Batches, Tokens, open_text
from ouroboros import Ouroboros
from patch import distillation_loss
from qwen import Qwen, load_tokenizer
from support.files import UserError, read_checkpoint
from support.options import DEFAULTS, PAPER_MODEL, PATCH, SMALL_MODEL, parse_options
from support.run import checkpoints_of, read_log

# ---- What the tests of runs share ------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def short_end(monkeypatch):
    """No picture at the end of a run, and short continuations; test_programs.py tests both."""
    monkeypatch.setattr("support.report.draw_losses", lambda *_: None)
    monkeypatch.setattr("evaluate.Evaluation.NEW_TOKENS", 2)


def command(pretrained: Path, *more) -> list[str]:
    """A command line of train.py for four short steps on what make_pretrained made. Later options win."""
    line = ["--model", pretrained, "--data", pretrained.parent / "text.txt", "--depth", 2, "--rank", 4]
    line += ["--seq-len", 32, "--batch-size", 2, "--accumulation", 1, "--eval-sequences", 4, "--steps", 4]
    line += ["--device", "cpu", "--dtype", "float32", "--lr", 0.01, *more]
    return [str(word) for word in line]


@pytest.fixture
def trained(pretrained, tmp_path):
    """A function that trains in a folder of this name, up to this exit code, and returns the folder."""

    def train_in(name: str, *more, code=0, new_model=None, **values) -> Path:
        line = command(pretrained, "--out", tmp_path / name, *more)
        assert train.main(line, new_model, **values) == code
        return tmp_path / name

    return train_in


def resume(run: Path, *more, new_model=None) -> int:
    """Continue a run by train.py. Returns the exit code."""
    return train.main([str(word) for word in ["--resume", run, *more]], new_model)


def losses(run: Path) -> list[float]:
    """The training loss of each step; the rows of the log are the steps 1, 2, 3 ..."""
    rows = read_log(run)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def newest_step(run: Path) -> int:
    return int(checkpoints_of(run)[-1].name.removeprefix("step-"))


def assert_same_end(one: Path, other: Path):
    """Two runs have the same weights, moments and step, and the same loss at every step, bit for bit."""
    tensors, _ = read_checkpoint(checkpoints_of(one)[-1])
    other_tensors, _ = read_checkpoint(checkpoints_of(other)[-1])
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), name
    assert newest_step(one) == newest_step(other)
    assert losses(one) == losses(other)


def assert_resumes_bit_for_bit(run: Path, new_model=None):
    """A copy of a run, killed before its last checkpoint was written, goes on to the same end."""
    copy = Path(shutil.copytree(run, run.with_name("copy")))
    shutil.rmtree(checkpoints_of(copy)[-1])
    assert 0 < newest_step(copy) < newest_step(run)
    assert resume(copy, new_model=new_model) == 0
    assert_same_end(copy, run)


def refusal(capsys, main, *argv) -> str:
    """The one line with which a program refuses a command line."""
    capsys.readouterr()
    with pytest.raises((UserError, SystemExit)) as caught:
        main([str(word) for word in argv])
    line = str(caught.value)
    if caught.type is SystemExit:  # of argparse
        assert caught.value.code == 2
        line = capsys.readouterr().err.strip()
    assert line and "\n" not in line
    return line


def table_of(printed: str) -> list[str]:
    """The lines of the results table, without the line below it."""
    lines = printed.splitlines()
    last = [i for i, line in enumerate(lines) if line.startswith("gap recovered")][-1]
    return lines[last - 4 : last + 1]


def assert_evaluate_says(table: list[str], printed: str):
    """evaluate.py prints the table of the run, and more columns on its right."""
    for row, line in zip(table, table_of(printed), strict=True):
        assert line.startswith(row)


class Keeping:
    """A new_model for train.main that keeps the model, and what its tensors were at the start."""

    def __call__(self, qwen, options):
        self.model = train.paper_or_patch(qwen, options)
        self.at_start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        return self.model


# ---- The options -----------------------------------------------------------------------------------------


def pretend(patch: pytest.MonkeyPatch, device: str):
    """Let this machine look like one with this device."""
    patch.setattr("support.options.pick_device", lambda name: torch.device(device))
    patch.setattr("support.options.gpu_memory", lambda device: 80e9)
    patch.setattr("support.options.multiplies_bfloat16", lambda device: True)


@pytest.mark.parametrize(
    "column, argv, device, model",
    [(0, [], "cpu", "tiny"), (1, ["--model", SMALL_MODEL], "cpu", SMALL_MODEL), (2, [], "cuda", PAPER_MODEL)],
)
def test_model_and_device_choose_a_column_and_patch_has_values_of_its_own(
    column, argv, device, model, monkeypatch
):
    pretend(monkeypatch, device)
    plain = vars(parse_options(argv)[0])
    assert plain["model"] == model
    assert plain["data"] == ("fineweb-edu" if device == "cuda" else "python")
    assert {name: values[column] for name, values in DEFAULTS.items()}.items() <= plain.items()
    own = PATCH | dict(patch=True, distill=0.5, lr=3 * plain["lr"], steps=plain["steps"] // 2)
    assert vars(parse_options([*argv, "--patch"])[0]) == plain | own


def test_what_is_given_beats_every_default_also_what_has_no_option():
    line = "--patch --depth 3 --modulation static --distill 0 --lr 1 --steps 7"
    options, _ = parse_options(line.split(), warmup=3, cut=[1, 5, 2])
    given = dict(depth=3, modulation="static", distill=0.0, lr=1.0, steps=7, warmup=3, cut=[1, 5, 2])
    assert given.items() <= vars(options).items()
    assert parse_options(["--patch", "--target-offset", "2"])[0].distill == 0


OUT_OF_RANGE = """depth 0, depth 65, depth 1.5, rank 0, cut 1 2, cut 1 1 5, modulation dynamic, pool all,
target-offset 3, distill 1.5, seq-len 0, seq-len 90000, batch-size 0, accumulation 0, steps -1, lr 0, lr nan,
seed -1, device gpu, dtype float16, compile yes, eval-every 0, eval-sequences 0, save-every 0, ranks 4"""
WRONG = {
    "--rank 17": "rank 17: give a whole number from 1 to 16",
    "--modulation none --no-gate --no-step-norm": "--no-gate --no-step-norm leaves nothing to train",
    "--distill 0.5 --target-offset 2": "--target-offset must be 1",
    "--model nowhere": "nowhere: no such folder",
    "--data nowhere.txt": "nowhere.txt: no such file",
    "--resume nowhere": "nowhere: no such folder",
    "--resume .": "ouroboros.safetensors: no such file",
}
WRONG |= {f"--{option}": f"--{option.split()[0]}" for option in re.split(r",\s", OUT_OF_RANGE)}


@pytest.mark.parametrize("argv", WRONG)
def test_a_wrong_option_is_named_and_nothing_written(argv, pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert WRONG[argv] in refusal(capsys, train.main, *command(pretrained, *argv.split()))
    assert list(tmp_path.iterdir()) == []


def test_a_rank_or_cut_that_cannot_be_is_told_before_the_weights_are_read(pretrained, tmp_path, capsys):
    model = shutil.copytree(pretrained, tmp_path / "model")
    (model / "model.safetensors").unlink()
    for wrong, fragment in (("--rank 999", "rank 999"), ("--cut 3 3 3", "--cut"), ("", "no such file")):
        argv = command(pretrained, "--model", model, "--out", tmp_path / "run", *wrong.split())
        assert fragment in refusal(capsys, train.main, *argv)
    assert not (tmp_path / "run").exists()


# ---- The loop and its log --------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", ["", "--patch", "--target-offset 2 --pool sequence", "--modulation static"])
def test_the_table_of_a_run_is_what_results_json_and_evaluate_say(argv, trained, capsys):
    run = trained("run", *argv.split())
    table = table_of(capsys.readouterr().out)
    columns = ["train", "held-out"]
    if "offset" in argv:
        columns += ["train, t+2", "held-out, t+2"]
    results = json.loads((run / "results.json").read_text())
    for name, line in zip(("full", "cut", "ouroboros"), table[1:4], strict=True):
        assert list(results[name]) == [*columns, "copies text", "copies random"]
        for column, values in results[name].items():
            mean = math.fsum(values) / len(values)
            assert len(values) == 4
            assert (f"{mean:.3f} ±" if column in columns else f"{100 * mean:.1f} ±") in line
    assert len({str(values) for values in results.values()}) == 3
    evaluate.main([str(run)])
    assert_evaluate_says(table, capsys.readouterr().out)


def test_the_log_has_a_row_for_each_step_with_the_documented_keys(trained):
    run = trained("run", "--steps", 5, "--eval-every", 2)
    assert len(losses(run)) == 5
    for row in read_log(run):
        keys = {"step", "loss", "grad_norm", "lr", "tokens_per_s"}
        if row["step"] in (2, 4, 5):
            keys |= {"held_out", "copies_text"}
        assert row.keys() == keys
        assert all(value > 0 or key == "copies_text" for key, value in row.items())
    results = json.loads((run / "results.json").read_text())
    assert read_log(run)[-1]["held_out"] == pytest.approx(math.fsum(results["ouroboros"]["held-out"]) / 4)
    assert json.loads((run / "args.json").read_text())["steps"] == 5


def test_the_learning_rate_warms_up_and_a_cosine_takes_it_to_zero(trained):
    options, _ = parse_options(["--steps", "10", "--lr", "2"], warmup=4)
    rates = [train.learning_rate(step, options) for step in range(11)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[7] == pytest.approx(1.0)  # half of the way
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[9] < 0.2 and rates[10] == 0  # after the last step
    options.warmup = 50  # of 10 steps: at most half
    assert train.learning_rate(4, options) == 2.0 > train.learning_rate(3, options)
    rates = [row["lr"] for row in read_log(trained("run", warmup=2))]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.005])


@pytest.mark.parametrize("offset", [1, 2])
def test_the_first_loss_is_that_of_a_new_model_on_tokens_that_far_ahead(offset, trained, pretrained):
    run = trained("run", "--steps", 1, "--seed", 5, "--target-offset", offset)
    tokens = Tokens(open_text(str(pretrained.parent / "text.txt")), "train", load_tokenizer(pretrained))
    torch.manual_seed(5)
    model = Ouroboros(Qwen.from_pretrained(pretrained), depth=2, rank=4)
    expected = model.loss(*Batches(tokens, 32, offset, seed=5).batch(0, 2)).item()
    assert losses(run) == pytest.approx([expected], rel=1e-6)


@pytest.mark.parametrize("argv", [[], ["--patch"]])  # with repeats, not every target counts
def test_accumulation_gives_the_step_of_one_large_batch(argv, trained):
    whole = read_log(trained("4", *argv, "--batch-size", 4))
    for size in (1, 2):
        rows = read_log(trained(str(size), *argv, "--batch-size", size, "--accumulation", 4 // size))
        for row, expected in zip(rows, whole, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("argv", ["", "--patch", "--modulation static --no-gate"])
def test_training_changes_and_saves_every_trained_tensor_and_no_frozen_one(argv, trained):
    keeping = Keeping()
    run = trained("run", *argv.split(), new_model=keeping)
    parameters = keeping.model.trained_parameters()
    for name, tensor in keeping.model.state_dict().items():
        assert torch.equal(tensor, keeping.at_start[name]) == (name not in parameters), name
    saved, about = read_checkpoint(run / "step-0000004")
    assert about["step"] == 4
    assert all(torch.equal(saved[name], p) for name, p in parameters.items())


def test_each_parameter_moves_by_its_rate_and_only_matrices_decay(trained):
    keeping = Keeping()
    trained("run", "--steps", 1, new_model=keeping, norm_lr_scale=3)
    # AdamW's first step is the rate, wherever there is a gradient
    for name, rate in (("gate.linear.bias", 0.01), ("step_norm.weight", 0.03)):
        moved = (keeping.model.state_dict()[name] - keeping.at_start[name]).abs().max().item()
        assert moved == pytest.approx(rate, rel=0.01)
    optimizer = train.make_optimizer(keeping.model, parse_options([])[0])
    names = keeping.model.trained_parameters()
    decays = {name: group["weight_decay"] for name, group in zip(names, optimizer.param_groups, strict=True)}
    matrices = ("gate.linear", *(f"controller.{name}" for name in ("reduce", "join", "narrow", "heads")))
    assert {name for name in decays if decays[name] > 0} == {f"{name}.weight" for name in matrices}


def test_no_step_at_all_has_a_table_where_the_seams_are_fitted(trained, capsys):
    run = trained("run", "--patch", "--steps", 0)
    assert "gap recovered" in capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert results["ouroboros"] != results["cut"]
    assert losses(run) == []
    resume(run, "--steps", 2)
    assert len(losses(run)) == 2


# ---- Variants: another model, another optimizer ----------------------------------------------------------


class HalfOpen(Ouroboros):
    """A variant of a student."""


def half_open(qwen, options):
    model = HalfOpen(qwen, depth=options.depth, rank=options.rank)
    torch.nn.init.zeros_(model.gate.linear.bias)
    return model


def unfreezing(qwen, options):
    """A student's model that trains the final norm and a layer of the coda too."""
    model = train.paper_or_patch(qwen, options)
    model.norm.requires_grad_(True)
    model.coda[0].requires_grad_(True)
    return model


def test_a_variant_is_trained_saved_and_resumed_by_a_function_that_makes_it(trained, capsys):
    run = trained("run", "--save-every", 2, new_model=half_open)
    assert losses(run)[0] != losses(trained("paper"))[0]
    assert_resumes_bit_for_bit(run, half_open)
    assert isinstance(HalfOpen.load(run / "step-0000004"), HalfOpen)
    assert "HalfOpen" in refusal(capsys, evaluate.main, run)


def test_layers_of_the_base_that_are_trained_are_saved_evaluated_and_resumed(trained, capsys):
    run = trained("run", "--save-every", 2, new_model=unfreezing)
    table = table_of(capsys.readouterr().out)
    saved, _ = read_checkpoint(run / "step-0000004")
    assert {"norm.weight", "coda.0.mlp.up_proj.weight", "exp_avg/norm.weight"} <= saved.keys()
    evaluate.main([str(run)])
    assert_evaluate_says(table, capsys.readouterr().out)  # also of the full and the cut model
    assert_resumes_bit_for_bit(run, unfreezing)
    assert table_of(capsys.readouterr().out) == table


def test_the_full_model_teaches_as_it_was_while_layers_that_it_shares_are_trained(trained, monkeypatch):
    teachers = []

    def loss(model, full, *arguments):
        teachers.append(full.norm.weight.clone())
        return distillation_loss(model, full, *arguments)

    monkeypatch.setattr(train, "distillation_loss", loss)
    trained("run", "--patch", new_model=unfreezing)
    assert len(teachers) == 4
    assert all(torch.equal(weight, teachers[0]) for weight in teachers)


def test_the_logged_loss_is_a_mean_over_the_targets_that_count(trained, monkeypatch):
    def three(model, full, weight, ids, targets):
        return 3 + 0 * model.loss(ids, targets)

    monkeypatch.setattr(train, "distillation_loss", three)
    assert losses(trained("run", "--patch", repeats=1.0)) == pytest.approx([3.0] * 4)


def sgd(model, options):
    return torch.optim.SGD(list(model.trained_parameters().values()), lr=options.lr, momentum=0.9)


def test_another_optimizer_is_saved_and_resumed_bit_for_bit(trained, monkeypatch):
    monkeypatch.setattr(train, "make_optimizer", sgd)
    run = trained("run", "--save-every", 2)
    assert "momentum_buffer/gate.linear.weight" in read_checkpoint(run / "step-0000004")[0]
    assert_resumes_bit_for_bit(run)


@pytest.mark.parametrize("steps, good", [(8, 4), (5, 3)])  # of five, the loss after the last one shows it
def test_a_run_that_diverges_names_a_good_checkpoint_from_which_a_new_one_begins(
    steps, good, pretrained, tmp_path, monkeypatch, capsys
):
    run, again, rate = tmp_path / "run", tmp_path / "again", train.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(
            train, "learning_rate", lambda step, options: 1e30 if step == 4 else rate(step, options)
        )
        argv = command(pretrained, "--out", run, "--steps", steps, "--save-every", 1)
        line = refusal(capsys, train.main, *argv)
    good = run / f"step-{good:07}"
    assert good in checkpoints_of(run)
    assert f"--resume {good} --lr 0.003" in line
    before = sorted(run.rglob("*"))
    resume(good, "--lr", 0.003, "--out", again)
    assert len(losses(again)) == steps
    assert sorted(run.rglob("*")) == before
