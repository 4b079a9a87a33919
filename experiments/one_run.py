"""One run of a study: training and measuring a model. And the baselines, which need no training."""

from functools import partial
from pathlib import Path

import torch

from data import Batches
from device import pick_device, pick_dtype
from estimates import mean_loss
from experiments.configurations import BY_DEPTH, CURVE, HALTING, OBJECTIVE, SWAP, TASKS, Run
from experiments.halting import measure_halting
from experiments.measure import (
    FIRST_OF_TEST,
    SAMPLES,
    TEST_SEQUENCES,
    compare_bases,
    distance_from_start,
    losses_by_depth,
    losses_on,
    losses_on_sentences,
    losses_with_swapped_pool,
    parameters_by_part,
    sample_losses,
    similarity_of_inputs,
)
from experiments.ngrams import STRENGTHS, Bigrams, Unigrams
from experiments.optimizers import optimizer_of
from experiments.study import BASELINES, Study, Texts
from experiments.tasks import measure_tasks
from experiments.variants import Measured
from fast import keep_freed_memory
from files import UserError, write_json
from options import parse_options
from ouroboros import Ouroboros
from patch import Patched, distillation_loss, full_model_of, mend_seams
from qwen import Qwen
from run_folder import FILE_NAME, STEP_FOLDER, is_bad, read_log
from train import check_same_text, first_tokens, loop_settings, train

SEQUENCES_MEASURED = 16  # sequences of training text on which a Measured variant is measured

HALTING_DEPTH = 8  # the steps of the loop in which a token may stop

# ---- A run -----------------------------------------------------------------------------------------------


def train_and_measure(run: Run, study: Study):
    """Train a run, or continue with it, and write its JSON file.

    A run that gives no numbers any more has a file, too, which says so. Raises UserError if a signal stops
    the training, which is saved then.
    """
    # ---- Options
    folder = study.run_folder / run.file_name
    is_new = not any(folder.glob(f"{STEP_FOLDER}/{FILE_NAME}"))
    options, checkpoint = parse_options(run_arguments(run, study, folder, is_new))
    keep_freed_memory()
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    torch.manual_seed(options.seed)

    # ---- Text and model
    texts = Texts(options.model, options.data, study.other, options.seq_len)
    training = texts.batches(options.data, "train", options.target_offset, options.seed)
    if is_new:
        options.text_hash = training.text_hash()
        qwen = Qwen.from_pretrained(options.model, dtype, device)
        model = new_model(run, qwen, options)
        start_from_text(model, qwen, training, options, device)
    else:
        check_same_text(options, training)
        model = run.model_class.load(folder, None, dtype, device, checkpoint)
        qwen = full_model_of(model) if options.distill > 0 else None

    # ---- Training
    loss_of = model.loss
    if options.distill > 0:
        loss_of = partial(distillation_loss, model, qwen, options.distill)
    del qwen  # and with it the layers that were cut out, unless distillation needs them
    optimizer = optimizer_of(model, options, device, **run.optimizer)
    result = {
        "name": run.name,
        "options": run.options,
        "parameters": parameters_by_part(model),
        "tokens": options.steps * options.batch_size * options.accumulation * options.seq_len,
    }
    held_out = texts.held_out()
    try:
        stopped = train(model, training, held_out, options, device, checkpoint, loss_of, optimizer)
    except UserError:
        if not has_diverged(folder):
            raise
        result["diverged"] = True
    else:
        if stopped:
            raise UserError(f"{run.name}: was stopped, and saved; the same command continues it")
        result.update(measurements(run, model, texts, device))
        result["diverged"] = not all_finite(result["loss"])

    # ---- Results
    result["log"] = short_log(folder)
    write_json(study.result_file(run.name), result, indent=None)


def run_arguments(run: Run, study: Study, folder: Path, is_new: bool) -> list[str]:
    """The command line of train.py for a run."""
    steps = study.steps * run.times_steps
    evaluations = 1  # at the end, where the loop always takes one
    sequences = 8
    if CURVE in run.measures:
        evaluations = 10
        _, sequences = SAMPLES["validation"]
    arguments = [*study.train_options(), "--steps", str(steps), *run.options]
    arguments += ["--eval-every", str(max(1, steps // evaluations)), "--eval-sequences", str(sequences)]
    return [*arguments, "--save-every", "50", "--out" if is_new else "--resume", str(folder)]


def new_model(run: Run, qwen: Qwen, options) -> Ouroboros:
    """The untrained model of a run, by train.py's options and the settings of its class."""
    settings = dict(loop_settings(options, qwen.config), gate=options.gate, step_norm=options.step_norm)
    if issubclass(run.model_class, Patched):
        settings["train_coda"] = options.train_coda
    return run.model_class(qwen, **run.own_settings, **settings)


def start_from_text(model: Ouroboros, qwen: Qwen, training: Batches, options, device):
    """Set what of a new model comes from text without a step of training."""
    if isinstance(model, Measured):
        ids, _ = training.batch(0, SEQUENCES_MEASURED, device)
        model.measure(ids)
    if options.seam_tokens > 0:
        mend_seams(model, qwen, first_tokens(training, options, device), options.batch_size)


def has_diverged(folder: Path) -> bool:
    """Whether a run's last step gave no loss, or an evaluation none."""
    log = read_log(folder)
    return bool(log) and (is_bad(log[-1]) or log[-1].get("held_out", 0) is None)


def all_finite(losses: dict) -> bool:
    """Whether losses_on found a number for each sequence."""
    return all(None not in sample for text in losses.values() for sample in text.values())


def measurements(run: Run, model: Ouroboros, texts: Texts, device) -> dict:
    """The losses of a trained model on both texts, and what else the run is measured by."""
    both = texts.both()
    measured = {"loss": losses_on(model.loss, both, device)}
    if TASKS in run.measures:
        measured.update(tasks(model, both["held-out"], device))
    if SWAP in run.measures:
        measured["swapped"] = losses_with_swapped_pool(model, both["held-out"], device)
    if BY_DEPTH in run.measures:
        measured["depths"] = losses_by_depth(model, both["held-out"], device)
    if HALTING in run.measures:
        measured["halting"] = {}
        for sample, (first, sequences) in SAMPLES.items():
            measured["halting"][sample] = measure_halting(
                model, both["held-out"], sequences, HALTING_DEPTH, device, first
            )
    if OBJECTIVE in run.measures:
        measured.update(objective(model, texts, device))
        measured["moved"] = distance_from_start(model)
    return measured


def tasks(model, held_out: Batches, device) -> dict:
    return measure_tasks(model, held_out, FIRST_OF_TEST, TEST_SEQUENCES, model.config.vocab_size, device)


def objective(model, texts: Texts, device) -> dict:
    """What shows the objective of the training, and the test of the released code."""
    measured = {"sentences": losses_on_sentences(model, texts.held_out(), device), "objective": {}}
    for name, batches in texts.of_objective().items():
        measured["objective"][name] = sample_losses(model.loss, batches, device)
    return measured


def short_log(run_folder: Path) -> list[list]:
    """[step, training loss, held-out loss] of every step.

    The training loss is None for a step without a finite loss and gradient. The held-out loss is None where
    it was not measured or is not finite.
    """
    rows = []
    for row in read_log(run_folder):
        losses = []
        for loss in (row["loss"], row.get("held_out")):
            losses.append(None if loss is None else round(loss, 4))
        rows.append([row["step"], *losses])
    return rows


# ---- The baselines ---------------------------------------------------------------------------------------


def measure_baselines(study: Study):
    """Write what needs no training: the full and the cut model, the n-gram tables, the bases, the inputs."""
    options, _ = parse_options(study.train_options())
    keep_freed_memory()
    device = pick_device(options.device)
    qwen = Qwen.from_pretrained(options.model, pick_dtype(options.dtype, device), device)
    texts = Texts(options.model, options.data, study.other, options.seq_len)
    both = texts.both()
    model = Ouroboros(qwen, modulation="none")

    models = {}
    for name, baseline in (("full", qwen), ("cut", model.cut)):
        models[name] = {"loss": losses_on(baseline.loss, both, device)}
        models[name].update(tasks(baseline, both["held-out"], device))
        models[name].update(objective(baseline, texts, device))
    models.update(measure_ngrams(texts, both, qwen.config.vocab_size, device))

    result = {
        "of": study.identity,
        "models": models,
        "inputs": similarity_of_inputs(model, both["held-out"], device),
        "bases": compare_bases(model, qwen),
    }
    write_json(study.result_file(BASELINES), result, indent=None)


def measure_ngrams(texts: Texts, both: dict[str, Batches], vocabulary: int, device) -> dict:
    """The losses of the unigram and the bigram table of the first chunk of training text."""
    tokens = texts.batches(texts.data, "train").chunk(0)

    def validation_loss(bigrams: Bigrams) -> float:
        return mean_loss(sample_losses(bigrams.loss, both["held-out"], device, "validation")).mean

    unigrams = Unigrams(tokens, vocabulary)
    bigrams = min((Bigrams(tokens, vocabulary, k) for k in STRENGTHS), key=validation_loss)
    return {
        "unigrams": {"tokens": len(tokens), "loss": losses_on(unigrams.loss, both, device)},
        "bigrams": {"tokens": len(tokens), "k": bigrams.k, "loss": losses_on(bigrams.loss, both, device)},
    }
