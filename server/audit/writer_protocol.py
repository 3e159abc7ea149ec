"""What writer and clients say to each other on the socket; docs/specs/audit-log.md, section 9."""

from __future__ import annotations

import struct

LENGTH = struct.Struct(">I")
ACK = struct.Struct(">BQI")
DURABLE, UNAVAILABLE, REFUSED = 0, 1, 2
MAX_MESSAGE_BYTES = 1 << 20
