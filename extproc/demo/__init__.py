"""A whole gateway on one machine: `stack` starts and stops it, `python -m extproc.demo` shows what it does.

Uses the package only from outside, as a user would: by its command line and over HTTP.
"""
