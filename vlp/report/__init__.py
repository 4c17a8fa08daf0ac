"""`vlp report`: one self-contained HTML file about one run, or about several, made from their workdirs alone.

html.py     entry points: `write`, `write_comparison`    templates/  layout, style and script of the pages
load.py     workdir → Run (rows as they are)             numbers.py  numbers → short text
curves.py   Run → charts: which keys share one           names.py    keys → words; which direction is better
summary.py  Run → paragraph and figures                  traces.py   a line: running mean, thinning
tables.py   evaluations, stages, config → tables         axes.py     value → pixel, round ticks
gallery.py  artefacts → pictures                         svg.py      chart → inline SVG
compare.py  several runs → tables and charts

Python turns numbers into text; templates place text and escape it (vlp/core/pages.py).
"""
