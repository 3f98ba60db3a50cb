"""Windows: which rows, who answers them, how far ahead, and that none is lost or made twice. HF's sampler against a
plain loop without cache, batch or padding."""

import copy
import json
import threading

import conftest
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gold_buffer
import gold_data
from gold_buffer import Request, Rollout, Sampling, Schedule

VOCABULARY = gold_data.Vocabulary(conftest.byte_level(), (2, 0), len(conftest.byte_level()))


def rows_of(n: int) -> list[gold_data.Row]:
    return [gold_data.Row(({"role": "user", "content": f"row {i}"},), f"answer {i}") for i in range(n)]


# ----------------------------------------------------------------------------------------------------------------------
# schedule and row streams


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9), lmbda=st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 0.77, 1.0]), slots=st.integers(1, 9),
    generations=st.integers(1, 4), world=st.integers(1, 3), rows=st.integers(3, 40),
)  # fmt: skip
def test_every_epoch_uses_every_row_once_and_every_window_has_its_share_of_lmbda(
    seed, lmbda, slots, generations, world, rows
):
    ranks = [Schedule(seed, lmbda, slots, generations, rank, world) for rank in range(world)]
    steps = ranks[0].steps_for(2 * rows)
    windows = [schedule.draw(step) for step in range(steps) for schedule in ranks]
    for window in windows:
        on = sum(slot.on_policy for slot in window)
        assert abs(on - lmbda * slots) < 1, "stratified: never a slot away from its share"
        for slot in window:
            assert len(slot.seeds) == generations and len(set(slot.seeds)) == generations
            assert len(slot.rows) == (1 if slot.on_policy else generations), "off-policy: different rows, not copies"
    used = [position for window in windows for slot in window for position in slot.rows]
    assert used == list(range(len(used))) and len(used) >= 2 * rows, "none dropped, none repeated, over all ranks"
    assert sum(len(s.rows) for w in windows[:-world] for s in w) < 2 * rows, "steps_for is the fewest"
    total_on = sum(slot.on_policy for window in windows for slot in window)
    assert abs(total_on - lmbda * len(windows) * slots) < 1, "the share does not drift over the run either"
    assert len({s for w in windows for slot in w for s in slot.seeds}) == len(windows) * slots * generations
    stream = gold_buffer.RowStream(rows_of(rows), seed)
    for epoch in range(2):
        found = [stream.where(p) for p in range(epoch * rows, (epoch + 1) * rows)]
        assert sorted(found) == [(epoch, i) for i in range(rows)]


def test_the_window_size_moves_the_cuts_between_windows_and_nothing_else():
    for generations in (1, 3):
        one = [Schedule(5, 0.6, 1, generations).draw(step)[0] for step in range(24)]
        assert sum((Schedule(5, 0.6, 8, generations).draw(step) for step in range(3)), []) == one
        ranks = [Schedule(5, 0.6, 4, generations, rank, 2) for rank in range(2)]
        assert sum((r.draw(step) for step in range(3) for r in ranks), []) == one
    assert one != [Schedule(6, 0.6, 1, 3).draw(step)[0] for step in range(24)]


def test_epochs_are_different_permutations_and_the_same_in_every_process():
    stream, again = (gold_buffer.RowStream(rows_of(50), 3) for _ in range(2))
    epochs = [[stream.where(e * 50 + i)[1] for i in range(50)] for e in range(3)]
    assert len({tuple(e) for e in epochs}) == 3 and all(sorted(e) == list(range(50)) for e in epochs)
    assert [again.where(120)[1], again.where(7)[1]] == [epochs[2][20], epochs[0][7]], "in any order of asking"


# ----------------------------------------------------------------------------------------------------------------------
# HF's sampler


@torch.no_grad()
def sample_plainly(model, request: Request, s: Sampling) -> tuple[list[int], list[float]]:
    """One token after the other, whole forward passes in float64, filters by their definitions in Python."""
    uniform = np.random.Generator(np.random.Philox(request.seed)).random(s.max_new_tokens)
    ids, logprobs = [], []
    for u in uniform:
        z = model(torch.tensor([request.prompt_ids + ids])).logits[0, -1].double()
        if s.temperature == 0:
            token = int(z.argmax())
        else:
            p = dict(enumerate((z / s.temperature).softmax(-1).tolist()))
            best = sorted(p, key=lambda i: -p[i])
            kept = set(best[: s.top_k or None])
            kept &= {i for i in p if p[i] >= s.min_p * p[best[0]]}
            total, running, nucleus = sum(p[i] for i in kept), 0.0, set()
            for i in best:
                if i in kept and running < s.top_p * total:
                    nucleus.add(i)
                    running += p[i]
            total, running = sum(p[i] for i in nucleus), 0.0
            for token in sorted(nucleus):
                running += p[token]
                if running > u * total:
                    break
        ids.append(token)
        logprobs.append(float(z.log_softmax(-1)[token]))
        if token in s.end_ids:
            break
    return ids, logprobs


REQUESTS = [
    Request([(7 * i + j * j) % 90 + 5 for j in range(n)], seed=100 + i) for i, n in enumerate((3, 17, 1, 40, 9))
]


@pytest.mark.parametrize(
    "how",
    [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2, "top_p": 0.9}],
    ids=str,
)
def test_samples_equal_a_plain_loop_token_for_token(how):
    model = conftest.tiny_qwen(120).double()
    s = Sampling(12, end_ids=tuple(range(10)), **how)
    got = gold_buffer.HFSampler(model).generate(REQUESTS, s)
    finished = set()
    for request, rollout in zip(REQUESTS, got):
        ids, logprobs = sample_plainly(model, request, s)
        assert rollout.completion_ids == ids
        assert np.abs(np.subtract(rollout.logprobs, logprobs)).max() < 1e-4, "at temperature 1, unfiltered, in float32"
        assert rollout.finished == (ids[-1] in s.end_ids)
        finished.add(rollout.finished)
    assert how or finished == {True, False}, "both kinds of ending are tested"


def test_rollouts_do_not_depend_on_the_window_they_are_made_in():
    model = conftest.tiny_llama(120)
    s, sampler = Sampling(16, end_ids=(3, 4)), gold_buffer.HFSampler(model)
    whole = sampler.generate(REQUESTS, s)
    apart = [sampler.generate([r], s)[0] for r in REQUESTS]
    small = gold_buffer.HFSampler(model, max_batch_tokens=80).generate(REQUESTS[::-1], s)[::-1]
    for a, b, c in zip(whole, apart, small):
        assert a.completion_ids == b.completion_ids == c.completion_ids
        assert np.abs(np.subtract(a.logprobs, b.logprobs)).max() < 1e-5
    again = sampler.generate([Request(r.prompt_ids, r.seed + 1) for r in REQUESTS], s)
    assert [r.completion_ids for r in again] != [r.completion_ids for r in whole]


def test_each_rollout_is_told_once_when_it_ends():
    """Here batch by batch, the longest prompts first, and in a batch the shortest completions first."""
    model, told = conftest.tiny_llama(120), []
    s = Sampling(16, end_ids=tuple(range(3, 12)))
    rollouts = gold_buffer.HFSampler(model).generate(REQUESTS, s, lambda *x: told.append(x))
    assert sorted(i for i, _ in told) == [*range(5)] and all(rollouts[i] is r for i, r in told)
    lengths = [len(r.completion_ids) for _, r in told]
    assert lengths == sorted(lengths) and len(set(lengths)) > 2
    told.clear()
    gold_buffer.HFSampler(model, max_batch_tokens=1).generate(REQUESTS, s, lambda *x: told.append(x))
    assert [i for i, _ in told] == [3, 1, 4, 0, 2]


def test_prompts_of_one_length_need_no_mask_and_are_answered_the_same():
    model, s = conftest.tiny_llama(120).double(), Sampling(12, end_ids=tuple(range(10)))
    requests, masks = [Request([5 + i, 9, 40 + i], i) for i in range(6)], []
    sampler = gold_buffer.HFSampler(model)
    model.model.register_forward_pre_hook(lambda m, _, given: masks.append(given["attention_mask"]), with_kwargs=True)
    rollouts = sampler.generate(requests, s)
    assert masks and all(mask is None for mask in masks)
    for request, rollout in zip(requests, rollouts):
        assert rollout.completion_ids == sample_plainly(model, request, s)[0]
    assert len({len(r.completion_ids) for r in rollouts}) > 2, "rows leave"


def test_a_model_that_fails_while_it_is_gathered_is_split_again(monkeypatch):
    class Split(torch.nn.Linear):
        whole = False
        unshard = lambda self: setattr(self, "whole", True)
        reshard = lambda self: setattr(self, "whole", False)
        set_reshard_after_forward = lambda self, value, recurse: None

    monkeypatch.setattr(gold_buffer, "FSDPModule", Split)
    model = Split(2, 2)
    with pytest.raises(ArithmeticError), gold_buffer.gathered(model):
        assert model.whole
        raise ArithmeticError
    assert not model.whole


def test_a_completion_ends_at_the_models_last_position_whatever_it_is_decoded_with():
    model, s = conftest.tiny_qwen(120), Sampling(16, end_ids=(3,))
    free = gold_buffer.HFSampler(model).generate(REQUESTS, s)
    for limit in (44, 41):
        cut = gold_buffer.HFSampler(model, limit=limit).generate(REQUESTS, s)
        for request, a, b in zip(REQUESTS, free, cut):
            room = min(16, limit - len(request.prompt_ids))
            assert b.completion_ids == a.completion_ids[:room]
            assert b.finished == (b.completion_ids[-1] == 3)
    model.config.max_position_embeddings = 30
    assert gold_buffer.HFSampler(model).limit == gold_buffer.HFSampler(model, limit=99).limit == 30
    assert gold_buffer.HFSampler(model, limit=9).limit == 9


@torch.no_grad()
def test_scores_are_the_log_probabilities_of_a_plain_pass_whatever_the_batches_are():
    model = conftest.tiny_llama(120).double()
    sequences = [r.prompt_ids + [7] for r in REQUESTS]
    for size in (1, 60, 2**17):
        for ids, found in zip(sequences, gold_buffer.HFSampler(model, max_batch_tokens=size).score(sequences)):
            logp = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            expected = logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
            assert found.dtype == np.float64 and np.abs(found - expected).max() < 1e-5
    rollouts = gold_buffer.HFSampler(model).generate(REQUESTS, Sampling(9))
    scores = gold_buffer.HFSampler(model).score([q.prompt_ids + r.completion_ids for q, r in zip(REQUESTS, rollouts)])
    for found, r in zip(scores, rollouts):
        assert np.abs(found[-9:] - r.logprobs).max() < 1e-4, "what is sampled is scored the same"


def test_the_sampler_leaves_the_model_in_training_and_its_own_copy_stays_behind():
    model = conftest.tiny_qwen(120).train()
    shared, own = gold_buffer.HFSampler(model), gold_buffer.HFSampler(copy.deepcopy(model), own=True)
    ids = lambda sampler: [rollout.completion_ids for rollout in sampler.generate(REQUESTS, Sampling(8))]
    before = ids(own)
    assert ids(shared) == before and model.training
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    assert ids(own) == before and ids(shared) != before
    own.load_weights(model.state_dict(), 7)
    assert ids(own) == ids(shared) and own.generate(REQUESTS, Sampling(1))[0].version == 7
    with pytest.raises(IndexError):
        shared.generate([Request([500], 0)], Sampling(1))  # no such token
    assert model.training, "also after a failure"


# ----------------------------------------------------------------------------------------------------------------------
# the buffer


class FakeSampler:
    """Answers with the version of its weights; remembers what it was asked. `gate` holds it up, `fails` breaks it."""

    collective = False

    def __init__(self, gate: threading.Event | None = None, fails_at: int | None = None):
        self.gate, self.fails_at, self.calls, self.closed = gate, fails_at, [], 0

    def load_weights(self, weights, version):
        self.weight = float(weights["w"])
        self.version = version

    def generate(self, requests, sampling, done):
        assert sampling == Sampling(16)
        if self.gate is not None:
            assert self.gate.wait(20)
        if len(self.calls) == self.fails_at:
            raise ArithmeticError("the engine broke")
        self.calls.append([r.seed for r in requests])
        ids = [10 + int(self.weight), 2]
        for i in reversed(range(len(requests))):  # in the order in which they end
            done(i, Rollout(ids, [-1.0, -0.5], True, self.version))

    def check(self):
        pass

    def sleep(self):
        pass

    def close(self):
        self.closed += 1


def make_buffer(sampler, lag=0, lmbda=0.5, steps=7, slots=4, generations=2, weights=None, cross=False, answers=None):
    teacher = gold_data.Vocabulary(conftest.metaspace(), (2,), len(conftest.metaspace())) if cross else VOCABULARY
    encoder = gold_buffer.Encoder(VOCABULARY, teacher, 16, cross, cross)
    weights = {"w": torch.zeros(())} if weights is None else weights
    return gold_buffer.WindowBuffer(
        Schedule(1, lmbda, slots, generations), gold_buffer.RowStream(rows_of(9), 1), encoder, sampler, Sampling(16),
        lambda: weights, steps, lag, answers,
    )  # fmt: skip


def plain(window: gold_buffer.Window) -> tuple:
    """Everything but the clock."""
    alignments = [s.alignment and s.alignment.student_span.tolist() for s in window.samples]
    return window.step, window.version, [vars(s) | {"alignment": a} for s, a in zip(window.samples, alignments)]


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_windows_lag_behind_by_exactly_the_lag_and_none_is_made_twice(lag):
    sampler, weights = FakeSampler(), {"w": torch.zeros(())}
    buffer = make_buffer(sampler, lag, weights=weights)
    trained = []
    for step in range(7):
        window = buffer.get(step)
        assert window.step == step and window.version == max(0, step - lag)
        for s in window.samples:
            assert s.version == (window.version if s.on_policy else step)
            if s.on_policy:  # made by the weights of that version, not by what training has made of them since
                assert s.completion_ids == [10 + window.version, 2] and s.logprobs == [-1.0, -0.5]
            else:
                text = VOCABULARY.join(s.completion_ids).decode()
                assert s.finished and text == f"answer {s.row}" and s.logprobs is None
        assert abs(window.on_policy_ratio - 0.5) <= 0.125
        trained.append(sum(s.on_policy for s in window.samples))
        weights["w"] += 1  # in place, like an optimizer
    assert [len(seeds) for seeds in sampler.calls] == trained, "every window once, in order"
    assert len({s for seeds in sampler.calls for s in seeds}) == sum(trained)
    buffer.close()
    assert sampler.closed == 1 and not buffer.pending


def test_off_policy_slots_take_different_rows_and_on_policy_slots_one_prompt():
    buffer = make_buffer(FakeSampler(), generations=3, slots=2)
    samples = buffer.get(0).samples
    on, off = ([s for s in samples if s.on_policy == kind] for kind in (True, False))
    assert len({s.row for s in on}) == 1 and len(on) == 3 and len({s.row for s in off}) == 3
    buffer.close()


@pytest.mark.parametrize("lag", [1, 2])
def test_training_and_generation_overlap(lag):
    """The sampler waits for a step that only happens after get has returned: without overlap nobody would go on."""
    gate = threading.Event()
    sampler = FakeSampler(gate)
    gate.set()
    buffer = make_buffer(sampler, lag, lmbda=1.0)
    buffer.get(0)
    gold_buffer.wait(buffer.pending.values())
    for step in range(1, 7):
        gate.clear()
        assert buffer.get(step).step == step
        gate.set()  # the optimizer step
        gold_buffer.wait(buffer.pending.values())
    buffer.close()


def test_what_is_written_is_aligned_while_the_rest_is_still_being_sampled(monkeypatch):
    """The sampler ends a second completion only when the first one and all answers are aligned."""
    real, aligned, enough = gold_buffer.Encoder.align, [], threading.Event()

    def align(encoder, sample):
        aligned.append(real(encoder, sample))
        if sum(not s.on_policy for s in aligned) == 4 and any(s.on_policy for s in aligned):
            enough.set()
        return sample

    class Waits(FakeSampler):
        def generate(self, requests, sampling, done):
            def wait_after(i, rollout):
                done(i, rollout)
                assert enough.wait(20)

            super().generate(requests, sampling, wait_after)

    monkeypatch.setattr(gold_buffer.Encoder, "align", align)
    buffer = make_buffer(Waits(), cross=True)
    assert all(s.alignment is not None for s in buffer.get(0).samples) and len(aligned) == 8
    buffer.close()


@pytest.mark.parametrize("on_policy", [False, True])
def test_what_goes_wrong_while_aligning_is_raised_and_the_next_window_is_whole(on_policy, monkeypatch):
    real, broken = gold_buffer.Encoder.align, []

    def align(encoder, sample):
        if sample.on_policy == on_policy and not broken:
            broken.append(sample)
            raise ArithmeticError("not aligned")
        return real(encoder, sample)

    monkeypatch.setattr(gold_buffer.Encoder, "align", align)
    buffer = make_buffer(FakeSampler(), cross=True)
    with pytest.raises(ArithmeticError, match="not aligned"):
        buffer.get(0)
    buffer.pending.clear()
    assert all(s.alignment is not None for s in buffer.get(1).samples)
    buffer.close()


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_what_goes_wrong_in_the_worker_is_raised_at_the_next_step(lag):
    buffer = make_buffer(FakeSampler(fails_at=lag + 1), lag, lmbda=1.0)  # the first window that step 0 does not need
    buffer.get(0)
    gold_buffer.wait(buffer.pending.values())
    if lag == 0:
        with pytest.raises(ArithmeticError, match="the engine broke"):
            buffer.get(1)
    else:
        buffer.get(1)  # starts the one that breaks
        gold_buffer.wait(buffer.pending.values())
        with pytest.raises(ArithmeticError, match="the engine broke"):
            buffer.get(2)
        with pytest.raises(ArithmeticError):
            buffer.state()
    buffer.close()


def test_a_sampler_that_hangs_is_given_up_by_its_deadline():
    sampler = FakeSampler(threading.Event())
    sampler.check = lambda: (_ for _ in ()).throw(TimeoutError("positions [0, 1]"))
    buffer = make_buffer(sampler)
    with pytest.raises(TimeoutError, match="positions"):
        buffer.get(0)
    sampler.gate.set()
    buffer.close()


def test_a_collective_sampler_takes_part_even_where_it_has_nothing_to_say():
    sampler = FakeSampler()
    sampler.collective = True
    buffer = make_buffer(sampler, lmbda=0.0)
    assert buffer.get(0).on_policy_ratio == 0 and sampler.calls == [[]]
    buffer.close()
    sampler = FakeSampler()
    buffer = make_buffer(sampler, lmbda=0.0)
    buffer.get(0)
    assert sampler.calls == []
    buffer.close()


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("cross", [False, True])
def test_a_run_resumed_at_any_step_sees_the_same_windows(lag, cross, tmp_path):
    def run(first: int, last: int, state) -> tuple[list, list, list]:
        weights = {"w": torch.tensor(float(first))}
        sampler = FakeSampler()
        buffer = make_buffer(sampler, lag, weights=weights, cross=cross)
        buffer.load_state(state)
        windows = []
        for step in range(first, last):
            windows.append(plain(buffer.get(step)))
            weights["w"] += 1
        torch.save(buffer.state(), tmp_path / "state.pt")
        buffer.close()
        return windows, torch.load(tmp_path / "state.pt", weights_only=False), sampler.calls

    whole, _, calls = run(0, 7, [])
    for cut in range(8):
        before, state, made_before = run(0, cut, [])
        after, _, made_after = run(cut, 7, state)
        assert before + after == whole and made_before + made_after == calls
        assert len(state) == (min(lag, 7 - cut) if cut else 0)


# ----------------------------------------------------------------------------------------------------------------------
# completions written by the teacher


class FakeTeacher:
    def __init__(self, dies_after: int | None = None):
        self.asked, self.dies_after = [], dies_after

    def generate(self, requests, sampling):
        self.asked += [(r.seed, conftest.byte_level().decode(r.prompt_ids)) for r in requests]
        if self.dies_after is not None and len(self.asked) > self.dies_after:
            raise KeyboardInterrupt
        ids = [VOCABULARY.encode(f"teacher {r.seed % 1000}".encode())[0] for r in requests]
        return [Rollout([*i, 2] if k % 2 else i, [], bool(k % 2), 0) for k, i in enumerate(ids)]


def test_the_teacher_writes_each_row_once_per_epoch_and_a_killed_run_keeps_what_it_wrote(tmp_path):
    def answers(teacher, rank=0):
        return gold_buffer.TeacherAnswers(teacher, VOCABULARY, Sampling(8), tmp_path, rank, seed=4)

    rows, tokenizer = gold_buffer.RowStream(rows_of(6), 0), conftest.byte_level()
    stream = [
        (epoch, i, gold_data.encode_prompt(tokenizer, row.prompt)) for epoch, i, row in map(rows.__getitem__, range(12))
    ]
    first, teacher = [stream[i] for i in (0, 1, 2, 1)], FakeTeacher()
    got = answers(teacher)(first)
    assert got[1] == got[3] and len(teacher.asked) == 3 and {whole for _, whole in got} == {True, False}
    assert teacher.asked[0][1] == tokenizer.decode(first[0][2])
    files = list(tmp_path.glob("*.jsonl"))
    assert len(files) == 1
    files[0].write_text(files[0].read_text() + '\n{"epoch": 0, "row": 5, "comple')  # killed while writing
    again = FakeTeacher()
    resumed = answers(again)
    assert resumed(first) == got and again.asked == []
    more = resumed([stream[3], stream[4]])
    assert len(again.asked) == 2
    third = FakeTeacher()
    assert answers(third, rank=1)([*first, stream[3], stream[4]]) == got + more and third.asked == []
    other_epoch = answers(third, rank=1)([stream[6 + i] for i in range(6)])
    assert len(third.asked) == 6 and len({seed for seed, _ in third.asked + teacher.asked}) == 9 and other_epoch
    entries = [json.loads(line) for f in tmp_path.glob("*.jsonl") for line in f.read_text().splitlines() if "}" in line]
    assert len(entries) == 11 and {e["epoch"] for e in entries} == {0, 1}


def test_a_window_trains_on_the_teachers_answers_and_invents_no_end(tmp_path):
    answers = gold_buffer.TeacherAnswers(FakeTeacher(), VOCABULARY, Sampling(8), tmp_path, 0, 0)
    buffer = make_buffer(None, lmbda=0.0, answers=answers)
    samples = buffer.get(0).samples
    assert all("teacher" in VOCABULARY.join(s.completion_ids).decode() for s in samples)
    assert {s.finished for s in samples} == {True, False}
    assert all((s.completion_ids[-1] == VOCABULARY.ends[0]) == s.finished for s in samples)
    buffer.close()


def test_the_teacher_writes_for_the_windows_to_come_in_one_go_and_not_beyond_the_last(tmp_path):
    asked = []

    class Counted(FakeTeacher):
        def generate(self, requests, sampling):
            asked.append(len(requests))
            return super().generate(requests, sampling)

    answers = gold_buffer.TeacherAnswers(Counted(), VOCABULARY, Sampling(8), tmp_path / "all", 0, 0)
    buffer = make_buffer(None, lmbda=0.0, answers=answers)
    windows = [buffer.get(step) for step in range(buffer.last_step)]
    buffer.close()
    assert asked == [sum(len(w.samples) for w in windows)]  # no row comes twice in an epoch
    alone = gold_buffer.TeacherAnswers(FakeTeacher(), VOCABULARY, Sampling(8), tmp_path / "one", 0, 0)
    one_by_one = make_buffer(None, lmbda=0.0, answers=lambda wanted, soon: alone(wanted))
    for step, window in enumerate(windows):
        theirs = one_by_one.get(step).samples
        assert [s.completion_ids for s in theirs] == [s.completion_ids for s in window.samples]
    one_by_one.close()


def test_completions_are_cut_at_their_length_without_an_end():
    encoder = gold_buffer.Encoder(VOCABULARY, None, 4, False, False)
    ids, finished = encoder.completion("one two three four five six")
    assert len(ids) == 4 and not finished
    ids, finished = encoder.completion("one")
    assert finished and ids[-1] == 2 and VOCABULARY.join(ids) == b"one"
    assert encoder.completion("one", whole=False) == (ids[:-1], False)


@settings(max_examples=40, deadline=None)
@given(text=st.text("ab =1\u00e9\u6771", max_size=80), most=st.integers(1, 6))
def test_no_more_of_a_text_is_encoded_than_could_be_kept(text, most):
    """And what is kept is what the whole text begins with, to the byte."""
    encoder = gold_buffer.Encoder(VOCABULARY, None, most, False, False)
    longest = int(VOCABULARY.lengths.max())
    ids, finished = encoder.completion(text)
    if len(text) <= most * longest:
        whole = VOCABULARY.encode(text.encode())[0] + [2]
        assert (ids, finished) == (whole[:most], len(whole) <= most)
    long = (text + "x") * (most * longest + 1)
    ids, finished = encoder.completion(long)
    assert len(ids) == most and not finished and long.encode().startswith(VOCABULARY.join(ids))


def test_ten_megabytes_of_completion_cost_what_a_thousand_tokens_cost():
    seen, vocabulary = [], copy.copy(VOCABULARY)
    vocabulary.encode = lambda text: seen.append(len(text)) or VOCABULARY.encode(text)
    ids, finished = gold_buffer.Encoder(vocabulary, None, 1000, False, False).completion("10 + 10 = 20\n" * 800_000)
    assert len(ids) == 1000 and not finished and max(seen) == 1000 * VOCABULARY.lengths.max()


def test_choose_sampler_says_why(monkeypatch):
    assert gold_buffer.choose_sampler("hf") == ("hf", "as asked")
    monkeypatch.setattr(gold_buffer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        gold_buffer.choose_sampler("vllm")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gold_buffer.choose_sampler("auto") == ("hf", "vLLM is not installed")
    monkeypatch.setattr(gold_buffer.importlib.util, "find_spec", lambda name: object())
    assert gold_buffer.choose_sampler("auto")[0] == "vllm"


# ----------------------------------------------------------------------------------------------------------------------
# one token from a law


@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000])
def test_a_token_is_where_the_running_sum_of_its_law_exceeds_the_uniform_number(size):
    """Found block by block, and never a token without probability, however close to 1 the number is."""
    generator = torch.Generator().manual_seed(size)
    z, how = 5 * torch.randn(64, size, generator=generator), gold_buffer.Sampling(1)
    z[:, size // 2 + 1 :] = float("-inf")
    p = torch.softmax(z, -1)
    running = p.double().cumsum(-1)
    for _ in range(20):
        u = torch.rand(64, generator=generator, dtype=torch.float64)
        expected = (running <= u[:, None] * running[:, -1:]).sum(-1)
        assert torch.equal(gold_buffer.draw(z, u, how), expected)
    for u in (0.0, 1 - 2**-53):
        token = gold_buffer.draw(z, torch.full((64,), u, dtype=torch.float64), how)
        assert (p.gather(1, token[:, None]) > 0).all()
