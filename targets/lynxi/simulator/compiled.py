"""The files of a compiled network: JSON and safetensors in the layout that the SDK writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from .engine import Engine
from .graph import CONST, Graph, Node
from .options import Options, current

FORMAT = 1
NET = "Net_0"
_GRAPH = "prim_graph.json"
_PARAMS = "params.safetensors"


class CorruptError(RuntimeError):
    """The files of a compiled network are missing, cut short or changed."""


@dataclass
class Compiled:
    """A compiled network.

    Attributes:
        graph: Its primitives.
        params: Its constants.
        options: The options that it was built with, and runs with; only whether to run fast is
            decided when it is loaded.
        run_batch: How often one call runs it, over inputs that lie one after the other.
        target: ``"apu"``, ``"cpu"`` or ``"llvm"``.
    """

    graph: Graph
    params: dict[str, Tensor]
    options: Options
    run_batch: int = 1
    target: str = "apu"

    def engine(self) -> Engine:
        """The network ready to run."""
        return Engine(self.graph, self.params, self.options)


def _stamp(compiled: Compiled) -> dict[str, Any]:
    return {
        "note": "written by spikeport's simulation of the Lynxi SDK; no chip can load it",
        "format": FORMAT,
        "options": {k: v for k, v in compiled.options.to_dict().items() if k != "optimise"},
    }


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


def _partition(graph: Graph) -> dict[str, Any]:
    """Runs of nodes on one side, in order: ``{"apu_0": {...}, "cpu_0": {...}}``."""
    parts: dict[str, Any] = {}
    count = {"apu": 0, "cpu": 0}
    side = ""
    current: list[Node] = []
    for node in graph.nodes:
        if not node.inputs:
            continue
        here = "cpu" if node.on_cpu else "apu"
        if here != side:
            side, current = here, []
            parts[f"{here}_{count[here]}"] = current
            count[here] += 1
        current.append(node)
    return {
        name: {"is_abc": "false", "operations": [f"{n.source or n.op} ({n.op})" for n in nodes]}
        for name, nodes in parts.items()
    }


def write(
    compiled: Compiled, out_path: Path, *, build_mode: str, settings: Mapping[str, Any]
) -> None:
    """Write a compiled network; the same network gives the same bytes.

    Args:
        compiled: The network.
        out_path: Directory to write into; made if need be.
        build_mode: What net_params.json says.
        settings: More of what net_params.json says (is_map, cpu_arch, cc, version).

    Raises:
        OSError: The directory cannot be written.
    """
    graph = compiled.graph
    files = {
        _GRAPH: _json({"simulator": _stamp(compiled), **graph.to_dict()}),
        _PARAMS: save_tensors(compiled.params),
    }
    folder = out_path / NET / "apu_0"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    top = {
        "main": {
            "inputs": {
                p.name: {"shape": str(p.shape), "dtype": p.dtype, "batch": compiled.run_batch}
                for p in graph.inputs
            },
            "outputs": {p.name: {"shape": str(p.shape), "dtype": p.dtype} for p in graph.outputs},
            "is_concat_output": False,
        },
        **_partition(graph),
        "simulator": {
            **_stamp(compiled),
            "target": compiled.target,
            "run_batch": compiled.run_batch,
            "sha256": {n: hashlib.sha256(d).hexdigest() for n, d in files.items()},
        },
    }
    (out_path / NET / "top_graph.json").write_bytes(_json(top))
    net = {
        **settings,
        "target": compiled.target,
        "chip_num": 1,
        "net_num": 1,
        "parallel_mode": "DP",
        "run_batch": compiled.run_batch,
        "file_name": {"io_config": "top_graph.json"},
        "is_dynamic_shape": False,
        "build_mode": build_mode,
        "simulator": _stamp(compiled),
    }
    (out_path / "net_params.json").write_bytes(_json(net))


def read(path: Path) -> Compiled:
    """Read what :func:`write` wrote, from its directory or the ``Net_0`` in it.

    Raises:
        CorruptError: Something is missing or is not what was written.
    """
    net = path if (path / "top_graph.json").exists() else path / NET
    try:
        top = json.loads((net / "top_graph.json").read_bytes())
        stamp = top["simulator"]
        if stamp["format"] != FORMAT:
            raise CorruptError(
                f"{net}: format {stamp['format']}; this simulator reads {FORMAT}; build again"
            )
        data = {}
        for name in (_GRAPH, _PARAMS):
            data[name] = (net / "apu_0" / name).read_bytes()
            if hashlib.sha256(data[name]).hexdigest() != stamp["sha256"][name]:
                raise CorruptError(f"{net / 'apu_0' / name} is not what was built; build again")
        graph = Graph.from_dict(json.loads(data[_GRAPH]))
        # In memory of torch's own: the order in which a library adds up follows the alignment.
        params = {name: tensor.clone() for name, tensor in load_tensors(data[_PARAMS]).items()}
        options = Options(**{**stamp["options"], "optimise": current().optimise})
        run_batch, target = int(stamp["run_batch"]), str(stamp["target"])
    except FileNotFoundError as error:
        raise CorruptError(
            f"{error.filename} does not exist; give the path that Builder.build returned, or "
            f"its {NET}"
        ) from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{net} does not hold a compiled network: {error!r}") from error
    lost = [n.attrs["name"] for n in graph.nodes if n.op == CONST and n.attrs["name"] not in params]
    if lost:
        raise CorruptError(f"{net}: constants {', '.join(lost)} are missing; build again")
    return Compiled(graph, params, options, run_batch, target)
