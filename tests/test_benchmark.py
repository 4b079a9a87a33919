"""lm_eval's view of a model: probabilities and texts as plain torch and lm_eval's own class compute them."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    TOKENIZER,
    greedy_without_cache,
    make_pretrained,
    move_trained_weights,
    small_model,
    succeed,
)

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from experiments import benchmark
from experiments.benchmark import cell, load_tasks, measure
from experiments.harness import HarnessModel
from files import UserError
from hub import load_tokenizer
from ouroboros import Ouroboros
from qwen import Qwen

END = TOKENIZER.token_to_id("<|endoftext|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a small random model with its tokenizer."""
    return make_pretrained(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="module")
def qwen(folder):
    return Qwen.from_pretrained(folder)


def requests_of(kind: str, arguments: list[tuple]) -> list:
    """What lm_eval hands to a model."""
    return [Instance(kind, {}, each, n) for n, each in enumerate(arguments)]


def log_probabilities(model, pairs) -> list:
    return model.loglikelihood(requests_of("loglikelihood", pairs), disable_tqdm=True)


def log_probability(model, prompt: list[int], continuation: list[int], **options) -> float:
    """The log probability of tokens behind others, from the logits of all positions."""
    ids = torch.tensor([prompt + continuation])
    log_p = model(ids, **options)[0, len(prompt) - 1 : -1].log_softmax(-1)
    return sum(log_p[i, token].item() for i, token in enumerate(continuation))


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids


# ---- Tasks in local files --------------------------------------------------------------------------------

METRICS = {
    "multiple_choice": [("acc", "mean"), ("acc_norm", "mean")],
    "loglikelihood": [("perplexity", "perplexity"), ("acc", "mean")],
    "loglikelihood_rolling": [("byte_perplexity", "weighted_perplexity")],
    "generate_until": [("exact_match", "mean")],
}


def write_task(tasks, name: str, rows: list[dict], output_type: str, **config):
    """A task of lm_eval with its data. YAML is read, and JSON is YAML."""
    data = tasks / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = []
    for metric, aggregation in METRICS[output_type]:
        metrics.append({"metric": metric, "aggregation": aggregation, "higher_is_better": True})
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tasks / "cache")},
        "test_split": "test",
        "output_type": output_type,
        "metric_list": metrics,
        **config,
    }
    (tasks / f"{name}.yaml").write_text(json.dumps(task))


WORDS = ["license", "software", "copy", "notice", "warranty", "author", "permission", "use", "sell", "merge"]
QUESTIONS = []
for n in range(12):
    subject = WORDS[n % 10]
    other = WORDS[(n + 3) % 10]
    third = WORDS[(n + 7) % 10]
    QUESTIONS.append(
        {
            "question": f"the {subject} of the {other}" * (1 + n % 3),
            "choices": [third, f"{subject} and {other} or {third}", f"the {other}"],
            "answer": n % 3,
        }
    )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of each kind."""
    tasks = tmp_path_factory.mktemp("tasks")
    write_task(
        tasks,
        "choice",
        QUESTIONS,
        "multiple_choice",
        doc_to_text="{{question}}:",
        doc_to_choice="choices",
        doc_to_target="answer",
    )
    write_task(
        tasks,
        "last_word",
        QUESTIONS,
        "loglikelihood",
        doc_to_text="{{question}}",
        doc_to_target="{{' ' + choices[0]}}",
    )
    texts = [{"page": " ".join(WORDS * (1 + n % 4))} for n in range(5)]
    write_task(tasks, "texts", texts, "loglikelihood_rolling", doc_to_text="", doc_to_target="{{page}}")
    write_task(
        tasks,
        "answers",
        QUESTIONS,
        "generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": ["e", "\n"], "max_gen_toks": 40},
    )
    return tasks


# ---- Probabilities ---------------------------------------------------------------------------------------

PAIRS = [
    ("the software is", " provided"),
    ("the software is ", "provided"),  # the space belongs to the continuation
    ("a copy of this", " license and of the notice, in all copies of it"),
    ("x", " y"),
]


def test_the_probability_of_a_continuation_is_the_product_of_those_of_its_tokens(qwen):
    model = HarnessModel(qwen, TOKENIZER)
    answers = log_probabilities(model, PAIRS)
    for (context, continuation), (answer, _) in zip(PAIRS, answers):
        text = context + continuation
        prompt = encode(context.rstrip())
        assert answer == pytest.approx(log_probability(qwen, prompt, encode(text)[len(prompt) :]), abs=1e-4)


def test_the_padding_of_a_batch_changes_nothing():
    model = small_model(depth=3)
    pairs = [([5] * n, [7, n, 9][: 1 + n % 3]) for n in range(1, 12)]
    alone = HarnessModel(model, TOKENIZER, batch_size=1).log_probabilities(pairs, disable_tqdm=True)
    together = HarnessModel(model, TOKENIZER, batch_size=4).log_probabilities(pairs, disable_tqdm=True)
    for (one, _), (other, _) in zip(alone, together):
        assert one == pytest.approx(other, abs=1e-4)


def test_log_probabilities_are_float32_where_the_model_is_not():
    model = small_model(dtype=torch.bfloat16)
    prompt = [5, 6, 7]
    continuation = list(range(20, 60))
    logits = model(torch.tensor([prompt + continuation]))[0, 2:-1].float()
    expected = -F.cross_entropy(logits, torch.tensor(continuation), reduction="sum").item()
    ((answer, _),) = HarnessModel(model, TOKENIZER).log_probabilities([(prompt, continuation)])
    assert answer == pytest.approx(expected, abs=1e-2)


def test_a_text_without_context_follows_the_end_of_another(qwen):
    model = HarnessModel(qwen, TOKENIZER)
    expected = log_probability(qwen, [END], encode("permission"))
    assert log_probabilities(model, [("", "permission")])[0][0] == pytest.approx(expected, abs=1e-4)
    (rolling,) = model.loglikelihood_rolling(requests_of("loglikelihood_rolling", [("permission",)]))
    assert rolling == pytest.approx(expected, abs=1e-4)


def test_only_a_continuation_of_the_likeliest_tokens_is_greedy(qwen):
    model = HarnessModel(qwen, TOKENIZER)
    prompt = encode("the software")
    likeliest = greedy_without_cache(qwen, torch.tensor([prompt]), 3)[0, len(prompt) :].tolist()
    other = [likeliest[0], (likeliest[1] + 1) % 400, likeliest[2]]
    answers = model.log_probabilities([(prompt, likeliest), (prompt, other)], disable_tqdm=True)
    assert [greedy for _, greedy in answers] == [True, False]


def test_of_a_long_context_the_model_reads_the_end(qwen):
    model = HarnessModel(qwen, TOKENIZER, max_length=10)
    prompt = [n % 400 for n in range(7, 47)]
    continuation = [3, 1, 4]
    ((answer, _),) = model.log_probabilities([(prompt, continuation)], disable_tqdm=True)
    # Ten tokens are read: eight of the prompt, and the continuation but for its last token.
    assert answer == pytest.approx(log_probability(qwen, prompt[-8:], continuation), abs=1e-4)


def test_each_token_of_a_long_text_is_predicted_once(qwen):
    text = " ".join(WORDS[:7])
    tokens = encode(text)
    assert 20 < len(tokens) < 30
    model = HarnessModel(qwen, TOKENIZER, max_length=10)
    first = log_probability(qwen, [END], tokens[:10])
    second = log_probability(qwen, tokens[9:10], tokens[10:20])
    # The last window is as long as the others, and scores what is left.
    third = log_probability(qwen, tokens[len(tokens) - 11 : 20], tokens[20:])
    (answer,) = model.loglikelihood_rolling(requests_of("loglikelihood_rolling", [(text,)]))
    assert answer == pytest.approx(first + second + third, abs=1e-4)


def test_the_depth_of_the_loop_can_be_chosen():
    model = small_model()
    expected = log_probability(model, [5, 6, 7], [8, 9], depth=1)
    answers = []
    for options in ({}, {"depth": 1}):
        lm = HarnessModel(model, TOKENIZER, **options)
        answers += lm.log_probabilities([([5, 6, 7], [8, 9])], disable_tqdm=True)
    assert answers[1][0] == pytest.approx(expected, abs=1e-4)
    assert abs(answers[0][0] - expected) > 1e-2


@pytest.mark.parametrize("continuation", [[], [1] * 11])
def test_a_continuation_that_cannot_be_scored_is_refused(qwen, continuation):
    model = HarnessModel(qwen, TOKENIZER, max_length=10)
    with pytest.raises(UserError, match=f"a continuation of {len(continuation)} tokens"):
        model.log_probabilities([([5], continuation)], disable_tqdm=True)


def test_a_model_without_finite_logits_is_refused():
    model = small_model()
    model.norm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        HarnessModel(model, TOKENIZER).log_probabilities([([5], [6])], disable_tqdm=True)


# ---- Texts -----------------------------------------------------------------------------------------------


def generated(model, context: str, **settings) -> str:
    (text,) = model.generate_until(requests_of("generate_until", [(context, settings)]), disable_tqdm=True)
    return text


def test_a_text_is_the_greedy_one_up_to_the_first_end_string(qwen):
    prompt = encode("the software")
    ids = greedy_without_cache(qwen, torch.tensor([prompt]), 50)[0, len(prompt) :].tolist()
    assert END not in ids
    text = TOKENIZER.decode(ids)
    model = HarnessModel(qwen, TOKENIZER)
    assert generated(model, "the software", max_gen_toks=50, until=[""]) == text  # which ends nothing

    early, late = text[8:11], text[20:22]
    expected = min(text.split(early)[0], text.split(late)[0], key=len)
    assert generated(model, "the software", max_gen_toks=50, until=[late, early, ""]) == expected


def test_a_text_that_the_model_has_ended_is_not_continued(qwen, monkeypatch):
    def ends_at_once(ids, max_new_tokens, temperature):
        calls.append(max_new_tokens)
        return torch.cat([ids, torch.tensor([[45, END]])], dim=1)

    calls = []
    monkeypatch.setattr(qwen, "generate", ends_at_once)
    assert generated(HarnessModel(qwen, TOKENIZER), "the", max_gen_toks=100) == TOKENIZER.decode([45])
    assert len(calls) == 1


def test_a_context_leaves_room_for_the_text(qwen):
    def continued(prompt: list[int]) -> str:
        ids = greedy_without_cache(qwen, torch.tensor([prompt]), 40)
        return TOKENIZER.decode(ids[0, len(prompt) :].tolist())

    context = " ".join(WORDS)
    tokens = encode(context)
    assert continued(tokens) != continued(tokens[-5:])
    model = HarnessModel(qwen, TOKENIZER, max_length=45)
    assert generated(model, context, max_gen_toks=40) == continued(tokens[-5:])
    with pytest.raises(UserError, match="--max-length 45"):
        generated(model, context, max_gen_toks=45)


def test_a_way_of_generating_that_is_not_known_is_refused(qwen):
    with pytest.raises(UserError, match="top_p"):
        generated(HarnessModel(qwen, TOKENIZER), "the", max_gen_toks=4, do_sample=True, top_p=0.5)


# ---- Scores ----------------------------------------------------------------------------------------------


def test_the_scores_of_a_task_are_those_of_plain_torch(qwen, tasks):
    """The choice with the largest log probability, and with the largest one for each of its bytes."""
    right = []
    right_by_length = []
    for row in QUESTIONS:
        prompt = encode(row["question"] + ":")
        scores = []
        for choice in row["choices"]:
            whole = encode(f"{row['question']}: {choice}")
            scores.append(log_probability(qwen, prompt, whole[len(prompt) :]))
        lengths = [len(choice) for choice in row["choices"]]
        scores = torch.tensor(scores)
        right.append(int(scores.argmax() == row["answer"]))
        right_by_length.append(int((scores / torch.tensor(lengths)).argmax() == row["answer"]))
    assert right != right_by_length

    scores = measure(HarnessModel(qwen, TOKENIZER), load_tasks(["choice"], tasks))["choice"]
    for metric, expected in [("acc", right), ("acc_norm", right_by_length)]:
        expected = torch.tensor(expected, dtype=torch.float64)
        assert scores[metric]["value"] == pytest.approx(expected.mean().item())
        assert scores[metric]["stderr"] == pytest.approx(expected.std().item() / len(expected) ** 0.5)


def test_log_probabilities_and_texts_are_those_of_lm_eval_itself(folder, tasks):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # lm_eval's class needs it
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    settings = dict(max_length=45, batch_size=2)  # shorter than some texts
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = HFLM(pretrained=reference, tokenizer=tokenizer, **settings)
    ours = HarnessModel(Qwen.from_pretrained(folder), load_tokenizer(folder), **settings)

    loaded = load_tasks(["choice", "last_word", "texts", "answers"], tasks)
    measure(ours, loaded)  # makes the tasks ready
    answers = []
    for model in (theirs, ours):
        samples = evaluate(lm=model, task_dict=loaded, bootstrap_iters=0)["samples"]
        answers.append([sample["resps"] for task in loaded["tasks"] for sample in samples[task]])

    kinds = set()
    for reference, answer in zip(*answers, strict=True):
        for (one,), (other,) in zip(reference, answer, strict=True):  # each request is asked once
            kinds.add(type(one))
            if isinstance(one, str):
                assert other == one
            elif isinstance(one, tuple):
                assert other == (pytest.approx(one[0], abs=1e-3), one[1])
            else:
                assert other == pytest.approx(one, abs=1e-3)
    assert kinds == {str, tuple, float}


def test_all_models_get_the_same_prompts(qwen, tmp_path):
    write_task(
        tmp_path,
        "examples",
        QUESTIONS,
        "loglikelihood",
        doc_to_text="{{question}}",
        doc_to_target="{{choices[0]}}",
        num_fewshot=2,
        fewshot_split="test",
    )

    class Recorder(HarnessModel):
        def loglikelihood(self, requests, disable_tqdm=False):
            prompts.append([request.args for request in requests])
            return super().loglikelihood(requests, disable_tqdm)

    prompts = []
    loaded = load_tasks(["examples"], tmp_path)
    for _ in range(2):
        measure(Recorder(qwen, TOKENIZER), loaded, limit=4)
    assert prompts[0] == prompts[1]
    assert len(prompts[0]) == 4
    assert prompts[0][0][0].count("\n\n") == 2


def test_a_score_without_a_standard_error_is_a_number_alone(qwen, tasks):
    scores = measure(HarnessModel(qwen, TOKENIZER), load_tasks(["choice"], tasks), limit=1)
    assert scores["choice"]["acc"]["stderr"] is None
    assert cell({"value": 0.25, "stderr": None}) == "0.250"
    assert cell({"value": 0.25, "stderr": 0.125}) == "0.250 ± 0.125"
    assert cell({"value": None, "stderr": None}) == "not finite"


# ---- The program -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(pretrained):
    """The folder of a saved model. The pretrained model is in the folder `model` beside it."""
    model = Ouroboros(Qwen.from_pretrained(pretrained), rank=4, depth=2)
    move_trained_weights(model, 0.1)
    model.save(pretrained.parent / "run")
    return pretrained.parent / "run"


def test_the_program_compares_the_three_models(saved, tasks, tmp_path):
    # A task's own code finds the package `evaluate` of lm_eval, not evaluate.py of this repository.
    (tmp_path / "code.py").write_text("from evaluate import load\ndef same(documents): return documents\n")
    task = (tasks / "last_word.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(task[:-1] + ', "process_docs": !function code.same}')

    options = ["--tasks", "last_word", "--include", tmp_path, "--depth", 1, "--dtype", "float32"]
    out = succeed("experiments/benchmark.py", saved, *options)
    rows = re.findall(r"^(full|cut|looped) .*", out, re.MULTILINE)
    assert rows == ["full", "cut", "looped"]
    result = json.loads((saved / "benchmark.json").read_text())
    assert result["depth"] == 1

    full = Qwen.from_pretrained(saved.parent / "model")
    looped = Ouroboros.load(saved)
    models = {
        "full": HarnessModel(full, TOKENIZER),
        "cut": HarnessModel(looped.cut, TOKENIZER),
        "looped": HarnessModel(looped, TOKENIZER, depth=1),
    }
    loaded = load_tasks(["last_word"], tasks)
    perplexities = set()
    for name, model in models.items():
        score = result["scores"][name]["last_word"]["perplexity"]
        expected = measure(model, loaded)["last_word"]["perplexity"]
        assert score["value"] == pytest.approx(expected["value"], rel=1e-3)
        assert cell(score) in out
        perplexities.add(cell(score))
    assert len(perplexities) == 3


def refusal(monkeypatch, *arguments) -> str:
    """The line with which the program refuses a command line."""
    monkeypatch.setattr("sys.argv", ["benchmark.py", *map(str, arguments)])
    with pytest.raises(UserError) as caught:
        benchmark.main()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_the_user_can_mend_is_one_line(saved, tmp_path, monkeypatch):
    assert str(tmp_path / "none") in refusal(monkeypatch, tmp_path / "none", "--tasks", "piqa")
    assert "--include" in refusal(monkeypatch, saved, "--tasks", "piqa", "--include", tmp_path / "none")
    assert "--limit 0" in refusal(monkeypatch, saved, "--tasks", "piqa", "--limit", 0)
    assert "--max-length -1" in refusal(monkeypatch, saved, "--tasks", "piqa", "--max-length", -1)


def test_a_run_that_sees_the_answers_is_refused(pretrained, tmp_path, monkeypatch):
    Ouroboros(Qwen.from_pretrained(pretrained), rank=4, pool="sequence").save(tmp_path)
    assert "sees the answers" in refusal(monkeypatch, tmp_path, "--tasks", "piqa")


def test_a_task_without_its_data_is_refused(tmp_path):
    write_task(tmp_path, "lost", QUESTIONS, "loglikelihood", doc_to_text="question", doc_to_target="a")
    (tmp_path / "lost.jsonl").unlink()
    with pytest.raises(UserError, match="--tasks lost: cannot be loaded") as caught:
        load_tasks(["lost"], tmp_path)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_no_task_is_refused_with_one_that_is(tasks, monkeypatch):
    from lm_eval.tasks import TaskManager

    def without_defaults(include_path, include_defaults=True):  # which take half a minute to read
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", without_defaults)
    with pytest.raises(UserError, match="--tasks choise: no such task; there are for example choice"):
        benchmark.load_tasks(["choise"], tasks)
