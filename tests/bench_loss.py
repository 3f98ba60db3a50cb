"""Time and memory of head + loss + backward: gold_loss, the plain dense form, TRL and Liger, in one run.

    python tests/bench_loss.py                                   our rows, and the peers' if they are installed
    python tests/bench_loss.py --peers /path/to/venv/bin/python  the peers' rows from another environment
                                                                 (pip install trl==1.16.0 liger-kernel tyro)
    python tests/bench_loss.py --before ce7a2a6                  ours alone against an earlier gold_loss, alternating:
                                                                 16 completions, hidden sizes of the embedded job

One completion of 250, 500 or 1000 tokens behind a prompt of 30 % of all tokens, vocabularies of 32,000 and 151,936
entries, hidden sizes 256 (student) and 512 (teacher), random weights. CPU: float32, one thread, a forked process per
case; GPU, when there is one: bfloat16. `MB` is the peak above what was there before: gradients, logits, all buffers.
"""

import argparse
import collections
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("tests", ".", "forks")]

import bins_loss  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_align import module_at  # noqa: E402
from conftest import LongestMatch  # noqa: E402

import gold_data  # noqa: E402
import gold_loss  # noqa: E402

LENGTHS, VOCABULARIES = (250, 500, 1000), (32_000, 151_936)
STUDENT_HIDDEN, TEACHER_HIDDEN, BETA = 256, 512, 0.5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def text() -> bytes:
    from pydoc_data.topics import topics

    return " ".join(" ".join(topics[key].split()) for key in sorted(topics)).encode("ascii", "ignore")


@functools.cache
def vocabulary(size: int, longest: int) -> LongestMatch:
    """All bytes and the most frequent pieces of words; an unused filler up to `size` with the end."""
    count = collections.Counter()
    for word, n in collections.Counter(re.findall(rb" ?\w+|\W+", text())).items():
        for i in range(len(word)):
            for j in range(i + 2, min(i + longest, len(word)) + 1):
                count[word[i:j]] += n * (j - i)
    strings = [bytes([b]) for b in range(256)] + [s for s, _ in count.most_common(size - 257)]
    strings += [b"\xff%d" % i for i in range(size - 1 - len(strings))]
    return LongestMatch([*strings, None])


def tokenize(v: LongestMatch, data: bytes, most: int) -> tuple[list[int], np.ndarray]:
    """(ids, end offsets) of at most `most` tokens by longest match."""
    index = {s: i for i, s in enumerate(v.bytes) if s}
    ids, ends, at = [], [], 0
    while at < len(data) and len(ids) < most:
        length = next(n for n in range(min(12, len(data) - at), 0, -1) if data[at : at + n] in index)
        ids.append(index[data[at : at + length]])
        ends.append(at := at + length)
    return ids, np.array(ends)


class Inputs:
    """Hidden states and heads of a student and a teacher, for one tokenizer or two (`cross`)."""

    def __init__(self, vocab: int, length: int, cross: bool, completions: int = 1, hidden=None):
        self.prompt, generator = round(length * 0.3 / 0.7), torch.Generator().manual_seed(0)
        kind = torch.bfloat16 if DEVICE == "cuda" else torch.float32
        random = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE, kind)
        put = lambda x: torch.as_tensor(np.ascontiguousarray(x)).to(DEVICE)
        ids = torch.randint(vocab, (length * completions,), generator=generator).to(DEVICE)
        self.student_ids = self.teacher_ids = ids
        if cross:
            self.vocabularies, samples, at = (vocabulary(vocab, 12), vocabulary(vocab, 5)), [], 0
            for _ in range(completions):
                s_ids, s_ends = tokenize(self.vocabularies[0], text()[at:], length - 1)
                data = text()[at : at + s_ends[-1]]
                t_ids, t_ends = tokenize(self.vocabularies[1], data, 10**9)
                ids, at = (s_ids + [vocab - 1], t_ids + [vocab - 1]), at + len(data)
                queries = gold_data.prefix_queries(*self.vocabularies, *ids, data, True)
                self.ends = [np.append(e, len(data) + 1) for e in (s_ends, t_ends)]
                alignment = gold_data.Alignment(
                    ids[1], length, len(ids[1]), *gold_data.spans(*self.ends), len(data), len(data), queries
                )
                samples.append(gold_data.Sample([0], ids[0], True, True, [0], alignment=alignment))
            self.batch = gold_data.collate(samples).to(DEVICE)
            self.student_ids, self.teacher_ids = self.batch.student_targets, self.batch.teacher_targets
            both = zip(self.vocabularies, (self.batch.student_queries, self.batch.teacher_queries))
            self.queries = [gold_loss.Queries(order=put(v.order), edge=put(v.edge), **q) for v, q in both]
            bins = bins_loss.shared_bins(*self.vocabularies)
            self.bins, self.match = (
                (*map(put, bins[:2]), bins[2]),
                tuple(map(put, gold_data.shared_ids(*self.vocabularies))),
            )
        rows_s, rows_t = self.prompt + len(self.student_ids), self.prompt + len(self.teacher_ids)
        h, d = hidden or (STUDENT_HIDDEN, TEACHER_HIDDEN)
        self.hidden, self.teacher_hidden = random(rows_s, h), random(rows_t, d)
        self.weight, self.teacher_weight = random(vocab, h), random(vocab, d)
        self.weight *= 0.1
        self.teacher_weight *= 0.1
        self.hidden.requires_grad_(), self.weight.requires_grad_()

    def sides(self) -> tuple[gold_loss.Side, gold_loss.Side]:
        """The scored rows only; row i predicts completion token i."""
        spans = (self.batch.student_span, self.batch.teacher_span) if hasattr(self, "batch") else (None, None)
        rows_s, rows_t = (
            slice(self.prompt - 1, self.prompt - 1 + len(x)) for x in (self.student_ids, self.teacher_ids)
        )
        return (
            gold_loss.Side(self.hidden[rows_s], gold_loss.Head(self.weight), self.student_ids, spans[0]),
            gold_loss.Side(
                self.teacher_hidden[rows_t], gold_loss.Head(self.teacher_weight), self.teacher_ids, spans[1]
            ),
        )

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, T, V) of both models at every position, as their forward passes return them."""
        with torch.no_grad():
            teacher = (self.teacher_hidden @ self.teacher_weight.T)[None]
        return (self.hidden @ self.weight.T)[None], teacher

    def labels(self, ids: torch.Tensor) -> torch.Tensor:
        """(1, T) with -100 at the prompt."""
        return torch.cat([ids.new_full((self.prompt,), -100), ids])[None]


# ----------------------------------------------------------------------------------------------------------------------
# cases: Inputs -> loss


def plain(x: Inputs) -> torch.Tensor:
    student, teacher = x.sides()
    with torch.no_grad():
        z = teacher.hidden @ teacher.head.weight.T
    return gold_loss.jsd(student.hidden @ student.head.weight.T, z, BETA).sum()


def fused(x: Inputs) -> torch.Tensor:
    return gold_loss.fused_jsd(*x.sides(), BETA).total


def trl_dense(x: Inputs) -> torch.Tensor:
    from trl.experimental.gold.gold_trainer import GOLDTrainer

    student, teacher = x.logits()
    labels = x.labels(x.student_ids)[:, 1:]
    return GOLDTrainer.generalized_jsd_loss(student[:, :-1], teacher[:, :-1], labels, BETA)


def trl_chunked(x: Inputs) -> torch.Tensor:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    s, t = x.sides()
    mask = torch.ones_like(x.student_ids)[None]
    weights = (s.head.weight, t.head.weight)
    return _chunked_divergence_loss(s.hidden[None], t.hidden[None], *weights, mask, BETA)[0]


def liger(x: Inputs) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA, compiled=DEVICE == "cuda")
    labels = torch.cat([x.labels(x.student_ids)[0, 1:], x.student_ids.new_full((1,), -100)])
    return loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, labels)


def prefix(x: Inputs) -> torch.Tensor:
    m = x.batch.offset_sample.numel()
    return gold_loss.prefix_loss(*x.sides(), *x.queries, x.batch.offset, m, BETA).total


def bins(x: Inputs) -> torch.Tensor:
    return bins_loss.bins_loss(*x.sides(), *x.bins, BETA).total


def alm(x: Inputs) -> torch.Tensor:
    student, teacher = x.sides()
    with torch.no_grad():
        logprobs = gold_loss.token_logprobs(teacher)[0]
    return gold_loss.alm_loss(student, logprobs, teacher.span).total


def uld(x: Inputs) -> torch.Tensor:
    return gold_loss.uld_loss(*x.sides()).total


def hybrid(x: Inputs) -> torch.Tensor:
    return gold_loss.uld_loss(*x.sides(), x.match, beta=BETA).total


def trl_uld(x: Inputs, match: bool = False) -> torch.Tensor:
    from trl.experimental.gold.gold_trainer import ULDLoss

    config = SimpleNamespace(
        uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_student_temperature=1.0, beta=BETA,
        uld_teacher_temperature=1.0, uld_skip_student_eos=True, uld_skip_teacher_eos=True, use_extended_uld=True,
        uld_token_merge_strategy="bayesian", uld_use_hybrid_loss=match,
    )  # fmt: skip
    name = lambda v: SimpleNamespace(get_vocab=lambda: {(s or b"").decode("latin-1"): i for i, s in enumerate(v.bytes)})
    loss = ULDLoss(config, *map(name, x.vocabularies), device=DEVICE)
    student, teacher = x.logits()

    def offsets(ends: np.ndarray) -> torch.Tensor:
        pairs = np.stack([np.append(0, ends[:-1]), ends], 1)
        return torch.tensor(np.concatenate([np.zeros((x.prompt, 2), dtype=np.int64), pairs]))[None]

    labels = x.labels(x.student_ids), x.labels(x.teacher_ids)
    ids = (label.clamp_min(0) for label in labels)
    return loss(student, teacher, *labels, *ids, *map(offsets, x.ends))


def trl_hybrid(x: Inputs) -> torch.Tensor:
    return trl_uld(x, match=True)


ONE = {"plain dense": plain, "gold fused_jsd": fused}
ONE_PEERS = {"TRL GOLD, dense": trl_dense, "TRL Distillation, chunked": trl_chunked, "Liger, chunked": liger}
TWO = {"gold uld": uld, "gold hybrid": hybrid, "gold bins": bins, "gold alm": alm, "gold prefix": prefix}
TWO_PEERS = {"TRL uld": trl_uld, "TRL hybrid": trl_hybrid}
BUFFERS = {
    "plain dense": 12,
    "TRL GOLD, dense": 18,
    "Liger, chunked": 18,
    "TRL uld": 12,
    "TRL hybrid": 14,
}  # of (T, V), to refuse in time


# ----------------------------------------------------------------------------------------------------------------------
# before and after


def queries_before(x: Inputs, module) -> list:
    """The queries in the form that gold_loss had up to 72ac75b, where that is what `module` reads."""
    if "path" not in module.Queries.__dataclass_fields__:
        return [module.Queries(**vars(q)) for q in x.queries]
    out, (outcomes, offsets) = [], (x.batch.offset.numel(), x.batch.offset_sample.numel())
    for q in x.queries:
        lo, hi = (torch.zeros_like(q.row).index_copy(0, q.wide, ends) for ends in (q.lo, q.hi))
        lo = lo.scatter_reduce(0, q.narrow, q.place, "amin", include_self=False)
        hi = hi.scatter_reduce(0, q.narrow, q.place + 1, "amax", include_self=False)
        slot = torch.cat([torch.full_like(q.start, outcomes + offsets), q.slot, outcomes + q.total])
        by = q.row.argsort(stable=True)
        path = (by < len(q.start)).nonzero()[:, 0]
        columns = (c[by] for c in (q.row, lo, hi, slot))
        out.append(module.Queries(q.order, q.edge, *columns, path, q.start, q.full_row, q.full_slot))
    return out


def ratios(revision: str, rounds: int = 7) -> None:
    """Medians of alternating rounds, value and gradient of the head compared."""
    before = module_at(revision, "gold_loss")
    print("| loss | V | completions | hidden | before, CPU s | now, CPU s | ratio |\n" + "|---" * 7 + "|")
    cases = [("prefix", 8000, n, h) for n in (64, 256) for h in ((96, 96), (STUDENT_HIDDEN, TEACHER_HIDDEN))]
    for name, vocab, length, hidden in [*cases, ("fused_jsd", 32_000, 64, (96, 96)), ("alm", 8000, 64, (96, 96))]:
        x = Inputs(vocab, length, name != "fused_jsd", 16, hidden)
        if name == "prefix":
            asked, m = {before: queries_before(x, before), gold_loss: x.queries}, x.batch.offset_sample.numel()
            all_told = torch.where(x.batch.offset < 0, -1 - x.batch.offset, x.batch.offset)  # there was no other kind
            offsets = {before: all_told, gold_loss: x.batch.offset}
        times, found = {before: [], gold_loss: []}, {}
        for _ in range(rounds):
            for module in times:
                x.hidden.grad = x.weight.grad = None
                as_side = lambda s, module=module: module.Side(s.hidden, module.Head(s.head.weight), s.ids, s.span)
                start, sides = time.process_time(), [as_side(s) for s in x.sides()]
                if name == "prefix":
                    loss = module.prefix_loss(*sides, *asked[module], offsets[module], m, BETA).total
                elif name == "alm":
                    with torch.no_grad():
                        logprobs = module.token_logprobs(sides[1])[0]
                    loss = module.alm_loss(sides[0], logprobs, sides[1].span).total
                else:
                    loss = module.fused_jsd(*sides, BETA).total
                loss.backward()
                times[module].append(time.process_time() - start)
                found[module] = loss.item(), x.weight.grad
        (old, old_grad), (new, new_grad) = found.values()
        apart = ((old_grad - new_grad).norm() / old_grad.norm()).item()
        assert math.isclose(old, new, rel_tol=1e-4) and apart < 1e-3, (name, old, new, apart)
        a, b = (float(np.median(t[1:])) for t in times.values())
        sizes = f"{vocab:,} | 16 x {length} | {hidden[0]}, {hidden[1]}"
        print(f"| {name} | {sizes} | {a:.3f} | {b:.3f} | {a / b:.2f}x |", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# measuring


def status(key: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))


def measure(case, vocab: int, length: int, cross: bool) -> dict:
    """{"seconds", "cpu", "backward" (CPU seconds), "bytes"} of one pass, after one on a short completion."""
    case(Inputs(1000, 50, cross)).backward()
    x = Inputs(vocab, length, cross)
    if DEVICE == "cuda":
        case(x).backward()
        x.hidden.grad = x.weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = status("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    loss = case(x)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    middle, cpu_middle = time.perf_counter(), time.process_time()
    loss.backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        peak, backward = torch.cuda.max_memory_allocated() - before, time.perf_counter() - middle
    else:
        peak, backward = status("VmHWM") - before, time.process_time() - cpu_middle
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "backward": backward,
        "bytes": peak,
    }


def forked(*args) -> dict:
    """`measure` in a process of its own, so that no case inherits the heap of another."""
    if DEVICE == "cuda":
        return measure(*args)

    def child(pipe) -> None:
        torch.set_num_threads(1)
        pipe.send(measure(*args))

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return {"failed": f"exit code {process.exitcode}"}
    finally:
        process.join()


def run(cases: dict, cross: bool, vocabularies, memory: float) -> None:
    """Print a JSON line per case."""
    for vocab in vocabularies:
        for name, case in cases.items():
            for length in LENGTHS:
                row = {"name": name, "vocab": vocab, "length": length, "cross": cross}
                need = BUFFERS.get(name, 0) * length / 0.7 * vocab * 4 / 2**30
                row |= {"failed": f"needs {need:.0f} GB"} if need > memory else forked(case, vocab, length, cross)
                print(json.dumps(row), flush=True)


def show(rows: list[dict]) -> None:
    """Markdown: a table per vocabulary size and kind of loss, with ratios to TRL's."""
    from gold_eval import markdown

    cpu = "CPU s" if DEVICE == "cpu" else "GPU s"
    for cross in (False, True):
        for vocab in VOCABULARIES:
            part = {(r["name"], r["length"]): r for r in rows if r["cross"] == cross and r["vocab"] == vocab}
            lines = [["V = " + f"{vocab:,}", *(f"{n}: {cpu}, MB" for n in LENGTHS)]]
            lines[0] += ["250 to 1000: all, backward"] if cross else ["to TRL dense: CPU, memory"]
            for name in dict.fromkeys(name for name, _ in part):
                found = [part[name, n] for n in LENGTHS]
                cells = [
                    r.get("failed") or f"{r['cpu' if DEVICE == 'cpu' else 'seconds']:.2f}, {r['bytes'] / 2**20:,.0f}"
                    for r in found
                ]
                if cross:
                    ends = found[0], found[-1]
                    growth = [
                        f"x{ends[1][k] / ends[0][k]:.1f}" for k in ("cpu", "backward") if all(k in r for r in ends)
                    ]
                    cells.append(", ".join(growth))
                else:
                    pairs = [(part[name, n], part.get(("TRL GOLD, dense", n), {})) for n in LENGTHS]
                    pairs = [(a, b) for a, b in pairs if "cpu" in a and "cpu" in b]
                    cells.append(
                        "; ".join(f"{a['cpu'] / b['cpu']:.2f}, 1/{b['bytes'] / a['bytes']:.1f}" for a, b in pairs)
                    )
                lines.append([name, *cells])
            if len(lines) > 1:
                print(f"\n{markdown(lines)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=sys.executable, help="Python with trl and liger-kernel")
    parser.add_argument("--memory", type=float, default=8.0, help="GB; cases that would need more are left out")
    parser.add_argument("--vocabularies", type=int, nargs="*", default=VOCABULARIES)
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--before", metavar="REVISION", help="of gold_loss, to compare with")
    for flag in ("--serve", "--ours"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.before:
        torch.set_num_threads(1)
        return ratios(args.before)
    if args.serve:
        installed = lambda name: importlib.util.find_spec("trl" if name.startswith("TRL") else "liger_kernel")
        for cross, (ours, theirs) in ((False, (ONE, ONE_PEERS)), (True, (TWO, TWO_PEERS))):
            cases = (ours if args.ours else {}) | {name: case for name, case in theirs.items() if installed(name)}
            run(
                {name: case for name, case in cases.items() if args.only in name}, cross, args.vocabularies, args.memory
            )
        return
    rows, found = [], []
    for python in dict.fromkeys((sys.executable, args.peers)):
        command = [python, __file__, "--serve", "--memory", str(args.memory), "--only", args.only]
        command += ["--vocabularies", *map(str, args.vocabularies)] + ["--ours"] * (python == sys.executable)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                rows.append(json.loads(line))
                print(line, end="", file=sys.stderr, flush=True)
        found.append(process.returncode)
    show(rows)
    for peer in ("TRL", "Liger"):
        if not args.only and not any(row["name"].startswith(peer) for row in rows):
            print(f"\nNo rows of {peer}: it is not installed in {args.peers}; see --help.")
    sys.exit(max(found))


if __name__ == "__main__":
    main()
