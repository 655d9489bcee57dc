# SPDX-License-Identifier: Apache-2.0
"""bench - measurements that can be repeated and shared; `wan_attn.bench.measure_step` is public.

timing.py   clocks (device events, wall clock), interleaved rounds, measure_step
facts.py    the machine: names, versions, clocks and throttling, peaks to divide by
peers.py    all that can compute one attention call: our rows, torch's kernels, other packages
accuracy.py error against float64, and memory beside inputs and output
kernels.py  `bench kernels`: all of them on named shapes
model.py    a stack of Wan transformer blocks with random weights, and the attention it can run on
step.py     `bench step`: one denoising step per backend
suite.py    `bench suite`: steps over frame counts, as a CSV file that compare.py can judge
compare.py  `bench compare`: two such files, with the spread of their rounds as the yardstick
report.py   one result as terminal table, CSV, JSON and Markdown
plots.py    the same as pictures (needs matplotlib: the extra `bench`)
progress.py a progress bar where there is something to draw one with

No benchmark decides a test, and nothing here is imported before it is asked for.
"""

from wan_attn.bench.timing import StepTiming, measure_step

__all__ = ["StepTiming", "measure_step"]
