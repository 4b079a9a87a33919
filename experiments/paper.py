"""The paper's experiments, mended: python experiments/paper.py

Trains every configuration on the built-in model (two at a time, an hour and a half on two cores), goes on where it was
interrupted, and writes what it measured to experiments/paper/tiny: a JSON file for each run (arguments, losses, the
loss of every step), tables.md and the pictures. --model FOLDER --data FOLDER does the central ones on another model,
in two and a half hours for one of 135M parameters. Losses are in nats per token; each table has the held-out text of
the training distribution ("held-out") and one of another kind ("other"): for Python source, the READMEs of packages.
"""

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import metadata
from inspect import signature
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "paper"
sys.path.insert(0, str(ROOT))
import train
from data import Batches, cache_folder, open_source
from ouroboros import Linear, Ouroboros
from qwen import (PROJECTIONS, Qwen, UserError, exit_on_user_error, keep_freed_memory, load_tokenizer, pick_device,
                  promote, read_json, replace_file)

DEPTHS = (1, 2, 4, 8, 16, 32)  # at which every looped model is evaluated
READMES = ("torch", "numpy", "matplotlib", "pillow", "sympy", "mpmath", "networkx", "tqdm", "huggingface_hub",
           "tokenizers", "safetensors", "pytest")

# ---- What is trained -------------------------------------------------------------------------------------------------


class RandomBases(Ouroboros):
    """Random orthogonal bases with the singular values of the true ones."""

    def residual_bases(self, removed, rank):
        generator, bases = torch.Generator().manual_seed(0), []
        for A, B in super().residual_bases(removed, rank):
            other_A, other_B = (torch.linalg.qr(torch.randn(n, rank, generator=generator))[0] for n in
                                (A.shape[1], B.shape[0]))
            bases.append([other_A.T.contiguous().to(A), (other_B * promote(B).norm(dim=0)).contiguous().to(B)])
        return bases


class DrawnDepth(Ouroboros):
    """A depth of 1, 2, 4 or 8 for each training batch, drawn by a hash of its tokens: a function of seed and step."""

    def loss(self, ids, targets, **how):
        if torch.is_grad_enabled():
            how["depth"] = (1, 2, 4, 8)[int(hashlib.sha1(ids.cpu().numpy().tobytes()).hexdigest(), 16) % 4]
        return super().loss(ids, targets, **how)


class Rounded(Ouroboros):
    """Trained weights in bf16, as published."""

    def __init__(self, qwen, **settings):
        super().__init__(qwen, **settings)
        for p in self.trained_parameters().values():
            p.data = p.data.bfloat16()


class Seams(Ouroboros):
    """--patch with a matrix only at the seam before the loop ("in"), after it ("out") or at none."""

    def __init__(self, qwen, seams, **settings):
        super().__init__(qwen, **settings)
        self.settings["seams"] = seams
        for name, patch in zip(("in", "out"), self.patches):
            patch.requires_grad_(name == seams)


class LowRank(Ouroboros):
    """--patch with matrices of rank d / 8, a quarter of the parameters."""

    def __init__(self, qwen, **settings):
        super().__init__(qwen, **settings)
        d = qwen.config.hidden_size
        self.patches = nn.ModuleList(nn.Sequential(Linear(d, d // 8, bias=False), Linear(d // 8, d, False, zero=True))
                                     for _ in self.patches)


class Alternative(Ouroboros):
    """The cut model, without a loop, and something simple that is trained instead of Controller, gate and step norm.
    scale: of each channel after the recurrent layer; matrix: [d, d] there, the identity at the start (LinearPatch,
    arXiv 2505.24680); lora: on every projection of all kept layers, or of the recurrent one (lora one); layer: the
    recurrent layer whole. The two LoRAs have the rank that gives about as many parameters as the paper's system."""

    def __init__(self, qwen, kind="matrix", **settings):
        super().__init__(qwen, **settings)
        d, self.settings["kind"], self.kind = qwen.config.hidden_size, kind, kind
        budget = sum(p.numel() for p in self.trained_parameters().values())
        del self.lora
        self.controller = self.gate = self.step_norm = None
        self.extra = nn.ParameterDict()
        if kind == "scale":
            self.extra["scale"] = torch.ones(d)
        elif kind == "matrix":
            self.extra["matrix"] = torch.eye(d)
        elif kind == "layer":
            self.recurrent.float().requires_grad_(True)
        else:
            layers = [self.recurrent] if kind == "lora one" else [*self.prelude, self.recurrent, *self.coda]
            shapes = [layer.get_submodule(name).weight.shape for layer in layers for name in PROJECTIONS]
            rank = max(1, round(budget / sum(out + into for out, into in shapes)))
            for n, (out, into) in enumerate(shapes):
                self.extra[f"A{n}"] = torch.randn(rank, into) / math.sqrt(into)
                self.extra[f"B{n}"] = torch.zeros(out, rank)

    def own(self):
        own = {name: t for name, t in self.state_dict().items() if name.startswith("extra.")}
        return own | {f"recurrent.{name}": t for name, t in self.recurrent.state_dict().items() if self.kind == "layer"}

    def fingerprint(self):
        return ""  # the base may be what is trained

    def hidden(self, ids, depth=None, cache=None, cut=False):
        rotary, _ = self.start(ids, cache)
        h, layers = self.embed_tokens(ids), [*self.prelude, self.recurrent, *self.coda]
        dtype, adapted = h.dtype, {} if cut else {id(layer): n for n, layer in enumerate(layers)}
        if self.kind == "lora one":
            adapted = {id(self.recurrent): 0} if adapted else {}

        def lora(n):
            def project(projection, x, k):
                A, B = (self.extra[f"{name}{7 * n + k}"].to(x.dtype) for name in "AB")
                return projection(x) + F.linear(F.linear(x, A), B)
            return project
        for layer in layers:
            if self.kind == "layer" and layer is self.recurrent:
                h = layer(h.float(), rotary).to(dtype)
            elif self.kind.startswith("lora") and id(layer) in adapted:
                h = layer(h, rotary, None, lora(adapted[id(layer)]))
            else:
                h = layer(h, rotary)
            if layer is self.recurrent and not cut and self.kind == "scale":
                h = h * self.extra["scale"].to(dtype)
            elif layer is self.recurrent and not cut and self.kind == "matrix":
                h = F.linear(h, self.extra["matrix"].to(dtype))
        return self.norm(h)


def all_runs(central: bool, steps: int) -> dict:
    """name -> (class, its own settings, options of train.py). central: only what is worth its time on a larger model.
    In names: third, three, ten: times the preset's rate; long: more steps; past: trained for the tables past the paper,
    there paper: its own system; start: as the cut model, without a patch; seam, patch: at one seam, at both."""
    runs = {}

    def add(name, *options, kind=Ouroboros, own=None, seeds=1):
        for seed in range(seeds):
            runs[f"{name} seed{seed}"] = kind, own or {}, [*options, "--seed", str(seed)]
    seeds, lr = 1 if central else 3, train.PRESETS["cpu" if central else "tiny"][4]

    def past(name, *options, rate=3, **how):  # past the paper
        add(f"past {name}", *options, "--steps", str(4 * steps if central else steps), "--lr", str(rate * lr), **how)

    def patched(name, depth, modulation, coda="none", **how):
        past(name, "--patch", "--depth", str(depth), "--modulation", modulation, "--train-coda", coda, **how)
    patched("all lora", 1, "none", "all", seeds=3)
    patched("coda lora", 1, "none", "lora", seeds=3)
    patched("coda norms", 1, "none", "norms")
    for modulation in ("none", "controller"):
        patched(f"patch depth1 {modulation}", 1, modulation, seeds=3)
    for depth in (8, 1, 4):
        if central:  # else the runs of row 2 serve
            past(f"paper depth{depth}", "--depth", str(depth), rate=1, seeds=3 if depth == 8 else 1)
        past(f"paper depth{depth} three", "--depth", str(depth))
        for modulation in ("none", "controller") if depth < 8 else ():
            patched(f"start depth{depth} {modulation}", depth, modulation, kind=Seams, own={"seams": "none"})
    if central:
        past("paper no step norm", "--no-step-norm", rate=1)
    for seams in ("in", "out"):
        patched(f"seam {seams}", 1, "none", kind=Seams, own={"seams": seams})
    patched("low rank", 1, "none", kind=LowRank)
    for depth in (4, 8, 2):
        for modulation in ("none", "controller"):
            patched(f"patch depth{depth} {modulation}", depth, modulation)
    for depth in (1, 4):
        patched(f"patch depth{depth} static", depth, "static")
    for depth in (8, 1, 4, 16):
        for modulation in ("controller", "static", "none"):
            add(f"depth{depth} {modulation}", "--depth", str(depth), "--modulation", modulation,
                seeds=1 if depth == 16 else seeds)
    add("offset2 sequence", "--target-offset", "2", "--pool", "sequence")
    add("offset1 sequence", "--pool", "sequence")
    add("no gate", "--no-gate", seeds=seeds)
    add("no step norm", "--no-step-norm", seeds=seeds)
    add("random bases", kind=RandomBases, seeds=seeds)
    if central:
        past("lora", "--depth", "1", kind=Alternative, own={"kind": "lora"})
        long = "--depth", "1", "--steps", str(10 * steps)
        add("long depth1 controller", *long)
        add("long depth1 offset2 sequence", "--target-offset", "2", "--pool", "sequence", *long)
        add("long all lora", "--patch", "--steps", str(10 * steps))
        # Each run takes minutes here, so some of the rows past the paper are left to tiny.
        here = ("all", "coda", "seam", "low", "lora", "paper depth1", "paper depth8 seed", "paper no", "start depth1 c",
                "patch depth1 n", "patch depth1 c", "patch depth4 n")
        return {name: run for name, run in runs.items() if not name.startswith("past") or name[5:].startswith(here)}
    for rank in (8, 64):
        add(f"rank{rank} static", "--rank", str(rank), "--modulation", "static")
    add("drawn depth", kind=DrawnDepth)
    for name, kind in (("bf16", Rounded), ("float32", Ouroboros)):
        add(f"{name} weights paper rate", "--lr", "3e-4", "--norm-lr-scale", "1", kind=kind)
    for rank in (8, 64):
        add(f"rank{rank}", "--rank", str(rank))
    for factor, name in ((1 / 3, "third"), (3, "three"), (10, "ten")):
        if name != "ten":  # at which the paper's system meets no finite gradient any more
            add(f"lr {name}", "--lr", str(lr * factor))
        for kind in ("scale", "matrix", "lora", "lora one", "layer"):
            add(f"{kind} lr {name}", "--depth", "1", "--lr", str(lr * factor), kind=Alternative, own={"kind": kind})
    for kind in ("scale", "matrix", "lora", "lora one", "layer"):
        add(kind, "--depth", "1", kind=Alternative, own={"kind": kind})
    for depth, modulation in ((1, "none"), (1, "controller"), (4, "none"), (4, "controller"), (8, "none")):
        add(f"long patch depth{depth} {modulation}", "--patch", "--depth", str(depth), "--modulation", modulation,
            "--train-coda", "none", "--steps", str(6 * steps))
    add("long all lora", "--patch", "--steps", str(6 * steps))
    add("long offset1 prefix", "--steps", str(6 * steps))
    add("long offset2 sequence", "--target-offset", "2", "--pool", "sequence", "--steps", str(6 * steps))
    return runs


# ---- One run ---------------------------------------------------------------------------------------------------------


def prose() -> str:
    """A folder of English prose that every machine with this program's packages has: their READMEs, all held out."""
    text = "\n<|endoftext|>\n".join(metadata(name).get_payload() for name in READMES)
    folder = cache_folder() / f"readmes-{hashlib.sha1(text.encode()).hexdigest()[:8]}"
    for path in (folder / "train.txt", folder / "val.txt"):
        if not path.exists():
            replace_file(path, lambda part: part.write_text(text))
    return str(folder)


def evaluation_texts(ours, args) -> dict:
    """The texts that every model is evaluated on."""
    tokenizer, home, other = load_tokenizer(args.model), open_source(args.data), open_source(ours.other)
    return {name: Batches(source, split, tokenizer, args.seq_len, offset, train.EVALUATION_SEED)
            for name, source, split, offset in (("train", home, "train", 1), ("held-out", home, "val", 1),
                                                ("other", other, "val", 1), ("held-out t+2", home, "val", 2))}


def leak_cut(model, batches, args, device):
    """The loss at every 16th position: in the whole sequence, and where the model is given only what comes before."""
    seen, whole, cut = 0, 0.0, 0.0
    for first in range(0, args.eval_sequences, args.batch_size):
        ids, targets = batches.batch(first, args.batch_size, device)
        losses = F.cross_entropy(promote(model(ids)).flatten(0, 1), targets.flatten(), reduction="none").view(ids.shape)
        for t in range(15, ids.shape[1], 16):
            alone = F.cross_entropy(promote(model(ids[:, : t + 1]))[:, -1], targets[:, t], reduction="sum")
            whole, cut, seen = whole + losses[:, t].sum().item(), cut + alone.item(), seen + len(ids)
    return {"leak": whole / seen, "leak cut": cut / seen}


@torch.no_grad()
def look_inside(model, texts: dict, args, device):
    """The opening of the gate and the size of the Controller's diagonals, by step, on each text."""
    inside = {}
    for name, batches in texts.items():
        ids, gates, diagonals = batches.batch(0, 8, device)[0], [], []
        hooks = [model.gate.linear.register_forward_hook(
            lambda _, __, out, g=gates: g.append(promote(out).sigmoid().mean().item()))]
        if model.controller is not None:
            hooks.append(model.controller.register_forward_hook(
                lambda _, __, out, m=diagonals: m.append([promote(k)[:, -1] for k in out])))
        model(ids)  # the diagonals: of the last position, which has seen the whole text
        for hook in hooks:
            hook.remove()
        sizes = [torch.stack([k.square().mean(-1).sqrt() for k in m], -1) for m in diagonals]  # [8 texts, 7] each
        inside[name] = {"gate": gates, "diagonals": torch.stack(sizes, 1).tolist()}  # [8 texts, depth, 7]
    return inside


def one_run(name: str, ours):
    """Train (or go on with) a run, evaluate it on everything and write its JSON file."""
    kind, own, options = all_runs(ours.central, ours.steps)[name]
    out = RUNS / ours.name / name.replace(" ", "-")
    begun = any(out.glob("step-*/ouroboros.safetensors"))
    sys.argv = ["train.py", "--model", ours.model, "--data", ours.data, "--dtype", ours.dtype, "--device", "cpu",
                "--steps", str(ours.steps), "--eval-every", str(max(1, ours.steps // 10)), "--save-every", "50",
                *options, "--resume" if begun else "--out", str(out)]
    args = train.parse_arguments()
    keep_freed_memory()
    device, dtype = pick_device(args.device, args.dtype)
    torch.manual_seed(args.seed)
    texts = evaluation_texts(ours, args)
    if begun:
        model = kind.load(out, None, dtype, device, args.checkpoint)
    else:
        settings = {name: value for name, value in vars(args).items() if name in signature(Ouroboros).parameters}
        model = kind(Qwen.from_pretrained(args.model, dtype, device), **own, **settings)
        args.text = None
    training = Batches(open_source(args.data), "train", texts["train"].tokenizer, args.seq_len, args.target_offset,
                       args.seed)
    if number := train.train(model, training, texts["held-out"], args, device):
        sys.exit(128 + number)
    result = {"name": name, "parameters": sum(p.numel() for p in model.trained_parameters().values()),
              "options": options, "tokens": args.steps * args.batch_size * args.accumulation * args.seq_len,
              "loss": {text: train.evaluate(model.loss, b, args, device) for text, b in texts.items()}}
    if re.fullmatch("(depth.* (controller|none)|drawn depth) seed0", name):
        result["depths"] = {depth: {text: train.evaluate(lambda *batch, d=depth: model.loss(*batch, depth=d), b, args,
                                                         device) for text, b in texts.items() if text in
                                    ("held-out", "other")} for depth in DEPTHS}
    if args.pool == "sequence" and args.modulation == "controller":
        with torch.no_grad():
            result |= leak_cut(model, texts["held-out" if args.target_offset == 1 else "held-out t+2"], args, device)
    if name == "depth8 controller seed0":
        result["inside"] = look_inside(model, {"held-out": texts["held-out"], "other": texts["other"]}, args, device)
    if model.step_norm is not None and model.gate is not None:
        norms, biases = model.step_norm.weight[: args.depth], model.gate.linear.bias
        moved = {"step norm": norms - 1, "gate": biases + 2}
        result["moved"] = {part: change.abs().float().mean().item() for part, change in moved.items()}
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    result["log"] = [[row["step"], row["loss"] and round(row["loss"], 4), round(row.get("held_out", 0), 4)]
                     for row in rows]  # a step without a finite loss and gradient has none
    write(ours.results / f"{name.replace(' ', '-')}.json", result)


def baseline(ours):
    """The losses of the full and of the cut model on every text."""
    sys.argv = ["train.py", "--model", ours.model, "--data", ours.data, "--dtype", ours.dtype, "--device", "cpu"]
    args = train.parse_arguments()
    device, dtype = pick_device(args.device, args.dtype)
    qwen, texts = Qwen.from_pretrained(args.model, dtype, device), evaluation_texts(ours, args)
    full = {name: train.evaluate(qwen.loss, b, args, device) for name, b in texts.items()}
    model = Ouroboros(qwen, modulation="none")
    cut = {name: train.evaluate(lambda *batch: model.loss(*batch, cut=True), b, args, device)
           for name, b in texts.items()}
    write(ours.results / "baselines.json", {"of": what(ours), "full": full, "cut": cut})


def what(ours) -> list:
    return [Path(ours.data).name, Path(ours.other).name, ours.steps]


def write(path: Path, what):
    replace_file(path, lambda part: part.write_text(json.dumps(what) + "\n"))


# ---- All of them -----------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", default="python")
    parser.add_argument("--other", help="text of another kind (READMEs of packages for python, else python)")
    parser.add_argument("--steps", type=int, help="of most runs; some take several times as many (250; else 60)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with its share of the cores")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    ours = parser.parse_args()
    ours.name, ours.central = Path(ours.model).name, ours.model != "tiny"
    ours.steps = ours.steps or (60 if ours.central else 250)
    ours.other = ours.other or (prose() if ours.data == "python" else "python")
    ours.results = ROOT / "experiments" / "paper" / ours.name
    if ours.run:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ours.jobs))
        return baseline(ours) if ours.run == "baselines" else one_run(ours.run, ours)

    def in_a_process(name) -> bool:
        """Whether the result is there, at the end."""
        if (ours.results / f"{name.replace(' ', '-')}.json").exists():
            return True
        command = [sys.executable, __file__, *sys.argv[1:], "--run", name]
        done = subprocess.run(command, capture_output=True, text=True)
        print(name, "" if done.returncode == 0 else f"failed: {done.stderr[-2000:]}", flush=True)
        return done.returncode == 0
    if not in_a_process("baselines"):
        raise UserError("the model or a text cannot be used, see above")
    if read_json(ours.results / "baselines.json")["of"] != what(ours):
        raise UserError(f"{ours.results} is of other texts or steps than {what(ours)}; move it and {RUNS} away")
    names = sorted(all_runs(ours.central, ours.steps), key=lambda name: "depth16" in name)  # the slow ones last
    with ThreadPoolExecutor(ours.jobs) as pool:
        missing = list(pool.map(in_a_process, names)).count(False)
    from paper_tables import write_all
    write_all(ours.results)
    if missing:
        raise UserError(f"{missing} runs failed, see above; the same command tries them again")


if __name__ == "__main__":
    exit_on_user_error(main)
