"""The service on several processes: one view of the load table in all of them, a leader that does what is done once.

`messages` what they say to each other · `replica` the table's changes, out and in (no I/O) · `snapshot` the whole table
for a process that begins · `channel` the sockets · `serving` what every process has · `leader` and `follower` ·
`figures` the sums on the metrics page. docs/processes.md says why it is so.
"""
