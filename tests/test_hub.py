"""The files of a model, from a folder and from a Hub on this machine: they work, or one line says why not."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    TOKENIZER,
    assert_refused,
    assert_refused_at_once,
    assert_same_end,
    flip_a_bit,
    folder_of,
    greedy_without_cache,
    looped,
    move_trained_weights,
    quick_run,
    run,
    shard,
    small_qwen,
    small_tokenizer,
    succeed,
    table_of,
    tokens,
    works,
    write_shard,
)
from huggingface_hub import metadata_load
from tokenizers import Tokenizer

from checkpoint import read_checkpoint
from files import UserError
from hub import load_tokenizer
from patch import load_run
from qwen import Config, Qwen
from sources import FINEWEB, GPT2, GPT2_END_OF_TEXT

# ---- A Hub on this machine -------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """Serves folder/REPO/FILE. It hangs up drops[FILE] times in the middle of FILE."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.drops = {}
        self.requests = []  # the path of each
        self.resumed = []  # the names of the files that were asked for from the middle on
        self.env = {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HOME": str(folder.parent / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "no_proxy": "127.0.0.1",
        }

    def take(self, path: str, body: bytes) -> dict:
        """Answer one request of `hf upload`. The commit, which is the last of them, has the files."""
        if path.endswith("/create"):
            name = json.loads(body)
            return {"url": f"{self.env['HF_ENDPOINT']}/{name['organization']}/{name['name']}"}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return {"files": [dict(file, uploadMode="regular", shouldIgnore=False) for file in files]}
        if path.endswith("/commit/main"):
            repo = path.removeprefix("/api/models/").removesuffix("/commit/main")
            self.write_files(repo, body)
            return {"commitUrl": f"{self.env['HF_ENDPOINT']}/{repo}/commit/1", "commitOid": 40 * "1"}
        return {"errors": [], "warnings": []}  # of the metadata

    def write_files(self, repo: str, commit: bytes):
        for line in commit.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                path = self.folder / repo / entry["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(entry["value"]["content"]))


class Answer(BaseHTTPRequestHandler):
    """The answer to one request to the Hub."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(with_body=True)

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        content = json.dumps(self.server.take(self.path, body)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """The requests are not printed."""

    def answer(self, with_body: bool):
        self.server.requests.append(self.path)
        repo, _, name = self.path.removeprefix("/datasets").partition("/resolve/main/")
        path = self.server.folder / repo.strip("/") / name
        if not path.parent.is_dir():
            self.refuse("RepoNotFound")
        elif not path.is_file():
            self.refuse("EntryNotFound")
        else:
            self.send_file(name, path.read_bytes(), with_body)

    def refuse(self, code: str):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_file(self, name: str, content: bytes, with_body: bool):
        first = int(re.findall(r"\d+", self.headers.get("Range", "0"))[0])
        if first > 0:
            self.server.resumed.append(name)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("X-Repo-Commit", "c0ffee" + "0" * 34)
        self.send_header("ETag", f'"{name}-{len(content)}"')
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()

        if not with_body:
            return
        if self.server.drops.get(name):
            self.server.drops[name] -= 1
            self.wfile.write(content[first:11_000_000])
            self.close_connection = True
        else:
            self.wfile.write(content[first:])


@pytest.fixture
def hub(pretrained, tmp_path):
    """A Hub with a sharded model, GPT-2's tokenizer and FineWeb-Edu's token shards, all small."""
    folder = tmp_path / "hub"
    shutil.copytree(pretrained, folder / "someone" / "model")
    shard(folder / "someone" / "model")

    content = json.loads(small_tokenizer(350).to_str())
    content["model"]["vocab"]["<|endoftext|>"] = GPT2_END_OF_TEXT
    content["added_tokens"][0]["id"] = GPT2_END_OF_TEXT
    gpt2 = Tokenizer.from_str(json.dumps(content))
    (folder / GPT2).mkdir(parents=True)
    (folder / GPT2 / "tokenizer.json").write_text(json.dumps(content))

    (folder / FINEWEB).mkdir(parents=True)
    for name, word in (("train_000001", "été"), ("val_000000", "日本")):
        ids = []
        for n in range(90):
            ids += [GPT2_END_OF_TEXT, *gpt2.encode(f"{word} {n} " * 20).ids]
        write_shard(folder / FINEWEB / f"finewebedu_{name}.bin", ids)

    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_run_from_the_hub_end_to_end_and_then_offline(hub, pretrained, empty_cache, tmp_path):
    command = quick_run(pretrained, 6)
    command[command.index("--model") + 1] = "someone/model"
    command[command.index("--data") + 1] = "fineweb-edu"
    online = succeed(*command, "--out", tmp_path / "online", env={**hub.env, "HF_TOKEN": "hf_secret"})
    sizes = 0
    for name in ("someone/model/model-*.safetensors", f"{FINEWEB}/*.bin"):
        sizes += sum(path.stat().st_size for path in hub.folder.glob(name))
    assert f"about {sizes / 1e6:.1f} MB are fetched from the Hub" in online
    assert "gap recovered" in online
    cached = np.load(next(empty_cache.glob("*/00000.npy")))
    assert re.match(r"(été|日本) 0 ", TOKENIZER.decode(cached.tolist()))  # GPT-2's tokens, text, the model's

    asked = len(hub.requests)
    assert asked > 0
    offline = succeed(*command, "--out", tmp_path / "offline", env={**hub.env, "HF_HUB_OFFLINE": "1"})
    assert "fetched" not in offline
    assert len(hub.requests) == asked
    assert_same_end(tmp_path / "online", tmp_path / "offline")

    for path in (tmp_path / "online").rglob("*"):
        if path.is_file():
            assert b"hf_secret" not in path.read_bytes(), path
    assert "hf_secret" not in online
    assert str(tmp_path) not in (tmp_path / "online" / "log.jsonl").read_text()


def set_config(folder: Path, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_llama_in_one_file_is_fetched_trained_and_found_offline(hub, pretrained, empty_cache, tmp_path):
    config = Config(400, 32, 48, 6, 4, 2, 8, attention_bias=False)
    llama = folder_of(small_qwen(config=config), hub.folder / "someone" / "llama", model_type="llama")
    shutil.copy(pretrained / "tokenizer.json", llama)
    command = quick_run(pretrained, 2)
    command[command.index("--model") + 1] = "someone/llama"
    size = (llama / "model.safetensors").stat().st_size
    online = succeed(*command, "--out", tmp_path / "online", env=hub.env)
    assert f"about {size / 1e6:.1f} MB are fetched" in online
    offline = succeed(*command, "--out", tmp_path / "offline", env={**hub.env, "HF_HUB_OFFLINE": "1"})
    assert "fetched" not in offline
    assert_same_end(tmp_path / "online", tmp_path / "offline")


@pytest.mark.parametrize("told_by", ["config.json", "the index"])
def test_quantised_weights_are_refused_before_they_are_fetched(told_by, hub, pretrained):
    folder = hub.folder / "someone" / "model"
    if told_by == "config.json":
        set_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    else:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.layers.0.mlp.up_proj.qweight"] = "model-00001-of-00002.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    command = quick_run(pretrained, 2)
    command[command.index("--model") + 1] = "someone/model"
    assert_refused(
        run(*command, env=hub.env), "quantised weights", "name the model from which they were made"
    )
    assert not any(path.endswith(".safetensors") for path in hub.requests)


def fetch(hub: Hub, repo="someone/model", name="config.json", repo_type="model", **env) -> tuple[int, str]:
    """The exit code of a program that locates a file of the Hub, and the last line that it prints.

    The Hub's client makes several tries. Here it does not wait between them.
    """
    code = f"""if True:
        import time
        time.sleep = lambda seconds: None
        from files import exit_on_user_error
        from hub import locate
        exit_on_user_error(lambda: print(locate({repo!r}, {name!r}, {repo_type!r})))"""
    environment = {**os.environ, **hub.env, **env}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    printed = result.stderr if result.returncode else result.stdout
    return result.returncode, printed.strip().splitlines()[-1]


def test_what_is_not_on_the_hub_is_one_line(hub):
    code, line = fetch(hub, "some/one")
    assert code == 2
    assert line == (
        "error: some/one: no folder here and no model on the Hub that you may read; check the name, or "
        "log in: hf auth login"
    )
    code, line = fetch(hub, name="no.json")
    assert code == 2
    assert line.startswith("error: someone/model: this Hub repository has no no.json; name a model that has")


def test_a_hub_that_cannot_be_reached_is_one_line(hub):
    for env in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        code, line = fetch(hub, **env)
        assert code == 2
        assert line.startswith("error: someone/model: the Hub cannot be reached")


def test_a_download_that_breaks_off_is_one_line_and_goes_on_where_it_was(hub):
    large = "finewebedu_train_000002.bin"
    content = bytes(12_000_000)
    (hub.folder / FINEWEB / large).write_bytes(content)

    hub.drops[large] = 99
    code, line = fetch(hub, FINEWEB, large, "dataset")
    assert code == 2
    assert f"{large} could not be downloaded" in line
    assert "run the command again" in line

    hub.drops.clear()
    code, line = fetch(hub, FINEWEB, large, "dataset")
    assert code == 0
    assert Path(line).read_bytes() == content
    assert large in hub.resumed  # in a new try at once or, with older versions of the client, in the next run


# ---- A run as a repository of the Hub --------------------------------------------------------------------


def python(code: str, env: dict) -> list[str]:
    """The lines that a new Python prints, which must end with exit code 0."""
    result = subprocess.run(
        [sys.executable, "-c", f"if True:\n{code}"],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_run_goes_out_with_its_card_and_comes_in_where_nothing_of_it_was_before(hub, pretrained, tmp_path):
    (hub.folder / "someone" / "model" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: some-research\nlicense_link: LICENSE\n---\n"
    )
    command = quick_run(pretrained, 2)
    command[command.index("--model") + 1] = "someone/model"
    printed = succeed(*command, "--out", tmp_path / "first", env=hub.env)

    upload = re.search(r"hf upload YOU/NAME (.*)\n", printed)[1]
    hf = [sys.executable, "-m", "huggingface_hub.cli.hf", "upload", "you/run", upload]
    subprocess.run(hf, env={**os.environ, **hub.env, "HF_TOKEN": "hf_secret"}, check=True)
    uploaded = hub.folder / "you" / "run"
    assert {path.name for path in uploaded.iterdir()} == {"README.md", "ouroboros.safetensors"}
    assert metadata_load(uploaded / "README.md") == {
        "license": "other",
        "license_name": "some-research",
        "license_link": "https://huggingface.co/someone/model/blob/main/LICENSE",
        "base_model": "someone/model",
        "base_model_relation": "adapter",
        "library_name": "ouroboros-from-scratch",
        "pipeline_tag": "text-generation",
        "tags": ["ouroboros", "recursive-transformer", "lora"],
    }

    # What other people may put beside it is not even fetched.
    for name in ("modeling_ouroboros.py", "pytorch_model.bin", "config.json", "adapter_model.pt"):
        (uploaded / name).write_bytes(b"raise SystemExit('executed')")
    hub.requests.clear()
    elsewhere = {**hub.env, "HF_HOME": str(tmp_path / "elsewhere")}
    sample = ["--prompt", "doc1", "--max-new-tokens", 3]
    local = succeed("sample.py", tmp_path / "first", *sample, env=hub.env)
    assert succeed("sample.py", "you/run", *sample, env=elsewhere) == local
    assert {path for path in hub.requests if path.startswith("/you")} == {
        "/you/run/resolve/main/ouroboros.safetensors"
    }
    assert any(path.startswith("/someone/model/resolve/main/model-0000") for path in hub.requests)

    code = """
        import torch
        from ouroboros import Ouroboros
        ids = torch.arange(9)[None]
        print(*Ouroboros.load("{}")(ids).flatten().tolist())"""
    ours = python(code.format(tmp_path / "first"), hub.env)
    assert python(code.format("you/run"), {**elsewhere, "HF_HUB_OFFLINE": "1"}) == ours


def test_a_run_of_the_hub_is_evaluated_there_and_goes_on_only_in_a_copy(hub, pretrained, tmp_path):
    out = tmp_path / "first"
    printed = succeed(*quick_run(pretrained, 2), "--out", out)
    shutil.copytree(out / "step-0000002", hub.folder / "you" / "run")
    evaluation = succeed("train.py", "--eval", "you/run", env=hub.env, cwd=tmp_path)
    assert table_of(evaluation) == table_of(printed)
    assert not (tmp_path / "you").exists()

    refused = run("train.py", "--resume", "you/run", "--steps", 3, env=hub.env, cwd=tmp_path)
    fetch = "hf download you/run ouroboros.safetensors --local-dir runs/run"
    assert_refused_at_once(refused, f"{fetch}, then --resume runs/run")
    (tmp_path / "runs" / "run").mkdir(parents=True)
    shutil.copy(hub.folder / "you" / "run" / "ouroboros.safetensors", tmp_path / "runs" / "run")
    succeed("train.py", "--resume", "runs/run", "--steps", 3, cwd=tmp_path)
    succeed("train.py", "--resume", out, "--steps", 3)
    tensors, _ = read_checkpoint(tmp_path / "runs" / "run")
    for name, tensor in read_checkpoint(out)[0].items():
        assert torch.equal(tensors[name], tensor), name


def test_what_is_wrong_with_a_run_of_the_hub_is_one_line_that_helps(hub, pretrained):
    model = looped(Qwen.from_pretrained(pretrained), depth=2, rank=4)
    for repo, base in (("whole", "someone/model"), ("damaged", "someone/model"), ("local", "/home/you/base")):
        model.source = base
        model.save(hub.folder / "you" / repo)
    flip_a_bit(hub.folder / "you" / "damaged" / "ouroboros.safetensors", np.random.default_rng(0))
    model.__class__ = type("Unknown", (type(model),), {})
    model.save(hub.folder / "you" / "unknown")
    shutil.copytree(hub.folder / "you" / "whole", hub.folder / "you" / "run" / "step-0000002")

    repos = (
        "you/whole",
        "you/damaged",
        "you/local",
        "you/unknown",
        "you/run",
        "someone/model",
        "you/missing",
    )
    code = f"""
        from files import UserError
        from patch import load_run
        for repo in {repos}:
            try:
                print(load_run(repo).source)
            except UserError as error:
                print(error)"""
    whole, damaged, local, unknown, run_folder, base, missing = python(code, hub.env)
    assert whole == "someone/model"
    assert "cannot be read as a whole checkpoint" in damaged
    assert damaged.endswith("hf download you/damaged ouroboros.safetensors --force-download")
    assert local.startswith("/home/you/base: no such folder here; it held the pretrained model of you/local")
    assert local.endswith("--model FOLDER or --model HUB_NAME (in Python: base=...)")
    assert "you/unknown: holds a Unknown, which this program does not know" in unknown
    for line in (run_folder, base):
        assert "this Hub repository is no run, for it has no ouroboros.safetensors at its top" in line
        assert line.endswith("hf upload YOU/NAME runs/NAME/step-N")
    assert missing.startswith("you/missing: no folder here and no model on the Hub that you may read")


# ---- Damage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "tokenizer.json"],
)
def test_a_flipped_bit_gives_a_model_and_tokens_or_one_line(name, pretrained):
    shard(pretrained)
    path = pretrained / name
    whole = path.read_bytes()
    rng = np.random.default_rng(0)

    def use():
        qwen = Qwen.from_pretrained(pretrained)
        tokenizer = load_tokenizer(pretrained, qwen.config.vocab_size)
        ids = torch.tensor([tokenizer.encode("doc1 doc1").ids])
        qwen(ids)
        qwen.generate(torch.tensor([[1, 2]]), 2)

    outcomes = set()
    for _ in range(50):
        flip_a_bit(path, rng)
        outcomes.add(works(use))
        path.write_bytes(whole)
    assert works(use)
    assert False in outcomes  # some flips do harm


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(pretrained):
    assert load_tokenizer(pretrained, 400).get_vocab_size() == 400
    with pytest.raises(UserError, match="has token 399, but the model knows 399 tokens"):
        load_tokenizer(pretrained, 399)


def test_a_stored_truncation_or_padding_of_a_tokenizer_is_passed_over(pretrained):
    tokenizer = Tokenizer.from_file(str(pretrained / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(pretrained / "tokenizer.json"))
    text = "doc1 doc2 doc3 doc4"
    assert load_tokenizer(pretrained).encode(text).ids == TOKENIZER.encode(text).ids


# ---- Random configurations -------------------------------------------------------------------------------


def test_random_configurations_work_or_say_in_one_line_why_not(tmp_path):
    rng = np.random.default_rng(0)

    def pick(*values):
        return values[rng.integers(len(values))]

    def random_config() -> Config:
        heads_of_a_group = pick(1, 2, 4, 6)
        kv_heads = pick(1, 2)
        return Config(
            vocab_size=pick(2, 33, 97),
            hidden_size=pick(8, 20, 32),
            intermediate_size=pick(8, 24),
            num_hidden_layers=pick(4, 5, 7),
            num_attention_heads=heads_of_a_group * kv_heads,
            num_key_value_heads=kv_heads,
            head_dim=pick(2, 4, 8),
            tie_word_embeddings=pick(True, False),
            attention_bias=pick(True, False),
        )

    def random_settings() -> dict:
        settings = dict(
            prelude=pick(None, None, 1, 2),
            coda=pick(None, None, 1, 2),
            recurrent=pick(None, None, 3),
            rank=pick(1, 2, 4, 9),
            depth=pick(1, 1, 2, 3, 5, 0),
            pool=pick("prefix", "sequence"),
            modulation=pick("controller", "static", "none"),
            gate=pick(True, False),
            step_norm=pick(True, False),
        )
        if pick(True, False):
            settings["seams"] = pick(True, False)
            settings["train_coda"] = pick("none", "norms", "lora", "all")
        return settings

    def use(folder, config, settings, B, T):
        base = folder_of(small_qwen(seed=1, config=config), folder / "base")
        model = looped(Qwen.from_pretrained(base), **settings)
        move_trained_weights(model, 0.01)
        ids = tokens(B, T, vocabulary=config.vocab_size)
        loss = model.loss(ids, ids)
        assert torch.isfinite(loss)
        if model.trained_parameters():
            loss.backward()
        model.save(folder)
        assert torch.equal(load_run(folder)(ids), model(ids))
        assert torch.equal(model.generate(ids, 3), greedy_without_cache(model, ids, 3))

    worked = 0
    for n in range(60):
        folder = tmp_path / str(n)
        worked += works(use, folder, random_config(), random_settings(), pick(1, 3), pick(1, 2, 17))
    assert 20 < worked < 60
