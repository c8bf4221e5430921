"""What capture costs next to the plain forward: CPU time and peak memory, each method in a fresh process.

Usage::

    python benchmarks/capture_cost.py                         # the default cases, a Markdown table
    python benchmarks/capture_cost.py b16-224-4 l14-336-2     # model, input pixels, batch
    python benchmarks/capture_cost.py --one rollout b16-224-4 # one measurement, as JSON

Ratios are to the plain SDPA forward (or, for relevance, to forward and backward down to the pixels) of the
same process, interleaved, one thread; memory is the peak above the loaded model. Random CLIP towers: the cost of
attention does not depend on its values. Needs Linux (/proc) and transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")  # freed memory goes back, so peaks are honest

SIZES = {"b16": (768, 12, 12, 16), "l14": (1024, 24, 16, 14)}
DEFAULT = ("b16-224-4", "l14-336-1", "b16-1024-1")
METHODS = ("rows", "rows+entropy+received", "rollout", "rollout max", "relevance", "legrad", "eager")


def source_of(case: str, attention: str = "sdpa") -> tuple[Any, Any]:
    """A CLIP vision tower of that size as an attention source, and a random batch."""
    import torch
    import transformers

    from foveate.interfaces import Batch
    from foveate.testing.tiny import SITE, STREAM, Site, TinyConfig, TinySource

    name, pixels, count = case.split("-")
    width, layers, heads, patch = SIZES[name]
    config = transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch_size=patch,
        image_size=int(pixels),
        attn_implementation=attention,
    )

    class Tower(TinySource):
        def __init__(self) -> None:
            super().__init__(TinyConfig(int(pixels), patch, width, heads, layers))
            torch.manual_seed(0)
            self._module = transformers.CLIPVisionModel(config).eval().requires_grad_(False)

        @property
        def sites(self) -> tuple[Site, ...]:
            modules = {f"encoder.layers.{i}.self_attn": i for i in range(layers)}
            return (Site(SITE, modules, heads, STREAM, STREAM),)

        def forward(self, batch: Batch, *, grad: bool = False) -> Any:
            with torch.set_grad_enabled(grad):
                return self.module(batch.inputs).pooler_output

    inputs = torch.randn(int(count), 3, int(pixels), int(pixels))
    return Tower(), Batch(inputs, (), tuple(map(str, range(int(count)))))


def work(method: str, case: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """(what to measure, what to compare it with)."""
    import torch

    from foveate.capture.engine import capture_batch
    from foveate.capture.gradient_maps import legrad
    from foveate.capture.relevance import relevance
    from foveate.capture.rollout import rollout
    from foveate.capture.trace import trace
    from foveate.interfaces import BoundTarget, CapturePlan, SitePlan, TargetRow
    from foveate.testing.tiny import SITE

    source, batch = source_of(case)
    slow, _ = source_of(case, "eager") if method == "eager" else (source, batch)
    bound = BoundTarget(tuple(TargetRow(i, "class", 0) for i in range(len(batch))), "logit")

    def forward() -> object:
        return source.forward(batch)

    def backward() -> object:
        inputs = batch.inputs.clone().requires_grad_()
        scores = source.module(inputs).pooler_output[:, 0].sum()
        return torch.autograd.grad(scores, inputs)

    def keep(*reductions: str) -> Callable[[], object]:
        plan = CapturePlan((SitePlan(SITE, reductions=reductions),))
        return lambda: capture_batch(source, batch, plan)

    def eager() -> object:
        with torch.no_grad():
            return slow.module(batch.inputs, output_attentions=True).attentions

    methods: dict[str, Callable[[], object]] = {
        "plain": forward,
        "backward": backward,
        "rows": keep(),
        "rows+entropy+received": keep("entropy", "received"),
        "rollout": lambda: rollout(trace(source, batch)),
        "rollout max": lambda: rollout(trace(source, batch), fuse="max"),
        "relevance": lambda: relevance(trace(source, batch, grad=True), bound, keep_graph=False),
        "legrad": lambda: legrad(trace(source, batch, grad=True), bound, keep_graph=False),
        "eager": eager,
    }
    gradient = method in ("relevance", "legrad", "backward")
    return methods[method], methods["backward" if gradient else "plain"]


def measure(method: str, case: str, repeat: int) -> dict[str, float]:
    """CPU seconds, ratio to the reference, and peak megabytes of one method and of the reference."""
    import torch

    torch.set_num_threads(1)
    run, reference = work(method, case)
    reference()
    base_memory, memory = peak(reference), peak(run)
    pairs = [(cpu(reference), cpu(run)) for _ in range(repeat)]
    return {
        "seconds": min(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
        "megabytes": memory,
        "reference_megabytes": base_memory,
    }


def cpu(run: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def peak(run: Callable[[], object]) -> float:
    """Peak resident megabytes of one call above what was there before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """A memory field of this process, in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def main() -> None:
    """Run one measurement, or all of them in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cases", nargs="*", default=DEFAULT)
    parser.add_argument("--one", metavar="METHOD")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.cases[0], options.repeat)))
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, 1 thread, Python {platform.python_version()}\n")
    print("| case | method | CPU s | ratio | peak MB | reference MB |\n|---|---|---|---|---|---|")
    for case in options.cases:
        for method in options.methods:
            command = [sys.executable, __file__, "--one", method, "--repeat", str(options.repeat), case]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"| {case} | {method} | failed: {done.stderr.strip().splitlines()[-1:]} | | | |", flush=True)
                continue
            m = json.loads(done.stdout)
            print(
                f"| {case} | {method} | {m['seconds']:.2f} | {m['ratio']:.3f} | {m['megabytes']:.0f} "
                f"| {m['reference_megabytes']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
