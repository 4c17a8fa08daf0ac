"""One self-contained HTML file about one run, made from its workdir alone.

load.py     workdir → Run (rows as they are)        numbers.py  numbers → short text
curves.py   Run → charts: which keys share one      svg.py      chart → inline SVG
traces.py   a line: mean, thinning                  axes.py     value → pixel, round ticks
summary.py  Run → paragraph and tiles               gallery.py  artefacts → pictures
tables.py   evaluation, config, version tables      style.py    the CSS and JavaScript
html.py     all of these → the page; `write` is the entry point
"""
