"""Train an Ouroboros: python train.py --depth 8 --rank 32

On a CUDA GPU: Qwen2.5-3B, or Qwen2.5-0.5B if the GPU is small, on FineWeb-Edu with the paper's recipe.
Without one: the built-in tiny model on the Python source code of this machine, in a few minutes. Everything
a run leaves behind is in its folder, runs/NAME.
"""

import threads  # noqa: F401 (it has to come before torch)

# isort: split

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from card import write_card
from checkpoint import newest_good_checkpoint, optimizer_tensors, prune_checkpoints, restore_optimizer
from continuations import print_continuations, save_continuations
from data import Batches
from device import free_memory, name_of, pick_device, pick_dtype
from estimates import mean_loss
from evaluate import EVALUATION_SEED, evaluate, evaluate_baselines, evaluate_columns
from fast import compile_blocks, keep_freed_memory, recompute_activations, run_compiler
from files import UserError, exit_on_user_error, write_json
from hub import load_tokenizer
from memory import memory_of_step
from options import parse_options
from ouroboros import Ouroboros, checked_arguments
from patch import Patched, distillation_loss, full_model_of, load_run, mend_seams, patch_cut
from perplexity import is_another_file, print_perplexities
from processes import (
    RANK,
    StopSignals,
    broadcast_from_first,
    join_processes,
    leave_processes,
    share_of,
    sum_over_processes,
)
from qwen import Config, Qwen
from report import (
    announce_download,
    announce_evaluation,
    announce_memory,
    announce_next,
    announce_stop,
    announce_time,
    print_parameters,
    print_results,
    print_skipped_steps,
    print_text,
)
from run_folder import (
    FILE_NAME,
    OPTIONS,
    RESULTS,
    append_row,
    claim_new_folder,
    cut_log,
    is_bad,
    read_log,
    step_folder,
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
        checked_arguments(config, **loop_settings(options, config))  # before the weights are fetched and read
        if RANK == 0:  # only the first process writes
            options.out = claim_new_folder(options.out, options.name)
    keep_freed_memory()
    join_processes(device, options.batch_size * options.accumulation)  # those that torchrun started
    torch.manual_seed(options.seed)
    print(f"{Path(options.model).name} on {Path(options.data).name}, {device}, {name_of(dtype)}", flush=True)
    announce_download(options)

    # ---- Text ----------------------------------------------------------------------------------------------
    tokenizer = load_tokenizer(options.model, config.vocab_size)

    if options.eval and is_another_file(source, tokenizer, options):
        leave_processes()
        if RANK == 0:
            model = load_run(options.out, options.model, dtype, device, checkpoint)
            print_perplexities(model, Path(options.data), tokenizer, options, device)
        return

    def batches_of(split: str, offset=1, seed=EVALUATION_SEED) -> Batches:
        return Batches(source, split, tokenizer, options.seq_len, offset, seed)

    columns = {"train": batches_of("train"), "held-out": batches_of("val")}
    if options.target_offset == 2:  # the published task, beside the one that counts
        columns["train, t+2"] = batches_of("train", offset=2)
        columns["held-out, t+2"] = batches_of("val", offset=2)

    print_text(source, columns["train"], columns["held-out"], options.eval_sequences)
    training = batches_of("train", options.target_offset, options.seed)

    # ---- Model ---------------------------------------------------------------------------------------------
    if checkpoint is None:
        qwen = Qwen.from_pretrained(options.model, dtype, device)
        model = new_model(qwen, options)
        if options.seam_tokens > 0:
            mend_seams(model, qwen, first_tokens(training, options, device), options.batch_size)
    else:
        qwen = None  # the full model is loaded only if its losses are not known yet, or for distillation
        model = load_run(options.out, options.model, dtype, device, checkpoint)
        if options.eval:
            announce_evaluation(options, model, training)
        else:
            check_same_text(options, training)
            if options.distill > 0:
                qwen = full_model_of(model)
    # other hardware would round the bases and the seams another way
    broadcast_from_first(model.saved_tensors().values())

    results = {}
    if RANK == 0:
        results = evaluate_baselines(model, qwen, columns, options, device)
        if checkpoint is None:
            # no name of its own for the dict, which would keep the full model in memory
            save_continuations(options.out, {"full": qwen, "cut": model.cut}, columns["held-out"], device)

    # ---- Training ------------------------------------------------------------------------------------------
    if not options.eval:
        loss_of = model.loss
        if options.distill > 0:
            loss_of = partial(distillation_loss, model, qwen, options.distill)
        else:
            qwen = None  # and with it the layers that were cut out, which only distillation needs

        if checkpoint is None:
            options.text_hash = training.text_hash()
            first_step = 0
        else:
            first_step = checkpoint[1]["step"]
            print(f"continuing at step {first_step} of {options.steps}")

        print_parameters(model)
        checkpointing = decide_checkpointing(model, options, device)
        batch = training.batch(0, options.batch_size, device)
        compiled = options.compile == "on" or (options.compile == "auto" and device.type == "cuda")
        if compiled:
            compile_blocks(model, qwen)
        if checkpointing:
            recompute_activations(model)  # before the first pass, which might not fit without it
        if compiled:
            run_compiler(model, loss_of, batch)
        announce_time(model, loss_of, batch, options, first_step)

        stopped_by = train(model, training, columns["held-out"], options, device, checkpoint, loss_of)
        leave_processes()
        if stopped_by:
            announce_stop(options.out)
            sys.exit(128 + stopped_by)
        print(f"trained, and saved in {options.out}", flush=True)

    # ---- Results -------------------------------------------------------------------------------------------
    leave_processes()  # here too, for --eval
    if RANK > 0:
        return
    loss_of = partial(model.loss, depth=options.depth)  # --eval may ask for another depth than the model's
    results["ouroboros"] = evaluate_columns(loss_of, columns, options, device, "the looped model")
    print_results(model, results, options.depth)
    if not options.eval:
        write_json(options.out / RESULTS, results)
        write_card(model, results, options)
        print_skipped_steps(read_log(options.out))
        save_continuations(options.out, {"ouroboros": model}, columns["held-out"], device)
        print_continuations(options.out, model.depth)
        draw_picture(options.out)
        announce_next(options.out, step_folder(options.out, options.steps))


# ---- The training loop -----------------------------------------------------------------------------------


def train(model, batches, held_out, options, device, checkpoint=None, loss_of=None, optimizer=None) -> int:
    """Train the model, and leave checkpoints and log.jsonl in options.out.

    batches, held_out: Batches of the two splits. checkpoint: the (tensors, about) at which a resumed run
    goes on. loss_of(ids, targets): the loss that is minimised, by default model.loss. optimizer: by default
    that of make_optimizer. Returns the number of the signal that ended the training early, or 0.
    """
    loss_of = loss_of or model.loss
    optimizer = optimizer or make_optimizer(model, options, device)
    parameters = model.trained_parameters()
    first_step = 0
    if checkpoint is not None:
        tensors, about = checkpoint
        first_step = about["step"]
        restore_optimizer(optimizer, parameters, tensors)

    bad_steps = []  # those without a finite loss
    if RANK == 0:
        is_in_its_folder = (step_folder(options.out, first_step) / FILE_NAME).exists()
        if first_step == 0 or not is_in_its_folder:  # a copy of a run on the Hub is a file without a folder
            save_checkpoint(model, optimizer, options, first_step, bad_steps)
        cut_log(options.out, first_step)
        bad_steps += [row["step"] for row in read_log(options.out) if is_bad(row)]

    sequences = options.batch_size * options.accumulation  # of a step
    share = share_of(sequences)  # those of this process: all of them, unless torchrun started several
    skipped = 0  # steps in a row without a finite loss and gradient

    bar = tqdm(
        initial=first_step,
        total=options.steps,
        unit="step",
        mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds; a file keeps every state of the bar
        disable=RANK > 0,
    )

    def held_out_loss(steps: int) -> float | None:
        """The held-out loss after so many steps, which is printed too. None if it is not finite."""
        losses = evaluate(model.loss, held_out, options.eval_sequences, device)
        loss = mean_loss(losses).mean
        bar.write(f"step {steps}: held-out loss {loss:.3f}")
        return loss if math.isfinite(loss) else None

    with StopSignals() as signals, bar:
        for step in range(first_step, options.steps):
            row = {"step": step + 1}  # of log.jsonl

            # ---- Evaluate the untrained model
            if RANK == 0 and step == 0:
                row["held_out_at_start"] = held_out_loss(0)

            # ---- Learning rate
            started = time.perf_counter()
            rate = learning_rate(step, options)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]

            # ---- Forward and backward
            loss = 0.0
            for first in share[:: options.batch_size]:
                size = min(options.batch_size, share.stop - first)
                ids, targets = batches.batch(step * sequences + first, size, device)  # [size, T] each
                part_of_loss = loss_of(ids, targets) * (size / sequences)
                part_of_loss.backward()
                loss += part_of_loss.detach()
            loss, stop = sum_over_processes(parameters.values(), loss, signals.ask_to_stop())
            grad_norm = clip_grad_norm_(parameters.values(), 1.0)
            # the only place in a step where the program waits for the device
            loss, grad_norm, stop = torch.stack([loss, grad_norm, stop]).tolist()

            # ---- Take the step, or skip a step without a number
            row.update(loss=loss, grad_norm=grad_norm, lr=rate)
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
                    row["held_out"] = held_out_loss(step + 1)
                append_row(options.out, row)
                if is_bad(row):
                    bad_steps.append(step + 1)
                bar.update()
                bar.set_postfix_str(f"loss {loss:.3f}, {row['tokens_per_s']} tokens/s")

            # ---- Save
            if RANK == 0 and ((step + 1) % options.save_every == 0 or is_last or stop):
                save_checkpoint(model, optimizer, options, step + 1, bad_steps)

            # ---- Go on, or stop
            if skipped == 10:
                raise diverged("ten steps in a row had no finite loss and gradient", options, bad_steps)
            if "held_out" in row and row["held_out"] is None:
                raise diverged(f"after step {step + 1} the held-out loss is not finite", options, bad_steps)
            if stop:
                return signals.received[-1] if signals.received else signal.SIGTERM
    return 0


def diverged(what: str, options, bad_steps: list[int]) -> UserError:
    """The error for a run that gives no numbers any more. It names a checkpoint that still does."""
    advice = f"--lr {options.lr / 3:.1g}"
    good = newest_good_checkpoint(options.out, bad_steps[0]) if RANK == 0 else None
    if good is not None:
        advice = f"--resume {good} {advice}"
    return UserError(f"{what}; try {advice}, or begin anew with --dtype float32")


def make_optimizer(model: Ouroboros, options, device) -> torch.optim.AdamW:
    """AdamW with a parameter group for each parameter; "scale" is its learning rate as a multiple of the
    common one.

    The step norm's can be larger: it starts at 1 and has a long way to the size of the state
    (--norm-lr-scale). Only the matrices of linear maps decay. For a norm, a bias, an embedding or a table
    of diagonals, zero is not the neutral value or not a simpler one.
    """
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    decaying = {id(weight) for weight in matrices}
    groups = []
    for name, p in model.trained_parameters().items():
        scale = options.norm_lr_scale if name.startswith("step_norm") else 1.0
        decay = 0.01 if id(p) in decaying else 0.0
        groups.append({"params": [p], "scale": scale, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type != "mps")


def learning_rate(step: int, options) -> float:
    """A linear warm-up, then a cosine that reaches zero after the last step."""
    if step < options.warmup:
        return options.lr * ((step + 1) / options.warmup)
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * 0.5 * (1 + math.cos(math.pi * done))


# ---- Before training -------------------------------------------------------------------------------------


def loop_settings(options, config: Config) -> dict:
    """The arguments of Ouroboros that have to fit the pretrained model."""
    names = ("prelude", "recurrent", "coda", "rank", "depth", "modulation", "pool")
    settings = {name: getattr(options, name) for name in names}
    if options.patch:
        cut = patch_cut(config.num_hidden_layers, options.prelude, options.recurrent, options.coda)
        settings.update(cut)
    return settings


def new_model(qwen: Qwen, options) -> Ouroboros:
    """The model that the options ask for. Raises UserError for options that leave nothing to train."""
    settings = dict(loop_settings(options, qwen.config), gate=options.gate, step_norm=options.step_norm)
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


def decide_checkpointing(model: Ouroboros, options, device) -> bool:
    """Whether activations are computed again in the backward pass. "auto" is decided here, and is not saved
    in the options: a resumed run decides for the GPU that it has then.
    """
    if options.activation_checkpointing != "auto":
        return options.activation_checkpointing
    if device.type != "cuda":
        return False
    step = memory_of_step(model, options, free_memory(device))
    announce_memory(step, options)
    return not step.fits


def first_tokens(training: Batches, options, device):
    """The sequences [N, T] of training text on which the seams are fitted."""
    sequences = training.at_most(math.ceil(options.seam_tokens / options.seq_len))
    tokens = sequences * options.seq_len
    print(f"fitting the seams to the full model's states, on {tokens:,} tokens", flush=True)
    ids, _ = training.batch(0, sequences, device)
    return ids


def check_same_text(options, training: Batches):
    """Raise UserError if the text is not the one with which a resumed run began."""
    if options.text_hash != training.text_hash():
        raise UserError(
            f"{options.data}: not the text with which {options.out} began, or its tokenizer.json has "
            "changed; bring it back, or give --data with where the text lies now"
        )


# ---- What a run leaves behind ----------------------------------------------------------------------------


def draw_picture(run: Path):
    """Let plot.py draw the run's loss.png, in a process of its own: what fails there fails no run."""
    program = Path(__file__).with_name("plot.py")
    environment = {**os.environ, "MPLBACKEND": "agg"}
    drawing = subprocess.run([sys.executable, program, run], env=environment, capture_output=True, text=True)
    if drawing.returncode != 0:
        reason = "".join(drawing.stderr.strip().splitlines()[-1:])
        place = shlex.quote(str(run))
        print(f"loss.png was not drawn ({reason}); python plot.py {place} draws it later")


def save_checkpoint(model: Ouroboros, optimizer, options, step: int, bad_steps: list[int]):
    """Save all that is needed to go on after `step` steps, and remove old checkpoints.

    Every random choice is a function of the seed and the step, so there is no random state to save.
    bad_steps: the numbers of the steps without a finite loss.
    """
    kept = dict(vars(options))
    for name in ("resume", "eval", "name", "out"):  # they say where a run is, not what it is
        kept.pop(name, None)
    moments = optimizer_tensors(optimizer, model.trained_parameters())
    model.save(step_folder(options.out, step), moments, step=step, options=kept)
    write_json(options.out / OPTIONS, kept)  # for people to read
    prune_checkpoints(options.out, step, bad_steps[0] if bad_steps else None)


if __name__ == "__main__":
    exit_on_user_error(
        main, "try a smaller --batch-size, --seq-len, --depth or --model, or --activation-checkpointing"
    )
