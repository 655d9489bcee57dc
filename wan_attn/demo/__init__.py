# SPDX-License-Identifier: Apache-2.0
"""demo - a short video by diffusers' Wan pipeline, with and without wan_attn, compared.

options.py  what was asked for, and whether it is possible
weights.py  random weights of which something can be seen
pipeline.py the WanPipeline, of random or of real weights
runs.py     one denoising run: stock, wan_attn, or stock with another rounding
probe.py    one attention call of the run by itself: time, and error against float64
compare.py  differences between runs, and the verdict
render.py   frames to a video and to a picture
report.py   all that was found, the verdict, and report.json
text.py     the same in words: the terminal's lines, and report.md
wan22.py    the other way: stock Wan2.2's generate.py and its own weights
"""
