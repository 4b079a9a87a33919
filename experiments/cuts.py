"""Which layers are best kept: python experiments/cuts.py --model tiny --data python

Every cut that the program tries keeps as many layers as the paper's. Its seams are fitted in closed form
(patch.py), without training. The held-out loss is measured on sequences that serve for choices alone. First
the program tries each prelude with every third recurrent layer, then the best prelude with all of them.

The rows are printed, and written to experiments/cuts/MODEL.json. On SmolLM2 this takes a quarter of an hour.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import Batches
from device import pick_device, pick_dtype
from estimates import gap_recovered, mean_loss
from evaluate import EVALUATION_SEED, evaluate
from fast import keep_freed_memory
from files import exit_on_user_error, write_json
from hub import load_tokenizer
from ouroboros import Ouroboros, default_cut
from patch import Patched, fitted_seam, states_before, token_states
from qwen import Qwen, rotary_at
from sources import open_source


class Search:
    """Mends cuts of a model and keeps the losses of each. rows: what has been measured."""

    def __init__(self, args):
        self.device = pick_device("auto")
        self.qwen = Qwen.from_pretrained(args.model, pick_dtype("auto", self.device), self.device)
        tokenizer = load_tokenizer(args.model, self.qwen.config.vocab_size)
        source = open_source(args.data)
        training = Batches(source, "train", tokenizer, args.seq_len)
        ids, _ = training.batch(0, math.ceil(args.seam_tokens / args.seq_len), self.device)
        self.rotary = rotary_at(self.qwen.config, 0, args.seq_len, self.device)
        num_layers = self.qwen.config.num_hidden_layers
        self.states = states_before(self.qwen, ids, 1, range(num_layers))
        self.held_out = Batches(source, "val", tokenizer, args.seq_len, seed=EVALUATION_SEED)
        self.sequences = args.eval_sequences

        prelude, recurrent, coda = default_cut(num_layers)
        self.num_ends = prelude + coda  # the layers that are kept beside the recurrent one
        self.num_between = num_layers - self.num_ends
        cut = Ouroboros(self.qwen, modulation="none").cut
        self.results = {
            "full": {"held-out": self.losses_of(self.qwen)},
            "cut": {"held-out": self.losses_of(cut)},  # the paper's cut, with which all are compared
        }
        self.rows = []
        for name in ("full", "cut"):
            print(f"{name:24}{mean_loss(self.results[name]['held-out'])}", flush=True)

    def losses_of(self, model) -> list[float]:
        return evaluate(model.loss, self.held_out, self.sequences, self.device)

    @torch.no_grad()
    def measure(self, prelude: int, recurrent: int) -> float:
        """Mend one cut, keep its row, and return its held-out loss."""
        coda = self.num_ends - prelude
        model = Patched(
            self.qwen,
            prelude=prelude,
            recurrent=recurrent,
            coda=coda,
            depth=1,
            modulation="none",
            train_coda="none",
        )
        h = self.states[prelude]
        model.seam_in.P.weight.copy_(fitted_seam(token_states(h), token_states(self.states[recurrent])))
        h = torch.cat([model.recurrent(model.seam_in(sequence), self.rotary) for sequence in h.split(1)])
        model.seam_out.P.weight.copy_(fitted_seam(token_states(h), token_states(self.states[-coda])))

        self.results["mended"] = {"held-out": self.losses_of(model)}
        loss = mean_loss(self.results["mended"]["held-out"])
        share = gap_recovered(self.results, "held-out", "mended")
        row = dict(prelude=prelude, recurrent=recurrent, coda=coda, loss=loss, gap_recovered=share)
        self.rows.append(row)
        print(f"prelude {prelude}, layer {recurrent}, coda {coda}:  {loss}  {share.percent()}", flush=True)
        return loss.mean

    def best_of(self, preludes, stride: int) -> tuple[int, int]:
        """Try these preludes, each with every stride-th recurrent layer between prelude and coda."""
        losses = {}
        for prelude in preludes:
            for recurrent in range(prelude, prelude + self.num_between, stride):
                losses[prelude, recurrent] = self.measure(prelude, recurrent)
        return min(losses, key=losses.get)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--model", default="tiny", help="The model, as for train.py. Default: tiny.")
    option("--data", default="python", help="The text, as for train.py. Default: python.")
    option("--seq-len", type=int, default=256, help="The number of tokens in a sequence. Default: 256.")
    option("--seam-tokens", type=int, default=12_288, help="As for train.py. Default: 12288.")
    option("--eval-sequences", type=int, default=32, help="Held-out sequences for a loss. Default: 32.")
    args = parser.parse_args()
    keep_freed_memory()

    search = Search(args)
    prelude, _, _ = default_cut(search.qwen.config.num_hidden_layers)
    search.best_of([prelude], stride=1)  # the paper's prelude and coda, for comparison
    prelude, _ = search.best_of(range(1, search.num_ends), stride=3)
    prelude, recurrent = search.best_of([prelude], stride=1)
    coda = search.num_ends - prelude
    print(f"\nthe best: --prelude {prelude} --recurrent {recurrent} --coda {coda}")
    path = ROOT / "experiments" / "cuts" / f"{Path(args.model).name}.json"
    write_json(path, {"results": search.results, "rows": search.rows})


if __name__ == "__main__":
    exit_on_user_error(main)
