"""From tokens to an evicted cache: prefill, decode, sampling, scoring; then text and conversations on top."""
