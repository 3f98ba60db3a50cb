"""Models in two parts, of every kind that transformers has: what is refused before it is trained wrongly, and that rows
padded on the right, rows that leave a batch, and layers with dropout are what they should be."""

import json

import conftest
import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils.logging import set_verbosity_error

import gold_buffer
import gold_train
from gold_buffer import HFSampler, LocalTeacher, Request, Sampling

set_verbosity_error()
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1}
DELTA = {"head_dim": 16, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
DELTA |= {"linear_value_head_dim": 16}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
SLIDING = {"sliding_window": 8}
KINDS = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 16, "num_attention_heads": 4}, "gpt2": {}, "bloom": {}, "opt": {},
    "mistral": SLIDING, "phi3": SLIDING, "cohere2": SLIDING, "gemma2": SLIDING | {"head_dim": 16},
    "gemma3_text": SLIDING | {"head_dim": 16},
    "llama4_text": {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 64},
    "gpt_oss": SLIDING | {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba": {"state_size": 4}, "falcon_mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1},
    "qwen3_next": DELTA | EXPERTS | {"shared_expert_intermediate_size": 32}, "qwen3_5_text": DELTA,
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]}, "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "head_dim": 16},
    "jamba": {"mamba_d_state": 4, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 4, "mamba_d_state": 4, "mamba_ngroups": 1, "num_mem_blocks": 1}
    | {"layers_block_type": ["mamba", "hybrid"] * 2},
}  # fmt: skip
REFUSED = {
    "rwkv": {"attention_hidden_size": 32}, "xlstm": {"num_heads": 2}, "recurrent_gemma": {"lru_width": 32},
    "minimax": {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 8},
}  # fmt: skip


def tiny(kind: str, **changes) -> torch.nn.Module:
    """A random model of one kind, with grouped key heads where it can and windows shorter than the texts."""
    torch.manual_seed(0)
    settings = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
    settings |= {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    if kind in ("opt", "falcon_h1", "zamba2", "xlstm", "minimax", "jamba"):
        settings["num_key_value_heads"] = 2
    settings |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    extra = {"ffn_dim": 64, "word_embed_proj_dim": 32} if kind == "opt" else {}
    config = CONFIG_MAPPING[kind](**settings | extra | (KINDS | REFUSED)[kind] | changes)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    return AutoModelForCausalLM.from_config(config).eval()


# ----------------------------------------------------------------------------------------------------------------------
# caches


REQUESTS = [Request([(7 * i + j * j) % 90 + 5 for j in range(n)], 100 + i) for i, n in enumerate((3, 17, 1, 30, 9, 9))]


@torch.no_grad()
def decode_plainly(model, request: Request, s: Sampling) -> tuple[list[int], list[float]]:
    """One row, one whole forward pass for every token."""
    ids, logprobs = [], []
    for u in np.random.Generator(np.random.Philox(request.seed)).random(s.max_new_tokens):
        z = model(input_ids=torch.tensor([request.prompt_ids + ids]), use_cache=False).logits[0, -1].double()
        p = z.softmax(-1).cumsum(-1)
        ids.append(int((p <= u * p[-1]).sum()))
        logprobs.append(float(z.log_softmax(-1)[ids[-1]]))
        if ids[-1] in s.end_ids:
            break
    return ids, logprobs


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_end_leave_every_kind_of_cache(kind):
    model, sampling = tiny(kind), Sampling(12, end_ids=tuple(range(10)))
    got = HFSampler(model).generate(REQUESTS, sampling)
    for request, rollout in zip(REQUESTS, got):
        ids, logprobs = decode_plainly(model, request, sampling)
        assert rollout.completion_ids == ids
        assert np.abs(np.subtract(rollout.logprobs, logprobs)).max() < 2e-3
    assert len({len(r.completion_ids) for r in got}) > 1, "rows end at different steps"


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_whose_cache_is_something_else_is_refused_by_name_before_it_samples(kind):
    model = tiny(kind)
    with pytest.raises(ValueError, match=f"{type(model).__name__}: .*hf sampler"):
        HFSampler(model)


# ----------------------------------------------------------------------------------------------------------------------
# padding


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "llama4_text"])  # it hides its backbone, and is refused
def test_padding_on_the_right_changes_nothing_and_needs_no_mask(kind):
    """Against each row alone, and, where the layers are attention without windows, exactly against the masked batch."""
    model = tiny(kind)
    backbone, _ = gold_buffer.split_head(model)
    lengths, ids = (20, 7, 13), torch.randint(5, 100, (3, 20))
    mask = (torch.arange(20) < torch.tensor(lengths)[:, None]).long()
    rows, ids = mask.flatten().nonzero()[:, 0], ids * mask
    got = LocalTeacher(model).hidden(ids, rows)
    with torch.no_grad():
        alone = [backbone(input_ids=i[None, :n], use_cache=False).last_hidden_state[0] for i, n in zip(ids, lengths)]
        masked = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.flatten(0, 1)[rows]
    assert (got - torch.cat(alone)).abs().max() < 1e-4 * got.abs().max()
    if kind in ("llama", "qwen2", "qwen3"):
        assert torch.equal(got, masked)


def test_a_model_that_sees_what_it_should_predict_is_refused():
    model = tiny("llama", is_causal=False, attn_implementation="eager")
    with pytest.raises(ValueError, match="LlamaForCausalLM sees the tokens that it should predict"):
        gold_buffer.split_head(model)


# ----------------------------------------------------------------------------------------------------------------------
# dropout


@pytest.mark.parametrize("kind", KINDS)
def test_no_dropout_of_any_kind_is_left_in_training(kind, tmp_path):
    model = tiny(kind)
    config = json.loads(model.config.to_json_string())
    noise = {k: 0.5 for k, v in config.items() if ("drop" in k or "jitter" in k) and isinstance(v, float)}
    noise |= {"router_jitter_noise": 0.5} if "router_jitter_noise" in config else {}
    model = tiny(kind, **noise).train()
    ids = torch.randint(5, 100, (2, 30))
    twice = lambda: [model(input_ids=ids, use_cache=False).logits for _ in range(2)]
    if noise:
        assert not torch.equal(*twice()), "this kind has dropout that nothing but its training mode switches on"
    own = model.eval()(input_ids=ids, use_cache=False).logits
    gold_buffer.without_dropout(model.train())
    a, b = twice()
    assert torch.equal(a, b) and (a - own).abs().max() < 1e-4 * own.abs().max()


def test_the_heads_probe_is_not_disturbed_by_dropout_and_leaves_the_mode():
    model = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    gold_buffer.split_head(model)
    assert model.training and all(m.training for m in model.modules())


# ----------------------------------------------------------------------------------------------------------------------
# what the files of a model say


@pytest.mark.parametrize(
    "kind, changes, most",
    [
        ("llama", {}, 64), ("gpt2", {}, 64),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
        | {"original_max_position_embeddings": 64}}, 256),
        ("llama", {"max_position_embeddings": 512, "rope_parameters": {"rope_type": "llama3", "factor": 8.0}
        | {"original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}},
        512),
    ],
)  # fmt: skip
def test_the_length_that_a_model_can_read_is_found_in_its_configuration(kind, changes, most, tmp_path):
    config = tiny(kind, **changes).config
    assert gold_buffer.positions(config) == most
    config.save_pretrained(tmp_path)  # no weights: they are not read
    gold_buffer.check_positions(str(tmp_path), None, 64)
    with pytest.raises(ValueError, match=rf"max_length {most + 1} is more than the {most} positions of .*lower"):
        gold_buffer.check_positions(str(tmp_path), None, most + 1)


def test_models_that_count_no_positions_read_any_length():
    assert {gold_buffer.positions(CONFIG_MAPPING[kind]()) for kind in ("mamba", "bloom")} == {float("inf")}


def test_a_teacher_is_not_asked_beyond_its_positions():
    teacher = LocalTeacher(tiny("gpt2"))
    with pytest.raises(ValueError, match=r"65 teacher tokens are more than its 64 positions: lower --max-length"):
        teacher.hidden(torch.zeros(1, 65, dtype=torch.long), torch.zeros(1, dtype=torch.long))


def test_a_generation_config_that_cannot_be_saved_does_not_wait_for_the_first_checkpoint(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}))  # without do_sample
    model = gold_buffer.load_model(str(tmp_path / "model"), None, torch.float32, "cpu")
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["temperature"] == 0.6 and saved["eos_token_id"] == [1, 2]
    path.write_text(json.dumps({"num_beams": 1, "early_stopping": True}))
    with pytest.raises(ValueError, match="early_stopping"):
        gold_buffer.load_model(str(tmp_path / "model"), None, torch.float32, "cpu")


# ----------------------------------------------------------------------------------------------------------------------
# heads with unequal padding


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_heads_with_unequal_padding_train_on_their_common_rows(who, tmp_path):
    """One tokenizer; a padded head of random weights writes ids that are no token, and the other model has no row."""
    tokenizer = conftest.byte_level()
    for name in ("student", "teacher"):
        model = conftest.tiny_qwen(len(tokenizer) + 64 * (name == who), seed=len(name))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [{"prompt": f"What is {a} + {a}?", "completion": f"{2 * a}"} for a in range(9)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = gold_train.Config(
        student_model=str(tmp_path / "student"), teacher_model=str(tmp_path / "teacher"), sampler="hf", lmbda=1.0,
        dataset=str(tmp_path / "data.jsonl"), max_length=100, max_completion_length=40, max_steps=2,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    gold_train.train(cfg, gold_train.setup_ranks())
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(0 < line["actor/loss"] < 50 for line in lines)
    assert all(line["response_seq_len/min"] < 40 for line in lines) or who == "teacher", "cut where a token is none"
