"""Tables of one layer and its stages: time, rates, ratios to dense and to its peers, scaling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from report.read import Results, Table, machine_label, peer_rows, rows_of, run_id

_BASELINE = {"dense": "eager dense", "dense compiled": "compiled dense"}


def peers(all_results: Results) -> Table:
    """The layer as ratios to dense, a column a shape at FLUX's width: ours, then the peers."""
    columns: dict[str, dict[str, str]] = {}
    for name, results in all_results.items():
        runs = len({row["run"] for row in peer_rows(results)})
        for row in peer_rows(results):
            what = f"{row['pass'].replace('_', ' + ')}, T={row['shape']['T']}"
            cells = {"FLOP limit": f"{row['flop_limit']:.3f}"}
            for contender, ratio in row["ratio_to_dense"].items():
                low, high = row["ratio_quartiles"][contender]
                cells[contender] = f"{ratio:.3f} ({low:.3f}-{high:.3f})"
            where = f"{machine_label(name, results)}: {what}"
            run = f", {run_id(name, results, row)}" if runs > 1 else ""
            columns[f"{where} (x {_against(row)}{run})"] = cells
    known = dict.fromkeys(name for cells in columns.values() for name in cells)
    first = [name for name in ("FLOP limit", "moe_ffn") if name in known]
    order = first + [name for name in known if name not in first and name not in _BASELINE]
    return ["x dense", *columns], [
        [name, *(cells.get(name, "") for cells in columns.values())] for name in order
    ]


def _against(row: Mapping[str, Any]) -> str:
    """The dense FFN that ratios refer to, the faster one, and how often both ran."""
    rounds = len(row["seconds"]["moe_ffn"]["rounds"])
    return f"{_BASELINE[row['baseline']]}, {rounds} round{'s' if rounds != 1 else ''}"


def layers(all_results: Results) -> Table:
    """moe_ffn and every peer, as ratios to the dense FFN measured beside them."""
    header = ["machine", "layer", "routing", "pass", "FLOP limit", "moe_ffn / dense", "against",
              "peers / dense", "of floor", "peak MiB (dense)", "saved for backward MiB (dense)",
              "launches", "host syncs", "back-end", "config", "run"]  # fmt: skip
    rows = []
    for machine, row, origin in rows_of(all_results, "layers"):
        ratios = dict(row["ratio_to_dense"])
        ours = ratios.pop("moe_ffn")
        low, high = row["ratio_quartiles"]["moe_ffn"]
        rows.append([
            machine, _shape(row["shape"]), row["shape"]["routing"],
            row["pass"].replace("_", " + "), f"{row['flop_limit']:.3f}",
            f"{ours:.3f} ({low:.3f}-{high:.3f})", _against(row),
            ", ".join(f"{n} {r:.2f}" for n, r in sorted(ratios.items(), key=lambda i: i[1])),
            f"{row['share_of_floor']:.0%}", _pair(row.get("peak_bytes_of", {})),
            _pair(row.get("saved_bytes_of", {})), str(row.get("launches", "")),
            str(row.get("host_syncs", "")), *origin,
        ])  # fmt: skip
    return header, rows


def _shape(shape: Mapping[str, Any]) -> str:
    return (f"T={shape['T']} D={shape['D']} {shape['S']}+{shape['E']}x{shape['H']} "
            f"top-{shape['K']}")  # fmt: skip


def _pair(size: Mapping[str, int | None]) -> str:
    """Ours and dense's, in MiB."""
    if not size.get("moe_ffn") or not size.get("dense"):
        return ""
    return f"{size['moe_ffn'] / 2**20:.0f} ({size['dense'] / 2**20:.0f})"


def stages(all_results: Results) -> Table:
    """Each stage: time, rates, shares of the measured ceilings and of the floor."""
    header = ["machine", "stage", "T", "D", "routing", "time us", "TFLOP/s", "of ceiling", "GB/s",
              "of copy ceiling", "of floor", "against", "back-end", "config", "run"]  # fmt: skip
    rows = []
    for machine, row, origin in rows_of(all_results, "stages"):
        ours, share = next(iter(row["seconds"].values())), row["share_of_ceiling"]
        rows.append([
            machine, row["stage"], str(row["shape"]["T"]), str(row["shape"]["D"]),
            row["shape"]["routing"], f"{ours['median'] * 1e6:.1f}",
            f"{row['tflops']:.3g}", f"{share['tflops']:.0%}",
            f"{row['gbps']:.3g}", f"{share['gbps']:.0%}", f"{row['share_of_floor']:.0%}",
            ", ".join(f"{ratio:.2f} x {peer}" for peer, ratio in row["ratio_to"].items()),
            *origin,
        ])  # fmt: skip
    return header, rows


def scaling(all_results: Results) -> Table:
    """Time and memory of the layer, one thing varied at a time."""
    header = ["machine", "varied", "value", "layer", "moe_ffn ms", "dense ms", "ratio",
              "FLOP limit", "peak MiB (dense)", "back-end", "config", "run"]  # fmt: skip
    rows = []
    for machine, row, origin in rows_of(all_results, "scaling"):
        for point in row["points"]:
            ours, dense = (point["seconds"][n]["median"] * 1e3 for n in ("moe_ffn", "dense"))
            rows.append([
                machine, row["axis"].replace("_", " "), f"{point['value']:g}",
                _shape(point["shape"]), f"{ours:.3g}", f"{dense:.3g}",
                f"{point['ratio_to_dense']:.3f}", f"{point['flop_limit']:.3f}",
                _pair(point["peak_bytes"]), *origin,
            ])  # fmt: skip
    return header, rows


def unavailable(all_results: Results) -> Table:
    """Peers and modes that were asked for and not measured, and why, a line a reason."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for name, results in all_results.items():
        label = machine_label(name, results)
        missing = [
            (row, peer, why, f"{row['pass'].replace('_', ' + ')} {row['name']} "
             f"{row['shape']['routing']}")
            for row in results["layers"] for peer, why in row.get("unavailable", {}).items()
        ] + [
            (row, f"{model}, {mode}", entry[key], "models")
            for model, row in results["models"].items()
            for mode, entry in row.get("modes", {}).items()
            for key in ("unavailable", "incomplete") if key in entry
        ]  # fmt: skip
        for row, what, why, where in missing:
            key = label, what, " ".join(why.split()), run_id(name, results, row)
            found.setdefault(key, []).append(where)
    rows = [[machine, what, why, ", ".join(where) if len(where) < 3 else f"{len(where)} layers",
             run] for (machine, what, why, run), where in found.items()]  # fmt: skip
    return ["machine", "what", "why", "where", "run"], rows
