"""Random programs on random meshes with random plans against one device: what holds, what is refused, what is wrong.

python benchmarks/random_programs.py 300            typed programs, all ranks as threads of one process
python benchmarks/random_programs.py 100 --whole    emitted programs, in processes: stages, ZeRO, schedules too

Every wrong case is written to a directory as source that runs.
"""

import argparse
import re
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from meshwright import PlanError, UnsupportedError
from tests.gloo.pool import Pool
from tests.programs.checking import Unusable, check_bundle, check_types, is_justified
from tests.programs.drawing import Case, cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", type=int)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build/random_programs"))
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    pool = Pool()

    @seed(options.seed)
    @settings(
        max_examples=options.examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases(stages=options.whole))
    def run(case: Case) -> None:
        kind, detail = outcome(case, pool if options.whole else None)
        outcomes[kind] += 1
        if detail:
            number = sum(outcomes.values())
            options.output.mkdir(parents=True, exist_ok=True)
            name = f"{'whole' if options.whole else 'types'}_{options.seed}_{number}.py"
            (options.output / name).write_text(f"{case}\n\n'''\n{detail}\n'''\n")
            if not outcomes[kind] > 1:
                print(f"{name}: {kind}", flush=True)

    start = time.perf_counter()
    run()
    pool.close()
    print(f"{sum(outcomes.values())} programs, {time.perf_counter() - start:.0f} s")
    for kind, count in outcomes.most_common():
        print(f"{count:5} {kind}")


def outcome(case: Case, pool: Pool | None) -> tuple[str, str]:
    """What a case does in a few words, and what there is to look at if that is not as it should be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_types(case) if pool is None else check_bundle(case, pool)
    except Unusable as error:
        return f"not usable: {str(error).splitlines()[0]:.60}", ""
    except (PlanError, UnsupportedError) as error:
        kind = f"refused: {_general(str(error).splitlines()[0])}"
        return (f"{kind} (as it should be)", "") if is_justified(case, error) else (kind, str(error))
    except AssertionError as error:
        return f"WRONG: {_general(str(error))}", traceback.format_exc()
    except Exception as error:
        return f"BUG: {type(error).__name__}: {_general(str(error))}", traceback.format_exc()
    return "exact", ""


def _general(message: str) -> str:
    """A message without what differs from case to case."""
    first = message.splitlines()[0] if message else ""
    return re.sub(r"'[^']*'|<[^>]*>:\d+|-?\d[\d.e+-]*|at random_program\S*", "_", first)[:110]


if __name__ == "__main__":
    main()
