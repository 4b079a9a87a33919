"""A study: the runs on one model, its texts, and where their results are."""

import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from data import Batches
from evaluate import EVALUATION_SEED
from experiments.configurations import Run, all_runs
from experiments.measure import FIRST_OF_TEST, TEST_SEQUENCES
from files import UserError, cache_folder, replace_file
from hub import load_tokenizer
from sources import open_source

BASELINES = "baselines"  # the name under which all that needs no training is measured

# Packages whose READMEs are English prose that every machine with this program has.
README_PACKAGES = (
    "torch",
    "numpy",
    "matplotlib",
    "pillow",
    "sympy",
    "mpmath",
    "networkx",
    "tqdm",
    "huggingface_hub",
    "tokenizers",
    "safetensors",
    "pytest",
)


@dataclass
class Study:
    """All runs on one model and its texts, and where they are."""

    model: str
    data: str
    other: str  # a text of another kind, as for --data
    steps: int  # of most runs
    dtype: str
    run_folder: Path  # the runs' checkpoints
    results: Path  # the JSON files, the tables and the pictures

    @property
    def central(self) -> bool:
        """Whether only the central configurations are trained."""
        return self.model != "tiny"

    @property
    def identity(self) -> list:
        """What a folder of results is of."""
        return [Path(self.data).name, Path(self.other).name, self.steps]

    def runs(self) -> dict[str, Run]:
        return all_runs(self.central)

    def result_file(self, name: str) -> Path:
        return self.results / f"{name.replace(' ', '-')}.json"

    def train_options(self) -> list[str]:
        """The options of train.py that all runs and the baselines share."""
        return ["--model", self.model, "--data", self.data, "--dtype", self.dtype, "--device", "cpu"]


# ---- Texts -----------------------------------------------------------------------------------------------


def readme_folder() -> str:
    """A folder with the READMEs of README_PACKAGES, where all of them are held out."""
    readmes = []
    for name in README_PACKAGES:
        try:
            readmes.append(metadata(name).get_payload())
        except PackageNotFoundError as error:
            raise UserError(f"the package {name} is missing: pip install -r requirements.txt") from error
    text = "\n<|endoftext|>\n".join(readmes)
    digest = hashlib.sha1(text.encode()).hexdigest()[:8]
    folder = cache_folder() / f"readmes-{digest}"
    for name in ("train.txt", "val.txt"):
        if not (folder / name).exists():
            replace_file(folder / name, lambda part: part.write_text(text, encoding="utf-8"))
    return str(folder)


@dataclass
class Texts:
    """The texts on which every model is evaluated, in sequences of one length."""

    model: str
    data: str
    other: str
    length: int

    def batches(self, data: str, split: str, offset=1, seed=EVALUATION_SEED) -> Batches:
        return Batches(open_source(data), split, load_tokenizer(self.model), self.length, offset, seed)

    def held_out(self) -> Batches:
        return self.batches(self.data, "val")

    def both(self) -> dict[str, Batches]:
        """The two texts of every table. Raises UserError for a text without enough sequences."""
        texts = {"held-out": self.held_out(), "other": self.batches(self.other, "val")}
        needed = FIRST_OF_TEST + TEST_SEQUENCES
        for name, batches in texts.items():
            found = batches.at_most(needed)
            if found < needed:
                raise UserError(f"the {name} text has {found} sequences, {needed} are needed; give more text")
        return texts

    def of_objective(self) -> dict[str, Batches]:
        """The texts that show what a model was trained to: on both targets, in both splits."""
        return {
            "train": self.batches(self.data, "train"),
            "train t+2": self.batches(self.data, "train", offset=2),
            "held-out t+2": self.batches(self.data, "val", offset=2),
        }
