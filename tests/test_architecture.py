"""The rules of the house: who may import whom, what is public, and what the wheel holds."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from spikeport import deploy

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("converters", "targets", "deploy")  # each may import those before it
SDKS = {"lyngor", "lynpy", "pylynchipsdk", "poptorch", "popart"}
FRAMEWORKS = {"spikingjelly", "snntorch"}
#: Runs beside an SDK, by itself: every bundle has a copy.
SCRIPT = ROOT / "targets" / "lynxi" / "run_bundle.py"


def _sources() -> list[Path]:
    return [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def _imports(path: Path) -> set[str]:
    """Full names of what a file imports, relative imports resolved."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *filter(None, [node.module])))
            found |= {f"{stem}.{alias.name}" if stem else alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", _sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way_and_name_no_vendor(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    above = LAYERS[LAYERS.index(layer) + 1 :]
    roots = {name.split(".")[0] for name in _imports(path)}
    assert not roots & set(above)
    assert "spikeport" not in roots, "imports inside the package are relative"
    if path != SCRIPT:
        assert not roots & (SDKS | FRAMEWORKS)


def test_the_script_for_other_machines_is_never_imported() -> None:
    assert not [p for p in _sources() if any(SCRIPT.stem in name for name in _imports(p))]


def test_the_rule_sees_a_wrong_import(tmp_path: Path) -> None:
    wrong = ROOT / "converters" / "passes" / "cast_float16.py"
    assert any(name.startswith("converters.") for name in _imports(wrong))


def test_the_public_names_are_there_and_compare_is_a_function() -> None:
    import spikeport.deploy.compare  # noqa: F401 -- which must not take the name

    assert all(hasattr(deploy, name) for name in deploy.__all__)
    assert callable(deploy.compare)
    tree = [value for value in vars(deploy).values() if isinstance(value, type)]
    errors = {cls.__name__ for cls in tree if issubclass(cls, deploy.SpikeportError)}
    assert errors <= set(deploy.__all__)


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {n for n in archive.namelist() if not n.split("/")[0].endswith(".dist-info")}
    modules = {f"spikeport/{p.relative_to(ROOT).as_posix()}" for p in _sources()}
    assert held == modules | {f"spikeport/{layer}/py.typed" for layer in LAYERS}
