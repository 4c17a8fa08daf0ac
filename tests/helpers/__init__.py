"""What tests share: `runs` (tiny models), `formats` (pairs in every format), `fake_run` (a finished workdir)."""
