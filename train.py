"""Train an Ouroboros: python train.py --depth 8 --rank 32

On a CUDA GPU: Qwen2.5-3B on FineWeb-Edu with the paper's recipe. Without one: the built-in tiny model on
the Python source code of this machine, in a few minutes. Everything a run leaves behind is in its folder,
runs/NAME.
"""

import hashlib
import json
import math
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from checkpoint import optimizer_tensors, prune_checkpoints, restore_optimizer, step_folder
from data import Batches
from device import pick_device, pick_dtype
from evaluate import EVALUATION_SEED, evaluate, evaluate_baselines, evaluate_columns
from fast import keep_freed_memory, recompute_activations, try_to_compile
from files import WRITE_ERRORS, UserError, exit_on_user_error, explaining, replace_file
from hub import load_tokenizer
from options import parse_options
from ouroboros import Ouroboros, checked_arguments
from patch import Patched, load_run
from processes import (
    RANK,
    StopSignals,
    broadcast_from_first,
    join_processes,
    share_of,
    sum_over_processes,
)
from qwen import Config, Qwen
from report import (
    announce_download,
    announce_time,
    print_parameters,
    print_results,
    print_sample,
    print_text,
)
from sources import open_source


def main():
    # ---- Options -------------------------------------------------------------------------------------------
    options, checkpoint = parse_options()  # checkpoint: None for a new run
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    source = open_source(options.data)  # here, so that a wrong path is told before anything slow
    config = Config.from_pretrained(options.model)
    if checkpoint is None:
        check_model_options(options, config)
    keep_freed_memory()
    join_processes(device, options.batch_size * options.accumulation)  # those that torchrun started
    torch.manual_seed(options.seed)
    type_name = str(dtype).removeprefix("torch.")
    print(f"{Path(options.model).name} on {Path(options.data).name}, {device}, {type_name}", flush=True)
    announce_download(options)

    # ---- Text ----------------------------------------------------------------------------------------------
    tokenizer = load_tokenizer(options.model, config.vocab_size)

    def batches(split: str, offset=1, seed=EVALUATION_SEED) -> Batches:
        return Batches(source, split, tokenizer, options.seq_len, offset, seed)

    columns = {"train": batches("train"), "held-out": batches("val")}
    if options.target_offset == 2:  # the published task, beside the one that counts
        columns["train, t+2"] = batches("train", offset=2)
        columns["held-out, t+2"] = batches("val", offset=2)

    print_text(source, columns["train"], columns["held-out"], options.eval_sequences)

    # ---- Model ---------------------------------------------------------------------------------------------
    if checkpoint is None:
        qwen = Qwen.from_pretrained(options.model, dtype, device)
        model = new_model(qwen, options)
    else:
        qwen = None  # the full model is loaded only if its losses are not known yet
        model = load_run(options.out, options.model, dtype, device, checkpoint)
        if options.eval:
            announce_evaluation(options, model, columns["train"])
        else:
            check_same_text(options, columns["train"])
    broadcast_from_first(model.saved_tensors().values())  # other hardware would round the bases another way

    results = {}
    if RANK == 0:
        results = evaluate_baselines(model, qwen, columns, options, device)
    del qwen  # and with it the layers that were cut out

    # ---- Training ------------------------------------------------------------------------------------------
    if not options.eval:
        training = batches("train", options.target_offset, options.seed)
        if checkpoint is None:
            options.text_hash = hash_of_text(training)
            options.out = options.out or free_folder(options)
            first_step = 0
        else:
            first_step = checkpoint[1]["step"]
            print(f"continuing at step {first_step} of {options.steps}")

        print_parameters(model)
        batch = training.batch(0, options.batch_size, device)
        if options.compile == "on" or (options.compile == "auto" and device.type == "cuda"):
            try_to_compile(model, batch)
        if options.activation_checkpointing:
            recompute_activations(model)
        announce_time(model, batch, options, first_step)

        stopped_by = train(model, training, columns["held-out"], options, device, checkpoint)
        if stopped_by:
            print(f"stopped, and saved. To continue: python train.py --resume {options.out}")
            print(f"To see how good it is so far: python train.py --eval {options.out}")
            sys.exit(128 + stopped_by)

    # ---- Results -------------------------------------------------------------------------------------------
    if RANK > 0:
        return
    loss_of = partial(model.loss, depth=options.depth)  # --eval may ask for another depth than the model's
    results["ouroboros"] = evaluate_columns(loss_of, columns, options, device, "the looped model")
    print_results(model, results, options.depth)
    if not options.eval:
        write_json(options.out / "results.json", results)
        print_sample(model, tokenizer, columns["held-out"], options.seed, device)

        from plot import plot_losses  # only now, because importing matplotlib takes seconds

        plot_losses(options.out)
        print(f'\nAll of it is in {options.out}. Write on: python sample.py {options.out} --prompt "..."')


# ---- The training loop -----------------------------------------------------------------------------------


def train(model, batches, held_out, options, device, checkpoint=None) -> int:
    """Train the model, and leave checkpoints and log.jsonl in options.out.

    batches, held_out: Batches of the two splits. checkpoint: the (tensors, about) at which a resumed run
    goes on. Returns the number of the signal that ended the training early, or 0.
    """
    parameters = model.trained_parameters()
    optimizer = make_optimizer(parameters, options, device)
    first_step = 0
    if checkpoint is not None:
        tensors, about = checkpoint
        first_step = about["step"]
        restore_optimizer(optimizer, parameters, tensors)

    log = options.out / "log.jsonl"
    if RANK == 0:
        if first_step == 0:
            save_checkpoint(model, optimizer, options, step=0)
        cut_log(log, first_step)

    sequences = options.batch_size * options.accumulation  # of a step
    share = share_of(sequences)  # those of this process: all of them, unless torchrun started several
    skipped = 0  # steps in a row without a finite loss and gradient

    bar = tqdm(initial=first_step, total=options.steps, unit="step", disable=RANK > 0)
    with StopSignals() as signals, bar:
        for step in range(first_step, options.steps):
            started = time.perf_counter()

            # ---- Learning rate
            rate = learning_rate(step, options)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]

            # ---- Forward and backward
            loss = 0.0
            for first in share[:: options.batch_size]:
                size = min(options.batch_size, share.stop - first)
                ids, targets = batches.batch(step * sequences + first, size, device)  # [size, T] each
                part_of_loss = model.loss(ids, targets) * (size / sequences)
                part_of_loss.backward()
                loss += part_of_loss.detach()
            loss, stop = sum_over_processes(parameters.values(), loss, len(signals.received))
            grad_norm = clip_grad_norm_(parameters.values(), 1.0).item()

            # ---- Take the step, or skip a step without a number
            row = {"step": step + 1, "loss": loss, "grad_norm": grad_norm, "lr": rate}
            if math.isfinite(loss) and math.isfinite(grad_norm):
                optimizer.step()
                skipped = 0
            else:
                skipped += 1
                row.update(loss=None, grad_norm=None, skipped=skipped)
            optimizer.zero_grad()

            # ---- Log and evaluate
            seconds = time.perf_counter() - started
            row["tokens_per_s"] = round(sequences * options.seq_len / seconds)
            is_last = step + 1 == options.steps
            if RANK == 0:
                if (step + 1) % options.eval_every == 0 or is_last:
                    row["held_out"] = evaluate(
                        model.loss, held_out, options.eval_sequences, options.batch_size, device
                    )
                    bar.write(f"step {step + 1}: held-out loss {row['held_out']:.3f}")
                append_row(log, row)
                bar.update()
                bar.set_postfix_str(f"loss {loss:.3f}, {row['tokens_per_s']} tokens/s")

            # ---- Save
            if RANK == 0 and ((step + 1) % options.save_every == 0 or is_last or stop):
                save_checkpoint(model, optimizer, options, step + 1)

            if skipped == 10:
                raise UserError(
                    "ten steps in a row had no finite loss and gradient, and none of them was taken; try "
                    f"--resume {options.out} --lr {options.lr / 3:.1g}, or begin anew with --dtype float32"
                )
            if stop:
                return signals.received[-1] if signals.received else signal.SIGTERM
    return 0


def make_optimizer(parameters: dict, options, device) -> torch.optim.AdamW:
    """AdamW with a parameter group for each parameter; "scale" is its learning rate as a multiple of the
    common one.

    The step norm's can be larger: it starts at 1 and has a long way to the size of the state
    (--norm-lr-scale).
    """
    groups = []
    for name, p in parameters.items():
        scale = options.norm_lr_scale if name.startswith("step_norm") else 1.0
        groups.append({"params": [p], "scale": scale})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01, fused=device.type != "mps")


def learning_rate(step: int, options) -> float:
    """A linear warm-up, then a cosine that reaches zero after the last step."""
    if step < options.warmup:
        return options.lr * ((step + 1) / options.warmup)
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * 0.5 * (1 + math.cos(math.pi * done))


# ---- Before training -------------------------------------------------------------------------------------


def new_model(qwen: Qwen, options) -> Ouroboros:
    """The model that the options ask for. Raises UserError for options that leave nothing to train."""
    settings = dict(
        prelude=options.prelude,
        recurrent=options.recurrent,
        coda=options.coda,
        rank=options.rank,
        depth=options.depth,
        modulation=options.modulation,
        pool=options.pool,
        gate=options.gate,
        step_norm=options.step_norm,
    )
    if options.patch or options.train_coda != "none":
        model = Patched(qwen, seams=options.patch, train_coda=options.train_coda, **settings)
    else:
        model = Ouroboros(qwen, **settings)
    if not model.trained_parameters():
        raise UserError(
            "nothing is left to train; leave out one of --modulation none, --no-gate and --no-step-norm, or "
            "add --patch"
        )
    return model


def check_model_options(options, config: Config):
    """Raise UserError for options that do not fit the model, before its weights are fetched and read.

    They are the checks of the model itself.
    """
    checked_arguments(
        config,
        options.prelude,
        options.recurrent,
        options.coda,
        options.rank,
        options.depth,
        options.modulation,
        options.pool,
    )


def hash_of_text(training: Batches) -> str:
    """A hash of the first chunk of tokens, by which a resumed run recognises its text."""
    return hashlib.sha256(training.chunk(0)).hexdigest()[:16]


def check_same_text(options, training: Batches):
    """Raise UserError if the text is not the one with which a resumed run began."""
    if options.text_hash != hash_of_text(training):
        raise UserError(
            f"{options.data}: not the text with which {options.out} began, or its tokenizer.json has "
            "changed; bring it back, or give --data with where the text lies now"
        )


def announce_evaluation(options, model: Ouroboros, training: Batches):
    """Say what differs between an evaluation and the training of its run."""
    if options.text_hash != hash_of_text(training):
        print(f"this is another text than that on which {options.out} was trained")
    if options.depth != model.depth:
        print(f"the loop takes {options.depth} steps here; {options.out} was trained with {model.depth}")


def free_folder(options) -> Path:
    """The first of runs/NAME, runs/NAME-2, runs/NAME-3 and so on that does not exist."""
    name = f"runs/{Path(options.model).name}-depth{options.depth}-rank{options.rank}"
    if options.patch:
        name += "-patch"
    folder = Path(name)
    number = 2
    while folder.exists():
        folder = Path(f"{name}-{number}")
        number += 1
    return folder


# ---- What a run leaves behind ----------------------------------------------------------------------------


def save_checkpoint(model: Ouroboros, optimizer, options, step: int):
    """Save all that is needed to go on after `step` steps. The newest two checkpoints are kept.

    Every random choice is a function of the seed and the step, so there is no random state to save.
    """
    kept = dict(vars(options))
    for name in ("resume", "eval", "out"):  # they say where a run is, not what it is
        kept.pop(name, None)
    moments = optimizer_tensors(optimizer, model.trained_parameters())
    model.save(step_folder(options.out, step), moments, step=step, options=kept)
    write_json(options.out / "args.json", kept)  # for people to read
    prune_checkpoints(options.out, newest=step)


def cut_log(log: Path, steps: int):
    """Keep the rows of the first `steps` steps.

    A killed run may have logged steps after its last checkpoint.
    """
    lines = []
    if log.exists():
        lines = log.read_text(errors="replace").splitlines(keepends=True)[:steps]
    replace_file(log, lambda part: part.write_text("".join(lines)))


def append_row(log: Path, row: dict):
    line = json.dumps(row) + "\n"
    advice = "make room or bring its folder back"
    with explaining(log, "written", advice, WRITE_ERRORS), open(log, "a") as file:
        file.write(line)


def write_json(path: Path, content: dict):
    replace_file(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n"))


if __name__ == "__main__":
    exit_on_user_error(
        main, "try a smaller --batch-size, --seq-len, --depth or --model, or --activation-checkpointing"
    )
