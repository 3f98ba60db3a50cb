"""What the prefix loss leaves out, and what a second pass that supplies it would cost.

    python tests/bench_missed.py out/embedded/student out/embedded/teacher        trained models: student, teacher
    python tests/bench_missed.py --fetch ~/.cache/tokenizers                     real tokenizers: the cost alone

The canonical tokens of x_1..x_m are one sequence c_m, so the tokens of every text that starts with x_1..x_k pass
through some c_m, m <= k, whose next token reaches beyond k:

    F(k) = sum over m <= k of P(c_m) p(tokens t after c_m that start with x_{m+1}..x_k, c_m + t canonical).

`prefix` has the c_m that its one pass visits and uses the offsets where no other counts. Here every c_m of a text is
a row of its own, which gives the law of the next byte at *every* offset, so the whole divergence of the two laws of
text. The first table: nats per text by both; `found` is the share of the whole that prefix sees (by the chain rule it
can only merge outcomes), `complete` how far the sums are from adding up (what the models put on other tokens). Cost:
positions that a second pass would have to read, c_m without what it shares with the text's own tokens, per token.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import bench_coverage
import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

import gold_buffer
import gold_data
import gold_loss
from gold_data import Sample, Vocabulary


def contexts(v: Vocabulary, text: bytes) -> list[list[int]]:
    """c_0, c_1, .., c_n"""
    return [list(v.encode(text[:m])[0]) for m in range(len(text) + 1)]


def extra_positions(v: Vocabulary, text: bytes) -> float:
    """Positions of all c_m that the text's own tokens do not visit, per token of the text."""
    own = v.encode(text)[0]
    shared = lambda c: next((i for i, (a, b) in enumerate(zip(c, own)) if a != b), min(len(c), len(own)))
    return sum(len(c) - shared(c) for c in contexts(v, text)) / len(own)


@torch.no_grad()
def text_law(model, v: Vocabulary, prompt: list[int], text: bytes) -> tuple[np.ndarray, float]:
    """(law of the next byte, or the end, at every offset (n + 1, 257); how far the sums are from adding up)"""
    rows = contexts(v, text)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt + c) for c in rows], True)
    logp = model(input_ids=ids).logits.double().log_softmax(-1).numpy()
    mass = np.zeros((len(text) + 1, 257))
    for m, c in enumerate(rows):
        if v.join(c) != text[:m]:
            continue
        first = len(prompt) - 1
        path = np.exp(sum(logp[m, first + i, t] for i, t in enumerate(c)))
        law = path * np.exp(logp[m, first + len(c)])
        mass[m, 256] += law[list(v.ends)].sum()
        for t, written in enumerate(v.bytes):
            if written and list(v.encode(text[:m] + written)[0]) == [*c, t]:
                for k in range(m, min(m + len(written), len(text) + 1)):
                    if written[: k - m] != text[m:k]:
                        break
                    mass[k, written[k - m]] += law[t]
    total = mass.sum(1)
    reached = np.array([mass[k, text[k]] for k in range(len(text))])
    return mass / total[:, None], float(np.abs(total[1:] / reached - 1).max(initial=0))


@torch.no_grad()
def by_prefix(models, pair, prompts, sample: Sample, beta: float) -> float:
    batch, sides, queries = gold_data.collate([sample]), [], []
    inputs = ((batch.student_ids, batch.student_rows[batch.scored], batch.student_targets[batch.scored]),)
    inputs += ((batch.teacher_ids, batch.teacher_rows, batch.teacher_targets),)
    asked = (batch.student_queries, batch.teacher_queries)
    for model, v, (ids, rows, targets), q in zip(models, pair, inputs, asked):
        backbone, head = gold_buffer.split_head(model)
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[rows]
        sides.append(gold_loss.Side(hidden, gold_loss.Head(**head), targets))
        queries.append(gold_loss.Queries(torch.from_numpy(v.order), torch.from_numpy(v.edge), **q))
    size = batch.offset_sample.numel()
    return gold_loss.prefix_loss(*sides, *queries, batch.offset, size, beta).values.sum().item()


def trained(names: list[str], samples: int) -> None:
    pair = [gold_data.load_vocabulary(name) for name in names]
    models = [gold_buffer.load_model(name, None, torch.float32, "cpu").eval() for name in names]
    encoder = gold_buffer.Encoder(*pair, 64, True, True)
    rows = gold_data.make_countdown(samples, mini=True, test=True)
    rows = [gold_data.to_row(row) for row in rows]
    prompts = [encoder.prompts(row) for row in rows]
    written = [Sample(ours, *encoder.completion(text), False, theirs) for ours, theirs, text in prompts]
    requests = [gold_buffer.Request(s.prompt_ids, i) for i, s in enumerate(written)]
    rollouts = gold_buffer.HFSampler(models[0]).generate(requests, gold_buffer.Sampling(64, end_ids=pair[0].ends))
    sampled = [
        Sample(s.prompt_ids, r.completion_ids, r.finished, True, s.teacher_prompt_ids)
        for s, r in zip(written, rollouts)
    ]
    print("| texts | beta | whole | by prefix | found | complete | cost, student | teacher |\n" + "|---" * 8 + "|")
    for kind, some in (("answers", written), ("student's samples", sampled)):
        found, gaps, cost = {0.0: [], 0.5: [], 1.0: []}, [], []
        for sample in filter(lambda s: s.finished, map(encoder.align, some)):
            text, prompt = pair[0].join(sample.completion_ids[:-1]), (sample.prompt_ids, sample.teacher_prompt_ids)
            if (
                any(v.join(v.encode(text)[0]) != text for v in pair)
                or sample.completion_ids[:-1] != pair[0].encode(text)[0]
            ):
                continue  # not canonical: prefix has other sums for it
            (q, gap_q), (p, gap_p) = (text_law(*x, text) for x in zip(models, pair, prompt))
            gaps += [gap_q, gap_p]
            cost.append([extra_positions(v, text) for v in pair])
            p, q = (torch.from_numpy(x).log() for x in (p, q))
            for beta, values in found.items():
                whole = gold_loss.divergence(p, q, beta).sum().item()
                values.append((whole, by_prefix(models, pair, prompt, sample, beta)))
        for beta, values in found.items():
            whole, ours = np.mean(values, 0)
            share = f"{ours / whole:.1%}"
            costs = " | ".join(f"{x:.1f}" for x in np.mean(cost, 0))
            print(
                f"| {len(values)} {kind} | {beta:g} | {whole:.3f} | {ours:.3f} | {share} | {max(gaps):.1e} | {costs} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="student, teacher")
    parser.add_argument("--fetch", type=Path, metavar="CACHE")
    parser.add_argument("--samples", type=int, default=32)
    args = parser.parse_args()
    if args.models:
        trained(args.models, args.samples)
    for name, path in (bench_coverage.fetch(args.fetch) if args.fetch else {}).items():
        fast = PreTrainedTokenizerFast(tokenizer_object=bench_coverage.open_tokenizer(path))
        fast.add_special_tokens({"eos_token": "<|the end|>"})
        v = Vocabulary(fast, (fast.eos_token_id,), len(fast))
        costs = [extra_positions(v, text.encode()[5000:6000]) for text in bench_coverage.texts().values()]
        print(name, " ".join(f"{kind} {x:.1f}" for kind, x in zip(bench_coverage.texts(), costs)), flush=True)


if __name__ == "__main__":
    main()
