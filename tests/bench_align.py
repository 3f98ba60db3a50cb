"""How fast a completion is aligned for the prefix loss: this checkout against an earlier one, alternating.

    python tests/bench_align.py --fetch ~/.cache/tokenizers            real tokenizers: see bench_coverage.py
    python tests/bench_align.py --fetch ~/.cache/tokenizers --before REVISION --pairs Qwen:Llama-3
    python tests/bench_align.py mine=path/to/model other=path/to/model

Milliseconds per completion: `before`; `new` with no word known, as in a run's first completion, `running` with those
of the completions before it, `again` with all of its own; in brackets how many times as fast as before. REVISION is
ce7a2a6 unless told otherwise: the rule of the longest match, fast and not exact for byte-pair encodings.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import bench_coverage
import numpy as np
from transformers import PreTrainedTokenizerFast

import gold_data

ROOT = Path(__file__).parent.parent


def module_at(revision: str, name: str = "gold_data") -> ModuleType:
    """A file as it was."""
    text = subprocess.run(["git", "show", f"{revision}:{name}.py"], cwd=ROOT, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "before.py").write_bytes(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def milliseconds(module: ModuleType, pair: list, ids: list[int]) -> float:
    start = time.perf_counter()
    module.align(*pair, ids, True, prefix=True)
    return 1e3 * (time.perf_counter() - start)


def measure(before: ModuleType, old: list, new: list, text: str, size: int, completions: int = 12) -> dict[str, float]:
    """Medians over completions of `size` tokens, spread over the text."""
    data, found = text.encode("ascii", "ignore"), {k: [] for k in ("before", "new", "running", "again")}
    known: list[dict] = [{}, {}]
    for at in np.linspace(0, max(0, len(data) - 6 * size), completions).astype(int).tolist():
        ids = new[0].encode(data[at : at + 6 * size])[0][:size] + [new[0].ends[0]]
        for v in new:
            v.words = {}
        found["before"].append(milliseconds(before, old, ids))
        found["new"].append(milliseconds(gold_data, new, ids))
        for v, words in zip(new, known):
            v.words = words
        found["running"].append(milliseconds(gold_data, new, ids))
        found["again"].append(milliseconds(gold_data, new, ids))
    return {kind: float(np.median(times[1:])) for kind, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="*", metavar="NAME=PATH")
    parser.add_argument("--fetch", type=Path, metavar="CACHE")
    parser.add_argument("--before", default="ce7a2a6", metavar="REVISION")
    parser.add_argument("--pairs", nargs="*", metavar="STUDENT:TEACHER", help="instead of neighbours in the list")
    parser.add_argument("--sizes", nargs="*", type=int, default=[512, 4096], help="tokens of a completion")
    args = parser.parse_args()
    paths = bench_coverage.fetch(args.fetch) if args.fetch else {}
    paths |= {name: Path(path) for name, _, path in (t.partition("=") for t in args.tokenizers)}
    pairs = [p.split(":") for p in args.pairs] if args.pairs else list(zip(paths, [*paths][1:]))
    if not pairs:
        parser.error("name two tokenizers as NAME=PATH, or --fetch some")
    before, vocabularies = module_at(args.before), {}
    for name in {name for pair in pairs for name in pair}:
        fast = PreTrainedTokenizerFast(tokenizer_object=bench_coverage.open_tokenizer(paths[name]))
        fast.add_special_tokens({"eos_token": "<|the end|>"})
        vocabularies[name] = [m.Vocabulary(fast, (fast.eos_token_id,), len(fast)) for m in (before, gold_data)]
    print("| student | teacher | text | tokens | before | new words | running | again |\n" + "|---" * 8 + "|")
    for pair in pairs:
        old, new = zip(*map(vocabularies.__getitem__, pair))
        for kind, text in bench_coverage.texts().items():
            for size in args.sizes:
                found = measure(before, old, new, text, size)
                cells = [f"{ms:.1f} ({found['before'] / ms:.1f}x)" for ms in list(found.values())[1:]]
                print(
                    f"| {' | '.join(pair)} | {kind} | {size:,} | {found['before']:.1f} | {' | '.join(cells)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
