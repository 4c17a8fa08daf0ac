"""One self-contained HTML file about one run, made from its workdir alone.

load.py     workdir → Run (rows as they are)        numbers.py  numbers → short text
curves.py   Run → charts: which keys share one      names.py    keys → words; which way is better
traces.py   a line: mean, thinning                  svg.py      chart → inline SVG
summary.py  Run → paragraph and figures             axes.py     value → pixel, round ticks
tables.py   evaluation, stage, config tables        gallery.py  artefacts → pictures
compare.py  several runs side by side               style.py    the CSS and JavaScript
html.py     all of these → the page; `write` is the entry point (the frame: vlp/core/pages.py)
"""
