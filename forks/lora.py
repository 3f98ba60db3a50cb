"""Fork: LoRA. Adapters in all linear layers of the student are trained, its own weights are frozen.

    pip install peft==0.21.2      for this fork only
    python forks/lora.py --learning-rate 1e-2 --split "train[:500]" --no-seq-kd      any flag of gold_train.py

Expected: 39.8 ± 2.2 % of 512 held-out puzzles where all weights (gold_train.py, 3e-3) reach 63.3 ± 2.1 %: on a student
of 0.4M weights that has hardly been trained, 92,160 in adapters are no substitute. What it is for: with a student of
109M, optimizer and gradients take 31 MB instead of 1,314, and the peak of the process is 1.66 GB instead of 2.27. Seed
0, 2 shared CPU cores, 9 minutes for the last stage, 2026-11-26.

Checkpoints, evaluations and the vLLM sampler get merged weights: a checkpoint is an ordinary model directory; beside
them lies lora/, what peft calls an adapter. --teacher-model the same as --student-model is the frozen base itself, read
with the adapters switched off, not a second copy; it needs a --teacher-prompt-template to have something to teach.
LoRA wants two to ten times the learning rate of full fine-tuning. Random weights (the embedded job's, *-init) are
trained in full. Base weights are kept in fp32, as all students are here.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

import gold_buffer
import gold_data
import gold_train

ADAPTER = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
FOLDER, FILE, PREFIX = "lora", "adapter_model.safetensors", "base_model.model."  # as peft writes them


def adapters(model) -> list[LoraLayer]:
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


@torch.no_grad()
def merged(model, keep_vars: bool = False) -> dict[str, Tensor]:
    """State dict of the model without adapters that computes the same. None of it is a variable, whatever is asked."""
    plain = {k: v for k, v in type(model).state_dict(model).items() if ".lora_" not in k}
    weights = {name.replace(".base_layer", ""): x for name, x in plain.items()}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weights[f"{name}.weight"] = layer.base_layer.weight + layer.get_delta_weight("default")
    return weights


def own(model) -> dict[str, Tensor]:
    """The adapters' parameters by the names that peft gives them in a file."""
    named = model.named_parameters()
    return {PREFIX + name.replace(".default", ""): p.data for name, p in named if ".lora_" in name}


def load_student(cfg, plain, name, revision, dtype, device):
    """In place of the first model that setup loads: the student's base, with new adapters or those of a checkpoint."""
    gold_buffer.load_model = plain
    model = plain(*gold_data.hub_name(cfg.student_model), dtype, device)
    model = peft.inject_adapter_in_model(ADAPTER, model)
    if cfg.resume:
        saved = load_file(Path(name) / FOLDER / FILE)
        for key, x in own(model).items():
            x.copy_(saved[key])
    model.state_dict = functools.partial(merged, model)
    return model


class Base(gold_buffer.LocalTeacher):
    """The student's frozen weights, read with its adapters switched off."""

    def __init__(self, model, autocast):
        self.model, self.autocast = model, autocast
        self.backbone, self.head = gold_buffer.split_head(model)
        self.device, self.most = self.head["weight"].device, gold_buffer.positions(model.config)

    def hidden(self, ids: Tensor, rows: Tensor) -> Tensor:
        for layer in adapters(self.model):
            layer.enable_adapters(False)
        with self.autocast:
            found = super().hidden(ids, rows)
        for layer in adapters(self.model):
            layer.enable_adapters(True)
        return found


def setup(cfg, ranks, say, plain=gold_train.setup) -> gold_train.Run:
    """gold_train.setup with adapters in the student."""
    if cfg.student_model.endswith("-init"):
        return plain(cfg, ranks, say)
    base = cfg.teacher_model == cfg.student_model and not (cfg.teacher_url or cfg.teacher_device)
    if cfg.lag and gold_buffer.choose_sampler(cfg.sampler)[0] == "hf":
        raise ValueError("the hf sampler's copy has no adapters: --lag 0, or --sampler vllm")
    if cfg.seq_kd and base:
        raise ValueError("the base does not write answers while its adapters are trained: no --seq-kd")
    load = gold_buffer.load_model
    gold_buffer.load_model = functools.partial(load_student, cfg, load)
    try:
        run = plain(cfg, ranks, say)
    finally:
        gold_buffer.load_model = load
    if base:
        run.parts = run.parts._replace(teacher=Base(run.student, run.parts.autocast), teacher_head=run.parts.head)
    if isinstance(run.buffer.sampler, gold_buffer.HFSampler):
        run.buffer.weights_of = dict  # it samples from the student itself: nothing to hand over, nothing to merge
    new, total = (sum(p.numel() for p in run.student.parameters() if p.requires_grad >= only) for only in (1, 0))
    say(
        f"LoRA: {new:,} of {total:,} parameters; optimizer and gradients {12 * new:,} bytes, not {12 * (total - new):,}"
    )
    return run


def save_model(folder, model, tokenizer, dtype=torch.float32, weights=None, plain=gold_train.save_model) -> None:
    plain(folder, model, tokenizer, dtype, weights)
    if adapters(model):
        model.peft_config["default"].save_pretrained(folder / FOLDER)
        save_file({name: x.cpu().contiguous() for name, x in own(model).items()}, folder / FOLDER / FILE)
        (folder / FOLDER / FILE).chmod((folder / "config.json").stat().st_mode)


gold_train.setup = setup
gold_train.save_model = save_model

if __name__ == "__main__":
    gold_train.main()
