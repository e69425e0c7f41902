"""The command line: one file per command, all talking to the daemon of this machine through
`snapd.rpc.local_client`.

Output goes to stdout as tables, or with `--json` as one JSON document; errors are one line on stderr. Exit
codes are stable: 0 done, 1 found nothing, 2 usage, 3 found but unusable, 4 unreachable.
"""

from __future__ import annotations

import os

# gRPC's Python interface has no setting for the version of TLS. This list, which names the ciphers of versions before
# 1.3, has none in it that two ends with certificates can agree on, so what is left is TLS 1.3. gRPC reads it when it is
# first imported: before anything else of snapd. Whoever has set it keeps what he wants.
os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", "ECDHE-PSK-AES128-CBC-SHA")
