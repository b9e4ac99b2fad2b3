"""Values of a configuration that hold secrets, for every test that looks at what is shown or written."""

from __future__ import annotations

WORDS = ("SECRET", "aB/c", "aB%2Fc", "aB%2fc", "c+dEf", "c%2BdEf", "hunter", "AKIAKEY")
"""No part of a secret, in any form, may be seen."""

VALUES = {
    "signed": "https://acc.blob.core.windows.net/set/train?sv=2024-01-01&sig=aB%2Fc%2BdEf%3D&se=SECRET",
    "user": "https://ann:hunter2@host:8443/set",
    "password with signs": "https://ann:hun@hunter'2@host/set",
    "keys": "s3://AKIAKEY:SECRET@bucket/set?versionId=SECRET#SECRET",
    "quote in the query": "https://host/it's/set?sig=x'SECRET",
    "pipe": "pipe:curl -sf -H 'Authorization: Bearer SECRET' https://host/{name}?sig=SECRET",
    "pipe with double quotes": 'pipe:curl -H "Authorization: Bearer SECRET" -d "SECRET" "https://u:hunter2@host/{name}"',
    "pipe with JSON": """pipe:curl -d '{"token": "SECRET", "a": ["SECRET"]}' https://host/{name}""",
    "pipe of two lines": "pipe:export KEY=SECRET\ncurl -H SECRET https://host/{name}?sig=SECRET",
}
"""By what is special about them."""


def seen(text: object) -> list[str]:
    """The secrets that can be read in a text."""
    return [word for word in WORDS if word in str(text)]
