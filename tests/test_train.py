"""The loop: what must not change its gradients, what a run leaves behind, how it stops and goes on, what it refuses."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bins_loss  # noqa: F401  a fork whose losses enter the trainer
import pytest
import torch
from conftest import byte_level, metaspace, tiny_llama, tiny_qwen
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import gold_buffer
import gold_eval
import gold_train
from gold_train import Config, Ranks

ROOT = Path(gold_train.__file__).parent
ALONE = Ranks(0, 0, 1, 1, torch.device("cpu"))
CLOCKS = ("timing/", "perf/")


def save(folder: Path, model, tokenizer) -> str:
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A student, a teacher with its tokenizer, and one with another."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "student": save(folder / "student", tiny_qwen(len(byte_level())), byte_level()),
        "same": save(folder / "same", tiny_llama(len(byte_level()), seed=1), byte_level()),
        "cross": save(folder / "cross", tiny_llama(len(metaspace()), seed=2), metaspace()),
    }


def write_rows(path: Path, answer, n: int = 40) -> str:
    rows = [{"prompt": f"What is {a} + {a + 3}?", "completion": answer(a)} for a in range(n)]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Answers of very different lengths: micro-batches and ranks get unequal numbers of tokens."""
    words = lambda a: f"It is {2 * a + 3}." + " Let us count again." * (a % 5)
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", words)


def config(models, data, out, teacher: str | None = "cross", **changes) -> Config:
    basic = Config(
        student_model=models["student"], teacher_model=teacher and models[teacher], dataset=data, output_dir=str(out),
        max_length=80, max_completion_length=24, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        max_steps=2, learning_rate=1e-3, seed=5,
    )  # fmt: skip
    return dataclasses.replace(basic, **changes)


def command(cfg: Config) -> list[str]:
    """The same configuration as flags."""
    flags = []
    for field in dataclasses.fields(cfg):
        value, name = getattr(cfg, field.name), field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return flags


def start(cfg: Config, ranks: int = 1) -> subprocess.Popen:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    # as many threads as this process has: sums in another order would not be bitwise equal
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(
        [*launcher, str(ROOT / "gold_train.py"), *command(cfg)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(cfg: Config, ranks: int = 1) -> str:
    process = start(cfg, ranks)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    return output


def metrics(out) -> list[dict]:
    """Lines of metrics.jsonl without what a clock decides."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in rows]


def weights(out) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(out) / "checkpoints" / "latest" / "model.safetensors")


# ----------------------------------------------------------------------------------------------------------------------
# gradients


@pytest.mark.parametrize("teacher", ["same", "cross"])
def test_the_gradient_does_not_depend_on_micro_batches_or_ranks(models, data, tmp_path, teacher):
    """One window of 16 completions, on- and off-policy, as 1 to 8 micro-batches on 1 or 2 ranks (real torchrun)."""
    seen = {}
    for steps in (1, 2, 4, 8):
        cfg = config(
            models, data, tmp_path / f"acc{steps}", teacher, per_device_train_batch_size=16 // steps,
            gradient_accumulation_steps=steps, max_steps=1, ce_weight=0.5,
        )  # fmt: skip
        gold_train.train(cfg, ALONE)
        seen[f"accumulation {steps}"] = metrics(cfg.output_dir)[0]
    cfg = config(models, data, tmp_path / "ranks", teacher, ce_weight=0.5, max_steps=1)
    run(cfg, ranks=2)
    seen["2 ranks"] = metrics(cfg.output_dir)[0]
    for ranks in (1, 2):  # the longest row alone fills a micro-batch, of short ones four do
        limited = {"max_tokens_per_micro_batch": 100, "output_dir": str(tmp_path / f"tokens{ranks}")}
        run(dataclasses.replace(cfg, **limited, gradient_accumulation_steps=4 // ranks), ranks)
        seen[f"by tokens, {ranks} ranks"] = metrics(limited["output_dir"])[0]
    first = seen["accumulation 1"]
    assert first["actor/grad_norm"] > 0.01 and first["gold/on_policy_ratio"] == 0.5 and first["actor/ce_loss"] > 0
    for name, row in seen.items():
        for key in ("actor/grad_norm", "actor/loss", "actor/jsd_loss", "actor/ce_loss", "actor/entropy"):
            assert row[key] == pytest.approx(first[key], rel=1e-5), (name, key)
        assert row["num_tokens"] == first["num_tokens"], name


def test_gradients_travel_between_ranks_once_per_window(models, data, tmp_path, monkeypatch):
    """DDP would reduce them in every backward pass."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    reduced = []

    def counting(state, bucket):
        reduced.append(bucket.index())
        return allreduce_hook(state, bucket)

    class Wrapped(gold_train.DistributedDataParallel):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_comm_hook(None, counting)

    monkeypatch.setattr(gold_train, "DistributedDataParallel", Wrapped)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    gold_train.train(config(models, data, tmp_path / "out", max_steps=3, gradient_accumulation_steps=4), ALONE)
    assert not torch.distributed.is_initialized()
    assert reduced.count(0) == 3  # windows, not micro-batches


def test_a_teacher_that_is_the_student_teaches_nothing(models, data, tmp_path):
    cfg = config(models, data, tmp_path / "out", "student", max_steps=1)
    gold_train.train(cfg, ALONE)
    (row,) = metrics(cfg.output_dir)
    assert abs(row["actor/jsd_loss"]) < 1e-6 and row["actor/grad_norm"] < 1e-4


def test_held_out_rows_may_be_fewer_than_ranks(models, data, tmp_path):
    """One row, two ranks (real torchrun): the same loss as on one rank, and nobody waits for ever."""
    for teacher in ("cross", None):
        alone = {} if teacher else {"lmbda": 0.0, "ce_weight": 1.0}
        rows = []
        for ranks in (1, 2):
            cfg = config(
                models, data, tmp_path / f"{teacher}{ranks}", teacher, eval_ratio=0.02, eval_steps=1, max_steps=2,
                per_device_train_batch_size=8 // ranks, learning_rate=0.0, **alone,
            )  # fmt: skip
            run(cfg, ranks)
            rows.append([row["eval/heldout_loss"] for row in metrics(cfg.output_dir)])
        assert rows[0] == pytest.approx(rows[1], rel=1e-5) and min(rows[0]) > 0


IN_TURN = """
import sys, time
import gold_train

ranks = gold_train.setup_ranks()

def load():
    for word in ("begins", "ends"):
        with open(sys.argv[1], "a") as file:
            file.write(f"{ranks.rank} {word}\\n")
        time.sleep(0.3)
    return ranks.rank

assert gold_train.in_turn(ranks, load) == ranks.rank
"""


def test_ranks_of_a_node_load_one_after_the_other_also_without_a_gpu(tmp_path):
    """A model in the host's memory once, a data set prepared by one rank and found by the next (real torchrun)."""
    (tmp_path / "load.py").write_text(IN_TURN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, tmp_path / "load.py", tmp_path / "log"], env=environment, check=True, timeout=120)
    assert (tmp_path / "log").read_text().splitlines() == ["0 begins", "0 ends", "1 begins", "1 ends"]


def test_gradient_checkpointing_changes_memory_only(models, data, tmp_path):
    rows = []
    for on in (False, True):
        cfg = config(models, data, tmp_path / str(on), gradient_checkpointing=on)
        gold_train.train(cfg, ALONE)
        rows.append(metrics(cfg.output_dir))
    for a, b in zip(*rows):
        assert a["actor/grad_norm"] == pytest.approx(b["actor/grad_norm"], rel=1e-6)


@pytest.mark.parametrize("teacher", ["same", "cross"])
def test_bf16_passes_over_fp32_weights_give_nearly_the_same_gradient(models, data, tmp_path, teacher):
    """And the weights stay fp32."""
    rows = []
    for dtype in ("fp32", "bf16"):
        cfg = config(models, data, tmp_path / dtype, teacher, dtype=dtype, lmbda=0.0, max_steps=1)
        gold_train.train(cfg, ALONE)
        rows += metrics(cfg.output_dir)
    assert rows[0]["actor/loss"] != rows[1]["actor/loss"] == pytest.approx(rows[0]["actor/loss"], rel=0.02)
    assert rows[1]["actor/grad_norm"] == pytest.approx(rows[0]["actor/grad_norm"], rel=0.05)
    assert {value.dtype for value in weights(tmp_path / "bf16").values()} == {torch.float32}


@pytest.mark.parametrize("loss", ["alm", "hybrid", "uld", "bins", "bins+alm"])  # two are a fork's
def test_every_cross_tokenizer_loss_trains(models, data, tmp_path, loss):
    """From a random student towards a random teacher, the loss of the same held-out answers goes down."""
    cfg = config(
        models, data, tmp_path / "out", cross_tokenizer_loss=loss, max_steps=12, eval_ratio=0.2, eval_steps=1,
        learning_rate=3e-3,
    )  # fmt: skip
    gold_train.train(cfg, ALONE)
    held = [row["eval/heldout_loss"] for row in metrics(cfg.output_dir)]
    assert len(held) == 12 and held[-1] < 0.9 * held[0]


# ----------------------------------------------------------------------------------------------------------------------
# on-policy and off-policy


def test_with_lmbda_1_the_data_sets_answers_change_nothing(models, tmp_path):
    outs = []
    for name, answer in (
        ("a", lambda a: "yes " * (1 + a % 7)),
        ("b", lambda a: f"{a} is no answer"),
        ("c", lambda a: None),
    ):
        cfg = config(models, write_rows(tmp_path / f"{name}.jsonl", answer), tmp_path / name, lmbda=1.0)
        gold_train.train(cfg, ALONE)
        outs.append(cfg.output_dir)
    assert metrics(outs[0]) == metrics(outs[1]) == metrics(outs[2])
    for name, value in weights(outs[0]).items():
        assert torch.equal(value, weights(outs[1])[name]) and torch.equal(value, weights(outs[2])[name])


def test_with_lmbda_0_nothing_is_sampled(models, data, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a sampler was made")

    monkeypatch.setattr(gold_buffer, "HFSampler", never)
    cfg = config(models, data, tmp_path / "out", lmbda=0.0)
    gold_train.train(cfg, ALONE)
    assert [row["gold/on_policy_ratio"] for row in metrics(cfg.output_dir)] == [0.0, 0.0]


@pytest.mark.parametrize("lmbda", [0.1, 0.3, 0.5, 0.77, 1.0])
def test_the_logged_ratio_is_lmbda_to_within_one_prompt(models, data, tmp_path, lmbda):
    cfg = config(models, data, tmp_path / "out", "same", lmbda=lmbda, max_steps=5, max_completion_length=4)
    gold_train.train(cfg, ALONE)
    ratios = [row["gold/on_policy_ratio"] for row in metrics(cfg.output_dir)]
    assert all(abs(ratio - lmbda) < 1 / 8 + 1e-9 for ratio in ratios)
    assert abs(sum(ratios) / 5 - lmbda) < 1 / 40 + 1e-9


def test_drift_is_zero_up_to_rounding_and_staleness_is_the_lag(models, data, tmp_path):
    for lag in (0, 1, 2):
        cfg = config(models, data, tmp_path / str(lag), lag=lag, lmbda=1.0, max_steps=5, learning_rate=1e-2)
        gold_train.train(cfg, ALONE)
        rows = metrics(cfg.output_dir)
        assert [row["gold/staleness"] for row in rows] == [min(lag, i) for i in range(5)]
        drift = [row["gold/drift"] for row in rows]
        if lag == 0:
            assert max(drift) < 1e-5
        else:
            assert max(drift[:1]) < 1e-5 < 1e-3 < min(drift[1:])


def test_num_generations_takes_one_prompt_many_times(models, data, tmp_path):
    cfg = config(models, data, tmp_path / "out", num_generations=4, lmbda=1.0, max_steps=1)
    gold_train.train(cfg, ALONE)
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len({s["prompt"] for s in samples}) == 1 and len({s["completion"] for s in samples}) > 1


@pytest.mark.parametrize("teacher, seq_kd", [("cross", False), ("cross", True), ("same", False)])
def test_no_tokenizer_is_used_by_two_threads(models, data, tmp_path, monkeypatch, teacher, seq_kd):
    """Encoding changes a tokenizer's flags: what the sampler's thread has once used is its own and the aligner's, which
    it waits for before it uses it again."""
    used, of_thread, foreign, given, aligned = {}, set(), [], [], []

    class Aligner(ThreadPoolExecutor):
        def submit(self, *args):
            given.append(super().submit(*args))
            return given[-1]

    def watched(name):
        real = getattr(PreTrainedTokenizerFast, name)

        def method(self, *args, **kwargs):
            used[id(self)] = self  # kept: an id must not come back
            here = threading.current_thread().name
            if here == "sampler":
                of_thread.add(id(self))
                if not all(future.done() for future in given):
                    foreign.append((name, "before the aligner was done"))
            elif here.startswith("aligner"):
                aligned.append(name)
            elif id(self) in of_thread:
                foreign.append((name, here))
            return real(self, *args, **kwargs)

        return method

    for name in ("__call__", "decode", "apply_chat_template", "save_pretrained", "convert_ids_to_tokens"):
        monkeypatch.setattr(PreTrainedTokenizerFast, name, watched(name))
    monkeypatch.setattr(gold_buffer, "ThreadPoolExecutor", Aligner)
    cfg = config(
        models, data, tmp_path / "out", teacher, lag=1, max_steps=3, save_steps=1, eval_ratio=0.2,
        eval_steps=1, seq_kd=seq_kd, max_completion_length=8,
    )  # fmt: skip
    gold_train.train(cfg, ALONE)
    assert len(of_thread) == 2 and not foreign and len(used) >= 3 and aligned


def test_a_run_and_its_resume_write_the_day_on_which_the_run_began(models, tmp_path, monkeypatch, data):
    dated = AutoTokenizer.from_pretrained(models["student"])
    dated.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + dated.chat_template
    (tmp_path / "dated").mkdir()
    student = save(tmp_path / "dated" / "student", tiny_qwen(len(dated)), dated)

    monkeypatch.setattr(gold_train, "SAMPLE_STEPS", 1)

    def on(day):
        monkeypatch.setattr(gold_train, "date", type("", (), {"today": staticmethod(lambda: day)}))

    cfg = config(models | {"student": student}, data, tmp_path / "out", "same", max_completion_length=4)
    on("2026-01-31")
    gold_train.train(dataclasses.replace(cfg, max_steps=4, output_dir=str(tmp_path / "whole")), ALONE)
    cfg = dataclasses.replace(cfg, max_steps=4, save_steps=2)

    class Stop(Exception):
        pass

    monkeypatch.setattr(gold_train, "SAMPLE_STEPS", 1)
    real = gold_train.save_checkpoint
    monkeypatch.setattr(gold_train, "save_checkpoint", lambda *args: (real(*args), (_ for _ in ()).throw(Stop)))
    with pytest.raises(Stop):
        gold_train.train(cfg, ALONE)
    monkeypatch.setattr(gold_train, "save_checkpoint", real)
    on("2026-02-01")
    gold_train.train(dataclasses.replace(cfg, resume=True), ALONE)
    prompts = [row["prompt"] for row in gold_eval.read_jsonl(tmp_path / "out" / "samples.jsonl")]
    assert len(prompts) >= 12 and all(prompt.startswith("2026-01-31") for prompt in prompts)
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")
    saved = AutoTokenizer.from_pretrained(tmp_path / "out" / "checkpoints" / "latest")
    assert saved.init_kwargs["chat_date"] == "2026-01-31", "its evaluation writes that day too"


def test_a_run_whose_rows_have_changed_is_not_gone_on_with(models, tmp_path):
    cfg = config(models, write_rows(tmp_path / "r.jsonl", str), tmp_path / "out", max_completion_length=4)
    gold_train.train(cfg, ALONE)
    write_rows(tmp_path / "r.jsonl", lambda a: str(a + 1))  # as many as before
    with pytest.raises(SystemExit, match="another run.*rows_hash"):
        gold_train.train(dataclasses.replace(cfg, resume=True), ALONE)


def test_odd_rows_cost_a_run_nothing_but_themselves(models, tmp_path, capsys):
    path = Path(write_rows(tmp_path / "r.jsonl", lambda a: None if a % 4 == 1 else f"It is {a}.", n=20))
    odd = [{"messages": [{"role": "tool", "content": "x"}]}, {"prompt": "long " * 80, "completion": "x"}, {"text": "x"}]
    path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in odd))
    cfg = config(models, str(path), tmp_path / "out", "cross", max_steps=None, max_completion_length=4)
    gold_train.train(cfg, ALONE)
    assert metrics(cfg.output_dir)[-1]["step"] == 2  # 15 rows
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("data: 23 rows, 15 for training"))
    for part in (
        "1 empty prompt (line 21:",
        "1 prompt longer",
        "1 columns of no known schema",
        "5 without a completion (line 2:",
    ):
        assert part in line


def test_epochs_decide_the_number_of_steps(models, data, tmp_path):
    """40 rows, 8 completions a window: 5 windows an epoch whatever lmbda is, for one generation per prompt."""
    cfg = config(models, data, tmp_path / "out", "same", max_steps=None, num_train_epochs=1.5, max_completion_length=4)
    gold_train.train(cfg, ALONE)
    assert metrics(cfg.output_dir)[-1]["step"] == 8  # 60 rows


# ----------------------------------------------------------------------------------------------------------------------
# stopping and going on


@pytest.mark.parametrize("lag", [0, 1])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(models, data, tmp_path, lag):
    cfg = config(models, data, tmp_path / "whole", max_steps=9, save_steps=3, lag=lag)
    gold_train.train(cfg, ALONE)
    cut = dataclasses.replace(cfg, output_dir=str(tmp_path / "cut"), max_steps=9)
    process, path = start(cut), tmp_path / "cut" / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < 5:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(path.read_text().splitlines())
    assert done < 9, "killed too late to show anything"
    with path.open("a") as file:
        file.write('{"step": 7, "actor/lo')  # a torn line
    gold_train.train(dataclasses.replace(cut, resume=True), ALONE)
    assert metrics(cut.output_dir) == metrics(cfg.output_dir)
    for name in ("samples.jsonl",):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()
    for name, value in weights(cfg.output_dir).items():
        assert torch.equal(value, weights(cut.output_dir)[name]), name


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(models, data, tmp_path, monkeypatch):
    cfg = config(models, data, tmp_path / "out", max_steps=4, save_steps=2)
    real, calls = torch.save, []

    def full_disk(state, path):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError("No space left on device")
        real(state, path)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        gold_train.train(cfg, ALONE)
    latest = tmp_path / "out" / "checkpoints" / "latest"
    assert latest.resolve().name == "step-000002"
    monkeypatch.undo()
    gold_train.train(dataclasses.replace(cfg, resume=True), ALONE)
    assert latest.resolve().name == "step-000004"


def test_only_the_newest_checkpoints_are_kept_and_transformers_loads_them(models, data, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cfg = config(models, data, tmp_path / "out", max_steps=5, save_steps=1, save_total_limit=2)
    gold_train.train(cfg, ALONE)
    folder = tmp_path / "out" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-000004", "step-000005"]
    model, tokenizer = (kind.from_pretrained(folder / "latest") for kind in (AutoModelForCausalLM, AutoTokenizer))
    before = AutoModelForCausalLM.from_pretrained(models["student"])
    assert model.config.model_type == before.config.model_type and tokenizer.chat_template
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lmbda": 0.75}, r"lmbda.*0.5 -> 0.75"),
        ({"eval_ratio": 0.3}, r"eval_ratio.*0.0 -> 0.3.*rows_hash"),
        ({"per_device_train_batch_size": 2}, r"window.*8 -> 4"),
        ({"beta": 0.3}, r"beta.*0.5 -> 0.3"),
        ({"weight_decay": 0.1}, r"weight_decay"),
    ],
)
def test_resume_refuses_to_become_another_run(models, data, tmp_path, change, message):
    cfg = config(models, data, tmp_path / "out", max_completion_length=4)
    gold_train.train(cfg, ALONE)
    with pytest.raises(SystemExit, match=message):
        gold_train.train(dataclasses.replace(cfg, resume=True, **change), ALONE)


def test_a_run_killed_before_its_first_checkpoint_can_be_started_again(models, data, tmp_path, monkeypatch):
    """And nothing of it is mixed into the new one."""
    cfg = config(models, data, tmp_path / "out", max_steps=4, seq_kd=True)

    def killed(*args, **kwargs):
        (tmp_path / "out" / "checkpoints" / ".step-000004").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(gold_train, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        gold_train.train(cfg, ALONE)
    monkeypatch.undo()
    other = dataclasses.replace(cfg, dataset=write_rows(tmp_path / "other.jsonl", str), seed=6)
    gold_train.train(other, ALONE)
    fresh = dataclasses.replace(other, output_dir=str(tmp_path / "fresh"))
    gold_train.train(fresh, ALONE)
    assert metrics(other.output_dir) == metrics(fresh.output_dir)


# ----------------------------------------------------------------------------------------------------------------------
# records


@pytest.fixture(scope="module")
def evaluated(models, data, tmp_path_factory) -> Path:
    """A run with everything that can be recorded; its evaluations are late on purpose (a slow child)."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    cfg = config(
        models, data, out, max_steps=6, eval_steps=2, eval_tasks=(f"ppl={data}",), eval_policy="wait",
        eval_max_samples=8, save_best="ppl/bits_per_byte", wandb_mode="offline", save_steps=3,
    )  # fmt: skip
    gold_train.train(cfg, ALONE)
    return out


def test_a_run_folder_is_complete(evaluated):
    names = {path.name for path in evaluated.iterdir()}
    assert {"config.json", "environment.json", "metrics.jsonl", "samples.jsonl", "eval.jsonl", "checkpoints"} <= names
    environment = json.loads((evaluated / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__ and len(
        environment["commit"].removesuffix("-dirty")
    ) in (0, 40)
    assert Config(**json.loads((evaluated / "config.json").read_text())).seed == 5
    text = gold_train.run_report(evaluated, {})
    assert "student before" in text and "student after 6 steps" in text and "teacher" in text
    assert (evaluated / "curves.png").stat().st_size > 10_000 and (evaluated / "report.md").read_text() == text


def test_every_metric_of_the_design_is_logged(evaluated):
    row = json.loads((evaluated / "metrics.jsonl").read_text().splitlines()[-1])
    expected = """step num_tokens gold/on_policy_ratio gold/beta gold/lmbda gold/temperature gold/staleness gold/drift
        actor/loss actor/jsd_loss actor/ce_loss actor/on_policy_loss actor/off_policy_loss actor/entropy actor/grad_norm
        actor/lr align/coverage align/one_to_one align/largest_span response_seq_len/mean response_seq_len/min
        response_seq_len/max response_seq_len/truncated timing/generate timing/sync timing/teacher timing/train
        timing/wait timing/step timing/other perf/tokens_per_s align/unscored align/unwritten actor/skipped"""
    assert set(expected.split()) == set(row)
    assert all(isinstance(value, (int, float)) for value in row.values())
    readme = (ROOT / "README.md").read_text()
    assert [name for name in row if f"`{name}`" not in readme] == []


def read_wandb(path: Path) -> list[dict]:
    """History rows of an offline run's file: records in LevelDB's log format behind 7 bytes of heading."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts, rows = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no record begins in the last bytes of a block
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]  # kinds: full, first, middle, last
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return rows


def test_wandb_has_every_training_row_and_every_late_evaluation_at_its_own_step(evaluated):
    """The offline file is read back record by record: nothing was dropped for coming late."""
    pytest.importorskip("wandb")
    (path,) = evaluated.glob("wandb/offline-run-*/run-*.wandb")
    rows = read_wandb(path)
    trained = [json.loads(line) for line in (evaluated / "metrics.jsonl").read_text().splitlines()]
    seen = {row["train/step"]: row for row in rows if "actor/loss" in row}
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]
    for row in trained:
        assert all(seen[row["step"]][k] == pytest.approx(v) for k, v in row.items() if k != "step")
    records = [r for r in gold_eval.read_jsonl(evaluated / "eval.jsonl") if r["status"] == "ok"]
    assert [r["step"] for r in records] == [None, 0, 2, 4, 6]
    evals = [row for row in rows if "actor/loss" not in row]
    assert [row["eval/step"] for row in evals] == [0, 0, 2, 4, 6]
    for record, row in zip(records[1:], evals[1:]):
        assert row["eval/ppl/bits_per_byte"] == pytest.approx(record["results"]["ppl"]["bits_per_byte"])


def test_save_best_keeps_the_weights_that_scored_best(evaluated, data):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    records = [r for r in gold_eval.read_jsonl(evaluated / "eval.jsonl") if r["status"] == "ok" and r["step"]]
    best = min(records, key=lambda r: r["results"]["ppl"]["bits_per_byte"])
    note = json.loads((evaluated / "best" / "metric.json").read_text())
    assert note["step"] == best["step"] and not (evaluated / "candidates").exists()
    model, tokenizer = (kind.from_pretrained(evaluated / "best") for kind in (AutoModelForCausalLM, AutoTokenizer))
    again = gold_eval.evaluate(model, tokenizer, [f"ppl={data}"], max_samples=8, seed=5)["ppl"]["bits_per_byte"]
    assert again == pytest.approx(best["results"]["ppl"]["bits_per_byte"], rel=1e-6)


def test_early_stop_ends_a_run_that_gets_no_better(models, data, tmp_path):
    """Learning rate 0: the first evaluation is the best one, the second is no better."""
    cfg = config(
        models, data, tmp_path / "out", "same", learning_rate=0.0, max_steps=200, eval_steps=1, eval_policy="wait",
        eval_tasks=(f"ppl={data}",), eval_max_samples=4, save_best="ppl/bits_per_byte", early_stop=1,
        max_completion_length=4,
    )  # fmt: skip
    gold_train.train(cfg, ALONE)
    last = metrics(cfg.output_dir)[-1]["step"]
    assert 2 <= last < 200
    assert (tmp_path / "out" / "checkpoints" / "latest").resolve().name == f"step-{last:06d}"


def test_a_failing_evaluation_is_recorded_and_does_not_stop_training(models, data, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", lambda a: "an answer", n=50)
    cfg = config(models, data, tmp_path / "out", eval_tasks=(f"ppl={other}",), eval_timeout=0.01, eval_max_samples=4)
    assert gold_train.train(cfg, ALONE) is True
    assert {r["status"] for r in gold_eval.read_jsonl(tmp_path / "out" / "eval.jsonl")} == {"timeout"}


# ----------------------------------------------------------------------------------------------------------------------
# the command line


def call(monkeypatch, capsys, *flags: str) -> tuple[int, str]:
    """(exit code, what was written to stderr) of gold_train.py with these flags, in this process."""
    monkeypatch.setattr(sys, "argv", ["gold_train.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        gold_train.main()
    text = capsys.readouterr()
    if isinstance(stopped.value.code, str):  # what the interpreter does with it
        return 1, stopped.value.code
    return stopped.value.code, text.err + text.out


BAD = {
    "unknown flag": (("--lamda", "0.5"), r"--lmbda"),
    "a share above 1": (("--lmbda", "1.5"), r"lmbda must be in \[0, 1\]: got 1.5"),
    "a window that does not divide": (("--num-generations", "3"), r"4 x .* = 8 completions, num_generations 3 of each"),
    "beta outside": (("--beta", "1.2"), r"beta .*1.2"),
    "a missing model": (("--student-model", "no/such-model"), r"'no/such-model' is neither a directory"),
    "a missing teacher": (("--teacher-model", "nowhere"), r"'nowhere' is neither a directory"),
    "an unknown subset": (("--subset", "nonsense"), r"nonsense"),
    "an unknown split": (("--dataset", "countdown", "--split", "tset"), r"tset"),
    "a slice that is none": (("--split", "train[5"), r"train\[5"),
    "a missing file": (("--dataset", "gone.jsonl"), r"gone.jsonl"),
    "no room for prompts": (("--max-completion-length", "80"), r"max_completion_length 80 .* max_length 80"),
    "prompts too long": (("--max-length", "30"), r"no usable row; dropped: 40 prompt .*raise --max-length"),
    "no cross-tokenizer loss": (("--cross-tokenizer-loss", "none"), r"different tokenizers .*choose"),
    "a GPU for evaluation that is not there": (("--eval-gpu", "3", "--eval-tasks", "ppl=x"), r"eval_gpu"),
    "an unknown task": (("--eval-tasks", "countdwn"), r"countdwn"),
    "a loss temperature that breaks products": (("--loss-temperature", "2"), r"loss_temperature must be 1"),
    "early stop without a metric": (("--early-stop", "2"), r"save_best"),
    "a best metric of no task": (("--eval-tasks", "ppl=x", "--save-best", "gsm8k/acc"), r"save_best gsm8k/acc"),
    "a device that is not there": (("--teacher-device", "cuda:9"), r"teacher_device: there is no device 'cuda:9'"),
    "a negative seed": (("--seed", "-1"), r"seed must be in"),
    "evaluation steps without evaluation": (("--eval-steps", "5"), r"nothing to evaluate"),
    "micro-batches without a row": (("--max-tokens-per-micro-batch", "79"), r"micro_batch 79 cannot hold .* 80"),
    "epochs without end": (("--num-train-epochs", "inf"), r"num_train_epochs must be in .*: got inf"),
    "a learning rate that is none": (("--learning-rate", "nan"), r"learning_rate must be in .*: got nan"),
    "options that are no JSON": (("--template-options", "enable_thinking"), r"template_options are JSON like"),
    "options that are a list": (("--template-options", "[1]"), r"options are JSON like .* not '\[1\]'"),
    "an option of no template": (("--template-options", '{"teacher": {"enable_thinking": 0}}'), r"no option enable"),
    "nothing to resume": (("--resume",), r"nothing to resume"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_before_training(models, data, tmp_path, monkeypatch, capsys, case):
    flags, message = BAD[case]
    code, text = call(monkeypatch, capsys, *command(config(models, data, tmp_path / "out")), *flags)
    assert code in (1, 2)
    plain = re.sub(r"\s+", " ", re.sub(r"[^\x20-\x7e]", " ", text))
    assert re.search(message, plain), text
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_bad_rows_are_named_with_their_line(models, tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comple\n')
    code, text = call(monkeypatch, capsys, *command(config(models, str(path), tmp_path / "out")))
    assert code in (1, 2) and "rows.jsonl" in text and re.search(r"line 2|:2", text)
    path.write_text("")
    code, text = call(monkeypatch, capsys, *command(config(models, str(path), tmp_path / "out")))
    assert code in (1, 2) and "rows.jsonl" in text
    path.write_text('{"prompt": "a"}\n')
    code, text = call(monkeypatch, capsys, *command(config(models, str(path), tmp_path / "out")))
    assert code in (1, 2) and "--lmbda 1" in text and "--seq-kd" in text


def test_a_run_is_never_overwritten(models, data, tmp_path, monkeypatch, capsys):
    cfg = config(models, data, tmp_path / "out", max_steps=1)
    gold_train.train(cfg, ALONE)
    code, text = call(monkeypatch, capsys, *command(cfg))
    assert code in (1, 2) and "--resume" in text and "--output-dir" in text


def sizes(hidden: int, layers: int, middle: int, heads: int, tied: bool) -> Qwen2Config:
    vocabulary = 151936 if tied else 152064
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": middle, "vocab_size": vocabulary}
    heads = {"num_attention_heads": heads, "num_key_value_heads": 2 if tied else 4}
    return Qwen2Config(**shape, **heads, tie_word_embeddings=tied)


def test_what_cannot_fit_on_a_gpu_is_one_line_with_numbers(monkeypatch, tmp_path):
    """Published shapes of Qwen2.5 beside a teacher of 7.6B on 85.5 GB, engine 0.3: 0.5B and 1.5B fit, 3B does not."""
    monkeypatch.setattr(gold_buffer, "choose_sampler", lambda name: ("vllm", ""))
    sizes(3584, 28, 18944, 28, False).save_pretrained(tmp_path)
    cfg = Config(student_model="s", teacher_model=str(tmp_path), dtype="bf16")
    assert gold_train.num_parameters(str(tmp_path), None) == 7_615_616_512
    with torch.device("meta"):
        shapes = {"0.5B": (896, 24, 4864, 14), "1.5B": (1536, 28, 8960, 12), "3B": (2048, 36, 11008, 16)}
        students = {name: Qwen2ForCausalLM(sizes(*shape, True)) for name, shape in shapes.items()}
    line = lambda name, ranks=ALONE, **changes: gold_train.budget(
        dataclasses.replace(cfg, **changes), ranks, students[name], 85.5e9
    )
    assert line("0.5B").startswith("memory: student with gradients and Adam 7.9, teacher 15.2, engine 25.6 of 85.5 GB;")
    assert "Adam 24.7, teacher 15.2" in line("1.5B")
    with pytest.raises(ValueError, match="does not fit .* Adam 49.4, .* 85.5 GB.*gradient-checkpointing.* --shard all"):
        line("3B")
    eight = Ranks(0, 0, 8, 8, torch.device("cpu"))
    assert "Adam 6.2, teacher 1.9" in line("3B", eight, shard="all", teacher_device="shard")
    assert "teacher" not in line("3B", teacher_device="cuda:7") and "engine" not in line("1.5B", lmbda=0.0)
    assert "weights of earlier steps 1.0" in line("0.5B", lag=1)
    for p in students["3B"].parameters():
        p.requires_grad_(False)  # as a fork may: no gradients, no Adam
    assert "Adam 12.3" in line("3B")


@pytest.mark.parametrize("teacher, changes", [("cross", {}), ("same", {"max_tokens_per_micro_batch": 200})])
def test_the_largest_micro_batch_comes_first_and_leaves_nothing(models, data, tmp_path, monkeypatch, teacher, changes):
    cfg, seen = config(models, data, tmp_path / "out", teacher, **changes), []
    started = gold_train.setup(cfg, ALONE, print)
    before = {k: v.clone() for k, v in started.student.state_dict().items()}
    loss = gold_train.micro_batch_loss
    monkeypatch.setattr(gold_train, "micro_batch_loss", lambda *args: seen.append(args[2]) or loss(*args))
    text = gold_train.rehearse(cfg, started, ALONE)
    rows = 2 if changes else 4
    assert text == f"memory: the largest micro-batch has {rows} x 80 tokens"
    (batch,) = seen
    assert batch.student_mask.sum(1).tolist() == [80] * rows and len(batch.scored) >= 20 * rows
    assert (batch.teacher_mask.sum(1) <= 80).all() and (batch.teacher_mask.sum(1) >= 60).all()
    assert all(p.grad is None or not p.grad.any() for p in started.student.parameters())
    assert all(torch.equal(before[k], v) for k, v in started.student.state_dict().items())
    started.buffer.close()
    started.records.close()


def test_the_flops_of_a_step_are_those_that_torch_counts():
    """But for norms, whose weights multiply as well, and attention, which torch counts without its causal half."""
    model, (rows, length, completion) = tiny_llama(500, seed=1), (3, 40, 10)
    ids = torch.arange(rows * length).view(rows, length)
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        (hidden[:, :completion].flatten(0, 1) @ model.get_output_embeddings().weight.T).sum().backward()
    table = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in table.items() if "attention" not in str(op))
    positions = rows * length
    ours = gold_train.student_flops(model, positions, rows * completion, 0)
    norms = 6 * positions * sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert ours - norms == products
    scores = gold_train.student_flops(model, positions, rows * completion, rows * length**2) - ours
    assert scores == 6 * model.config.num_hidden_layers * model.config.hidden_size * rows * length**2


def test_the_evaluation_gpu_must_be_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    ranks = Ranks(0, 0, 3, 3, torch.device("cuda", 0))
    assert gold_train.eval_device(Config(eval_gpu="auto"), ranks) == "cuda:3"
    assert gold_train.eval_device(Config(eval_gpu="same"), ranks) == "cuda:0"
    taken = {"teacher_device": "cuda:3", "eval_tasks": ("countdown",)}
    for cfg in (Config(eval_gpu="2"), Config(eval_gpu="7"), Config(eval_gpu="3", **taken), Config(**taken)):
        with pytest.raises(ValueError, match="is not free: .* fewer ranks, or choose --eval-gpu same .* or cpu"):
            gold_train.eval_device(cfg, ranks)
    gold_train.eval_device(Config(teacher_device="cuda:3"), ranks)  # no evaluation, no question
    assert gold_train.EMBEDDED.eval_gpu == "same"  # tiny models, on any machine


def test_help_explains_every_flag(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    code, text = call(monkeypatch, capsys, "--help")
    assert code == 0
    words = re.sub(r"[^\x21-\x7e]+", " ", text)
    source = (ROOT / "gold_train.py").read_text()
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in words, field.name
        (comment,) = re.findall(rf"^    {field.name}: .*?  # (.*)$", source, re.MULTILINE)
        assert re.sub(r"[^\x21-\x7e]+", " ", comment)[:40] in words, field.name


# ----------------------------------------------------------------------------------------------------------------------
# the embedded job


def test_the_embedded_job_ends_with_a_table_and_can_be_resumed(tmp_path, monkeypatch, capsys):
    """All its stages, much shorter."""
    monkeypatch.setattr(gold_train, "TEACHER_STEPS", 3)
    monkeypatch.setattr(gold_train, "STUDENT_STEPS", 2)
    out = tmp_path / "out"
    flags = ["--output-dir", str(out), "--max-steps", "2", "--eval-max-samples", "16"]
    monkeypatch.setattr(sys, "argv", ["gold_train.py", *flags])
    gold_train.main()
    text = capsys.readouterr().out
    assert re.search(r"\| model +\| correct \| accuracy", text)
    for name in ("teacher", "student before", "student after 2 steps", "answers alone"):
        assert f"| {name} " in text
    assert (out / "gold" / "report.md").exists() and (out / "gold" / "curves.png").exists()
    code, text = call(monkeypatch, capsys, *flags)
    assert code == 1 and "--resume" in text
    monkeypatch.setattr(sys, "argv", ["gold_train.py", *flags, "--resume"])
    gold_train.main()
    assert "| student after 2 steps " in capsys.readouterr().out
