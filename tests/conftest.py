"""Fakes that every test file shares: small tokenizers of each family, tiny random models, text in many scripts.

pytest tests/                 everything
pytest tests/ -m "not slow"   the quick part
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import functools
import pydoc_data.topics
import subprocess
import sys
import tempfile

os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="gold-tests-"))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports it

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import gold_data

PROSE = "\n".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics))[:120_000]
ARITHMETIC = "\n".join(f"{a} + {b} = {a + b}; {a} * {b} = {a * b}" for a in range(1, 40) for b in range(1, 40, 3))
CORPUS = (PROSE + "\n" + ARITHMETIC).split("\n\n")
MULTILINGUAL = [
    "Hello, world! It's 12 + 3 = 15.",
    "Übergrößenträger möchten heißen Kaffee.",
    "Ça va? Où êtes-vous né, mon garçon?",
    "Съешь же ещё этих мягких французских булок.",
    "明日は晴れるでしょう。東京タワー",
    "나는 오늘 학교에 갔다.",
    "مرحبا بالعالم",
    "emoji: 👩‍👩‍👧‍👦 🇩🇪 🤷🏽‍♀️ end",
    "tabs\tand  double  spaces\n\n\nnew lines",
    "def f(x):\n    return x**2  # π ≈ 3.14159",
    "zero\u200bwidth and combining e\u0301",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]\n' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def on_two_ranks(script, *flags: str) -> str:
    """What this script prints under a real torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(script), *flags], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@functools.cache
def byte_level(size: int = 600, digits: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2 / Qwen style: byte-level BPE, ChatML, a non-ASCII special token, <think> as a literal added token."""
    t = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    t.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<｜begin▁of▁sentence｜>"]
    t.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    t.add_tokens(["<think>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    return fast


@functools.cache
def metaspace(size: int = 700, prepend: bool = True) -> PreTrainedTokenizerFast:
    """Llama-2 / Mistral style: SentencePiece BPE with byte fallback, a phantom space in front, no system role."""
    t = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    t.normalizer = normalizers.Sequence(
        ([normalizers.Prepend("▁")] if prepend else []) + [normalizers.Replace(" ", "▁")]
    )
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    t.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    spec = t.to_str()
    import json

    spec = json.loads(spec)
    spec["pre_tokenizer"] = None  # merges never cross a word here, as in SentencePiece
    spec["added_tokens"] = [a for a in spec["added_tokens"] if not a["content"].startswith("<0x")]
    t = Tokenizer.from_str(json.dumps(spec))
    fast = PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = INST
    return fast


@functools.cache
def unigram(size: int = 500) -> PreTrainedTokenizerFast:
    """T5 / Gemma style unigram with Metaspace and byte fallback."""
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<eos>", *(f"<0x{b:02X}>" for b in range(256))]
    t.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=size + 258, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    import json

    spec = json.loads(t.to_str())
    spec["model"]["byte_fallback"] = True
    spec["added_tokens"] = [a for a in spec["added_tokens"] if not a["content"].startswith("<0x")]
    t = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<eos>", unk_token="<unk>")


@functools.cache
def wordpiece(size: int = 900) -> PreTrainedTokenizerFast:
    """BERT style: it forgets where spaces were, so its bytes are only nearly those of the text."""
    t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece()
    t.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=size, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="[SEP]", unk_token="[UNK]")


def tiny_model(config_class, model_class, vocab: int, hidden: int, layers: int, tied: bool, seed: int):
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return model_class(config).eval()


def tiny_llama(vocab: int, hidden: int = 32, layers: int = 2, tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    return tiny_model(LlamaConfig, LlamaForCausalLM, vocab, hidden, layers, tied, seed)


def tiny_qwen(vocab: int, hidden: int = 32, layers: int = 2, tied: bool = True, seed: int = 0) -> Qwen2ForCausalLM:
    return tiny_model(Qwen2Config, Qwen2ForCausalLM, vocab, hidden, layers, tied, seed)


@pytest.fixture
def two_models(tmp_path):
    """Directories of a student (byte-level, ChatML) and a teacher (SentencePiece, [INST]) with random weights."""
    out = []
    for name, tokenizer, model in (
        ("student", byte_level(), tiny_qwen(len(byte_level()))),
        ("teacher", metaspace(), tiny_llama(len(metaspace()), seed=1)),
    ):
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        out.append(str(tmp_path / name))
    return tuple(out)


class LongestMatch(gold_data.Vocabulary):
    """A vocabulary given by its byte strings, None for what writes none; it always takes the longest token."""

    def __init__(self, strings: list[bytes | None], ends: tuple[int, ...] | None = None):
        self.bytes, self.size, self.lossy = list(strings), len(strings), False
        self.ends = (len(strings) - 1,) if ends is None else ends
        self.lengths = np.array([len(b or b"") for b in strings])
        self.index = {b: i for i, b in reversed(list(enumerate(strings))) if b}

    def encode(self, text: bytes) -> tuple[list[int], np.ndarray]:
        """As far as it goes."""
        ids, at, ends = [], 0, []
        while piece := next((text[at:n] for n in range(len(text), at, -1) if text[at:n] in self.index), None):
            ids.append(self.index[piece])
            ends.append(at := at + len(piece))
        return ids, np.array(ends, dtype=np.int64)

    def closed(self, text: bytes, ids: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inside a token t, d bytes in, F is known if d = 1 or t[:d] is a token, and byte b is told if t[:d] + b is."""
        n, at = len(text), {0, len(text), *np.cumsum(self.lengths[ids]).tolist()}
        known, tells = np.ones(n + 1, dtype=bool), np.ones((n + 1, 256), dtype=bool)
        for k in set(range(n)) - at:
            start = max(b for b in at if b < k)
            known[k] = k - start == 1 or text[start:k] in self.index
            tells[k] = [text[start:k] + bytes([b]) in self.index for b in range(256)]
        return known, tells, np.zeros(n + 1, dtype=np.int64)
