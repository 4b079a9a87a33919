"""The study: its runs, what they leave behind, and that tables and claims are those of the logs."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import ROOT, SMALL, TOKENIZER, FixedBatches, folder_of, small_model, small_qwen

from experiments import measure, pictures
from experiments.claims import FAILS, HOLDS, UNKNOWN, UNSEEN, all_claims, verdict
from experiments.configurations import all_runs
from experiments.measure import (
    compare_bases,
    first_sentence,
    losses_with_swapped_pool,
    mean_cosine,
    overlap,
    sample_losses,
)
from experiments.one_run import measure_baselines, new_model, run_arguments, train_and_measure
from experiments.optimizers import optimizer_of
from experiments.paper_tables import write_all
from experiments.records import CUT, HELD_OUT, VALIDATION, Records, Summary
from experiments.study import Study
from files import UserError
from options import parse_options
from qwen import Qwen

# ---- What is measured ------------------------------------------------------------------------------------


def test_validation_and_test_are_disjoint_and_in_the_order_of_the_evaluation():
    numbers = {}

    class Numbered(FixedBatches):
        def batch(self, first, size, device):
            numbers[sample].append(first)
            return super().batch(first, size, device)

    for sample in ("validation", "test"):
        numbers[sample] = []
        losses = sample_losses(small_model().loss, Numbered(), "cpu", sample)
        assert len(losses) == len(numbers[sample])
    assert numbers == {"validation": list(range(64)), "test": list(range(64, 192))}


@torch.no_grad()
def test_a_swapped_pool_is_that_of_the_other_text_and_of_a_model_without_input_changes_nothing(monkeypatch):
    monkeypatch.setattr(measure, "TEST_SEQUENCES", 2)
    monkeypatch.setitem(measure.SAMPLES, "test", (64, 2))
    model = small_model()
    own = sample_losses(model.loss, FixedBatches(), "cpu")
    swapped = losses_with_swapped_pool(model, FixedBatches(), "cpu")
    assert swapped != own
    assert sample_losses(model.loss, FixedBatches(), "cpu") == own  # the model is as it was

    static = small_model(modulation="static")
    assert losses_with_swapped_pool(static, FixedBatches(), "cpu") == pytest.approx(
        sample_losses(static.loss, FixedBatches(), "cpu"), abs=2e-5
    )

    class SameText(FixedBatches):  # where both texts are the same, so are their pools
        def batch(self, first, size, device):
            ids, targets = super().batch(7, 1, device)
            return ids.repeat(size, 1), targets.repeat(size, 1)

    same = losses_with_swapped_pool(model, SameText(), "cpu")
    assert same == pytest.approx(sample_losses(model.loss, SameText(), "cpu"), abs=2e-5)


def test_the_mean_cosine_leaves_a_text_with_itself_out():
    x = torch.randn(1, 64, 8)
    assert mean_cosine(torch.cat([x, x])) == pytest.approx(1, abs=1e-5)
    assert mean_cosine(torch.cat([x, -x])) == pytest.approx(-1, abs=1e-5)


def test_the_overlap_of_a_space_is_1_with_itself_and_0_with_an_orthogonal_one():
    Q = torch.linalg.qr(torch.randn(8, 8)).Q
    rotation = torch.linalg.qr(torch.randn(3, 3)).Q
    assert overlap(Q[:3], rotation @ Q[:3]) == pytest.approx(1, abs=1e-5)
    assert overlap(Q[:3], Q[3:6]) == pytest.approx(0, abs=1e-5)


def test_r_is_minus_w_where_the_removed_layers_are_zero():
    qwen = small_qwen()
    model = small_model()  # keeps the layers 0, 1, 3, 4, 5
    qwen.layers[3] = model.recurrent
    for projection in qwen.layers[2].projections().values():
        torch.nn.init.zeros_(projection.weight)
    for numbers in compare_bases(model, qwen).values():
        for name in ("cosine", "input overlap", "output overlap"):
            assert numbers[name] == pytest.approx(1, abs=1e-3), name


def test_a_sentence_is_whole_and_of_a_fitting_length():
    text = "the end of one.\nshort\nThis License does not grant permission. And the beginning"
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(first_sentence(TOKENIZER, ids)) == "This License does not grant permission."
    assert first_sentence(TOKENIZER, TOKENIZER.encode("one line without an end").ids) is None


# ---- Runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("central", [False, True])
def test_every_run_has_a_name_and_a_file_of_its_own(central):
    runs = all_runs(central)
    assert len({run.file_name for run in runs.values()}) == len(runs)
    for name, run in runs.items():
        assert name == run.name
        seed = name.rpartition(" seed")[2]
        assert run.options[-2:] == ["--seed", seed]


@pytest.fixture(scope="module")
def small_study(tmp_path_factory):
    """A study of a small random model, of 2 steps and a few evaluation sequences."""
    folder = tmp_path_factory.mktemp("study")
    wide = dict(hidden_size=64, intermediate_size=64, head_dim=16, num_key_value_heads=4)  # for rank 64
    config = replace(SMALL, vocab_size=400, eos_token_id=(0,), **wide)
    model = folder_of(small_qwen(config=config), folder / "model")
    TOKENIZER.save(str(model / "tokenizer.json"))
    text = folder / "text"
    text.mkdir()
    documents = [f"document {n} says that {n} follows {n - 1}.\nAnd then it goes on." for n in range(600)]
    for name in ("train.txt", "val.txt"):
        (text / name).write_text("\n<|endoftext|>\n".join(documents))
    return Study(
        model=str(model),
        data=str(text),
        other=str(text),
        steps=2,
        dtype="float32",
        run_folder=folder / "runs",
        results=folder / "results",
    )


@pytest.mark.parametrize("central", [False, True])
def test_every_run_has_a_model_and_an_optimizer(central, small_study):
    qwen = Qwen.from_pretrained(small_study.model)
    for name, run in all_runs(central).items():
        if name.endswith("seed0"):
            options, _ = parse_options(run_arguments(run, small_study, small_study.run_folder, is_new=True))
            assert options.steps == 2 * run.times_steps
            model = new_model(run, qwen, options)
            assert type(model) is run.model_class
            optimizer_of(model, options, torch.device("cpu"), **run.optimizer)


KINDS = [
    "depth1 controller seed0",
    "depth1 static rate x100 seed1",
    "depth1 mean input seed0",
    "released seed0",
    "full adapted seed0",
    "patch seed0",
    "patch depth4 own adapters seed0",
    "drawn depth seed0",
]


def test_runs_of_every_kind_are_measured_and_their_tables_are_written(small_study, monkeypatch):
    for module in ("measure", "one_run", "study"):
        monkeypatch.setattr(f"experiments.{module}.FIRST_OF_TEST", 2)
        monkeypatch.setattr(f"experiments.{module}.TEST_SEQUENCES", 4)
    monkeypatch.setattr(measure, "STATES_OF", 4)
    monkeypatch.setitem(measure.SAMPLES, "validation", (0, 2))
    monkeypatch.setitem(measure.SAMPLES, "test", (2, 4))
    measure_baselines(small_study)
    for name in KINDS:
        train_and_measure(all_runs(central=False)[name], small_study)

    records = Records(small_study.results)
    for name in KINDS:
        configuration = name.rpartition(" seed")[0]
        assert records.has(configuration), name
        assert [len(losses) for losses in records.values(configuration).values()] == [4]
        assert [len(losses) for losses in records.values(configuration, VALIDATION).values()] == [2]
    assert records.has("depth1 controller", ("swapped",))
    assert records.has("depth1 controller", ("depths", "16"))
    assert records.has("released", ("objective", "held-out t+2"))
    write_all(small_study.results)
    tables = (small_study.results / "tables.md").read_text()
    assert str(records.mean("patch")) in tables
    assert "| drawn depth | oracle | " in tables
    assert (small_study.results / "claims.md").exists()

    # A run that is there is not trained again: measured anew, it has the same losses.
    [path] = small_study.results.glob("patch-seed0.json")
    before = path.read_text()
    path.unlink()
    train_and_measure(all_runs(central=False)["patch seed0"], small_study)
    assert path.read_text() == before


def test_a_run_that_gives_no_numbers_is_recorded_as_diverged(small_study, monkeypatch):
    def train_until_nothing_is_finite(model, batches, held_out, options, *more):
        for step in range(1, 11):
            (options.out / "log.jsonl").open("a").write(json.dumps({"step": step, "loss": None}) + "\n")
        raise UserError("ten steps in a row had no finite loss and gradient")

    monkeypatch.setattr("experiments.one_run.train", train_until_nothing_is_finite)
    run = all_runs(central=False)["depth1 static rate x300 seed0"]
    (small_study.run_folder / run.file_name).mkdir(parents=True)
    train_and_measure(run, small_study)
    result = json.loads(small_study.result_file(run.name).read_text())
    assert result["diverged"]
    assert "loss" not in result


# ---- Numbers and verdicts --------------------------------------------------------------------------------

NOISE = [0.1, -0.1, 0.2, -0.2, 0.3, -0.3, 0.05, -0.05]  # by which sequences differ, with a mean of 0


def made_up_result(name: str, loss: float, **more) -> dict:
    """The JSON of a run with this loss, up to the noise of the sequences."""
    losses = {"validation": [loss + x for x in NOISE], "test": [loss + x for x in NOISE]}
    return {
        "name": name,
        "options": [],
        "parameters": {"controller": 10, "gate": 5},
        "tokens": 100,
        "diverged": False,
        "log": [],
        "loss": {"held-out": losses, "other": losses},
        **more,
    }


@pytest.fixture
def made_up(tmp_path):
    """A function that writes results with known losses and returns their Records.

    {configuration: [loss of each seed]}; full is 2, cut is 4.
    """

    def write(**losses) -> Records:
        models = {}
        for name, loss in (("full", 2.0), ("cut", 4.0), ("unigrams", 6.0), ("bigrams", 5.0)):
            models[name] = made_up_result(name, loss)
        models["bigrams"]["k"] = 10
        content = {"models": models, "inputs": {"prefix": 0.9}, "bases": {}}
        (tmp_path / "baselines.json").write_text(json.dumps(content))
        for name, seeds in losses.items():
            for seed, loss in enumerate(seeds):
                run = f"{name.replace('_', ' ')} seed{seed}"
                path = tmp_path / f"{run.replace(' ', '-')}.json"
                path.write_text(json.dumps(made_up_result(run, loss)))
        return Records(tmp_path)

    return write


def test_a_mean_has_the_error_of_its_sequences_and_the_spread_of_its_seeds(made_up):
    records = made_up(depth1_controller=[3.0, 3.2], depth1_static=[3.5, 3.5])
    number = records.mean("depth1 controller")
    assert number.mean == pytest.approx(3.1)
    deviation = torch.tensor(NOISE).std().item()
    assert number.error == pytest.approx(deviation / len(NOISE) ** 0.5, rel=1e-5)
    assert number.spread == pytest.approx(0.2 / 2**0.5)
    assert number.total_error == pytest.approx((number.error**2 + number.spread**2 / 2) ** 0.5)
    assert records.share("depth1 controller").mean == pytest.approx(0.45)

    difference = records.difference("depth1 controller", "depth1 static")
    assert difference.mean == pytest.approx(-0.4)
    assert difference.error == pytest.approx(0, abs=1e-9)  # the sequences are hard for both alike
    assert difference.spread == pytest.approx(0.2 / 2**0.5)
    assert records.difference("depth1 controller", CUT, HELD_OUT).mean == pytest.approx(-0.9)


def test_one_seed_is_given_the_spread_that_others_have(made_up):
    records = made_up(depth1_controller=[3.0, 3.2], depth1_static=[3.5, 3.5], depth16_controller=[3.1])
    difference = records.difference("depth16 controller", "depth1 controller")
    assert difference.spread is None
    assert difference.assumed_spread == pytest.approx(0.2 / 2**0.5)  # that of the only pair with two seeds
    assert difference.total_error == pytest.approx(difference.assumed_spread)  # the sequences add nothing
    assert records.difference("full", CUT).total_error == pytest.approx(0, abs=1e-9)


def test_a_verdict_needs_more_than_two_errors():
    def number(mean: float) -> Summary:
        return Summary(mean, 0.1, None, 1)

    assert verdict("better", number(-0.21)) == HOLDS
    assert verdict("better", number(-0.19)) == UNSEEN
    assert verdict("better", number(0.21)) == FAILS
    assert verdict("worse", number(0.21)) == HOLDS
    assert verdict("worse", number(-0.21)) == FAILS
    assert verdict("worse", number(0.19)) == UNSEEN
    assert verdict("no better", number(-0.21)) == FAILS
    assert verdict("no better", number(-0.19)) == HOLDS
    assert verdict("better", Summary(-0.21, 0.1, 0.1, 2)) == UNSEEN  # the seeds' error counts, too


def verdicts(records: Records) -> dict:
    return {row.compared: row.verdict for row in all_claims(records)}


def test_claims_follow_from_the_losses(made_up):
    records = made_up(
        depth1_controller=[3.0, 3.01],
        depth1_static=[3.4, 3.41],
        depth1_static_rate_x30=[2.9, 2.91],
        depth1_zero_input=[3.0, 3.01],
        depth4_controller=[2.8, 2.81],
        depth1_no_gate=[4.5, 4.51],
    )
    found = verdicts(records)
    assert found["depth1 controller is better than depth1 static on held-out text"] == HOLDS
    assert found["depth1 controller is better than depth1 static rate x30 on held-out text"] == FAILS
    assert found["depth1 controller is better than depth1 zero input on held-out text"] == UNSEEN
    assert found["depth1 controller is better than depth1 mean input on held-out text"] == UNKNOWN
    assert found["depth1 controller is no better than cut on held-out text"] == FAILS
    assert found["depth4 controller is no better than depth1 controller on held-out text"] == FAILS
    assert found["depth1 no gate is worse than cut on held-out text"] == HOLDS
    spread = "the furthest apart of 2 depths and ranks: depth1 controller and depth4 controller"
    assert found[spread] == FAILS


def test_a_configuration_of_which_a_run_diverged_decides_nothing(made_up, tmp_path):
    made_up(depth1_controller=[3.0, 3.01], depth1_static=[3.4, 3.41])
    path = tmp_path / "depth1-static-seed1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "diverged": True}))
    records = Records(tmp_path)
    assert not records.has("depth1 static")
    assert records.best(["depth1 controller", "depth1 static"]) == "depth1 controller"


# ---- Pictures --------------------------------------------------------------------------------------------


def test_a_ring_marks_the_depths_of_the_training(made_up, tmp_path, monkeypatch):
    made_up(depth4_controller=[3.0], drawn_depth=[3.1])
    for name, best in (("depth4-controller", 4), ("drawn-depth", 1)):
        path = tmp_path / f"{name}-seed0.json"
        losses = {depth: [3.0 + abs(depth - best), 3.0] for depth in (1, 2, 4, 8, 16)}
        losses[16][0] = None  # not finite
        path.write_text(json.dumps({**json.loads(path.read_text()), "depths": losses}))

    figures = {}
    monkeypatch.setattr(pictures, "save_picture", lambda _, name, figure: figures.update({name: figure}))
    pictures.draw_depths(Records(tmp_path), tmp_path)
    [axes] = figures["depth"].axes
    rings = [line for line in axes.lines if line.get_fillstyle() == "none"]
    assert [line.get_xdata()[0] for line in rings] == [4, 1, 2, 4, 8]
    assert rings[0].get_ydata()[0] == 3.0
    texts = [text.get_text() for text in axes.texts]
    for label in ("trained with depth 4", "trained with depth 1, 2, 4, 8", "cut model"):
        assert any(text.endswith(label) for text in texts)
    assert len({line.get_color() for line in rings}) == 2


# ---- The tables in the repository ------------------------------------------------------------------------

RESULTS = ROOT / "experiments" / "results"


@pytest.mark.parametrize("results", sorted(RESULTS.glob("*/")), ids=lambda path: path.name)
def test_the_tables_in_the_repository_are_those_of_the_logs_beside_them(results, tmp_path):
    again = tmp_path / results.name
    shutil.copytree(results, again, ignore=shutil.ignore_patterns("*.md", "*.png", "*.svg"))
    write_all(again)
    for name in ("tables.md", "claims.md"):
        assert (again / name).read_text() == (results / name).read_text()
    assert {path.name for path in again.iterdir()} == {path.name for path in results.iterdir()}
