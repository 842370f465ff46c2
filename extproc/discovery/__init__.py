"""Shell: which engines there are, what they are, whether they are up.

`info` is pure (what an engine says about itself), and so is the state machine in `health`. `fetch` is the one way to
ask an engine anything, `api_keys` has the tokens for it, `resolve` turns host names into endpoints, `tasks` owns one
task a worker, `probe` asks one engine everything once.
"""
