"""gold_data below its rows, against slow plain references: tokens as bytes, alignment, prompts, batches, puzzles, CLI.

pytest tests/test_data.py

Rows of the named data sets are in test_rows.py; the values of the losses that use all this in test_loss.py.
"""

import copy
import json
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from fractions import Fraction  # noqa: F401 (for eval)
from itertools import pairwise
from pathlib import Path

import bins_loss
import conftest
import numpy as np
import pytest
import torch
from bench_coverage import of_ranks
from conftest import MULTILINGUAL, PROSE, LongestMatch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

import gold_data
import gold_loss
from gold_data import Alignment, Difficulty, Sample, Vocabulary

TEXTS = [*MULTILINGUAL, PROSE[:2000], "a", " ", "\n\n", "  two  spaces ", "<|im_end|> as text", "\u0120"]
CHARACTERS = "".join(sorted(set("".join(MULTILINGUAL)))) + "abc 012\n\u0120"


def ranks(size: int = 400) -> dict[bytes, int]:
    """A tiktoken vocabulary: bytes in an order of their own, then merged pairs of earlier tokens."""
    out = {bytes([b]): i for i, b in enumerate(random.Random(0).sample(range(256), 256))}
    words = Counter(word.encode() for word in re.findall(r" ?\w+|[^\w\s]+|\s+", PROSE[:20_000]))
    parts = {word: [bytes([b]) for b in word] for word in words}
    while len(out) < size:
        pairs = Counter()
        for word, n in words.items():
            for pair in pairwise(parts[word]):
                pairs[pair] += n
        (a, b), _ = pairs.most_common(1)[0]
        out.setdefault(a + b, len(out))
        for split in parts.values():
            i = 0
            while i < len(split) - 1:
                if (split[i], split[i + 1]) == (a, b):
                    split[i : i + 2] = [a + b]
                i += 1
    return out


def tiktoken_style() -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=of_ranks(ranks(), r" ?\w+|[^\w\s]+|\s+"))
    fast.add_special_tokens({"eos_token": "<\uff5cend\u2581of\u2581text\uff5c>"})
    return fast


TOKENIZERS = {
    "byte level": conftest.byte_level,
    "digits": lambda: conftest.byte_level(500, digits=True),
    "metaspace": conftest.metaspace,
    "metaspace, nothing in front": lambda: conftest.metaspace(prepend=False),
    "unigram": conftest.unigram,
    "tiktoken": tiktoken_style,
}
ALL = TOKENIZERS | {"wordpiece": conftest.wordpiece}
PARTS = st.sampled_from([b"caf\xc3\xa9 ", b"\xc3", b"\xf0\x9f\x98", b"\xff", b"a"])  # of characters
_made: dict[str, Vocabulary] = {}


def vocabulary(name: str) -> Vocabulary:
    if name not in _made:
        tokenizer = ALL[name]()
        _made[name] = Vocabulary(tokenizer, gold_data.end_ids(tokenizer), len(tokenizer) + 3)  # 3 rows of padding
    return _made[name]


small_vocabularies = st.lists(st.text("ab", min_size=2, max_size=4), max_size=8).map(
    lambda longer: LongestMatch([b"a", b"b", *(s.encode() for s in longer), None])
)
both = lambda: st.tuples(small_vocabularies, small_vocabularies)


def tokenize_randomly(v: Vocabulary, text: bytes, rng: random.Random) -> list[int]:
    ids, at = [], 0
    while at < len(text):
        ids.append(rng.choice([i for i, b in enumerate(v.bytes) if b and text.startswith(b, at)]))
        at += len(v.bytes[ids[-1]])
    return ids


# ---- tokens as bytes


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_of_every_token_are_what_the_tokenizer_decodes_it_to(name):
    v = vocabulary(name)
    backend = v.tokenizer.backend_tokenizer
    (anchor,) = v.tokenizer("=", add_special_tokens=False)["input_ids"][-1:]
    assert v.bytes[anchor] in (b"=", b" =")
    seen = 0
    for i, data in enumerate(v.bytes[: len(v.tokenizer)]):
        try:
            text = (data or b"").decode()
        except UnicodeDecodeError:
            continue  # part of a character: the tokenizer cannot show it, joined tokens below do
        seen += data is not None
        assert backend.decode([anchor, i]) == backend.decode([anchor]) + text, (i, data)
    assert seen > 250


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(text=st.one_of(st.sampled_from(TEXTS), st.text(CHARACTERS, max_size=20)))
def test_joined_bytes_of_a_text_are_the_text(name, text):
    v = vocabulary(name)
    ids, ends = v.encode(text.encode())
    assert v.join(ids) == text.encode() and not v.lossy
    assert ends.tolist() == [len(v.join(ids[: i + 1])) for i in range(len(ids))]
    assert not set(ids) & set(v.ends)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(data=st.one_of(st.binary(max_size=12), st.lists(PARTS).map(b"".join)))
def test_bytes_that_are_no_text_are_written_too(name, data):
    v = vocabulary(name)
    ids, ends = v.encode(data)
    assert v.join(ids) == data and (ends[-1] if data else 0) == len(data)


@pytest.mark.parametrize("name", ["byte level", "digits", "metaspace, nothing in front", "unigram", "tiktoken"])
def test_a_text_is_encoded_as_the_tokenizer_itself_does(name):
    v = vocabulary(name)
    for text in TEXTS:
        expected = v.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert v.encode(text.encode())[0] == expected, text


def test_a_phantom_space_in_front_is_not_part_of_a_completion():
    v = vocabulary("metaspace")
    whole = lambda text: v.tokenizer(text, add_special_tokens=False)["input_ids"]
    for text in ("Hello world", " Hello", "3 + 4", "\nx"):
        assert v.join(whole(text)) == b" " + text.encode()  # what the tokenizer does to a text of its own
        ids, _ = v.encode(text.encode())
        assert v.join(ids) == text.encode()
        # its ids are those it has in the middle of a text
        assert any(whole(before + text) == whole(before) + ids for before in ("\n", "=", "0")), text


def test_a_text_with_the_mark_of_a_space_in_it_cannot_be_written_by_those_who_use_that_mark():
    text = "a\u2581b".encode()
    assert vocabulary("byte level").encode(text)[1][-1] == len(text)
    for name in ("metaspace", "metaspace, nothing in front", "unigram"):
        assert vocabulary(name).encode(text)[1].tolist() == [1], name


def test_special_tokens_write_nothing_and_literal_added_tokens_their_own_text():
    v = vocabulary("byte level")
    ids = v.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<think>"])
    assert [v.bytes[i] for i in ids] == [None, None, b"<think>"] and v.ends[0] == ids[0]
    assert v.bytes[len(v.tokenizer) :] == [None] * 3
    assert vocabulary("tiktoken").bytes[-4:] == [None] * 4
    m = vocabulary("metaspace")
    assert [m.bytes[m.tokenizer.convert_tokens_to_ids(t)] for t in ("<s>", "</s>", "<unk>", "<0xC3>")] == [
        None, None, None, b"\xc3",
    ]  # fmt: skip
    fast = conftest.byte_level.__wrapped__(300)
    fast.add_tokens(["\u00fcber", "\u4eba"])
    assert gold_data.token_bytes(fast)[-2:] == ["\u00fcber".encode(), "\u4eba".encode()]


def test_tiktoken_ranks_keep_their_ids_and_bytes():
    v = vocabulary("tiktoken")
    assert {b: i for i, b in enumerate(v.bytes) if b} == ranks()
    encoding = pytest.importorskip("tiktoken").Encoding(
        "x", pat_str=r" ?\w+|[^\w\s]+|\s+", mergeable_ranks=ranks(), special_tokens={}
    )
    for text in TEXTS:
        assert v.encode(text.encode())[0] == encoding.encode_ordinary(text)


def test_a_wordpiece_tokenizer_is_lossy_and_its_ends_are_offsets_in_the_text():
    v = vocabulary("wordpiece")
    assert v.lossy
    text = "The  caf\u00e9 is (really) open."
    ids, ends = v.encode(text.encode())
    assert v.tokenizer.convert_ids_to_tokens(ids) == v.tokenizer.tokenize(text)
    assert ends[-1] == len(text.encode()) and (np.diff(ends) > 0).all()
    pieces = [text.encode()[a:b] for a, b in pairwise([0, *ends.tolist()])]
    for i, piece in zip(ids, pieces):
        if v.bytes[i] is not None:  # not [UNK]
            assert v.bytes[i].strip() == piece.strip()


def bpe(vocab: list[str], merges: list[tuple[str, str]], normalizer=None, **more) -> PreTrainedTokenizerFast:
    t = Tokenizer(models.BPE({p: i for i, p in enumerate(vocab)}, merges, **more))
    if normalizer is not None:
        t.normalizer = normalizer
    t.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<end>", unk_token="<unk>")


def test_what_a_tokenizer_cannot_write_ends_its_tokens():
    probe = sorted(set("caf\u00e9 12+3=5(ok)\n"))
    plain = bpe(["<unk>", "<end>", *probe, "ca"], [("c", "a")], unk_token="<unk>")
    v = Vocabulary(plain, (1,), len(plain))
    ids, ends = v.encode(b"cafzca")
    assert v.join(ids) == b"caf" and ends.tolist() == [2, 3]
    assert v.encode("o\u00e9".encode() + b"\xff" + b"k")[1].tolist() == [1, 3]  # no single-byte token for \xff
    lower = bpe(["<unk>", "<end>", *probe], [], normalizers.Lowercase(), unk_token="<unk>")
    v = Vocabulary(lower, (1,), len(lower))
    assert not v.lossy and v.join(v.encode(b"okAok")[0]) == b"ok"


def test_tokenizers_whose_bytes_are_unknown_are_named_and_heads_that_are_too_small():
    with pytest.raises(ValueError, match="dict is no fast tokenizer"):
        gold_data.token_bytes({})
    words = bpe(["<unk>", "<end>", "a</w>"], [], end_of_word_suffix="</w>")
    with pytest.raises(ValueError, match="end-of-word"):
        gold_data.token_bytes(words)
    tokenizer = conftest.byte_level()
    with pytest.raises(ValueError, match=f"{len(tokenizer)} ids, the head 100 rows"):
        Vocabulary(tokenizer, (2,), 100)


@pytest.mark.parametrize("name", ALL)
def test_sorted_tokens(name):
    v = vocabulary(name)
    writing = [i for i, b in enumerate(v.bytes) if b]
    order = v.order.tolist()
    k = len(writing)
    assert sorted(order[:k]) == writing and order[k : k + len(v.ends)] == list(v.ends)
    assert all(v.bytes[a] <= v.bytes[b] for a, b in pairwise(order[:k])) and sorted(order) == list(range(v.size))
    assert [order.index(i) for i in range(v.size)] == v.rank.tolist()
    for b in range(256):
        assert set(order[v.edge[b] : v.edge[b + 1]]) == {i for i in writing if v.bytes[i][0] == b}
    assert order[v.edge[256] : v.edge[257]] == list(v.ends)
    assert v.tokens == sorted(v.bytes[i] for i in writing)


def check_tree(strings: list[bytes], text: bytes):
    """`strings` sorted, with repetitions."""
    tree = gold_data.PrefixTree(strings)
    prefixes = {s[:n] for s in strings for n in range(len(s) + 1)} | {b""}
    spelled, todo = {0: b""}, [0]
    while todo:  # walk down from the root by `children`
        node = todo.pop()
        index, child = tree.children(np.array([node]))
        assert not index.any() and (np.diff(tree.byte[child]) > 0).all()
        for c in child.tolist():
            assert c not in spelled
            spelled[c] = spelled[node] + bytes([tree.byte[c]])
            todo.append(c)
    assert sorted(spelled.values()) == sorted(prefixes)
    for node, prefix in spelled.items():
        assert strings[tree.lo[node] : tree.hi[node]] == [s for s in strings if s.startswith(prefix)]
        assert strings[tree.lo[node] : tree.rest[node]] == [s for s in strings if s == prefix]
        assert (tree.rest > tree.lo)[node] == (prefix in strings)
    data, starts = np.frombuffer(text, np.uint8).astype(np.int64), np.arange(len(text))
    i, end, node = tree.walk(data, starts)
    found = Counter((a, b, spelled[c]) for a, b, c in zip(i.tolist(), end.tolist(), node.tolist()))
    spans = [(a, b) for a in range(len(text)) for b in range(a, len(text) + 1)]
    assert found == Counter((a, b, text[a:b]) for a, b in spans if text[a:b] in prefixes)


@settings(deadline=None)
@given(st.lists(st.text("abc", min_size=1, max_size=5), min_size=1), st.text("abcd", max_size=9))
def test_the_tree_of_prefixes(strings, text):
    check_tree(sorted(s.encode() for s in strings), text.encode())


def test_the_tree_of_prefixes_of_a_tokenizer():
    v = vocabulary("unigram")
    check_tree(sorted(b for b in v.bytes if b), "caf\u00e9 is 12 + 3".encode())


# ---- alignment


offsets = st.lists(st.integers(1, 30), unique=True, max_size=12).map(lambda x: np.array(sorted(x), dtype=np.int64))


@given(offsets, offsets)
def test_spans_are_those_of_a_walk_along_both_texts(a, b):
    i = j = number = 0
    expected = [-1] * len(a), [-1] * len(b)
    start = (0, 0)
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            expected[0][start[0] : i + 1] = [number] * (i + 1 - start[0])
            expected[1][start[1] : j + 1] = [number] * (j + 1 - start[1])
            number, i, j = number + 1, i + 1, j + 1
            start = (i, j)
        elif a[i] < b[j]:
            i += 1
        else:
            j += 1
    got = gold_data.spans(a, b)
    assert (got[0].tolist(), got[1].tolist(), got[2]) == (*expected, number)


PAIRS = [("byte level", "metaspace"), ("unigram", "digits"), ("tiktoken", "byte level"), ("metaspace", "wordpiece")]


def check_bins(student: Vocabulary, teacher: Vocabulary):
    bins = bins_loss.shared_bins(student, teacher)
    strings = {b for b in student.bytes if b} & {b for b in teacher.bytes if b}
    names: dict[int, object] = {}
    for v, mine in zip((student, teacher), bins):
        for i, b in enumerate(v.bytes):
            prefixes = [b[:n] for n in range(1, len(b) + 1) if b[:n] in strings] if b else []
            name = "end" if i in v.ends else max(prefixes, key=len) if prefixes else "nothing"
            assert names.setdefault(int(mine[i]), name) == name
    assert len(set(names.values())) == len(names) and max(names) < bins[2] == len(strings) + 2
    a, b = gold_data.shared_ids(student, teacher)
    assert [student.bytes[i] for i in a[:-1]] == [teacher.bytes[i] for i in b[:-1]] == sorted(strings)
    assert (a[-1], b[-1]) == (student.ends[0], teacher.ends[0]) and len(set(a)) == len(a)
    assert all(student.bytes.index(student.bytes[i]) == i for i in a[:-1])  # of equal strings, the first id


@pytest.mark.parametrize("names", PAIRS, ids=" and ".join)
def test_bins_and_shared_ids_of_two_tokenizers(names):
    check_bins(*map(vocabulary, names))


@given(both())
def test_bins_and_shared_ids_of_any_two_vocabularies(pair):
    check_bins(*pair)


def test_equal_vocabularies_have_a_bin_per_string():
    v = vocabulary("byte level")
    student, teacher, _ = bins_loss.shared_bins(v, v)
    assert (student == teacher).all()
    assert len(set(student.tolist())) == len(set(v.tokens)) + 2


def expected_queries(v: Vocabulary, other: Vocabulary, ids, other_ids, text: bytes, ended: bool):
    """(what each outcome asks, what each total asks, the path) as sets of (row, token id)."""
    n, ways = len(text), []
    for side, side_ids in ((v, ids), (other, other_ids)):
        at = [0]
        for i in side_ids:
            at.append(at[-1] + len(side.bytes[i] or b""))
        ways.append((at[: len(side_ids)], *side.closed(text, side_ids)))
    boundary = lambda at, k: k in at or k == n
    used = [k for k in range(n + 1) if all(known[k] for _, known, *_ in ways)]
    after = [*used[1:], n + 1]
    rows = {o: j for j, o in enumerate(ways[0][0])}
    starting = defaultdict(list)  # bytes -> ids of the tokens that start with them
    for i, b in enumerate(v.bytes):
        for length in range(1, len(b or b"") + 1):
            starting[b[:length]].append(i)

    def covering(target: bytes, strictly=False):
        reach = {(j, i) for o, j in rows.items() if o < len(target) for i in starting[target[o:]]}
        return {(j, i) for j, i in reach if not strictly or v.bytes[i] != target[ways[0][0][j] :]}

    outcomes, offset, totals = [], [], []
    for m, k in enumerate(used):
        if k == n and not ended:
            break
        full, told = all(boundary(at, k) for at, *_ in ways), [all(w[2][k, b] for w in ways) for b in range(256)]
        for b in range(256):
            if told[b]:
                outcomes.append(covering(text[:k] + bytes([b])))
                offset.append(m)
            elif full:  # every byte has a slot here, but this one is not counted
                outcomes.append({(rows[k], i) for i in starting[bytes([b])]})
                offset.append(-1 - m)
        end = {(len(ids) - 1, e) for e in v.ends}
        if full:
            outcomes.append(end if k == n else {(rows[k], e) for e in v.ends})
            offset.append(m)
        whole = all(w[3][k] == w[3][min(after[m], n)] for w in ways)
        if k < n and not told[text[k]] and whole and (after[m] <= n or ended):
            outcomes.append(covering(text[: after[m]]) if after[m] <= n else end)
            offset.append(m)
        total = covering(text[:k], strictly=boundary(ways[0][0], k))
        if k in rows:
            total |= {(rows[k], i) for i, b in enumerate(v.bytes) if b or i in v.ends}
        totals.append(total)
    return outcomes, offset, totals


def check_queries(pair, student_ids, teacher_ids, text, ended):
    student_ids = student_ids + [pair[0].ends[0]] * ended
    teacher_ids = teacher_ids + [pair[1].ends[0]] * ended
    *queries, offset, num_offsets = gold_data.prefix_queries(*pair, student_ids, teacher_ids, text, ended)
    sides = (*pair, student_ids, teacher_ids), (*pair[::-1], teacher_ids, student_ids)
    for q, (v, other, ids, other_ids) in zip(queries, sides):
        outcomes, expected_offset, totals = expected_queries(v, other, ids, other_ids, text, ended)
        assert offset.tolist() == expected_offset and num_offsets == len(totals)
        expected = [Counter(outcome) for outcome in outcomes + totals]
        got = [Counter() for _ in expected]
        for row, lo, hi, slot in zip(q["row"], q["lo"], q["hi"], q["slot"]):
            if slot != -1 - num_offsets:
                got[slot if slot >= 0 else len(outcomes) - 1 - slot].update((int(row), int(i)) for i in v.order[lo:hi])
        for row, first in zip(q["full_row"], q["full_slot"]):
            for b in range(257):
                got[first + b].update((int(row), int(i)) for i in v.order[v.edge[b] : v.edge[b + 1]])
        assert got == expected
        assert (np.diff(q["row"]) >= 0).all()
        path = [(int(q["row"][p]), v.order[q["lo"][p] : q["hi"][p]].tolist()) for p in q["path"]]
        assert path == [(j, [i]) for j, i in enumerate(ids)]


@settings(deadline=None, max_examples=150)
@given(both(), st.text("ab", max_size=7), st.booleans(), st.randoms(use_true_random=False))
def test_queries_of_the_prefix_loss_ask_for_exactly_the_covering_tokens(pair, text, ended, rng):
    if text or ended:
        text = text.encode()
        check_queries(pair, *(tokenize_randomly(v, text, rng) for v in pair), text, ended)


@pytest.mark.parametrize("names", PAIRS[:3], ids=" and ".join)
def test_queries_of_two_tokenizers(names):
    pair, text = list(map(vocabulary, names)), "caf\u00e9s return 128 \u660e".encode()
    check_queries(pair, *(v.encode(text)[0] for v in pair), text, True)


def expected_alignment(student: Vocabulary, teacher: Vocabulary, ids: list[int], finished: bool) -> Alignment:
    text, ends = b"", []
    for i in ids[: len(ids) - finished]:
        text += student.bytes[i] or b""
        ends.append(len(text))
    teacher_ids, teacher_ends = teacher.encode(text)
    teacher_ends = [int(e) for e in teacher_ends]
    unwritten = len(text) - (teacher_ends[-1:] or [0])[0]
    complete = finished and not unwritten
    stop = max(set(ends) & set(teacher_ends), default=0)
    if not complete:
        ends, teacher_ends = [e for e in ends if e <= stop and stop], [e for e in teacher_ends if e <= stop]
    teacher_ids = list(teacher_ids[: len(teacher_ends)])
    if complete:
        ends, teacher_ends = ends + [stop + 1], teacher_ends + [stop + 1]
        teacher_ids.append(teacher.ends[0])
    common = sorted(set(ends) & set(teacher_ends))
    first = lambda e: next(n for n, c in enumerate(common) if c >= e)
    mute = [e == before for before, e in pairwise([0, *ends])]  # it writes nothing and is in no span
    return Alignment(
        teacher_ids, len(ends), len(teacher_ends), np.array([-1 if no else first(e) for e, no in zip(ends, mute)]),
        np.array([first(e) for e in teacher_ends]), len(common),
        len(text), stop, unwritten=unwritten,
    )  # fmt: skip


def same_alignment(a: Alignment, b: Alignment) -> bool:
    plain = lambda x: {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(x).items() if k != "prefix"}
    return plain(a) == plain(b)


@pytest.mark.parametrize("names", PAIRS[:3] + [p[::-1] for p in PAIRS[:3]], ids=" and ".join)
@settings(deadline=None, max_examples=40)
@given(data=st.data(), finished=st.booleans())
def test_any_sampled_ids_are_aligned_by_their_bytes(names, data, finished):
    """Also ids that are no tokenizer's choice: parts of characters, specials, unused rows."""
    student, teacher = map(vocabulary, names)
    text = data.draw(st.sampled_from(TEXTS))
    ids = list(student.encode(text.encode())[0])[:40]
    ids += data.draw(st.lists(st.integers(0, student.size - 1), max_size=5))
    ids = [i for i in ids if i not in student.ends] + [student.ends[-1]] * finished
    got = gold_data.align(student, teacher, ids, finished, prefix=True)
    assert same_alignment(got, expected_alignment(student, teacher, ids, finished))
    joined = [v.join(x) for v, x in ((student, ids[: got.student_scored]), (teacher, got.teacher_ids))]
    assert joined[0] == joined[1] and len(joined[0]) == got.scored_bytes
    if got.student_scored:
        ended = got.teacher_ids[-1] == teacher.ends[0]
        again = gold_data.prefix_queries(student, teacher, ids[: got.student_scored], got.teacher_ids, joined[0], ended)
        for a, b in zip(got.prefix[:2], again[:2]):
            assert all((a[k] == b[k]).all() for k in a)


@given(both(), st.text("abc", max_size=9), st.booleans(), st.randoms(use_true_random=False))
def test_any_two_small_vocabularies_are_aligned(pair, text, finished, rng):
    """`c` is only the student's: the teacher stops before it."""
    student, teacher = LongestMatch([b"c", *pair[0].bytes]), pair[1]
    ids = tokenize_randomly(student, text.encode(), rng) + [student.ends[0]] * finished
    got = gold_data.align(student, teacher, ids, finished, prefix=False)
    assert same_alignment(got, expected_alignment(student, teacher, ids, finished))
    if b"c" in text.encode():
        assert got.scored_bytes <= text.index("c") and got.teacher_ids[-1:] != [teacher.ends[0]]


def test_the_end_is_compared_only_where_the_student_stopped_and_both_wrote_everything():
    student, teacher = vocabulary("byte level"), vocabulary("metaspace")
    ids = student.encode(b"Hello there")[0]
    for finished in (True, False):
        a = gold_data.align(student, teacher, ids + [student.ends[-1]] * finished, finished, prefix=False)
        assert (a.teacher_ids[-1] == teacher.ends[0]) == finished
        assert a.student_scored == len(ids) + finished and a.scored_bytes == 11


def markers(share: bool) -> list[Vocabulary]:
    """A student and a teacher that both have a special token <|think|>."""
    tokenizers = conftest.byte_level.__wrapped__(400), conftest.metaspace.__wrapped__(500)
    for t in tokenizers:
        t.add_special_tokens({"additional_special_tokens": ["<|think|>"]})
    pair = [Vocabulary(t, gold_data.end_ids(t), len(t)) for t in tokenizers]
    if share:
        gold_data.share_markers(*pair)
    return pair


def test_special_tokens_that_both_know_are_aligned_like_any_other():
    student, teacher = markers(True)
    think = [v.tokenizer.convert_tokens_to_ids("<|think|>") for v in (student, teacher)]
    parts = [v.encode(b"Hello there")[0] for v in (student, teacher)]
    ids, expected = ([think[i], *parts[i], think[i], *parts[i], v.ends[0]] for i, v in enumerate((student, teacher)))
    a = gold_data.align(student, teacher, ids, True, prefix=True)
    assert a.teacher_ids == expected and a.scored_bytes == a.num_bytes == 2 * 11 + 2 * 2
    spans_s = [s for s, i in zip(a.student_span, ids) if i == think[0]]
    spans_t = [s for s, i in zip(a.teacher_span, expected) if i == think[1]]
    assert spans_s == spans_t and min(spans_s) == 0
    assert student.closed(student.join(ids), ids)[0][[0, 1, 2, 13, 14, 15, -1]].all(), "and prefix sees them"


def test_special_tokens_that_only_the_student_knows_are_text_of_length_0():
    student, teacher = markers(False)
    think, ids = student.tokenizer.convert_tokens_to_ids("<|think|>"), student.encode(b"Hello there")[0]
    row = [think, *ids, think, think, *ids, student.ends[0]]
    a = gold_data.align(student, teacher, row, True, prefix=True)
    assert a.scored_bytes == a.num_bytes == 22 and a.student_scored == len(row)
    assert [i for i, s in zip(row, a.student_span) if s == -1] == [think] * 3
    known, tells, broken = student.closed(b"Hello there" * 2, row)
    assert not known[[0, 11]].any() and known[12:].any() and known[22] and not tells[11].any()
    assert broken[0] < broken[11] and broken[-1] > broken[10], "no outcome spans them"


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(["think", "Hello", " there", "3", "\n"]), max_size=6), st.booleans(), st.booleans())
def test_a_text_with_special_tokens_has_a_loss_of_0_under_equal_models(parts, finished, share):
    pair = markers(share)
    student = pair[0]
    think = student.tokenizer.convert_tokens_to_ids("<|think|>")
    ids = [i for p in parts for i in ([think] if p == "think" else student.encode(p.encode())[0])]
    ids += [student.ends[0]] * finished
    a = gold_data.align(student, student, ids, finished, prefix=True)
    if not a.student_scored or a.teacher_ids != ids:
        return
    batch = gold_data.collate([Sample([0], ids, finished, True, [0], alignment=a)])
    logits = torch.randn(a.student_scored, student.size, dtype=torch.float64)
    side = gold_loss.Side(logits, gold_loss.Head(torch.eye(student.size, dtype=torch.float64)), batch.student_targets)
    order, edge = torch.tensor(student.order), torch.tensor(student.edge)
    q = [gold_loss.Queries(order=order, edge=edge, **x) for x in (batch.student_queries, batch.teacher_queries)]
    loss = gold_loss.prefix_loss(side, side, *q, batch.offset, len(batch.offset_sample), 0.5)
    assert (loss.values.abs() < 1e-9).all()


def test_a_text_is_written_in_the_normal_form_of_its_tokenizer():
    fast = conftest.byte_level.__wrapped__(300)
    v = Vocabulary(fast, gold_data.end_ids(fast), len(fast))
    assert v.normal("e\u0301") == "e\u0301"
    fast.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()])
    v = Vocabulary(fast, gold_data.end_ids(fast), len(fast))
    assert v.normal("cafe\u0301 ok") == "caf\u00e9 ok"
    assert len(v.encode("cafe\u0301 ok".encode())[0]) < len(v.encode(v.normal("cafe\u0301 ok").encode())[0])
    assert v.join(v.encode(v.normal("cafe\u0301 ok").encode())[0]) == "caf\u00e9 ok".encode()


def test_what_a_teacher_normalises_is_cut_from_a_sample_and_counted():
    student, fast = vocabulary("byte level"), copy.deepcopy(conftest.byte_level())
    fast.backend_tokenizer.normalizer = normalizers.NFC()
    teacher = Vocabulary(fast, gold_data.end_ids(fast), len(fast))
    for text, cut in (("a caf\u00e9, ok", 0), ("a cafe\u0301, ok", len("e\u0301, ok".encode()))):
        ids = student.encode(text.encode())[0] + [student.ends[0]]
        a = gold_data.align(student, teacher, ids, True, prefix=False)
        assert a.unwritten >= cut and (a.unwritten > 0) == (cut > 0) == (a.scored_bytes < a.num_bytes)


@pytest.mark.parametrize("finished", [True, False])
def test_what_a_teacher_has_no_room_for_is_cut_where_both_have_a_boundary(finished):
    student, teacher = vocabulary("metaspace"), vocabulary("byte level")
    ids = student.encode(b"say 10 + 10 = 20, then zzqqxjk")[0] + [student.ends[0]] * finished
    whole = gold_data.align(student, teacher, ids, finished, prefix=True)
    needed = len(teacher.encode(student.join(ids[: len(ids) - finished]))[0]) + finished
    for room in range(needed + 2):
        a = gold_data.align(student, teacher, ids, finished, True, room)
        assert len(a.teacher_ids) <= room and (a.unwritten > 0) == (room < needed)
        assert a.teacher_ids == whole.teacher_ids[: len(a.teacher_ids)]
        assert a.scored_bytes in {
            0,
            *np.intersect1d(*(_ends(v, i) for v, i in ((student, ids), (teacher, whole.teacher_ids)))),
        }
        if room >= needed:
            assert same_alignment(a, whole)


def _ends(v: Vocabulary, ids: list[int]) -> np.ndarray:
    return v.lengths[ids].cumsum()


def test_wordpiece_is_aligned_to_the_end_of_the_text():
    exact, lossy = vocabulary("byte level"), vocabulary("wordpiece")
    for student, teacher, text in (
        (exact, lossy, b"Return the length of an object."),
        (lossy, exact, b"Return the length of an object ."),  # a student that puts spaces around punctuation
    ):
        a = gold_data.align(student, teacher, student.encode(text)[0] + [student.ends[0]], True, prefix=False)
        assert a.scored_bytes == len(text) and a.num_spans > 5 and a.teacher_ids[-1] == teacher.ends[0]
        assert a.student_span[-1] == a.teacher_span[-1] == a.num_spans - 1


def test_same_vocabulary_ignores_padding_rows_and_nothing_else():
    tokenizer = conftest.byte_level()
    n = len(tokenizer)
    make = lambda size, ends=(2,): Vocabulary(tokenizer, ends, size)
    for a, b in ((n, n), (n, n + 64), (n + 64, n)):
        assert gold_data.same_vocabulary(make(a), make(b))
    assert not gold_data.same_vocabulary(make(n), make(n, (2, 0)))
    assert gold_data.same_vocabulary(make(n, (0, 2)), make(n, (2, 0)))
    one, more = LongestMatch([b"a", b"b", None], (2,)), LongestMatch([b"a", b"b", None, b"c"], (2,))
    assert gold_data.same_vocabulary(one, one) and not gold_data.same_vocabulary(one, more)
    assert not gold_data.same_vocabulary(more, one)
    assert gold_data.same_vocabulary(one, LongestMatch([b"a", b"b", None, None], (2,)))
    assert not gold_data.same_vocabulary(one, LongestMatch([b"a", b"x", None], (2,)))
    assert not gold_data.same_vocabulary(vocabulary("byte level"), vocabulary("digits"))


# ---- the report


@pytest.mark.parametrize("names", PAIRS[:3], ids=" and ".join)
def test_the_coverage_report_counts_what_a_walk_counts(names):
    student, teacher = map(vocabulary, names)
    texts = MULTILINGUAL + [PROSE[:500]]
    sums, largest = Counter(), 0
    for text in texts:
        sides = [v.encode(text.encode()) for v in (student, teacher)]
        at = [0, 0]
        common = sorted(set(sides[0][1].tolist()) & set(sides[1][1].tolist()))
        for stop in common:
            width = [0, 0]
            for i in (0, 1):
                while at[i] < len(sides[i][1]) and sides[i][1][at[i]] <= stop:
                    at[i], width[i] = at[i] + 1, width[i] + 1
            sums["spans"] += 1
            sums["one"] += width == [1, 1]
            largest = max(largest, *width)
        sums["spans"], sums["one"] = sums["spans"] + 1, sums["one"] + 1  # the end
        sums["bytes"] += len(text.encode())
        sums["covered"] += common[-1]
        known = [v.closed(text.encode(), ids)[0] for v, (ids, _) in zip((student, teacher), sides)]
        sums["known"] += int((known[0] & known[1]).sum())
    report = gold_data.coverage(student, teacher, texts, prefix=True)
    assert report == pytest.approx(
        {
            "coverage": sums["covered"] / sums["bytes"],
            "one_to_one": sums["one"] / sums["spans"],
            "largest_span": largest,
            "offsets": sums["known"] / (sums["bytes"] + len(texts)),
        }
    )
    assert report["coverage"] == 1 and report["largest_span"] > 1 and 0 < report["one_to_one"] < 1
    assert 0.2 < report["offsets"] < 1
    line = gold_data.say_coverage(report, "one", "another")
    assert line.startswith("alignment of one (student) and another (teacher): 100.00% of the bytes in spans")
    empty = gold_data.coverage(student, teacher, [""], prefix=False)
    assert empty == {"coverage": 0, "one_to_one": 1, "largest_span": 1} and "prefix" not in gold_data.say_coverage(
        empty, "one", "another"
    )


@pytest.mark.parametrize("name", TOKENIZERS)
def test_words_that_begin_alike_have_no_other_boundary_before_a_known_offset(name):
    """Nothing is missed: the last token of any other word's that reaches k begins where this word's tokens end."""
    v = vocabulary(name)
    data = " ".join(PROSE[3000:9000].split()).encode()
    ids, ends = v.encode(data)
    known = v.closed(data, ids)[0]
    starts = [0, *(i for i, b in enumerate(data) if b == 32 and i in set(ends.tolist())), len(data)]
    of_prefix, used = defaultdict(set), 0
    for a, b in pairwise(starts):
        inside = [int(e) - a for e in ends if a < e <= b]
        for k in range(1, b - a + 1):
            of_prefix[data[a : a + k]].add(tuple(e for e in inside if e < k))
    for a, b in pairwise(starts):
        mine = tuple(int(e) - a for e in ends if a < e <= b)
        for k in (k for k in range(1, b - a) if known[a + k]):
            used += 1
            assert all(theirs == mine[: len(theirs)] for theirs in of_prefix[data[a : a + k]]), data[a : a + k]
    assert used > 0.2 * len(data)


@pytest.mark.parametrize("name", ["byte level", "digits", "tiktoken", "metaspace"])
def test_a_token_may_follow_another_if_the_tokenizer_leaves_the_two_as_they_are(name):
    v, rng = vocabulary(name), random.Random(0)
    model, short = v.tokenizer.backend_tokenizer.model, lambda i: v.bytes[i].isalpha() and len(v.bytes[i]) < 4
    encode = lambda *ids: [t.id for t in model.tokenize(v.join(ids).decode())]
    made = {i for i, b in enumerate(v.bytes) if b and short(i) and encode(i) == [i] and i not in v.literal}
    nodes = [
        n for n, lo in enumerate(v.tree.lo) if v.tree.hi[n] - lo < 9 and all(map(short, v.order[lo : v.tree.hi[n]]))
    ]
    token, node = (np.array(rng.choices(some, k=1500)) for some in (sorted(made), nodes))
    v.rule.forbid(token)
    below = ([i for i in v.order[v.tree.lo[n] : v.tree.hi[n]] if i in made] for n in node)
    expected = [any(encode(t, i) == [t, i] for i in some) for t, some in zip(token, below)]
    assert v.rule.some(token, node).tolist() == expected and 0.5 < np.mean(expected) < 0.98


# ---- prompts


TURN = [{"role": "user", "content": "What is 3 + 4?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]


def test_prompts_by_template_begin_the_assistants_turn():
    t = conftest.byte_level()
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n"
    expected += "<|im_start|>assistant\n"
    assert gold_data.render_prompt(t, SYSTEM + TURN) == expected
    ids = gold_data.encode_prompt(t, SYSTEM + TURN)
    assert t.decode(ids) == expected and ids.count(t.convert_tokens_to_ids("<|im_start|>")) == 3


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_prompt_has_exactly_one_beginning_whoever_writes_it(adds_bos):
    t = conftest.metaspace.__wrapped__(400)
    if adds_bos:  # the tokenizer's own post-processor writes one too
        from tokenizers.processors import TemplateProcessing

        t.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 1)])
        assert t("a")["input_ids"][0] == t.bos_token_id
    ids = gold_data.encode_prompt(t, TURN)
    assert ids[0] == t.bos_token_id and ids.count(t.bos_token_id) == 1
    t.chat_template = "{{ bos_token }}" + t.chat_template  # a template that writes two
    assert gold_data.encode_prompt(t, TURN) == ids
    t.chat_template = None
    ids = gold_data.encode_prompt(t, TURN)
    assert ids.count(t.bos_token_id) == adds_bos and (ids[0] == t.bos_token_id) == adds_bos
    assert t.decode(ids, skip_special_tokens=True) == "User: What is 3 + 4?\n\nAssistant:\n"


def test_a_template_without_system_role_gets_it_in_front_of_the_first_user_message():
    t = conftest.metaspace()
    assert gold_data.render_prompt(t, SYSTEM + TURN) == "<s>[INST] Be brief.\n\nWhat is 3 + 4? [/INST]\n"
    import jinja2

    with pytest.raises(jinja2.TemplateError):
        gold_data.render_prompt(t, SYSTEM)


def test_without_a_template_the_documented_plain_format():
    t = conftest.wordpiece()
    expected = "System: Be brief.\n\nUser: What is 3 + 4?\n\nAssistant:\n"
    assert gold_data.render_prompt(t, SYSTEM + TURN) == expected


def test_the_end_of_a_turn_is_what_the_template_writes_then_eos_then_what_the_model_names():
    t = conftest.byte_level.__wrapped__(300)
    turn, text = t.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert gold_data.end_ids(t) == (turn,)
    t.eos_token = "<|endoftext|>"
    assert gold_data.end_ids(t) == (turn, text)
    assert gold_data.end_ids(t, [text, 3]) == (turn, text, 3)
    t.chat_template = None
    assert gold_data.end_ids(t) == (text,)
    t.eos_token = None
    assert gold_data.end_ids(t, [turn]) == (turn,)
    with pytest.raises(ValueError, match="no eos token"):
        gold_data.end_ids(t)


# ---- prompts that begin the answer, and options of templates

THINK = (  # as Qwen3's: it thinks unless told not to, and writes what an answer was thought with
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and m.reasoning_content %}"
    "{{ '<think>\n' + m.reasoning_content.strip('\n') + '\n</think>\n\n' + m.content.lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
OPENS = (  # as DeepSeek-R1's: it begins to think, and forgets what it thought
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content.split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
STRICT = (  # as Mistral's and Gemma's
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if m.role == 'tool' %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<' + m.role + '>' + m.content }}{% endfor %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ '|' + m.content }}{% endfor %}"


def speaking(template: str, tokenizer=conftest.metaspace, **settings):
    """A tokenizer with another chat template, and what `load_tokenizer` gives it."""
    t = copy.deepcopy(tokenizer())
    t.chat_template = template
    t.init_kwargs |= settings
    return t


def read_by(student, teacher=None, **row) -> tuple[str, ...]:
    """(the end of each prompt, the answer) for a row of one question."""
    tokenizers = [t for t in (student, teacher) if t is not None]
    texts, answer = gold_data.prompts(tokenizers, gold_data.Row(tuple(TURN), **row))
    return *(text.partition("3 + 4?")[2] for text in texts), answer


@pytest.mark.parametrize(
    "written, follows",
    [
        ("<think>\nhm\n</think>\n7", "hm\n</think>\n7"),
        ("<think>hm</think>7", "hm</think>7"),
        ("\n <think>\n\nhm</think>7", "\nhm</think>7"),
        ("7", "7"),
        ("so <think> is a tag", "so <think> is a tag"),
        ("<thinking>7", "<thinking>7"),
    ],
)
def test_what_the_prompt_has_opened_the_answer_does_not_open_again(written, follows):
    assert read_by(speaking(OPENS), completion=written) == ("<|assistant|><think>\n", follows)
    assert read_by(speaking(THINK), completion=written) == ("<|im_end|>\n<|im_start|>assistant\n", written)


def test_a_prompt_that_closed_its_thoughts_takes_an_answer_without_the_empty_pair():
    t = speaking(THINK, chat_options={"enable_thinking": False})
    for written in ("<think>\n\n</think>\n\n7", "<think></think>\n\n7", "7"):
        end, answer = read_by(t, completion=written)
        assert end.endswith("assistant\n<think>\n\n</think>\n\n") and answer == "7"


def test_one_answer_follows_what_both_models_have_read():
    """Whoever's template opens it: the student's prompt decides, as the answers are the student's."""
    plain = conftest.byte_level()
    assert read_by(speaking(OPENS), plain, completion="<think>a") == (
        "<|assistant|><think>\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n", "a"
    )  # fmt: skip
    assert read_by(plain, speaking(OPENS), completion="<think>a")[1:] == ("<|assistant|>", "<think>a")
    closed = speaking(THINK, chat_options={"enable_thinking": False})
    assert read_by(plain, closed, completion="7")[1].endswith("</think>\n\n"), "as the user asked for"
    assert read_by(speaking(OPENS), speaking(OPENS), completion=None)[:2] == ("<|assistant|><think>\n",) * 2


def test_a_users_tag_at_the_end_of_a_prompt_opens_nothing():
    t = speaking("{% for m in messages %}{{ m.content }}{% endfor %}")
    row = gold_data.Row(({"role": "user", "content": "Which tag is <b>"},), "<b>")
    assert gold_data.prompts([t, t], row) == (["Which tag is <b>"] * 2, "<b>")


def test_thoughts_stand_in_front_of_the_answer_as_the_template_writes_them_or_the_row_is_refused_by_name():
    messages = [*TURN, {"role": "assistant", "content": "\\boxed{7}", "reasoning_content": "3 and 4"}]
    for raw in ({"messages": messages}, {"prompt": TURN, "completion": messages[1:]}):
        row = gold_data.to_row(raw)
        t = speaking(THINK)
        (prompt,), answer = gold_data.prompts([t], row)
        assert answer == "<think>\n3 and 4\n</think>\n\n\\boxed{7}"
        assert prompt + answer + "<|im_end|>\n" == t.apply_chat_template(messages, tokenize=False), (
            "the template's own form"
        )
        opening = speaking(THINK.replace("assistant\n' }}{% if enable", "assistant\n<think>\n' }}{% if enable"))
        (prompt,), answer = gold_data.prompts([opening], row)
        assert prompt.endswith("<think>\n") and answer == "3 and 4\n</think>\n\n\\boxed{7}"
        closed = speaking(THINK, chat_options={"enable_thinking": False})
        for other in (conftest.byte_level(), speaking(OPENS), conftest.wordpiece(), closed):
            with pytest.raises(
                gold_data.Unusable, match="reasoning_content, which the student's chat template does not write"
            ):
                gold_data.prompts([other], row)
        assert gold_data.prompts([t, conftest.byte_level()], row)[1] == "<think>\n3 and 4\n</think>\n\n\\boxed{7}", (
            "the teacher reads it as text"
        )


def test_rows_that_one_of_the_templates_refuses_are_dropped_at_the_start(tmp_path):
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "7"}]
    tool = [*TURN, {"role": "tool", "content": "x"}, {"role": "assistant", "content": "7"}]
    rows = [{"messages": m} for m in (twice, [*TURN, twice[-1]], tool, [*SYSTEM, *TURN, twice[-1]])]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind, strict = conftest.byte_level(), speaking(STRICT)
    for pair, name in (((strict, kind), "student"), ((kind, strict), "teacher")):
        kept, dropped = gold_data.load_rows(str(path), tokenizers=pair)
        assert kept.index["position"].tolist() == [1, 3], "a system message is folded into the question"
        why = f"refused by the {name}'s chat template: Conversation roles must alternate"
        assert list(dropped) == [why] and dropped[why][0] == 2 and dropped[why][1].startswith("line 1: ")
        for row in kept:  # what was accepted once is accepted in the middle of a run
            gold_data.prompts(pair, row)
    with pytest.raises(ValueError, match="no usable row; dropped: 2 refused by the teacher"):
        gold_data.load_rows(str(path), split="train[:1]+train[2:3]", tokenizers=(kind, strict))


def test_a_template_writes_the_day_it_is_told_and_its_options_travel_with_the_tokenizer(tmp_path):
    conftest.byte_level().save_pretrained(tmp_path / "plain")
    tiny = conftest.tiny_qwen(len(conftest.byte_level()))
    tiny.save_pretrained(tmp_path / "plain")
    t = gold_data.load_tokenizer(str(tmp_path / "plain"), day="2024-02-29")
    t.chat_template = DATED
    assert gold_data.render_prompt(t, TURN) == "29 Feb 2024|What is 3 + 4?"
    t.chat_template = THINK
    t.save_pretrained(tmp_path / "saved")
    tiny.save_pretrained(tmp_path / "saved")
    off = gold_data.load_vocabulary(str(tmp_path / "saved"), options={"enable_thinking": False}).tokenizer
    off.save_pretrained(tmp_path / "again")
    again = gold_data.load_tokenizer(str(tmp_path / "again"))
    assert (
        gold_data.render_prompt(again, TURN).endswith("<think>\n\n</think>\n\n")
        and again.init_kwargs["chat_date"] == "2024-02-29"
    )
    on = gold_data.load_tokenizer(str(tmp_path / "again"), options={"enable_thinking": True})
    assert gold_data.render_prompt(on, TURN).endswith("assistant\n")
    with pytest.raises(ValueError, match="saved has no option enable_thinkin and no tool"):
        gold_data.load_tokenizer(
            str(tmp_path / "saved"), options={"enable_thinkin": False, "tool": 1, "enable_thinking": 1}
        )


SPEAKERS = [conftest.byte_level, conftest.metaspace, conftest.unigram, conftest.wordpiece]


@pytest.mark.parametrize("speaker", SPEAKERS)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(CHARACTERS + "\ufdfa\u0958<|im_end|>", max_size=60), max_size=4), room=st.integers(1, 60))
def test_what_is_too_long_is_known_from_its_size_or_by_encoding_it(speaker, texts, room):
    t = speaker()
    expected = [len(gold_data.encode_texts(t, [text])[0]) > room for text in texts]
    assert gold_data.too_long(t, texts, room) == expected


def test_a_prompt_of_ten_megabytes_is_not_encoded(monkeypatch):
    monkeypatch.setattr(gold_data, "encode_texts", None)
    t = conftest.byte_level()
    assert gold_data.too_long(t, ["7 " * 5_000_000, "a"], 40) == [True, False]


# ---- batches


def sample_of(pair, text: bytes, prompts: tuple[int, int], finished: bool, on_policy: bool, rng: random.Random):
    ids = tokenize_randomly(pair[0], text, rng) + [pair[0].ends[0]] * finished
    prompt, teacher_prompt = ([rng.randrange(5) for _ in range(n)] for n in prompts)
    logprobs = [-rng.random() for _ in ids] if on_policy else None
    alignment = gold_data.align(*pair, ids, finished, prefix=True)
    return Sample(prompt, ids, finished, on_policy, teacher_prompt, logprobs, alignment=alignment)


def check_rows(rows, targets, ids, mask, prompts, completions):
    """Flat rows and what they predict, against positions counted one by one."""
    expected, tokens = [], []
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        assert ids[i].tolist() == prompt + completion + [0] * (ids.size(1) - len(prompt) - len(completion))
        assert mask[i].tolist() == [int(t < len(prompt) + len(completion)) for t in range(ids.size(1))]
        for t, token in enumerate(completion):
            expected.append(i * ids.size(1) + len(prompt) + t - 1)
            tokens.append(token)
            assert ids.flatten()[expected[-1] + 1] == token
    assert rows.tolist() == expected and targets.tolist() == tokens


@settings(deadline=None, max_examples=60)
@given(
    both(),
    st.lists(st.tuples(st.text("abc", min_size=1, max_size=6), st.booleans(), st.booleans()), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_a_batch_is_its_samples_padded_and_counted_on(pair, drawn, rng):
    pair = (LongestMatch([b"c", *pair[0].bytes]), pair[1])  # `c` and what follows it is not scored
    samples = [
        sample_of(pair, text.encode(), (rng.randint(1, 4), rng.randint(1, 4)), finished, on_policy, rng)
        for text, finished, on_policy in drawn
    ]
    batch, aligned = gold_data.collate(samples), [s.alignment for s in samples]
    check_rows(
        batch.student_rows, batch.student_targets, batch.student_ids, batch.student_mask,
        [s.prompt_ids for s in samples], [s.completion_ids for s in samples],
    )  # fmt: skip
    check_rows(
        batch.teacher_rows, batch.teacher_targets, batch.teacher_ids, batch.teacher_mask,
        [s.teacher_prompt_ids for s in samples], [a.teacher_ids for a in aligned],
    )  # fmt: skip
    tokens = [(i, t) for i, s in enumerate(samples) for t in range(len(s.completion_ids))]
    assert batch.student_sample.tolist() == [i for i, _ in tokens]
    assert batch.scored.tolist() == [n for n, (i, t) in enumerate(tokens) if t < aligned[i].student_scored]
    assert batch.on_policy.tolist() == [s.on_policy for s in samples]
    for said, (i, t) in zip(batch.sampler_logprobs.tolist(), tokens):
        assert said == pytest.approx(samples[i].logprobs[t]) if samples[i].on_policy else np.isnan(said)
    first = np.cumsum([0, *(a.num_spans for a in aligned)])
    for got, parts in (
        (batch.student_span, [a.student_span for a in aligned]),
        (batch.teacher_span, [a.teacher_span for a in aligned]),
    ):
        assert got.tolist() == [x + f if x >= 0 else -1 for part, f in zip(parts, first.tolist()) for x in part]
    assert batch.span_sample.tolist() == [i for i, a in enumerate(aligned) for _ in range(a.num_spans)]
    check_batch_queries(batch, [a.prefix for a in aligned])


def check_batch_queries(batch, parts):
    """The queries of each sample, found again in those of the batch: own tokens, then outcomes, then totals."""
    outcomes, totals = [len(p[2]) for p in parts], [p[3] for p in parts]
    assert batch.offset.tolist() == [int(o) + sum(totals[:i]) for i, p in enumerate(parts) for o in p[2]]
    assert batch.offset_sample.tolist() == [i for i, m in enumerate(totals) for _ in range(m)]
    for side, got in enumerate((batch.student_queries, batch.teacher_queries)):
        own, named, total, start, full = [], [], [], [], []
        for i, part in enumerate(parts):
            q, rows = part[side], len(start)
            start += [rows] * len(q["path"])
            columns = (q[key].tolist() for key in ("row", "lo", "hi", "slot"))
            for e, (row, lo, hi, slot) in enumerate(zip(*columns)):
                asked = row + rows, set(range(lo, hi))
                if e in q["path"]:
                    own.append(asked)
                elif slot >= 0:
                    named.append((*asked, slot + sum(outcomes[:i])))
                else:
                    total.append((*asked, sum(totals[:i]) - 1 - slot))
            full += [(int(r) + rows, int(f) + sum(outcomes[:i])) for r, f in zip(q["full_row"], q["full_slot"])]
        bounds = got["bounds"]
        got = {k: v.tolist() for k, v in got.items() if k != "bounds"}
        ranges = [set() for _ in got["row"]]
        for e, place in zip(got["narrow"], got["place"]):
            ranges[e].add(place)
        for e, lo, hi in zip(got["wide"], got["lo"], got["hi"]):
            assert not ranges[e] and hi - lo > gold_data.NARROW
            ranges[e] |= set(range(lo, hi))
        n, k = len(own), len(named)
        assert list(zip(got["row"], ranges)) == own + [x[:2] for x in named + total]
        assert got["slot"] == [x[2] for x in named] and got["total"] == [x[2] for x in total]
        assert len(got["row"]) == n + k + len(total) and got["start"] == start
        assert list(zip(got["full_row"], got["full_slot"])) == full
        for bound, reads in zip(bounds, ([got["row"][e] for e in got[key]] for key in ("narrow", "wide"))):
            assert reads == sorted(reads) and bound == [sum(r < i for r in reads) for i in range(n + 1)]
        assert bounds[2] == [sum(r < i for r, _ in full) for i in range(n + 1)]


def test_with_one_vocabulary_both_models_read_the_same_completion_after_prompts_of_their_own():
    samples = [Sample([1, 2], [3, 4, 5], True, True, [7], [0.0] * 3), Sample([6], [8], False, False, [9, 9, 9])]
    batch = gold_data.collate(samples)
    teacher = (batch.teacher_rows, batch.teacher_targets, batch.teacher_ids, batch.teacher_mask)
    check_rows(*teacher, [[7], [9, 9, 9]], [[3, 4, 5], [8]])
    assert batch.scored.tolist() == [0, 1, 2, 3] and batch.student_span is None and batch.student_queries is None
    assert torch.equal(batch.teacher_targets, batch.student_targets)
    alone = gold_data.collate(samples, with_teacher=False)
    assert alone.teacher_ids is None and torch.equal(alone.student_rows, batch.student_rows)
    moved = batch.to("meta")
    assert moved.student_ids.device.type == "meta" and moved.student_queries is None


# ---- puzzles


def solutions(nums: tuple[int, ...]) -> set[int]:
    """Every value of the game: all the numbers, each step a positive integer."""
    if len(nums) == 1:
        return set(nums)
    found = set()
    for i in range(len(nums)):
        for j in range(len(nums)):
            if i != j:
                rest = [n for k, n in enumerate(nums) if k not in (i, j)]
                a, b = nums[i], nums[j]
                steps = [a + b, a * b] + [a - b] * (a > b) + [a // b] * (a % b == 0)
                for value in set(steps):
                    found |= solutions((value, *rest))
    return found


RULES = [
    Difficulty(),
    Difficulty(numbers=(2, 2), top=9, operations="+*", top_target=20),
    Difficulty(numbers=(4, 4), top=25, operations="+-", top_target=60),
]


@pytest.mark.parametrize("rule", RULES, ids=["published", "two numbers", "sums of four"])
def test_puzzles_keep_their_rule_and_a_solver_reaches_every_target(rule):
    rows = gold_data.make_countdown(60, seed=1, rule=rule)
    for row in rows:
        nums, target = row["nums"], row["target"]
        assert rule.numbers[0] <= len(nums) <= rule.numbers[1] and 1 <= min(nums) <= max(nums) <= rule.top
        assert 1 <= target <= rule.top_target and target in solutions(tuple(nums))
        answer = re.fullmatch(r"<think> (.*) </think>\n<answer> (.*) = (\d+) </answer>", row["completion"])
        assert int(answer[3]) == target and set(answer[2]) <= set(rule.operations + "0123456789 ()")
        assert eval(re.sub(r"\d+", r"Fraction(\g<0>)", answer[2])) == target  # our own string of digits and + - * /
        assert sorted(map(int, re.findall(r"\d+", answer[2]))) == sorted(nums)
        assert row["prompt"] == gold_data.countdown_prompt(nums, target)
    assert {len(row["nums"]) for row in rows} == set(range(rule.numbers[0], rule.numbers[1] + 1))


def test_mini_puzzles_spell_out_how_they_are_solved():
    for row in gold_data.make_countdown(100, mini=True):
        a, b, c = row["nums"]
        total, target = sum(row["nums"]), row["target"]
        steps = f"{a} + {b} = {a + b} + {c} = {total} - {target} = {total - target} / 2 = {(total - target) // 2}"
        assert row["completion"].startswith(f"<think> {steps} </think>\n<answer> ")
        assert (total - target) % 2 == 0 and target in solutions((a, b, c)) and max(row["nums"]) <= 20
        assert row["prompt"] == [{"role": "user", "content": f"Make {target} from {a}, {b}, {c}."}]


@pytest.mark.parametrize("mini", [False, True])
def test_train_and_test_puzzles_never_meet_and_none_comes_twice(mini):
    def questions(**kind):
        rows = gold_data.make_countdown(600, mini=mini, **kind)
        keys = [(*row["nums"], row["target"]) for row in rows]
        assert len(set(keys)) == len(keys)
        return {(*sorted(row["nums"]), row["target"]) for row in rows}  # in any order

    train, test = questions(), questions(test=True)
    assert not train & test and not questions(seed=5) & test and not train & questions(seed=5, test=True)
    assert gold_data.make_countdown(20, 3, mini) == gold_data.make_countdown(30, 3, mini)[:20]
    assert gold_data.make_countdown(20, 3, mini) != gold_data.make_countdown(20, 4, mini)


def test_built_in_puzzles_are_rows_with_slices():
    rows, _ = gold_data.load_rows("countdown-mini", split="train[3:5]")
    made = gold_data.make_countdown(5, mini=True)[3:]
    assert [row.completion for row in rows] == [row["completion"] for row in made]
    assert rows[0].meta["nums"] == made[0]["nums"] and rows[0].meta["target"] == made[0]["target"]
    for split in ("validation", "train[:10%]", "train[x]"):
        with pytest.raises(ValueError, match="splits like|not understood"):
            gold_data.load_rows("countdown", split=split)


@pytest.mark.parametrize(
    "rule, message",
    [
        (Difficulty(numbers=(4, 3)), "in order"),
        (Difficulty(numbers=(0, 3)), "at least 1"),
        (Difficulty(top_target=0), "at least 1"),
        (Difficulty(operations="+^"), "choose some of"),
        (Difficulty(top=1, operations="-"), "only 0 different"),
        (Difficulty(numbers=(2, 2), top=2), "different puzzles found, 50 wanted"),
    ],
)
def test_rules_without_puzzles_are_an_error(rule, message):
    with pytest.raises(ValueError, match=message):
        gold_data.make_countdown(50, rule=rule)


# ---- the command line


def gold_data_main(*args: str) -> subprocess.CompletedProcess:
    root = Path(gold_data.__file__).parent
    return subprocess.run([sys.executable, "gold_data.py", *args], cwd=root, capture_output=True, text=True)


def test_the_command_line_prints_the_report_of_two_models(two_models, tmp_path, capsys):
    (tmp_path / "text").write_text(PROSE[:3000])
    done = gold_data_main("--student", two_models[0], "--teacher", two_models[1], "--text", str(tmp_path / "text"))
    assert done.returncode == 0, done.stderr
    v = [gold_data.load_vocabulary(name) for name in two_models]
    print(gold_data.say_coverage(gold_data.coverage(*v, [PROSE[:3000]], prefix=True), *two_models))
    assert done.stdout == capsys.readouterr().out
    assert "of the bytes in spans" in done.stdout and "prefix uses" in done.stdout


@pytest.mark.parametrize("kind", ["countdown", "countdown-mini"])
def test_the_command_line_writes_puzzles_that_training_reads(kind, tmp_path, capsys):
    train, test = str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl")
    gold_data.main(gold_data.Config(make=kind, n=50, out=train))
    gold_data.main(gold_data.Config(make=kind, n=20, out=test, test=True, seed=1))
    assert [json.loads(x) for x in Path(train).read_text().splitlines()] == gold_data.make_countdown(
        50, mini=kind != "countdown"
    )
    read, asked = (gold_data.load_rows(path)[0] for path in (train, test))
    assert len(read) == 50 and len(asked) == 20 and gold_data.without(read, asked)[1] == 0
    assert "50 training puzzles" in capsys.readouterr().out


def test_what_a_user_gets_wrong_is_one_line_and_exit_code_2(tmp_path):
    done = gold_data_main("--make", "countdown", "--out", str(tmp_path / "x"), "--operations", "%")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "gold_data.py: operations '%': choose some of +-*/\n"
    done = gold_data_main("--make", "poker")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "countdown-mini" in done.stderr


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, "name --student, --teacher and --text"),
        ({"student": "a", "text": "b"}, "name --student, --teacher and --text"),
        ({"make": "countdown"}, "--out FILE"),
        ({"make": "countdown-mini", "out": "x", "rule": Difficulty(top=5)}, "one difficulty"),
        ({"make": "countdown", "out": "x", "n": 0}, "at least 1"),
        ({"student": "/nowhere", "teacher": "b", "text": __file__}, "/nowhere.*neither a directory"),
        ({"student": "a", "teacher": "b", "text": "/nowhere"}, "/nowhere"),
        ({"make": "countdown", "n": 1, "out": "/nowhere/x"}, "/nowhere/x"),
    ],
)
def test_bad_usage_is_told_before_anything_is_done(config, message):
    with pytest.raises((ValueError, OSError), match=message):
        gold_data.main(gold_data.Config(**config))
