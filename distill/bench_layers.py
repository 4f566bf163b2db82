"""Tables of one layer and its stages: time, rates, ratios to dense and to its peers."""

from __future__ import annotations

from collections.abc import Mapping

from distill.bench_results import Results, Table, machine_label


def peers(all_results: Results) -> Table:
    """The layer as ratios to dense, a column a shape at FLUX's width: ours, then the peers."""
    columns: dict[str, dict[str, str]] = {}
    for name, results in all_results.items():
        for row in results["layers"]:
            shape = row["shape"]
            if shape["D"] != 3072 or shape["routing"] != "balanced":
                continue
            what = row["pass"].replace("_", " + ")
            cells = {"FLOP limit": f"{row['flop_limit']:.3f}"}
            for contender, ratio in row["ratio_to_dense"].items():
                low, high = row["ratio_quartiles"][contender]
                cells[contender] = f"{ratio:.3f} ({low:.3f}-{high:.3f})"
            columns[f"{machine_label(name, results)}: {what}, T={shape['T']}"] = cells
    known = dict.fromkeys(name for cells in columns.values() for name in cells)
    first = [name for name in ("FLOP limit", "moe_ffn") if name in known]
    order = first + [name for name in known if name not in first and name != "dense"]
    return ["x dense", *columns], [
        [name, *(cells.get(name, "") for cells in columns.values())] for name in order
    ]


def layers(all_results: Results) -> Table:
    """moe_ffn and every peer, as ratios to the dense FFN measured beside them."""
    header = ["machine", "layer", "routing", "pass", "FLOP limit", "moe_ffn / dense",
              "peers / dense", "peak MiB (dense)", "saved for backward MiB (dense)",
              "launches", "host syncs",
              "back-end"]  # fmt: skip
    rows = []
    for name, results in all_results.items():
        for row in results["layers"]:
            ratios = dict(row["ratio_to_dense"])
            ours = ratios.pop("moe_ffn")
            low, high = row["ratio_quartiles"]["moe_ffn"]
            peers = ", ".join(f"{n} {r:.2f}" for n, r in sorted(ratios.items(), key=lambda i: i[1]))
            shape = row["shape"]
            rows.append([
                machine_label(name, results),
                f"T={shape['T']} D={shape['D']} {shape['S']}+{shape['E']}x{shape['H']} "
                f"top-{shape['K']}",
                shape["routing"],
                row["pass"].replace("_", " + "),
                f"{row['flop_limit']:.3f}",
                f"{ours:.3f} ({low:.3f}-{high:.3f})",
                peers,
                _pair(row.get("peak_bytes_of", {})),
                _pair(row.get("saved_bytes_of", {})),
                str(row.get("launches", "")),
                str(row.get("host_syncs", "")),
                row["backend"],
            ])  # fmt: skip
    return header, rows


def _pair(size: Mapping[str, int | None]) -> str:
    """Ours and dense's, in MiB."""
    if not size.get("moe_ffn") or not size.get("dense"):
        return ""
    return f"{size['moe_ffn'] / 2**20:.0f} ({size['dense'] / 2**20:.0f})"


def stages(all_results: Results) -> Table:
    """Each stage: time, rates, shares of the measured ceilings and of the floor."""
    header = ["machine", "stage", "T", "D", "routing", "time us", "TFLOP/s", "GB/s",
              "of ceiling", "of floor", "against"]  # fmt: skip
    rows = []
    for name, results in all_results.items():
        for row in results["stages"]:
            ours = next(iter(row["seconds"].values()))
            share = max(row["share_of_ceiling"].values())
            rows.append([
                machine_label(name, results), row["stage"], str(row["shape"]["T"]),
                str(row["shape"]["D"]), row["shape"]["routing"], f"{ours['median'] * 1e6:.1f}",
                f"{row['tflops']:.3g}", f"{row['gbps']:.3g}", f"{share:.0%}",
                f"{row['share_of_floor']:.0%}",
                ", ".join(f"{ratio:.2f} x {peer}" for peer, ratio in row["ratio_to"].items()),
            ])  # fmt: skip
    return header, rows
