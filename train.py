"""Train an Ouroboros: python train.py --depth 8 --rank 32

On a CUDA GPU: Qwen2.5-3B on FineWeb-Edu with the paper's recipe. Without one: the built-in tiny model on the Python
source code of this machine, in a few minutes. Everything a run leaves is in runs/NAME.
"""

import argparse
import hashlib
import json
import math
import shutil
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from tqdm import tqdm

from data import SOURCES, Batches, cache_folder, open_source
from ouroboros import MODULATIONS, POOLS, Ouroboros
from qwen import (BUILT_IN, Parser, Qwen, UserError, exit_on_user_error, keep_freed_memory, load_tokenizer, locate,
                  open_safetensors, pick_device, read_json, replace_file)

# What suits the model at hand; the command line has the last word. "paper": its own recipe, 1,000 of its 18,750 steps.
NAMES = ("steps", "seq_len", "batch_size", "accumulation", "lr", "norm_lr_scale", "warmup", "eval_sequences")
PRESETS = {"tiny": (1000, 256, 4, 1, 2e-3, 50.0, 20, 64),
           "cpu": (60, 256, 4, 1, 1e-3, 50.0, 6, 16),
           "paper": (1000, 2048, 2, 16, 3e-4, 1.0, 50, 32)}
HERE = ("resume", "eval", "out", "device", "compile", "activation_checkpointing")  # not kept in args.json
EVALUATION_SEED = 2**32  # evaluation reads in an order of its own, which no --seed gives

def parse_arguments():
    p = Parser(description="Train the looped model of arXiv 2604.02051 on a frozen pretrained decoder.")
    g = p.add_argument_group("what is trained").add_argument
    g("--depth", type=int, default=8, help="steps of the loop (8; paper: 1, 4, 8, 16)")
    g("--rank", type=int, default=32, help="rank of the SVD LoRA (32, as the paper)")
    g("--alpha", type=float, default=16.0, help="its scale is alpha / rank (16, as the paper)")
    g("--modulation", choices=MODULATIONS, default="controller", help="what makes the diagonals (controller)")
    g("--pool", choices=tuple(POOLS), default="prefix", help="what it sees (prefix; paper: sequence, the future too)")
    g("--no-gate", dest="gate", action="store_false", help="h = StepNorm(Layer(h)), without the gated mix")
    g("--no-step-norm", dest="step_norm", action="store_false", help="without the RMSNorm per step")
    g("--prelude", type=int, help="layers kept at the start (8/36 of them; paper: 8 of 36)")
    g("--recurrent", type=int, help="index of the looped layer (the middle one; paper: 18 of 36)")
    g("--coda", type=int, help="layers kept at the end (8/36 of them; paper: 8 of 36)")
    g = p.add_argument_group("on what").add_argument
    g("--model", help="folder or Hub name of a Qwen2.5 checkpoint (Qwen/Qwen2.5-3B on CUDA, else tiny)")
    g("--data", help=".txt, .jsonl or .jsonl.gz, a folder, fineweb-edu (on CUDA) or python (else)")
    g("--target-offset", type=int, choices=(1, 2), default=1, help="the next token (1) or, as published, the one after")
    g = p.add_argument_group("how (default: by model and device; the paper's value in brackets)").add_argument
    g("--steps", type=int, help="optimizer steps (18,750)")
    g("--seq-len", type=int, help="tokens in a sequence (2048)")
    g("--batch-size", type=int, help="sequences in a forward (2)")
    g("--accumulation", type=int, help="forwards to an optimizer step (16)")
    g("--lr", type=float, help="learning rate after the warm-up (3e-4); then a cosine to zero")
    g("--norm-lr-scale", type=float, help="how many times faster the step norm learns, which starts at 1 (1)")
    g("--warmup", type=int, help="optimizer steps of linear warm-up, at most half of all")
    g("--weight-decay", type=float, default=0.01, help="of AdamW (0.01)")
    g("--clip", type=float, default=1.0, help="largest gradient norm (1.0)")
    g("--seed", type=int, default=0, help="of the first weights and of the order of the data (0 by default)")
    g = p.add_argument_group("where and how often").add_argument
    g("--device", default="auto", help="cuda, mps or cpu (the first of these there is)")
    g("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of what is frozen (by hardware)")
    for name, what in (("--compile", "make the blocks faster with torch.compile (on CUDA)"),
                       ("--activation-checkpointing", "less memory, a third more time (on a GPU under 12 GB)")):
        g(name, choices=("auto", "on", "off"), default="auto", help=what)
    g("--out", type=Path, help="folder of the run (runs/MODEL-depth8-rank32, numbered if it is taken)")
    g("--eval-every", type=int, help="steps between held-out losses (a fifth of the run)")
    g("--eval-sequences", type=int, help="sequences in each evaluation (64 for tiny)")
    g("--save-every", type=int, default=100, help="steps between checkpoints (100)")
    g = p.add_argument_group("instead of a new run").add_mutually_exclusive_group().add_argument
    g("--resume", type=Path, metavar="RUN", help="go on with a run that was stopped, as it was started")
    g("--eval", type=Path, metavar="RUN", help="only evaluate a run; with --data on other text than its own")
    args = p.parse_args()
    for name, value in vars(args).items():  # a seed and a weight decay may be 0
        zero = value == 0 and name in ("seed", "weight_decay")
        if type(value) in (int, float) and not zero and not 0 < value < EVALUATION_SEED:
            raise UserError(f"--{name.replace('_', '-')} {value}: give a number above 0 and below 2^32")
    if run := args.resume or args.eval:  # the run's own arguments; where to compute and evaluate may be another
        free = {*HERE, "data"} if args.eval else {*HERE}
        if changed := [n for n in vars(args) if n not in free - {"out"} and getattr(args, n) != p.get_default(n)]:
            raise UserError(f"--{changed[0].replace('_', '-')} cannot change: {run} keeps the arguments it began with")
        saved = read_json(run / "args.json")
        if missing := vars(args).keys() - free - saved.keys():
            raise UserError(f"{run}/args.json: {min(missing)} is missing; is this the folder of a run?")
        given = {name: getattr(args, name) for name in free if name in HERE or args.data}
        return argparse.Namespace(**saved | given | {"out": run})
    on_cuda = pick_device(args.device)[0].type == "cuda"
    args.model = args.model or ("Qwen/Qwen2.5-3B" if on_cuda else "tiny")
    args.data = args.data or ("fineweb-edu" if on_cuda else "python")
    for name, own in (("model", BUILT_IN), ("data", SOURCES)):  # a run must find its files from any folder
        value = getattr(args, name)
        setattr(args, name, str(Path(value).resolve()) if Path(value).exists() and value not in own else value)
    if args.out and args.out.exists():
        raise UserError(f"{args.out}: is there already, and nothing saved is overwritten; choose another --out")
    for name, value in zip(NAMES, PRESETS["tiny" if args.model == "tiny" else "paper" if on_cuda else "cpu"]):
        setattr(args, name, getattr(args, name) or value)
    args.warmup = min(args.warmup, max(1, args.steps // 2))
    args.eval_every = args.eval_every or max(1, args.steps // 5)
    return args

# ---- The loop --------------------------------------------------------------------------------------------------------
def schedule(step: int, args) -> float:
    """The share of --lr at a step: linear warm-up, then a cosine that reaches zero after the last step taken."""
    done = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
    return min((step + 1) / args.warmup, 0.5 * (1 + math.cos(math.pi * done)))

def train(model: Ouroboros, batches: Batches, held_out: Batches, args, device) -> bool:
    """Train and leave the checkpoints and log.jsonl in args.out. False if Ctrl-C ended it early."""
    parameters = model.trained_parameters()
    # The step norm may learn faster: it starts at 1, far from the state's size, and AdamW moves by a rate a step.
    groups = [{"params": [p for name, p in parameters.items() if name.startswith("step_norm") == norm], "scale": scale}
              for norm, scale in ((False, 1.0), (True, args.norm_lr_scale))]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=device.type != "mps")
    done = load_checkpoint(args.out, model, optimizer) if args.resume else 0
    per_step, stop = args.batch_size * args.accumulation, []  # the first Ctrl-C ends with the step, a second at once
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(True))
    with open(args.out / "log.jsonl", "a") as log, tqdm(initial=done, total=args.steps, unit="step") as bar:
        for step in range(done, args.steps):
            started, loss = time.perf_counter(), torch.zeros((), device=device)
            rate = args.lr * schedule(step, args)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            for i in range(args.accumulation):
                batch = batches.batch(step * per_step + i * args.batch_size, args.batch_size, device)
                part = model.loss(*batch) / args.accumulation
                part.backward()
                loss += part.detach()
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), args.clip)
            optimizer.step()
            optimizer.zero_grad()
            row = {"step": step + 1, "loss": loss.item(), "grad_norm": norm.item(), "lr": rate,
                   "tokens_per_s": round(per_step * args.seq_len / (time.perf_counter() - started))}
            if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
                row["held_out"] = evaluate(model.loss, held_out, args, device)
                bar.write(f"step {step + 1}: held-out loss {row['held_out']:.3f}")
            log.write(json.dumps(row) + "\n")
            log.flush()
            bar.update()
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_s']} tokens/s")
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps or stop:
                save_checkpoint(args.out, model, optimizer, step + 1)
            if stop:
                break
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return not stop or step + 1 == args.steps

def save_checkpoint(run: Path, model: Ouroboros, optimizer, step: int):
    """The trained model for whoever loads it, and in one more file all that is needed to go on."""
    model.save(run)
    state = {name: p.detach() for name, p in model.trained_parameters().items()}
    for name, p in model.trained_parameters().items():
        state |= {f"{key}/{name}": value for key, value in optimizer.state[p].items()}
    replace_file(run / "training.safetensors", lambda part: save_file(state, part, metadata={"step": str(step)}))

def load_checkpoint(run: Path, model: Ouroboros, optimizer) -> int:
    """Put back the weights and AdamW's moments; return the number of steps taken."""
    with open_safetensors(run / "training.safetensors") as file, torch.no_grad():
        state = {}
        for i, (name, p) in enumerate(sorted(model.trained_parameters().items(), key=lambda x: "step_norm" in x[0])):
            p.copy_(file.get_tensor(name))
            state[i] = {key: file.get_tensor(f"{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(file.metadata()["step"])

# ---- Evaluation ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(loss_of, batches: Batches, args, device) -> float:
    """Mean cross entropy, in nats per target, over the first sequences of `batches`. loss_of: ids, targets -> mean"""
    total = torch.zeros((), device=device)
    for first in range(0, args.eval_sequences, args.batch_size):
        ids, targets = batches.batch(first, min(args.batch_size, args.eval_sequences - first), device)
        total += loss_of(ids, targets) * len(ids)
    return total.item() / args.eval_sequences

def baselines(model: Ouroboros, qwen: Qwen | None, columns: dict, args, device) -> dict:
    """The losses of the full and of the cut model: measured once for a model, a text and a setting, then kept."""
    texts, dtype = [batches.folder.name for batches in columns.values()], model.norm.weight.dtype
    what = json.dumps([model.fingerprint(), texts, args.seq_len, args.eval_sequences, device.type, str(dtype)])
    path = cache_folder() / "baselines" / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.json"
    if not path.exists():
        print("evaluating the full and the cut model, once for this model and text", flush=True)
        qwen = qwen or Qwen.from_pretrained(model.source, dtype, device)
        losses = {name: {column: evaluate(loss_of, batches, args, device) for column, batches in columns.items()}
                  for name, loss_of in (("full", qwen.loss), ("cut", partial(model.loss, cut=True)))}
        replace_file(path, lambda part: part.write_text(json.dumps(losses)))
    return read_json(path)

def print_results(model: Ouroboros, results: dict):
    full, cut, ours = (results[name] for name in ("full", "cut", "ouroboros"))
    gap = {column: (cut[column] - ours[column]) / (cut[column] - full[column]) for column in full}
    print("\n" + " " * 24 + "".join(f"{column:>15}" for column in full))
    names = (f"full model ({model.layers} layers)", f"cut to {len(model.prelude) + 1 + len(model.coda)} layers",
             f"ouroboros, depth {model.depth}")
    for name, losses in zip(names, (full, cut, ours)):
        print(f"{name:24}" + "".join(f"{loss:15.3f}" for loss in losses.values()))
    print(f"{'gap recovered':24}" + "".join(f"{share:15.1%}" for share in gap.values()))

# ---- The program -----------------------------------------------------------------------------------------------------
def announce_download(args):
    """Say before the wait what is fetched and how much room it takes."""
    if not Path(args.model).is_dir() and args.model not in BUILT_IN:
        index = locate(args.model, "model.safetensors.index.json", required=False)
        size = (read_json(index).get("metadata") or {}).get("total_size") if index else None
        size = f"{size / 1e9:.1f} GB" if size else "one file"
        print(f"{args.model}: {size}, fetched once to {constants.HF_HUB_CACHE}", flush=True)
    if args.data == "fineweb-edu":
        shards = 1 + math.ceil(args.steps * args.accumulation * args.batch_size * args.seq_len / 1e8)
        free = shutil.disk_usage(next(p for p in Path(constants.HF_HUB_CACHE).parents if p.exists())).free / 1e9
        print(f"fineweb-edu: {shards} files of 0.2 GB, each fetched when needed; {free:.0f} GB are free", flush=True)

def announce_training(model: Ouroboros, batches: Batches, args, device):
    """Print the parameter table, compile what is to be and say, after a trial step, how long all will take."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
              if name in ("controller", "gate", "step_norm")}
    counts |= {"trained, float32": sum(counts.values()), "frozen SVD bases": sum(b.numel() for b in model.buffers()),
               "frozen base": sum(p.numel() for p in model.parameters() if not p.requires_grad)}
    print("\n" + "\n".join(f"{name:20}{count:>15,} parameters" for name, count in counts.items()), flush=True)

    def seconds():
        started = time.perf_counter()
        model.loss(*batches.batch(0, args.batch_size, device)).backward()
        sum(p.grad.sum() for p in model.trained_parameters().values()).item()  # waits for the device
        return time.perf_counter() - started
    if args.compile == "on" or args.compile == "auto" and device.type == "cuda":
        print("\ncompiling, a minute or two", flush=True)
        try:
            model.compile_blocks()
            seconds()
        except Exception as error:  # whatever the compiler behind torch.compile raises
            torch.compiler.set_stance("force_eager")
            print(f"torch.compile does not work here, going on without: {(str(error) or repr(error)).splitlines()[0]}")
    hours = min(seconds(), seconds()) * args.accumulation * args.steps / 3600
    model.zero_grad()
    took = f"{hours:.1f} hours" if hours > 1.5 else f"{hours * 60:.0f} min"
    print(f"\n{args.steps} steps of {args.accumulation} x {args.batch_size} x {args.seq_len} tokens, about {took}\n")

def main():
    args = parse_arguments()
    keep_freed_memory()
    device, dtype = pick_device(args.device, args.dtype)
    print(f"{args.model} on {args.data}, {device}, {str(dtype).removeprefix('torch.')}", flush=True)
    announce_download(args)
    torch.manual_seed(args.seed)
    tokenizer, source = load_tokenizer(args.model), open_source(args.data)
    def batches(split, offset=1, seed=EVALUATION_SEED):
        return Batches(source, split, tokenizer, args.seq_len, offset, seed)
    columns = {"train": batches("train"), "held-out": batches("val")}
    if args.target_offset == 2:  # the published task, beside the one that counts
        columns |= {"train, t+2": batches("train", 2), "held-out, t+2": batches("val", 2)}
    if args.resume or args.eval:
        qwen, model = None, Ouroboros.load(args.out, None, dtype, device)
    else:
        qwen = Qwen.from_pretrained(args.model, dtype, device)
        model = Ouroboros(qwen, args.prelude, args.recurrent, args.coda, args.rank, args.alpha, args.depth,
                          args.modulation, args.pool, args.gate, args.step_norm)
        if not model.trained_parameters():
            raise UserError("nothing is left to train: keep one of Controller, gate and step norm")
    small = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < 6e9 * dtype.itemsize
    model.checkpointing = {"auto": small, "on": True, "off": False}[args.activation_checkpointing]
    results = baselines(model, qwen, columns, args, device)
    del qwen  # and with it the removed layers
    if not args.eval:
        training = batches("train", args.target_offset, args.seed)
        if args.resume and args.text != training.folder.name:
            raise UserError(f"{args.data}: not the text any more with which {args.out} began; bring it back to go on")
        if not args.resume:
            name = f"runs/{Path(args.model).name}-depth{args.depth}-rank{args.rank}"
            free = (p for i in count(1) if not (p := Path(name if i == 1 else f"{name}-{i}")).exists())
            args.out, args.text = args.out or next(free), training.folder.name
            args.out.mkdir(parents=True)
            own = {k: v for k, v in vars(args).items() if k not in HERE}
            replace_file(args.out / "args.json", lambda part: part.write_text(json.dumps(own, indent=2) + "\n"))
        announce_training(model, training, args, device)
        if not train(model, training, columns["held-out"], args, device):
            print(f"stopped, and saved. Go on: python train.py --resume {args.out} (--eval: see how good it is)")
            sys.exit(130)
    results["ouroboros"] = {column: evaluate(model.loss, b, args, device) for column, b in columns.items()}
    print_results(model, results)
    if not args.eval:
        replace_file(args.out / "results.json", lambda part: part.write_text(json.dumps(results, indent=2) + "\n"))
        prompt = columns["held-out"].batch(0, 1, device)[0][:, : max(1, min(48, args.seq_len // 2))]
        out = model.generate(prompt, 48, temperature=0.7)[0, prompt.shape[1] :]
        text, more = (tokenizer.decode(ids.tolist()) for ids in (prompt[0], out))
        print(f"\nheld-out text, and after the bar how the model goes on:\n{text}\u2502{more}")
        with suppress(ImportError):  # no matplotlib, no picture
            from experiments.plots import plot_losses
            plot_losses(args.out)
        print(f'\nAll of it is in {args.out}. Write on: python ouroboros.py {args.out} --prompt "..."')

if __name__ == "__main__":
    exit_on_user_error(main)
