"""A student, or a teacher, that is split over ranks, and several machines: what it must equal, hold, survive, refuse.

Starting ranks takes seconds, so each start makes many runs: see `start_ranks` and, at the end, what a rank does.
"""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_level, metaspace, tiny_llama, tiny_qwen
from test_train import ALONE, ROOT, command, config, metrics, save, weights, write_rows

import gold_buffer
import gold_loss
import gold_train
from gold_train import Config, Ranks

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TORCHDYNAMO_DISABLE": "1"}
ENVIRONMENT |= {"PYTHONPATH": f"{ROOT}:{ROOT}/tests:{ROOT}/forks"}
LAUNCHER = [sys.executable, "-m", "torch.distributed.run"]


def write_models(folder: Path) -> dict[str, str]:
    """Students with and without a tied head, and teachers; their heads' rows do not divide by 2 or 4."""
    one, other = byte_level(), metaspace()
    return {
        "tied": save(folder / "tied", tiny_qwen(len(one), hidden=64), one),
        "untied": save(folder / "untied", tiny_llama(len(one), hidden=64), one),
        "same": save(folder / "same", tiny_llama(len(one), seed=1), one),
        "tied teacher": save(folder / "tied-teacher", tiny_qwen(len(one), seed=3), one),
        "cross": save(folder / "cross", tiny_llama(len(other), seed=2), other),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Models, rows, and the run folders of this file."""
    folder = tmp_path_factory.mktemp("scale")
    words = lambda a: f"It is {2 * a + 3}." + " Let us count again." * (a % 5)
    write_rows(folder / "rows.jsonl", words)
    (folder / "models.json").write_text(json.dumps(write_models(folder)))
    return folder


def a_run(place: Path, out: str, ranks: int, student="untied", teacher="cross", accumulation=1, **changes) -> dict:
    """Configuration of a run of 16 completions per step, on any number of ranks."""
    models = json.loads((place / "models.json").read_text())
    size = 16 // ranks // accumulation
    basic = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 5}
    basic |= {"max_completion_length": 16, "ce_weight": 0.5}
    cfg = config(models | {"student": models[student]}, str(place / "rows.jsonl"), place / out, teacher)
    return dataclasses.asdict(dataclasses.replace(cfg, **basic | changes))


def start_ranks(place: Path, ranks: int, runs: list[dict], code: int = 0) -> None:
    """torchrun of this file: all runs, one after the other. A run is {"cfg", and what else `make_run` understands}."""
    listed = place / f"runs-{ranks}.json"
    listed.write_text(json.dumps(runs))
    launch = [*LAUNCHER, "--standalone", "--nproc-per-node", str(ranks), __file__, "runs", str(listed)]
    done = subprocess.run(launch, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-6000:]


def column(rows: list[dict], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


def same_numbers(place: Path, a: str, b: str, rel: float = 1e-5) -> None:
    """Losses and the gradient's norm of every step, and the held-out losses."""
    ours, theirs = metrics(place / a), metrics(place / b)
    assert len(ours) == len(theirs) >= 2 and ours[0]["actor/grad_norm"] > 0.1
    for name in ("actor/loss", "actor/jsd_loss", "actor/ce_loss", "actor/grad_norm", "eval/heldout_loss", "gold/drift"):
        close = pytest.approx(column(theirs, name), rel=rel, abs=2e-6 if name == "gold/drift" else None)
        assert column(ours, name) == close, (a, b, name)


def bytes_of(place: Path, out: str) -> dict[str, int]:
    """Bytes of parameters and optimizer that the rank with most of them holds."""
    found = [json.loads(path.read_text()) for path in place.glob(f"{out}.bytes-*.json")]
    return {name: max(x[name] for x in found) for name in ("parameters", "optimizer")}


# ----------------------------------------------------------------------------------------------------------------------
# equal to ranks that hold everything

KINDS = {  # any two of these choices meet in one of the four
    "tied, one tokenizer": ("tied", "same", 1),
    "tied, two tokenizers, accumulation": ("tied", "cross", 4),
    "one tokenizer, accumulation": ("untied", "same", 4),
    "two tokenizers": ("untied", "cross", 1),
}


LONG = {"max_steps": 8, "save_steps": 3, "shard": "all", "accumulation": 2, "student": "tied"}


@pytest.fixture(scope="module")
def two(place) -> Path:
    """All runs of the first start with 2 ranks; the last one kills itself."""
    runs = []
    for i, kind in enumerate(KINDS.values()):
        more = {"eval_ratio": 0.08, "eval_steps": 2, "gradient_checkpointing": i == 1}
        runs += [{"cfg": a_run(place, f"2-{i}-{over}", 2, *kind, shard=over, **more)} for over in ("none", "all")]
    runs += [{"cfg": a_run(place, f"2-way-d{i}", 2, *kind, shard="all", max_steps=1), "way": "D"}
             for i, kind in enumerate(KINDS.values()) if i in (0, 3)]  # fmt: skip
    for i, teacher in enumerate(("same", "tied teacher", "cross")):
        for where in (None, "shard"):
            cfg = a_run(place, f"2-teacher{i}-{where}", 2, "untied", teacher, 2, teacher_device=where, eval_ratio=0.08,
                        eval_steps=2, max_steps=2, shard="all" if where else "none")  # fmt: skip
            runs.append({"cfg": cfg})
    runs += [
        {"cfg": a_run(place, f"2-bf16-{over}", 2, dtype="bf16", shard=over, max_steps=2)} for over in ("none", "all")
    ]
    runs += [{"cfg": a_run(place, "2-evaluated", 2, **LONG, eval_tasks=("countdown-mini",), eval_steps=3)}]
    runs += [{"cfg": a_run(place, "2-whole", 2, **LONG)}]
    runs += [{"cfg": a_run(place, "2-cut", 2, **LONG), "kill": 5}]
    start_ranks(place, 2, runs, code=1)
    shutil.copytree(place / "2-cut", place / "2-cut-on-4", symlinks=True)
    return place


@pytest.fixture(scope="module")
def four(two) -> Path:
    """All runs with 4 ranks; the last one kills itself. "node": two nodes of two ranks."""
    runs, place = [], two
    for i, kind in enumerate(KINDS.values()):
        if i in (1, 3):
            runs += [{"cfg": a_run(place, f"4-{i}-{over}", 4, *kind, shard=over), "local": 2 if over == "node" else 4}
                     for over in ("none", "all", "node")]  # fmt: skip
    runs += [{"cfg": a_run(place, "2-cut-on-4", 4, **LONG, resume=True)}]
    runs += [{"cfg": a_run(place, "4-cut", 4, **LONG), "kill": 5}]
    start_ranks(place, 4, runs, code=1)
    shutil.copytree(place / "4-cut", place / "4-cut-on-1", symlinks=True)
    return place


@pytest.fixture(scope="module")
def resumed(four) -> Path:
    """The runs that were killed, gone on with by 2 ranks."""
    start_ranks(four, 2, [{"cfg": a_run(four, name, 2, **LONG, resume=True)} for name in ("2-cut", "4-cut")])
    return four


@pytest.mark.slow
@pytest.mark.parametrize("kind", range(4), ids=KINDS)
def test_two_ranks_with_half_of_the_student_each_train_as_two_with_all_of_it(two, kind):
    """Gradient norm, five losses and the held-out losses, on- and off-policy; three held-out rows on two ranks."""
    same_numbers(two, f"2-{kind}-all", f"2-{kind}-none")
    assert len(column(metrics(two / f"2-{kind}-all"), "eval/heldout_loss")) == 3
    assert metrics(two / f"2-{kind}-all")[0]["gold/on_policy_ratio"] == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", [1, 3], ids=[list(KINDS)[i] for i in (1, 3)])
@pytest.mark.parametrize("over", ["all", "node"])
def test_four_ranks_with_a_part_of_the_student_train_as_four_with_all_of_it(four, kind, over):
    same_numbers(four, f"4-{kind}-{over}", f"4-{kind}-none")


@pytest.mark.slow
def test_a_rank_holds_its_part_of_parameters_and_optimizer_only(four):
    for out, reference, share in (
        ("2-0-all", "2-0-none", 0.55), ("2-3-all", "2-3-none", 0.55), ("4-3-all", "4-3-none", 0.3),
        ("4-1-all", "4-1-none", 0.3), ("4-1-node", "4-1-none", 0.55), ("2-cut-on-4", "2-0-none", 0.3),
    ):  # fmt: skip
        part, all_of_it = bytes_of(four, out), bytes_of(four, reference)
        for name in part:
            assert 0 < part[name] <= share * all_of_it[name], (out, name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [0, 3], ids=["tied", "untied"])
def test_these_tests_would_see_a_head_that_is_gathered_without_its_gradients(two, kind):
    """weight.full_tensor(), as one would write it, has the gradient of one rank: no error, but a wrong norm."""
    wrong, right = (metrics(two / out)[0]["actor/grad_norm"] for out in (f"2-way-d{kind}", f"2-{kind}-none"))
    assert abs(wrong / right - 1) > 0.02
    with pytest.raises(AssertionError):
        same_numbers(two, f"2-way-d{kind}", f"2-{kind}-none")


@pytest.mark.slow
@pytest.mark.parametrize("teacher", range(3), ids=["one tokenizer", "tied", "two tokenizers"])
def test_a_teacher_that_is_split_teaches_the_same(two, teacher):
    """Beside a student that is split, too."""
    same_numbers(two, f"2-teacher{teacher}-shard", f"2-teacher{teacher}-None")
    assert len(column(metrics(two / f"2-teacher{teacher}-shard"), "eval/heldout_loss")) == 1


@pytest.mark.slow
def test_bf16_passes_of_a_student_that_is_split_are_nearly_those_of_ddp(two):
    """And drift is what bf16 makes of it: the sampler sees the same weights."""
    ours, theirs = (metrics(two / f"2-bf16-{over}")[0] for over in ("all", "none"))
    assert ours["actor/grad_norm"] == pytest.approx(theirs["actor/grad_norm"], rel=0.03)
    assert ours["actor/loss"] == pytest.approx(theirs["actor/loss"], rel=0.02)
    assert 0 < ours["gold/drift"] < 0.05


def test_the_heads_gradient_is_summed_in_fp32_whatever_the_head_is():
    """Of 64 chunks of a bf16 head: as one chunk, but for the rounding at the end."""
    torch.manual_seed(0)
    weight = torch.randn(300, 16, dtype=torch.bfloat16, requires_grad=True)
    hidden, ids = torch.randn(512, 16).bfloat16(), torch.randint(300, (512,))
    found = []
    for chunk in (512, 8):
        loss = gold_loss.fused_cross_entropy(gold_loss.Side(hidden, gold_loss.Head(weight), ids), chunk=chunk)
        found.append(torch.autograd.grad(loss.total, weight)[0].float())
    exact = torch.autograd.grad(
        torch.nn.functional.cross_entropy(hidden.float() @ weight.float().T, ids, reduction="sum"), weight
    )[0].float()
    for gradient in found:
        assert (gradient - exact).norm() < 0.004 * exact.norm()


# ----------------------------------------------------------------------------------------------------------------------
# sampling


@pytest.mark.slow
def test_ranks_whose_samples_have_very_unequal_lengths_do_not_wait_for_each_other(place):
    """Three ranks write at most 1, 40 and 3 tokens; in many windows some of them have no prompt to answer at all."""
    runs = []
    for over in ("none", "all"):
        cfg = a_run(place, f"3-{over}", 3, lmbda=0.2, shard=over, max_completion_length=40, max_steps=6, eval_ratio=0.1,
                    per_device_train_batch_size=2, eval_steps=3)  # fmt: skip
        runs.append({"cfg": cfg, "lengths": [1, 40, 3]})
    start_ranks(place, 3, runs)
    same_numbers(place, "3-all", "3-none")
    schedules = [gold_buffer.Schedule(5, 0.2, 2, 1, rank, 3) for rank in range(3)]
    asked = {tuple(sum(slot.on_policy for slot in s.draw(step)) for s in schedules) for step in range(6)}
    assert any(0 in x and max(x) for x in asked), asked


@pytest.mark.slow
@pytest.mark.vllm
def test_an_engine_on_each_rank_gets_the_weights_of_a_student_that_is_split(place):
    """Streamed: the drift is that of rounding after every step; an engine reads the checkpoint and writes as HF."""
    pytest.importorskip("vllm")
    runs = [{"cfg": a_run(place, f"vllm-{student}", 2, student, shard="all", sampler="vllm", vllm_memory=2.0**25,
                          lmbda=0.25, max_steps=4), "engine": True} for student in ("tied", "untied")]  # fmt: skip
    start_ranks(place, 2, runs)
    for student in ("tied", "untied"):
        drift = column(metrics(place / f"vllm-{student}"), "gold/drift")
        assert len(drift) == 4 and 0 < max(drift) < 2e-5


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints


@pytest.mark.slow
def test_a_killed_run_of_parts_goes_on_bit_for_bit(resumed):
    assert metrics(resumed / "2-cut") == metrics(resumed / "2-whole")
    ours, theirs = weights(resumed / "2-cut"), weights(resumed / "2-whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    states = []
    for out in ("2-cut", "2-whole"):
        path = resumed / out / "checkpoints" / "latest" / "trainer.pt"
        states.append(torch.load(path, weights_only=True)["optimizer"]["state"])
    for i, state in states[0].items():
        assert all(torch.equal(x, states[1][i][name]) for name, x in state.items()), i


@pytest.mark.slow
@pytest.mark.parametrize("out", ["4-cut", "2-cut-on-4"])
def test_a_run_may_go_on_with_more_or_fewer_ranks(resumed, out):
    """4 -> 2 and 2 -> 4."""
    same_numbers(resumed, out, "2-whole")
    ours, theirs = weights(resumed / out), weights(resumed / "2-whole")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() < 1e-5, name


@pytest.mark.slow
def test_a_run_of_parts_may_go_on_in_one_process(resumed, monkeypatch):
    cfg = Config(
        **a_run(resumed, "4-cut-on-1", 1, student="tied", accumulation=2, max_steps=8, save_steps=3, resume=True)
    )
    gold_train.train(dataclasses.replace(cfg, eval_tasks=()), ALONE)
    same_numbers(resumed, "4-cut-on-1", "2-whole")


@pytest.mark.slow
def test_evaluations_get_whole_models(two):
    from safetensors.torch import load_file

    found = {int(path.name): load_file(path / "model.safetensors") for path in (two / "2-evaluated.models").iterdir()}
    assert sorted(found) == [0, 3, 6, 8]
    before, after = load_file(two / "tied" / "model.safetensors"), weights(two / "2-evaluated")
    for step, whole in ((0, before), (8, after)):
        assert found[step].keys() == whole.keys() and all(torch.equal(x, whole[k]) for k, x in found[step].items())
    assert not any(torch.equal(found[3][k], x) for k, x in found[6].items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [0, 3], ids=["tied", "untied"])
def test_a_checkpoint_of_parts_is_an_ordinary_model(two, kind):
    """The same keys and configuration as one of DDP, and transformers computes the same logits from it."""
    from transformers import AutoModelForCausalLM

    ours, theirs = (two / f"2-{kind}-{over}" / "checkpoints" / "latest" for over in ("all", "none"))
    assert weights(two / f"2-{kind}-all").keys() == weights(two / f"2-{kind}-none").keys()
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
    one, other = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (ours, theirs))
    ids = torch.arange(5, 45)[None]
    assert torch.allclose(one(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-4)
    assert (one.get_output_embeddings().weight is one.get_input_embeddings().weight) == (kind == 0)


# ----------------------------------------------------------------------------------------------------------------------
# several machines


def agents(folders: list[Path], *arguments: str) -> list[tuple[int, str]]:
    """(exit code, output) of two torchrun agents with two ranks each, in these working folders."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    started = []
    for node, folder in enumerate(folders):
        launch = [*LAUNCHER, "--nnodes", "2", "--nproc-per-node", "2", "--node-rank", str(node)]
        launch += ["--master-addr", "127.0.0.1", "--master-port", port, __file__, "main", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(launch, cwd=folder, env=os.environ | ENVIRONMENT, **pipes))
    outputs = [process.communicate(timeout=300)[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, outputs)]


def own_lines(text: str) -> set[str]:
    return {line for line in text.splitlines() if line.startswith("gold_train.py: ")}


@pytest.mark.slow
def test_machines_without_a_common_folder_are_told_so_and_with_one_they_train_and_go_on(place, tmp_path):
    """Never half of the ranks: each machine ends with the same one line, no traceback of ours, nobody waits."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    cfg = Config(**a_run(place, "x", 4, accumulation=2, max_steps=2, shard="node") | {"output_dir": "out"})
    flags = command(cfg)
    shared = agents([folders[0]] * 2, *flags)
    assert [code for code, _ in shared] == [0, 0], shared
    same = agents([folders[0]] * 2, "--resume", "--output-dir", "out", "--max-steps", "2", "--save-steps", "7")
    assert [code for code, _ in same] == [0, 0] and "resumed after step 2" in same[0][1], same
    apart = agents(folders, "--resume", "--output-dir", "out")
    line = "gold_train.py: out/config.json is there for 2 of 4 ranks: machines need a shared folder"
    for code, text in apart:
        assert code == 1 and own_lines(text) == {line}, text[-3000:]
        assert "peer" not in text and "in setup" not in text


@pytest.mark.slow
def test_the_embedded_job_runs_on_two_machines_with_a_common_folder_and_is_refused_without(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    flags = ["--output-dir", "out", "--max-steps", "2", "--eval-max-samples", "2", "--shard", "all"]
    (code, text), (other, _) = agents([folders[0]] * 2, *flags)
    assert code == other == 0 and "Curves: out/gold/curves.png" in text, text[-3000:]
    shutil.rmtree(folders[0] / "out")
    for code, text in agents(folders, *flags):
        assert code == 1 and len(own_lines(text)) == 1 and "teacher-init is there for 2 of 4 ranks" in text, text[
            -3000:
        ]


@pytest.mark.slow
def test_nproc_starts_the_ranks(place, tmp_path):
    cfg = Config(**a_run(place, "nproc", 2, max_steps=1, shard="all"))
    launch = [sys.executable, f"{ROOT}/gold_train.py", "--nproc", "2", *command(cfg)]
    done = subprocess.run(launch, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 steps of 16 completions" in done.stderr + done.stdout


def test_what_rank_0_reads_or_raises_is_what_every_rank_gets(monkeypatch):
    monkeypatch.setattr(gold_train, "gather", lambda value: [("of rank 0", None), value])
    assert gold_train.told(lambda: "mine") == "of rank 0"
    monkeypatch.setattr(gold_train, "gather", lambda value: [(None, OSError("a full disk")), value])
    with pytest.raises(OSError, match="a full disk"):
        gold_train.told(lambda: "mine")


# ----------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shard": "all", "lag": 1}, "two threads at once: --lag 0"),
        ({"shard": "node", "compile": True}, "--compile does not work with --shard"),
        ({"teacher_device": "shard", "seq_kd": True}, "cannot write: no --seq-kd"),
        ({"shard": "all", "alone": True}, "need several ranks, like --nproc 8"),
        ({"teacher_device": "shard", "alone": True}, "need several ranks, like --nproc 8"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_is_loaded(monkeypatch, tmp_path, changes, message):
    alone = changes.pop("alone", False)
    monkeypatch.setattr(gold_train.dist, "is_initialized", lambda: not alone)
    monkeypatch.setattr(gold_train, "gather", lambda value: [value])
    cfg = Config(student_model="s", teacher_model="t", output_dir=str(tmp_path), sampler="hf")
    ranks = Ranks(0, 0, 2, 2, torch.device("cpu"))
    gold_train.check(cfg, ranks)
    with pytest.raises(ValueError, match=message):
        gold_train.check(dataclasses.replace(cfg, **changes), ranks)


# ----------------------------------------------------------------------------------------------------------------------
# what a rank does


def held_bytes(tensors) -> int:
    """Memory of tensors, of split ones that of the part that is here, with whatever it is a view of."""
    local = [x.to_local() if isinstance(x, gold_buffer.DTensor) else x for x in tensors]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in local}.values())


class Collector:
    """An evaluator that keeps the models it is given."""

    failures, poll, close, summary = 0, lambda self: [], lambda self, seconds: None, lambda self: "kept"

    def __init__(self, tasks, out: Path, *args, **kwargs):
        self.folder = Path(f"{out}.models")

    def submit(self, step, folder, **kwargs):
        if step is not None:
            shutil.copytree(Path(folder).resolve(), self.folder / str(step))


def as_way_d(found):
    """The head gathered by full_tensor() from weights that are split again after the forward pass."""
    student, head, model = found

    def gathered_head():
        student.reshard()
        split = head()
        return dataclasses.replace(split, weight=split.weight.full_tensor())

    return student, gathered_head, model


def make_run(run: dict, ranks: Ranks) -> None:
    """One run, with its bytes written down. Keys beside cfg: local (ranks of a node), way, lengths, kill, engine."""
    cfg, opened = Config(**run["cfg"] | {"eval_tasks": tuple(run["cfg"]["eval_tasks"])}), []
    local = run.get("local", ranks.local_world_size)
    ranks = ranks._replace(local_world_size=local, local_rank=ranks.rank % local)
    with pytest.MonkeyPatch.context() as patch:
        setup, open_student = gold_train.setup, gold_train.open_student
        log, generate = gold_train.Records.log, gold_buffer.HFSampler.generate

        def remembered(*args):
            opened.append(setup(*args))
            return opened[0]

        def killing(self, row, window):
            log(self, row, window)
            if row["step"] == run["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)

        def short(self, requests, sampling, *done):
            most = min(sampling.max_new_tokens, run["lengths"][ranks.rank])
            return generate(self, requests, dataclasses.replace(sampling, max_new_tokens=most), *done)

        patch.setattr(gold_train, "setup", remembered)
        patch.setattr(gold_train.gold_eval, "Evaluator", Collector)
        if run.get("way") == "D":
            patch.setattr(gold_train, "open_student", lambda *args: as_way_d(open_student(*args)))
        if "kill" in run:
            patch.setattr(gold_train.Records, "log", killing)
        if "lengths" in run:
            patch.setattr(gold_buffer.HFSampler, "generate", short)
        gold_train.train(cfg, ranks, last=False)
    if run.get("engine"):
        import test_vllm

        folder = f"{cfg.output_dir}/checkpoints/latest"
        engine = gold_buffer.VLLMSampler(folder, 400, "float32", test_vllm.MEMORY, load_format="auto")
        model = gold_buffer.load_model(folder, None, torch.float32, "cpu")
        test_vllm.same_as_hf(model, engine, test_vllm.requests_of((3, 40, 127)))
        engine.close()
    states = [x for state in opened[0].optimizer.state.values() for name, x in state.items() if name != "step"]
    held = {"parameters": held_bytes(opened[0].student.parameters()), "optimizer": held_bytes(states)}
    Path(f"{cfg.output_dir}.bytes-{ranks.rank}.json").write_text(json.dumps(held))


if __name__ == "__main__":
    if sys.argv.pop(1) == "runs":
        here = gold_train.setup_ranks()
        for a in json.loads(Path(sys.argv[1]).read_text()):
            make_run(a, here)
        torch.distributed.destroy_process_group()
    else:
        gold_train.TEACHER_STEPS = gold_train.STUDENT_STEPS = 2
        gold_train.gold_eval.Evaluator = Collector  # the children that evaluate are another test's
        gold_train.main()
