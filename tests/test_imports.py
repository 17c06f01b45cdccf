"""Who may import whom. The rooms stay apart only as long as this holds."""

from __future__ import annotations

import ast
from pathlib import Path

import octavo

ROOT = Path(octavo.__file__).parent

# Room or top-level file -> rooms it may import, besides itself. None: anything.
ALLOWED: dict[str, set[str] | None] = {
    "core": set(),
    "kv_cache": {"core"},
    "coordinators": {"core"},
    "engine": {"core", "kv_cache", "coordinators"},
    "ops": {"core"},
    "formats": {"core", "_C"},
    "models": {"ops"},
    "sampling": {"core", "ops"},
    "backends": {"core", "ops", "sampling", "_C"},
    "speculation": {"core", "_C"},
    "loading": {"core", "ops", "models", "formats"},
    "runner": {"core", "ops", "models", "backends", "speculation"},
    "text": {"core"},
    "documents": {"core", "text"},
    "hub": {"core"},
    "distributed": {"core"},
    "observe": {"core", "ops"},
    "config": {"core", "backends"},
    "build": None,
    "wiring": None,
    "frontend": {"core", "coordinators", "text"},
    "session": {"core", "engine", "frontend"},
    "async_session": {"core", "frontend", "session"},
    "framing": {"core", "frontend"},
    "margins_request": {"core", "framing", "frontend", "text"},
    "margins": {"core", "engine", "frontend", "margins_request"},
    "ask_request": {"core", "framing", "frontend", "margins_request"},
    "ask": {"ask_request", "core", "documents", "engine", "frontend", "margins", "margins_request"},
    "base_llm": {"build", "config", "core", "frontend", "margins_request", "session"},
    "llm": {"ask", "ask_request", "base_llm", "core", "engine", "frontend", "margins", "session"},
    "async_llm": {"ask", "ask_request", "async_session", "base_llm", "core", "frontend", "margins"},
    "evaluation": {"llm", "frontend", "core"},
    "training": {"llm", "core", "formats", "hub", "loading", "models"},
    # `pull` and `models` work on files alone and must start fast, without an engine. See also BELOW_THE_DOORS.
    "cli": {
        "ask",
        "llm",
        "frontend",
        "margins",
        "evaluation",
        "training",
        "config",
        "backends",
        "observe",
        "core",
        "hub",
        "formats",
        "text",
        "async_llm",
        "server",
    },
    "server": {
        *(
            "ask",
            "async_llm",
            "async_session",
            "build",
            "config",
            "core",
            "frontend",
            "llm",
            "margins",
            "observe",
            "text",
            "wiring",
        ),
    },
    "__init__": None,
    "__main__": {"cli"},
}

# Commands that look below the library's doors: at the machine, at what steps cost, at logits and plans. They may import
# any room; the other commands stay apart from them.
BELOW_THE_DOORS = {
    f"octavo.cli.{name}"
    for name in (
        "machine",
        "driver",
        "step_costs",
        "logits",
        "doctor",
        "bench_engine",
        "bench_startup",
        "startup_child",
        "verify",
        "verify_exactness",
        "verify_quality",
    )
}

# Third-party packages that a room may import; rooms not listed may import any.
THIRD_PARTY: dict[str, set[str]] = {
    "core": set(),
    "kv_cache": set(),
    "coordinators": set(),
    "engine": set(),
    "ops": {"numpy"},
    "formats": {"numpy"},
    "models": {"numpy"},
    "backends": {"numpy"},
    "observe": {"numpy"},
    "sampling": {"numpy"},
    "loading": {"numpy"},
    "runner": {"numpy"},
    "evaluation": {"numpy", "rich", "matplotlib"},
}


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports, also inside functions and under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.add(node.module)
            if node.module == "octavo":
                found |= {f"octavo.{alias.name}" for alias in node.names}
    return found


def files() -> list[Path]:
    found = sorted(ROOT.rglob("*.py"))
    assert len(found) > 50
    return found


def graph_of_modules(root: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, wherever in its file it does. The package itself is left
    out: each module imports it first, and it imports nothing before it is asked for a name."""
    modules = {
        ".".join(("octavo", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in root.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                imported |= names & set(modules) or {node.module or ""}
        graph[name] = (imported & set(modules)) - {name, "octavo"}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules each of which imports, by way of others, every other."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        new = {start}
        while new:
            new = {other for name in new for other in graph[name]} - found
            found |= new
        return found

    reach = {name: reached(name) for name in graph}
    together = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph}
    return [set(circle) for circle in together if circle]


def test_modules_import_in_no_circle() -> None:
    """Guards against two modules that can only be understood, or imported, together."""
    assert circles(graph_of_modules(ROOT)) == []


def test_circles_are_noticed(tmp_path: Path) -> None:
    """At the top, under TYPE_CHECKING, in a function, from a package and by its full name."""
    package = tmp_path / "octavo"
    (package / "room").mkdir(parents=True)
    (package / "__init__.py").write_text("from octavo.a import x")
    (package / "a.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from octavo.b import y")
    (package / "b.py").write_text("def f():\n    from octavo.room import c")
    (package / "room" / "__init__.py").write_text("")
    (package / "room" / "c.py").write_text("import octavo.a\nimport octavo.d")
    (package / "d.py").write_text("from octavo import _C, __version__")
    assert circles(graph_of_modules(package)) == [{"octavo.a", "octavo.b", "octavo.room.c"}]


def test_every_room_is_in_the_table() -> None:
    assert {room_of(path) for path in files()} <= set(ALLOWED)


def test_rooms_import_only_what_they_may() -> None:
    wrong = []
    for path in files():
        room = room_of(path)
        module = ".".join(("octavo", *path.relative_to(ROOT).with_suffix("").parts))
        allowed = None if module in BELOW_THE_DOORS else ALLOWED[room]
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] != "octavo" or len(parts) < 2 or allowed is None or parts[1] in {room, "__version__"}:
                continue
            if parts[1] not in allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_bookkeeping_rooms_import_no_numbers() -> None:
    import sys

    wrong = []
    for path in files():
        room = room_of(path)
        if room not in THIRD_PARTY:
            continue
        for name in imports_of(path):
            top = name.split(".")[0]
            if top == "octavo" or top in sys.stdlib_module_names or top in THIRD_PARTY[room]:
                continue
            wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_table_notices() -> None:
    """The checks above look at something: the engine does import the KV cache, and the runner the models."""
    engine = {name for path in (ROOT / "engine").glob("*.py") for name in imports_of(path)}
    assert "octavo.kv_cache" in engine
    runner = {name for path in (ROOT / "runner").glob("*.py") for name in imports_of(path)}
    assert "octavo.models" in runner and "numpy" in runner


def test_commands_below_the_doors_exist() -> None:
    """Guards against the exception outliving the file it was made for."""
    assert {f"octavo.cli.{path.stem}" for path in (ROOT / "cli").glob("*.py")} >= BELOW_THE_DOORS


def test_no_name_of_a_package_is_also_a_module_of_it() -> None:
    """Guards against a function that becomes a module as soon as somebody imports the module of its name."""
    wrong = []
    for path in ROOT.rglob("__init__.py"):
        modules = {other.stem for other in path.parent.glob("*.py")}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = {alias.asname or alias.name for alias in node.names} & modules
                wrong += [f"{path.relative_to(ROOT)}: {name}" for name in names]
    assert not wrong, "\n".join(wrong)
