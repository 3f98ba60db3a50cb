"""How much of what a trained model writes is in other tokens than its tokenizer would use for the same text.

    python tests/bench_canonical.py MODEL [MODEL ..]                 puzzles of countdown-mini, as in the embedded job
    python tests/bench_canonical.py MODEL --prompt "Tell me .." ..   chat prompts

`prefix` is exact for models whose samples are canonical: encoding the text of a sample gives its tokens. Every sample
is encoded again; the rate of breaks is the mass that a next token puts on leaving the canonical tokens, per token.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import gold_buffer
import gold_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--prompt", nargs="*", help="user messages instead of puzzles")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    prompts = args.prompt or [row["prompt"][0]["content"] for row in gold_data.make_countdown(args.samples, mini=True)]
    print(
        "| model | samples | tokens | samples with a break | breaks per 1,000 tokens | the first |\n" + "|---" * 6 + "|"
    )
    for name in args.models:
        v = gold_data.load_vocabulary(name)
        model = gold_buffer.load_model(name, None, torch.float32, "cpu").eval()
        ids = [gold_data.encode_prompt(v.tokenizer, [{"role": "user", "content": text}]) for text in prompts]
        requests = [gold_buffer.Request(ids[i % len(ids)], i) for i in range(args.samples)]
        sampling = gold_buffer.Sampling(args.tokens, 1.0, 1.0, 0, 0.0, v.ends)
        with torch.no_grad():
            rollouts = gold_buffer.HFSampler(model, own=True, dtype=torch.float32).generate(requests, sampling)
        breaks, seen, first = 0, 0, ""
        for rollout in rollouts:
            written = [i for i in rollout.completion_ids if v.bytes[i]]
            canonical = list(v.encode(v.join(written))[0])
            same = next((n for n, (a, b) in enumerate(zip(written, canonical)) if a != b), len(written))
            seen += min(same + 1, len(written))
            if same < len(written):
                breaks += 1
                both = (v.tokenizer.convert_ids_to_tokens(some[same : same + 3]) for some in (written, canonical))
                first = first or " for ".join(map(str, both))
        rate = f"{breaks / seen * 1000:.2f} ± {np.sqrt(breaks) / seen * 1000:.2f}"
        print(f"| {name} | {len(rollouts)} | {seen} | {breaks / len(rollouts):.1%} | {rate} | {first} |", flush=True)


if __name__ == "__main__":
    main()
