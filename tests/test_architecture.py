"""The tree is the architecture: which file may import which, and which file is the one door to what.

``LAYERS`` and ``DOORS`` are the house rules as data; the rest of this module reads every file of the package with
``ast`` and compares. Nothing of the package is imported here, except in the subprocesses at the end.

Theory:
    * A file's *uses* are the dotted names it imports plus the attribute chains that start at an imported name:
      ``import torch as t; t.distributed.barrier()`` uses ``torch.distributed.barrier``. Layers look at the uses that
      lie in our package, doors at all of them. Imports inside functions count: lazy is not a way around a layer.
    * What stands under ``if TYPE_CHECKING:`` never runs and does not count.
    * Not elegant yet: a capability that is passed on under another file's name (``from streamshards.clock import
      time``) is seen by reading, not by this test; so is ``importlib.import_module`` of a computed name.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
PACKAGE: Final = "streamshards"

LAYERS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("words", ("errors.py",)),
    ("wishes", ("options.py",)),
    ("memory", ("memory.py",)),
    ("time", ("clock.py",)),
    ("decisions", ("plan/",)),
    ("seen", ("events.py",)),
    ("edge: stores", ("storage/",)),
    ("edge: shards", ("shard/",)),
    ("engine", ("engine/",)),
    ("surroundings", ("runtime.py",)),
    ("surroundings: starts", ("starts.py",)),
    ("face: epochs", ("epochs.py",)),
    ("face", ("dataset.py", "writer.py")),
    ("face: mixture", ("mixture.py",)),
    ("comfort", ("loader.py", "testing/", "convert/", "integrations/")),
    ("doors out", ("cli/", "ui/", "__main__.py", "__init__.py")),
)
"""The rooms, lowest layer first. A file imports only from its own room and from rooms of the layers above its row
in this table; two rooms of one layer don't know each other, except the doors out."""

PLANNED: Final = frozenset({"integrations/", "ui/"})
"""Rooms that have their layer before they have their code. Who builds one takes it out of here."""

SOCIABLE: Final = frozenset({"doors out"})
"""Layers whose rooms may import each other: ``__main__`` starts ``cli``."""

TESTING: Final = "testing/"
"""Public fakes: under the layer rule, but every door is open to them (a fake S3 server is a process with a port)."""


class Door(NamedTuple):
    """One capability, and the only rooms it enters through."""

    capability: str
    names: tuple[str, ...]
    rooms: tuple[str, ...]


DOORS: Final = (
    Door("stores", ("fsspec", "s3fs", "botocore", "aiobotocore", "boto3", "aiohttp", "obstore"), ("storage/",)),
    Door("zstd", ("zstandard",), ("shard/frames.py",)),
    Door(
        "surroundings",
        (
            "torch.distributed", "torch.utils.data.get_worker_info",
            "os.environ", "os.environb", "os.getenv", "os.putenv",
        ),
        ("runtime.py",),
    ),
    Door("time and chance", ("time", "random", "datetime.datetime.now", "datetime.datetime.utcnow"), ("clock.py",)),
    Door(
        "threads",
        (
            "threading.Thread", "threading.Timer", "_thread",
            "concurrent.futures.ThreadPoolExecutor", "concurrent.futures.ProcessPoolExecutor",
        ),
        ("engine/", "writer.py"),
    ),
)  # fmt: skip

PURE_ROOM: Final = "plan/"
PURE_MODULES: Final = frozenset((
    "__future__", "abc", "array", "base64", "bisect", "collections", "copy", "dataclasses", "enum", "fractions",
    "functools", "hashlib", "heapq", "itertools", "json", "math", "numbers", "operator", "posixpath", "re", "string",
    "struct", "types", "typing", "unicodedata",
    "numpy", "xxhash", PACKAGE,
))  # fmt: skip
"""All that decisions are made of."""
IMPURE_NAMES: Final = (
    "numpy.load", "numpy.save", "numpy.savez", "numpy.loadtxt", "numpy.savetxt", "numpy.fromfile", "numpy.memmap",
)  # fmt: skip
IMPURE_BUILTINS: Final = frozenset({"open", "print", "input", "exec", "eval", "breakpoint"})
STEADY_CHANCE: Final = frozenset({"Philox", "SeedSequence", "BitGenerator"})
"""What of ``numpy.random`` gives the same stream in every release; ``Generator`` methods promise nothing."""


class Use(NamedTuple):
    """One dotted name used by a file, and where."""

    name: str
    line: int


class Offence(NamedTuple):
    """One broken rule, as a line to click on."""

    where: str
    line: int
    why: str

    def __str__(self) -> str:
        return f"{PACKAGE}/{self.where}:{self.line}: {self.why}"


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_package() -> dict[str, ast.Module]:
    """Return ``{"plan/order.py": tree}`` of every Python file of the package."""
    root = ROOT / PACKAGE
    return {
        path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8"), str(path))
        for path in sorted(root.rglob("*.py"))
    }


def modules_of(files: Iterable[str]) -> dict[str, str]:
    """Return ``{"streamshards.plan.order": "plan/order.py"}`` of *files*."""
    return {
        ".".join((PACKAGE, *file.removesuffix(".py").removesuffix("__init__").strip("/").split("/"))).rstrip("."): file
        for file in files
    }


def is_type_checking(test: ast.expr) -> bool:
    """Return whether *test* is ``TYPE_CHECKING`` or ``typing.TYPE_CHECKING``."""
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def walk_running(node: ast.AST) -> Iterator[ast.AST]:
    """Yield *node* and what is below it, without the bodies of ``if TYPE_CHECKING:``."""
    yield node
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and is_type_checking(node.test):
        children = node.orelse
    for child in children:
        yield from walk_running(child)


def imported_from(node: ast.ImportFrom, file: str) -> str:
    """Return the absolute dotted module that ``from … import`` names in *file*."""
    if node.level == 0:
        return node.module or ""
    package = [PACKAGE, *file.split("/")[:-1]]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def dotted(node: ast.expr) -> list[str] | None:
    """Return ``["a", "b", "c"]`` of the expression ``a.b.c``, None of anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (left := dotted(node.value)) is not None:
        return [*left, node.attr]
    return None


def uses_of(tree: ast.Module, file: str) -> list[Use]:
    """Return the dotted names *file* imports, and the attribute chains that start at an imported name."""
    nodes = list(walk_running(tree))
    uses: list[Use] = []
    names: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                uses.append(Use(alias.name, node.lineno))
                if alias.asname:
                    names[alias.asname] = alias.name
                else:
                    top = alias.name.partition(".")[0]
                    names[top] = top
        elif isinstance(node, ast.ImportFrom):
            module = imported_from(node, file)
            for alias in node.names:
                full = f"{module}.{alias.name}" if alias.name != "*" else module
                uses.append(Use(full, node.lineno))
                names[alias.asname or alias.name] = full
    for node in nodes:
        if isinstance(node, ast.Attribute) and (chain := dotted(node)) is not None and chain[0] in names:
            uses.append(Use(".".join([names[chain[0]], *chain[1:]]), node.lineno))  # noqa: PERF401 -- reads better
    return uses


def module_used(name: str, modules: Mapping[str, str]) -> str | None:
    """Return the file of the longest prefix of dotted *name* that is one of our modules, or None."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((modules[prefix] for prefix in prefixes if prefix in modules), None)


# ---- judging ---------------------------------------------------------------------------------------------------------


def is_in(file: str, room: str) -> bool:
    """Return whether *file* is *room*, or lies in it."""
    return file.startswith(room) if room.endswith("/") else file == room


def place_of(file: str) -> tuple[int, str]:
    """Return the row of *file* in ``LAYERS`` and its room.

    Raises:
        LookupError: It has none.
    """
    for row, (_, rooms) in enumerate(LAYERS):
        for room in rooms:
            if is_in(file, room):
                return row, room
    raise LookupError(f"{PACKAGE}/{file}: a new file needs a layer before it needs code: add its room to LAYERS")


def is_named(use: str, name: str) -> bool:
    """Return whether dotted *use* is *name* or something in it."""
    return use == name or use.startswith(name + ".")


def layer_offences(file: str, uses: Iterable[Use], modules: Mapping[str, str]) -> Iterator[Offence]:
    """Yield the imports of *file* that point up, or sideways."""
    row, room = place_of(file)
    layer = LAYERS[row][0]
    for use in uses:
        other = module_used(use.name, modules) if is_named(use.name, PACKAGE) else None
        if other is None:
            continue
        other_row, other_room = place_of(other)
        if other_row > row:
            yield Offence(file, use.line, f"imports {other}; {layer!r} is below {LAYERS[other_row][0]!r}")
        elif other_row == row and other_room != room and layer not in SOCIABLE:
            yield Offence(file, use.line, f"imports {other}; two rooms of {layer!r} don't know each other")


def door_offences(file: str, uses: Iterable[Use]) -> Iterator[Offence]:
    """Yield what *file* takes past its one door."""
    if is_in(file, TESTING):
        return
    for use in uses:
        for door in DOORS:
            if any(is_named(use.name, name) for name in door.names) and not any(is_in(file, r) for r in door.rooms):
                yield Offence(file, use.line, f"uses {use.name}; {door.capability}: only {', '.join(door.rooms)} may")


def purity_offences(file: str, tree: ast.Module, uses: Iterable[Use]) -> Iterator[Offence]:
    """Yield what in *file* is more than a decision."""
    if not is_in(file, PURE_ROOM):
        return
    for use in uses:
        top, *rest = use.name.split(".")
        unsteady = top == "numpy" and rest[:1] == ["random"] and len(rest) > 1 and rest[1] not in STEADY_CHANCE
        if top not in PURE_MODULES or unsteady or any(is_named(use.name, name) for name in IMPURE_NAMES):
            yield Offence(file, use.line, f"uses {use.name}; decisions touch nothing and promise their result for ever")
    for node in walk_running(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_BUILTINS:
            yield Offence(file, node.lineno, f"calls {node.func.id}(); decisions touch nothing")


def offences(package: Mapping[str, ast.Module]) -> list[str]:
    """Return every broken rule in *package* (a dict of file → tree), sorted, each once."""
    modules = modules_of(package)
    found: set[Offence] = set()
    for file, tree in package.items():
        uses = uses_of(tree, file)
        found.update(layer_offences(file, uses, modules))
        found.update(door_offences(file, uses))
        found.update(purity_offences(file, tree, uses))
    return [str(offence) for offence in sorted(found)]


def cycles(package: Mapping[str, ast.Module]) -> list[list[str]]:
    """Return the rings of files that import each other, found depth first; empty when imports point one way."""
    modules = modules_of(package)
    edges = {
        file: sorted(
            {
                other
                for use in uses_of(tree, file)
                if is_named(use.name, PACKAGE) and (other := module_used(use.name, modules)) not in (None, file)
            }
        )
        for file, tree in package.items()
    }
    rings: list[list[str]] = []
    done: set[str] = set()

    def visit(file: str, path: list[str]) -> None:
        if file in path:
            rings.append([*path[path.index(file) :], file])
        elif file not in done:
            for other in edges[file]:
                visit(other, [*path, file])
            done.add(file)

    for file in edges:
        visit(file, [])
    return rings


# ---- the house -------------------------------------------------------------------------------------------------------


def test_every_file_has_a_layer() -> None:
    """Every file of the package has exactly one room in the table."""
    for file in read_package():
        rooms = [room for _, layer in LAYERS for room in layer if is_in(file, room)]
        assert len(rooms) == 1, f"{file}: a new file needs a layer before it needs code: add its room to LAYERS"


def test_every_room_exists() -> None:
    """Every room in the table exists, but for those that are planned, and those don't."""
    files = list(read_package())
    existing = {room for _, layer in LAYERS for room in layer if any(is_in(file, room) for file in files)}
    assert {room for _, layer in LAYERS for room in layer} - existing == PLANNED


def test_imports_point_down_and_doors_are_single() -> None:
    """No file imports from a layer that stands on it, goes around a door, or decides impurely."""
    assert offences(read_package()) == []


def test_imports_form_no_ring() -> None:
    """Inside a room, too, imports point one way."""
    assert cycles(read_package()) == []


# ---- the checker itself ----------------------------------------------------------------------------------------------

VIOLATIONS: Final = {
    "a lower layer imports a higher one": ("errors.py", "from streamshards.options import GiB"),
    "plainly": ("events.py", "import streamshards.engine.retry"),
    "relatively": ("shard/payload.py", "from ..engine import retry"),
    "relatively, a sibling of the package": ("engine/retry.py", "from .. import dataset"),
    "the package itself": ("options.py", "import streamshards"),
    "inside a function": ("engine/retry.py", "def f():\n    from streamshards.dataset import StreamingDataset"),
    "a room of the same layer": ("dataset.py", "from streamshards.writer import ShardWriter"),
    "in the else of TYPE_CHECKING": (
        "plan/order.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import streamshards.engine.retry",
    ),
    "fsspec outside storage": ("dataset.py", "import fsspec"),
    "s3fs, from": ("cli/pack.py", "from s3fs import S3FileSystem"),
    "zstandard beside frames": ("shard/payload.py", "import zstandard as zstd"),
    "torch.distributed by attribute": ("dataset.py", "import torch as t\nt.distributed.barrier()"),
    "torch.distributed by import": ("loader.py", "from torch import distributed as dist"),
    "worker info": ("dataset.py", "from torch.utils.data import get_worker_info"),
    "worker info by attribute": ("dataset.py", "from torch.utils import data\ndata.get_worker_info()"),
    "environment": ("storage/s3.py", "import os\nregion = os.environ.get('AWS_REGION')"),
    "environment, by name": ("cli/pack.py", "from os import getenv"),
    "time": ("engine/retry.py", "import time"),
    "chance": ("writer.py", "from random import random"),
    "now": ("writer.py", "from datetime import datetime\ndatetime.now()"),
    "a thread": ("storage/s3.py", "import threading\nthreading.Thread(target=print)"),
    "a subclass of thread": ("loader.py", "from threading import Thread\nclass T(Thread): ..."),
    "a pool": ("cli/pack.py", "import concurrent.futures as cf\ncf.ThreadPoolExecutor()"),
    "a decision that reads": ("plan/order.py", "open('x')"),
    "a decision with a path": ("plan/order.py", "from pathlib import Path"),
    "a decision with torch": ("plan/order.py", "import torch"),
    "a decision from a file": ("plan/order.py", "import numpy as np\nnp.load('x')"),
    "an unsteady permutation": ("plan/order.py", "import numpy as np\nnp.random.default_rng(0).permutation(3)"),
}

HOUSE: Final = (
    "errors.py", "options.py", "events.py", "plan/__init__.py", "plan/order.py", "storage/__init__.py", "storage/s3.py",
    "shard/payload.py", "shard/frames.py", "engine/__init__.py", "engine/retry.py", "dataset.py", "writer.py",
    "loader.py", "cli/pack.py", "__init__.py",
)  # fmt: skip


def planted(file: str, source: str) -> dict[str, ast.Module]:
    """Return a package of empty files, but for one."""
    return {name: ast.parse(source if name == file else "") for name in HOUSE}


@pytest.mark.parametrize(("file", "source"), VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_a_planted_violation_is_found(file: str, source: str) -> None:
    """The check fails when it should, and names the file."""
    found = offences(planted(file, source))
    assert found
    assert all(line.startswith(f"{PACKAGE}/{file}:") for line in found)


@pytest.mark.parametrize(
    ("file", "source"),
    {
        "downwards": ("engine/retry.py", "from streamshards.errors import StreamShardsError"),
        "a sibling in the room": ("plan/order.py", "from streamshards.plan import state"),
        "for the type checker only": (
            "plan/order.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n    import streamshards.dataset",
        ),
        "through the door": ("storage/s3.py", "import s3fs\nfrom botocore.exceptions import ClientError"),
        "frames": ("shard/frames.py", "import zstandard"),
        "a lock": ("storage/s3.py", "import threading\nlock = threading.Lock()"),
        "threads of the engine": ("engine/retry.py", "import threading\nthreading.Thread(target=print)"),
        "steady chance": ("plan/order.py", "import numpy as np\nnp.random.Philox(np.random.SeedSequence(1))"),
        "a variable called time": ("dataset.py", "time = 3\nrandom = time.real"),
        "torch without its surroundings": ("dataset.py", "from torch.utils.data import IterableDataset\nimport torch"),
    }.values(),
)
def test_what_is_allowed_is_not_found(file: str, source: str) -> None:
    """The check is silent when it should be."""
    assert offences(planted(file, source)) == []


def test_a_file_without_a_room_is_found() -> None:
    """A file called ``utils.py`` has no layer."""
    with pytest.raises(LookupError, match=r"utils\.py"):
        offences({"utils.py": ast.parse("")})


def test_a_planted_ring_is_found() -> None:
    """Two files of one room that import each other are a ring."""
    package = {
        "plan/order.py": ast.parse("from streamshards.plan import state"),
        "plan/state.py": ast.parse("def f():\n    from streamshards.plan.order import x"),
    }
    assert cycles(package) == [["plan/order.py", "plan/state.py", "plan/order.py"]]


# ---- what a bare import pays for -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["-c", f"import {PACKAGE}"], ["-m", PACKAGE, "--help"]], ids=["import", "--help"])
def test_torch_is_not_paid_for_before_it_is_needed(command: list[str]) -> None:
    """``import streamshards`` and ``streamshards --help`` don't import torch."""
    timed = [sys.executable, "-X", "importtime", *command]
    done = subprocess.run(timed, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert PACKAGE in imported
    assert sorted(name for name in imported if is_named(name, "torch")) == []
