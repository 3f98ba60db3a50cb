"""A text source whose exact law every loss can be judged by.

Letters follow a Markov chain. The student is a table over single letters; the teacher is the *exact* law of the same
text, written in letters and merged strings with the longest match first. A loss is unbiased if a student that starts
at the truth stays there, and one that starts anywhere reaches it.
"""

import itertools
import random

import numpy as np
import torch

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


class LetterVocabulary(gold_data.Vocabulary):
    """A vocabulary given by its byte strings; the last id ends the text."""

    def __init__(self, strings: list[bytes]):
        self.bytes, self.size, self.ends, self.lossy = [*strings, None], len(strings) + 1, (len(strings),), False
        self.lengths = np.array([len(b or b"") for b in self.bytes])


LOSSES = ("ce", "uld", "hybrid", "bins", "alm", "bins+alm", "prefix")


class Problem:
    def __init__(self, source: Source, merges: set[tuple[int, ...]], texts: int = 192, length: int = 16):
        rng = random.Random(1)
        self.source, self.teacher = source, Teacher(source, merges)
        word = lambda w: "".join(LETTERS[c] for c in w).encode()
        self.student_vocabulary = LetterVocabulary([word((c,)) for c in range(len(LETTERS))])
        self.teacher_vocabulary = LetterVocabulary([word(t) for t in self.teacher.tokens])
        bins = gold_data.shared_bins(self.student_vocabulary, self.teacher_vocabulary)
        self.bins = (torch.tensor(bins[0]), torch.tensor(bins[1]), bins[2])
        self.match = tuple(map(torch.tensor, gold_data.shared_ids(self.student_vocabulary, self.teacher_vocabulary)))
        self.samples, self.contexts, self.laws = [], [], []
        for _ in range(texts):
            state, letters = source.sample(length, rng)
            ids = self.teacher.tokenize(letters)
            student_ends = np.arange(1, length + 1)
            teacher_ends = np.cumsum([len(self.teacher.tokens[i]) for i in ids])
            span_s, span_t, num_spans = gold_data.spans(student_ends, teacher_ends)
            queries = gold_data.prefix_queries(
                self.student_vocabulary, self.teacher_vocabulary, letters, ids, word(letters), ended=False
            )
            alignment = gold_data.Alignment(ids, length, len(ids), span_s, span_t, num_spans, length, length, queries)
            self.samples.append(gold_data.Sample([0], letters, False, True, [0], alignment=alignment))
            self.contexts.append([source.step(state, letters[:i]) for i in range(length)])
            self.laws.append(self.teacher.path(state, ids))
        laws = torch.tensor(np.array(self.teacher.laws))
        logits = torch.cat([laws, torch.zeros(len(laws), 1, dtype=torch.float64)], 1).clamp_min(1e-30).log()
        self.teacher_head = gold_loss.Head(logits.T.contiguous())  # hidden states are one-hot: logits by lookup
        self.teacher_hidden = torch.eye(len(laws), dtype=torch.float64)
        self.student_hidden = torch.eye(source.num_states, dtype=torch.float64)

    def loss(self, name: str, weight: torch.Tensor, picks: list[int], beta: float) -> torch.Tensor:
        """Sum over the picked texts divided by their letters; weight (letters + 1, states) is the student."""
        batch = gold_data.collate([self.samples[i] for i in picks])
        student = gold_loss.Side(
            self.student_hidden[sum((self.contexts[i] for i in picks), [])],
            gold_loss.Head(weight),
            batch.student_targets,
            batch.student_span,
        )
        teacher = gold_loss.Side(
            self.teacher_hidden[sum((self.laws[i] for i in picks), [])],
            self.teacher_head,
            batch.teacher_targets,
            batch.teacher_span,
        )
        if name == "prefix":
            vocabularies = (self.student_vocabulary, self.teacher_vocabulary)
            queries = [
                gold_loss.Queries(order=torch.tensor(v.order), edge=torch.tensor(v.edge), **q)
                for v, q in zip(vocabularies, (batch.student_queries, batch.teacher_queries))
            ]
            loss = gold_loss.prefix_loss(
                student, teacher, *queries, batch.offset, len(batch.offset_sample), beta=beta
            ).total
        elif name == "ce":
            loss = gold_loss.fused_cross_entropy(student).total
        elif name == "alm":
            loss = gold_loss.alm_loss(student, gold_loss.token_logprobs(teacher)[0], teacher.span).total
        elif name == "uld":
            loss = gold_loss.uld_loss(student, teacher).total
        elif name == "hybrid":
            loss = gold_loss.uld_loss(student, teacher, self.match, beta=beta).total
        elif name in ("bins", "bins+alm"):
            loss = gold_loss.bins_loss(student, teacher, *self.bins, beta=beta).total
            if name == "bins+alm":
                loss = loss + gold_loss.alm_loss(student, gold_loss.token_logprobs(teacher)[0], teacher.span).total
        return loss / len(batch.student_targets)

    def train(self, name: str, start: str, beta: float = 0.5, steps: int = 300, lr: float = 0.05) -> float:
        """KL(truth || student) after training from "truth" or "random"."""
        states, size = self.source.num_states, len(LETTERS)
        table = self.source.law.log()
        if start == "random":
            table = torch.randn(states, size, generator=torch.Generator().manual_seed(0)).double()
        end = torch.full((states, 1), -30.0, dtype=torch.float64)  # texts never end here
        weight = torch.cat([table, end], 1).T.contiguous().requires_grad_()
        optimizer, rng = torch.optim.Adam([weight], lr=lr), random.Random(5)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimizer.zero_grad()
            self.loss(name, weight, rng.sample(range(len(self.samples)), min(64, len(self.samples))), beta).backward()
            optimizer.step()
        return self.source.kl(weight.detach().T[:, :size])


def merge_sets(source: Source) -> dict[str, set[tuple[int, ...]]]:
    """The vocabularies of the test: letters plus these."""
    mixed = source.likely_strings(2, 3) | source.likely_strings(3, 3) | source.likely_strings(4, 3)
    closed = {w[:n] for w in mixed for n in range(2, len(w) + 1)}
    return {
        "2 pairs": source.likely_strings(2, 2),
        "8 pairs": source.likely_strings(2, 8),
        "lengths 2-4, every prefix a token": closed,
        "lengths 3-4, prefixes missing": source.likely_strings(3, 3) | source.likely_strings(4, 4),
    }
