"""train.py as a command: what it learns and leaves behind, its options, and what it refuses."""

import gc
import json
import math
import re
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    TOKENIZER,
    FixedBatches,
    assert_refused,
    assert_refused_at_once,
    log_rows,
    losses,
    make_pretrained,
    quick_run,
    run,
    small_model,
    small_patched,
    succeed,
    table_of,
    training_options,
    write_text,
)
from torch.utils._python_dispatch import TorchDispatchMode

import continuations
import train
from checkpoint import read_checkpoint, step_folder
from data import Batches
from device import pick_dtype
from estimates import mean_loss, paired_difference
from evaluate import EVALUATION_SEED, evaluate
from files import UserError, exit_on_user_error
from hub import load_tokenizer
from options import parse_options
from ouroboros import default_cut
from patch import full_model_of, load_run
from qwen import Config, DecoderLayer
from report import print_skipped_steps, print_text, readable_time
from sources import open_source

# ---- A run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 60 steps: its folder, the model and text it began with, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    pretrained = make_pretrained(folder)
    out = folder / "run"
    command = [*quick_run(pretrained, 60), "--lr", 0.02, "--eval-every", 20, "--out", out]
    printed = succeed(*command)
    return SimpleNamespace(out=out, pretrained=pretrained, command=command, printed=printed)


def test_training_lowers_the_held_out_loss(finished):
    results = json.loads((finished.out / "results.json").read_text())
    gain = paired_difference(results["cut"]["held-out"], results["ouroboros"]["held-out"])
    assert gain.mean > 0.2
    assert gain.error < gain.mean / 5
    assert losses(finished.out)[-1] < losses(finished.out)[0] - 0.2


def test_the_text_is_counted_before_training_and_a_small_one_is_warned_of(finished):
    before_training = finished.printed.split("60 steps")[0]
    for name in ("training text", "held-out text"):
        assert re.search(rf"{name}: [\d,]+ documents, [\d,]+ tokens, [\d,]+ sequences\n", before_training)
    assert re.search(r"warning: held-out text of \d+ sequences is too little", before_training)
    assert "warning: training text" not in before_training


def test_a_short_training_is_announced_in_seconds(finished):
    assert re.search(r"\n60 steps of 1 x 4 x 32 tokens, about [1-9]\d* s\n", finished.printed)
    assert readable_time(0.2) == "1 s"
    assert readable_time(99.4) == "99 s"
    assert readable_time(150) == "2 min"
    assert readable_time(3 * 3600) == "3.0 h"


def test_it_is_said_where_an_evaluation_has_fewer_sequences_than_were_asked_for(tmp_path, capsys):
    source = open_source(str(write_text(tmp_path / "text.txt", 200)))
    training = Batches(source, "train", TOKENIZER, 16)
    held_out = Batches(source, "val", TOKENIZER, 16)
    print_text(source, training, held_out, held_out.count().sequences)
    assert "mean over" not in capsys.readouterr().out
    print_text(source, training, held_out, held_out.count().sequences + 1)
    assert f"mean over its {held_out.count().sequences} sequences" in capsys.readouterr().out


def test_a_link_is_taken_by_its_own_name(tmp_path):
    (tmp_path / "3f78").write_text('{"text": "one"}\n')  # as in the cache of the Hub
    (tmp_path / "train.jsonl").symlink_to("3f78")
    options, _ = parse_options(["--device", "cpu", "--data", str(tmp_path / "train.jsonl")])
    assert Path(options.data).is_absolute()
    assert open_source(options.data).files == [tmp_path / "train.jsonl"]


def test_a_run_ends_with_a_table_and_a_text(finished):
    for part in (
        "full model (6 layers)",
        "cut to 3 layers",
        "ouroboros, depth 2",
        "gap recovered",
        "held-out text",
    ):
        assert part in finished.printed


def test_a_run_ends_with_a_card_beside_its_last_checkpoint_and_says_how_to_share_it(finished):
    last = finished.out / "step-0000060"
    assert finished.printed.endswith(f"hf upload YOU/NAME {last}\n")
    card = (last / "README.md").read_text()
    for line in table_of(finished.printed):
        assert "| " + " | ".join(re.split(r"\s{2,}", line)) + " |" in card


def test_the_log_has_a_row_for_each_step(finished):
    rows = log_rows(finished.out)
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert [row["step"] for row in rows if "held_out" in row] == [20, 40, 60]
    assert [row["step"] for row in rows if "held_out_at_start" in row] == [1]
    assert rows[-1]["lr"] < 1e-4
    results = json.loads((finished.out / "results.json").read_text())
    last = mean_loss(results["ouroboros"]["held-out"])
    assert math.isclose(rows[-1]["held_out"], last.mean, rel_tol=1e-6)
    assert str(last) in finished.printed


def test_a_run_leaves_checkpoints_options_and_a_picture_and_nothing_half_written(finished):
    names = {path.name for path in finished.out.iterdir()}
    expected = {"args.json", "log.jsonl", "results.json", "continuations.json"}
    expected |= {"step-0000000", "step-0000060"}
    if find_spec("matplotlib"):
        expected.add("loss.png")
        assert (finished.out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert names == expected
    assert not list(finished.out.rglob("*.part*"))
    assert json.loads((finished.out / "args.json").read_text())["steps"] == 60


def test_the_first_row_has_the_held_out_loss_of_the_untrained_model_and_a_resumed_run_no_other(tmp_path):
    model = small_model()
    untrained = mean_loss(evaluate(model.loss, FixedBatches(), 2, "cpu")).mean
    arguments = [FixedBatches(), FixedBatches()]
    train.train(model, *arguments, training_options(tmp_path, steps=2), torch.device("cpu"))
    checkpoint = read_checkpoint(tmp_path)
    train.train(model, *arguments, training_options(tmp_path, steps=4), torch.device("cpu"), checkpoint)
    rows = log_rows(tmp_path)
    assert [row.get("held_out_at_start") for row in rows] == [untrained, None, None, None]
    assert rows[1]["held_out"] != untrained


def test_an_evaluation_gives_the_same_table(finished):
    printed = succeed("train.py", "--eval", finished.out)
    assert table_of(printed) == table_of(finished.printed)


def test_an_evaluation_may_take_another_text_and_changes_nothing(finished, tmp_path):
    def everything():
        return {path: path.read_bytes() for path in finished.out.rglob("*") if path.is_file()}

    before = everything()
    (tmp_path / "text").mkdir()
    write_text(tmp_path / "text" / "other.txt", 300)
    printed = succeed("train.py", "--eval", finished.out, "--data", tmp_path / "text")
    assert table_of(printed) != table_of(finished.printed)
    assert everything() == before


def test_an_evaluation_may_take_another_depth_and_changes_nothing(finished):
    def everything():
        return {path: path.read_bytes() for path in finished.out.rglob("*") if path.is_file()}

    before = everything()
    printed = succeed("train.py", "--eval", finished.out, "--depth", 3)
    assert f"the loop takes 3 steps here; {finished.out} was trained with 2" in printed
    assert table_of(printed)[:3] == table_of(finished.printed)[:3]  # the full and the cut model have no loop
    (row,) = (line for line in table_of(printed) if line.startswith("ouroboros, depth 3"))

    options, _ = parse_options(["--eval", str(finished.out), "--depth", "3", "--device", "cpu"])
    device = torch.device("cpu")
    model = load_run(finished.out, dtype=pick_dtype("auto", device))
    tokenizer = load_tokenizer(finished.pretrained)
    source = open_source(options.data)
    held_out = Batches(source, "val", tokenizer, options.seq_len, seed=EVALUATION_SEED)
    losses = evaluate(partial(model.loss, depth=3), held_out, options.eval_sequences, device)
    assert row.endswith(str(mean_loss(losses)))
    assert everything() == before


def test_a_run_ends_with_how_the_three_models_continue_a_held_out_text(finished):
    """They are those that the three models themselves give, at the module's temperature and seed."""
    tokenizer = load_tokenizer(finished.pretrained)
    device = torch.device("cpu")
    options, _ = parse_options(["--eval", str(finished.out), "--device", "cpu"])
    looped = load_run(finished.out, dtype=pick_dtype("auto", device))
    held_out = Batches(open_source(options.data), "val", tokenizer, options.seq_len, seed=EVALUATION_SEED)
    ids, _ = held_out.batch(0, 1)
    prompt = ids[:, : options.seq_len // 2]

    saved = json.loads((finished.out / "continuations.json").read_text())
    assert list(saved) == ["prompt", "full", "cut", "ouroboros"]
    assert saved.pop("prompt") == tokenizer.decode(prompt[0].tolist(), skip_special_tokens=False)
    for name, model in {"full": full_model_of(looped), "cut": looped.cut, "ouroboros": looped}.items():
        torch.manual_seed(continuations.SEED)
        out = model.generate(prompt, continuations.NEW_TOKENS, continuations.TEMPERATURE)
        new = out[0, prompt.shape[1] :]
        assert saved[name] == tokenizer.decode(new.tolist(), skip_special_tokens=False)
        assert f"continues:\n{saved[name]}\n" in finished.printed.replace("\r", "\n")
    assert len(set(saved.values())) == 3


def test_a_trained_run_continues_a_prompt(finished):
    printed = succeed("sample.py", finished.out, "--prompt", "doc1 doc1", "--max-new-tokens", 5)
    assert printed.startswith("doc1 doc1")


@pytest.mark.skipif(not find_spec("matplotlib"), reason="matplotlib is not installed")
def test_the_picture_can_be_drawn_again(finished):
    (finished.out / "loss.png").unlink()
    assert str(finished.out / "loss.png") in succeed("plot.py", finished.out)
    assert (finished.out / "loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(not find_spec("matplotlib"), reason="matplotlib is not installed")
def test_the_picture_of_a_run_that_has_not_ended_can_be_drawn(tmp_path):
    options = training_options(tmp_path, steps=5, eval_every=2)
    train.train(small_model(), FixedBatches(empty=[3]), FixedBatches(), options, torch.device("cpu"))
    assert not (tmp_path / "results.json").exists()
    succeed("plot.py", tmp_path)
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_picture_that_cannot_be_drawn_fails_no_run(pretrained, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no such package')")
    command = [*quick_run(pretrained, 2), "--out", tmp_path / "run"]
    printed = succeed(*command, env={"PYTHONPATH": str(tmp_path)})
    assert "loss.png was not drawn (ImportError: no such package)" in printed
    assert (tmp_path / "run" / "results.json").exists()


def test_nothing_saved_is_overwritten(finished):
    before = (finished.out / "log.jsonl").read_bytes()
    taken = run(*finished.command)
    assert_refused_at_once(taken, "is there already, and nothing saved is overwritten")
    assert (finished.out / "log.jsonl").read_bytes() == before


def test_without_a_working_compiler_it_says_so_in_one_line_and_goes_on(pretrained, tmp_path):
    broken = {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    command = [*quick_run(pretrained, 2), "--compile", "on", "--out", tmp_path / "run"]
    printed = succeed(*command, env=broken)
    assert printed.count("torch.compile does not work here") == 1
    assert "gap recovered" in printed


def layers_alive() -> int:
    """The number of decoder layers with weights in this process."""
    gc.collect()
    return sum(type(thing) is DecoderLayer for thing in gc.get_objects())


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_the_removed_layers_are_out_of_memory_during_training_unless_distillation_needs_them(
    distill, pretrained, tmp_path, monkeypatch
):
    before = layers_alive()
    alive = []

    def look(*arguments):
        alive.append(layers_alive() - before)
        sys.exit()

    monkeypatch.setattr(train, "train", look)
    command = [*quick_run(pretrained, 2), "--distill", distill, "--device", "cpu", "--out", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in command])
    with pytest.raises(SystemExit):
        train.main()

    config = Config.from_pretrained(pretrained)
    prelude, _, coda = default_cut(config.num_hidden_layers)
    kept = prelude + 1 + coda
    assert kept < config.num_hidden_layers
    assert alive == [config.num_hidden_layers if distill else kept]


@pytest.mark.parametrize("switch", ["--activation-checkpointing", "--no-activation-checkpointing"])
def test_the_first_pass_of_the_compiler_recomputes_activations_too(switch, pretrained, tmp_path, monkeypatch):
    kept = []

    def keep(tensor):
        kept.append(tensor.nbytes)
        return tensor

    def look(model, loss_of, batch):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss_of(*batch)
        sys.exit()

    monkeypatch.setattr(train, "compile_blocks", lambda *_: None)
    monkeypatch.setattr(train, "run_compiler", look)
    command = [*quick_run(pretrained, 2), "--compile", "on", switch, "--device", "cpu"]
    command += ["--out", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in command])
    with pytest.raises(SystemExit):
        train.main()
    inputs_of_blocks = 10 * 4 * 32 * 32 * 4  # ten tensors [4, 32, 32] in float32
    assert (sum(kept) < inputs_of_blocks) == (switch == "--activation-checkpointing")


# ---- Steps -----------------------------------------------------------------------------------------------


class Readings(TorchDispatchMode):
    """Counts how often a single number is read from a tensor, for which a GPU has to finish its work."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_step_reads_the_numbers_of_its_log_at_once_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr("fast.check_targets", lambda *_: None)  # reads one on a CPU, and none on CUDA
    counts = []
    for steps in (3, 6):
        options = training_options(tmp_path / str(steps), steps=steps, save_every=100)
        with Readings() as readings:
            train.train(small_model(), FixedBatches(), FixedBatches(), options, torch.device("cpu"))
        counts.append(readings.count)
    assert counts[0] == counts[1]  # tolist(), which reads them at once, is not seen here
    assert counts[0] >= 4  # but the losses of the evaluations are, before the first step and after the last


def test_the_rate_rises_and_then_falls_to_zero_along_a_cosine():
    options = training_options(None, steps=110, warmup=10, lr=0.5)
    rates = [train.learning_rate(step, options) for step in range(111)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[9] == rates[10] == pytest.approx(0.5)
    assert rates[60] == pytest.approx(0.25)
    assert rates[110] == pytest.approx(0.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_step_norm_has_a_rate_of_its_own():
    options = training_options(None, norm_lr_scale=50.0)
    model = small_model()
    parameters = model.trained_parameters()
    optimizer = train.make_optimizer(model, options, torch.device("cpu"))
    scales = {}
    for name, group in zip(parameters, optimizer.param_groups, strict=True):
        assert group["params"] == [parameters[name]]
        scales[name] = group["scale"]
    assert scales.pop("step_norm.weight") == 50.0
    assert set(scales.values()) == {1.0}


def decaying(model) -> set[str]:
    """The trained parameters that AdamW shrinks."""
    optimizer = train.make_optimizer(model, training_options(None), torch.device("cpu"))
    names = set()
    for name, group in zip(model.trained_parameters(), optimizer.param_groups, strict=True):
        if group["weight_decay"] > 0:
            names.add(name)
    return names


def test_only_matrices_decay():
    paper = {
        name for name in small_model().trained_parameters() if name.endswith(".weight") and "norm" not in name
    }
    assert decaying(small_model()) == paper - {"controller.step_embedding.weight"}
    assert "gate.linear.weight" in paper
    assert decaying(small_model(modulation="static")) == {"gate.linear.weight"}

    patched = small_patched()
    assert {"seam_in.P.weight", "coda_adapters.0.A.q_proj.weight"} <= decaying(patched)
    assert not any("norm_change" in name or name == "opening" for name in decaying(patched))


def test_a_step_without_a_number_changes_nothing_and_is_logged(tmp_path):
    options = training_options(tmp_path, steps=5)
    train.train(small_model(), FixedBatches(empty=[3, 4]), FixedBatches(), options, torch.device("cpu"))
    rows = log_rows(tmp_path)
    assert [row["loss"] is None for row in rows] == [False, False, False, True, True]
    assert [row.get("skipped") for row in rows] == [None, None, None, 1, 2]

    before, _ = read_checkpoint(step_folder(tmp_path, 4))
    after, _ = read_checkpoint(step_folder(tmp_path, 5))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_nine_steps_without_a_number_and_nine_more_do_not_end_a_run(tmp_path):
    batches = FixedBatches(empty=[*range(1, 10), *range(11, 20)])
    options = training_options(tmp_path, steps=21, save_every=100)
    assert train.train(small_model(), batches, FixedBatches(), options, torch.device("cpu")) == 0
    skipped = [loss is None for loss in losses(tmp_path)]
    assert skipped == [False, *[True] * 9, False, *[True] * 9, False]


def test_ten_steps_without_a_number_end_the_run_and_a_good_checkpoint_stays(tmp_path):
    batches = FixedBatches(empty=range(5, 15))  # steps 6 to 15, counted from 1
    options = training_options(tmp_path, steps=20)
    advice = "--resume .*/step-0000004 --lr 0.003"
    with pytest.raises(UserError, match=f"ten steps in a row had no finite loss.*{advice}"):
        train.train(small_model(), batches, FixedBatches(), options, torch.device("cpu"))
    left = sorted(path.name for path in tmp_path.glob("step-*"))
    assert left == ["step-0000004", "step-0000014", "step-0000015"]


def test_a_held_out_loss_that_is_not_finite_ends_the_run_with_a_whole_checkpoint(tmp_path):
    options = training_options(tmp_path, steps=20, eval_every=3)
    held_out = FixedBatches(empty=[0])
    with pytest.raises(
        UserError, match="after step 3 the held-out loss is not finite; try --resume .*step-0000001"
    ):
        train.train(small_model(), FixedBatches(), held_out, options, torch.device("cpu"))
    assert log_rows(tmp_path)[0]["held_out_at_start"] is None  # which alone does not end it
    assert log_rows(tmp_path)[-1]["held_out"] is None
    left = sorted(path.name for path in tmp_path.glob("step-*"))
    assert left == ["step-0000001", "step-0000002", "step-0000003"]


def test_the_good_checkpoint_stays_when_a_resumed_run_diverges(pretrained, tmp_path):
    out = tmp_path / "run"
    succeed(*quick_run(pretrained, 21), "--save-every", 3, "--out", out)
    good = read_checkpoint(step_folder(out, 21))
    diverging = run("train.py", "--resume", out, "--steps", 60, "--lr", 1e9)
    advice = f"--resume {step_folder(out, 21)} --lr 3e+08"
    assert_refused(diverging, "finite", advice)
    after = read_checkpoint(step_folder(out, 21))
    assert after[1] == good[1]
    assert torch.equal(after[0]["gate.linear.bias"], good[0]["gate.linear.bias"])

    refused = run("sample.py", out, "--prompt", "doc1", "--temperature", 1)
    assert_refused(refused, "its logits are not finite", "earlier checkpoint")
    printed = succeed("train.py", "--resume", step_folder(out, 21), "--steps", 24, "--lr", 1e-4)
    assert "gap recovered" in printed


def test_a_run_with_a_step_that_was_skipped_says_so_at_its_end(capsys):
    print_skipped_steps([{"step": 1, "loss": 2.0}])
    assert capsys.readouterr().out == ""
    print_skipped_steps([{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}])
    assert "1 of 2 steps had no finite loss and changed no weight" in capsys.readouterr().out


# ---- Options ---------------------------------------------------------------------------------------------


def parsed(*arguments):
    options, checkpoint = parse_options(["--device", "cpu", *arguments])
    assert checkpoint is None
    return options


def test_patch_carries_what_did_best_and_the_command_line_has_the_last_word():
    def chosen(*arguments):
        options = parsed(*arguments)
        return options.depth, options.modulation, options.train_coda, options.lr

    assert chosen() == (8, "controller", "none", 0.002)
    assert chosen("--patch") == (1, "none", "all", 0.006)
    assert (parsed().seam_tokens, parsed().distill, parsed().steps) == (0, 0.0, 1000)
    patch = parsed("--patch")
    assert (patch.seam_tokens, patch.distill, patch.steps, patch.eval_every) == (12_288, 0.5, 500, 100)
    patch = parsed("--patch", "--target-offset", "2")
    assert (patch.distill, patch.steps) == (0.0, 1000)
    others = ["--depth", "4", "--modulation", "static", "--train-coda", "norms", "--lr", "0.1"]
    assert chosen("--patch", *others) == (4, "static", "norms", 0.1)


def test_the_defaults_are_those_of_the_model_at_hand():
    tiny = parsed()
    assert (tiny.model, tiny.data, tiny.steps, tiny.lr, tiny.warmup) == ("tiny", "python", 1000, 0.002, 20)
    folder = parsed("--model", "somewhere")
    assert (folder.data, folder.steps, folder.lr, folder.warmup) == ("python", 60, 0.001, 6)
    assert parsed("--steps", "10").warmup == 5  # never more than half of the steps
    assert parsed("--steps", "10").eval_every == 2


def help_of(capsys, monkeypatch, *arguments) -> dict[str, str]:
    """option -> what --help says of it, as one line."""
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit) as caught:
        parse_options(["--device", "cpu", *arguments, "--help"])
    assert caught.value.code == 0

    entries = {}
    option = None
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  --"):
            option = re.match("  (--[a-z-]+)", line).group(1)
            _, _, text = line.strip().partition("  ")  # two blanks between the option and its sentence
            entries[option] = text.strip()
        elif option and line.startswith(" " * 20):
            entries[option] += " " + line.strip()
        else:
            option = None  # an empty line or a heading
    return {option: text.strip() for option, text in entries.items()}


@pytest.mark.parametrize("arguments", [[], ["--model", "somewhere"], ["--patch"], ["--steps", "10"]], ids=str)
def test_help_names_for_every_option_the_default_that_holds(arguments, capsys, monkeypatch):
    entries = help_of(capsys, monkeypatch, *arguments)
    options = vars(parsed(*arguments))
    del options["device"]  # it is given
    del options["name"]  # it is made of the others
    if "--steps" in arguments:
        del options["steps"]
        del options["warmup"]  # its sentence says that it is at most half of all steps

    named = 0
    for name, value in options.items():
        text = entries.get("--" + name.replace("_", "-"))
        if type(value) is int:
            assert f"Default: {value:,}." in text, name
            named += 1
        elif type(value) in (float, str):
            assert f"Default: {value}." in text, name
            named += 1
    assert named >= 18
    for option in ("--prelude", "--recurrent", "--coda", "--out"):  # these depend on what is not read yet
        assert "Default: " in entries[option]
    assert "Default: " in entries["--activation-checkpointing"]


def test_help_is_for_the_model_at_hand(capsys, monkeypatch):
    tiny = help_of(capsys, monkeypatch)
    folder = help_of(capsys, monkeypatch, "--model", "somewhere")
    assert "Default: 1,000." in tiny["--steps"]
    assert "Default: 60." in folder["--steps"]
    assert "Default: 0.002." in tiny["--lr"]
    assert "Default: 0.001." in folder["--lr"]


def test_help_is_written_in_whole_sentences(capsys, monkeypatch):
    entries = help_of(capsys, monkeypatch)
    assert len(entries) >= 30
    for option, text in entries.items():
        assert text.endswith("."), option
        assert text[0].isupper(), option


def test_help_on_a_saved_run_names_its_own_options(finished, capsys, monkeypatch):
    entries = help_of(capsys, monkeypatch, "--resume", str(finished.out))
    assert "Default: 60." in entries["--steps"]
    assert "Default: 4." in entries["--rank"]
    assert f"Default: {finished.pretrained}." in entries["--model"]


# ---- What is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--depth", "0"], "--depth"),
        (["--depth", "65"], "depth 65"),
        (["--rank", "65"], "rank 65 does not fit"),
        (["--rank", "many"], "--rank"),
        (["--model", "nowhere"], "no such folder"),
        (["--data", "no.txt"], "no such file"),
        (["--prelude", "11"], "is not a cut of"),
        (
            ["--patch", "--prelude", "6"],
            "prelude 6, recurrent 5 (counted from 0), coda 5 is not a cut of 12",
        ),
        (["--device", "tpu"], "--device tpu"),
        (["--device", "cpu:x"], "--device cpu:x: cannot be used"),
        (["--device", "cpu:1"], "the CPU is one device"),
        (["--pool", "max"], "--pool"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "inf"], "--lr"),
        (["--seed", "-1"], "--seed"),
        (["--patch", "--seam-tokens", "-1"], "--seam-tokens"),
        (["--seam-tokens", "1000"], "only with --patch"),
        (["--patch", "--steps", "0", "--seam-tokens", "0"], "--steps"),
        (["--distill", "-0.1"], "--distill"),
        (["--distill", "1.5"], "--distill"),
        (["--distill", "nan"], "--distill"),
        (["--distill", "0.5", "--target-offset", "2"], "--target-offset must be 1"),
        (["--x"], "--x"),
        (["--modulation", "none", "--no-gate", "--no-step-norm"], "nothing is left to train"),
        (["--seq-len", "100000"], "text is too short for one sequence"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    text = write_text(tmp_path / "text.txt", 400)
    assert_main_refuses(["--data", str(text), *arguments], message, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--depth", 65], "depth 65: give a whole number from 1 to 64"),
        (["--rank", 5000], "rank 5000 does not fit this model: its smallest projection allows 1 to 16"),
        (["--rank", 17, "--patch", "--modulation", "static"], "allows 1 to 16"),
        (["--prelude", 5], "is not a cut of 6 layers"),
        (["--seq-len", 100_000], "the training text is too short"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused_before_the_weights_are_read(
    arguments, message, pretrained, empty_cache, tmp_path
):
    (pretrained / "model.safetensors").unlink()
    command = [*quick_run(pretrained, 2), "--out", tmp_path / "run"]
    assert_refused_at_once(run(*command, *arguments), message)
    if arguments[0] != "--seq-len":
        assert not empty_cache.exists()  # nor is anything tokenized
    assert_refused(run(*command), "model.safetensors: no such file")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--eval", "nowhere"], "nowhere: no such run"),
        (["--resume", "nowhere", "--rank", "4"], "nowhere: no such run"),
        (["--resume", "a", "--eval", "b"], "not allowed with"),
    ],
    ids=str,
)
def test_a_run_that_is_not_there_is_one_line_and_exit_code_2(
    arguments, message, tmp_path, monkeypatch, capsys
):
    assert_main_refuses(arguments, message, tmp_path, monkeypatch, capsys)


def assert_main_refuses(arguments: list[str], message: str, tmp_path, monkeypatch, capsys):
    """train.py ends with exit code 2 and one line that has this message, and leaves no run behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(train.main)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error
    assert re.match("(train.py: )?error: ", error)
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("runs/*/*"))


@pytest.mark.parametrize(
    "command",
    [
        ["train.py", "--eval", "nowhere"],
        ["sample.py"],
        ["sample.py", "nowhere", "--prompt", "x"],
        ["plot.py"],
        ["plot.py", "nowhere"],
    ],
    ids=str,
)
def test_every_program_exits_with_code_2_and_one_line(command):
    assert_refused_at_once(run(*command))
