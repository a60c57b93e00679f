"""The required settings."""

KEY, OTHER_KEY = "A" * 43 + "=", "B" * 42 + "A="  # the same in each process that collects tests
REQUIRED = {"XONE_CLIENT_ID": "id", "XONE_CLIENT_SECRET": "secret", "DATA_KEYS": KEY}
