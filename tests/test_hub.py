"""Models, runs and texts of the Hub: fetched once, found offline, and one line where that fails.

A server on this machine takes the place of the Hub. The Hub's own client asks it.
"""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from helpers import shard, small_tokenizer, write_shard
from huggingface_hub import constants
from test_train import assert_same_end, command, losses, newest_step, refusal, resume
from test_train import short_end as short_end  # fixtures that the tests use
from test_train import trained as trained

import sample
import train
from data import FINEWEB, GPT2, GPT2_END_OF_TEXT, FineWebEdu
from evaluate import open_run
from qwen import Qwen
from support.run import read_log

COMMIT = "c0ffee" + 34 * "0"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
FILES = ["config.json", *SHARDS, "model.safetensors.index.json", "tokenizer.json"]


class Answer(BaseHTTPRequestHandler):
    """The answer to one request to the Hub. server.folder holds OWNER/REPOSITORY/FILE."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """The requests are not printed."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = re.sub("^(/api)?(/models|/datasets)?", "", self.path.partition("?")[0])
        repo, wanted, name = re.fullmatch("/([^/]+/[^/]+)/(revision|tree|resolve)/[^/]+/?(.*)", path).groups()
        folder = self.server.folder / repo
        if not (folder / name).exists():
            missing = "EntryNotFound" if folder.exists() else "RepoNotFound"
            return self.answer(404, b"", {"X-Error-Code": missing})
        if wanted == "resolve":
            return self.send_file(name, (folder / name).read_bytes())
        files = [
            {"type": "file", "path": f.name, "oid": f.name, "size": f.stat().st_size}
            for f in folder.iterdir()
        ]
        siblings = [{"rfilename": file["path"]} for file in files]
        content = files if wanted == "tree" else {"id": repo, "sha": COMMIT, "siblings": siblings}
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send_file(self, name: str, content: bytes):
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{name}-{len(content)}"'}
        if self.command == "GET":
            self.server.sent.append(name)
        self.answer(200, content, headers)

    def answer(self, code: int, content: bytes, headers: dict):
        self.send_response(code)
        for key, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(pretrained, tmp_path, monkeypatch):
    """A Hub with a sharded model, GPT-2's tokenizer and FineWeb-Edu's token shards, all small.

    hub.sent: the files whose content was asked for.
    """
    folder = tmp_path / "hub"
    model = shard(Path(shutil.copytree(pretrained, folder / "someone" / "model")))
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    gpt2 = small_tokenizer(350)
    content = json.loads(gpt2.to_str())
    content["model"]["vocab"]["<|endoftext|>"] = content["added_tokens"][0]["id"] = GPT2_END_OF_TEXT
    (folder / GPT2).mkdir(parents=True)
    (folder / GPT2 / "tokenizer.json").write_text(json.dumps(content))
    (folder / FINEWEB).mkdir(parents=True)
    for name, word in (("train_000001", "été"), ("train_000002", "été"), ("val_000000", "日本")):
        documents = [[GPT2_END_OF_TEXT, *gpt2.encode(f"{word} {n} " * 20).ids] for n in range(90)]
        write_shard(folder / FINEWEB / f"finewebedu_{name}.bin", sum(documents, []))

    hub = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    hub.folder, hub.sent = folder, []
    place = f"http://127.0.0.1:{hub.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", place)
    template = place + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's tries
    threading.Thread(target=hub.serve_forever, args=[0.01], daemon=True).start()
    yield hub
    close(hub)


def close(hub):
    hub.shutdown()
    hub.server_close()


def test_a_sharded_model_is_fetched_once_and_found_offline(hub, pretrained, trained, monkeypatch, capsys):
    model = Qwen.from_pretrained("someone/model")
    assert sorted(hub.sent) == FILES  # each once, and nothing else
    expected = Qwen.from_pretrained(pretrained).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    online = trained("online", "--model", "someone/model")
    assert sorted(hub.sent) == FILES
    close(hub)
    assert_same_end(online, trained("without a network", "--model", "someone/model"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same_end(online, trained("offline", "--model", "someone/model"))


def test_what_the_hub_does_not_have_and_a_hub_out_of_reach_are_one_line(hub, pretrained, capsys, monkeypatch):
    for argv, expected in (
        ("--model someone/nothing", "someone/nothing: no folder here, and no model on the Hub"),
        ("--resume someone/nothing", "someone/nothing: no folder here, and no model on the Hub"),
        ("--resume someone/model", "ouroboros.safetensors: no such file"),
        ("--model some:one/model", "some:one/model: no such folder"),
    ):
        assert expected in refusal(capsys, train.main, *command(pretrained, *argv.split()))
    close(hub)
    shutil.rmtree(constants.HF_HUB_CACHE)
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        line = refusal(capsys, train.main, *command(pretrained, "--model", "someone/model"))
        assert "someone/model: could not be fetched from the Hub" in line


def test_a_run_on_the_hub_is_opened_sampled_and_resumed_into_a_new_folder(hub, trained, tmp_path, capsys):
    run = trained("run", "--model", "someone/model")
    shutil.copytree(run / "step-0000004", hub.folder / "you" / "run")
    hub.sent.clear()
    ids = torch.arange(20)[None]
    assert torch.equal(open_run("you/run")(ids), open_run(run)(ids))
    capsys.readouterr()
    sample.main(["you/run", "--prompt", "doc1", "--max-new-tokens", "3"])
    assert capsys.readouterr().out.startswith("doc1")
    resume("you/run", "--steps", 6, "--out", tmp_path / "new")
    assert hub.sent == ["ouroboros.safetensors"]  # not the model card
    resume(run, "--steps", 6)
    assert newest_step(tmp_path / "new") == 6
    assert [row["loss"] for row in read_log(tmp_path / "new")] == losses(run)[4:]


def test_fineweb_edu_is_fetched_shard_by_shard_and_each_once(hub, trained):
    one = trained("one", "--data", "fineweb-edu")
    assert_same_end(one, trained("two", "--data", "fineweb-edu"))
    assert sorted(hub.sent) == ["finewebedu_train_000001.bin", "finewebedu_val_000000.bin", "tokenizer.json"]
    documents = [document for document in next(FineWebEdu().chunks("held-out")) if document]
    assert documents == [f"日本 {n} " * 20 for n in range(90)]
