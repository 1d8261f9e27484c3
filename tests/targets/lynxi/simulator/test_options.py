from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from spikeport.targets.lynxi.simulator import Options, current, options


def test_environment_and_context(monkeypatch: pytest.MonkeyPatch) -> None:
    assert current() == Options()
    monkeypatch.setenv("SPIKEPORT_LYNXI_SIM_STORAGE", "float32")
    monkeypatch.setenv("SPIKEPORT_LYNXI_SIM_STRICT", "1")
    monkeypatch.setenv("SPIKEPORT_LYNXI_SIM_DEVICES", "6")
    monkeypatch.setenv("SPIKEPORT_LYNXI_SIM_VERSION", "1.22")
    wanted = Options(storage="float32", strict=True, devices=6, version="1.22")
    assert current() == wanted
    with options(strict=False) as inner:
        assert inner == current() == Options(storage="float32", devices=6, version="1.22")
        with options(Options(), devices=2):
            assert current() == Options(devices=2)
    assert current() == wanted


def test_context_is_of_its_thread() -> None:
    seen = []
    with options(devices=7):
        thread = threading.Thread(target=lambda: seen.append(current().devices))
        thread.start()
        thread.join()
    assert seen == [3]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("STORAGE", "bfloat16", "Options.storage is 'bfloat16'"),
        ("STRICT", "maybe", "it must be 0 or 1"),
        ("DEVICES", "many", "it must be a number"),
        ("DEVICES", "0", "at least 1"),
        ("VERSION", "new", "like '1.17.0'"),
    ],
)
def test_bad_values(name: str, value: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"SPIKEPORT_LYNXI_SIM_{name}", value)
    with pytest.raises(ValueError, match=text):
        current()


def test_import_is_without_side_effects() -> None:
    code = (
        "import sys, spikeport.targets.lynxi.simulator as s; "
        "assert 'lyngor' not in sys.modules and 'lynpy' not in sys.modules; "
        "print(s.lyngor.version)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert result.stdout == "1.1.0\n", result.stderr
