"""The programs of experiments/, in process and on small random models."""

import importlib.util
import json
from argparse import Namespace

import pytest
import torch
from helpers import TOKENIZER

from experiments import benchmark, heads, lookups, runs, study, variants
from experiments.study import Row
from ouroboros import Ouroboros
from qwen import Qwen, apply_projection, load_tokenizer, rotary_at
from support.files import UserError
from support.run import Run, read_log
from train import make_optimizer

SMALL = "--rank 4 --depth 2 --seq-len 16 --batch-size 2 --device cpu --dtype float32"

# ---- study.py and runs.py --------------------------------------------------------------------------------


@pytest.fixture
def run_study(pretrained, tmp_path, monkeypatch):
    """A function that runs a study of these rows in tmp_path/study and returns its exit code."""

    def run(rows, *more):
        monkeypatch.setattr(study, "ROWS", rows)
        texts = ["--model", str(pretrained), "--data", str(pretrained.with_name("text.txt"))]
        return study.main([*texts, "--sequences", "3", "--out", str(tmp_path / "study"), *more])

    return run


def table_of(folder) -> dict[str, list[str]]:
    """{row: its other cells} of the table of a study."""
    lines = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ") for line in lines]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}


ROWS = [
    Row("base", SMALL),
    Row("mean", SMALL, "base", variants.MeanInput),
    Row("closed-form", f"{SMALL} --patch --steps 0", "base"),
]


def test_a_study_trains_what_is_missing_and_names_a_damaged_run(run_study, tmp_path, capsys, monkeypatch):
    assert run_study(ROWS, "--steps", "2") == 0
    table = table_of(tmp_path / "study")
    assert list(table) == ["row", "base", "mean", "closed-form"]
    assert table["mean"][-1] == "base" and "±" in table["mean"][-2]

    monkeypatch.delattr(study.train, "main")  # nothing is missing
    (tmp_path / "study" / "mean-seed0" / "results.json").write_text('{"full": {"held-out": ["2.0"]}}')
    capsys.readouterr()
    assert run_study(ROWS, "--steps", "2") == 1
    assert "mean-seed0/results.json: is not the results" in capsys.readouterr().out
    changed = table_of(tmp_path / "study")
    assert changed["base"] == table["base"] and changed["mean"][0] == "no numbers"
    with pytest.raises(UserError, match="other options"):
        run_study(ROWS, "--steps", "3")

    (tmp_path / "study" / "base-seed0" / "args.json").unlink()  # no run any more
    runs.main([str(tmp_path / "study"), "--draw"])
    listed = capsys.readouterr()
    assert [line.split()[0][-16:] for line in listed.out.splitlines()[1:]] == ["losed-form-seed0"]
    assert "0 of 0" in listed.out and "mean-seed0/results.json" in listed.err


def test_a_stopped_row_goes_on_and_a_diverged_one_hides_no_other(run_study, tmp_path, monkeypatch):
    rows = [Row("wild", f"{SMALL} --lr 1e9 --modulation static"), Row("base", SMALL)]
    with monkeypatch.context() as stopped:
        stopped.setattr(Run, "wish_to_stop", True)
        assert run_study(rows, "--rows", "base", "--steps", "4") > 128
    assert len(read_log(tmp_path / "study" / "base-seed0")) == 1
    assert run_study(rows, "--steps", "4") == 1
    assert [row["step"] for row in read_log(tmp_path / "study" / "base-seed0")] == [1, 2, 3, 4]
    table = table_of(tmp_path / "study")
    assert table["wild"][0] == "no numbers" and table["base"][0] == "1"
    assert "No numbers: wild-seed0: step" in (tmp_path / "study" / "table.md").read_text()


def test_a_difference_is_paired_by_sequence_and_seed():
    losses = {0: [1.0, 2.0, 4.0], 1: [2.0, 2.0, 6.0], 7: [0.0, 0.0, 0.0]}
    differences = study.paired_differences(losses, {0: [1.0] * 3, 1: [1.0] * 3, 8: [9.0] * 3})
    assert differences == {0: [0.0, 1.0, 3.0], 1: [1.0, 1.0, 5.0]}
    # over the seeds 0.5, 1, 4 with the deviation 1.893 = 1.093 * sqrt(3); the seeds have 4/3 and 7/3
    assert study.summary(differences) == "1.833 ± 1.093 (0.707)"
    assert study.summary({0: [0.0, 1.0, 3.0]}) == "1.333 ± 0.882"


# ---- variants.py -----------------------------------------------------------------------------------------

IDS = torch.arange(48).reshape(2, 24) % 400
NOTHING = dict(modulation="none", gate=False, step_norm=False)
KINDS = {
    variants.MeanInput: {},
    variants.Static100: {"modulation": "static"},
    variants.RandomBases: {},
    variants.OwnBases: {},
    variants.Released: {},
    variants.AdaptedFull: NOTHING,
}


def new_variant(kind, folder):
    torch.manual_seed(0)
    model = kind(Qwen.from_pretrained(folder), rank=4, depth=2, **KINDS.get(kind, {}))
    if kind is variants.MeanInput:
        model.measure(IDS)
    return model


def take_step(model):
    optimizer = make_optimizer(model, Namespace(norm_lr_scale=1.0, lr=0.01))
    model.loss(IDS, IDS.roll(-1, 1)).backward()
    optimizer.step()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_variant_trains_and_is_loaded_as_it_was(kind, pretrained, tmp_path):
    model = new_variant(kind, pretrained)
    before = model(IDS)
    take_step(model)
    model.save(tmp_path)
    with torch.no_grad():
        assert not torch.equal(model(IDS), before)
        assert torch.equal(kind.load(tmp_path)(IDS), model(IDS))
        assert model.generate(IDS[:, :4], 3).shape == (2, 7)


def test_a_blind_controller_sees_no_text(pretrained):
    model = new_variant(variants.MeanInput, pretrained)
    model.controller.heads.weight.data.normal_()
    first, second = (model.diagonals(torch.randn(1, 5, 32), 1)["q_proj"] for _ in range(2))
    assert torch.equal(first, second) and first.abs().sum() > 0


# ---- heads.py ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_weights_of_the_heads_give_the_attention_and_a_removed_head_gives_zero(pretrained):
    model = new_variant(Ouroboros, pretrained)
    layers = {5: model.prelude[0]}
    attention = model.prelude[0].self_attn
    rotary = rotary_at(model.config, 0, 12)
    x = torch.randn(2, 12, 32)
    weights = heads.attention_weights(attention, x, rotary, None, apply_projection)  # [B, H, T, T]
    v = attention.split_heads(attention.v_proj(x))
    v = v.repeat_interleave(weights.shape[1] // v.shape[1], dim=1)
    expected = attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
    inputs = (x, rotary, None, apply_projection)
    assert torch.allclose(attention(*inputs), expected, atol=1e-5)
    with heads.without_heads(layers, [(5, h) for h in range(weights.shape[1])]):
        assert not attention(*inputs).any()
    with heads.without_heads(layers, [(5, 0)]):
        v[:, 0] = 0
        expected = attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
        assert torch.allclose(attention(*inputs), expected, atol=1e-5)


@torch.no_grad()
def test_the_scores_are_those_of_the_token_before_and_of_the_one_that_followed(pretrained, monkeypatch):
    model = Qwen.from_pretrained(pretrained)
    passages = torch.arange(8).reshape(2, 4)
    weights = torch.rand(2, 3, 8, 8)  # of any head; rows are the queries of a passage that is read twice
    monkeypatch.setattr(heads, "attention_weights", lambda *_: weights)
    scores = heads.head_scores(model, {0: model.layers[0]}, passages)
    previous = [weights[:, :, i, i - 1] for i in range(5, 8)]
    assert torch.allclose(scores["previous"][0], torch.stack(previous).mean((0, 1)))
    induction = [weights[:, :, i, i - 3] for i in range(4, 8)]  # i - 4 is the same token, i - 3 what followed
    assert torch.allclose(scores["induction"][0], torch.stack(induction).mean((0, 1)))


# ---- lookups.py ------------------------------------------------------------------------------------------


def test_the_lines_of_a_sequence_answer_its_queries_in_one_step_and_in_two():
    task = lookups.Lookups(load_tokenizer("tiny"), "cpu")
    ids, targets = task.batch(3, torch.Generator().manual_seed(0))
    one_step, two_steps = task.marks.tolist()
    for sequence, answers in zip(ids, targets):
        lines, queries = sequence.split([4 * 3, 3 * 2])
        follower = {a: b for a, b, _ in lines.view(4, 3).tolist()}
        marks, asked = queries.view(3, 2).T.tolist()
        assert sorted(marks) == sorted([one_step, two_steps, two_steps])
        expected = []
        for mark, a in zip(marks, asked):
            expected.append(follower[a] if mark == one_step else follower[follower[a]])
        assert answers[answers != -100].tolist() == expected
        assert answers[13::2].tolist() == expected  # each is asked for at its a


# ---- benchmark.py ----------------------------------------------------------------------------------------


@pytest.fixture
def harness():
    pytest.importorskip("lm_eval")
    from experiments import harness

    return harness


def test_log_probabilities_are_those_of_the_logits(harness, pretrained):
    model = new_variant(Ouroboros, pretrained)
    tokenizer = load_tokenizer(pretrained)
    lm = harness.HarnessModel(model, tokenizer, max_length=10, batch_size=2, depth=3)
    pairs = [([5] * n, [7, n, 9][: 1 + n % 3]) for n in (1, 3, 2, 30)]
    for (context, continuation), (answer, _) in zip(pairs, lm.log_probabilities(pairs)):
        ids = torch.tensor([(context + continuation)[-11:]])  # of a long context, the end
        log_p = model(ids, depth=3)[0, -len(continuation) - 1 : -1].log_softmax(-1)
        expected = sum(log_p[i, token].item() for i, token in enumerate(continuation))
        assert answer == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UserError, match="11 tokens"):
        lm.log_probabilities([([5], [1] * 11)])
    model.norm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        lm.log_probabilities(pairs)


def test_the_benchmark_compares_three_models_on_a_local_task(harness, pretrained, tmp_path, capsys):
    rows = [{"question": f"the copy {n} of", "answer": " it"} for n in range(4)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "last_word",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    }
    (tmp_path / "task.yaml").write_text(json.dumps(task))  # JSON is YAML
    run = tmp_path / "run"
    model = take_step(new_variant(Ouroboros, pretrained))
    model.save(run, step=1, options={"dtype": "float32"})
    arguments = [str(run), "--tasks", "last_word", "--include", str(tmp_path), "--device", "cpu"]
    benchmark.main(arguments)
    scores = json.loads((run / "benchmark.json").read_text())["scores"]
    looped, _ = scores["looped"]["last_word"]["perplexity"]
    lm = harness.HarnessModel(model, TOKENIZER)
    pairs = [lm._encode_pair(row["question"], row["answer"]) for row in rows]
    losses = [-answer for answer, _ in lm.log_probabilities(pairs)]
    assert looped == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-3)
    assert list(scores) == ["full", "cut", "looped"] and f"{looped:,.3f}" in capsys.readouterr().out


def test_a_pool_that_sees_the_answers_and_a_missing_harness_are_refused(pretrained, tmp_path, monkeypatch):
    Ouroboros(Qwen.from_pretrained(pretrained), rank=4, pool="sequence").save(tmp_path)
    arguments = [str(tmp_path), "--tasks", "piqa", "--device", "cpu"]
    if importlib.util.find_spec("lm_eval"):
        with pytest.raises(UserError, match="sees the answers"):
            benchmark.main(arguments)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install lm-eval"):
        benchmark.main(arguments)
