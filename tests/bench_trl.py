"""Learning beside TRL's GOLDTrainer: the same student, teacher, rows, steps and completions, scored by the same grader.

    python gold_train.py                                                    the embedded job makes both models
    python tests/bench_trl.py --peers VENV/bin/python --steps 100           both merge strategies, beta 0 and 0.5
    python tests/bench_trl.py --peers VENV/bin/python --steps 600 --only "bayesian, beta 0," --rates 1e-3

VENV: pip install trl==1.16.0 tyro. TRL aligns two tokenizers only if both are byte-level and refuses the embedded
student's; its check is taken out here, the offsets that it then reads are right for this tokenizer. Everything else is
TRL's: hybrid loss, temperature 1, our learning rate schedule and weight decay. Finished cells are kept in --out.
Prints accuracy on 512 held-out puzzles and seconds of training, for each learning rate; the best counts.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

MERGE, BETAS = ("observed", "bayesian"), (0.0, 0.5)


def train_with_trl(job: dict) -> None:
    """In the peers' environment. Saves a model directory and time.json."""
    import trl.experimental.utils as utils
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    utils.is_byte_level_tokenizer = lambda backend: True
    config = GOLDConfig(
        output_dir=f"{job['out']}/trainer", max_steps=job["steps"], per_device_train_batch_size=64,
        gradient_accumulation_steps=1, learning_rate=job["rate"], lr_scheduler_type="cosine",
        warmup_steps=round(0.05 * job["steps"]), weight_decay=0.01, max_grad_norm=1.0, seed=0, use_cpu=True, bf16=False,
        gradient_checkpointing=False, save_strategy="no", report_to="none", logging_steps=10, disable_tqdm=True,
        temperature=1.0, top_p=1.0, lmbda=0.5, beta=job["beta"], max_completion_length=64, max_length=96,
        use_uld_loss=True, use_extended_uld=True, uld_use_hybrid_loss=True, uld_token_merge_strategy=job["merge"],
        teacher_tokenizer_name_or_path=job["teacher"],
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(job["student"])
    trainer = GOLDTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["student"]),
        teacher_model=AutoModelForCausalLM.from_pretrained(job["teacher"]),
        args=config, processing_class=tokenizer,
        train_dataset=load_dataset("json", data_files=job["rows"], split="train"),
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.model.save_pretrained(job["out"])
    tokenizer.save_pretrained(job["out"])
    Path(job["out"], "time.json").write_text(json.dumps(seconds))


def train_with_gold(job: dict) -> None:
    """The gold stage of the embedded job with TRL's rows and mixture. Saves the same."""
    import gold_train

    out = Path(job["out"])
    config = replace(
        gold_train.EMBEDDED, student_model=job["student"], teacher_model=job["teacher"], split=gold_train.SOLVED,
        lmbda=0.5, seq_kd=False, beta=job["beta"], learning_rate=job["rate"], max_steps=job["steps"], eval_tasks=(),
        eval_steps=0, save_steps=0, output_dir=str(out / "run"),
    )  # fmt: skip
    start = time.perf_counter()
    gold_train.train(config, gold_train.setup_ranks())
    seconds = time.perf_counter() - start
    for path in (out / "run/checkpoints/latest").resolve().iterdir():
        path.rename(out / path.name)
    (out / "time.json").write_text(json.dumps(seconds))


def accuracy(model: Path) -> tuple[float, float]:
    """(accuracy, standard error) on the puzzles of the embedded job, greedy."""
    command = [sys.executable, "gold_eval.py", "--model", str(model), "--tasks", "countdown-mini"]
    command += ["--max-samples", "512", "--max-new-tokens", "64", "--out", str(model / "eval")]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (results,) = json.loads((model / "eval/results.json").read_text())["models"].values()
    return results["countdown-mini"]["accuracy"], results["countdown-mini"]["se"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="Python with trl")
    parser.add_argument("--models", type=Path, default=ROOT / "out/embedded", help="run folder of the embedded job")
    parser.add_argument("--out", type=Path, default=ROOT / "out/bench_trl")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rates", type=float, nargs="*", default=[3e-3, 1e-3, 3e-4])
    parser.add_argument("--only", default="", help="part of the names of the rows to run")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = json.loads(args.job)
        return train_with_trl(job) if job["merge"] else train_with_gold(job)
    import gold_data
    from gold_eval import markdown

    args.out.mkdir(parents=True, exist_ok=True)
    rows = args.out / "rows.jsonl"
    with rows.open("w") as file:
        for row in gold_data.make_countdown(500, mini=True):
            answer = [{"role": "assistant", "content": row["completion"]}]
            file.write(json.dumps({"prompt": row["prompt"], "completion": answer}) + "\n")
    stages = {name: str((args.models / name / "checkpoints/latest").resolve()) for name in ("student", "teacher")}
    cells = {f"TRL, {merge}, beta {beta:g},": (beta, merge) for merge in MERGE for beta in BETAS}
    cells |= {f"gold, prefix, beta {beta:g},": (beta, None) for beta in BETAS}
    table = [["after so many steps", *(f"learning rate {rate:g}" for rate in args.rates)]]
    for name, (beta, merge) in cells.items():
        if args.only not in name:
            continue
        found = []
        for rate in args.rates:
            out = args.out / f"{name} {args.steps} steps, {rate:g}".replace(", ", "_").replace(" ", "-")
            job = stages | {"out": str(out), "rows": str(rows), "steps": args.steps, "rate": rate}
            job |= {"beta": beta, "merge": merge}
            if not (out / "time.json").exists():
                out.mkdir(exist_ok=True)
                python = args.peers if merge else sys.executable
                subprocess.run([python, __file__, "--job", json.dumps(job)], check=True, stdout=sys.stderr)
            share, error = accuracy(out)
            found.append(f"{share:.1%} ± {error:.1%}, {json.loads((out / 'time.json').read_text()):.0f} s")
            print(name, args.steps, "steps, rate", rate, found[-1], file=sys.stderr, flush=True)
        table.append([f"{name} {args.steps} steps", *found])
    print(markdown(table))


if __name__ == "__main__":
    main()
