"""An independent opinion on F(k), the probability that a text starts with given bytes: the package genlm-bytes.

    python tests/genlm_oracle.py                        exact laws of tokens (known_optimum.py), every text of a source
    python tests/genlm_oracle.py --model DIR            a trained model, at the offsets that prefix uses of an answer

genlm-bytes adds up every tokenization of the bytes, along a tree of tokens (of a trained model the 64 likeliest); we
add up what gold_data.prefix_queries asks for. On a law of canonical tokens both must be the law of the text. A trained
model puts some mass on other tokenizations: only genlm-bytes counts it, the difference is what `prefix` leaves out.

It needs an environment of its own: pip install genlm-bytes==0.2.0 torch transformers datasets tyro matplotlib pytest
"""

import argparse
import asyncio
import functools
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import known_optimum
import numpy as np
import torch
from genlm.backend.llm import AsyncLM
from genlm.backend.tokenization import Token
from genlm.bytes import BeamParams, ByteBeamState

import gold_data


class Law(AsyncLM):
    """`rows(ids)`: (len(ids) + 1, V) laws of the next token behind ids[:0], ids[:1], .."""

    def __init__(self, vocabulary: gold_data.Vocabulary, rows):
        end = vocabulary.ends[0]
        strings = [b if b is not None else b"<%d>" % i for i, b in enumerate(vocabulary.bytes)]
        self.byte_vocab = [Token(i, b"<end>" if i == end else b) for i, b in enumerate(strings)]
        self.tokenizer = vocabulary.tokenizer  # of which it takes a first token, that we take away again
        self.vocabulary, self.rows = vocabulary, rows
        self.known: dict[tuple[int, ...], torch.Tensor] = {}

    def next_token_logprobs_sync(self, token_ids, lora_name=None):
        ids = tuple(token_ids[1:])
        if ids not in self.known:
            self.known[ids] = torch.as_tensor(self.rows(list(ids))[-1], dtype=torch.float64).clamp_min(1e-30).log()
        return self.known[ids]

    async def next_token_logprobs(self, token_ids, lora_name=None):
        return self.next_token_logprobs_sync(token_ids)


async def theirs(law: Law, text: bytes, most: int) -> list[float]:
    """log F(0..n) by genlm-bytes, which follows this many tokenizations."""
    params = BeamParams(K=most, heal=False, eos_byte_strings=[b"<end>"])
    beam, out = await ByteBeamState.initial(law, params), [0.0]
    for byte in text:
        beam = (await (beam << byte)).prune()
        out.append(float(beam.logZ))
    return out


def ours(law: Law, text: bytes) -> dict[int, float]:
    """{k: log F(k)} at the offsets that prefix uses."""
    v = law.vocabulary
    ids = [*v.encode(text)[0], v.ends[0]]
    q, _, _, num_offsets = gold_data.prefix_queries(v, v, ids, ids, text, True)
    rows = np.asarray(law.rows(ids[:-1]))
    path = np.cumprod([1.0, *(rows[i, t] for i, t in enumerate(ids[:-1]))])
    total = np.zeros(num_offsets)
    for row, lo, hi, slot in zip(q["row"], q["lo"], q["hi"], q["slot"]):
        if -num_offsets <= slot < 0:
            total[-1 - slot] += path[row] * rows[row, v.order[lo:hi]].sum()
    known = np.flatnonzero(v.closed(text, ids)[0])
    return dict(zip(known.tolist(), np.log(total).tolist()))


def behind(tokens: known_optimum.Tokens, ids: list[int]) -> list[list[float]]:
    """Laws behind ids[:0], ids[:1], ..; behind what no encoding begins with any will do, as it has probability 0."""
    if tuple(ids) not in tokens.after:
        return [[1 / tokens.vocabulary.size] * tokens.vocabulary.size]
    return tokens.rows([*ids, tokens.vocabulary.ends[0]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    (row,) = gold_data.make_countdown(1, mini=True)
    parser.add_argument("--prompt", default=row["prompt"][0]["content"], help="user message")
    parser.add_argument("--text", default=row["completion"], help="answer")
    args = parser.parse_args()
    if args.model is None:
        for setting, (*about, tokenizer, _) in known_optimum.REAL.items():
            source, v = known_optimum.EveryText(*about), known_optimum.real_vocabulary(tokenizer())
            tokens = known_optimum.Tokens(v, source)
            law, worst, used, offsets = Law(v, functools.partial(behind, tokens)), [0.0, 0.0], 0, 0
            starts = {}
            for text, p in source.texts:
                for k in range(len(data := source.bytes(text)) + 1):
                    starts[data[:k]] = starts.get(data[:k], 0.0) + p
            for text, _ in source.texts[:: max(1, len(source.texts) // 60)]:
                data = source.bytes(text)
                a, b = ours(law, data), asyncio.run(theirs(law, data, 10**9))
                offsets, used = offsets + len(data) + 1, used + len(a)
                for k, x in a.items():
                    far = [abs(math.exp(y) / starts[data[:k]] - 1) for y in (x, b[k])]
                    worst = np.maximum(worst, far)
            print(
                "{}: {} of {} offsets; largest error of F(k): ours {:.0e}, genlm-bytes {:.0e}".format(
                    setting, used, offsets, *worst
                )
            )
        return
    from transformers import AutoModelForCausalLM

    model, v = AutoModelForCausalLM.from_pretrained(args.model).eval(), gold_data.load_vocabulary(str(args.model))
    prompt = gold_data.encode_prompt(v.tokenizer, [{"role": "user", "content": args.prompt}])

    @torch.no_grad()
    def rows(ids):
        return model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 :].double().softmax(-1).numpy()

    law, text = Law(v, rows), args.text.encode()
    a, b = ours(law, text), asyncio.run(theirs(law, text, 64))
    gap = np.array([b[k] - x for k, x in a.items()])
    shares = 1 - np.exp(-np.array([gap.mean(), gap.max(), gap[-1]]))
    print(f"{len(a)} of {len(text) + 1} offsets; share of F(k) in other tokenizations:", end=" ")
    print("mean {:.2%}, largest {:.2%}, at the end of the text {:.2%}".format(*shares))


if __name__ == "__main__":
    main()
