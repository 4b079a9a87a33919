"""The model card of a run: the README.md beside its last checkpoint.

The Hub shows it when the folder of the checkpoint is uploaded. It begins with the Hub's metadata: YAML
between two lines of three dashes.
"""

import re
from pathlib import Path

from device import name_of
from files import UserError, replace_file
from hub import BUILT_IN, is_hub_name, locate
from ouroboros import Ouroboros
from report import results_notes, results_table
from run_folder import FILE_NAME, NOT_IN_NAME, step_folder
from sources import FINEWEB

CARD = "README.md"


def write_card(model: Ouroboros, results: dict, options):
    """Write the card of a run that has ended, from its results and the options of train.py.

    A card that is newer than the checkpoint stays as it is: a person may have edited it.
    """
    checkpoint = step_folder(options.out, options.steps) / FILE_NAME
    card = checkpoint.with_name(CARD)
    if card.exists() and card.stat().st_mtime > checkpoint.stat().st_mtime:
        return
    text = card_text(model, results, options, licence_of(model.source))
    replace_file(card, lambda part: part.write_text(text, encoding="utf-8"))


# ---- The licence -----------------------------------------------------------------------------------------


def licence_of(base: str) -> dict[str, str]:
    """license, and where there are any license_name and license_link, as the card of a model gives them.

    base: a Hub name, a built-in model or a folder. Returns {} where the licence is not known.
    """
    try:
        path = locate(base, CARD, required=False)
    except UserError:  # the Hub cannot be read now, which must not end a run
        return {}
    if path is None:
        return {}

    fields = licence_fields(path.read_text(encoding="utf-8", errors="replace"))
    link = fields.get("license_link")
    if link is not None and "://" not in link:  # a file beside the card
        del fields["license_link"]
        if is_hub_name(base):
            fields["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
    return fields


def licence_fields(card: str) -> dict[str, str]:
    """The fields of the licence in the metadata of a card. Only plain words and addresses are taken."""
    fields = {}
    lines = card.splitlines()
    if lines[:1] == ["---"] and "---" in lines[1:]:
        for line in lines[1 : lines.index("---", 1)]:
            found = re.fullmatch(r"(license|license_name|license_link): *[\"']?([\w./:-]+)[\"']? *", line)
            if found:
                fields[found[1]] = found[2]
    return fields if "license" in fields else {}


# ---- The text --------------------------------------------------------------------------------------------


def card_text(model: Ouroboros, results: dict, options, licence: dict[str, str]) -> str:
    """The whole card. licence: what licence_of returned for the base."""
    num_layers = model.config.num_hidden_layers
    layers_kept = len(model.prelude) + 1 + len(model.coda)
    looped = model.settings["recurrent"]
    trained = sum(p.numel() for p in model.trained_parameters().values())
    notes = " ".join(sentence(note) for note in results_notes(results))
    sequences = len(results["full"]["held-out"])

    return f"""{metadata(model.source, options.data, licence)}

# {options.out.resolve().name}

An Ouroboros ([arXiv 2604.02051](https://arxiv.org/abs/2604.02051)), trained with `train.py` of
"Ouroboros from scratch". A pretrained model of {num_layers} layers was cut to {layers_kept}. One of these,
layer {looped}, is looped with depth {model.depth}. The {trained:,} parameters that were trained are in
this repository; the pretrained ones are not.

- Base model: {base_sentence(model.source)} Loading checks that it is the same model.
- Licence: {licence_sentence(licence)}
- Text: `{Path(options.data).name}`.

## Results

{markdown_table(results_table(model, results, options.depth))}

{notes}
A held-out loss is the mean over {sequences} sequences of {options.seq_len} tokens. Nothing else was measured.

## How to load it

In the folder of "Ouroboros from scratch", where OWNER/NAME is this repository:

```sh
python sample.py OWNER/NAME --prompt "..."
```

```python
from hub import load_tokenizer
from patch import load_run

model = load_run("OWNER/NAME")
tokenizer = load_tokenizer(model.source)
```

`--model FOLDER`, in Python `base="FOLDER"`, takes the base model from a folder. The weights are one
safetensors file with a checksum, and nothing of this repository is executed.

## Settings

{markdown_table(settings_table(model, options))}

## Citation

```bibtex
@misc{{ouroboros2026,
  title  = {{Ouroboros: Dynamic Weight Generation for Recursive Transformers
            via Input-Conditioned LoRA Modulation}},
  eprint = {{2604.02051}}, archivePrefix = {{arXiv}}, year = {{2026}}
}}
```
"""


def metadata(base: str, data: str, licence: dict[str, str]) -> str:
    """The Hub's metadata of the card."""
    lines = ["---"]
    for key, value in licence.items():
        lines.append(f'{key}: "{value}"')  # in quotes, since some words mean something else in YAML
    if is_hub_name(base):
        lines += [f"base_model: {base}", "base_model_relation: adapter"]
    if data == "fineweb-edu":
        lines += ["datasets:", f"- {FINEWEB}"]
    lines += ["library_name: ouroboros-from-scratch", "pipeline_tag: text-generation"]
    lines += ["tags:", "- ouroboros", "- recursive-transformer", "- lora"]
    return "\n".join([*lines, "---"])


def base_sentence(base: str) -> str:
    """Which model the base is and where it comes from. Of a folder, the path is not told."""
    if base in BUILT_IN:
        return f"`{base}`, which comes with the program."
    if is_hub_name(base):
        return f"[{base}](https://huggingface.co/{base}), which is fetched from the Hub."
    return f"`{Path(base).name}`, a folder on the machine of the training. Name yours as described below."


def licence_sentence(licence: dict[str, str]) -> str:
    """What the reader of the card, or the person who uploads it, has to know about the licence."""
    if not licence:
        return (
            "that of the base model is not known here. Look it up, and add it to the metadata above as "
            "`license`."
        )
    name = licence.get("license_name", licence["license"])
    return f"{name}, that of the base model as its own card names it."


def settings_table(model: Ouroboros, options) -> list[list[str]]:
    """The rows of all options that decide what was trained, without the places of model and text."""
    settings = {**vars(options), **model.settings}
    settings["dtype"] = name_of(model.norm.weight.dtype)
    rows = [["setting", "value"]]
    for name, value in settings.items():
        if name not in NOT_IN_NAME and name != "text_hash":
            rows.append([name.replace("_", "-"), str(value)])
    return rows


def markdown_table(rows: list[list[str]]) -> str:
    """A table in Markdown. The first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


def sentence(note: str) -> str:
    """A note with a capital letter and a full stop."""
    return note[0].upper() + note[1:].removesuffix(".") + "."
