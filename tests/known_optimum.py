"""A text source whose exact law every loss can be judged by.

Letters follow a Markov chain. The student is a table over single letters; the teacher is the *exact* law of the same
text, written in letters and merged strings with the longest match first (SETTINGS), or in the tokens of a real
tokenizer: byte pairs merged by rank, or Unigram (REAL). There the law is found by brute force: every text the source
can write is encoded, and the probability of the next token is the share of the texts whose tokens go on so. A loss is
unbiased if a student that starts at the truth stays there, and one that starts anywhere reaches it.

python tests/known_optimum.py        trains with every loss, prints a table and draws assets/known_optimum.png
"""

import itertools
import math
import random
import re
import sys
from collections import defaultdict
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "forks"))

import bins_loss
import numpy as np
import torch
from conftest import LongestMatch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import gold_data
import gold_loss

LETTERS = "abcdef"


class Source:
    """Markov chain of the given order over LETTERS; states are tuples of the last letters, as an index."""

    def __init__(self, order: int = 1, seed: int = 3):
        size = len(LETTERS)
        generator = torch.Generator().manual_seed(seed)
        law = torch.softmax(1.5 * torch.randn(*(size,) * (order + 1), generator=generator).double(), -1)
        self.order, self.num_states = order, size**order
        self.law = law.reshape(self.num_states, size)  # (states, letters)
        move = torch.zeros(self.num_states, self.num_states, dtype=torch.float64)
        for s in range(self.num_states):
            for c in range(size):
                move[s, self.step(s, (c,))] += self.law[s, c]
        self.stationary = torch.linalg.matrix_power(move, 4096)[0]

    def step(self, state: int, letters) -> int:
        for c in letters:
            state = (state * len(LETTERS) + c) % self.num_states
        return state

    def prob(self, state: int, letters) -> float:
        p = 1.0
        for c in letters:
            p, state = p * self.law[state, c].item(), self.step(state, (c,))
        return p

    def sample(self, length: int, rng: random.Random) -> tuple[int, list[int]]:
        state = start = rng.choices(range(self.num_states), weights=self.stationary.tolist())[0]
        letters = []
        for _ in range(length):
            letters.append(rng.choices(range(len(LETTERS)), weights=self.law[state].tolist())[0])
            state = self.step(state, letters[-1:])
        return start, letters

    def kl(self, logits: torch.Tensor) -> float:
        """KL(truth || student) in nats per letter, for logits (states, letters)."""
        gap = self.law.log() - logits.double().log_softmax(-1)
        return float((self.stationary[:, None] * self.law * gap).sum())

    def likely_strings(self, length: int, count: int) -> set[tuple[int, ...]]:
        def weight(w):
            return sum(self.stationary[s].item() * self.prob(s, w) for s in range(self.num_states))

        return set(sorted(itertools.product(range(len(LETTERS)), repeat=length), key=weight)[-count:])


class Teacher:
    """The exact next-token law of the source's text under longest-match tokenisation into letters and `merges`."""

    def __init__(self, source: Source, merges: set[tuple[int, ...]]):
        self.source = source
        self.tokens = [(c,) for c in range(len(LETTERS))] + sorted(merges)
        self.index = {w: i for i, w in enumerate(self.tokens)}
        self.state_of: dict[tuple[int, frozenset], int] = {}
        self.laws: list[np.ndarray] = []

    def law_of(self, state: int, forbidden: frozenset) -> int:
        """Number of the law after a text in `state` that must not go on with any of `forbidden`: that would have made
        an earlier token longer. This is what a token boundary tells beyond the text."""
        key = (state, forbidden)
        if key not in self.state_of:
            law = []
            for t in self.tokens:
                bad = forbidden | {w for w in self.tokens if len(w) > len(t) and w[: len(t)] == t}
                if any(t[: len(r)] == r for r in forbidden):
                    law.append(0.0)
                    continue
                longer = {w for w in bad if len(w) > len(t) and w[: len(t)] == t}
                longer = {w for w in longer if not any(len(v) < len(w) and w[: len(v)] == v for v in longer)}
                law.append(self.source.prob(state, t) - sum(self.source.prob(state, w) for w in longer))
            law = np.array(law).clip(0)
            self.state_of[key] = len(self.laws)
            self.laws.append(law / law.sum())
        return self.state_of[key]

    def tokenize(self, letters: list[int]) -> list[int]:
        out, i, longest = [], 0, max(map(len, self.tokens))
        while i < len(letters):
            length = next(n for n in range(longest, 0, -1) if tuple(letters[i : i + n]) in self.index)
            out.append(self.index[tuple(letters[i : i + length])])
            i += len(self.tokens[out[-1]])
        return out

    def path(self, state: int, ids: list[int]) -> list[int]:
        forbidden, laws = frozenset(), []
        for i in ids:
            laws.append(self.law_of(state, forbidden))
            t = self.tokens[i]
            extends = [w for w in {*forbidden, *self.tokens} if len(w) > len(t) and w[: len(t)] == t]
            forbidden, state = frozenset(w[len(t) :] for w in extends), self.source.step(state, t)
        return laws


def byte_pairs(merges: bytes, pattern: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with these merges by rank: "ab|abc" is a + b, then ab + c. `pattern` cuts words."""
    letters = {b: c for c, b in gold_data.GPT2_BYTES.items()}
    vocab, pairs = {letters[b]: b for b in range(256)}, []
    for word in merges.split(b"|"):
        word = "".join(letters[b] for b in word)
        cut = next(n for n in range(len(word) - 1, 0, -1) if word[:n] in vocab and word[n:] in vocab)
        pairs.append((word[:cut], word[cut:]))
        vocab[word] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, pairs))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([*cut, level]), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def unigram(pieces: dict[str, float]) -> PreTrainedTokenizerFast:
    """Pieces with their scores; what they cannot write is written in bytes."""
    entries = [("<unk>", 0.0), *((f"<0x{b:02X}>", -99.0) for b in range(256)), *pieces.items()]
    tokenizer = Tokenizer(models.Unigram(entries, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")


def real_vocabulary(tokenizer: PreTrainedTokenizerFast) -> gold_data.Vocabulary:
    return gold_data.Vocabulary(tokenizer, (tokenizer.eos_token_id,), len(tokenizer))


class EveryText:
    """All texts of a source that stops after `longest` letters, or before with probability `end` behind each letter."""

    def __init__(self, letters: str, order: int, longest: int, end: float, seed: int = 3):
        self.letters, self.order, self.longest, self.end = letters, order, longest, end
        size = len(letters)
        generator = torch.Generator().manual_seed(seed)
        table = torch.softmax(1.5 * torch.randn(size**order, size, generator=generator).double(), -1)
        stop = torch.full((size**order, 1), end, dtype=torch.float64)
        self.law = torch.cat([table * (1 - end), stop], 1)  # (states, letters and the end)
        self.law = torch.cat([self.law, torch.eye(size + 1, dtype=torch.float64)[-1:]])  # the last state: only the end
        self.texts: list[tuple[tuple[int, ...], float]] = []
        todo = [((), 1.0)]
        while todo:
            text, p = todo.pop()
            law = self.law[self.state(text)].tolist()
            if law[-1] > 0:
                self.texts.append((text, p * law[-1]))
            todo += [((*text, c), p * q) for c, q in enumerate(law[:-1]) if q > 0]

    def state(self, text: tuple[int, ...]) -> int:
        if len(text) == self.longest:
            return len(self.law) - 1
        state = 0
        for c in (0,) * self.order + text:
            state = (state * len(self.letters) + c) % len(self.letters) ** self.order
        return state

    def bytes(self, text: tuple[int, ...]) -> bytes:
        return "".join(self.letters[c] for c in text).encode()


class AnyText(EveryText):
    """All texts of up to `longest` letters, each as likely as chance has it."""

    def __init__(self, letters: str, longest: int, seed: int = 0):
        rng, self.letters, self.law = random.Random(seed), letters, torch.ones(1, 1)
        texts = [t for n in range(longest + 1) for t in itertools.product(range(len(letters)), repeat=n)]
        self.texts = [(text, rng.expovariate(1)) for text in texts]

    def state(self, text: tuple[int, ...]) -> int:
        return 0


class Tokens:
    """The exact law of the tokens of all texts: shares of the texts that go on so."""

    def __init__(self, vocabulary: gold_data.Vocabulary, source: EveryText):
        self.vocabulary, self.ids, self.mass = vocabulary, {}, defaultdict(float)
        self.after = defaultdict(lambda: defaultdict(float))
        for text, p in source.texts:
            data = source.bytes(text)
            ids, ends = vocabulary.encode(data)
            assert (ends[-1] if data else 0) == len(data)
            self.ids[text] = [*ids, vocabulary.ends[0]]
            for i, token in enumerate(self.ids[text]):
                self.after[tuple(ids[:i])][token] += p

    def rows(self, ids: list[int]) -> list[list[float]]:
        """Laws along a path."""
        out = []
        for i in range(len(ids)):
            law = [0.0] * self.vocabulary.size
            for token, p in self.after[tuple(ids[:i])].items():
                law[token] = p
            out.append([p / sum(law) for p in law])
        return out


LOSSES = ("ce", "uld", "hybrid", "bins", "alm", "bins+alm", "prefix")


class Problem:
    def __init__(self, source: Source, merges: set[tuple[int, ...]], texts: int = 192, length: int = 16):
        rng = random.Random(1)
        self.source, tokens = source, Teacher(source, merges)
        word = lambda w: "".join(LETTERS[c] for c in w).encode()
        both = (
            LongestMatch([*(word((c,)) for c in range(len(LETTERS))), None]),
            LongestMatch([*(word(t) for t in tokens.tokens), None]),
        )
        samples, contexts, laws = [], [], []
        for _ in range(texts):
            state, letters = source.sample(length, rng)
            ids = tokens.tokenize(letters)
            ends = np.arange(1, length + 1), np.cumsum([len(tokens.tokens[i]) for i in ids])
            queries = gold_data.prefix_queries(*both, letters, ids, word(letters), ended=False)
            alignment = gold_data.Alignment(ids, length, len(ids), *gold_data.spans(*ends), length, length, queries)
            samples.append(gold_data.Sample([0], letters, False, True, [0], alignment=alignment))
            contexts += [source.step(state, letters[:i]) for i in range(length)]
            laws += tokens.path(state, ids)
        self.batch = gold_data.collate(samples)
        # hidden states are one-hot: logits by lookup
        self.student_hidden = torch.eye(source.num_states, dtype=torch.float64)[contexts]
        table = torch.tensor(np.array(tokens.laws))
        table = torch.cat([table, torch.zeros(len(table), 1, dtype=torch.float64)], 1).clamp_min(1e-30).log()
        hidden, head = torch.eye(len(table), dtype=torch.float64)[laws], gold_loss.Head(table.T.contiguous())
        self.teacher = gold_loss.Side(hidden, head, self.batch.teacher_targets, self.batch.teacher_span)
        self.teacher_logprobs = gold_loss.token_logprobs(self.teacher)[0]
        bins = bins_loss.shared_bins(*both)
        self.bins = (torch.tensor(bins[0]), torch.tensor(bins[1]), bins[2])
        self.match = tuple(map(torch.tensor, gold_data.shared_ids(*both)))
        self.queries = [
            gold_loss.Queries(order=torch.tensor(v.order), edge=torch.tensor(v.edge), **q)
            for v, q in zip(both, (self.batch.student_queries, self.batch.teacher_queries))
        ]

    @classmethod
    def of(cls, source: EveryText, student, teacher, texts: int, cut: float = 0.3) -> "Problem":
        """`student` and `teacher` are tokenizers, None for single letters; this share of the texts is cut."""
        self, rng = cls.__new__(cls), random.Random(1)
        single = LongestMatch([*(c.encode() for c in source.letters), None])
        both = [single if t is None else real_vocabulary(t) for t in (student, teacher)]
        sides, self.source = [Tokens(v, source) for v in both], source
        samples, contexts, laws = [], [], ([], [])
        for text, _ in rng.choices(source.texts, [p for _, p in source.texts], k=texts):
            ids, data = [side.ids[text] for side in sides], source.bytes(text)
            ended = rng.random() > cut
            if not ended:  # where both have a boundary, as gold_data.align cuts
                at = [set(accumulate(v.lengths[i[:-1]].tolist())) for v, i in zip(both, ids)]
                data = data[: rng.choice(sorted(at[0] & at[1] & {*range(1, len(data) + 1)}) or [0])]
                ids = [i[: np.searchsorted(v.lengths[i].cumsum(), len(data)) + 1] for v, i in zip(both, ids)]
                if not data:
                    continue
            queries = gold_data.prefix_queries(*both, *ids, data, ended)
            none = np.zeros(0, dtype=np.int64)
            alignment = gold_data.Alignment(
                ids[1], len(ids[0]), len(ids[1]), none, none, 0, len(data), len(data), queries
            )
            samples.append(gold_data.Sample([0], ids[0], ended, True, [0], alignment=alignment))
            contexts += [source.state(text[:i]) for i in range(len(ids[0]))]
            for law, side, path in zip(laws, sides, ids):
                law += side.rows(path)
        self.batch, self.contexts = gold_data.collate(samples), contexts
        self.student_hidden = torch.eye(len(source.law), dtype=torch.float64)[contexts]
        tables = [torch.tensor(law, dtype=torch.float64).clamp_min(1e-30).log() for law in laws]
        self.rows, table = tables
        head = gold_loss.Head(table.T.contiguous())
        self.teacher = gold_loss.Side(torch.eye(len(table), dtype=torch.float64), head, self.batch.teacher_targets)
        self.queries = [
            gold_loss.Queries(order=torch.tensor(v.order), edge=torch.tensor(v.edge), **q)
            for v, q in zip(both, (self.batch.student_queries, self.batch.teacher_queries))
        ]
        return self

    def at_the_truth(self, beta: float) -> tuple[float, float]:
        """(loss per token, largest gradient) of a student that is the exact law of its own tokens."""
        rows = self.rows.clone().requires_grad_()
        student = gold_loss.Side(
            rows, gold_loss.Head(torch.eye(rows.size(1), dtype=torch.float64)), self.batch.student_targets
        )
        m = len(self.batch.offset_sample)
        loss = gold_loss.prefix_loss(student, self.teacher, *self.queries, self.batch.offset, m, beta=beta).total
        loss.backward()
        return loss.item() / len(rows), float(rows.grad.abs().max())

    def loss(self, name: str, weight: torch.Tensor, beta: float) -> torch.Tensor:
        """Loss per letter over all texts; weight (letters + 1, states) is the student."""
        batch = self.batch
        student = gold_loss.Side(self.student_hidden, gold_loss.Head(weight), batch.student_targets, batch.student_span)
        teacher = self.teacher
        if name == "prefix":
            loss = gold_loss.prefix_loss(
                student, teacher, *self.queries, batch.offset, len(batch.offset_sample), beta=beta
            ).total
        elif name == "ce":
            loss = gold_loss.fused_cross_entropy(student).total
        elif name in ("uld", "hybrid"):
            loss = gold_loss.uld_loss(student, teacher, self.match if name == "hybrid" else None, beta=beta).total
        else:
            loss = 0.0
            if "bins" in name:
                loss = loss + bins_loss.bins_loss(student, teacher, *self.bins, beta=beta).total
            if "alm" in name:
                loss = loss + gold_loss.alm_loss(student, self.teacher_logprobs, teacher.span).total
        return loss / len(batch.student_targets)

    def train(self, name: str, start: str, beta: float = 0.5, steps: int = 300, lr: float = 0.05) -> float:
        """KL(truth || student) after training from "truth" or "random"."""
        table = torch.cat([self.source.law, torch.zeros(len(self.source.law), 1)], 1)[:, : len(LETTERS) + 1]
        table = self.source.law if isinstance(self.source, EveryText) else table
        possible, table = table > 0, table.clamp_min(math.exp(-30)).log()  # or texts never end
        if start == "random":
            random_table = torch.randn(table.shape, generator=torch.Generator().manual_seed(0)).double()
            table = torch.where(possible, random_table, table)
        weight = table.T.contiguous().requires_grad_()
        optimizer = torch.optim.Adam([weight], lr=lr)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimizer.zero_grad()
            self.loss(name, weight, beta).backward()
            optimizer.step()
        if isinstance(self.source, Source):
            return self.source.kl(weight.detach().T[:, : len(LETTERS)])
        law = self.source.law
        gap = torch.where(law > 0, law * (law.clamp_min(1e-99).log() - weight.detach().T.log_softmax(-1)), 0.0).sum(1)
        return float(gap[self.contexts].mean())


# setting: (order of the source, vocabulary of the teacher)
SETTINGS = {
    "2 pairs": (1, "2 pairs"),
    "8 pairs": (1, "8 pairs"),
    "lengths 2-4": (1, "lengths 2-4"),
    "lengths 3-4, prefixes missing": (1, "lengths 3-4, prefixes missing"),
    "8 pairs, order-2 source": (2, "8 pairs"),
}


MERGES = b"ab|cd|de|bc|abcd|fa|ef|cde"
SPLIT = b"a\xc3|\xe6\x98|\x8ea|\xc3\xa9|\xc3\xa9a|\xa9\xc3"  # of a, e with an accent (C3 A9) and U+660E (E6 98 8E)
PIECES = dict(a=-2, b=-2.5, c=-2.2, cab=-5, ab=-3.5, bc=-3.1, ca=-4, abc=-5.2, ba=-4.4) | {
    "\u00e9": -3,
    "\u00e9a": -4.1,
}
# a real tokenizer: (letters, order of the source, longest text, probability of an end, tokenizer, another)
REAL = {
    "BPE of 8 merges": ("abcdef", 1, 5, 0.0, lambda: byte_pairs(MERGES), lambda: byte_pairs(b"bc|cd|ab|bcd")),
    "BPE of 8 merges, order 2": ("abcdef", 2, 5, 0.0, lambda: byte_pairs(MERGES), lambda: byte_pairs(b"bc|cd|ab|bcd")),
    "BPE, overlapping merges": ("abcd", 1, 6, 0.0, lambda: byte_pairs(b"bc|ab|cd"), lambda: byte_pairs(b"cd|bc|ab")),
    "BPE, with ends": (
        "abc",
        1,
        8,
        0.1,
        lambda: byte_pairs(b"ab|bc|ca|abc|aa|cab|bb|bca"),
        lambda: byte_pairs(b"bc|ab"),
    ),
    "BPE, split letters": (
        "a\u00e9\u00e8\u660e",
        1,
        6,
        0.1,
        lambda: byte_pairs(SPLIT),
        lambda: byte_pairs(b"\xc3\xa8|\xa9a"),
    ),
    "Unigram": ("abc\u00e9\u00e8", 1, 5, 0.1, lambda: unigram(PIECES), lambda: unigram(PIECES | {"bca": -3.0})),
}


def make_real(setting: str, sides: str = "teacher", texts: int = 192) -> Problem:
    """`sides`: who has the tokenizer, "teacher", "student" or "both"; the other has single letters, or another one."""
    *source, tokenizer, another = REAL[setting]
    teacher = {"teacher": tokenizer, "both": another}.get(sides, lambda: None)
    return Problem.of(EveryText(*source), tokenizer() if sides != "teacher" else None, teacher(), texts)


def make(setting: str, texts: int = 192) -> Problem:
    order, merges = SETTINGS[setting]
    source = Source(order)
    mixed = source.likely_strings(2, 3) | source.likely_strings(3, 3) | source.likely_strings(4, 3)
    found = {
        "2 pairs": source.likely_strings(2, 2),
        "8 pairs": source.likely_strings(2, 8),
        "lengths 2-4": {w[:n] for w in mixed for n in range(2, len(w) + 1)},
        "lengths 3-4, prefixes missing": source.likely_strings(3, 3) | source.likely_strings(4, 4),
    }
    return Problem(source, found[merges], texts)


BETAS = (0.0, 0.5, 1.0)


def draw(results: dict[str, dict[str, float]], real: dict[str, list[float]], path: Path) -> None:
    """Bars on a log scale, nats per letter above the optimum: {setting: {loss: ..}} started at the truth, beta 0.5, and
    {real tokenizer: one for each of BETAS} of `prefix` started at random."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    colors = dict(zip(LOSSES, ["#888888", "#c6a15b", "#d9822b", "#5b8fc6", "#7fb37f", "#8c6bb1", "#c0262d"]))
    bars = {loss: [by_loss[loss] for by_loss in results.values()] for loss in LOSSES}
    betas = {f"prefix, beta {beta:g}": [by_beta[i] for by_beta in real.values()] for i, beta in enumerate(BETAS)}
    colors |= dict(zip(betas, ["#e58a8d", "#c0262d", "#7a1419"]))
    titles = (
        "where each loss leaves a student that started at the truth",
        "real tokenizers: where prefix ends from random",
    )
    for axes, named, names, title in zip((left, right), (bars, betas), (results, real), titles):
        for i, (name, values) in enumerate(named.items()):
            heights, width = [max(x, 1e-6) for x in values], 0.8 / len(named)
            at = np.arange(len(heights)) + (i - (len(named) - 1) / 2) * width
            drawn = axes.bar(at, heights, width, bottom=0, label=name, color=colors[name])
            labels = ["<1e-6" if h <= 1e-6 else f"{h:.1g}" if h < 0.1 else f"{h:.2f}" for h in heights]
            axes.bar_label(drawn, labels, fontsize=6)
        axes.set_yscale("log")
        axes.set_ylim(5e-7, 8)
        axes.set_xticks(range(len(names)), [re.sub("(,| of) ", r"\1\n", name) for name in names], fontsize=8)
        axes.set_title(title, fontsize=11)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend(ncols=len(named), loc="upper center", fontsize=8)
    left.set(ylabel="KL(truth || student), nats per letter; 0 is right")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    torch.set_num_threads(1)
    from gold_eval import markdown  # (loss per token, largest gradient) are the worst of beta 0, 0.5 and 1

    ends: dict[str, dict[str, dict[str, float]]] = {start: {} for start in ("truth", "random")}
    for setting in SETTINGS:
        problem = make(setting)
        for start in ends:
            ends[start][setting] = {loss: problem.train(loss, start) for loss in LOSSES}
    form = lambda x: f"{x:.4f}" if x >= 1e-4 else "0.0000"
    rows = [["started at the truth / at random", *SETTINGS]]
    for loss in LOSSES:
        rows.append([loss, *(" / ".join(form(ends[start][setting][loss]) for start in ends) for setting in SETTINGS)])
    print(markdown(rows))
    rows = [
        ["prefix, a real tokenizer", "loss and gradient at the truth: teacher's", "student's", "both", "from random"]
    ]
    real = {}
    for setting in REAL:
        worst = []
        for sides in ("teacher", "student", "both"):
            found = np.abs([make_real(setting, sides).at_the_truth(beta) for beta in BETAS]).max(0)
            worst.append(f"{found[0]:.0e}, {found[1]:.0e}")
        problem = make_real(setting, texts=512)
        real[setting] = [problem.train("prefix", "random", beta, lr=0.2) for beta in BETAS]
        rows.append([setting, *worst, " / ".join(map(form, real[setting]))])
    print(markdown(rows))
    draw(ends["truth"], real, Path(__file__).parent.parent / "assets" / "known_optimum.png")


if __name__ == "__main__":
    main()
