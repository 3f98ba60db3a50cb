"""Which cross-tokenizer loss trains best? Small models, made and trained here by the real trainer, on one core.

    OMP_NUM_THREADS=1 python tests/bench_losses.py --out out/bench_losses

A teacher with a GPT-2 kind of tokenizer learns sentences of Python's documentation and small Countdown puzzles. A
student with a SentencePiece kind of tokenizer (numbers are two tokens, words are cut elsewhere) sees less of it. Then
every loss trains a copy of that student for the same number of steps, on the same few rows, at the same learning rate,
off-policy (lmbda 0: the rows' own answers) and on-policy (lmbda 1: its own samples), with three seeds of student, rows
and samples. Cross entropy (ce) is the baseline without a teacher; it needs answers, so it has no on-policy form.

Finished cells are kept in the output directory: stop and start again as you like. Prints a Markdown table of bits per
byte on held-out sentences and puzzles and of the share of puzzles solved, mean and standard error over seeds.
"""

import argparse
import ast
import json
import math
import os
import random
import re
import sys
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "forks"))

import bins_loss  # noqa: F401  its losses enter the trainer
import numpy as np
import second_pass  # noqa: F401
import torch

import gold_buffer
import gold_data
import gold_eval
import gold_train

CELLS = {  # name: loss, beta (ce, uld and alm have none)
    "ce": ("ce", 0.5),
    "uld": ("uld", 0.5),
    "alm": ("alm", 0.5),
    **{
        f"{x}, beta {beta:g}": (x, beta)
        for x in ("hybrid", "bins", "bins+alm", "prefix", "whole")
        for beta in (0.5, 0.0)
    },
}
SEEDS = (0, 1, 2)
STEPS, ROWS = 150, 32  # optimizer steps of every cell, completions per step


def sentences() -> list[str]:
    """Sentences of 40 to 110 bytes, 6 words or more, from Python's documentation and docstrings, in a fixed order."""
    texts = [topics[key] for key in sorted(topics)]
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(stdlib.rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests", "lib2to3"} & {*path.relative_to(stdlib).parts}:
            nodes = ast.walk(ast.parse(path.read_bytes()))
            kinds = ast.Module | ast.ClassDef | ast.FunctionDef
            texts += [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    found = [" ".join(text.split()) for whole in texts for text in re.split(r"(?<=[.?!])\s+|\n\n", whole)]
    good = lambda s: 40 <= len(s) <= 110 and s.count(" ") > 4 and s.isascii() and re.fullmatch(r"[A-Z][^=>|`]*[.?!]", s)
    found = list(dict.fromkeys(filter(good, found)))
    random.Random(0).shuffle(found)
    return found


def prose_row(sentence: str) -> dict:
    words = sentence.split(" ")
    return {"prompt": "Go on: " + " ".join(words[:3]), "completion": " " + " ".join(words[3:])}


def make_tokenizer(texts: list[str], gpt2: bool):
    """GPT-2's kind, or SentencePiece's kind with byte fallback, where a space before a number is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    user, assistant, end = ("<|user|>", "<|assistant|>", "<|end|>") if gpt2 else ("[INST]", "[/INST]", "</s>")
    special, alphabet = [end, user, assistant], []
    tokenizer = Tokenizer(models.BPE(byte_fallback=not gpt2))
    if gpt2:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        parts = [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.Metaspace(prepend_scheme="never")]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special += [f"<0x{b:02X}>" for b in range(256)]
    size = 1000 if gpt2 else 800
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)
    fast.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}USER{{ m['content'] }}ASSISTANT{% else %}"
        "{{ m['content'] }}END{% endif %}{% endfor %}"
    ).replace("USER", user).replace("ASSISTANT", assistant).replace("END", end)  # fmt: skip
    return fast


def make_model(folder: Path, tokenizer, hidden: int, layers: int, seed: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, max_position_embeddings=192,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, rows: list[dict]) -> None:
    random.Random(path.name).shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(out: Path) -> None:
    """Data, a trained teacher and a half trained student for each seed."""
    if not (out / "heldout_prose.jsonl").exists():
        out.mkdir(parents=True, exist_ok=True)
        prose = [prose_row(s) for s in sentences()]
        puzzles = gold_data.make_countdown(14_000, mini=True)
        write_rows(out / "teacher.jsonl", prose[2400:] + puzzles[4400:])
        write_rows(out / "pretrain.jsonl", prose[1200:1800] + puzzles[2400:4400])
        write_rows(out / "distill.jsonl", prose[:128] + puzzles[:512])
        write_rows(out / "heldout_puzzles.jsonl", gold_data.make_countdown(200, mini=True, test=True))
        write_rows(out / "heldout_prose.jsonl", prose[2000:2400])
    rows = [gold_data.to_row(json.loads(line)) for line in (out / "teacher.jsonl").read_text().splitlines()]
    texts = [f"{row.prompt[-1]['content']}\n{row.completion}" for row in rows]
    alone = {"teacher_model": None, "lmbda": 0.0, "ce_weight": 1.0}
    if not (out / "teacher" / "checkpoints" / "latest").exists():
        make_model(out / "teacher-init", make_tokenizer(texts, True), hidden=128, layers=4, seed=0)
        run(out, "teacher", 900, student_model=out / "teacher-init", dataset=out / "teacher.jsonl", rows=48, **alone)
    for seed in SEEDS:
        if not (out / f"student-{seed}" / "checkpoints" / "latest").exists():
            make_model(out / f"student-{seed}-init", make_tokenizer(texts, False), hidden=96, layers=3, seed=seed)
            run(
                out, f"student-{seed}", 500, student_model=out / f"student-{seed}-init", seed=seed,
                dataset=out / "pretrain.jsonl", **alone,
            )  # fmt: skip


def run(out: Path, name: str, steps: int, rows: int = ROWS, **changes) -> Path:
    """One training run of gold_train; the folder of its last weights."""
    changes = {key: str(value) if isinstance(value, Path) else value for key, value in changes.items()}
    defaults = {
        "output_dir": str(out / name), "max_steps": steps, "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1, "max_length": 128, "max_completion_length": 72, "learning_rate": 3e-3,
        "sampler": "hf", "save_steps": 10_000,
    }  # fmt: skip
    ranks = gold_train.Ranks(0, 0, 1, 1, torch.device("cpu"))
    gold_train.train(gold_train.Config(**defaults | changes), ranks, last=False)
    return out / name / "checkpoints" / "latest"


@torch.no_grad()
def score(out: Path, folder: Path) -> dict[str, float]:
    """Bits per byte of held-out answers (their end included) and the share of puzzles solved greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    result = gold_eval.evaluate(model, tokenizer, ("countdown-mini",), max_samples=300, max_new_tokens=72)
    scores = {"accuracy": result["countdown-mini"]["accuracy"]}
    sampler = gold_buffer.HFSampler(model)
    vocabulary = gold_data.Vocabulary(tokenizer, gold_data.end_ids(tokenizer), len(tokenizer))
    for kind in ("prose", "puzzles"):
        rows = [gold_data.to_row(json.loads(x)) for x in (out / f"heldout_{kind}.jsonl").read_text().splitlines()]
        answers = [list(vocabulary.encode(row.completion.encode())[0]) + [vocabulary.ends[0]] for row in rows]
        prompts = [gold_data.encode_prompt(tokenizer, row.prompt) for row in rows]
        logprobs = sampler.score([p + a for p, a in zip(prompts, answers)])
        nats = -sum(float(x[-len(a) :].sum()) for x, a in zip(logprobs, answers))
        scores[kind] = nats / sum(len(row.completion.encode()) for row in rows) / math.log(2)
    return scores


def cells() -> list[tuple[str, float, int]]:
    return [
        (name, lmbda, seed) for seed in SEEDS for lmbda in (0.0, 1.0) for name in CELLS if name != "ce" or not lmbda
    ]


def run_cell(out: Path, name: str, lmbda: float, seed: int, extra: dict) -> dict:
    folder = f"{name}-lmbda{lmbda:g}-seed{seed}" + "".join(f"-{k}{v}" for k, v in extra.items())
    folder = folder.replace(", ", "-").replace(" ", "")
    file = out / "cells" / f"{folder}.json"
    if not file.exists():
        start, (loss, beta) = time.process_time(), CELLS[name]
        how = {"teacher_model": out / "teacher" / "checkpoints" / "latest", "cross_tokenizer_loss": loss, "beta": beta}
        if name == "ce":
            how = {"teacher_model": None, "ce_weight": 1.0}
        how |= {"student_model": out / f"student-{seed}" / "checkpoints" / "latest", "seed": seed, "lmbda": lmbda}
        how |= {"dataset": out / "distill.jsonl", "learning_rate": 2e-3}
        latest = run(out, f"runs/{folder}", **{"steps": STEPS} | how | extra)
        cpu = time.process_time() - start
        rows = [json.loads(line) for line in (out / "runs" / folder / "metrics.jsonl").read_text().splitlines()]
        norms = [row["actor/grad_norm"] for row in rows]
        cell = score(out, latest) | {"cpu_seconds": cpu, "grad_norm": float(np.median(norms))}
        cell |= {"name": name, "lmbda": lmbda, "seed": seed, **extra}
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(cell))
    return json.loads(file.read_text())


def show(out: Path, results: list[dict]) -> str:
    """Markdown: a line per loss and lmbda, after the teacher and the student before."""

    def line(name: str, group: list[dict]) -> list[str]:
        cells = [name]
        for key, form in (("prose", "{:.3f}"), ("puzzles", "{:.3f}"), ("accuracy", "{:.1%}")):
            values = np.array([cell[key] for cell in group])
            error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
            cells.append(form.format(values.mean()) + (f" ± {form.format(error)}" if len(values) > 1 else ""))
        for key, form in (("grad_norm", "{:.2f}"), ("cpu_seconds", "{:.0f}")):
            cells.append(form.format(np.mean([cell[key] for cell in group])) if key in group[0] else "")
        return cells

    heading = ["loss", "prose, bits/byte", "puzzles, bits/byte", "puzzles solved", "gradient norm", "CPU s"]
    rows = [heading, line("teacher", [baseline(out, "teacher")])]
    rows.append(line("student before", [baseline(out, f"student-{seed}") for seed in SEEDS]))
    for lmbda, policy in ((0.0, "off-policy"), (1.0, "on-policy")):
        for name in CELLS:
            group = [cell for cell in results if cell["name"] == name and cell["lmbda"] == lmbda]
            if group:
                rows.append(
                    line(f"{name}, {policy}" + (f" ({len(group)} seeds)" if len(group) < len(SEEDS) else ""), group)
                )
    return gold_eval.markdown(rows)


def baseline(out: Path, name: str) -> dict:
    file = out / "cells" / f"{name}.json"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(score(out, out / name / "checkpoints" / "latest")))
    return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/bench_losses"))
    parser.add_argument("--only", nargs="*", help="cells like prefix:1:0 (loss, lmbda, seed); all if not given")
    parser.add_argument("--extra", type=json.loads, default={}, help='other fields of gold_train.Config, {"beta": 0}')
    args = parser.parse_args()
    torch.set_num_threads(1)
    prepare(args.out)
    chosen = cells()
    if args.only is not None:
        chosen = [(x.split(":")[0], float(x.split(":")[1]), int(x.split(":")[2])) for x in args.only]
    results = []
    for name, lmbda, seed in chosen:
        results.append(run_cell(args.out, name, lmbda, seed, args.extra))
        print(json.dumps(results[-1]), flush=True)
    table = show(args.out, results)
    print(table)
    (args.out / "table.md").write_text(table + "\n")


if __name__ == "__main__":
    main()
