"""The house's rules that a machine can check: which way imports run, what a bare import loads, what csrc may see."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fct"

# A room may import from its own floor and from every floor below, never from above.
FLOORS = [
    {"cli", "__main__"},
    {"life", "doctor"},
    {"backfilling", "inspection", "report", "bench", "arrow_mapper"},
    {"gallery"},
    {"baselines", "judging"},
    {
        "fit",
        "transform",
        "search",
        "metrics",
        "mixed_choice",
        "mixed_correction",
        "mixed_gallery",
        "mixed_warning",
        "mixture",
        "joined_rows",
        "rerank_depth",
        "data",
        "info",
    },
    {"ops"},
    {"rows", "artifact"},
    {"codes", "native_codes", "spaces", "atomic_files", "files", "progress", "terminal", "kernels", "_C", "options"},
    {"errors", "moved_modules", "extras", "ref", "checks", "packed_int4", "types", "scratch"},
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path, *, top_level_only: bool = False) -> list[tuple[str, int]]:
    """Modules that a file imports, those for type checkers alone left out: (dotted name, line)."""
    tree = ast.parse(path.read_text(), str(path))
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for part in branch.body
        for node in ast.walk(part)
    }
    found = []
    for node in tree.body if top_level_only else ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def python_files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(("fct", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def file_graph(files: list[Path]) -> dict[str, set[str]]:
    """Which file imports which, inside functions too; the package's own file, whose names load lazily, left out."""
    modules = {module_of(path) for path in files} - {"fct"}
    graph: dict[str, set[str]] = {}
    for path in files:
        name = module_of(path)
        found = {m if m in modules else m.rpartition(".")[0] for m, _ in imports(path)}
        graph[name] = (found & modules) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of files that reach each other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = list(graph[start])
        while left:
            name = left.pop()
            if name not in seen:
                seen.add(name)
                left += graph[name]
        return seen

    reach = {name: reached(name) for name in graph}
    groups = {tuple(sorted(m for m in reach[n] if n in reach[m])) for n in graph if n in reach[n]}
    return sorted(list(group) for group in groups)


def test_no_files_import_each_other_in_a_circle() -> None:
    found = circles(file_graph(python_files()))
    assert not found, "\n".join(" -> ".join(circle) for circle in found)


def test_the_search_for_circles_finds_one() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"f"}, "f": {"e"}}
    assert circles(graph) == [["b", "c"], ["e", "f"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    real = file_graph(python_files())
    assert "fct.cli.console" in real["fct.cli.plan_command"]
    assert "fct.backfilling.plan" in real["fct.cli.plan_command"], "imports inside functions count"


def test_a_basename_stands_once() -> None:
    """Whoever reads a name in a message or a review knows which file it is."""
    seen: dict[str, Path] = {}
    for path in [*python_files(), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        if path.stem.startswith("__") or (
            "kernels" in path.relative_to(ROOT).parts[:-1] and path.is_relative_to(SOURCE)
        ):
            continue
        assert path.name not in seen, f"{path.relative_to(ROOT)} and {seen[path.name].relative_to(ROOT)}"
        seen[path.name] = path


def test_no_file_has_a_librarys_name() -> None:
    from fct.extras import EXTRAS

    base = {"numpy", "safetensors", "pyarrow", "fsspec", "typer", "rich", "click", "sklearn", "openvino", "usearch"}
    libraries = base | set(EXTRAS)
    wrong = [str(p.relative_to(ROOT)) for p in python_files() if p.stem in libraries or p.parent.name in libraries]
    assert not wrong, wrong


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(p) for p in python_files()} - {"__init__"}
    assert rooms <= set(FLOOR), f"new rooms: {sorted(rooms - set(FLOOR))}"


def test_imports_run_one_way() -> None:
    wrong = []
    for path in python_files():
        room = room_of(path)
        if room == "__init__":
            continue
        for module, line in imports(path):
            if not module.startswith("fct."):
                continue
            target = module.split(".")[1]
            if target not in FLOOR:  # a public name of the package itself: `from fct import X`
                continue
            if FLOOR[target] < FLOOR[room]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {room} imports {target}, which lies above")
    assert not wrong, "\n".join(wrong)


def test_the_walk_sees_an_upward_import(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from fct.cli.app import app\n    return app\n")
    assert imports(bad) == [("fct.cli.app.app", 2)]


def test_the_reference_imports_nothing_of_ours() -> None:
    ours = [m for m, _ in imports(SOURCE / "ref.py") if m.startswith("fct.")]
    assert not ours


def test_a_gallery_knows_nothing_of_kernels() -> None:
    for path in (SOURCE / "gallery").rglob("*.py"):
        wrong = [m for m, _ in imports(path) if m.startswith(("fct.ops", "fct._C", "fct.kernels", "fct.transform."))]
        assert not wrong, f"{path.name} imports {wrong}"


HEAVY = ("torch", "triton", "pyarrow", "ray", "matplotlib", "faiss", "lancedb", "sklearn", "pandas", "torchvision")


@pytest.mark.parametrize(
    "statement", ["import fct", "import fct.cli.app", "import fct.rows, fct.artifact.transformation"]
)
def test_imports_are_lean(statement: str) -> None:
    code = f"import sys; {statement}; print([m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_registering_the_commands_stays_lean() -> None:
    """`fct --help` answers at once: no command pulls in torch before it runs."""
    code = f"import sys; import fct.cli.commands; print([m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def native_files() -> list[Path]:
    return [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".h", ".hpp", ".cu", ".cuh", ".inc"}]


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_csrc_sees_no_torch() -> None:
    assert native_files()
    for path in native_files():
        assert not [i for i in includes(path) if re.match(r"(torch|ATen|c10)/", i)], f"{path} sees torch"


def test_only_the_bindings_see_python() -> None:
    """bindings.cpp; what it alone includes: bind.h files, which a build may leave out, and calls that were made before;
    without_gil.h."""
    bindings = ROOT / "csrc" / "bindings.cpp"
    for path in native_files():
        own = {"bind.h", "repeated_call.h", "without_gil.h"}
        pythons = {"Python.h", *own}
        sees = [i for i in includes(path) if i.startswith("pybind11") or i.rsplit("/")[-1] in pythons]
        if path != bindings and path.name not in own:
            assert not sees, f"{path} sees Python: {sees}"


def test_nothing_is_unpickled_without_a_guard() -> None:
    """pickle is read by restricted unpicklers alone, torch.load only with weights_only=True."""
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            assert name not in {"pickle.load", "pickle.loads", "eval", "exec"}, f"{where}: {name}"
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", f"{where}: torch.load without weights_only=True"
            if name in {"np.load", "numpy.load"}:
                assert keywords.get("allow_pickle") == "False", f"{where}: np.load without allow_pickle=False"
            if name == "yaml.load":
                raise AssertionError(f"{where}: yaml.load; use yaml.safe_load")


def test_no_example_pickles() -> None:
    """What examples and documents save, others copy: safetensors, .npy and JSON."""
    shown = [*(ROOT / "examples").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    assert len(shown) > 5
    for path in shown:
        assert not re.search(r"torch\.save\(|pickle\.dump|joblib\.dump", path.read_text()), path


def test_no_assert_guards_the_users_input() -> None:
    """`python -O` drops assert statements; argument checks raise."""
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert):
                text = ast.unparse(node.test)
                assert text.startswith("isinstance(") or " is not None" in text, (
                    f"{path.relative_to(ROOT)}:{node.lineno}: assert {text}"
                )


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement to the last, the docstring left out."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return function.body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]


def long_functions(files: list[Path]) -> list[str]:
    """``lines path:line name`` of every function whose body has more than 40 lines, the longest first."""
    found = [
        (body_lines(node), f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{node.lineno} {node.name}")
        for path in files
        for node in ast.walk(ast.parse(path.read_text(), str(path)))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return [f"{lines} {where}" for lines, where in sorted(found, reverse=True) if lines > 40]


# Long on purpose: one kernel's formula from top to bottom, one list of checks, one command's options. A new one is cut
# at a concept, or takes the place of another; who cuts one lowers the number.
LONG_FUNCTIONS = 8


def test_few_functions_are_long() -> None:
    kernels = sorted((ROOT / "kernels").rglob("*.py"))
    assert kernels
    found = long_functions([p for p in python_files() if "kernels" not in p.relative_to(SOURCE).parts] + kernels)
    assert len(found) <= LONG_FUNCTIONS, f"{len(found)} functions of more than 40 lines:\n" + "\n".join(found)


def test_the_count_of_lines_sees_a_long_function(tmp_path: Path) -> None:
    code = tmp_path / "long.py"
    code.write_text('def f():\n    """Says."""\n' + "    x = 1\n" * 41 + "\n\ndef g():\n" + "    x = 1\n" * 40)
    assert long_functions([code]) == [f"41 {code}:1 f"]


LINES = {".py": 450, ".cpp": 400, ".h": 400, ".cu": 400, ".cuh": 400, ".inl": 400}


def test_no_file_is_too_long() -> None:
    """A file is one concept; one of several is split."""
    files = [
        p for p in [*python_files(), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*")] if p.is_file()
    ]
    assert any(p.suffix == ".cpp" for p in files)
    long = {
        str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > LINES.get(p.suffix, n)
    }
    assert not long, long
