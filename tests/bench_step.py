"""How fast is a whole step: this checkout against an earlier one, in turns, each run a process of its own.

    OMP_NUM_THREADS=1 python tests/bench_step.py --before ce7a2a6
    OMP_NUM_THREADS=1 python tests/bench_step.py --only 8k --rounds 3

Random little models (hidden 96, 3 and 4 layers) with tokenizers made here of Python's own sources, 16 prompts of which
the student answers all (the embedded job: 64, a quarter), gradient and optimizer step. Random models never stop, so a
completion has all the tokens that it may have. Median seconds of a step after the first two, of sampling (with the
alignment) and of training; in brackets how many times as fast as before.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(ROOT))

CASES = {  # student, teacher, tokens of a completion, prompts, lmbda
    "the embedded job": ("small", "small-bytes", 64, 64, 0.25),
    "one tokenizer of 32k, 64 tokens": ("32k", "32k-teacher", 64, 16, 1.0),
    "two of 8k, 64 tokens": ("8k-spaces", "8k", 64, 16, 1.0),
    "two of 8k, 256 tokens": ("8k-spaces", "8k", 256, 16, 1.0),
}


def make(folder: Path, texts: list[str], size: int, bytes_level: bool, layers: int) -> None:
    """A random Llama with a BPE tokenizer of GPT-2's or of SentencePiece's kind."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=not bytes_level))
    if bytes_level:
        tokenizer.pre_tokenizer, alphabet, single = (
            pre_tokenizers.ByteLevel(False),
            pre_tokenizers.ByteLevel.alphabet(),
            [],
        )
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer, alphabet = pre_tokenizers.Metaspace(prepend_scheme="never"), []
        single = [f"<0x{b:02X}>" for b in range(256)]
        joins = decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()
        tokenizer.decoder = decoders.Sequence(list(joins))
    how = {"special_tokens": ["<end>", *single], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **how))
    spec = json.loads(tokenizer.to_str())  # single bytes are ordinary tokens
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in single]
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        eos_token="<end>",
        pad_token="<end>",
        chat_template=template,
    )
    fast.save_pretrained(folder)
    torch.manual_seed(layers)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=96, intermediate_size=288, num_hidden_layers=layers, num_attention_heads=3,
        num_key_value_heads=3, max_position_embeddings=512, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def step(code: Path, case: str, place: Path, steps: int) -> tuple[float, float, float]:
    """Median seconds of (step, wait, train) of a run of the trainer in `code`."""
    student, teacher, tokens, prompts, lmbda = CASES[case]
    with tempfile.TemporaryDirectory(dir=place) as out:
        command = [sys.executable, str(code / "gold_train.py"), "--student-model", str(place / student)]
        command += [
            "--teacher-model",
            str(place / teacher),
            "--dataset",
            str(place / "rows.jsonl"),
            "--lmbda",
            str(lmbda),
        ]
        command += ["--max-length", str(tokens + 48), "--max-completion-length", str(tokens), "--max-steps", str(steps)]
        command += [
            "--per-device-train-batch-size",
            str(prompts),
            "--gradient-accumulation-steps",
            "1",
            "--beta",
            "0.5",
        ]
        done = subprocess.run([*command, "--save-steps", "0", "--output-dir", out], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
        rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()][2:]
    return tuple(statistics.median(row[f"timing/{name}"] for row in rows) for name in ("step", "wait", "train"))


def main() -> None:
    from gold_data import make_countdown
    from gold_eval import markdown

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="ce7a2a6", help="revision to compare with")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each, in turns; the best counts")
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    args = parser.parse_args()
    cases = [case for case in CASES if args.only in case]
    with tempfile.TemporaryDirectory() as folder:
        place, before = Path(folder), Path(folder) / "before"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(before), args.before], check=True)
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        sources = [p.read_text(errors="ignore") for p in itertools.islice(sorted(stdlib.glob("**/*.py")), 600)]
        puzzles = [f"{r['prompt'][0]['content']}\n{r['completion']}" for r in make_countdown(2000, mini=True)]
        kinds = {
            "small": (puzzles, 460, False, 3),
            "small-bytes": (puzzles, 420, True, 4),
            "32k": (sources, 32000, True, 3),
        }
        kinds |= {
            "32k-teacher": (sources, 32000, True, 4),
            "8k-spaces": (sources, 8000, False, 3),
            "8k": (sources, 8000, True, 4),
        }
        for name in {name for case in cases for name in CASES[case][:2]}:
            make(place / name, *kinds[name])
        with (place / "rows.jsonl").open("w") as file:
            for row in make_countdown(500, mini=True):
                file.write(json.dumps({"prompt": row["prompt"], "completion": row["completion"]}) + "\n")
        table = [["", "step before, s", "now, s", "sampling before", "now", "training before", "now"]]
        for case in cases:
            found = {code: [] for code in (before, ROOT)}
            for code in [before, ROOT] * args.rounds:
                found[code].append(step(code, case, place, args.steps))
                print(case, "before" if code == before else "now", found[code][-1], file=sys.stderr, flush=True)
            old, new = (list(map(min, zip(*runs))) for runs in found.values())
            cells = [(f"{x:.3f}", f"{y:.3f} ({x / y:.1f}x)") for x, y in zip(old, new)]
            table.append([case, *itertools.chain(*cells)])
        print(markdown(table))
        subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(before)], check=True)


if __name__ == "__main__":
    main()
