"""The repository's own promises: which file may import which, no dead flags, a README that says what is true."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gold_eval
import gold_train

ROOT = Path(gold_train.__file__).parent
FILES = ("gold_train", "gold_loss", "gold_data", "gold_buffer", "gold_eval")
MAY_IMPORT = {
    "gold_loss": set(),
    "gold_data": set(),
    "gold_buffer": {"gold_data"},
    "gold_eval": {"gold_data", "gold_buffer"},
    "gold_train": {"gold_loss", "gold_data", "gold_buffer", "gold_eval"},
}


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / f"{name}.py").read_text())


def imports(name: str) -> set[str]:
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name):
    assert {n for n in imports(name) if n.startswith("gold_")} == MAY_IMPORT[name]


def test_the_loss_file_needs_torch_and_nothing_else():
    assert {n for n in imports("gold_loss") if n not in sys.stdlib_module_names} == {"torch"}
    code = (
        "import gold_loss, sys; print([n for n in sys.modules if n.startswith(('transformers', 'datasets', 'tyro'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_everything_imports_without_vllm_wandb_and_matplotlib():
    hidden = "import sys; sys.modules.update(dict.fromkeys(('vllm', 'wandb', 'matplotlib', 'math_verify')))"
    code = f"{hidden}; import {', '.join(FILES)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", FILES)
def test_every_file_opens_with_what_it_does_and_what_it_does_not_know(name):
    assert "knows nothing about" in re.sub(r"\s+", " ", ast.get_docstring(tree(name)))


@pytest.mark.parametrize("name", FILES)
def test_public_functions_have_type_hints_and_a_docstring(name):
    for node in tree(name).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            methods = node.body if isinstance(node, ast.ClassDef) else [node]
            for f in methods:
                if isinstance(f, ast.FunctionDef) and not f.name.startswith("_") and f.args.args:
                    hints = [a.annotation for a in f.args.args if a.arg != "self"]
                    assert f.returns or any(hints) or not hints, f"{name}.{f.name} has no type hint"


def test_every_flag_is_read():
    """By gold_train itself, other than where it is defined."""
    read = {
        n.attr for n in ast.walk(tree("gold_train")) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)
    }
    for field in dataclasses.fields(gold_train.Config):
        assert field.name in read, field.name


def test_losses_in_the_config_are_the_losses_that_exist():
    source = (ROOT / "gold_train.py").read_text()
    for loss in gold_train.Config.__dataclass_fields__["cross_tokenizer_loss"].type.__args__:
        assert f'"{loss}"' in source


README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")


def test_every_flag_in_the_readme_exists():
    train = {f.name for f in dataclasses.fields(gold_train.Config)}
    evaluate = {f.name for f in dataclasses.fields(gold_eval.Config)}
    evaluate |= {f.name for f in dataclasses.fields(gold_eval.Options)}
    seen = 0
    for line in BLOCKS.splitlines():
        for script, known in (("gold_train.py", train), ("gold_eval.py", evaluate)):
            if script in line:
                flags = re.findall(r"--(?:no-)?([a-z][a-z0-9-]+)", line.split(script)[1])
                seen += len(flags)
                for flag in flags:
                    assert flag.replace("-", "_") in known, f"{script}: --{flag}"
    assert seen > 10


def test_line_counts_in_the_readme_are_true():
    counts = dict(re.findall(r"\| `(gold_\w+\.py)` \| (\d+) \|", README))
    assert len(counts) == 5
    for name, lines in counts.items():
        assert int(lines) == len((ROOT / name).read_text().splitlines()), name


def test_ci_calls_the_readmes_test_command():
    assert "pytest tests/" in BLOCKS and "pytest tests/" in (ROOT / ".ci" / "run").read_text().splitlines()[-1]


def test_every_file_and_figure_that_the_readme_names_exists():
    for path in re.findall(r"(?:\]\(|src=\")([^)\"#:]+)(?:\)|\")", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:tests|forks|assets)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path


def test_the_example_fork_raises_the_on_policy_share_and_loses_no_row(monkeypatch):
    import runpy

    import gold_buffer

    monkeypatch.setattr(gold_buffer, "Schedule", gold_buffer.Schedule)  # put back afterwards
    fork = runpy.run_path(str(ROOT / "forks" / "lmbda_warmup.py"), run_name="fork")
    schedule = gold_buffer.Schedule(seed=0, lmbda=0.8, slots=10, generations=3)
    assert isinstance(schedule, fork["Warmup"])
    rows = []
    for step in range(300):
        slots = schedule.draw(step)
        share = sum(slot.on_policy for slot in slots) / 10
        assert abs(share - 0.8 * min(1.0, (step + 0.5) / fork["WARMUP"])) <= 0.1 + 1e-9
        rows += [row for slot in slots for row in slot.rows]
    assert rows == list(range(len(rows)))
