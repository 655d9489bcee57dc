# SPDX-License-Identifier: Apache-2.0
"""check - `python -m wan_attn check`: is every kernel right on this machine, and how fast.

run.py       the process that the user started: starts workers, ends those that hang, keeps results
worker.py    the process in which items run, one after another; it may crash or hang
plan.py      what there is to do, the most telling first
target.py    the device under test: its rows, its sizes, how a call reaches it
calls.py     small calls against float64: every tile, every length, every mask
real.py      Wan's calls against float64, and offsets beyond 2^31 elements
programs.py  CUDA graphs and a second stream
speed.py     our rows beside everything else that is installed: time, memory, clocks
sanitizer.py NVIDIA's compute-sanitizer, where it is installed
results.py   what is known so far, the verdict on each kernel, and the one line of it all
report.py    the file for an issue, and the text for the terminal
private.py   names of people and machines, and paths: none of them gets into a report
"""
