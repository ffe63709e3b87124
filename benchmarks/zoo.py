"""Which of Transformers' model classes compile and train exactly, on which mesh.

    python benchmarks/zoo.py [LlamaForCausalLM ...] [--mesh tp2 ...] [--markdown] [--referee]

Small configurations (tests/zoo), float64: the loss and every gradient of one step against one device. A cell says
"exact", "exact, N whole" (N operators have no rule and ran whole), or why not. All ranks are threads of this process;
--processes gives each a process of its own, over gloo. With --referee nothing is trained: the types of every emitted
line go before the checker of spmd-types (tests/null/referee.py), and a cell says "typechecks" or what it objects to.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests import zoo  # noqa: E402
from tests.gloo.outcomes import MESHES, judged, outcome, trained  # noqa: E402
from tests.gloo.pool import OneProcess, Pool  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", metavar="CLASS", help=f"default: all {len(zoo.ZOO)}")
    parser.add_argument("--mesh", nargs="*", choices=list(MESHES), default=list(MESHES))
    parser.add_argument("--processes", action="store_true", help="ranks as processes over gloo instead of threads")
    parser.add_argument("--markdown", action="store_true", help="print the table for the README")
    parser.add_argument("--referee", action="store_true", help="typecheck the emitted stages instead of training them")
    args = parser.parse_args()
    if unknown := [name for name in args.classes if name not in zoo.ZOO]:
        parser.error(f"tests/zoo has no {', '.join(unknown)}: it has {', '.join(zoo.ZOO)}")
    logging.disable(logging.WARNING)
    ranks, rows = Pool() if args.processes else OneProcess(), {}
    check = judged if args.referee else trained(ranks)
    for name in args.classes or zoo.ZOO:
        started = time.perf_counter()
        rows[name] = [outcome(check, name, mesh) for mesh in args.mesh]
        print(f"{name:<36} {time.perf_counter() - started:6.1f} s  {' | '.join(rows[name])}", flush=True)
    if isinstance(ranks, Pool):
        ranks.close()
    if args.markdown:
        print("\n| model | " + " | ".join(args.mesh) + " |\n" + "|---" * (1 + len(args.mesh)) + "|")
        print("\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()))
        return
    table = Table("model", *args.mesh)
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
