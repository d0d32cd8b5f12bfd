"""House rules, read off the source."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bkdattr"
ROOMS = (
    "errors", "examples", "triggers", "misses", "targets", "metrics", "poisoning", "chat", "architectures", "adapters", "edits", "model", "interventions",
    "inference", "prefix_attention", "engine", "traces", "lora", "gates", "stealth", "detectors", "factoring", "removal", "probes", "gradient", "screening", "attribution", "vector", "evaluation", "ablation", "selection", "mini", "detection", "zoo", "lens", "harness", "template", "splits", "run", "shards",
    "planting", "mechanism", "banks", "options", "study", "joint", "restoration", "steering", "stages", "tables", "figures", "report", "grid_table", "reproduce", "terminal", "sweep", "detection_commands", "cli", "__main__",
)  # fmt: skip
OUTSIDE = {
    "lens",
    "figures",
    "tables",
    "report",
    "harness",
    "template",
    "splits",
    "run",
    "planting",
    "study",
    "shards",
    "joint",
    "steering",
    "stages",
    "cli",
    "detection_commands",
    "terminal",
    "sweep",
    "__main__",
    "mini",
}


def sources() -> dict[str, ast.Module]:
    files = {p.stem: p for p in PACKAGE.glob("*.py")}
    files |= {f"{f}.{p.stem}": p for f in ("mini", "detectors") for p in (PACKAGE / f).glob("*.py")}
    return {name: ast.parse(path.read_text()) for name, path in files.items() if name != "__init__"}


def room(name: str) -> str:
    return name.split(".")[0]


def imported(tree: ast.Module) -> set[str]:
    out = set()
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "bkdattr" else [f"bkdattr.{a.name}" for a in node.names]
        out |= {n.split(".")[1] for n in names if n.startswith("bkdattr.")}
    return out


def test_every_file_has_its_room():
    assert {room(n) for n in sources()} == set(ROOMS)


def test_files_import_only_from_rooms_above():
    for name, tree in sources().items():
        for other in imported(tree) - {room(name)}:
            assert ROOMS.index(other) < ROOMS.index(room(name)), f"{name} imports {other}"


def calls(tree: ast.Module):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_hooks_are_registered_in_one_file():
    found = {n for n, t in sources().items() for f, _ in calls(t) if re.search(r"register_\w*hook", f)}
    assert found == {"interventions"}


def test_text_becomes_ids_in_one_file():
    pattern = r"apply_chat_template|(?<!load_)(?<!make_)(?<!Auto)tokenizer$|encode_plus|batch_encode"
    assert {n for n, t in sources().items() for f, _ in calls(t) if re.search(pattern, f)} == {"chat"}


def test_methods_do_not_print_seed_globally_or_pass_kwargs_through():
    for name, tree in sources().items():
        if room(name) in OUTSIDE:
            continue
        for func, _ in calls(tree):
            assert func not in ("print", "random.seed", "np.random.seed"), f"{name}: {func}"
            assert not func.endswith("manual_seed") or name == "lora" or func == "torch.Generator().manual_seed", (
                f"{name}: {func}"
            )  # lora: inside fork_rng
    for name in ("attribution", "vector", "evaluation", "ablation", "selection", "probes", "traces"):
        for node in ast.walk(sources()[name]):
            if isinstance(node, ast.FunctionDef):
                assert node.args.kwarg is None, f"{name}.{node.name} takes **kwargs"


def test_no_pickle_and_no_remote_code():
    for name, tree in sources().items():
        for func, node in calls(tree):
            assert func not in ("torch.load", "torch.save", "pickle.load", "pickle.loads"), f"{name}: {func}"
            for k in node.keywords:
                assert k.arg != "trust_remote_code" or ast.unparse(k.value) == "False", name


def test_files_stay_short():
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_public_names_are_those_of_the_readme():
    import bkdattr

    table = re.search(r"<!-- public names -->(.*?)<!-- end -->", (ROOT / "README.md").read_text(), re.S)
    assert table, "the README lists the public names between two comments"
    assert sorted(set(re.findall(r"`(\w+)`", table[1]))) == sorted(bkdattr.__all__)
    for name in bkdattr.__all__:
        assert getattr(bkdattr, name) is not None
    with pytest.raises(AttributeError):
        _ = bkdattr.nothing


@pytest.mark.parametrize("command", [["-c", "import bkdattr"], ["-m", "bkdattr", "--help"]])
def test_import_and_help_stay_light(command):
    """No heavy module is loaded; the time itself is not tested."""
    code = "import sys, runpy; sys.argv = ['bkdattr', *sys.argv[1:]]\n"
    if command[0] == "-m":
        code += "try:\n runpy.run_module('bkdattr', run_name='__main__')\nexcept SystemExit: pass\n"
    else:
        code += command[1] + "\n"
    code += (
        "heavy = {'torch', 'transformers', 'plotly', 'sklearn', 'datasets', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *command[2:]], check=True, capture_output=True, cwd=ROOT)


def test_the_projects_text_names_no_machine():
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("*.t*t"),
        *PACKAGE.rglob("*.py"),
        *(ROOT / "data").glob("*"),
        *(ROOT / "notebooks").glob("*"),
    ]:
        if path.is_file():
            text = path.read_text()
            assert not re.search(r"/work/|/tmp/w\b|pypi\.org|/opt/", text), path


def test_the_readmes_tables_are_those_of_the_results():
    """What `python -m benchmarks.readme_tables --readme README.md` would write stands there already."""
    from benchmarks.readme_tables import filled

    page = (ROOT / "README.md").read_text()
    assert filled(page, None) == page
