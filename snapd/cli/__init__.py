"""The command line: one file per command, all talking to the daemon of this machine through
`snapd.rpc.local_client`.

Output goes to stdout as tables, or with `--json` as one JSON document; errors are one line on stderr. Exit
codes are stable: 0 done, 1 found nothing, 2 usage, 3 found but unusable, 4 unreachable.
"""
