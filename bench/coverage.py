"""How much of every compact network of timm `accelerate` puts on fused kernels: ``python -m bench.coverage [OPTIONS]``.

Models are built on the meta device, so none is run. One line per model, then the sums and the commonest reasons.
"""

from __future__ import annotations

import argparse
import collections
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from biasloss_ext import accelerate
from biasloss_ext.report import DEPTHWISE, KINDS


def names() -> list[str]:
    """The models of timm; the weights of one architecture are one model."""
    import timm

    return list(timm.list_models())


def coverage(name: str) -> dict[str, Any] | None:
    """What `accelerate` reports of a model, as data; None for a model without depthwise convolutions."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    report = accelerate(model)
    if report.count(DEPTHWISE).total == 0:
        return None
    reasons = {reason: sum(layer.kind == DEPTHWISE for layer in layers) for reason, layers in report.reasons().items()}
    return {
        "model": name,
        "family": timm.models.model_entrypoint(name).__module__.rpartition(".")[2],
        **{kind: list(report.count(kind)) for kind in KINDS},
        "left": {reason: number for reason, number in reasons.items() if number},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="take every N-th model only")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument(
        "--left", action="store_true", help="count again only the models of --out that are not covered whole"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    known = json.loads(options.out.read_text()) if options.left else []
    found = [result for result in known if not result["left"]]
    reasons = collections.Counter[str]()
    for name in [result["model"] for result in known if result["left"]] or names()[:: options.every]:
        try:
            result = coverage(name)
        except Exception as error:  # a model that this timm cannot build on the meta device
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", flush=True)
            continue
        if result is not None:
            found.append(result)
            reasons.update(result["left"])
            print(
                name,
                *(f"{kind} {result[kind][0]}/{result[kind][1]}" for kind in KINDS),
                result["left"] or "",
                flush=True,
            )
    full = sum(result[DEPTHWISE][0] == result[DEPTHWISE][1] for result in found)
    none = sum(result[DEPTHWISE][0] == 0 for result in found)
    fused, total = (sum(result[DEPTHWISE][i] for result in found) for i in (0, 1))
    print(
        f"{len(found)} models: {full} fully, {len(found) - full - none} partly, {none} not; "
        f"{fused} of {total} depthwise convolutions"
    )
    for reason, number in reasons.most_common(20):
        print(f"  {number}: {reason}")
    if options.out:
        options.out.write_text(json.dumps(sorted(found, key=lambda result: str(result["model"])), indent=1))


if __name__ == "__main__":
    main()
