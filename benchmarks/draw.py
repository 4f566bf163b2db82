"""Pictures, page and tables of benchmark results.

python benchmarks/draw.py                     # results/report.html and pictures
python benchmarks/draw.py --pages             # the tables of every page that has markers
python benchmarks/draw.py --pages README.md   # of this page
python benchmarks/draw.py --pages --check     # fail where a page is stale
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from report.page import marked_pages, render, update_page  # noqa: E402

from distill.errors import UserError  # noqa: E402
from distill.study import ablate_page  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """0 = done, 1 = `--check` found a stale page, 2 = a user's error (one line on stderr)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="FOLDER")
    parser.add_argument(
        "--pages", nargs="*", type=Path, metavar="FILE", help="Markdown (default: all with markers)"
    )
    parser.add_argument("--check", action="store_true", help="with --pages: write nothing")
    args = parser.parse_args(argv)
    try:
        if args.pages is not None:
            pages = args.pages or marked_pages(HERE.parent)
            stale = [page for page in pages if update_page(page, args.results, args.check)]
            for page in pages:
                done = "stale" if args.check else "wrote"
                print(f"{done if page in stale else 'fresh'}: {page}")
            return int(args.check and bool(stale))
        if (args.results / "claims.html").exists():
            print(f"wrote {ablate_page.rewrite(args.results / 'claims.html')}")
        print(f"wrote {render(args.results)}")
    except UserError as error:
        print(f"draw.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
