"""The repository's own promises: who imports whom, limits of size, no dead flags, references that lead somewhere.

pytest tests/test_repo.py
"""

import ast
import dataclasses
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import gold_data
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
    """And Triton for a GPU, which torch brings there, but not before a loss is computed on one."""
    assert {n for n in imports("gold_loss") if n not in sys.stdlib_module_names} == {"torch", "triton"}
    others = "('transformers', 'datasets', 'tyro', 'triton')"
    code = f"import gold_loss, sys; print([n for n in sys.modules if n.startswith({others})])"
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


def test_the_help_names_losses_that_exist():
    line = next(x for x in (ROOT / "gold_train.py").read_text().splitlines() if "cross_tokenizer_loss: str" in x)
    named = line.split("differ: ")[1].split(";")[0].split(", ")
    assert len(named) > 3 and set(named) <= set(gold_train.CROSS_LOSSES)


# ----------------------------------------------------------------------------------------------------------------------
# limits of size: what one reads in a sitting


def test_no_file_grows():
    """The aim is 4,400 lines and no file above 1,000; until they are there, the number of lines only goes down."""
    most = {"gold_train": 1621, "gold_loss": 739, "gold_data": 1611, "gold_buffer": 1153, "gold_eval": 946}
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in FILES}
    assert all(lines[name] <= most[name] for name in FILES), lines


def test_a_fork_is_read_in_a_sitting():
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "forks").glob("*.py")}
    assert len(lines) >= 5 and all(n <= 400 for n in lines.values()), lines


def test_a_function_fits_a_screen():
    """All but `train`, which is the algorithm."""
    too_long = {}
    for name in FILES:
        for node in ast.walk(tree(name)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if lines > (110 if (name, node.name) == ("gold_train", "train") else 80):
                    too_long[f"{name}.{node.name}"] = lines
    assert not too_long


def test_there_are_at_most_sixty_flags():
    assert len(dataclasses.fields(gold_train.Config)) <= 60


def test_the_documents_are_short():
    limits = {"README.md": 250, "AGENTS.md": 25}
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in limits}
    assert all(lines[name] <= limits[name] for name in limits), lines


# ----------------------------------------------------------------------------------------------------------------------
# the five files stand alone


def test_the_embedded_job_runs_in_a_copy_that_holds_the_five_files_only(tmp_path):
    """All its stages, much shorter, with the evaluation's child; forks/, tests/ and assets/ are not there."""
    for name in FILES:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    code = """
import sys
import gold_train
assert gold_train.TEACHER_STEPS > 2 and gold_train.STUDENT_STEPS > 2  # these names are what a run reads
gold_train.TEACHER_STEPS = gold_train.STUDENT_STEPS = 2
sys.argv = "gold_train.py --output-dir out --max-steps 2 --eval-max-samples 2".split()
gold_train.main()
print("the files of", gold_train.__file__)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"the files of {tmp_path}" in done.stdout
    for name in ("teacher", "student before", "student after 2 steps", "answers alone"):
        assert f"| {name} " in done.stdout, done.stdout[-3000:]


# ----------------------------------------------------------------------------------------------------------------------
# README.md, tests/RESULTS.md and AGENTS.md say what is true

PAGES = {"README": ROOT / "README.md", "RESULTS": ROOT / "tests" / "RESULTS.md", "AGENTS": ROOT / "AGENTS.md"}
TEXT = {name: path.read_text() for name, path in PAGES.items()}
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
HEADINGS = {name: re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE) for name, text in TEXT.items()}
COMMANDS = {name: "\n".join(FENCED.findall(text)).replace("\\\n", " ").splitlines() for name, text in TEXT.items()}
MODULES = {name: importlib.import_module(name) for name in FILES}
FLAGS = {
    "gold_train.py": {f.name for f in dataclasses.fields(gold_train.Config)} | {"nproc"},
    "gold_eval.py": {f.name for c in (gold_eval.Config, gold_eval.Options) for f in dataclasses.fields(c)},
    "gold_data.py": {f.name for c in (gold_data.Config, gold_data.Difficulty) for f in dataclasses.fields(c)},
}


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_in_the_documents_exists(name):
    some_script = set().union(*FLAGS.values(), {"help", "nproc"})
    for line in COMMANDS[name] + re.findall(r"`([^`\n]+)`", FENCED.sub("", TEXT[name])):
        script = re.search(r"gold_(train|eval|data)\.py (?=.*--)", line)
        if script or line.startswith("--"):  # a command, or `--lmbda 1` in a sentence
            known = FLAGS[script.group().strip()] if script else some_script
            for flag in re.findall(r"--(?:no-)?([a-z][a-z0-9-]+)", line[script.end() :] if script else line):
                assert flag.replace("-", "_") in known | {"help"}, line


def test_line_counts_in_the_readme_are_true():
    """If this fails: what stands on the right belongs into the table of files."""
    counts = {name: int(lines) for name, lines in re.findall(r"\| `(gold_\w+)\.py` \| (\d+) \|", TEXT["README"])}
    assert counts == {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in FILES}


def test_what_the_readme_says_to_edit_exists():
    for name, row in re.findall(r"\| `(gold_\w+)\.py` \| \d+ \|.*\|(.*)\|", TEXT["README"]):
        for path in re.findall(r"`([\w.]+)`", row):
            assert exists(MODULES[name], path), f"{name}: {path}"


def test_ci_calls_the_readmes_test_command():
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command.startswith("pytest tests/") and any(line.startswith(command) for line in COMMANDS["README"])


def test_every_table_of_results_has_its_command_machine_and_date_above_it():
    """Between the heading of a section and its first table. A record table has dates of its own."""
    intro, *three = TEXT["README"].partition("## Results\n")[2].partition("\n## ")[0].split("\n### ")
    sections = [f"{intro}{section}" for section in three] + TEXT["RESULTS"].split("\n## ")[1:]
    tables = [section.partition("\n|--") for section in sections if "\n|--" in section]
    assert len(three) == 3 and len(tables) >= 8
    for above, _, _ in tables:
        for needed in (
            r"`[^`]*(python|torchrun)[^`]*`",
            r"\b(cores|GPU|H100|H200)\b",
            r"\b20\d\d-\d\d-\d\d\b|\| date \|",
        ):
            assert re.search(needed, above), f"{needed} is not in {above[:300]}"


def test_every_fork_is_in_the_readme_and_says_how_it_is_run():
    for path in sorted((ROOT / "forks").glob("*.py")):
        assert f"`forks/{path.name}`" in TEXT["README"], path.name
        assert f"python forks/{path.name}" in ast.get_docstring(ast.parse(path.read_text())), path.name


# ----------------------------------------------------------------------------------------------------------------------
# references that lead somewhere


def exists(module, path: str) -> bool:
    """Whether module.a.b is there; of a class, a field without a default counts."""
    for name in path.split("."):
        if name in getattr(module, "__annotations__", {}):
            return True
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True


def prose(path: Path) -> list[tuple[int, str]]:
    """(line, text) of comments, neighbouring ones as one, and of docstrings and messages; white space is one space."""
    found, last = [], None
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT:
            line, text = token.start[0], token.string.lstrip("#! ")
            if last == line - 1:
                line, text = found[-1][0], f"{found.pop()[1]} {text}"
            found.append((line, text))
            last = token.start[0]
    strings = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant))
    found += [(node.lineno, node.value) for node in strings if isinstance(node.value, str)]
    return [(line, re.sub(r"\s+", " ", text)) for line, text in found]


def dead_ends(text: str) -> list[str]:
    """References in a text that lead nowhere: to a heading of README or RESULTS, a file, a name in one of the five."""
    dead = []
    for name, rest in re.findall(r"(?<!\bthe )(?<!\ba )\b(README|RESULTS)\b(?:\.md)?(?=(.{0,99}))", text):
        named = any(re.match(rf', "?{re.escape(heading)}(?!\w)', rest) for heading in HEADINGS[name])
        if not named and text != f"{name}.md":  # that is a path in code
            dead.append(f"{name}{rest[:40]}")
    files = re.findall(r"(?<![\w/.])((?:tests|forks|assets|\.ci)/(?:[\w.-]+/)*[\w-][\w.-]*)(?<!\.)", text)
    dead += [path for path in files if not (ROOT / path).exists()]
    for name in re.findall(r"(?<![\w/.-])((?:gold|bench|test)_\w+|known_optimum|conftest|reference)\.py\b", text):
        if not any((ROOT / folder / f"{name}.py").exists() for folder in (".", "tests", "forks")):
            dead.append(f"{name}.py")
    for name, path in re.findall(rf"(?<![\w/])({'|'.join(FILES)})\.((?!py\b)[a-zA-Z]\w*(?:\.[a-zA-Z]\w*)*)", text):
        if not exists(MODULES[name], path):
            dead.append(f"{name}.{path}")
    return dead


def test_a_dead_end_is_found():
    assert not dead_ends('see README, Install, or (README, "A served teacher"): tests/known_optimum.py, gold_loss.jsd')
    assert not dead_ends(
        "RESULTS, The known optimum. gold_buffer.Schedule.draw and gold_data.Row.prompt; what the README says"
    )
    for text in ("see README", "(README, what others get wrong)", 'README, "Installation"', "RESULTS.md, Install",
                 "README explains each", "tests/bench_none.py", "as in forks/none.py.", "assets/none.png",
                 "gold_none.py", "bench_none.py", "gold_loss.none", "gold_buffer.Schedule.none"):  # fmt: skip
        assert len(dead_ends(text)) == 1, text


SOURCES = sorted(p for d in (".", "tests", "forks") for p in (ROOT / d).glob("*.py") if p.name != Path(__file__).name)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_references_in_comments_docstrings_and_messages_lead_somewhere(path):
    assert [(line, dead) for line, text in prose(path) if (dead := dead_ends(text))] == []


@pytest.mark.parametrize("name", PAGES)
def test_references_in_the_documents_lead_somewhere(name):
    text = re.sub(r"\s+", " ", TEXT[name])
    said = re.sub(r"\[[^]]*\]\([^)]*\)|[\w./]*(README|RESULTS)\.md|`", " ", text)  # links follow
    assert dead_ends(said) == []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            path, _, section = target.partition("#")
            file = (PAGES[name].parent / path).resolve() if path else PAGES[name]
            assert file.exists(), target
            headings = [h for page in PAGES if PAGES[page] == file for h in HEADINGS[page]]
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not section or section in anchors, target


# ----------------------------------------------------------------------------------------------------------------------
# forks


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
